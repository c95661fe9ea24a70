"""Scores by derivatives of a loss: what is no loss, and what are no batches."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dhp_jax as dhp

RNG = np.random.default_rng(0)
X, LABELS = RNG.normal(size=(6, 4)).astype(np.float32), np.arange(6) % 3
of_both = pytest.mark.parametrize("scores_of", [dhp.taylor_scores, dhp.gradient_scores])


@functools.cache
def network():
    """A network that tests leave as it is."""
    arrays = {"a": RNG.normal(size=(4, 8)), "b": RNG.normal(size=(8, 3))}
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    model = dhp.FromFunction(lambda p, x: nnx.relu(x @ p["a"]) @ p["b"], arrays)
    return dhp.with_latents(model, (4,), min_channels=1)


def squares(net, x):
    return jnp.mean(net(x) ** 2)


def errors(net, batch):
    """Without a derivative."""
    x, labels = batch
    return jnp.mean(jnp.argmax(net(x), -1) != labels)


def underflowing(net, x):
    return (squares(net, x).astype(jnp.float16) * 1e-8).astype(jnp.float32)


@of_both
@pytest.mark.parametrize(
    ("loss", "batch", "told"),
    [
        (errors, (X, LABELS), "expected a number that changes with the network; all .* are 0"),
        (underflowing, X, "expected a number that changes with the network; all .* are 0"),
        (
            lambda net, x: jnp.sqrt(-squares(net, x)),
            X,
            "expected finite derivatives; those by .*'a'",
        ),
    ],
)
def test_a_loss_whose_derivatives_rank_nothing_is_refused(scores_of, loss, batch, told):
    with pytest.raises(ValueError, match=f"^loss: {told}"):
        scores_of(network(), loss, [batch])


@of_both
@pytest.mark.parametrize(
    ("batches", "told"),
    [
        (X, r"expected several, such as \[x\], got shape \(6, 4\)"),
        ((X, LABELS), r"expected several alike, .*, got arrays of shapes \(6, 4\), \(6,\)"),
        ([X, LABELS], r"expected several alike, .*, got arrays of shapes \(6, 4\), \(6,\)"),
        ({"image": X}, r"expected several, such as \[batch\], got a dict"),
        (squares, r"expected several, such as \[batch\], got a function"),
        ([X[:0]], "expected at least one example in each, got"),
        (iter([]), "expected at least one batch, got none"),
    ],
)
def test_what_are_not_several_batches_is_refused(scores_of, batches, told):
    with pytest.raises(ValueError, match=f"^batches: {told}"):
        scores_of(network(), squares, batches)


@of_both
def test_arguments_in_the_wrong_order_are_refused(scores_of):
    net = network()
    with pytest.raises(ValueError, match=r"^loss: expected a function of the network and a batch"):
        scores_of(net, [X], squares)
    with pytest.raises(ValueError, match=r"^model: expected a network of latents, got"):
        scores_of(squares, net, [X])


@of_both
def test_batches_of_several_sizes_in_a_tuple_or_a_generator_are_taken(scores_of):
    net = network()
    several = (X, X[:4])
    (found,), (other,) = (
        scores_of(net, squares, given).values() for given in (several, iter(several))
    )
    np.testing.assert_array_equal(found, other)
    assert found.shape == (8,)
    assert found.any()


class Dropping(nnx.Module):
    """Drops whole channels in training."""

    def __init__(self, rngs):
        image, z = dhp.Latent(3, prunable=False, rngs=rngs), dhp.Latent(16, rngs=rngs)
        self.stem = dhp.HyperConv(image, z, (1, 1), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, broadcast_dims=(0, 1, 2), rngs=rngs)
        self.head = dhp.Linear(z, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(self.stem(x)).mean((1, 2)))


@of_both
def test_each_batch_has_dropout_of_its_own(scores_of):
    model = Dropping(nnx.Rngs(0))
    model.train()
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 3))

    def silent(count):
        scores = scores_of(model, lambda network, x: (network(x) ** 2).mean(), [x] * count)
        (numbers,) = scores.values()
        return int((numbers == 0).sum())

    assert silent(1) > 0
    assert silent(12) == 0
    assert silent(1) == silent(1)  # the model is left as it was
