"""The optimizers of the method: schedules, SGD or Adam, and the proximal step on the latents."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import optax

from dhp_jax.latent import LatentVector
from dhp_jax.prox import prox_l1

NAMES = ("sgd", "adam")


def drop_schedule(
    learning_rate: float, drops: Sequence[float], steps_per_epoch: int
) -> optax.Schedule:
    """A learning rate that is divided by 10 at each of some epochs."""
    steps = [round(epoch * steps_per_epoch) for epoch in drops]
    boundaries = {step: 0.1 ** steps.count(step) for step in steps}
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def optimizer(
    name: str, schedule: optax.Schedule, *, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD with momentum or Adam, with the weight decay added to the gradient.

    Args:
      name: "sgd" or "adam".
      schedule: the learning rate of each step.
      momentum: of SGD; Adam's first decay rate.
      weight_decay: of every parameter, those of latents, hypernetworks and BatchNorm included.

    Raises:
      ValueError: another name.
    """
    if name == "sgd":
        step = optax.sgd(schedule, momentum=momentum)
    elif name == "adam":
        step = optax.adam(schedule, b1=momentum)
    else:
        raise ValueError(f"optimizer.name: expected one of {', '.join(NAMES)}; got {name!r}")
    return optax.chain(optax.add_decayed_weights(weight_decay), step)


def prunable_latents(params: PyTree) -> PyTree:
    """Which parameters are latent vectors that may be pruned: a mask for `optax.masked`.

    Give `optax.masked` the mask and not this function: `nnx.Optimizer` shows transformations bare
    arrays, which do not tell what they are.

    Args:
      params: a state of `nnx.Variable`s, or a tree of such states.

    Returns:
      A tree of booleans, one a variable.

    Raises:
      ValueError: a tree of arrays without variables, or a model.

    Example:
      >>> mask = dhp.prunable_latents(nnx.state(model, nnx.Param))
      >>> shrink = optax.masked(dhp.prox_l1(strength=1e-4, learning_rate=0.1), mask)
      >>> tx = optax.chain(optax.sgd(0.1, momentum=0.9), shrink)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    """
    if isinstance(params, nnx.Module):
        raise ValueError(
            "prunable_latents: expected a state, such as nnx.state(model, nnx.Param); "
            f"got a {type(params).__name__}"
        )
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, nnx.Variable))
    if leaves and not any(isinstance(leaf, nnx.Variable) for leaf in leaves):
        raise ValueError(
            "prunable_latents: expected a state of nnx.Variables, such as "
            f"nnx.state(model, nnx.Param); got a tree of {type(leaves[0]).__name__}"
        )
    return _map_variables(lambda v: isinstance(v, LatentVector) and v.prunable, params)


def shrink_latents(
    params: PyTree, *, strength: float, schedule: optax.Schedule, threshold: float
) -> optax.GradientTransformation:
    """The proximal step of the search on each prunable latent; last in the chain.

    A latent is shrunk only while more than its `min_channels` entries reach the threshold.

    Args:
      params: the parameters it will be given: a tree of states of `nnx.Variable`s.
      strength: regularization factor of the l1 norm.
      schedule: the learning rate of the step before it.
      threshold: entries below it in magnitude count as gone.

    Reference: DHP (arXiv 2003.13683), equation 8 and section 3.3.
    """
    prunable = prunable_latents(params)
    floors = _map_variables(lambda v: getattr(v, "min_channels", 0), params)
    present = {f for f, p in zip(*map(jax.tree.leaves, (floors, prunable)), strict=True) if p}

    def shrink(floor: int) -> optax.GradientTransformation:
        def still_wide(vector: jax.Array) -> jax.Array:
            return jnp.sum(jnp.abs(vector) >= threshold) > floor

        mask = jax.tree.map(lambda p, f: p and f == floor, prunable, floors)
        return optax.masked(prox_l1(strength, schedule, where=still_wide), mask)

    steps = [shrink(floor) for floor in sorted(present)]
    return optax.chain(*steps) if steps else optax.identity()


def _map_variables(function: Callable[[nnx.Variable], Any], params: PyTree) -> PyTree:
    return jax.tree.map(function, params, is_leaf=lambda node: isinstance(node, nnx.Variable))
