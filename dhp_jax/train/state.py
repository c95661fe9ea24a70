"""The training state: what a step takes and returns, and the form in which it is saved.

Names of fields are names of arrays in checkpoints, and stay as they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np
import optax

from dhp_jax.core.cost import MEASURES
from dhp_jax.core.initializers import compile_once
from dhp_jax.core.latent import LatentVector
from dhp_jax.tasks.task import Params


class Measures(NamedTuple):
    """Sums over training examples since the last record, kept on the device."""

    loss: Float[Array, ""]
    score: Float[Array, ""]  # the task's metric
    examples: Int[Array, ""]
    skipped: Int[Array, ""]  # batches

    @classmethod
    def zero(cls) -> "Measures":
        return cls(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


class NonFinite(NamedTuple):
    """The first step after which the loss or a latent vector was infinite or not a number."""

    step: Int[Array, ""]  # its number, from 1; 0 if there is none
    loss: Float[Array, ""]

    @classmethod
    def none(cls) -> "NonFinite":
        return cls(jnp.zeros((), jnp.int32), jnp.zeros(()))


class BudgetStatus(NamedTuple):
    """The cost of what would survive now, and whether it is within the phase's budget.

    Costs are shares of the unpruned network's. Without a budget they stay 1.
    """

    flops: Float[Array, ""]
    params: Float[Array, ""]
    activations: Float[Array, ""]
    within: Bool[Array, ""]  # all limits

    @classmethod
    def unpruned(cls) -> "BudgetStatus":
        return cls(*[jnp.ones(())] * len(MEASURES), jnp.zeros((), bool))


class StepDone(NamedTuple):
    """What the host reads of a call of the step.

    It is apart from the state, whose arrays are donated to the next call.
    """

    step: Int[Array, ""]
    within: Bool[Array, ""]  # the budget


class TrainState(NamedTuple):
    """All arrays that a training step changes."""

    params: Params
    rest: nnx.State  # BatchNorm statistics
    opt_state: optax.OptState
    step: Int[Array, ""]
    measures: Measures
    fault: NonFinite
    remains: BudgetStatus
    average: tuple[Params, nnx.State] | None = None  # of `params` and `rest`, if it is kept
    teacher: nnx.State | None = None  # arrays of a network that stays as it is; not saved

    @property
    def network(self) -> tuple[Params, nnx.State]:
        """Parameters and BatchNorm statistics that are tested and kept."""
        return self.average or (self.params, self.rest)


def start(
    model: nnx.Module,
    make_optimizer: Callable[[Params], optax.GradientTransformation],
    *,
    averaged: bool = False,
    teacher: nnx.State | None = None,
) -> tuple[nnx.GraphDef, optax.GradientTransformation, TrainState]:
    """Splits a model, left as it was, into its structure and the state before the first step.

    Args:
      model: a network.
      make_optimizer: from `(latent vectors, other parameters)` to the optimizer.
      averaged: whether the state has an average of the weights.
      teacher: arrays of the network that this one learns from.

    Returns:
      The structure in training mode, the optimizer, and the state, whose arrays are copies.
    """
    model = nnx.clone(model)
    model.train()
    graphdef, latents, weights, rest = nnx.split(model, LatentVector, nnx.Param, ...)
    params = (latents, weights)
    optimizer = make_optimizer(params)
    opt_state = compile_once(optimizer.init, level=0)(params)
    counts = jnp.int32(0), Measures.zero(), NonFinite.none(), BudgetStatus.unpruned()
    average = (params, rest) if averaged else None
    state = TrainState(params, rest, opt_state, *counts, average, teacher)
    return graphdef, optimizer, copy_arrays(state)


def without_intermediates(model: nnx.Module) -> nnx.Module:
    """The network without what a call has left in it (`nnx.Module.sow`); it shares all arrays."""
    model = nnx.clone(model)
    nnx.pop(model, nnx.Intermediate)
    return model


def checkpoint_tree(state: TrainState, has_best: bool) -> tuple[TrainState, tuple | None]:
    """The tree that a checkpoint holds: a state, and the best network so far if there is one.

    The best network's arrays have the structure and shapes of those of `state`. A teacher stays as
    it is, and has a file of its own.
    """
    return state._replace(teacher=None), (state.params, state.rest) if has_best else None


def reshape_like(arrays: Any, like: Any) -> Any:
    """Gives arrays the shapes of those of another tree.

    Networks and files have one shape of an array, and packed networks on the device another one.
    Arrays that are reshaped come from the device first, which need not hold both.
    """
    return jax.tree.map(
        lambda x, s: x if x.shape == s.shape else np.asarray(x).reshape(s.shape), arrays, like
    )


copy_arrays = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
