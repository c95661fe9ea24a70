"""The jitted training step."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Bool, Key
import optax

from dhp_jax.backend.inference import tune
from dhp_jax.backend.platform import compiler_options
from dhp_jax.distributed.mesh import gather_kernels, over_data, settled
from dhp_jax.tasks.task import Data, Examples, Params, Task
from dhp_jax.train.phase import Budget
from dhp_jax.train.state import Fault, Measures, Remains, Ticket, TrainState

BLOCK = 4  # steps between two looks of the device at whether more are wanted


def make_step(
    structure: PyTreeDef,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    task: Task,
    batch_size: int,
    *,
    skip_faulty: bool = False,
    budget: Budget | None = None,
    mesh: Mesh | None = None,
    streamed: bool = False,
    many: bool = False,
    ends: bool = False,
) -> Callable[..., tuple[list[Array], Ticket]]:
    """The jitted step `(arrays, data, order, position, key) -> (arrays, ticket)`.

    The arrays are the leaves of a `TrainState`, as a list because JAX takes that apart in a
    fraction of the time at every call; they are donated. The step takes the `position`-th batch of
    the `data` in the given `order`, augments it, and steps. With a mesh, what it is given has been
    placed there.

    Args:
      structure: of the state.
      graphdef, optimizer: from `start`.
      task: losses, and how examples become inputs.
      batch_size: examples in a step.
      skip_faulty: whether a batch after which anything would not be finite only counts as a step.
      budget: of which the state tells after every step whether it is met.
      mesh: of devices.
      streamed: whether the step is given the examples of its batch, `(arrays, examples, key)`.
      many: whether it is `(arrays, data, order, position, count, key)` and takes up to `count`
        steps in a loop on the device, which ends when the budget is met.
      ends: whether it changes nothing once the budget is met; `many` never do.
    """

    def loss(params: Params, rest: nnx.State, inputs: Array, targets: Any):
        model = gather_kernels(mesh, tune(nnx.merge(graphdef, *params, rest, copy=True)))
        outputs = model(inputs)
        rest = nnx.state(model, nnx.Not(nnx.Param))
        return jnp.mean(task.loss(outputs, targets)), (task.score(outputs, targets), rest)

    def step(state: TrainState, examples: Examples, key: Key[Array, ""]) -> TrainState:
        inputs, targets = over_data(mesh, task.augmented(key, examples))
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, (scores, rest)), grads = gradient(state.params, state.rest, inputs, targets)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        loss_sum, score_sum, count, skipped = state.measures
        stepped = state._replace(
            params=optax.apply_updates(state.params, updates),
            rest=rest,
            opt_state=opt_state,
            step=state.step + 1,
            measures=Measures(
                loss_sum + value * batch_size,
                score_sum + jnp.sum(scores),
                count + batch_size,
                skipped,
            ),
        )
        if skip_faulty:
            usable = jnp.isfinite(value) & _all_finite(
                (stepped.params, stepped.rest, stepped.opt_state)
            )
            stepped = _or_skipped(stepped, state, usable)
        else:
            faulty = ~(jnp.isfinite(value) & _all_finite(stepped.params[0]))
            first = faulty & (state.fault.step == 0)
            fault = Fault(stepped.step, value.astype(jnp.float32))
            stepped = stepped._replace(fault=_where(first, fault, state.fault))
        if budget is not None:
            shares = budget.shares(nnx.merge(graphdef, *stepped.params, stepped.rest))
            met = [shares[name] <= limit for name, limit in budget.limits.items()]
            within = functools.reduce(jnp.logical_and, met)
            stepped = stepped._replace(remains=Remains(**shares, within=within))
        return settled(mesh, stepped)

    def of_resident(state: TrainState, data: Data, order, position, key) -> TrainState:
        chosen = jax.lax.dynamic_slice(order, (position * batch_size,), (batch_size,))
        step_key = jax.random.fold_in(key, state.step)
        return step(state, over_data(mesh, task.examples(step_key, data, chosen)), step_key)

    def of_streamed(state: TrainState, examples: Examples, key) -> TrainState:
        stepped = step(state, examples, jax.random.fold_in(key, state.step))
        return _where(state.remains.within, state, stepped) if ends else stepped

    def many_of_resident(state: TrainState, data: Data, order, position, count, key) -> TrainState:
        begin = state.step

        def unfinished(state: TrainState) -> Bool[Array, ""]:
            return (state.step < begin + count) & ~state.remains.within

        def one(state: TrainState, _: None) -> tuple[TrainState, None]:
            stepped = of_resident(state, data, order, position + state.step - begin, key)
            return _where(unfinished(state), stepped, state), None

        # A GPU asks the host before each turn of a loop whose length it does not know.
        return jax.lax.while_loop(
            unfinished, lambda state: jax.lax.scan(one, state, length=BLOCK)[0], state
        )

    function = of_streamed if streamed else many_of_resident if many else of_resident

    def on_arrays(arrays: list[Array], *given: Any) -> tuple[list[Array], Ticket]:
        state = function(jax.tree.unflatten(structure, arrays), *given)
        return jax.tree.leaves(state), Ticket(state.step, state.remains.within)

    return jax.jit(on_arrays, donate_argnums=0, compiler_options=compiler_options())


def _or_skipped(stepped: TrainState, state: TrainState, usable: Array) -> TrainState:
    """The state after a step, or where its batch is not usable that before it, with its count.

    Integers in the optimizer's state go on: they are what learning rates follow.
    """
    before = state._replace(
        step=stepped.step,
        measures=state.measures._replace(skipped=state.measures.skipped + 1),
        opt_state=jax.tree.map(
            lambda new, old: new if jnp.issubdtype(new.dtype, jnp.integer) else old,
            stepped.opt_state,
            state.opt_state,
        ),
    )
    return _where(usable, stepped, before)


def _where(condition: Array, tree: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), tree, other)


def _all_finite(tree: Any) -> Array:
    """Whether all floating-point numbers of a tree are finite; one pass over all of them."""
    leaves = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in leaves])) if leaves else True
