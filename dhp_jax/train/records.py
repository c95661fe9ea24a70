"""What is told of training: steps, records of what was measured, and numbers that went wrong."""

from collections.abc import Iterator
import contextlib
import dataclasses
import math
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.core.cost import MEASURES
from dhp_jax.core.latent import latents
from dhp_jax.core.survivors import survivor_counts
from dhp_jax.distributed.mesh import place
from dhp_jax.distributed.processes import is_first
from dhp_jax.errors import NonFiniteError
from dhp_jax.train.run import Plan, Run, state_of
from dhp_jax.train.state import Measures

FEW_SKIPPED = 5  # batches that a record may be without; its loss and metric are then left out


@contextlib.contextmanager
def observe(plan: Plan, run: Run) -> Iterator[None]:
    """Tells observers that a phase begins and, however it ends, that it has ended."""
    for observer in plan.hooks.observers:
        observer.begin(plan.phase.name, plan.last_step, run.progress.steps, run.records)
    try:
        yield
    finally:
        for observer in plan.hooks.observers:
            observer.end()


def tell_steps(plan: Plan, run: Run, steps: int) -> Run:
    """Tells observers how many steps were taken, if they do not know yet."""
    if steps <= run.told:
        return run
    for observer in plan.hooks.observers:
        observer.step(steps - run.told)
    return run._replace(told=steps)


def measure(plan: Plan, run: Run) -> tuple[Run, dict[str, Any]]:
    """Reads what was measured since the last record, and sets it to zero.

    A record of fewer than `log_every` steps, at the end of an epoch or of a search, tells loss and
    metric of the steps of the record before, too, if that is of the same epoch.

    Returns:
      The run, and for a record: epoch, loss, the task's metric, learning rate, speed, batches that
      were left out, and for a phase with a budget the cost of what would survive.
    """
    check_finite(plan, run)
    state, progress = state_of(plan, run), run.progress
    measures = jax.device_get(state.measures)
    means = {}
    if measures.examples:
        means = {"loss": measures.loss, plan.metric.name: measures.score}
        means = {name: float(total / measures.examples) for name, total in means.items()}
        means = _with_steps_before(plan, run, means, float(measures.examples))
    else:
        used = max((r["step"] for r in run.records if "loss" in r), default=0)
        if progress.steps - used >= FEW_SKIPPED:
            what = f"loss or gradient of every batch after step {used} is not finite"
            raise not_finite(plan, what, progress.steps)
    learning_rate = _learning_rate(plan, progress.steps)
    values = {"epoch": progress.epochs + 1, **means, "learning_rate": learning_rate}
    if plan.phase.skip_faulty:
        values["skipped"] = int(measures.skipped)
        progress = dataclasses.replace(progress, skipped=progress.skipped + values["skipped"])
    (since, before), now = run.clock, time.perf_counter()
    if progress.steps > before:
        examples = (progress.steps - before) * plan.batch_size
        values["examples_per_second"] = examples / (now - since)
    if plan.phase.budget is not None:
        status = jax.device_get(state.remains)
        values |= {f"{name}_ratio": float(getattr(status, name)) for name in MEASURES}
        values |= _round(plan.history(state.params, state.rest))
    state = state._replace(measures=place(plan.mesh, Measures.zero()))
    clock = time.perf_counter(), progress.steps
    return run._replace(arrays=jax.tree.leaves(state), progress=progress, clock=clock), values


def _with_steps_before(
    plan: Plan, run: Run, means: dict[str, float], examples: float
) -> dict[str, float]:
    """Means over some examples, and those of the epoch's record before if these are of few steps.

    So the end of an epoch or of a search is not told of one batch, which may be any, unless the
    epoch has had no other record.
    """
    if not run.records or "loss" not in run.records[-1]:
        return means
    before, steps = run.records[-1], [0, *(record["step"] for record in run.records)]
    few = run.progress.steps - steps[-1] < plan.log_every
    # Records of other epochs end with them, and may be of the steps before that record, too.
    if not few or before["epoch"] != run.progress.epochs + 1:
        return means
    earlier = plan.batch_size * (steps[-1] - steps[-2] - before.get("skipped", 0))
    return {
        name: (examples * mean + earlier * before[name]) / (examples + earlier)
        for name, mean in means.items()
    }


def record(plan: Plan, run: Run, values: dict[str, Any]) -> Run:
    """Keeps a record of the run at its step, and shows it to observers."""
    seconds = round(time.perf_counter() - run.began, 3)
    values = {"phase": plan.phase.name, "step": run.progress.steps, "seconds": seconds, **values}
    for observer in plan.hooks.observers:
        observer.record(values)
    return run._replace(records=(*run.records, values))


def check_finite(plan: Plan, run: Run) -> None:
    """Raises a `NonFiniteError` if the loss or a latent of any step was not finite."""
    state = state_of(plan, run)
    fault = jax.device_get(state.fault)
    if fault.step:
        loss = float(fault.loss)
        what = _faulty_latent(state.params[0]) if math.isfinite(loss) else f"loss is {loss}"
        raise not_finite(plan, what, int(fault.step))


def not_finite(plan: Plan, what: str, step: int, *, tested: bool = False) -> NonFiniteError:
    """The error that ends training. It names the checkpoint from which one may go on.

    `tested` tells whether a test found what is not finite.
    """
    checkpoints = plan.hooks.checkpoints
    saved = checkpoints.steps() if checkpoints and is_first() else []
    last = f"; the last good checkpoint is of step {saved[0]}" if saved else ""
    rate = _learning_rate(plan, step)
    detail = f"the {what} at step {step}, at a learning rate of {rate:g}{last}"
    return NonFiniteError(plan.phase.name, detail, tested)


def _learning_rate(plan: Plan, step: int) -> float:
    return float(plan.phase.learning_rate(step - 1))


def _faulty_latent(latents: Any) -> str:
    found = jax.tree_util.tree_leaves_with_path(latents)
    paths = [path for path, vector in found if not np.isfinite(vector).all()]
    name = jax.tree_util.keystr(paths[0], simple=True, separator=".")
    return f"latent {name.removesuffix('.value').removesuffix('.vector')!r} is not finite"


def _round(history: dict[str, Array]) -> dict[str, list[float]]:
    """Vectors to four digits: they are for people, and kept at every record."""
    return {
        name: [v if isinstance(v, int) else float(f"{v:.4g}") for v in np.asarray(vector).tolist()]
        for name, vector in jax.device_get(history).items()
    }


def latent_history(model: nnx.Module, threshold: float) -> dict[str, Array]:
    """Survivor counts and magnitudes of the latents, as a search records them; usable in jit.

    `survivors` is how many entries of each prunable latent survive the threshold, in the order of
    `dhp.latents`; `magnitudes` is the 0th, 10th, ... 100th percentile of all their magnitudes.
    Nothing for a network without prunable latents.
    """
    prunable = [z for z in latents(model).values() if z.prunable]
    if not prunable:
        return {}
    counts = survivor_counts(model, threshold)
    magnitudes = jnp.abs(jnp.concatenate([z.value() for z in prunable]))
    return {
        "survivors": jnp.stack([counts[name] for name, z in latents(model).items() if z.prunable]),
        "magnitudes": jnp.quantile(magnitudes, jnp.linspace(0, 1, 11)),
    }
