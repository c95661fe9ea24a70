"""Other proximal steps than those of the method: relative to an array, and for chosen entries."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import optax
from optax._src.base import NO_PARAMS_MSG

from dhp_jax.prox import (
    ScalarOrSchedule,
    Strength,
    check_inexact,
    proximal,
    soft_threshold,
)


def prox_relative_l1(
    strength: Strength, learning_rate: ScalarOrSchedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Soft-thresholds each array relative to its own mean; put it last in the chain.

    With the updates `u` of the transformations before it, each array of parameters becomes

        `s / mean|s|`   with   `s = sign(r) max(|r| - strength * learning_rate, 0)`,
        `r = t / mean|t|`,   `t = p + u`

    Its mean magnitude is 1 after every step. Where the loss does not feel the scale of an array, as
    in front of BatchNorm, `prox_l1` shrinks all entries alike, and says little about which ones
    matter. Here an entry shrinks only beside the others of its array.

    Args:
      strength: weight of the l1 term, a number, a schedule or a tree of these, as in `prox_l1`;
        times the learning rate it is below 1.
      learning_rate: step size of the gradient step before it, a number or the same schedule.

    Returns:
      A transformation whose `update` needs `params`. Its state is that of `prox_l1`. An array whose
      entries would all become zero stays at `r`.

    Raises:
      ValueError: as `prox_l1`.

    Example:
      >>> tx = optax.chain(optax.sgd(0.1), prox_relative_l1(strength=1.0, learning_rate=0.1))
      >>> params = jnp.array([0.01, 0.2, 0.3])
      >>> updates, _ = tx.update(jnp.zeros(3), tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      Array([0.       , 1.1666667, 1.8333334], dtype=float32)
    """

    def shrink(target: Array, amount: Array) -> Array:
        mean = jnp.mean(jnp.abs(target))
        relative = target / jnp.where(mean > 0, mean, 1)
        shrunk = soft_threshold(relative, amount)
        left = jnp.mean(jnp.abs(shrunk))
        return jnp.where(left > 0, shrunk / jnp.where(left > 0, left, 1), relative)

    return proximal("prox_relative_l1", shrink, strength, learning_rate)


class FadeState(NamedTuple):
    """State of a fade: for how many steps each entry has been fading."""

    count: Any


def prox_fade(steps: int) -> optax.GradientTransformationExtraArgs:
    """Brings chosen entries to zero in a number of steps; put it last in the chain.

    With the updates `u` of the transformations before it, an entry that has been fading for `k`
    steps becomes

        `sign(p + u) max(|p + u| - a, 0)`,   `a = |p + u| / (steps - k)`

    a proximal step of the l1 norm whose strength is what is needed to reach zero in time. An entry
    that nothing else moves falls in a straight line. It is exactly zero after `steps` steps, and
    from then on. All other entries are left alone. An entry that is chosen no more keeps its value,
    and begins anew if it is chosen again.

    Args:
      steps: in how many steps; at least 1.

    Returns:
      A transformation whose `update` needs `params`, and `fading`: a tree like the parameters, of
      booleans, each for an entry. With `nnx.Optimizer`: `update(model, grads, fading=...)`. Its
      state is a `FadeState`.

    Raises:
      ValueError: `steps` is no positive integer; from `update`, `params` or `fading` missing, or
        `fading` unlike `params`.

    Example:
      >>> tx = optax.chain(optax.sgd(0.1), prox_fade(2))
      >>> params, fading = jnp.array([1.0, 1.0]), jnp.array([True, False])
      >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params, fading=fading)
      >>> optax.apply_updates(params, updates)
      Array([0.5, 1. ], dtype=float32)
    """
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"prox_fade: steps: expected an integer of at least 1, got {steps!r}")

    def init(params: optax.Params) -> FadeState:
        return FadeState(jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.int32), params))

    def update(updates, state, params=None, *, fading=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        if fading is None:
            raise ValueError("prox_fade: fading: expected a tree of booleans, got none")
        for path, p in jax.tree_util.tree_leaves_with_path(params):
            check_inexact(f"prox_fade: params{jax.tree_util.keystr(path)}", p)
        try:
            fading = jax.tree.map(lambda p, f: jnp.broadcast_to(f, jnp.shape(p)), params, fading)
        except (TypeError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise ValueError(
                f"prox_fade: fading: expected booleans as params has entries; got others: {line}"
            ) from None

        def faded_update(u: Array, p: Array, chosen: Array, count: Array) -> Array:
            target = p + u
            amount = jnp.abs(target) / jnp.maximum(steps - count, 1)
            return jnp.where(chosen, soft_threshold(target, amount), target) - p

        def counted(chosen: Array, count: Array) -> Array:
            return jnp.where(chosen, jnp.minimum(count + 1, steps), 0)

        updates = jax.tree.map(faded_update, updates, params, fading, state.count)
        return updates, FadeState(jax.tree.map(counted, fading, state.count))

    return optax.GradientTransformationExtraArgs(init, update)
