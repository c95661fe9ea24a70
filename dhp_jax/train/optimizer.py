"""Optimizers: SGD or Adam, and the proximal step on the latents."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np
import optax

from dhp_jax.core.latent import map_variables, prunable_latents
from dhp_jax.core.prox import prox_l1

NAMES = ("sgd", "adam")
MAX_PIECES = 2000  # of a schedule; in each the learning rate counts as constant


def optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """SGD with momentum or Adam, with the weight decay added to the gradient.

    Args:
      name: "sgd" or "adam".
      schedule: the learning rate of each step.
      momentum: of SGD; Adam's first decay rate.
      nesterov: whether SGD looks ahead, as Nesterov's momentum does; Adam does not.
      weight_decay: of every parameter, those of latents, hypernetworks and BatchNorm included.

    Raises:
      ValueError: another name.
    """
    if name == "sgd":
        step = optax.sgd(schedule, momentum=momentum, nesterov=nesterov)
    elif name == "adam":
        step = optax.adam(schedule, b1=momentum)
    else:
        raise ValueError(f"optimizer.name: expected one of {', '.join(NAMES)}; got {name!r}")
    return optax.chain(optax.add_decayed_weights(weight_decay), step)


def largest_to_vanish(
    name: str,
    schedule: optax.Schedule,
    steps: int,
    *,
    strength: float,
    threshold: float,
    momentum: float,
    weight_decay: float,
) -> float:
    """The largest magnitude that a search brings down to the threshold if the loss is flat.

    Of a step of size r the proximal step takes `strength * r`; weight decay takes the share
    `weight_decay * r / (1 - momentum)` with SGD, and up to r with Adam. Of more than 2000 steps,
    some are taken together at the learning rate of their middle.

    Args:
      name, momentum, weight_decay: as of `optimizer`.
      schedule: the learning rate of each step, for an array of steps.
      steps: of the search.
      strength, threshold: as of `shrink_latents`.

    Returns:
      The magnitude of an entry before the first step; infinity if it exceeds all floats.

    Example:
      >>> schedule = drop_schedule(1e-4, (40,), steps_per_epoch=2013)
      >>> largest_to_vanish("adam", schedule, 40 * 2013, strength=0.1, threshold=0.0,
      ...                   momentum=0.9, weight_decay=0.0)
      0.8052...
    """
    ends = np.unique(np.linspace(0, steps, min(steps, MAX_PIECES) + 1).round().astype(int))
    rates = np.asarray(schedule(jnp.asarray((ends[:-1] + ends[1:]) // 2)), np.float64)
    rates = np.broadcast_to(rates, len(ends) - 1)
    magnitude = threshold
    for rate, count in zip(rates[::-1], np.diff(ends)[::-1], strict=True):
        taken, share = rate * strength, 0.0
        if name == "adam" and weight_decay:
            taken += rate
        elif name == "sgd":
            share = min(weight_decay * rate / (1 - momentum), 1.0)
        if share == 1.0:
            return math.inf
        if share * count < 1e-9:  # the limit of what follows
            magnitude += taken * count
            continue
        growth = -count * math.log1p(-share)  # step by step: m -> (m + taken) / (1 - share)
        if growth > 700:  # e^700 is near the largest float
            return math.inf
        magnitude = magnitude * math.exp(growth) + taken * math.expm1(growth) / share
    return float(magnitude)


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
