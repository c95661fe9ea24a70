"""Families for classification: what they cost, which axes are one, and that pruning is exact."""

import contextlib
import functools
import itertools
import math
from types import SimpleNamespace
from unittest import mock

from flax import nnx
import jax
import jax.numpy as jnp
from networks import arrays, drawn_masks, filled, images, keep_all, run, short
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.models.densenet import NormConv
from dhp_jax.models.mobilenet import InvertedResidual

pytestmark = pytest.mark.usefixtures("fast_compilation")
IMAGENET, CIFAR, TINY = (224, 224, 3), (32, 32, 3), (64, 64, 3)
RESNEXT = {"depth": 50, "groups": 32, "group_width": 4, "num_classes": 1000}

COSTS = [  # family, arguments, input, FLOPs, params, latents
    ("resnet", {"depth": 18, "num_classes": 1000}, IMAGENET, 1_819_040_768, 11_689_512, 13),
    ("resnet", {"depth": 34, "num_classes": 1000}, IMAGENET, 3_671_237_632, 21_797_672, 21),
    ("resnet", {"depth": 50, "num_classes": 1000}, IMAGENET, 4_111_412_224, 25_557_032, 38),
    ("resnet", {"depth": 101, "num_classes": 1000}, IMAGENET, 7_833_869_312, 44_549_160, 72),
    ("resnet", RESNEXT, IMAGENET, 4_259_280_896, 25_028_904, 38),
    ("densenet", {}, CIFAR, 287_709_648, 1_059_298, 40),
    ("vgg", {"depth": 11}, CIFAR, 153_072_640, 9_228_362, 9),
    ("vgg", {"depth": 13}, CIFAR, 228_766_720, 9_413_066, 11),
    ("vgg", {}, CIFAR, 313_754_624, 14_724_042, 14),
    ("vgg", {"depth": 19}, CIFAR, 398_742_528, 20_035_018, 17),
    ("mobilenet_v1", {}, TINY, 47_372_288, 3_411_976, 28),
    ("mobilenet_v2", {}, TINY, 91_499_520, 2_480_072, 43),
]

SMALL = {  # family, arguments, input: of odd widths, and see `short`
    "resnext50": (
        "resnet",
        {"depth": 50, "width": 0.11, "groups": 5, "group_width": 20},
        (33, 32, 3),
    ),
    "densenet": ("densenet", {"depth": 10, "growth": 5}, (10, 11, 3)),
    "vgg": ("vgg", {"depth": 11, "width": 0.11}, (33, 32, 3)),
    "mobilenet_v1": ("mobilenet_v1", {"width": 0.17, "num_classes": 7}, (33, 32, 3)),
    "mobilenet_v2": ("mobilenet_v2", {"width": 0.17, "stem_stride": 1}, (16, 16, 3)),
}
RNGS = SimpleNamespace(params=lambda: jax.random.key(0))  # `nnx.Rngs` takes seconds to trace
small_networks = pytest.mark.parametrize("name", SMALL)


def flops_and_params(found):
    """Of amounts or shares by name."""
    return found["flops"], found["params"]


@functools.cache
def abstract(family, **arguments):
    """A network of shapes alone; tests leave it as it is."""
    return dhp.models.build_abstract(family, **arguments)


@functools.cache
def network(name):
    """A small network with drawn values, its images, and masks; tests leave them as they are."""
    family, arguments, shape = SMALL[name]
    with short():
        model = filled(lambda _: dhp.models.build(family, rngs=RNGS, **arguments))
    return model, images(6, *shape), drawn_masks(model, seed=1)


@functools.cache
def plain(name):
    model, _, _ = network(name)
    return dhp.prune(model, keep_all(model))


@functools.cache
def pruned(name):
    model, _, masks = network(name)
    return dhp.prune(model, masks)


def output(model, shape):
    graphdef, state = nnx.split(model)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda state, x: nnx.merge(graphdef, state, copy=True)(x), state, x)


# What they cost


@pytest.mark.parametrize(("family", "arguments", "shape", "flops", "params", "latents"), COSTS)
def test_networks_cost_exactly_what_is_published(family, arguments, shape, flops, params, latents):
    model = abstract(family, **arguments)
    cost = dhp.measure_cost(model, shape)
    assert (cost.flops, cost.params, len(dhp.latents(model))) == (flops, params, latents)


@pytest.mark.parametrize(
    ("family", "sizes"), [("mobilenet_v1", (64, 2048)), ("mobilenet_v2", (64, 2560))]
)
def test_a_mobilenet_is_widened_from_the_stem_to_the_classifier(family, sizes):
    model = abstract(family, width=2.0)
    assert (model.stem.conv.z_out.size, model.classifier.in_features) == sizes


# Arguments


@pytest.mark.parametrize("family", ["densenet", "vgg", "mobilenet_v1", "mobilenet_v2"])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_classes", 0),
        ("num_classes", 2.5),
        ("channels", -1),
        ("width", 0),
        ("width", "wide"),
        ("width", float("nan")),
        ("min_channels", 0),
    ],
)
def test_an_argument_that_makes_no_network_is_refused(family, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: expected a positive .*, got {value!r}$"):
        dhp.models.build(family, rngs=nnx.Rngs(0), **{argument: value})


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("resnet", {"depth": 19}, r"depth: expected one of .* or \(18, 34\) \(basic .*, got 19$"),
        ("resnet", {"depth": 50, "groups": 0}, "groups: expected a positive integer, got 0$"),
        ("resnet", {"depth": 50, "groups": 32}, "group_width: expected a positive .*, got None$"),
        ("resnet", {"depth": 50, "group_width": 4}, "group_width: expected None with .*, got 4$"),
        (
            "resnet",
            {"depth": 34, "groups": 32, "group_width": 4},
            r"groups: expected 1 at depth 34 \(basic blocks\), got 32$",
        ),
        ("densenet", {"depth": 41}, r"depth: expected 3 n \+ 4, such as 40 or 100, got 41$"),
        ("densenet", {"depth": 4}, r"depth: expected 3 n \+ 4, such as 40 or 100, got 4$"),
        ("densenet", {"depth": 40.0}, r"depth: expected a positive integer, got 40.0$"),
        ("densenet", {"growth": 0}, r"growth: expected a positive integer, got 0$"),
        ("vgg", {"depth": 12}, "depth: expected one of 11, 13, 16, 19, got 12$"),
        ("mobilenet_v1", {"stem_stride": 3}, "stem_stride: expected one of 1, 2, got 3$"),
        ("mobilenet_v2", {"prune_classifier": 1}, "prune_classifier: expected True or .*, got 1$"),
        ("mobilenet_v2", {"classifier_keep": 1.1}, r"classifier_keep: .* in \[0, 1\], got 1.1$"),
        ("mobilenet_v1", {"classifier_keep": "all"}, "classifier_keep: .* share .*, got 'all'$"),
    ],
)
def test_an_argument_that_is_not_of_the_family_is_refused(family, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dhp.models.build(family, rngs=nnx.Rngs(0), **arguments)


@small_networks
def test_any_number_of_classes_channels_and_pixels_is_taken(name):
    family, arguments, _ = SMALL[name]
    with short():
        model = dhp.models.build_abstract(family, **arguments | {"num_classes": 4, "channels": 5})
    for shape in ((2, 1, 1, 5), (1, 37, 20, 5)):
        scores = output(model, shape)
        assert (scores.shape, scores.dtype) == ((shape[0], 4), jnp.float32)
    for shape in ((8, 8, 5), (1, 8, 8, 3)):
        with pytest.raises(ValueError, match=r"^images: expected shape \(batch, .*, 5\), got "):
            output(model, shape)


@small_networks
def test_activations_are_of_the_dtype_and_parameters_stay_float32(name):
    family, arguments, shape = SMALL[name]
    with short():
        model = dhp.models.build_abstract(family, **arguments, dtype="bfloat16")
    assert output(model, (1, *shape)).dtype == jnp.bfloat16
    stored = {v.get_value().dtype for _, v in nnx.to_flat_state(nnx.state(model))}
    assert stored == {jnp.dtype("float32")}


# Which axes are one


@small_networks
def test_axes_that_meet_are_one_latent(name):
    model, x, _ = network(name)
    dhp.check_axes(model, x.shape[1:])


def fixed(model):
    """The latents that are not prunable, but for those of groups."""
    found = dhp.latents(model).items()
    return {z for path, z in found if not z.prunable and not path.endswith(".z_group")}


def test_only_images_and_what_the_classifier_of_a_residual_network_reads_is_not_prunable():
    for depth in (18, 50):
        model = abstract("resnet", depth=depth)
        assert fixed(model) == {model.image, model.stages[3]}
        assert (model.stem.conv.z_out is model.stages[0]) == (depth == 18)
    for family in ("densenet", "vgg", "mobilenet_v1", "mobilenet_v2"):
        model = abstract(family, min_channels=3)
        assert fixed(model) == {model.image}
        prunable = [z.min_channels for z in dhp.latents(model).values() if z.prunable]
        kept = {3, math.ceil(0.4 * model.features.size)} if "mobile" in family else {3}
        assert set(prunable) == kept


@pytest.mark.parametrize(("family", "size"), [("mobilenet_v1", 1024), ("mobilenet_v2", 1280)])
def test_the_classifier_of_a_mobilenet_keeps_its_share_or_all(family, size):
    for share, kept in ((0.45, math.ceil(0.45 * size)), (0, 4), (1, size)):
        features = abstract(family, classifier_keep=share).classifier.z_in
        assert (features.size, features.prunable, features.min_channels) == (size, True, kept)
    model = abstract(family, prune_classifier=False)
    assert fixed(model) == {model.image, model.classifier.z_in}


def test_a_dense_layer_reads_the_concatenation_of_all_before_it_in_its_block():
    model = abstract("densenet", depth=13, growth=5)
    for first, block in zip((model.stem, *model.transitions), model.blocks, strict=True):
        written = [first.conv.z_out if isinstance(first, NormConv) else first.z_out]
        for layer in block:
            assert layer.norm.z is layer.conv.z_in
            assert layer.conv.z_in.entries() == [e for z in written for e in z.entries()]
            written.append(layer.conv.z_out)
    assert model.classifier.z_in is model.norm.z
    assert model.norm.z.entries() == [e for z in written for e in z.entries()]
    assert [layer.conv.z_out.size for layer in model.transitions] == [25, 40]


def test_blocks_of_a_width_in_a_mobilenet_v2_share_a_latent_and_are_added():
    model = abstract("mobilenet_v2")
    blocks = model.layers[:-1]
    written = [block.layers[-1].conv.z_out for block in blocks]
    assert [z.size for z in dict.fromkeys(written)] == [16, 24, 32, 64, 96, 160, 320]
    added = [block.identity for block in blocks]
    assert added == [False] + [a is b for a, b in itertools.pairwise(written)]
    hidden = [block.layers[-1].conv.z_in for block in blocks]
    assert hidden[0] is model.stem.conv.z_out
    assert len(set(hidden)) == len(hidden) == 17
    assert [z.size for z in hidden[1:3]] == [6 * 16, 6 * 24]


def test_a_grouped_convolution_has_an_entry_for_each_group_on_both_sides():
    model = abstract("resnet", **RESNEXT)
    for block, channels in ((model.blocks[0], 4), (model.blocks[15], 32)):
        conv = block.layers[1].conv
        assert conv.feature_group_count == 32
        assert block.layers[0].conv.z_out is conv.z_in is conv.z_out is block.layers[2].conv.z_in
        assert set(conv.z_in.multiplicity().values()) == {channels}
        assert conv.z_in.size == 32 * channels


# What they compute


def test_a_dense_layer_normalises_before_it_convolves():
    z_in, z_out = dhp.Latent(5, rngs=nnx.Rngs(0)), dhp.Latent(3, rngs=nnx.Rngs(1))
    layer = filled(lambda rngs: NormConv(z_in, z_out, 3, dtype=None, rngs=rngs))
    x = images(2, 4, 4, 5)
    np.testing.assert_array_equal(layer(x), layer.conv(nnx.relu(layer.norm(x))))


@pytest.mark.parametrize("stride", [1, 2])
def test_an_inverted_residual_projects_without_relu_and_adds_where_it_can(stride):
    z, hidden = dhp.Latent(5, rngs=nnx.Rngs(0)), dhp.Latent(7, rngs=nnx.Rngs(1))
    block = filled(lambda rngs: InvertedResidual(z, hidden, z, stride, dtype=None, rngs=rngs))
    expand, depthwise, project = block.layers
    assert depthwise.conv.feature_group_count == 7
    x = images(2, 4, 4, 5)
    h = nnx.relu(expand.norm(expand.conv(x)))
    h = nnx.relu(depthwise.norm(depthwise.conv(h)))
    h = project.norm(project.conv(h))
    np.testing.assert_array_equal(block(x), x + h if stride == 1 else h)


@small_networks
@pytest.mark.parametrize("train", [True, False])
def test_keeping_everything_changes_nothing(name, train):
    model, x, _ = network(name)
    scores, statistics = run(model, x, train=train)
    plain_scores, plain_statistics = run(plain(name), x, train=train)
    np.testing.assert_allclose(plain_scores, scores, rtol=1e-3, atol=1e-3)
    assert plain_statistics.keys() == statistics.keys()
    for path, stat in statistics.items():
        np.testing.assert_allclose(plain_statistics[path], stat, rtol=1e-3, atol=1e-3)


def kept_by_norms(model, masks):
    """The channels of every BatchNorm that survive, by its path."""
    by_latent = {z: masks[name] for name, z in dhp.latents(model).items()}
    norms = [(path, m) for path, m in nnx.iter_modules(model) if isinstance(m, dhp.BatchNorm)]
    return {path: norm.z.keep(by_latent) for path, norm in norms}


@small_networks
@pytest.mark.parametrize("train", [True, False])
def test_a_pruned_network_computes_what_the_whole_one_does_with_channels_at_zero(name, train):
    """A channel is gone where BatchNorm makes it zero and nothing that is added brings it back."""
    model, x, masks = network(name)
    whole, kept = nnx.clone(plain(name)), kept_by_norms(model, masks)
    norms = dict(nnx.iter_modules(whole))
    for path, mask in kept.items():
        norms[path].scale[...] = norms[path].scale[...] * mask
        norms[path].bias[...] = norms[path].bias[...] * mask
    scores, statistics = run(whole, x, train=train)
    small_scores, small_statistics = run(pruned(name), x, train=train)
    assert np.std(scores) > 0.1
    np.testing.assert_allclose(small_scores, scores, rtol=1e-3, atol=1e-3)
    for path, stat in statistics.items():
        expected = stat[kept[path[:-1]]]
        np.testing.assert_allclose(small_statistics[path], expected, rtol=1e-3, atol=1e-3)


# One convolution of each kind, by hand


CONVOLUTIONS = {
    "plain": ("vgg", lambda model: model.stages[2][1].conv),
    "strided": ("resnext50", lambda model: model.stem.conv),
    "concatenated": ("densenet", lambda model: model.blocks[1][1].conv),
    "groups": ("resnext50", lambda model: model.blocks[0].layers[1].conv),
    "strided groups": ("resnext50", lambda model: model.blocks[2].layers[1].conv),
    "depthwise": ("mobilenet_v1", lambda model: model.layers[4].conv),
    "strided depthwise": ("mobilenet_v2", lambda model: model.layers[3].layers[1].conv),
}


def convolved(x, kernel, stride, padding, groups):
    """A convolution with loops over positions and output channels."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width, per_group, outputs = kernel.shape
    rows = (x.shape[1] - height) // stride + 1
    columns = (x.shape[2] - width) // stride + 1
    y = np.zeros((len(x), rows, columns, outputs))
    for r, c, o in np.ndindex(rows, columns, outputs):
        first = o // (outputs // groups) * per_group
        top, left = r * stride, c * stride
        patch = x[:, top : top + height, left : left + width, first : first + per_group]
        y[:, r, c, o] = np.sum(patch * kernel[..., o], axis=(1, 2, 3))
    return y


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_pruned_convolution_is_the_whole_one_sliced_by_hand(kind):
    name, find = CONVOLUTIONS[kind]
    model, _, masks = network(name)
    conv, small = find(model), find(pruned(name))
    names = {z: path for path, z in dhp.latents(model).items()}
    kept_in, kept_out = (
        np.array([masks[names[z]][index] for z, index in axis.entries()])
        for axis in (conv.z_in, conv.z_out)
    )
    assert 0 < kept_out.sum() < kept_out.size
    groups, whole = conv.feature_group_count, np.asarray(conv.kernel())
    rows = kept_in if groups == 1 else np.ones(whole.shape[2], bool)  # groups stay whole
    kernel = whole[:, :, rows][..., kept_out]
    np.testing.assert_array_equal(small.kernel[...], kernel)
    assert groups == 1 or small.feature_group_count == kept_in.sum() // whole.shape[2]
    x = np.asarray(images(2, 5, 6, conv.z_in.size))
    y = np.asarray(small(jnp.asarray(x[..., kept_in])))
    geometry = small.strides, small.padding
    by_hand = convolved(x[..., kept_in], kernel, *geometry, small.feature_group_count)
    np.testing.assert_allclose(y, by_hand, rtol=1e-4, atol=1e-4)
    at_zero = convolved(x * kept_in, whole, *geometry, groups)[..., kept_out]
    np.testing.assert_allclose(y, at_zero, rtol=1e-4, atol=1e-4)


# What is left


def counted(model, shape):
    """FLOPs and params from the arrays that are there and the shapes of what layers return."""
    flops = []

    def counting(kind, cost):
        call = kind.__call__

        def counted_call(layer, x):
            y = call(layer, x)
            flops.append(cost(layer, y))
            return y

        return mock.patch.object(kind, "__call__", counted_call)

    with contextlib.ExitStack() as stack:
        for kind, cost in (
            (nnx.Conv, lambda conv, y: conv.kernel[...].size * y.shape[1] * y.shape[2]),
            (nnx.BatchNorm, lambda norm, y: 2 * y.size),
            (nnx.Linear, lambda linear, y: linear.kernel[...].size),
        ):
            stack.enter_context(counting(kind, cost))
        output(model, (1, *shape))
    params = [v.get_value().size for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    return sum(flops), sum(params)


@small_networks
def test_what_is_counted_is_what_is_there(name):
    model, x, masks = network(name)
    shape = x.shape[1:]
    whole, small = dhp.measure_cost(model, shape), dhp.measure_cost(pruned(name), shape)
    counts = {latent: int(mask.sum()) for latent, mask in masks.items()}
    assert (
        (small.flops, small.params)
        == counted(pruned(name), shape)
        == flops_and_params(whole.amounts(counts))
    )
    assert small.flops < 0.6 * whole.flops


@small_networks
def test_no_latent_and_no_hypernetwork_is_left(name):
    small = pruned(name)
    assert dhp.latents(small) == {}
    for path, node in nnx.iter_graph(small):
        assert not isinstance(node, dhp.Axis | dhp.HyperConv | dhp.BatchNorm | dhp.Linear), path
        if isinstance(node, nnx.Variable):
            assert type(node) in (nnx.Param, nnx.BatchStat), path
    last = {name.split(".")[-1] for name in arrays(small)}
    assert last == {"kernel", "bias", "scale", "mean", "var"}


@small_networks
def test_a_pruned_network_is_saved_and_loaded_bit_for_bit(name, tmp_path):
    dhp.save(tmp_path / "network", pruned(name))
    with short():
        loaded, expected = arrays(dhp.load(tmp_path / "network")), arrays(pruned(name))
    assert loaded.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(loaded[path], array)
