"""Statistics of BatchNorm are those of the examples, however these are cut into batches."""

from flax import linen, nnx
import jax
import jax.numpy as jnp
from networks import MIXED_INPUT, Mixed, filled
import numpy as np
import pytest

import dhp_jax as dhp


class Two(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(self.first(x)))


def test_statistics_are_the_moments_of_all_examples():
    model = Two(nnx.Rngs(0))
    x = np.random.default_rng(0).normal(2, 3, (60, 5, 5, 3)).astype(np.float32)
    x[..., 1] *= 4
    dhp.renew_statistics(model, [x[:10], x[10:40], x[40:]])
    flat = x.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(model.first.mean[...], flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.first.var[...], flat.var(0), rtol=1e-4)


def test_the_variance_of_numbers_far_from_zero_is_exact():
    x = np.random.default_rng(0).normal(1000, 1, (64, 8, 3)).astype(np.float32)
    model = Two(nnx.Rngs(0))
    dhp.renew_statistics(model, [x[:32], x[32:]])
    expected = x.reshape(-1, 3).astype(np.float64).var(0)
    np.testing.assert_allclose(model.first.var[...], expected, rtol=1e-4)
    assert model.first.use_fast_variance


class Sum(Two):
    """A network of two inputs."""

    def __call__(self, x, y):
        return super().__call__(x + y)


def test_a_network_of_several_inputs_is_called_as_asked():
    model, other = Sum(nnx.Rngs(0)), Two(nnx.Rngs(0))
    x, y = np.random.default_rng(0).normal(2, 3, (2, 60, 3)).astype(np.float32)
    batches = [{"x": x[:20], "y": y[:20]}, {"x": x[20:], "y": y[20:]}]
    dhp.renew_statistics(model, batches, call=lambda network, batch: network(**batch))
    dhp.renew_statistics(other, [x + y])
    for one, two in zip(model.first.mean[...], other.first.mean[...], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)
    assert model.first.mean[...].min() > 1


def test_a_layer_that_was_trained_on_several_devices_is_measured_on_one():
    model = Two(nnx.Rngs(0))
    model.first.axis_name = "devices"
    x = np.random.default_rng(0).normal(2, 3, (6, 3)).astype(np.float32)
    dhp.renew_statistics(model, [x])
    np.testing.assert_allclose(model.first.mean[...], x.mean(0), rtol=1e-5)
    assert model.first.axis_name == "devices"


def test_nothing_but_statistics_changes_and_the_mode_stays():
    model = filled(Mixed)
    model.train()
    images = np.random.default_rng(1).normal(size=(8, *MIXED_INPUT)).astype(np.float32)
    before = {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}
    dhp.renew_statistics(model, [images])
    after = {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}
    changed = {path[-1] for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"mean", "var"}
    assert not model.left_norm.use_running_average
    assert model.left_norm.momentum == 0.9


def test_a_network_whose_channels_were_cut_computes_in_evaluation_what_it_does_in_training():
    model = filled(Mixed)
    small = dhp.prune_to(model, MIXED_INPUT, flops=0.5)
    images = np.random.default_rng(2).normal(size=(64, *MIXED_INPUT)).astype(np.float32)
    small.train()
    training = np.asarray(nnx.clone(small)(images))
    small.eval()
    assert np.abs(np.asarray(small(images)) - training).max() > 0.1
    dhp.renew_statistics(small, [images])
    np.testing.assert_allclose(small(images), training, rtol=1e-3, atol=1e-3)


class Twice(Two):
    """Its BatchNorm sees both halves of the channels, whatever the code says of its mode."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.unused = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        first, second = (
            self.first(half, use_running_average=True) for half in (x[:, :3], x[:, 3:])
        )
        return self.last(first + second)


def test_a_layer_that_is_called_twice_has_the_moments_of_all_it_saw():
    model = Twice(nnx.Rngs(0))
    model.first.mean[...], model.first.var[...] = jnp.full(3, jnp.nan), jnp.full(3, jnp.inf)
    x = np.random.default_rng(0).normal(2, 3, (60, 6)).astype(np.float32) + np.arange(6) * 100
    dhp.renew_statistics(model, [x[:10], x[10:40], x[40:]])
    seen = np.concatenate([x[:, :3], x[:, 3:]]).astype(np.float64)
    np.testing.assert_allclose(model.first.mean[...], seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.first.var[...], seen.var(0), rtol=1e-4)
    assert (model.unused.var[...] == 1).all()


def test_layers_that_are_stacked_and_scanned_have_statistics_each():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return 2 * self.norm(x) + 1

    class Stacked(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(Layer)(nnx.Rngs(params=jax.random.split(rngs.params(), 2)))

        def __call__(self, x):
            scan = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return scan(lambda x, layer: layer(x))(x, self.layers)

    model = Stacked(nnx.Rngs(0))
    x = np.random.default_rng(0).normal(5, 3, (50, 3)).astype(np.float32)
    dhp.renew_statistics(model, [x])
    norm = model.layers.norm
    np.testing.assert_allclose(norm.mean[...], [x.mean(0), [1, 1, 1]], rtol=1e-4)
    np.testing.assert_allclose(norm.var[...], [x.var(0), [4, 4, 4]], rtol=1e-4)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_numbers_that_a_mask_leaves_out_are_not_seen(kind):
    class Masked(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x, mask=x[..., :1] > 0)

    class MaskedLinen(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            return linen.BatchNorm(not train, name="norm")(x, mask=x[..., :1] > 0)

    x = np.random.default_rng(0).normal(1, 2, (30, 4, 3)).astype(np.float32)
    if kind == "nnx":
        model = Masked()
    else:
        variables = MaskedLinen().init(jax.random.key(0), x)
        model = dhp.FromLinen(MaskedLinen(), variables, training={"train": True})
    dhp.renew_statistics(model, [x[:10], 2 * x[10:]])
    seen = np.concatenate([x[:10], 2 * x[10:]])
    seen = seen[seen[..., 0] > 0]
    np.testing.assert_allclose(model.norm.mean[...], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(model.norm.var[...], seen.var(0), rtol=1e-4)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^model: expected a network with BatchNorm layers"):
        dhp.renew_statistics(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [jnp.ones((1, 2))])
    labelled = (jnp.ones((1, 4, 4, 3)), jnp.ones(1))
    with pytest.raises(ValueError, match=r"^batches: expected arrays, without labels, .* got \("):
        dhp.renew_statistics(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), [labelled])
    with pytest.raises(ValueError, match=r"^batches: expected at least one batch, got none"):
        dhp.renew_statistics(Two(nnx.Rngs(0)), [])
    x = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match=r"^batches: expected several, .* got shape \(4, 3\)$"):
        dhp.renew_statistics(Two(nnx.Rngs(0)), x)
    several = r"^batches: expected several alike, .* got arrays of shapes \(4, 3\), \(4,\)$"
    with pytest.raises(ValueError, match=several):
        dhp.renew_statistics(Two(nnx.Rngs(0)), (x, x[:, 0]))
    with pytest.raises(ValueError, match=r"^batches: expected several, .* got a NoneType$"):
        dhp.renew_statistics(Two(nnx.Rngs(0)), None)
    with pytest.raises(ValueError, match=r"^model: expected an nnx.Module, got \{\}$"):
        dhp.renew_statistics({}, [x])
    with pytest.raises(ValueError, match=r"^batches: expected at least one .* shape=\(0, 3\)"):
        dhp.renew_statistics(Two(nnx.Rngs(0)), [x, x[4:]])
    with pytest.raises(ValueError, match=r"^call: expected a function .*, or None, got 1$"):
        dhp.renew_statistics(Two(nnx.Rngs(0)), [x], call=1)
    with pytest.raises(ValueError, match=r"^batches: expected finite .* 'first' sees NaN or infin"):
        dhp.renew_statistics(Two(nnx.Rngs(0)), [x, x * np.inf])
    told = r"^batches: the model does not take \(4, 2\): add got incompatible shapes"
    with pytest.raises(ValueError, match=told):
        dhp.renew_statistics(Two(nnx.Rngs(0)), [x, x[:, :2]])
