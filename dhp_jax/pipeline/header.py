"""What is told before a run begins: network, data, budget, device, directory, what comes next."""

from collections.abc import Sequence
import textwrap

from dhp_jax.artifact.reading import exists, read_description
from dhp_jax.budgets.timing import hardware
from dhp_jax.pipeline.preparation import Run, counted_budgets, length_field
from dhp_jax.report.run_report import network_name
from dhp_jax.workdir.reader import is_complete

PHASES = {
    "search": "a search of at most",
    "converge": "training of the pruned network,",
    "baseline": "training of the unpruned network,",
}


def header(runs: Sequence[Run]) -> str:
    """Lines about runs that are prepared and have not begun; more than one for `targets`."""
    run = runs[0]
    config, method = run.config, run.method
    counts = {what: run.setup.notes.get(f"{what}_examples") for what in ("validation", "test")}
    held = "".join(f"; {count:,} for {what}" for what, count in counts.items() if count)
    shape = "x".join(map(str, run.setup.input_shape))
    lines = [
        (
            "network",
            f"{network_name(config.model)}: {run.cost.flops:,} FLOPs, {run.cost.params:,} params",
        ),
        ("data", f"{config.data.name}: {run.setup.epoch:,} examples of {shape} in an epoch{held}"),
    ]
    if run.blueprint.told:
        lines.append(("latents", run.blueprint.told))
    if method.prunes:
        lines.append(("budget", "; ".join(_budget(one) for one in runs)))
    lines.append(("device", hardware()))
    lines.append(("directory", ", ".join(str(one.workdir) for one in runs)))
    lines.append(("next", _next(runs)))
    return "\n".join(_wrapped(label, text) for label, text in lines)


def _wrapped(label: str, text: str) -> str:
    """A label and its text, on more lines where they do not fit 80 columns."""
    return textwrap.fill(
        f"{label:<9}  {text}",
        80,
        subsequent_indent=11 * " ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _budget(run: Run) -> str:
    shares = {**counted_budgets(run.config), "latency": run.config.budget.latency}
    told = [f"{100 * share:g} % of the {name}" for name, share in shares.items() if share]
    return " and ".join(text.replace("flops", "FLOPs") for text in told)


def _next(runs: Sequence[Run]) -> str:
    """What is left to be trained, of the first run that is not finished."""
    for run in runs:
        method = run.method
        left = [
            f"{PHASES[phase]} {_length(run, phase)}"
            for phase in method.phases
            if not _is_done(run, phase)
        ]
        if left:
            size = f"{run.workdir.name}: " if len(runs) > 1 else ""
            return size + ", then ".join(left)
    return "nothing is left to be trained; the report is written again"


def _is_done(run: Run, phase: str) -> bool:
    """Whether the network at the end of a phase is there; `networks.find_trained` looks closer."""
    path = run.workdir / ("search" if phase == "search" else "model")
    if not exists(path):
        return False
    return is_complete(read_description(path)["notes"]["phase"], run.config[phase])


def _length(run: Run, phase: str) -> str:
    """How long a phase is at most: "300 epochs", or "50 steps"."""
    _, name, count = length_field(run, phase).replace("=", ".").split(".")
    return f"{count} {name.removeprefix('max_')}"
