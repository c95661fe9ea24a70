"""Dropout in training: its randomness follows from the key and the step, and nothing is saved."""

from flax import nnx
import jax
import jax.numpy as jnp
from networks import arrays, filled
import numpy as np
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.tasks import Classification
from dhp_jax.train.checkpoints import Checkpoints
from dhp_jax.train.loop import train
from dhp_jax.train.phase import Phase, Stopped
from dhp_jax.train.step import dropout_from

pytestmark = pytest.mark.usefixtures("fast_compilation")

RATE, EXAMPLES, SHAPE, CLASSES = 0.5, 12, (4, 4, 3), 3


class Net(nnx.Module):
    """A convolution and a classifier with dropout before it."""

    def __init__(self, rngs, rate=RATE):
        image = dhp.Latent(3, prunable=False, rngs=rngs)
        z = dhp.Latent(6, rngs=rngs)
        self.conv = dhp.HyperConv(image, z, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(rate)
        self.classifier = dhp.Linear(z, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.classifier(self.dropout(nnx.relu(self.conv(x)).mean((1, 2))))


def labelled(seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (EXAMPLES, *SHAPE), np.uint8)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, CLASSES, EXAMPLES))


def trained(model, key=0, folder=None, stop_after=None):
    """The outcome of two epochs of three steps; `None` where training was stopped."""
    asked = []
    checkpoints = folder and Checkpoints(folder, seconds=0)

    def stopping():
        asked.append(None)
        return stop_after is not None and len(asked) >= stop_after

    rate = optax.constant_schedule(0.1)
    try:
        return train(
            model,
            Phase("converge", 2, rate, lambda params: optax.sgd(rate)),
            Classification((128.0,) * 3, (64.0,) * 3, crop_padding=0, flip=False),
            labelled(0),
            labelled(1),
            examples=EXAMPLES,
            batch_size=4,
            log_every=1,
            key=jax.random.key(key),
            checkpoints=checkpoints,
            stopping=stopping,
        )
    except Stopped:
        return None
    finally:
        if checkpoints:
            checkpoints.close()


@pytest.fixture(scope="module")
def net():
    return filled(Net)


@pytest.fixture(scope="module")
def undisturbed(net):
    return trained(net)


def same(found, expected):
    found, expected = arrays(found.model), arrays(expected.model)
    assert found.keys() == expected.keys()
    return all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_same_key_gives_the_same_bits_and_another_one_others(net, undisturbed):
    assert same(trained(net), undisturbed)
    assert not same(trained(net, key=1), undisturbed)


@pytest.mark.parametrize("step", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_training_with_dropout_that_is_stopped_goes_on_with_the_same_bits(
    net, undisturbed, tmp_path, step
):
    assert trained(net, folder=tmp_path, stop_after=step) is None
    assert same(trained(net, folder=tmp_path), undisturbed)


def test_training_without_dropout_ends_elsewhere(net, undisturbed):
    without = filled(lambda rngs: Net(rngs, rate=0.0))
    assert not same(trained(without), undisturbed)


def test_a_trained_network_has_no_random_state(net, undisturbed):
    assert arrays(undisturbed.model).keys() == arrays(net).keys()
    assert undisturbed.model.dropout.rngs is None


def test_in_the_block_dropout_leaves_out_its_share_and_scales_the_rest():
    layer, ones = nnx.Dropout(0.25), jnp.ones((100, 100))
    with dropout_from(jax.random.key(3), layer):
        y = layer(ones)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.02)
    expected = jax.random.bernoulli(
        nnx.Rngs(jax.random.fold_in(jax.random.key(3), 0)).dropout(), 0.75, ones.shape
    )
    np.testing.assert_array_equal(y > 0, expected)
    assert layer.rngs is None


def test_layers_of_a_network_draw_apart_and_those_with_numbers_of_their_own_keep_them():
    layers = nnx.List([nnx.Dropout(0.5), nnx.Dropout(0.5), nnx.Dropout(0.5, rngs=nnx.Rngs(7))])
    own, ones = nnx.Dropout(0.5, rngs=nnx.Rngs(7)), jnp.ones((64,))

    class Three(nnx.Module):
        def __init__(self):
            self.layers = layers

    with dropout_from(jax.random.key(0), Three()):
        first, second, third = (layer(ones) for layer in layers)
    assert (first != second).any()
    np.testing.assert_array_equal(third, own(ones))
    assert [layer.rngs is None for layer in layers] == [True, True, False]
