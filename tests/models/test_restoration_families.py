"""Families for restoration: their axes, their outputs, and single layers by hand."""

import functools
import itertools

from families import RESTORERS, abstract, kept_by, network, output, plain, pruned
from flax import nnx
import jax
import jax.numpy as jnp
from networks import RNGS, arrays, filled, images, keep_all, run
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.layers import Hyper
from dhp_jax.core.surgery import prune as cut
from dhp_jax.models.edsr import MEAN, Constant
from dhp_jax.models.upsampler import pixel_shuffle
from dhp_jax.pruned.fresh_weights import reinitialize

pytestmark = pytest.mark.usefixtures("fast_compilation")
SCALES = {"srresnet": (2, 3, 4), "edsr": (2, 3, 4), "dncnn": (None,), "unet": (None,)}
small_networks = pytest.mark.parametrize("name", RESTORERS)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 * np.std(expected))


# What they cost


@pytest.mark.parametrize("family", ["srresnet", "edsr"])
def test_a_latent_of_its_own_for_the_upsampler_costs_nothing(family):
    shared, apart = (
        abstract(family, scale=3, blocks=2, prune_upsampler=prune) for prune in (True, False)
    )
    costs = [dhp.measure_cost(model, (16, 16, 3)) for model in (shared, apart)]
    assert (costs[0].flops, costs[0].params) == (costs[1].flops, costs[1].params)
    assert len(dhp.latents(apart)) == len(dhp.latents(shared)) + 1


SIDE = 128
PIXELS = SIDE**2
PUBLISHED = {  # FLOPs, params, latents
    "srresnet": (32_822_525_952, 1_535_637, 19),
    "edsr": (90_356_203_520, 3_696_667, 11),
    "dncnn": (9_125_756_928, 557_057, 18),
    "unet": (3_415_015_424, 7_759_521, 24),
}


def formula_srresnet(n):
    """Convolutions, 2 for an element of a BatchNorm, 1 for one of a PReLU layer's last call."""
    b, hidden = n["body"], [n[f"blocks.{i}.hidden"] for i in range(16)]
    blocks = sum(18 * b * h + 2 * h + 2 * b + h for h in hidden)
    low = 243 * b + b + blocks + 9 * b * b + 2 * b + 36 * b * b
    return PIXELS * (low + 4 * 36 * b * b + 16 * (b + 27 * b))


def formula_edsr(n):
    """All blocks share a ReLU layer, which the last one calls last; two mean shifts count."""
    b, hidden = n["body"], [n[f"blocks.{i}.hidden"] for i in range(8)]
    blocks = sum(18 * b * h for h in hidden) + hidden[-1]
    low = 9 + 27 * b + blocks + 9 * b * b + 36 * b * b
    return PIXELS * (low + 4 * 36 * b * b + 16 * (27 * b + 9))


def formula_dncnn(n):
    f = [n[f"features.{i}"] for i in range(16)]
    middle = sum(9 * a * b + 2 * b + b for a, b in itertools.pairwise(f))
    return PIXELS * (9 * f[0] + middle + 9 * f[-1])


def formula_unet(n):
    """A ReLU behind each 3x3 convolution; an up-convolution counts four taps at every output."""
    n = {**n, "up.3.convs.output": n["tail.z_in"]}
    total, below = 0, 1
    for i in range(5):
        a, b = n[f"down.{i}.hidden"], n[f"down.{i}.output"]
        total += PIXELS // 4**i * (9 * below * a + a + 9 * a * b + b)
        below = b
    for i, level in enumerate((3, 2, 1, 0)):
        up, a, b = (n[f"up.{i}.{name}"] for name in ("upsampled", "convs.hidden", "convs.output"))
        joined = up + n[f"down.{level}.output"]
        total += PIXELS // 4**level * (4 * below * up + 9 * joined * a + a + 9 * a * b + b)
        below = b
    return total + PIXELS * below


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_is_left_is_counted_as_the_paper_counts_the_whole(family, caplog):
    model = dhp.models.build_abstract(family, **NEEDED[family])
    channels = model.channels
    sizes = {name: z.size for name, z in dhp.latents(model).items()}
    cost = dhp.measure_cost(model, (SIDE, SIDE, channels))
    by_hand = globals()[f"formula_{family}"]
    assert (cost.flops, cost.params, len(sizes)) == PUBLISHED[family]
    assert by_hand(sizes) == cost.flops
    assert caplog.records == []
    rng = np.random.default_rng(0)
    for _ in range(5):
        left = {
            name: int(rng.integers(4, z.size + 1)) if z.prunable else z.size
            for name, z in dhp.latents(model).items()
        }
        assert cost.amounts(left)["flops"] == by_hand(left)


# Arguments and inputs


NEEDED = {"srresnet": {"scale": 4}, "edsr": {"scale": 4}, "dncnn": {}, "unet": {}}


def tiny(family, scale, **arguments):
    """An abstract network of few channels."""
    if scale is None:
        return abstract(family, features=3, **arguments)
    return abstract(family, scale=scale, blocks=1, features=3, **arguments)


@pytest.mark.parametrize(
    ("family", "scale"), [(family, scale) for family in SCALES for scale in SCALES[family]]
)
def test_the_output_is_the_input_scaled_for_any_number_of_channels_and_pixels(family, scale):
    variants = ({}, {"channels": 4}, {"prune_upsampler": False})
    for arguments in variants if scale else variants[:2]:
        model = tiny(family, scale, **arguments)
        channels = model.channels
        for n, h, w in ((1, 1, 1), (2, 21, 13), (1, 16, 32)):
            restored = output(model, (n, h, w, channels))
            assert restored.shape == (n, h * (scale or 1), w * (scale or 1), channels)
            assert restored.dtype == jnp.float32
        for shape in ((8, 8, channels), (1, 8, 8, channels + 1), (1, channels, 8, 8), (2, 1, 8, 8)):
            message = rf"^images: expected shape \(batch, height, width, {channels}\), got "
            with pytest.raises(ValueError, match=message):
                output(model, shape)


def test_the_depth_of_a_unet_is_its_number_of_resolutions():
    for depth, widths in ((1, [6]), (2, [6, 12]), (4, [6, 12, 24, 48])):
        model = abstract("unet", depth=depth, features=6)
        assert [level.output.size for level in model.down] == widths
        assert [level.upsampled.size for level in model.up] == widths[-2::-1]
        assert output(model, (1, 9, 5, 1)).shape == (1, 9, 5, 1)


def test_a_unet_of_an_odd_size_is_that_of_the_image_extended_by_its_edges_and_cut_back():
    model, x = plain("unet"), np.asarray(images(2, 21, 13, 1))
    assert model.multiple == 4
    rows, columns = (np.minimum(np.arange(size), last) for size, last in ((24, 20), (16, 12)))
    extended, statistics = run(model, jnp.asarray(x[:, rows][:, :, columns]), train=True)
    restored, own_statistics = run(model, jnp.asarray(x), train=True)
    np.testing.assert_allclose(restored, extended[:, :21, :13], rtol=1e-5, atol=1e-5)
    for path, stat in statistics.items():
        np.testing.assert_allclose(own_statistics[path], stat, rtol=1e-5)


# Which axes are one


@pytest.mark.parametrize("family", SCALES)
def test_only_images_are_not_prunable(family):
    model = abstract(family, **NEEDED[family], min_channels=3)
    found = dhp.latents(model).values()
    assert {z for z in found if not z.prunable} == {model.image, model.output}
    assert {z.min_channels for z in found if z.prunable} == {3}


@pytest.mark.parametrize("family", ["srresnet", "edsr"])
@pytest.mark.parametrize("prune_upsampler", [True, False])
def test_all_that_is_added_and_upsampled_is_one_latent(family, prune_upsampler):
    model = abstract(family, scale=4, blocks=3, prune_upsampler=prune_upsampler)
    last = model.last.conv if family == "srresnet" else model.last
    assert model.head.z_out is last.z_in is last.z_out is model.upsampler.convs[0].z_in
    for block in model.blocks:
        first, second = (
            layer.conv if family == "srresnet" else layer for layer in (block.first, block.second)
        )
        assert first.z_in is second.z_out is model.body
        assert first.z_out is second.z_in is block.hidden
    assert len({block.hidden for block in model.blocks} | {model.body}) == 4
    assert (model.upsampled is model.body) == prune_upsampler
    assert model.upsampler.convs[1].z_in is model.tail.z_in is model.upsampled
    for conv in model.upsampler.convs:
        assert conv.z_out.entries() == [
            (model.upsampled, i // 4) for i in range(4 * conv.z_in.size)
        ]


@pytest.mark.parametrize("family", ["srresnet", "edsr"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_an_upsampler_that_is_not_pruned_stays_whole_at_any_threshold(family, scale):
    for prune_upsampler, size in ((True, 2), (False, 6)):
        arguments = {"blocks": 1, "features": 6, "min_channels": 2}
        model = filled(
            lambda _, keep=prune_upsampler, arguments=arguments: dhp.models.build(
                family, scale=scale, prune_upsampler=keep, rngs=RNGS, **arguments
            )
        )
        small = cut(model, dhp.survivors(model, threshold=1e3))
        first, *others = (conv.kernel.shape[2:] for conv in small.upsampler.convs)
        r2 = 9 if scale == 3 else 4
        assert first == (2, r2 * size)
        assert others == ([(size, r2 * size)] if scale == 4 else [])
        assert small.tail.kernel.shape == (3, 3, size, 3)
        assert small.head.kernel.shape[2:] == (3, 2)


def test_what_follows_a_skip_reads_the_upsampled_channels_and_then_the_skip():
    model = abstract("unet", depth=4)
    for level, skipped in zip(model.up, model.down[-2::-1], strict=True):
        expected = [(z, i) for z in (level.upsampled, skipped.output) for i in range(z.size)]
        assert level.convs.first.z_in.entries() == expected
    every = [m.z_out for _, m in nnx.iter_modules(model) if isinstance(m, Hyper)]
    assert len(set(every)) == len(every)  # one latent for every convolution


def test_a_dncnn_has_a_latent_for_every_convolution():
    model = abstract("dncnn", depth=6)
    convs = [model.head, *(layer.conv for layer in model.middle), model.tail]
    assert len(convs) == 6
    axes = [model.image, *model.features, model.output]
    assert len(set(axes)) == 7
    for conv, z_in, z_out in zip(convs, axes[:-1], axes[1:], strict=True):
        assert (conv.z_in, conv.z_out) == (z_in, z_out)


# What they compute


def shuffled_by_hand(x, r):
    """Pixel (h r + i, w r + j) of channel c is channel c r^2 + i r + j of pixel (h, w)."""
    n, height, width, channels = x.shape
    y = np.zeros((n, height * r, width * r, channels // r**2), x.dtype)
    for h, w, c, i, j in np.ndindex(height, width, channels // r**2, r, r):
        y[:, h * r + i, w * r + j, c] = x[:, h, w, c * r**2 + i * r + j]
    return y


@pytest.mark.parametrize("r", [1, 2, 3])
def test_a_pixel_shuffle_turns_neighbouring_channels_into_rows_of_pixels(r):
    x = images(2, 3, 4, 5 * r**2)
    np.testing.assert_array_equal(pixel_shuffle(x, r), shuffled_by_hand(np.asarray(x), r))


def prelu(layer, x):
    return jnp.where(x > 0, x, layer.negative_slope[...] * x)


def srresnet_by_description(net, x):
    def convolved(layer, x):
        return layer.norm(layer.bias(layer.conv(x)))

    shallow = x = prelu(net.activation, net.head(x))
    for block in net.blocks:
        x = x + convolved(block.second, prelu(block.activation, convolved(block.first, x)))
    x = shallow + convolved(net.last, x)
    for conv, r in zip(net.upsampler.convs, net.upsampler.factors, strict=True):
        x = prelu(net.upsampler.activation, pixel_shuffle(conv(x), r))
    return net.tail(x)


def edsr_by_description(net, x):
    shallow = x = net.head(x @ net.center.kernel[0, 0] + net.center.bias)
    for block in net.blocks:
        x = x + block.second(jnp.maximum(block.first(x), 0))
    x = shallow + net.last(x) + net.bias.bias
    for conv, r in zip(net.upsampler.convs, net.upsampler.factors, strict=True):
        x = pixel_shuffle(conv(x), r)
    return net.tail(x) @ net.restore.kernel[0, 0] + net.restore.bias


def dncnn_by_description(net, x):
    h = jnp.maximum(net.head(x), 0)
    for layer in net.middle:
        h = jnp.maximum(layer.norm(layer.conv(h) + layer.bias.bias), 0)
    return x + net.tail(h)


def unet_by_description(net, x):
    def doubled(convs, x):
        normalised = hasattr(convs.first, "norm")
        x = convs.first.norm(convs.first.conv(x)) if normalised else convs.first(x)
        x = jnp.maximum(x, 0)
        return jnp.maximum(convs.second(x), 0)

    def from_level(number, x):
        x = doubled(net.down[number], x)
        if number == len(net.down) - 1:
            return x
        n, h, w, c = x.shape
        coarse = from_level(number + 1, x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4)))
        up = net.up[len(net.up) - 1 - number]
        return doubled(up.convs, jnp.concatenate([up.up(coarse), x], axis=-1))

    return net.tail(from_level(0, x))


@pytest.mark.parametrize(
    ("name", "by_description"),
    [
        ("srresnet, whole up-sampler", srresnet_by_description),
        ("edsr", edsr_by_description),
        ("dncnn", dncnn_by_description),
        ("unet", unet_by_description),
        ("unet, BatchNorm", unet_by_description),
    ],
)
def test_a_network_computes_what_its_description_says(name, by_description):
    model, x = plain(name), network(name)[1]
    x = x[:, :8, :8]
    restored, _ = run(model, x)
    graphdef, state = nnx.split(model)
    described = jax.jit(lambda state, x: by_description(nnx.merge(graphdef, state), x))
    assert_close(restored, described(state, x))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dncnn", lambda model, x: x),  # it predicts what is to be added
        ("unet", lambda model, x: np.zeros_like(x)),
        ("srresnet", lambda model, x: np.zeros((3, 20, 24, 3))),
        ("edsr", lambda model, x: np.broadcast_to(model.restore.bias[...], (3, 12, 10, 3))),
    ],
)
def test_a_network_whose_last_convolution_gives_nothing(name, expected):
    _, x, _ = network(name)
    silent = nnx.clone(plain(name))
    silent.tail.kernel[...] = jnp.zeros_like(silent.tail.kernel[...])
    silent.tail.bias[...] = jnp.zeros_like(silent.tail.bias[...])
    np.testing.assert_array_equal(run(silent, x)[0], expected(silent, np.asarray(x)))


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("edsr", "dncnn"))) for name in SCALES],
)
def test_a_network_in_bfloat16_computes_about_the_same_with_parameters_in_float32(family):
    _, arguments, _ = RESTORERS[family]
    _, x, _ = network(family)
    half = filled(lambda _: dhp.models.build(family, rngs=RNGS, **arguments, dtype="bfloat16"))
    stored = {v.get_value().dtype for _, v in nnx.to_flat_state(nnx.state(half))}
    assert stored == {jnp.dtype("float32")}
    small = cut(half, keep_all(half))
    assert {array.dtype for array in arrays(small).values()} == {np.dtype("float32")}
    expected = run(plain(family), x)[0]
    restored = run(small, x)[0].astype(np.float32)
    assert np.all(np.isfinite(restored))
    error = np.std(restored - expected) / np.std(expected)
    assert 1e-4 < error < 0.03  # it did compute in bfloat16


# One convolution of each kind, by hand


CONVOLUTIONS = {  # network, the layer, the survivors of its input and output
    "9x9": ("srresnet", lambda m: m.head, lambda m, kept: (kept(m.image), kept(m.body))),
    "3x3": (
        "srresnet",
        lambda m: m.blocks[0].first.conv,
        lambda m, kept: (kept(m.body), kept(m.blocks[0].hidden)),
    ),
    "sub-pixel by 2": (
        "edsr",
        lambda m: m.upsampler.convs[0],
        lambda m, kept: (kept(m.body), np.repeat(kept(m.body), 4)),
    ),
    "second sub-pixel": (
        "srresnet",
        lambda m: m.upsampler.convs[1],
        lambda m, kept: (kept(m.body), np.repeat(kept(m.body), 4)),
    ),
    "sub-pixel that stays whole": (
        "srresnet, whole up-sampler",
        lambda m: m.upsampler.convs[0],
        lambda m, kept: (kept(m.body), np.ones(9 * m.upsampled.size, bool)),
    ),
    "after a skip": (
        "unet",
        lambda m: m.up[0].convs.first,
        lambda m, kept: (
            np.concatenate([kept(m.up[0].upsampled), kept(m.down[1].output)]),
            kept(m.up[0].convs.hidden),
        ),
    ),
    "1x1": (
        "unet",
        lambda m: m.tail,
        lambda m, kept: (kept(m.up[-1].convs.output), kept(m.output)),
    ),
    "transposed": (
        "unet",
        lambda m: m.up[0].up,
        lambda m, kept: (kept(m.down[-1].output), kept(m.up[0].upsampled)),
    ),
}


def convolved(x, kernel):
    """A convolution of odd size that keeps the size of its input, by loops over positions."""
    height, width, _, outputs = kernel.shape
    above, left = height // 2, width // 2
    padded = np.pad(x, ((0, 0), (above, above), (left, left), (0, 0)))
    y = np.zeros((*x.shape[:3], outputs))
    for r, c, o in np.ndindex(*y.shape[1:]):
        patch = padded[:, r : r + height, c : c + width]
        y[:, r, c, o] = np.sum(patch * kernel[..., o], axis=(1, 2, 3))
    return y


def doubled(x, kernel):
    """A transposed 2x2 convolution of stride 2: every pixel becomes a square of four."""
    n, rows, columns, _ = x.shape
    y = np.zeros((n, 2 * rows, 2 * columns, kernel.shape[3]))
    for r, c, i, j in np.ndindex(rows, columns, 2, 2):
        y[:, 2 * r + i, 2 * c + j] = x[:, r, c] @ kernel[1 - i, 1 - j]
    return y


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_pruned_convolution_is_the_whole_one_sliced_by_hand(kind):
    name, find, survivors = CONVOLUTIONS[kind]
    model, _, _ = network(name)
    conv, small = find(model), find(pruned(name))
    kept_in, kept_out = survivors(model, kept_by(name))
    assert 0 < kept_in.sum() + kept_out.sum() < kept_in.size + kept_out.size
    whole = np.asarray(conv.kernel())
    kernel = whole[:, :, kept_in][..., kept_out]
    np.testing.assert_array_equal(small.kernel[...], kernel)
    bias, kept_bias = 0, 0
    if conv.bias is not None:
        bias = np.asarray(conv.bias[...])
        kept_bias = bias[kept_out]
        np.testing.assert_array_equal(small.bias[...], kept_bias)
    by_hand = doubled if kind == "transposed" else convolved
    x = np.asarray(images(2, 4, 5, conv.z_in.size), np.float64)
    y = np.asarray(small(jnp.asarray(x[..., kept_in], jnp.float32)))
    np.testing.assert_allclose(
        y, by_hand(x[..., kept_in], kernel) + kept_bias, rtol=1e-4, atol=1e-4
    )
    at_zero = (by_hand(x * kept_in, whole) + bias)[..., kept_out]
    np.testing.assert_allclose(y, at_zero, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "r"), [("srresnet", 2), ("srresnet, whole up-sampler", 3)])
def test_an_entry_of_the_body_is_one_channel_after_the_pixel_shuffle(name, r):
    model, _, _ = network(name)
    names = {z: path for path, z in dhp.latents(model).items()}
    masks = keep_all(model)
    masks[names[model.body]][2] = False
    small = cut(model, masks)
    left = np.delete(np.arange(model.body.size), 2)
    x = np.array(images(2, 3, 4, model.body.size))
    x[..., 2] = 0
    conv, small_conv = model.upsampler.convs[0], small.upsampler.convs[0]
    whole = shuffled_by_hand(
        convolved(x, np.asarray(conv.kernel())) + np.asarray(conv.bias[...]), r
    )
    y = pixel_shuffle(small_conv(jnp.asarray(x[..., left])), r)
    expected = whole[..., left] if model.upsampled is model.body else whole
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


# The mean colour


@functools.cache
def small_edsr():
    """A pruned EDSR of initial values, among them those of its mean colour."""
    rngs = nnx.Rngs(0)
    model = dhp.models.build("edsr", scale=2, blocks=1, features=4, min_channels=3, rngs=rngs)
    return cut(model, dhp.survivors(model, threshold=1e3))


def assert_shifts_by_the_mean_colour(model):
    x = np.asarray(255 * images(1, 3, 4, 3))
    for shift, sign in ((model.center, -1), (model.restore, 1)):
        expected = x + sign * np.asarray(MEAN, np.float32)
        np.testing.assert_allclose(shift(jnp.asarray(x)), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False])
def test_the_mean_colour_of_an_edsr_is_not_trained(whole):
    model = network("edsr")[0] if whole else small_edsr()
    trained = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    constant = {path[:2] for path, _ in nnx.to_flat_state(nnx.state(model, Constant))}
    assert not trained & {"center", "restore"}
    assert {"head", "blocks", "last", "bias", "upsampler", "tail"} <= trained
    names = ("kernel", "bias")
    assert constant == {(shift, name) for shift in ("center", "restore") for name in names}


def test_the_mean_colour_of_an_edsr_survives_pruning_files_and_new_kernels(tmp_path):
    small = nnx.clone(small_edsr())
    assert_shifts_by_the_mean_colour(small)
    dhp.save(tmp_path / "network", small)
    loaded = dhp.load(tmp_path / "network")
    assert_shifts_by_the_mean_colour(loaded)
    assert isinstance(loaded.center.kernel, Constant)
    reinitialize(small, rngs=nnx.Rngs(1))
    assert_shifts_by_the_mean_colour(small)
    assert np.any(small.head.kernel[...] != loaded.head.kernel[...])


def test_the_mean_colour_is_gray_where_channels_are_not_three():
    model = dhp.models.build("edsr", scale=2, blocks=1, features=2, channels=2, rngs=nnx.Rngs(0))
    for shift, sign in ((model.center, -1), (model.restore, 1)):
        np.testing.assert_allclose(shift.bias[...], [sign * np.mean(MEAN)] * 2, rtol=1e-6)
        np.testing.assert_array_equal(shift.kernel[...], np.eye(2)[None, None])


@small_networks
def test_fresh_kernels_are_as_small_as_those_of_pytorch(name):
    assert plain(name).initial_gain == 1 / 3  # which `reinitialize` reads


@pytest.mark.parametrize(
    ("name", "arguments", "side"),
    [
        ("dncnn", {"depth": 4}, 24),
        ("srresnet", {"scale": 2, "blocks": 1}, 40),
        ("edsr", {"scale": 2, "blocks": 2}, 40),
        ("unet", {"depth": 2}, 40),
    ],
)
def test_a_network_sees_no_farther_than_its_reach(name, arguments, side):
    channels = 3 if "scale" in arguments else 1
    model = filled(
        lambda _: dhp.models.build(
            name, features=4, channels=channels, min_channels=1, rngs=RNGS, **arguments
        )
    )
    model = dhp.prune(model)
    model.eval()
    graphdef, state = nnx.split(model)
    middle = side // 2

    @jax.jit
    def seen(state, x):
        def pixel(x):
            output = nnx.merge(graphdef, state)(x)
            at = output.shape[1] // side * middle
            return output[0, at, at].sum()

        return jnp.abs(jax.grad(pixel)(x)).sum((0, 3))

    rows, columns = np.nonzero(seen(state, images(1, side, side, channels)))
    distance = max(np.abs(rows - middle).max(), np.abs(columns - middle).max())
    assert 0 < distance <= model.reach < side // 2
