"""Optimizers: SGD, Adam or AdamW, and the proximal step on the latents."""

import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np
import optax

from dhp_jax.core.hypernet import HypernetArrays
from dhp_jax.core.latent import LatentVector, map_variables, prunable_latents
from dhp_jax.prox import prox_l1

NAMES = ("sgd", "adam", "adamw")
DECAYED = ("all", "kernels")
MAX_PIECES = 2000  # of a schedule; in each the learning rate counts as constant


def optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    decayed: str = "all",
    clip: float | None = None,
) -> optax.GradientTransformation:
    """SGD with momentum or Adam, with the weight decay added to the gradient, or AdamW.

    Args:
      name: one of `NAMES`.
      schedule: the learning rate of each step.
      momentum: of SGD; Adam's first decay rate.
      nesterov: whether SGD looks ahead, as Nesterov's momentum does; Adam does not.
      weight_decay: AdamW takes `learning_rate * weight_decay` of a parameter itself in a step.
      decayed: "all" for every parameter, those of latents, hypernetworks and BatchNorm included;
        "kernels" for `is_kernel`.
      clip: the largest norm of the gradient of all parameters together; longer ones are scaled
        down to it before anything else.

    Raises:
      ValueError: another `name` or `decayed`.

    Reference: Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019 (arXiv
    1711.05101), algorithm 2.
    """
    if decayed not in DECAYED:
        raise ValueError(
            f"optimizer.decayed: expected one of {', '.join(DECAYED)}; got {decayed!r}"
        )
    mask = None if decayed == "all" else is_kernel
    first = [] if clip is None else [optax.clip_by_global_norm(clip)]
    if name == "adamw":
        step = optax.adamw(schedule, b1=momentum, weight_decay=weight_decay, mask=mask)
        return optax.chain(*first, step)
    if name == "sgd":
        step = optax.sgd(schedule, momentum=momentum, nesterov=nesterov)
    elif name == "adam":
        step = optax.adam(schedule, b1=momentum)
    else:
        raise ValueError(f"optimizer.name: expected one of {', '.join(NAMES)}; got {name!r}")
    return optax.chain(*first, optax.add_decayed_weights(weight_decay, mask), step)


def is_kernel(params: PyTree) -> PyTree:
    """A mask of the parameters of kernels: all but latents, biases, scales and slopes.

    These have a single axis of more than one number, or the name `bias` or `scale`, as the biases
    of attention heads. What has the name `kernel` is one, as of a layer that reads one channel. The
    arrays of a hypernetwork make a kernel, however they are packed, and are side by side.

    Args:
      params: a tree of states of `nnx.Variable`s.
    """

    def is_leaf(node: Any) -> bool:
        return isinstance(node, nnx.Variable)

    beside: dict[tuple[Any, ...], set[Any]] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf):
        beside.setdefault(path[:-1], set()).add(_key(path[-1:]))

    def of(path: tuple[Any, ...], variable: nnx.Variable) -> bool:
        name, together = _key(path), beside[path[:-1]]
        made = name in HypernetArrays._fields and together.issuperset(HypernetArrays._fields)
        if made or together == {"weight"}:  # of an array that is generated
            name = _key(path[:-1])
        axes = sum(n > 1 for n in variable.get_value().shape)
        several = made or axes > 1 or name == "kernel"
        return several and name not in ("bias", "scale") and not isinstance(variable, LatentVector)

    return jax.tree_util.tree_map_with_path(of, params, is_leaf=is_leaf)


def _key(path: tuple[Any, ...]) -> Any:
    """The last name of a path; `None` if there is none."""
    return getattr(path[-1], "key", getattr(path[-1], "name", None)) if path else None


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
    `weight_decay * r / (1 - momentum)` with SGD, `weight_decay * r` with AdamW, and up to r with
    Adam. Of more than 2000 steps, some are taken together at the learning rate of their middle.

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
        elif name != "adam":
            share = min(weight_decay * rate / (1 - momentum * (name == "sgd")), 1.0)
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
