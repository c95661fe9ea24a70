"""The one training loop: search, converge and the unpruned baseline are phases of it."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key
import optax

from dhp_jax.activity import doing
from dhp_jax.backend import hypernets, platform
from dhp_jax.distributed.mesh import gather, keep_placement, place
from dhp_jax.distributed.processes import Turns, from_first
from dhp_jax.tasks.task import Data, Evaluation, Params, Task
from dhp_jax.train.checkpoints import Checkpoints
from dhp_jax.train.inputs import Resident, Streamed, make_inputs
from dhp_jax.train.phase import Budget, Observer, Outcome, Phase, Stopped
from dhp_jax.train.records import measure, not_finite, observe, record, tell_steps
from dhp_jax.train.resuming import restore, save, timed_progress
from dhp_jax.train.run import Hooks, Layout, Plan, Run, state_of
from dhp_jax.train.state import copy_arrays, reshape_like, start, without_intermediates
from dhp_jax.train.step import CompiledStep, compile_step, make_step

CALLS_AHEAD = 2  # of the compiled step, that the device is given before it needs them
SAVE_BEFORE_TEST_S = 5.0  # seconds of a test after which the next one has a checkpoint before it


def train(
    model: nnx.Module,
    phase: Phase,
    task: Task,
    train_data: Data,
    test_data: Data,
    validation_data: Data | None = None,
    *,
    examples: int,
    batch_size: int,
    log_every: int,
    key: Key[Array, ""],
    observers: Sequence[Observer] = (),
    checkpoints: Checkpoints | None = None,
    stopping: Callable[[], bool] = lambda: False,
    mesh: Mesh | None = None,
) -> Outcome:
    """Trains a model for a phase and tests it after every epoch.

    Every epoch goes through a fresh permutation of the examples. Those left over at its end, fewer
    than a batch, wait for another epoch. All randomness follows from `key` and the step's number,
    whether the examples are on the device or a stream. Steps run on all devices of a mesh, in all
    processes together. Tests run on one device of the first process.

    Args:
      model: a network, with or without latents; left as it was.
      phase: what to do.
      task: losses, errors, and how examples become inputs.
      train_data, test_data: what the task reads its examples from; a `Stream`, of which each
        process reads its share, or what is on the device as a whole.
      validation_data: the same, of examples that choose the best epoch; without them the test data
        do.
      examples: how many training examples make an epoch.
      batch_size: examples in a step.
      log_every: steps between records.
      key: random key of this phase.
      observers: told of every step, every `log_every` steps and every epoch.
      checkpoints: where the state is saved, and from the newest of which training goes on.
      stopping: asked after every step whether to stop; in several processes about once a second.
      mesh: of devices; see `dhp_jax.distributed.mesh`.

    Returns:
      The trained model after the last epoch and after the best one, by the task's metric on the
      validation data or, without them, on the test data.

    Raises:
      ValueError: `batch_size` larger than `examples`.
      OriginError: the phase goes on, but these are not the training data that it began with.
      NonFiniteError: a loss or a latent that is not finite.
      Stopped: `stopping` said so.
      CheckpointError: the state cannot be saved.
    """
    if not 0 < batch_size <= examples:
        raise ValueError(
            f"batch_size: expected 1 to {examples} (the examples of an epoch), got {batch_size}"
        )
    with doing(f"preparing the {phase.name} phase"):
        model = without_intermediates(model)
        inputs = make_inputs(train_data, key, examples=examples, batch_size=batch_size, mesh=mesh)
        optimizer, layout, run = _start(model, phase, mesh)
    origin = {"examples": examples, "batch_size": batch_size, "data": inputs.checksum}
    plan = Plan(
        phase=phase,
        metric=task.metric,
        batch_size=batch_size,
        steps_per_epoch=examples // batch_size,
        log_every=log_every,
        mesh=mesh,
        # Calls after the one that meets the budget change nothing. A CPU would take long for them.
        calls_ahead=0 if phase.budget and platform.steps_per_dispatch() == 1 else CALLS_AHEAD,
        layout=layout,
        history=_make_history(phase.budget, layout.graphdef, mesh),
        origin=origin,
        hooks=Hooks(observers, checkpoints, stopping, Turns()),
    )
    step = _make_compiled_step(plan, task, optimizer, inputs)
    with doing("looking for checkpoints"):
        run = restore(plan, run)
    data = {"validation": validation_data, "test": test_data}
    evaluations = {
        split: task.evaluation(model, examples, batch_size=4 * batch_size)
        for split, examples in data.items()
        if examples is not None
    }
    with observe(plan, run), inputs.reading(run.progress.steps, plan.last_step):
        while not _is_over(plan, run):
            run = train_epoch(plan, run, step, inputs)
            run = finish_epoch(plan, run, evaluations)
    save(plan, run)
    return _outcome(plan, run)


def train_epoch(plan: Plan, run: Run, step: CompiledStep, inputs: Resident | Streamed) -> Run:
    """Trains to the end of an epoch or of the phase, or until the budget is met."""
    epoch = run.progress.epochs + 1
    begin = (epoch - 1) * plan.steps_per_epoch
    end = min(epoch * plan.steps_per_epoch, plan.last_step)
    inputs.begin_epoch(epoch)
    run = run._replace(clock=(time.perf_counter(), run.progress.steps))
    while not run.met_budget and (steps := run.progress.steps) < end:
        # After a checkpoint of this step, which a long test might keep from being made.
        if steps > begin and steps % plan.log_every == 0:
            run = record(plan, *measure(plan, run))
        until = min(end, steps + plan.log_every - steps % plan.log_every)
        run = advance(plan, run, step, inputs, until)
        run = attend(plan, run)
        if run.progress.steps == until:
            run = wait(plan, run)
    return run


def advance(
    plan: Plan, run: Run, step: CompiledStep, inputs: Resident | Streamed, until: int
) -> Run:
    """Calls the compiled step once, and waits for calls before the last few.

    It takes one step or, where that is faster, several, up to the step `until`.
    """
    first = run.progress.steps
    last = min(first + inputs.steps_per_call, until)
    with contextlib.nullcontext() if run.compiled else doing("compiling the step", plan.phase.step):
        arrays, done = step(run.arrays, *inputs.take(first, last))
        inputs.fetch_next()
        progress = dataclasses.replace(run.progress, steps=last)
        run = run._replace(arrays=arrays, progress=progress, in_flight=(*run.in_flight, done))
        run = wait(plan, run, plan.calls_ahead if run.compiled else 0)
    if plan.phase.budget is None:
        run = tell_steps(plan, run, last)
    if not run.compiled:  # what that takes is not the speed of training
        run = run._replace(compiled=True, clock=(time.perf_counter(), run.progress.steps))
    return run


def wait(plan: Plan, run: Run, calls: int = 0) -> Run:
    """Waits until at most so many calls are in flight; one of them may have met the budget."""
    while len(run.in_flight) > calls:
        done, *later = run.in_flight
        steps, within = jax.device_get(done)
        if plan.phase.budget is not None and within:
            later = []  # they have changed nothing
            progress = dataclasses.replace(run.progress, steps=int(steps))
            run = run._replace(met_budget=True, progress=progress)
        run = tell_steps(plan, run._replace(in_flight=tuple(later)), int(steps))
    return run


def attend(plan: Plan, run: Run) -> Run:
    """Saves if it is time to, and stops if that was asked for.

    Raises:
      Stopped: after the state was saved.
    """
    hooks = plan.hooks
    stop, due = hooks.turns.look(
        hooks.stopping, lambda: bool(hooks.checkpoints and hooks.checkpoints.due())
    )
    if stop or due:
        run = wait(plan, run)
        save(plan, run, wait=stop)
    if stop:
        raise Stopped(f"{plan.phase.name}: stopped after step {run.progress.steps}")
    return run


def finish_epoch(plan: Plan, run: Run, evaluations: Mapping[str, Evaluation]) -> Run:
    """Tests the network at the end of an epoch, records it, and keeps it if it is the best.

    Raises:
      NonFiniteError: a training loss, a latent or a test metric is not finite.
      Stopped: see `attend`.
    """
    # Before measures are read: one that goes on from here reads them again.
    if run.test_seconds > SAVE_BEFORE_TEST_S:
        save(plan, run)
    run, values = measure(plan, run)
    run, metrics = _test(plan, run, evaluations)
    for split, of_split in metrics.items():
        for name, value in of_split.items():
            if not math.isfinite(value):
                what = f"{split} {name} is {value}"
                raise not_finite(plan, what, run.progress.steps, tested=True)
            values[f"{split}_{name}"] = value
    return attend(plan, _end_epoch(plan, record(plan, run, values), metrics))


def _start(
    model: nnx.Module, phase: Phase, mesh: Mesh | None
) -> tuple[optax.GradientTransformation, Layout, Run]:
    """The phase's optimizer, how its state is put together, and the run before its first step."""
    form = hypernets.pack_axes(model) if phase.elementwise else model
    start_phase = functools.partial(
        start,
        averaged=phase.average > 0,
        teacher=phase.teacher and nnx.state(phase.teacher.model),
    )
    graphdef, optimizer, state = start_phase(form, phase.optimizer)
    here = saved = jax.eval_shape(lambda state: state, state)
    if form is not model:
        saved = jax.eval_shape(lambda: start_phase(model, phase.optimizer)[-1])
    arrays, structure = jax.tree.flatten(place(mesh, state))
    return optimizer, Layout(graphdef, structure, here, saved), Run(arrays)


def _make_compiled_step(
    plan: Plan, task: Task, optimizer: optax.GradientTransformation, inputs: Resident | Streamed
) -> CompiledStep:
    phase, layout = plan.phase, plan.layout
    step = make_step(
        layout.graphdef,
        optimizer,
        task,
        plan.batch_size,
        skip_faulty=phase.skip_faulty,
        budget=phase.budget,
        average=phase.average,
        teacher=phase.teacher,
        mesh=plan.mesh,
    )
    stops = phase.budget is not None and plan.calls_ahead > 0
    return compile_step(inputs.feed(step, task, stops=stops), layout.structure)


def _make_history(
    budget: Budget | None, graphdef: nnx.GraphDef, mesh: Mesh | None
) -> Callable[[Params, nnx.State], dict[str, Array]] | None:
    if budget is None:
        return None

    def history(params: Params, rest: nnx.State) -> dict[str, Array]:
        return keep_placement(mesh, budget.history(nnx.merge(graphdef, *params, rest)))

    return jax.jit(history)


def _is_over(plan: Plan, run: Run) -> bool:
    epochs = -(-plan.last_step // plan.steps_per_epoch)  # the last one may be a part
    return run.progress.met_budget or run.progress.epochs >= epochs


def _test(
    plan: Plan, run: Run, evaluations: Mapping[str, Evaluation]
) -> tuple[Run, dict[str, dict[str, float]]]:
    """The metrics on each split of the data, by name."""

    def test() -> tuple[dict[str, dict[str, float]], float]:
        found = {split: evaluate(params, rest) for split, evaluate in evaluations.items()}
        return found, time.perf_counter() - began

    params, rest = gather(state_of(plan, run).network)
    began = time.perf_counter()
    with doing("testing", f"the test of the {plan.phase.network}"):
        metrics, seconds = from_first(test)
    return run._replace(test_seconds=seconds), metrics


def _end_epoch(plan: Plan, run: Run, metrics: dict[str, dict[str, float]]) -> Run:
    """Counts an epoch that was tested; keeps its network if it is the best and may be kept."""
    progress, test, name = run.progress, metrics["test"], plan.metric.name
    epoch, chosen_by, best = progress.epochs + 1, test, progress.best
    change: dict[str, Any] = {"epochs": epoch, "last": test, "met_budget": run.met_budget}
    if "validation" in metrics:
        chosen_by, best = metrics["validation"], progress.validation.get("best", {})
        change["validation"] = {"last": chosen_by, "best": best}
    if plan.metric.better(chosen_by[name], best.get(name)):
        change |= {"best": test, "best_epoch": epoch}
        if "validation" in metrics:
            change["validation"] = {"last": chosen_by, "best": chosen_by}
        if plan.phase.budget is None:
            run = run._replace(best=copy_arrays(state_of(plan, run).network))
    return run._replace(progress=dataclasses.replace(progress, **change))


def _outcome(plan: Plan, run: Run) -> Outcome:
    trained = _model(plan, *state_of(plan, run).network)
    best = trained if run.best is None else _model(plan, *run.best)
    return Outcome(trained, best, timed_progress(run))


def _model(plan: Plan, params: Params, rest: nnx.State) -> nnx.Module:
    params, rest = gather((params, rest))
    params = jax.tree.map(jnp.asarray, reshape_like(params, plan.layout.saved.params))
    return nnx.merge(plan.layout.graphdef, *params, rest, copy=True)
