"""What is told before a run begins, and of a search that may not come down to its budget."""

from collections.abc import Iterator, Sequence
import logging

from flax import nnx

from dhp_jax.artifact.description import ArtifactError
from dhp_jax.artifact.reading import read_description
from dhp_jax.budgets.layer_table import LABELS
from dhp_jax.budgets.timing import hardware
from dhp_jax.core.latent import latents
from dhp_jax.core.survivors import survivor_counts
from dhp_jax.pipeline.preparation import (
    Run,
    counted_budgets,
    length_field,
    most_steps,
    schedule_of,
)
from dhp_jax.report.format import in_words, labelled
from dhp_jax.report.run_report import network_name
from dhp_jax.train.optimizer import largest_to_vanish
from dhp_jax.train.phase import Budget
from dhp_jax.workdir.reader import is_complete

logger = logging.getLogger(__name__)
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
    if config.budget.batch and config.budget.latency is None:
        what = f"config.budget.batch={config.budget.batch}"
        lines.append(("batch", f"{what} times nothing without config.budget.latency"))
    lines.append(("device", hardware()))
    lines.append(("directory", ", ".join(str(one.workdir) for one in runs)))
    lines += [("drops", text) for text in _late_drops(run)]
    lines.append(("next", _next(runs)))
    return "\n".join(labelled(label, text, 9) for label, text in lines)


def _budget(run: Run) -> str:
    shares = {**counted_budgets(run.config), "latency": run.config.budget.latency}
    given = {name: share for name, share in shares.items() if share}
    given = {name: share for name, share in given.items() if share < 1} or given
    return " and ".join(
        f"{100 * share:g} % of the {LABELS.get(name, name)}" for name, share in given.items()
    )


def _late_drops(run: Run) -> Iterator[str]:
    """Drops of a learning rate that come after the end of their phase, as of a shortened run."""
    for phase in run.method.phases:
        settings = run.config[phase]
        late = [f"{drop:g}" for drop in settings.drops if drop >= settings.epochs]
        if late and settings.schedule == "drops":
            yield (
                f"{phase}.drops {', '.join(late)} come after {phase}.epochs={settings.epochs} "
                f"and do nothing; {phase}.schedule=cosine suits any length"
            )


def _next(runs: Sequence[Run]) -> str:
    """What is left to be trained, of the first run that is not finished."""
    for run in runs:
        method = run.method
        named = PHASES | ({"search": "a search of"} if method.fades else {})
        left = [
            f"{named[phase]} {_length(run, phase)}"
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
    try:
        return is_complete(read_description(path)["notes"]["phase"], run.config[phase])
    except ArtifactError:  # there is none, or it is damaged and is made again
        return False


def _length(run: Run, phase: str) -> str:
    """How long a phase is at most: "300 epochs", or "1 step"."""
    _, name, count = length_field(run, phase).replace("=", ".").split(".")
    unit = name.removeprefix("max_")
    return f"{count} {unit.removesuffix('s') if count == '1' else unit}"


def tell_reach(run: Run, model: nnx.Module, budget: Budget) -> None:
    """Warns of a search whose steps are too few or too small to bring its latents to the budget.

    The model is the network of latents before the first step.
    """
    config, settings = run.config, run.config.search
    largest = largest_to_vanish(
        config.optimizer.name,
        schedule_of(run, "search"),
        most_steps(run, "search"),
        strength=settings.strength,
        threshold=settings.threshold,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay if config.optimizer.decayed == "all" else 0.0,
    )
    counts = survivor_counts(model, largest)
    shares = {name: float(share) for name, share in run.cost.shares(counts).items()}
    if all(shares[name] <= limit for name, limit in budget.limits.items()):
        return
    prunable = {name: z.size for name, z in latents(model).items() if z.prunable}
    gone = 1 - sum(int(counts[name]) for name in prunable) / sum(prunable.values())
    logger.warning(
        "search: may not come down to %s: within %s entries of latents below %.3g "
        "reach search.threshold unless the loss moves them, %.0f %% of all, which leaves %s",
        in_words(budget.limits),
        length_field(run, "search"),
        largest,
        100 * gone,
        in_words({name: round(shares[name], 3) for name in budget.limits}),
    )
