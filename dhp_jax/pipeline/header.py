"""What is told before a run begins: network, data, budget, device, directory, what comes next."""

from collections.abc import Sequence

import jax

from dhp_jax.config.methods import METHODS
from dhp_jax.pipeline.preparation import Run, counted_budgets, length_field


def header(runs: Sequence[Run]) -> str:
    """Lines about runs that are prepared and have not begun; more than one for `targets`."""
    run = runs[0]
    config, device = run.config, jax.devices()[0]
    method = METHODS[config.method]
    arguments = ", ".join(
        f"{name} {value}" for name, value in config.model.items() if name != "name"
    )
    counts = {what: run.setup.notes.get(f"{what}_examples") for what in ("validation", "test")}
    held = "".join(f"; {count:,} for {what}" for what, count in counts.items() if count)
    shape = "x".join(map(str, run.setup.input_shape))
    lines = [
        (
            "network",
            f"{config.model.name} ({arguments}): {run.cost.flops:,} FLOPs, "
            f"{run.cost.params:,} params",
        ),
        ("data", f"{config.data.name}: {run.setup.epoch:,} examples of {shape} in an epoch{held}"),
    ]
    if run.blueprint.told:
        lines.append(("latents", run.blueprint.told))
    if method.prunes:
        lines.append(("budget", "; ".join(_budget(one) for one in runs)))
    lines.append(("device", f"{jax.device_count()} x {device.device_kind} ({device.platform})"))
    lines.append(("directory", ", ".join(str(one.workdir) for one in runs)))
    lines.append(("next", _next(run)))
    return "\n".join(f"{label:<9}  {text}" for label, text in lines)


def _budget(run: Run) -> str:
    shares = {**counted_budgets(run.config), "latency": run.config.budget.latency}
    told = [f"{100 * share:g} % of the {name}" for name, share in shares.items() if share]
    return " and ".join(text.replace("flops", "FLOPs") for text in told)


def _next(run: Run) -> str:
    method = METHODS[run.config.method]
    if not method.prunes:
        return f"training of the unpruned network, {_length(run, 'baseline')}"
    training = f"training of the pruned network, {_length(run, 'converge')}"
    if "search" not in method.phases:
        return training
    return f"a search of at most {_length(run, 'search')}, then {training}"


def _length(run: Run, phase: str) -> str:
    """How long a phase is at most: "300 epochs", or "50 steps"."""
    _, name, count = length_field(run, phase).replace("=", ".").split(".")
    return f"{count} {name.removeprefix('max_')}"
