"""A network that a compiled function closes over, whose arrays are constants of the program."""

from flax import nnx
import jax
import jax.numpy as jnp
from networks import MIXED_INPUT, Mixed, filled, images
import numpy as np
import pytest

import dhp_jax as dhp


def test_generated_kernels_of_such_a_network_are_kept_from_folding():
    net, x = filled(Mixed), images(1, *MIXED_INPUT)
    net.eval()
    graphdef, state = nnx.split(net)
    programs = [
        jax.make_jaxpr(lambda x: net(x))(x),
        jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state, copy=True)(x))(state, x),
    ]
    assert ["optimization_barrier" in str(program) for program in programs] == [True, False]


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_as_for_users")
def test_a_unet_that_a_function_closes_over_computes_what_it_does_as_an_argument():
    """XLA:CPU folds generated kernels of about a million numbers wrongly unless kept from it."""
    net = dhp.models.build("unet", depth=4, channels=1, rngs=nnx.Rngs(0))
    net.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 1)), jnp.float32)
    graphdef, state = nnx.split(net)
    expected = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    found = jax.jit(lambda x: net(x))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
