"""The state of training that a step takes and gives."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np
import optax

from dhp_jax.core.cost import MEASURES
from dhp_jax.core.latent import LatentVector
from dhp_jax.tasks.task import Params


class Measures(NamedTuple):
    """Sums over examples, kept on the device."""

    loss: Float[Array, ""]
    score: Float[Array, ""]  # the task's metric
    examples: Int[Array, ""]
    skipped: Int[Array, ""]  # batches

    @classmethod
    def zero(cls) -> "Measures":
        return cls(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


class Fault(NamedTuple):
    """The first step after which the loss or a latent was not finite."""

    step: Int[Array, ""]  # its number, from 1; 0 if there is none
    loss: Float[Array, ""]

    @classmethod
    def none(cls) -> "Fault":
        return cls(jnp.zeros((), jnp.int32), jnp.zeros(()))


class Remains(NamedTuple):
    """What would survive of a network, where a phase has a budget."""

    flops: Float[Array, ""]  # share of the unpruned network's
    params: Float[Array, ""]
    activations: Float[Array, ""]
    within: Bool[Array, ""]  # all limits

    @classmethod
    def all(cls) -> "Remains":
        return cls(*[jnp.ones(())] * len(MEASURES), jnp.zeros((), bool))


class Ticket(NamedTuple):
    """What a dispatch tells when it is done; no later one takes it away."""

    step: Int[Array, ""]
    within: Bool[Array, ""]  # the budget


class TrainState(NamedTuple):
    """All that a step changes."""

    params: Params
    rest: nnx.State  # BatchNorm statistics
    opt_state: optax.OptState
    step: Int[Array, ""]
    measures: Measures  # since they were last read
    fault: Fault
    remains: Remains


def start(
    model: nnx.Module, make_optimizer: Callable[[Params], optax.GradientTransformation]
) -> tuple[nnx.GraphDef, optax.GradientTransformation, TrainState]:
    """What the first step of a phase needs; the model is left as it was."""
    model = nnx.clone(model)
    model.train()
    graphdef, latents, weights, rest = nnx.split(model, LatentVector, nnx.Param, ...)
    params = (latents, weights)
    optimizer = make_optimizer(params)
    opt_state = jax.jit(optimizer.init)(params)
    counts = jnp.int32(0), Measures.zero(), Fault.none(), Remains.all()
    return graphdef, optimizer, _copy(TrainState(params, rest, opt_state, *counts))


def _with_best(state: TrainState, has_best: bool) -> tuple[TrainState, tuple | None]:
    """What a checkpoint holds, and of the best network so far what it has of this state."""
    return state, (state.params, state.rest) if has_best else None


def _in_shape(arrays: Any, like: Any) -> Any:
    """Arrays in the shapes that networks have, or in those that they have where `packed`.

    Those that have another one come from the device first, which need not hold both.
    """
    return jax.tree.map(
        lambda x, s: x if x.shape == s.shape else np.asarray(x).reshape(s.shape), arrays, like
    )


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
