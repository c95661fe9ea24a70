"""Scores by the gradient of the latents."""

from flax import nnx
import jax
import jax.numpy as jnp
from networks import filled
import numpy as np
import pytest

import dhp_jax as dhp

pytestmark = pytest.mark.usefixtures("fast_compilation")


class Product(nnx.Module):
    """The sum of the channels of a 1 by 1 convolution of two latents."""

    def __init__(self, rngs):
        self.image = dhp.Latent(2, prunable=False, rngs=rngs)
        self.hidden = dhp.Latent(6, rngs=rngs)
        self.conv = dhp.HyperConv(self.image, self.hidden, (1, 1), use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.conv(x).sum(-1)


def loss(network, batch):
    x, factor = batch
    return jnp.sum(network(x) * factor)


def batches(seed):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(3, 1, 1, 2)), rng.normal(size=(3, 1, 1))) for _ in range(3)]


def test_a_score_is_the_magnitude_of_the_summed_gradient_by_hand():
    model = filled(Product)
    w1, w2 = (np.asarray(a[...], np.float64) for a in (model.conv.w1, model.conv.w2))
    slopes = np.sum(w2[0, 0] * w1, axis=0)  # of K[i, o] by z_in[i] z_out[o]
    z_in = np.asarray(model.image.value(), np.float64)
    by_hand = sum(
        np.einsum("nhwi,nhw,io,i->o", x, factor, slopes, z_in) for x, factor in batches(0)
    )
    before = np.asarray(model.hidden.value())
    found = dhp.gradient_scores(model, loss, batches(0))
    assert found.keys() == {"hidden"}
    np.testing.assert_allclose(found["hidden"], np.abs(by_hand), rtol=1e-4)
    np.testing.assert_array_equal(model.hidden.value(), before)


def test_channels_of_the_largest_gradient_stay():
    model = filled(Product)
    scores = dhp.gradient_scores(model, loss, batches(1))
    small = dhp.prune_to(model, (1, 1, 2), by=scores, flops=0.7)
    assert small.conv.out_features == 4
    best = np.sort(np.argsort(scores["hidden"])[-4:])
    np.testing.assert_allclose(small.conv.kernel[...], model.conv.kernel()[..., best])


def test_weights_are_no_constants_of_the_program():
    seen = []

    def watched(network, batch):
        seen.extend(jax.tree.leaves(nnx.state(network)))
        return loss(network, batch)

    model = filled(Product)
    dhp.gradient_scores(model, watched, batches(0))
    assert len(seen) == len(jax.tree.leaves(nnx.state(model)))  # it is traced once
    assert all(isinstance(array, jax.core.Tracer) for array in seen)


def test_no_batches_and_no_latents_are_refused():
    with pytest.raises(ValueError, match=r"^batches: expected at least one batch, got none$"):
        dhp.gradient_scores(filled(Product), loss, [])
    with pytest.raises(ValueError, match=r"^model: expected a network with latents"):
        dhp.gradient_scores(dhp.prune(filled(Product)), loss, batches(0))
