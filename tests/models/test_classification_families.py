"""Families for classification: their axes, their outputs, and single layers by hand."""

import functools
import itertools
import math

from families import CLASSIFIERS, abstract, network, output, pruned
from flax import nnx
import jax.numpy as jnp
from networks import filled, images, run, short
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.provenance import architecture_of
from dhp_jax.models.densenet import NormConv
from dhp_jax.models.mobilenet import InvertedResidual

pytestmark = pytest.mark.usefixtures("fast_compilation")
RESNEXT = {"depth": 50, "groups": 32, "group_width": 4, "num_classes": 1000}
small_networks = pytest.mark.parametrize("name", CLASSIFIERS)


# What they cost


@pytest.mark.parametrize(
    ("family", "sizes"), [("mobilenet_v1", (64, 2048)), ("mobilenet_v2", (64, 2560))]
)
def test_a_mobilenet_is_widened_from_the_stem_to_the_classifier(family, sizes):
    model = abstract(family, width=2.0)
    assert (model.stem.conv.z_out.size, model.classifier.in_features) == sizes


# Arguments


@small_networks
def test_any_number_of_classes_channels_and_pixels_is_taken(name):
    family, arguments, _ = CLASSIFIERS[name]
    with short():
        model = dhp.models.build_abstract(family, **arguments | {"num_classes": 4, "channels": 5})
    for shape in ((2, 1, 1, 5), (1, 37, 20, 5)):
        scores = output(model, shape)
        assert (scores.shape, scores.dtype) == ((shape[0], 4), jnp.float32)
    for shape in ((8, 8, 5), (1, 8, 8, 3)):
        with pytest.raises(ValueError, match=r"^images: expected shape \(batch, .*, 5\), got "):
            output(model, shape)


@pytest.mark.parametrize(
    "family", [pytest.param("mobilenet_v1", marks=pytest.mark.slow), "mobilenet_v2"]
)
def test_a_mobilenet_has_dropout_before_its_classifier_in_training_alone(family):
    with short():
        model = filled(lambda rngs: dhp.models.build(family, width=0.05, dropout=0.2, rngs=rngs))
        small = dhp.prune(model)
    x = images(2, 16, 16, 3)
    for each in (model, small):
        assert each.dropout.rate == 0.2
        each.train()
        with pytest.raises(ValueError, match="rngs"):
            output(each, x.shape)
        seen = []
        each.dropout = nnx.static(lambda y, seen=seen: seen.append(y) or y * 0)
        assert (run(each, x, train=True)[0] == each.classifier.bias[...]).all()
        assert seen[0].shape == (2, each.classifier.in_features)


def test_a_dropout_of_all_is_refused():
    with pytest.raises(ValueError, match=r"^dropout: expected a share below 1, got 1.0"):
        abstract("mobilenet_v1", dropout=1.0)


# Which axes are one


def fixed(model):
    """The latents that are not prunable, but for those of groups."""
    found = dhp.latents(model).items()
    return {z for path, z in found if not z.prunable and not path.endswith(".z_group")}


def test_only_images_and_what_the_classifier_of_a_residual_network_reads_is_not_prunable():
    with short():
        build = functools.partial(dhp.models.build_abstract, min_channels=3)
        residual = {depth: build("resnet", depth=depth) for depth in (18, 50)}
        others = [build(name) for name in ("densenet", "vgg", "mobilenet_v1", "mobilenet_v2")]
    for depth, model in residual.items():
        assert fixed(model) == {model.image, model.stages[3]}
        assert (model.stem.conv.z_out is model.stages[0]) == (depth == 18)
    for model in others:
        assert fixed(model) == {model.image}
        prunable = [z.min_channels for z in dhp.latents(model).values() if z.prunable]
        kept = {3}
        if "mobile" in architecture_of(model).family:
            kept.add(math.ceil(0.4 * model.features.size))
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
