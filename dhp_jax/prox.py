"""Proximal steps as optax transformations; this module imports nothing else of the library."""

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int
import numpy as np
import optax
from optax._src.base import NO_PARAMS_MSG

ScalarOrSchedule = float | Array | Callable[[Array], Any]
Strength = Any  # a `ScalarOrSchedule`, or a tree of them


class ProxState(NamedTuple):
    """State of a proximal step that follows a schedule."""

    count: Int[Array, ""]


def soft_threshold(
    x: Inexact[Array, "*s"], amount: Float[Array, "*#s"] | float
) -> Inexact[Array, "*s"]:
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
    _check_inexact("soft_threshold: x", x)
    amount = jnp.asarray(amount, jnp.abs(x).dtype)
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - amount, 0)


def shrink_norm(
    x: Inexact[Array, "*s"],
    amount: Float[Array, "*#s"] | float,
    axis: int | tuple[int, ...] | None = None,
) -> Inexact[Array, "*s"]:
    """`x max(1 - amount / ||x||_2, 0)`: the proximal operator of `amount * ||x||_2`.

    Args:
      x: real or complex array.
      amount: not negative.
      axis: the axes over which one norm is taken; `None`: the whole array is one group.

    Returns:
      An array of `x`'s shape and dtype; groups with `||x||_2 <= amount` are exactly zero, and those
      with an entry that is NaN are NaN.

    Example:
      >>> shrink_norm(jnp.array([3.0, 4.0]), 1.0)
      Array([2.4, 3.2], dtype=float32)
    """
    _check_inexact("shrink_norm: x", x)
    # Scaled by the largest entry, so that squares neither overflow nor vanish.
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0)
    safe = jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)
    norm = largest * jnp.sqrt(jnp.sum(jnp.abs(x / safe) ** 2, axis=axis, keepdims=True))
    amount = jnp.asarray(amount, norm.dtype)
    # Comparisons with NaN are false, so it stays.
    scale = jnp.where(norm <= amount, 0, 1 - amount / jnp.where(norm == 0, 1, norm))
    return x * scale


def prox_l1(
    strength: Strength,
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
      strength: weight of the l1 term, a finite number, an array that broadcasts into a parameter,
        or an optax schedule; or a tree of these, one for each leaf or branch of the parameters.
      learning_rate: step size of the gradient step before it, a number or the same schedule.
      where: maps a leaf `p + u` to booleans that broadcast into it; entries where it is false are
        left alone. `None`: every entry is shrunk.

    Returns:
      A transformation whose `update` needs `params`. Its state is empty without a schedule, and a
      `ProxState` with one. Updates keep their dtype, unless the parameter's is wider. `init` warns
      of bfloat16 and float16 parameters with entries that steps of this size do not move.

    Raises:
      ValueError: a number that is negative or not finite, or neither number nor schedule; from
        `update`, `params` missing, integers among them, or a tree or shapes that do not fit them.

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
    return _proximal("prox_l1", soft_threshold, strength, learning_rate, where)


def prox_l2(
    strength: Strength,
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    axis: int | tuple[int, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks the Euclidean norm of whole vectors (group lasso); put it last in the chain.

    With the updates `u` of the transformations before it, each group of parameters becomes

        `(p + u) max(1 - strength * learning_rate / ||p + u||_2, 0)`

    so that groups go to exactly zero as a whole.

    Args:
      strength: weight of the norm, a number, a schedule or a tree of these, as in `prox_l1`; arrays
        broadcast into the norms, whose shape is the parameter's with 1 for `axis`.
      learning_rate: step size of the gradient step before it, a number or the same schedule.
      axis: the axes that make up a group: `(0, 1, 2)` makes a group of each output channel of a
        `(kh, kw, in, out)` kernel. `None`: a leaf is one group.

    Returns:
      A transformation whose `update` needs `params`; state, dtypes and warning as in `prox_l1`.

    Raises:
      ValueError: as `prox_l1`; from `init` and `update`, a parameter without such axes.

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

    def check(path: Any, p: Array) -> None:
        try:
            np.lib.array_utils.normalize_axis_tuple(() if axis is None else axis, jnp.ndim(p))
        except (TypeError, ValueError):  # AxisError is one
            where = f"params{jax.tree_util.keystr(path)} of shape {jnp.shape(p)}"
            raise ValueError(f"prox_l2: axis: expected axes of {where}, got {axis!r}") from None

    def norms(shape: tuple[int, ...]) -> tuple[int, ...]:
        every = range(len(shape)) if axis is None else axis
        over = np.lib.array_utils.normalize_axis_tuple(every, len(shape))
        return tuple(1 if k in over else size for k, size in enumerate(shape))

    return _proximal(
        "prox_l2",
        lambda target, amount: shrink_norm(target, amount, axis),
        strength,
        learning_rate,
        check=check,
        groups=norms,
    )


def _proximal(
    name: str,
    shrink: Callable[[Array, Array], Array],
    strength: Strength,
    learning_rate: ScalarOrSchedule,
    where: Callable[[Array], Bool[Array, "..."]] | None = None,
    check: Callable[[Any, Array], None] = lambda path, p: None,
    groups: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape,
) -> optax.GradientTransformationExtraArgs:
    """A proximal step as a transformation.

    `name` is that of the function, for errors. `shrink` is the proximal operator of an array, by an
    amount. `check` raises for a parameter, and its path, that the operator does not suit. `groups`
    gives the shape of amounts for a parameter of a shape.
    """
    strengths = jax.tree_util.tree_leaves_with_path(strength, is_leaf=callable)
    for path, value in strengths or [((), strength)]:
        _check_scalar(f"{name}: strength{jax.tree_util.keystr(path)}", value)
    _check_scalar(f"{name}: learning_rate", learning_rate)
    scheduled = callable(learning_rate) or any(callable(value) for _, value in strengths)

    def amounts(count: Array | None, params: optax.Params) -> Any:
        """How much to shrink each parameter by."""
        rate = _at(learning_rate, count)
        each = jax.tree.map(
            lambda value: jnp.asarray(_at(value, count) * rate), strength, is_leaf=callable
        )
        try:
            return jax.tree.broadcast(each, params)
        except ValueError as error:
            raise ValueError(
                f"{name}: strength: expected a number, or a tree of numbers for the leaves or "
                f"branches of the parameters: {str(error).splitlines()[0]}"
            ) from None

    def step(path: Any, target: Array, amount: Array) -> Array:
        leaf = f"params{jax.tree_util.keystr(path)}"
        _check_fits(f"{name}: strength * learning_rate", amount, groups(target.shape), leaf)
        shrunk = shrink(target, amount)
        if where is None:
            return shrunk
        chosen = where(target)
        _check_fits(f"{name}: where", chosen, target.shape, leaf)
        return jnp.where(chosen, shrunk, target)

    def unmoved(path: Any, p: Array, amount: Array) -> Array:
        """The entries that a step would shrink, but for rounding."""
        chosen = (p != 0) & (amount > 0)
        return chosen & (step(path, p, amount) == p) & (True if where is None else where(p))

    def init(params: optax.Params) -> optax.OptState:
        jax.tree.map_with_path(check, params)
        if any(_is_narrow(p) for p in jax.tree.leaves(params)):
            known = None if scheduled else amounts(None, params)
            _warn_of_rounding(name, unmoved, params, known)
        return ProxState(jnp.zeros([], jnp.int32)) if scheduled else optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        count = state.count if scheduled else None

        def shrunk_update(path: Any, u: Array | None, p: Array, amount: Array) -> Array | None:
            if u is None:
                return None
            _check_inexact(f"{name}: params{jax.tree_util.keystr(path)}", p)
            check(path, p)
            return step(path, p + u, amount) - p

        updates = jax.tree.map_with_path(
            shrunk_update, updates, params, amounts(count, params), is_leaf=lambda u: u is None
        )
        return updates, ProxState(optax.safe_increment(count)) if scheduled else state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_inexact(argument: str, x: Any) -> None:
    """Raises a `ValueError` that names `argument` unless it is of floating-point numbers."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        raise ValueError(f"{argument}: expected floating-point numbers, got {jnp.result_type(x)}")


def _check_scalar(argument: str, value: Any) -> None:
    """Raises unless a value is a finite real number of at least 0, an array or a schedule."""
    if callable(value):
        return
    dtype = getattr(value, "dtype", type(value))
    number = isinstance(value, Real | np.ndarray | jax.Array) and (
        jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
    )
    known = number and not isinstance(value, jax.core.Tracer)
    possible = not known or np.all((np.asarray(value) >= 0) & (np.asarray(value) < np.inf))
    if not number or not possible:
        schedule = "" if number else " or a schedule"
        got = " ".join(repr(value).split())
        raise ValueError(f"{argument}: expected a finite number >= 0{schedule}, got {got}")


def _check_fits(argument: str, value: Any, shape: tuple[int, ...], leaf: str) -> None:
    """Raises unless an array broadcasts into a shape."""
    try:
        fits = np.broadcast_shapes(np.shape(value), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        expected = f"a shape that broadcasts into {shape} for {leaf}"
        raise ValueError(f"{argument}: expected {expected}, got {np.shape(value)}")


def _at(value: ScalarOrSchedule, count: Array | None) -> Any:
    return value(count) if callable(value) else value


def _is_narrow(x: Any) -> bool:
    """Whether an array is of floating-point numbers that are less precise than float32."""
    dtype = jnp.result_type(x)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _warn_of_rounding(
    name: str, unmoved: Callable[[Any, Array, Array], Array], params: optax.Params, amounts: Any
) -> None:
    """Warns of the first narrow array with entries whose steps are rounded away.

    `unmoved` gives, of a path, its array and an amount, the entries that a step leaves as they are.
    `amounts` are like `params`, or `None` where they change from step to step.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    each = [None] * len(leaves) if amounts is None else jax.tree.leaves(amounts)
    for (path, p), amount in zip(leaves, each, strict=True):
        if not _is_narrow(p):
            continue
        what = "steps of less than 1/512 of an entry are lost"
        if amount is not None and not any(isinstance(x, jax.core.Tracer) for x in (p, amount)):
            left = int(jnp.sum(unmoved(path, p, amount)))
            if not left:
                continue
            what = f"{left} of {p.size} entries are not moved by steps of {jnp.max(amount):.3g}"
        where = f"{name}: params{jax.tree_util.keystr(path)} is {p.dtype}"
        warnings.warn(f"{where}: {what}; keep it in float32", stacklevel=3)
        break
