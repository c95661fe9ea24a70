"""Optimizers: learning rate schedules, SGD or Adam, and the proximal step on the latents."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import optax

from dhp_jax.core.latent import map_variables, prunable_latents
from dhp_jax.core.prox import prox_l1

NAMES = ("sgd", "adam")


def drop_schedule(
    learning_rate: float, drops: Sequence[float], steps_per_epoch: int
) -> optax.Schedule:
    """A learning rate that is divided by 10 at given epochs.

    Args:
      learning_rate: before the first of them.
      drops: epochs, not necessarily whole ones; one that is given twice divides by 100.
      steps_per_epoch: training steps.
    """
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
    floors = map_variables(lambda v: getattr(v, "min_channels", 0), params)
    present = {f for f, p in zip(*map(jax.tree.leaves, (floors, prunable)), strict=True) if p}

    def shrink(floor: int) -> optax.GradientTransformation:
        def still_wide(vector: jax.Array) -> jax.Array:
            return jnp.sum(jnp.abs(vector) >= threshold) > floor

        mask = jax.tree.map(lambda p, f: p and f == floor, prunable, floors)
        return optax.masked(prox_l1(strength, schedule, where=still_wide), mask)

    steps = [shrink(floor) for floor in sorted(present)]
    return optax.chain(*steps) if steps else optax.identity()
