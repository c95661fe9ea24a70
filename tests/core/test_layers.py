"""Layers on latents: each equals its ordinary counterpart, whole and pruned."""

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from networks import arrays, filled, images
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.layers import ChannelBias
from dhp_jax.core.plain import Prunable

pytestmark = pytest.mark.usefixtures("fast_compilation")


def plain_axes(rngs):
    return dhp.Latent(5, rngs=rngs), dhp.Latent(7, rngs=rngs)


def nested_axes(rngs):
    a, b = dhp.Latent(3, rngs=rngs), dhp.Latent(2, rngs=rngs)
    return dhp.concat(a, b), dhp.concat(dhp.repeat(b, 2), a)


def shared_axes(rngs):
    return (dhp.Latent(4, rngs=rngs),) * 2


AXES = [plain_axes, nested_axes, shared_axes]


def on_axes(*cases):
    """Each case on plain axes, and the first on the others; the rest is slow, not lost."""
    found = [(axes, *case) for case in cases for axes in AXES]
    few = [i % len(AXES) == 0 or i < len(AXES) for i in range(len(found))]
    return [
        pytest.param(*case, marks=[pytest.mark.slow] * (not quick))
        for case, quick in zip(found, few, strict=True)
    ]


def conv(axes=plain_axes, kernel_size=(3, 3), strides=1, **options):
    return filled(
        lambda rngs: dhp.HyperConv(*axes(rngs), kernel_size, strides, rngs=rngs, **options)
    )


def transposed(axes=plain_axes, kernel_size=(2, 2), strides=2, **options):
    return filled(
        lambda rngs: dhp.HyperConvTranspose(*axes(rngs), kernel_size, strides, rngs=rngs, **options)
    )


def kernel_by_numpy(layer):
    z_in, z_out = (np.asarray(z.value(), np.float64) for z in (layer.z_in, layer.z_out))
    b0, w1, b1, w2, b2 = (
        np.asarray(getattr(layer, name)[...], np.float64) for name in ("b0", "w1", "b1", "w2", "b2")
    )
    return np.sum(w2 * ((np.outer(z_in, z_out) + b0) * w1 + b1), axis=-3) + b2


def masks_of(layer, bits):
    """A mask for every latent of a layer, from the bits of a number; none keeps nothing."""
    masks = {}
    for z in dhp.latents(layer).values():
        masks[z] = np.array([bits >> i & 1 for i in range(z.size)], bool)
        masks[z][bits % z.size] = True
        bits >>= z.size
    return masks


# HyperConv


@pytest.mark.parametrize(
    ("axes", "kernel_size", "strides", "options"),
    on_axes(
        ((3, 3), 1, {}),
        ((3, 3), 2, {"padding": 1}),
        ((3, 3), (2, 1), {"padding": "VALID", "use_bias": False}),
        ((1, 1), 2, {"padding": 0}),
        ((3, 2), 1, {"padding": ((1, 0), (2, 1)), "kernel_dilation": 2}),
        ((3, 3), 1, {"padding": 2, "kernel_dilation": (1, 2), "input_dilation": 2}),
        ((2, 2), 1, {"padding": "CIRCULAR", "embedding": 3}),
    ),
)
def test_hyper_conv_is_the_convolution_with_its_kernel(axes, kernel_size, strides, options):
    layer = conv(axes, kernel_size, strides, **options)
    options = {name: value for name, value in options.items() if name != "embedding"}
    by_hand = nnx.eval_shape(
        lambda: nnx.Conv(
            layer.z_in.size, layer.z_out.size, kernel_size, strides, rngs=nnx.Rngs(0), **options
        )
    )
    by_hand.kernel.set_value(jnp.asarray(kernel_by_numpy(layer), jnp.float32))
    if by_hand.use_bias:
        by_hand.bias.set_value(layer.bias[...])
    x = images(2, 6, 7, layer.z_in.size)
    np.testing.assert_allclose(layer(x), by_hand(x), rtol=1e-4, atol=1e-4)


def test_hyper_conv_works_on_signals_and_volumes():
    for kernel_size, shape in ((3, (2, 9, 5)), ((2, 3, 1), (1, 4, 5, 3, 5))):
        layer = conv(kernel_size=kernel_size, use_bias=False, padding="VALID")
        x, kernel = images(*shape), kernel_by_numpy(layer)
        windows = np.lib.stride_tricks.sliding_window_view(
            np.asarray(x, np.float64), layer.kernel_size, axis=tuple(range(1, x.ndim - 1))
        )
        taps = "abc"[: len(layer.kernel_size)]
        expected = np.einsum(f"...i{taps},{taps}io->...o", windows, kernel)
        np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_hyper_conv_keeps_the_settings_of_the_convolution_it_turns_into():
    options = {
        "padding": 2,
        "input_dilation": 2,
        "kernel_dilation": 3,
        "use_bias": False,
        "dtype": jnp.bfloat16,
        "precision": "highest",
    }
    plain = conv(strides=2, **options).plain()
    assert type(plain) is nnx.Conv
    for name, value in {"strides": 2, "kernel_size": (3, 3), **options}.items():
        assert getattr(plain, name) == value
    assert (plain.in_features, plain.out_features) == (5, 7)
    assert plain.bias is None


@pytest.mark.parametrize("make", [conv, transposed])
@given(st.sampled_from(AXES), st.booleans(), st.integers(0, 2**12 - 1))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_a_pruned_hyper_conv_is_the_whole_one_sliced_bit_for_bit(make, axes, use_bias, bits):
    layer = make(axes, (3, 1), use_bias=use_bias)
    masks = masks_of(layer, bits)
    whole, pruned = layer.plain(), layer.plain(masks)
    kept_in = np.flatnonzero(layer.z_in.keep(masks))
    kept_out = np.flatnonzero(layer.z_out.keep(masks))
    expected = np.asarray(whole.kernel[...])[:, :, kept_in][..., kept_out]
    np.testing.assert_array_equal(pruned.kernel[...], expected)
    if use_bias:
        np.testing.assert_array_equal(pruned.bias[...], np.asarray(layer.bias[...])[kept_out])
    else:
        assert pruned.bias is None
    assert (pruned.in_features, pruned.out_features) == (len(kept_in), len(kept_out))
    assert set(arrays(pruned)) == ({"kernel", "bias"} if use_bias else {"kernel"})


def test_hyper_conv_computes_in_its_dtype_and_stores_in_float32():
    layer = conv(dtype=jnp.bfloat16)
    x = images(2, 5, 5, 5)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    assert {array.dtype for array in arrays(layer).values()} == {np.dtype("float32")}
    assert layer.plain().kernel.dtype == jnp.float32
    layer.dtype = None
    full = np.asarray(layer(x))
    assert full.dtype == np.float32
    np.testing.assert_allclose(y, full, atol=0.02 * np.abs(full).max())
    assert np.any(np.asarray(y, np.float32) != full)  # it did compute in bfloat16


def test_hyper_conv_stores_in_its_param_dtype():
    layer = conv(param_dtype=jnp.bfloat16)
    stored = arrays(layer)
    assert {stored[name].dtype for name in ("b0", "w1", "b1", "w2", "b2", "bias")} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert stored["z_in.vector"].dtype == np.float32
    assert layer.plain().kernel.dtype == jnp.bfloat16
    assert layer(images(1, 4, 4, 5).astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_gradients_reach_both_latents_and_every_array():
    layer = conv()
    x = images(2, 5, 5, 5)
    grads = arrays(nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer))
    assert set(grads) == set(arrays(layer))
    assert all(np.all(np.isfinite(grad)) and np.any(grad) for grad in grads.values())


def test_a_new_hyper_conv_has_zero_biases_and_drawn_weights():
    layer = dhp.HyperConv(*plain_axes(nnx.Rngs(0)), (3, 3), rngs=nnx.Rngs(1))
    for name, array in arrays(layer).items():
        assert np.any(array) == (name not in ("bias", "b0", "b1", "b2")), name


@pytest.mark.parametrize("make", [conv, transposed])
@pytest.mark.parametrize("shape", [(1, 4, 4, 7), (1, 4, 4, 1), ()])
def test_hyper_conv_refuses_other_channel_counts(make, shape):
    layer = make()
    message = f"^{type(layer).__name__}: x: expected 5 channels on axis -1, got "
    with pytest.raises(ValueError, match=message):
        layer(jnp.zeros(shape))


@pytest.mark.parametrize("kind", [dhp.HyperConv, dhp.HyperConvTranspose])
@pytest.mark.parametrize("name", ["z_in", "z_out"])
def test_hyper_conv_refuses_what_is_no_axis(kind, name):
    rngs = nnx.Rngs(0)
    axes = dict(zip(("z_in", "z_out"), plain_axes(rngs), strict=True)) | {name: 16}
    message = f"^{kind.__name__}: {name}: expected a Latent, .*, got 16$"
    with pytest.raises(ValueError, match=message):
        kind(**axes, kernel_size=(3, 3), rngs=rngs)


@pytest.mark.parametrize("embedding", [0, -1, 2.0, True, None])
@pytest.mark.parametrize(
    ("kind", "taps"),
    [(dhp.HyperConv, [3]), (dhp.HyperConvTranspose, [2]), (dhp.HyperLinear, [])],
)
def test_an_embedding_that_is_no_positive_integer_is_refused(kind, taps, embedding):
    rngs = nnx.Rngs(0)
    message = f"^{kind.__name__}: embedding: expected a positive integer, got {embedding!r}$"
    with pytest.raises(ValueError, match=message):
        kind(*plain_axes(rngs), *taps, embedding=embedding, rngs=rngs)


# Transposed


@pytest.mark.parametrize(
    ("axes", "kernel_size", "strides", "options"),
    on_axes(
        ((2, 2), 2, {}),
        ((2, 2), (2, 2), {"padding": "VALID"}),
        ((3, 3), None, {"use_bias": False}),
        ((3, 2), (2, 1), {"padding": ((1, 2), (0, 1)), "embedding": 3}),
        ((3, 3), 2, {"kernel_dilation": (2, 1), "padding": "VALID"}),
        ((2, 2), (2, 2), {"padding": "CIRCULAR"}),
    ),
)
def test_hyper_conv_transpose_is_the_one_with_its_kernel(axes, kernel_size, strides, options):
    layer = transposed(axes, kernel_size, strides, **options)
    options = {name: value for name, value in options.items() if name != "embedding"}
    sizes = layer.z_in.size, layer.z_out.size
    by_hand = nnx.eval_shape(
        lambda: nnx.ConvTranspose(*sizes, kernel_size, strides, rngs=nnx.Rngs(0), **options)
    )
    by_hand.kernel.set_value(jnp.asarray(kernel_by_numpy(layer), jnp.float32))
    if by_hand.use_bias:
        by_hand.bias.set_value(layer.bias[...])
    x = images(2, 4, 5, layer.z_in.size)
    np.testing.assert_allclose(layer(x), by_hand(x), rtol=1e-4, atol=1e-4)


def test_a_transposed_convolution_of_stride_2_makes_four_pixels_of_each():
    layer = transposed(padding="VALID")
    x, kernel = np.asarray(images(2, 3, 4, 5), np.float64), kernel_by_numpy(layer)
    y = np.asarray(layer(jnp.asarray(x, jnp.float32)))
    assert y.shape == (2, 6, 8, 7)
    for i, j in np.ndindex(2, 2):
        expected = x @ kernel[1 - i, 1 - j] + np.asarray(layer.bias[...])
        np.testing.assert_allclose(y[:, i::2, j::2], expected, rtol=1e-4, atol=1e-4)


@given(bits=st.integers(0, 2**12 - 1))
@settings(deadline=None, derandomize=True, max_examples=4)
def test_a_pruned_hyper_conv_transpose_computes_what_the_whole_one_does(bits):
    layer = transposed(nested_axes)
    masks = masks_of(layer, bits)
    kept_in, kept_out = (z.keep(masks) for z in (layer.z_in, layer.z_out))
    x = images(2, 3, 4, 5)
    expected = np.asarray(layer(x * kept_in))[..., kept_out]
    y = layer.plain(masks)(x[..., np.flatnonzero(kept_in)])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_hyper_conv_transpose_keeps_the_settings_of_the_convolution_it_turns_into():
    options = {"padding": "VALID", "kernel_dilation": 2, "use_bias": False, "dtype": jnp.bfloat16}
    layer = transposed(**options, precision="highest")
    plain = layer.plain()
    assert type(plain) is nnx.ConvTranspose
    for name, value in {"strides": 2, "kernel_size": (2, 2), **options}.items():
        assert getattr(plain, name) == value
    assert plain.precision == "highest"
    assert (plain.in_features, plain.out_features, plain.bias) == (5, 7, None)
    assert layer(images(1, 3, 3, 5)).dtype == jnp.bfloat16
    assert {array.dtype for array in arrays(layer).values()} == {np.dtype("float32")}


# Groups


def whole_groups(rngs):
    return (dhp.repeat(dhp.Latent(5, rngs=rngs), 3),) * 2


def depthwise(rngs):
    return (dhp.Latent(7, rngs=rngs),) * 2


def more_outputs(rngs):
    z = dhp.Latent(4, rngs=rngs)
    return dhp.repeat(z, 2), dhp.repeat(z, 3)


@pytest.mark.parametrize(("axes", "groups"), [(whole_groups, 5), (depthwise, 7), (more_outputs, 4)])
@given(bits=st.integers(0, 2**7 - 1))
@settings(deadline=None, derandomize=True, max_examples=4)
def test_a_pruned_grouped_hyper_conv_is_the_whole_one_without_some_groups(axes, groups, bits):
    layer = conv(axes, feature_group_count=groups)
    masks = masks_of(layer, bits) | {layer.z_group: np.ones(layer.z_group.size, bool)}
    kept_in, kept_out = (np.flatnonzero(z.keep(masks)) for z in (layer.z_in, layer.z_out))
    whole, pruned = layer.plain(), layer.plain(masks)
    assert pruned.feature_group_count == len(kept_in) // layer.z_group.size
    np.testing.assert_array_equal(pruned.kernel[...], np.asarray(whole.kernel[...])[..., kept_out])
    x = images(1, 4, 4, layer.z_in.size)
    expected = np.asarray(whole(x))[..., kept_out]
    np.testing.assert_allclose(pruned(x[..., kept_in]), expected, rtol=1e-4, atol=1e-4)


def test_the_latent_of_the_channels_of_a_group_is_not_prunable():
    layer = conv(whole_groups, feature_group_count=5)
    assert (layer.z_group.size, layer.z_group.prunable) == (3, False)
    assert layer.kernel().shape == (3, 3, 3, 15)


@pytest.mark.parametrize(
    ("axes", "groups"),
    [
        (lambda rngs: (dhp.Latent(6, rngs=rngs),) * 2, 3),  # channels of a group go one by one
        (lambda rngs: [dhp.Latent(6, rngs=rngs) for _ in range(2)], 6),  # not one latent
        (lambda rngs: [dhp.repeat(dhp.Latent(3, rngs=rngs), 2) for _ in range(2)], 3),
        (lambda rngs: (dhp.repeat(dhp.Latent(3, rngs=rngs), 4),) * 2, 2),  # across a boundary
    ],
)
def test_groups_that_pruning_would_tear_apart_are_refused(axes, groups):
    message = (
        f"^HyperConv: feature_group_count: pruning would tear group 0 of {groups} apart: "
        r"its channels are \d entries of latents, expected one; "
    )
    with pytest.raises(ValueError, match=message):
        conv(axes, feature_group_count=groups)


def test_channels_that_are_not_prunable_may_be_grouped_in_any_way():
    def fixed(rngs):
        return [dhp.Latent(6, prunable=False, rngs=rngs) for _ in range(2)]

    assert conv(fixed, feature_group_count=3).kernel().shape == (3, 3, 2, 6)


@pytest.mark.parametrize(
    ("groups", "size", "name"),
    [(2, 5, "z_in"), (5, 7, "z_out"), (0, 5, "z_in"), (-1, 5, "z_in"), (2.5, 5, "z_in")],
)
def test_groups_that_do_not_divide_the_channels_are_refused(groups, size, name):
    message = (
        f"^HyperConv: feature_group_count: expected a divisor of the {size} channels of {name}, "
        f"got {groups}"
    )
    with pytest.raises(ValueError, match=message):
        conv(feature_group_count=groups)


# Bias


def bias(axes=plain_axes, **options):
    """A bias over the first of two axes."""
    return filled(lambda rngs: dhp.Bias(axes(rngs)[0], rngs=rngs, **options))


def test_a_bias_is_added_to_every_pixel():
    layer, x = bias(), images(2, 3, 4, 5)
    np.testing.assert_array_equal(layer(x), np.asarray(x) + np.asarray(layer.bias[...]))
    assert not np.any(dhp.Bias(plain_axes(nnx.Rngs(0))[0], rngs=nnx.Rngs(0)).bias[...])


@given(bits=st.integers(0, 2**5 - 1))
@settings(deadline=None, derandomize=True, max_examples=8)
def test_a_pruned_bias_is_that_of_the_surviving_channels(bits):
    layer = bias(lambda rngs: nested_axes(rngs)[::-1])
    masks = masks_of(layer, bits)
    kept = np.flatnonzero(layer.z.keep(masks))
    pruned = layer.plain(masks)
    assert type(pruned) is ChannelBias
    assert pruned.num_features == len(kept)
    assert set(arrays(pruned)) == {"bias"}
    np.testing.assert_array_equal(pruned.bias[...], np.asarray(layer.bias[...])[kept])
    x = images(2, 3, layer.num_features)
    np.testing.assert_array_equal(pruned(x[..., kept]), np.asarray(layer(x))[..., kept])


def test_a_bias_is_added_in_the_dtype_of_what_it_is_added_to():
    layer = bias()
    x = images(2, 5).astype(jnp.bfloat16)
    for each in (layer, layer.plain()):
        assert each(x).dtype == jnp.bfloat16
        assert each.bias.dtype == jnp.float32
    narrow = bias(param_dtype=jnp.bfloat16)
    assert narrow.bias.dtype == narrow.plain().bias.dtype == jnp.bfloat16


def test_bias_refuses_other_channel_counts_and_what_is_no_axis():
    with pytest.raises(ValueError, match=r"^Bias: x: expected 5 channels on axis -1, got shape"):
        bias()(jnp.zeros((2, 1)))  # which would broadcast
    with pytest.raises(ValueError, match=r"^Bias: z: expected a Latent, .*, got 5$"):
        dhp.Bias(5, rngs=nnx.Rngs(0))


# BatchNorm


def norm(axes=plain_axes, **options):
    """A BatchNorm over the first of two axes."""
    return filled(lambda rngs: dhp.BatchNorm(axes(rngs)[0], rngs=rngs, **options))


def same_norm(layer, kept=slice(None), **options):
    """The `nnx.BatchNorm` with a layer's arrays at the given channels."""
    size = len(np.zeros(layer.num_features)[kept])
    by_hand = nnx.BatchNorm(size, rngs=nnx.Rngs(0), **options)
    for name in ("scale", "bias", "mean", "var"):
        if getattr(layer, name) is not None:
            getattr(by_hand, name)[...] = np.asarray(getattr(layer, name)[...])[kept]
    return by_hand


OPTIONS = [
    {},
    {"momentum": 0.9, "epsilon": 1e-2},
    {"use_bias": False, "use_scale": False},
    {"use_fast_variance": False, "use_bias": False},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_is_the_ordinary_one(options, train):
    layer = norm(**options)
    by_hand = same_norm(layer, **options)
    x = images(4, 3, 3, 5) + 2
    for each in (layer, by_hand):
        each.train() if train else each.eval()
    np.testing.assert_array_equal(layer(x), by_hand(x))
    for name in ("mean", "var"):
        np.testing.assert_array_equal(getattr(layer, name)[...], getattr(by_hand, name)[...])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("train", [True, False])
def test_a_pruned_batch_norm_carries_its_statistics_and_mode(options, train):
    layer = norm(lambda rngs: nested_axes(rngs)[::-1], **options)
    layer.train() if train else layer.eval()
    masks = masks_of(layer, 0b10110)
    kept = np.flatnonzero(layer.z.keep(masks))
    assert 0 < len(kept) < layer.num_features
    pruned, expected = layer.plain(masks), same_norm(layer, kept, **options)
    assert type(pruned) is nnx.BatchNorm
    assert pruned.use_running_average is not train
    assert pruned.num_features == len(kept)
    assert arrays(pruned).keys() == arrays(expected).keys()
    for name, array in arrays(expected).items():
        np.testing.assert_array_equal(arrays(pruned)[name], array)
    expected.train() if train else expected.eval()
    x = images(4, 2, 2, layer.num_features)
    whole, y = layer(x), pruned(x[..., kept])
    np.testing.assert_array_equal(y, expected(x[..., kept]))
    np.testing.assert_allclose(y, np.asarray(whole)[..., kept], rtol=1e-5, atol=1e-5)
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            getattr(pruned, name)[...], np.asarray(getattr(layer, name)[...])[kept], rtol=1e-5
        )


def test_pruning_a_batch_norm_leaves_it_as_it_was():
    layer = norm()
    before = arrays(layer)
    layer.plain(masks_of(layer, 0b00101))(images(4, 2))
    for name, array in arrays(layer).items():
        np.testing.assert_array_equal(array, before[name])


def test_batch_norm_computes_in_its_dtype_and_stores_in_float32():
    layer = norm(dtype=jnp.bfloat16)
    assert layer(images(4, 5)).dtype == jnp.bfloat16
    pruned = layer.plain(masks_of(layer, 0b00101))
    assert pruned(images(4, 2)).dtype == jnp.bfloat16
    assert {array.dtype for array in arrays(pruned).values()} == {np.dtype("float32")}


def test_batch_norm_refuses_other_channel_counts_and_what_is_no_axis():
    with pytest.raises(ValueError, match=r"^BatchNorm: x: expected 5 channels on axis -1, got sha"):
        norm()(jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"^BatchNorm: z: expected a Latent, .*, got 5$"):
        dhp.BatchNorm(5, rngs=nnx.Rngs(0))


def test_batch_norm_normalises_another_axis_than_the_last():
    layer = norm(axis=1)
    x = images(4, 5, 3)
    layer.train()
    y = np.asarray(layer(x), np.float64)
    scale, bias = (np.asarray(a[...]) for a in (layer.scale, layer.bias))
    np.testing.assert_allclose(y.mean((0, 2)), bias, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 2)), np.abs(scale), rtol=1e-3)
    with pytest.raises(ValueError, match="expected 5 channels on axis 1"):
        layer(jnp.zeros((4, 3, 5)))


# Linear


@pytest.mark.parametrize("use_bias", [True, False])
@given(bits=st.integers(0, 2**12 - 1))
@settings(deadline=None, derandomize=True, max_examples=8)
def test_a_linear_layer_is_its_rows_of_the_surviving_features(use_bias, bits):
    layer = filled(lambda rngs: dhp.Linear(nested_axes(rngs)[1], 3, use_bias=use_bias, rngs=rngs))
    masks = masks_of(layer, bits)
    kept = np.flatnonzero(layer.z_in.keep(masks))
    pruned = layer.plain(masks)
    assert type(pruned) is nnx.Linear
    kernel = np.asarray(layer.kernel[...])
    bias = np.asarray(layer.bias[...]) if use_bias else np.zeros(3)
    np.testing.assert_array_equal(pruned.kernel[...], kernel[kept])
    assert (pruned.bias is not None) == use_bias
    if use_bias:
        np.testing.assert_array_equal(pruned.bias[...], bias)
    assert (pruned.in_features, pruned.out_features) == (len(kept), 3)
    x = np.asarray(images(2, 7))
    np.testing.assert_allclose(layer(x), x @ kernel + bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pruned(x[:, kept]), x[:, kept] @ kernel[kept] + bias, atol=1e-5)


def test_linear_refuses_other_feature_counts_and_what_is_no_axis():
    layer = filled(lambda rngs: dhp.Linear(plain_axes(rngs)[0], 3, rngs=rngs))
    with pytest.raises(ValueError, match=r"^Linear: x: expected 5 channels on axis -1, got shape"):
        layer(jnp.zeros((2, 7)))
    with pytest.raises(ValueError, match=r"^Linear: z_in: expected a Latent, .*, got 64$"):
        dhp.Linear(64, 10, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^HyperLinear: z_in: expected a Latent, .*, got 64$"):
        dhp.Linear(64, dhp.Latent(5, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))


# All of them


def test_layers_are_prunable_and_ordinary_ones_are_not():
    for layer in (
        conv(),
        transposed(),
        bias(),
        norm(),
        filled(lambda rngs: dhp.Linear(plain_axes(rngs)[0], 3, rngs=rngs)),
    ):
        assert isinstance(layer, Prunable)
    for layer in (
        conv().plain(),
        transposed().plain(),
        bias().plain(),
        norm().plain(),
        nnx.Dropout(0.5),
    ):
        assert not isinstance(layer, Prunable)


def test_layers_work_inside_jit():
    layer = conv(nested_axes, strides=2, padding=1)
    graphdef, state = nnx.split(layer)
    x = images(2, 6, 6, 5)
    jitted = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    np.testing.assert_allclose(jitted, layer(x), rtol=1e-5, atol=1e-5)
