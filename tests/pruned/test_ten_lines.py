"""A trained plain ResNet becomes one of latents, is pruned, finetuned, saved, exported."""

from flax import nnx
import jax
import jax.numpy as jnp
from networks import filled
import numpy as np
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.budgets.counted import survivors_within
from dhp_jax.core.surgery import prune as cut
from dhp_jax.export import export

SHAPE = (8, 8, 3)
RNG = np.random.default_rng(0)
BATCHES = [(RNG.normal(size=(4, *SHAPE)).astype(np.float32), np.arange(4)) for _ in range(2)]


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def survivors_by_hand(declared):
    """The network pruned by hand: by masks of its declared latents."""
    cost = dhp.measure_cost(declared, SHAPE)
    masks = survivors_within(declared, cost, scores=dhp.l1_scores(declared), flops=0.5)
    return cut(declared, masks)


@pytest.mark.slow
def test_from_trained_weights_to_a_file_in_ten_lines(tmp_path, monkeypatch, fast_compilation):
    monkeypatch.chdir(tmp_path)
    declared = filled(
        lambda rngs: dhp.models.build("resnet", depth=8, width=0.5, num_classes=4, rngs=rngs)
    )
    model = dhp.prune(declared)
    stage = {"blocks.2.projection.conv": 1.0}  # whose latent the family does not prune

    net = dhp.with_latents(model, SHAPE)
    small = dhp.prune_to(net, flops=0.5, by=dhp.l1_scores(net), keep=stage)
    before = jax.tree.map(np.asarray, nnx.state(small))
    optimizer = nnx.Optimizer(small, optax.adam(1e-3), wrt=nnx.Param)
    step = nnx.jit(lambda net, optimizer, x, y: optimizer.update(net, nnx.grad(loss)(net, x, y)))
    for x, y in BATCHES:
        step(small, optimizer, x, y)
    small.eval()
    dhp.save("small", small)
    export(small, "small.stablehlo", SHAPE, format="stablehlo")

    expected = nnx.state(survivors_by_hand(declared))
    assert all(
        np.array_equal(one, other)
        for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(expected), strict=True)
    )
    assert not np.array_equal(small.stem.conv.kernel[...], before["stem"]["conv"]["kernel"][...])
    x = jnp.asarray(BATCHES[0][0])
    np.testing.assert_array_equal(dhp.load("small")(x), small(x))
    with open("small.stablehlo", "rb") as file:
        exported = jax.export.deserialize(bytearray(file.read()))
    np.testing.assert_allclose(exported.call(x), small(x), rtol=1e-4, atol=1e-4)
