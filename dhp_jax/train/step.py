"""The training step, and what is put around it: where its examples come from, a loop, `jax.jit`."""

from collections.abc import Callable, Iterator
import contextlib
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Bool, Float, Int, Key
import optax

from dhp_jax.backend.inference import tune
from dhp_jax.backend.platform import compiler_options
from dhp_jax.core.latent import walk
from dhp_jax.distributed.mesh import gather_kernels, keep_placement, shard_batch
from dhp_jax.tasks.task import Data, Examples, Params, Task
from dhp_jax.train.phase import Budget, Teacher
from dhp_jax.train.state import BudgetStatus, Measures, NonFinite, StepDone, TrainState

DROPOUT = 0x64726F70  # tells the key of dropout from those of a step's examples
STEPS_PER_CHECK = 4  # of a loop on the device, between two checks of whether to go on
Step = Callable[..., TrainState]
CompiledStep = Callable[..., tuple[list[Array], StepDone]]


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    task: Task,
    batch_size: int,
    *,
    skip_faulty: bool = False,
    budget: Budget | None = None,
    average: float = 0.0,
    teacher: Teacher | None = None,
    mesh: Mesh | None = None,
) -> Step:
    """One training step `(state, examples, key) -> state`, to be used in a jitted function.

    The step augments its examples, updates the parameters, and counts what it has done. Its key is
    of that step alone.

    Args:
      graphdef, optimizer: from `start`.
      task: losses, and how examples become inputs.
      batch_size: examples in a step.
      skip_faulty, budget, average, teacher: as in `Phase`. A batch that is skipped counts as a
        step; otherwise the state keeps the number of the first such step. With a budget, the state
        has the cost of what would survive. Arrays of the teacher are in the state.
      mesh: of devices.
    """

    taught_by = teacher and _evaluated(teacher.model)

    def loss(params: Params, rest: nnx.State, inputs: Array, targets: Any, key: Array, taught):
        model = gather_kernels(mesh, tune(nnx.merge(graphdef, *params, rest, copy=True)))
        with dropout_from(key, model):
            outputs = model(inputs)
        rest = nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.Intermediate)))
        value = jnp.mean(task.loss(outputs, targets))
        if teacher is not None:
            apart = jnp.mean(task.distillation(outputs, taught, teacher.temperature))
            value = (1 - teacher.weight) * value + teacher.weight * apart
        return value, (task.score(outputs, targets), rest)

    def step(state: TrainState, examples: Examples, key: Key[Array, ""]) -> TrainState:
        inputs, targets = shard_batch(mesh, task.augmented(key, examples))
        gradient = jax.value_and_grad(loss, has_aux=True)
        dropout_key = jax.random.fold_in(key, DROPOUT)
        taught = teacher and tune(nnx.merge(taught_by, state.teacher, copy=True))(inputs)
        (value, (scores, rest)), grads = gradient(
            state.params, state.rest, inputs, targets, dropout_key, taught
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        stepped = state._replace(
            params=optax.apply_updates(state.params, updates),
            rest=rest,
            opt_state=opt_state,
            step=state.step + 1,
            measures=_count_batch(state.measures, value, scores, batch_size),
        )
        if average:
            moved = _moving_average(
                state.average, (stepped.params, stepped.rest), average, state.step
            )
            stepped = stepped._replace(average=moved)
        guard = _skip_if_not_finite if skip_faulty else _note_if_not_finite
        stepped = guard(stepped, state, value)
        if budget is not None:
            model = nnx.merge(graphdef, *stepped.params, stepped.rest)
            stepped = stepped._replace(remains=_budget_status(budget, model))
        return keep_placement(mesh, stepped)

    return step


@contextlib.contextmanager
def dropout_from(key: Key[Array, ""], model: nnx.Module) -> Iterator[None]:
    """Within the block, dropout that has no random numbers of its own draws them from a key.

    The key is of one step, so a network has no random state that must be saved with it. Each layer
    folds its number in it, in the order of `walk`. The model is the same after the block.
    """
    layers = [m for _, _, m in walk(model) if isinstance(m, nnx.Dropout) and m.rngs is None]
    for number, layer in enumerate(layers):
        layer.rngs = nnx.Rngs(jax.random.fold_in(key, number))[layer.rng_collection]
    yield
    for layer in layers:
        layer.rngs = None


def on_resident_data(step: Step, task: Task, batch_size: int, mesh: Mesh | None = None) -> Step:
    """A step on data that are on the device: `(state, data, order, position, key) -> state`.

    It takes the `position`-th batch of the data in the given order. `key` is the phase's.
    """

    def resident_step(state: TrainState, data: Data, order, position, key) -> TrainState:
        chosen = jax.lax.dynamic_slice(order, (position * batch_size,), (batch_size,))
        step_key = jax.random.fold_in(key, state.step)
        return step(state, shard_batch(mesh, task.examples(step_key, data, chosen)), step_key)

    return resident_step


def on_streamed_data(step: Step) -> Step:
    """A step on a batch from the host: `(state, examples, key) -> state`; `key` is the phase's."""

    def streamed_step(state: TrainState, examples: Examples, key) -> TrainState:
        return step(state, examples, jax.random.fold_in(key, state.step))

    return streamed_step


def stop_at_budget(step: Step) -> Step:
    """The same step, but it returns a state as it is once that is within the budget."""

    def stopping_step(state: TrainState, *inputs: Any) -> TrainState:
        stepped = step(state, *inputs)
        return _where(state.remains.within, state, stepped)

    return stopping_step


def many(step: Step) -> Step:
    """Many steps of `on_resident_data` in one loop on the device, which ends at the budget.

    It is `(state, data, order, position, count, key) -> state`, and takes up to `count` steps.
    """

    def steps(state: TrainState, data: Data, order, position, count, key) -> TrainState:
        begin = state.step

        def unfinished(state: TrainState) -> Bool[Array, ""]:
            return (state.step < begin + count) & ~state.remains.within

        def one(state: TrainState, _: None) -> tuple[TrainState, None]:
            stepped = step(state, data, order, position + state.step - begin, key)
            return _where(unfinished(state), stepped, state), None

        # A GPU asks the host before each turn of a loop whose length it does not know.
        return jax.lax.while_loop(
            unfinished, lambda state: jax.lax.scan(one, state, length=STEPS_PER_CHECK)[0], state
        )

    return steps


def compile_step(step: Step, structure: PyTreeDef) -> CompiledStep:
    """The jitted step on the leaves of a state: `(arrays, *inputs) -> (arrays, StepDone)`.

    The state is a list of arrays because JAX takes a list apart in a fraction of the time. The
    arrays are donated.
    """

    def on_arrays(arrays: list[Array], *inputs: Any) -> tuple[list[Array], StepDone]:
        state = step(jax.tree.unflatten(structure, arrays), *inputs)
        return jax.tree.leaves(state), StepDone(state.step, state.remains.within)

    return jax.jit(on_arrays, donate_argnums=0, compiler_options=compiler_options())


def _evaluated(model: nnx.Module) -> nnx.GraphDef:
    """The structure of a network in evaluation mode."""
    model = nnx.clone(model)
    model.eval()
    return nnx.graphdef(model)


def _moving_average(before: Any, after: Any, decay: float, step: Int[Array, ""]) -> Any:
    """`d before + (1 - d) after`, with a smaller `d` in the first steps; integers as they are."""
    d = jnp.minimum(decay, (1 + step) / (10 + step))

    def of(a: Array, b: Array) -> Array:
        floating = jnp.issubdtype(b.dtype, jnp.inexact)
        return (d * a + (1 - d) * b).astype(b.dtype) if floating else b

    return jax.tree.map(of, before, after)


def _count_batch(
    measures: Measures, loss: Float[Array, ""], scores: Float[Array, " n"], batch_size: int
) -> Measures:
    return measures._replace(
        loss=measures.loss + loss * batch_size,
        score=measures.score + jnp.sum(scores),
        examples=measures.examples + batch_size,
    )


def _note_if_not_finite(stepped: TrainState, state: TrainState, loss: Array) -> TrainState:
    """Keeps the number of the first step after which the loss or a latent is not finite."""
    faulty = ~(jnp.isfinite(loss) & _all_finite(stepped.params[0]))
    first = faulty & (state.fault.step == 0)
    fault = NonFinite(stepped.step, loss.astype(jnp.float32))
    return stepped._replace(fault=_where(first, fault, state.fault))


def _skip_if_not_finite(stepped: TrainState, state: TrainState, loss: Array) -> TrainState:
    """The state after a step, or that before it if anything after it is not finite.

    A step that is left out is counted. What is no floating-point number in the optimizer's state
    goes on: the steps that learning rates follow, and choices that are due at one of them.
    """
    usable = jnp.isfinite(loss) & _all_finite((stepped.params, stepped.rest, stepped.opt_state))
    skipped = state._replace(
        step=stepped.step,
        measures=state.measures._replace(skipped=state.measures.skipped + 1),
        opt_state=jax.tree.map(
            lambda new, old: old if jnp.issubdtype(new.dtype, jnp.inexact) else new,
            stepped.opt_state,
            state.opt_state,
        ),
    )
    return _where(usable, stepped, skipped)


def _budget_status(budget: Budget, model: nnx.Module) -> BudgetStatus:
    shares = budget.shares(model)
    met = [shares[name] <= limit for name, limit in budget.limits.items()]
    return BudgetStatus(**shares, within=functools.reduce(jnp.logical_and, met))


def _where(condition: Array, tree: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), tree, other)


def _all_finite(tree: Any) -> Array:
    """Whether all floating-point numbers of a tree are finite; one pass over all of them."""
    leaves = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in leaves])) if leaves else True
