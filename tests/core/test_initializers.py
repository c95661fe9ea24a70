"""Initial values are those of JAX and Flax, however they are compiled."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhp_jax.core.initializers import lecun_normal, normal, uniform

KEY = jax.random.key(7)


@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize(
    ("draw", "of_jax"),
    [
        (uniform, lambda n: jax.random.uniform(KEY, (n,), jnp.float32, -1.0, 1.0)),
        (normal, lambda n: jax.random.normal(KEY, (n,), jnp.float32)),
    ],
)
def test_draws_are_those_of_jax_traced_or_not(draw, of_jax, count):
    expected = of_jax(count)
    np.testing.assert_allclose(draw(KEY, count), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda: draw(KEY, count))(), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_classifier_starts_as_that_of_flax(dtype):
    of_flax = nnx.initializers.lecun_normal()(KEY, (48, 10), jnp.dtype(dtype))
    ours = lecun_normal(KEY, (48, 10), jnp.dtype(dtype))
    assert ours.dtype == of_flax.dtype
    np.testing.assert_allclose(ours.astype(jnp.float32), of_flax.astype(jnp.float32), rtol=1e-6)
