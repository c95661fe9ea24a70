"""A phase is saved, and goes on from what was saved, in all processes together."""

import dataclasses
import time
from typing import Any

import jax

from dhp_jax.activity import doing
from dhp_jax.distributed.mesh import gather, place
from dhp_jax.distributed.processes import arrays_from_first, from_first
from dhp_jax.train.phase import OriginError, Progress
from dhp_jax.train.records import check_finite, not_finite
from dhp_jax.train.run import Plan, Run, state_of
from dhp_jax.train.state import TrainState, checkpoint_tree, copy_arrays, reshape_like


def restore(plan: Plan, run: Run) -> Run:
    """Goes on from the newest checkpoint, or begins where there is none.

    Raises:
      OriginError: the checkpoint is of a phase with other data.
      CheckpointError: no checkpoint can be read.
    """
    saved, notes = _newest(plan) if plan.hooks.checkpoints else (None, None)
    run = run._replace(began=time.perf_counter())
    if notes:
        _check_origin(plan, notes["origin"])
        saved = reshape_like(saved, checkpoint_tree(plan.layout.here, notes["has_best"]))
        state, best = copy_arrays(place(plan.mesh, saved))
        progress = Progress(**notes["progress"])
        state = state._replace(teacher=state_of(plan, run).teacher)
        run = run._replace(
            arrays=jax.tree.leaves(state),
            best=best,
            progress=progress,
            records=tuple(notes["records"]),
            began=run.began - progress.seconds,
        )
    met_budget = plan.phase.budget is not None and bool(state_of(plan, run).remains.within)
    return run._replace(told=run.progress.steps, met_budget=met_budget)


def save(plan: Plan, run: Run, *, wait: bool = False) -> None:
    """Saves a run of which no call is in flight, if there are checkpoints.

    With `wait` it returns only when all is on disk.

    Raises:
      NonFiniteError: the state is not finite; nothing is saved.
      CheckpointError: the state cannot be saved.
    """
    checkpoints = plan.hooks.checkpoints
    if not checkpoints:
        return
    check_finite(plan, run)
    notes = {
        "progress": dataclasses.asdict(timed_progress(run)),
        "records": run.records,
        "has_best": run.best is not None,
        "origin": dict(plan.origin),
    }
    state = state_of(plan, run)._replace(teacher=None)
    arrays, steps = gather((state, run.best)), run.progress.steps
    like = _saved_shapes(plan, notes)
    try:
        with doing("saving"):
            tree = reshape_like(arrays, like)
            from_first(lambda: checkpoints.save(steps, tree, notes, wait=wait))
    except FloatingPointError as error:
        raise not_finite(plan, f"state is not finite ({error})", steps) from error


def timed_progress(run: Run) -> Progress:
    """The progress, with the seconds that the phase has taken so far."""
    return dataclasses.replace(run.progress, seconds=time.perf_counter() - run.began)


def _newest(plan: Plan) -> tuple[tuple[TrainState, tuple | None] | None, dict[str, Any] | None]:
    """The newest checkpoint, which the first process reads, and its notes."""
    saved = None

    def read() -> dict[str, Any] | None:
        nonlocal saved
        newest = plan.hooks.checkpoints.newest(lambda notes: _saved_shapes(plan, notes))
        saved, notes = newest or (None, None)
        return notes

    notes = from_first(read)
    return notes and arrays_from_first(saved, _saved_shapes(plan, notes)), notes


def _saved_shapes(plan: Plan, notes: dict[str, Any]) -> tuple[TrainState, tuple | None]:
    return checkpoint_tree(plan.layout.saved, notes["has_best"])


def _check_origin(plan: Plan, before: dict[str, Any]) -> None:
    for name, value in plan.origin.items():
        if before[name] != value:
            lead = "checksum of the training data: " if name == "data" else ""
            raise OriginError(
                name,
                before[name],
                value,
                f"{lead}expected {before[name]}, with which the {plan.phase.name} phase "
                f"began; got {value}",
            )
