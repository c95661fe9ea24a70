"""Random initial values in float32, drawn with few and short compilations."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

MIN_DRAWS = 2**16  # of a program; drawing so many takes less time than compiling for fewer
DEVIATION = 0.8796256610342398  # of N(0, 1) cut off at -2 and 2
_LECUN = nnx.initializers.lecun_normal()


def compile_once(function: Callable[..., Any], static: int = 0, level: int = 1) -> Any:
    """`jax.jit` of what runs once: XLA:CPU compiles it with fewer optimisations.

    It is called as it is where it is traced within another function. `static` arguments after the
    first are no arrays. At `level` 0 of optimisation numbers may be rounded otherwise.
    """
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": str(level)} if on_cpu else {}
    compiled = jax.jit(function, static_argnums=range(1, 1 + static), compiler_options=options)

    def run(*given: Any) -> Any:
        arrays = jnp.zeros(()), *jax.tree.leaves(given)
        traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
        return (function if traced else compiled)(*given)

    return run


_compiled = functools.cache(compile_once)


def _few_sizes(sample: Callable[[Array, int], Array]) -> Callable[[Array, int], Array]:
    """Has a function draw a power of 4 times `MIN_DRAWS` numbers, and returns as many as asked."""

    @functools.wraps(sample)
    def draw(key: Key[Array, ""], count: int) -> Float[Array, " count"]:
        size = MIN_DRAWS
        while size < count:
            size *= 4
        numbers = _compiled(sample, 1)(key, size)
        return (numbers if isinstance(numbers, jax.core.Tracer) else np.asarray(numbers))[:count]

    return draw


@_few_sizes
def uniform(key: Key[Array, ""], count: int) -> Float[Array, " count"]:
    """Numbers from U(-1, 1); a NumPy array unless traced."""
    return jax.random.uniform(key, (count,), jnp.float32, minval=-1.0, maxval=1.0)


@_few_sizes
def normal(key: Key[Array, ""], count: int) -> Float[Array, " count"]:
    """Numbers from N(0, 1); a NumPy array unless traced."""
    return jax.random.normal(key, (count,), jnp.float32)


@_few_sizes
def truncated_normal(key: Key[Array, ""], count: int) -> Float[Array, " count"]:
    """Numbers from a normal distribution cut off at two deviations, scaled to variance 1."""
    return jax.random.truncated_normal(key, -2.0, 2.0, (count,), jnp.float32) / DEVIATION


def lecun_normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = None) -> Array:
    """Initial values of `nnx.Linear`, the numbers that its own initializer draws."""
    return _compiled(_LECUN, 2)(key, shape, jnp.float32 if dtype is None else dtype)
