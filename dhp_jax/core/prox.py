"""Proximal steps as optax transformations; this module imports nothing else of the library."""

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num
import numpy as np
import optax
from optax._src.base import NO_PARAMS_MSG

ScalarOrSchedule = float | Array | Callable[[Array], Any]


class ProxState(NamedTuple):
    """State of a proximal step that follows a schedule."""

    count: Int[Array, ""]


def soft_threshold(x: Num[Array, "*s"], amount: Float[Array, "*#s"] | float) -> Num[Array, "*s"]:
    """`sign(x) max(|x| - amount, 0)`: the proximal operator of `amount * ||x||_1`.

    Args:
      x: real or complex array.
      amount: not negative; broadcasts against `x`.

    Returns:
      An array of `x`'s shape and dtype; entries with `|x| <= amount` are exactly zero.

    Example:
      >>> soft_threshold(jnp.array([-3.0, 0.5, 2.0]), 1.0)
      Array([-2.,  0.,  1.], dtype=float32)
    """
    amount = jnp.asarray(amount, jnp.abs(x).dtype)
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - amount, 0)


def shrink_norm(
    x: Num[Array, "*s"],
    amount: Float[Array, "*#s"] | float,
    axis: int | tuple[int, ...] | None = None,
) -> Num[Array, "*s"]:
    """`x max(1 - amount / ||x||_2, 0)`: the proximal operator of `amount * ||x||_2`.

    Args:
      x: real or complex array.
      amount: not negative.
      axis: the axes over which one norm is taken; `None`: the whole array is one group.

    Returns:
      An array of `x`'s shape and dtype; groups with `||x||_2 <= amount` are exactly zero.

    Example:
      >>> shrink_norm(jnp.array([3.0, 4.0]), 1.0)
      Array([2.4, 3.2], dtype=float32)
    """
    # Scaled by the largest entry, so that squares neither overflow nor vanish.
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0)
    safe = jnp.where(largest > 0, largest, 1)
    norm = largest * jnp.sqrt(jnp.sum(jnp.abs(x / safe) ** 2, axis=axis, keepdims=True))
    amount = jnp.asarray(amount, norm.dtype)
    scale = jnp.where(norm > amount, 1 - amount / jnp.where(norm > 0, norm, 1), 0)
    return x * scale


def prox_l1(
    strength: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    where: Callable[[Array], Bool[Array, "..."]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Soft-thresholds the parameters that a step leads to; put it last in the chain.

    With the updates `u` of the transformations before it, the parameters become

        `sign(p + u) max(|p + u| - strength * learning_rate, 0)`

    which is the proximal gradient step (ISTA) of a loss plus `strength * ||p||_1` when `u` is a
    gradient step of size `learning_rate`. Entries that the threshold removes become exactly zero.

    Args:
      strength: weight of the l1 term, a number or an optax schedule.
      learning_rate: step size of the gradient step before it, a number or the same schedule.
      where: maps a leaf `p + u` to booleans that broadcast against it; entries where it is false
        are left alone. `None`: every entry is shrunk.

    Returns:
      A transformation whose `update` needs `params`. Its state is empty without a schedule, and a
      `ProxState` with one. Updates keep their dtype, unless the parameter's is wider.

    Raises:
      ValueError: a negative number, or neither number nor schedule; from `update`, `params`
        missing.

    Example:
      >>> tx = optax.chain(optax.sgd(0.1), prox_l1(strength=1.0, learning_rate=0.1))
      >>> params = jnp.array([1.0, 0.05])
      >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      Array([0.9, 0. ], dtype=float32)

    References:
      Parikh, Boyd, Proximal Algorithms, 2014, section 6.5.2; DHP (arXiv 2003.13683), equation 8.
    """

    if where is not None and not callable(where):
        raise ValueError(f"prox_l1: where: expected a function or None, got {where!r}")

    def shrink(target: Array, amount: Array) -> Array:
        shrunk = soft_threshold(target, amount)
        return shrunk if where is None else jnp.where(where(target), shrunk, target)

    return proximal("prox_l1", shrink, strength, learning_rate)


def prox_l2(
    strength: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    axis: int | tuple[int, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks the Euclidean norm of whole vectors (group lasso); put it last in the chain.

    With the updates `u` of the transformations before it, each group of parameters becomes

        `(p + u) max(1 - strength * learning_rate / ||p + u||_2, 0)`

    so that groups go to exactly zero as a whole.

    Args:
      strength: weight of the norm, a number or an optax schedule.
      learning_rate: step size of the gradient step before it, a number or the same schedule.
      axis: the axes that make up a group: `(0, 1, 2)` makes a group of each output channel of a
        `(kh, kw, in, out)` kernel. `None`: a leaf is one group.

    Returns:
      A transformation whose `update` needs `params`; state and dtypes as in `prox_l1`.

    Raises:
      ValueError: a negative number, or neither number nor schedule; from `update`, `params`
        missing.

    Example:
      >>> tx = optax.chain(optax.sgd(0.1), prox_l2(strength=1.0, learning_rate=0.1))
      >>> params = jnp.array([0.06, 0.06])
      >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      Array([0., 0.], dtype=float32)

    References:
      Parikh, Boyd, Proximal Algorithms, 2014, section 6.5.1; Yuan, Lin, Model selection and
      estimation in regression with grouped variables, 2006.
    """
    return proximal(
        "prox_l2", lambda target, amount: shrink_norm(target, amount, axis), strength, learning_rate
    )


def proximal(
    name: str,
    shrink: Callable[[Array, Array], Array],
    strength: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """A proximal step as a transformation.

    Args:
      name: of the function whose arguments are checked, for errors.
      shrink: the proximal operator of an array, by an amount.
      strength, learning_rate: numbers or schedules, whose product is the amount.
    """
    for argument, value in (("strength", strength), ("learning_rate", learning_rate)):
        negative = isinstance(value, Real) and not value >= 0
        if negative or not (callable(value) or isinstance(value, Real | np.ndarray | jax.Array)):
            schedule = "" if negative else " or a schedule"
            raise ValueError(f"{name}: {argument}: expected a number >= 0{schedule}, got {value!r}")
    scheduled = callable(strength) or callable(learning_rate)

    def init(params: optax.Params) -> optax.OptState:
        del params
        return ProxState(jnp.zeros([], jnp.int32)) if scheduled else optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        count = state.count if scheduled else None
        amount = jnp.asarray(_at(strength, count) * _at(learning_rate, count))

        def shrunk_update(u: Array | None, p: Array) -> Array | None:
            return None if u is None else shrink(p + u, amount) - p

        updates = jax.tree.map(shrunk_update, updates, params, is_leaf=lambda u: u is None)
        return updates, ProxState(optax.safe_increment(count)) if scheduled else state

    return optax.GradientTransformationExtraArgs(init, update)


def _at(value: ScalarOrSchedule, count: Array | None) -> Any:
    return value(count) if callable(value) else value
