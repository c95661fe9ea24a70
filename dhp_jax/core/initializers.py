"""Random initial values in float32, drawn with few compilations."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

MIN_DRAWS = 256
DEVIATION = 0.8796256610342398  # of N(0, 1) cut off at -2 and 2


def uniform(key: Key[Array, ""], count: int) -> Float[Array, " count"]:
    """Numbers from U(-1, 1); a NumPy array unless traced."""
    return _draw(_uniform, key, count)


def normal(key: Key[Array, ""], count: int) -> Float[Array, " count"]:
    """Numbers from N(0, 1); a NumPy array unless traced."""
    return _draw(_normal, key, count)


def truncated_normal(key: Key[Array, ""], count: int) -> Float[Array, " count"]:
    """Numbers from a normal distribution cut off at two deviations, scaled to variance 1."""
    return _draw(_truncated_normal, key, count)


def _draw(sample: Callable[[Array, int], Array], key: Array, count: int) -> Array:
    """Draws at least `count` numbers, a power of 4 times 256, and returns the first `count`."""
    size = MIN_DRAWS
    while size < count:
        size *= 4
    numbers = sample(key, size)
    return (numbers if isinstance(numbers, jax.core.Tracer) else np.asarray(numbers))[:count]


@functools.partial(jax.jit, static_argnums=1)
def _uniform(key: Array, size: int) -> Array:
    return jax.random.uniform(key, (size,), jnp.float32, minval=-1.0, maxval=1.0)


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: Array, size: int) -> Array:
    return jax.random.normal(key, (size,), jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def _truncated_normal(key: Array, size: int) -> Array:
    return jax.random.truncated_normal(key, -2.0, 2.0, (size,), jnp.float32) / DEVIATION
