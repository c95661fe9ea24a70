"""Normalisations, slopes and hidden linear layers on latents: pruned, they compute what is left."""

from flax import nnx
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dhp_jax as dhp

X = np.random.default_rng(0).normal(2, 3, size=(3, 4, 4, 12)).astype(np.float32)


def latent(size=12, **options):
    return dhp.Latent(size, rngs=nnx.Rngs(0), **options)


def with_random_arrays(layer):
    rng = np.random.default_rng(1)
    for name in ("scale", "bias", "negative_slope"):
        if isinstance(variable := getattr(layer, name, None), nnx.Variable):
            variable.set_value(jnp.asarray(rng.uniform(0.5, 1.5, variable.shape), jnp.float32))
    return layer


def computed(layer, x):
    """As one program, which is compiled sooner than its operations one by one."""
    graphdef, state = nnx.split(layer)
    return np.asarray(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x))


def masks(size):
    return st.lists(st.booleans(), min_size=size, max_size=size).filter(any).map(np.array)


@hypothesis.given(masks(4))
@hypothesis.settings(max_examples=10, deadline=None)
def test_whole_groups_go_and_the_others_do_not_change(keep):
    z = latent(4)
    layer = with_random_arrays(dhp.GroupNorm(dhp.repeat(z, 3), 4, rngs=nnx.Rngs(0)))
    small = layer.plain({z: keep})
    assert type(small) is nnx.GroupNorm
    assert (small.num_groups, small.group_size) == (keep.sum(), 3)
    kept = np.repeat(keep, 3)
    expected = computed(layer, X)[..., kept]
    np.testing.assert_allclose(computed(small, X[..., kept]), expected, atol=1e-5)


@hypothesis.given(masks(4))
@hypothesis.settings(max_examples=10, deadline=None)
def test_groups_lose_the_same_channels_and_are_normalised_anew(keep):
    z = latent(4)
    layer = with_random_arrays(dhp.GroupNorm(dhp.concat(z, z, z), 3, rngs=nnx.Rngs(0)))
    small = layer.plain({z: keep})
    left = X.reshape(3, 16, 3, 4)[..., keep]
    normal = left - left.mean((1, 3), keepdims=True)
    normal = normal / np.sqrt(left.var((1, 3), keepdims=True) + 1e-6)
    kept = np.tile(keep, 3)
    expected = normal.reshape(3, 4, 4, -1) * np.asarray(layer.scale)[kept]
    expected += np.asarray(layer.bias)[kept]
    np.testing.assert_allclose(computed(small, X[..., kept]), expected, atol=2e-4)


@hypothesis.given(masks(12))
@hypothesis.settings(max_examples=10, deadline=None)
def test_layer_norm_and_rms_norm_normalise_what_is_left(keep):
    z, left = latent(), X[..., keep]
    for kind in (dhp.LayerNorm, dhp.RMSNorm):
        layer = with_random_arrays(kind(z, rngs=nnx.Rngs(0)))
        bias = np.asarray(layer.bias)[keep] if kind is dhp.LayerNorm else 0
        centred = left - (left.mean(-1, keepdims=True) if kind is dhp.LayerNorm else 0)
        normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        small = layer.plain({z: keep})
        assert type(small) in (nnx.LayerNorm, nnx.RMSNorm)
        assert small.num_features == keep.sum()
        expected = normal * np.asarray(layer.scale)[keep] + bias
        # One channel divides by 1e-3.
        np.testing.assert_allclose(computed(small, left), expected, atol=5e-3)


@pytest.mark.parametrize("kind", [dhp.BatchNorm, dhp.GroupNorm, dhp.LayerNorm, dhp.RMSNorm])
def test_options_of_normalisations_stay(kind):
    options = {"epsilon": 0.1, "use_scale": False, "dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    sizes = (12,) if kind is dhp.GroupNorm else ()
    layer = kind(latent(), *sizes, **options)
    ordinary = getattr(nnx, kind.__name__)(12, *sizes, **options)
    small = layer.plain()
    assert small.scale is None
    layer.eval(), ordinary.eval(), small.eval()
    np.testing.assert_array_equal(layer(X), ordinary(X))
    np.testing.assert_array_equal(small(X), ordinary(X))


def test_groups_that_pruning_would_tear_apart_are_refused_with_the_right_axis():
    message = (
        r"^GroupNorm: num_groups: pruning would leave .* repeat\(z, 3\) of a latent of 4 entries, "
        r"the same channels of each with concat\(\*\[z\] \* 4\)$"
    )
    with pytest.raises(ValueError, match=message):
        dhp.GroupNorm(latent(), 4, rngs=nnx.Rngs(0))
    dhp.GroupNorm(latent(prunable=False), 4, rngs=nnx.Rngs(0))
    for groups in (5, 0, 2.0):
        with pytest.raises(ValueError, match=r"^GroupNorm: num_groups: expected a divisor of the"):
            dhp.GroupNorm(latent(), groups, rngs=nnx.Rngs(0))
    for kind in (dhp.GroupNorm, dhp.LayerNorm, dhp.RMSNorm):
        with pytest.raises(ValueError, match=rf"^{kind.__name__}: z: expected a Latent, .* got 64"):
            kind(64, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^LayerNorm: x: expected 12 channels on axis -1"):
        dhp.LayerNorm(latent(), rngs=nnx.Rngs(0))(X[..., :5])


def test_slopes_go_with_their_channels():
    z, keep = latent(), np.arange(12) % 3 > 0
    layer = with_random_arrays(dhp.PReLU(z))
    small = layer.plain({z: keep})
    x = X - 2
    expected = np.where(x >= 0, x, x * np.asarray(layer.negative_slope))
    np.testing.assert_allclose(layer(x), expected, rtol=1e-6)
    np.testing.assert_allclose(small(x[..., keep]), expected[..., keep], rtol=1e-6)
    assert dhp.PReLU(z, shared=True).negative_slope.shape == ()


def test_a_linear_layer_between_two_axes_has_a_generated_kernel():
    z_in, z_out = latent(), latent(5)
    layer = dhp.Linear(z_in, z_out, rngs=nnx.Rngs(3))
    assert isinstance(layer, dhp.HyperLinear)
    assert layer.w2.shape == (8, 12, 5)
    pairs = np.outer(z_in.value(), z_out.value()) + np.asarray(layer.b0)
    embedded = pairs * np.asarray(layer.w1) + np.asarray(layer.b1)
    kernel = (np.asarray(layer.w2) * embedded).sum(0) + np.asarray(layer.b2)
    np.testing.assert_allclose(layer.kernel(), kernel, rtol=1e-5, atol=1e-6)
    keep = {z_in: np.arange(12) % 2 > 0, z_out: np.arange(5) < 3}
    small = layer.plain(keep)
    assert type(small) is nnx.Linear
    assert (small.in_features, small.out_features) == (6, 3)
    expected = np.asarray(layer.kernel())[keep[z_in]][:, keep[z_out]]
    np.testing.assert_array_equal(small.kernel, expected)
    np.testing.assert_allclose(layer(X), X @ kernel, rtol=1e-4, atol=1e-4)
    grads = nnx.grad(lambda layer: (layer(X) ** 2).sum())(layer)
    assert all(np.abs(np.asarray(g)).min() > 0 for g in (grads.z_in.vector, grads.z_out.vector))
    assert isinstance(nnx.clone(layer), dhp.HyperLinear)


class Net(nnx.Module):
    """Every layer of this file between an image and two outputs."""

    def __init__(self, rngs):
        image, self.z = dhp.Latent(3, prunable=False, rngs=rngs), dhp.Latent(12, rngs=rngs)
        self.hidden = dhp.Latent(12, rngs=rngs)
        axis = dhp.repeat(self.z, 2)
        self.conv = dhp.HyperConv(image, axis, (3, 3), rngs=rngs)
        self.norm, self.slopes = dhp.GroupNorm(axis, 12, rngs=rngs), dhp.PReLU(axis)
        self.linear = dhp.Linear(axis, self.hidden, rngs=rngs)
        self.layer_norm = dhp.LayerNorm(self.hidden, rngs=rngs)
        self.rms_norm = dhp.RMSNorm(self.hidden, rngs=rngs)
        self.head = dhp.Linear(self.hidden, 2, rngs=rngs)

    def __call__(self, x):
        x = self.linear(self.slopes(self.norm(self.conv(x))).mean((1, 2)))
        return self.head(self.rms_norm(self.layer_norm(x)))


def test_a_network_of_them_is_proved_counted_and_pruned_again():
    model, shape = Net(nnx.Rngs(0)), (8, 8, 3)
    cost = dhp.measure_cost(model, shape)
    small = dhp.prune_to(model, shape, flops=0.7, by=dhp.l1_scores(model))
    assert small.norm.num_groups < 12
    counts = {name: z.size for name, z in dhp.latents(model).items()}
    counts |= {"z": small.norm.num_groups, "hidden": small.linear.out_features}
    found = dhp.measure_cost(small, shape)
    assert cost.amounts(counts) == found.amounts({})
    assert cost.params == sum(x.size for x in jax.tree.leaves(nnx.state(dhp.prune(model))))
    assert found.params == sum(x.size for x in jax.tree.leaves(nnx.state(small)))
    again = dhp.with_latents(small, rngs=nnx.Rngs(1), build=Net)
    x = X[..., :3]
    np.testing.assert_allclose(again(x), small(x), rtol=1e-4, atol=1e-5)
    assert again.norm.num_groups == small.norm.num_groups
    twice = dhp.prune_to(again, shape, flops=0.9)
    assert twice(x).shape == (3, 2)
    gated = dhp.with_gates(model, rngs=nnx.Rngs(2))
    np.testing.assert_allclose(gated(x), model(x), rtol=1e-4, atol=1e-5)
