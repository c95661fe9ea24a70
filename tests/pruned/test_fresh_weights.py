"""Fresh kernels for ordinary networks."""

from flax import nnx
from networks import arrays, filled
import numpy as np
import pytest

from dhp_jax.pruned.fresh_weights import reinitialize


def test_reinitialize_draws_kernels_by_he_and_zeroes_biases():
    model = nnx.Dict(
        conv=filled(lambda rngs: nnx.Conv(20, 100, (3, 3), rngs=rngs)),
        up=filled(lambda rngs: nnx.ConvTranspose(45, 100, (2, 2), rngs=rngs)),
        norm=filled(lambda rngs: nnx.BatchNorm(5, rngs=rngs)),
        linear=filled(lambda rngs: nnx.Linear(200, 100, use_bias=False, rngs=rngs)),
    )
    before = arrays(model)
    reinitialize(model, rngs=nnx.Rngs(0))
    after = arrays(model)
    for name, fan_in in (("conv.kernel", 180), ("up.kernel", 180), ("linear.kernel", 200)):
        np.testing.assert_allclose(np.var(after[name]), 2 / fan_in, rtol=0.05)
        assert abs(after[name].mean()) < 0.003
        assert after[name].shape == before[name].shape
    for name in ("conv.bias", "up.bias"):
        np.testing.assert_array_equal(after[name], np.zeros(100))
    for name in ("norm.scale", "norm.bias", "norm.mean", "norm.var"):
        np.testing.assert_array_equal(after[name], before[name])
    draws = np.concatenate(
        [np.ravel(after[name])[:500] for name in ("conv.kernel", "linear.kernel")]
    )
    assert len(np.unique(draws)) == 1000


class Mild(nnx.Module):
    """A network whose fresh kernels have a variance of a quarter over their inputs."""

    initial_gain = 0.25

    def __init__(self):
        self.layer = filled(lambda rngs: nnx.Conv(20, 10, (3, 3), rngs=rngs))


@pytest.mark.parametrize("gain", [0.25, 1.0])
def test_reinitialize_draws_with_the_gain_that_a_network_carries(gain):
    network = Mild()
    network.initial_gain = gain
    reinitialize(network, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.var(network.layer.kernel[...]), gain / 180, rtol=0.05)


def test_reinitialize_leaves_kernels_that_are_not_trained():
    layer = filled(lambda rngs: nnx.Conv(3, 3, (1, 1), rngs=rngs))
    layer.kernel = nnx.Variable(layer.kernel[...])
    before = arrays(layer)
    reinitialize(nnx.Dict(shift=layer), rngs=nnx.Rngs(0))
    for name, array in arrays(layer).items():
        np.testing.assert_array_equal(array, before[name])
