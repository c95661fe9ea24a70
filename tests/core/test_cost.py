"""FLOPs and params: the published counts, what is there, and what is predicted inside jit."""

import functools
import inspect
import re

from awkward import CASES
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax.experimental import pallas, sparse
import jax.numpy as jnp
from networks import (
    MIXED_INPUT,
    MIXED_LATENTS,
    Mixed,
    Net,
    arrays,
    drawn_masks,
    filled,
    thin_resnet,
)
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.activations import PReLU, ReLU
from dhp_jax.core.layers import ChannelBias
from dhp_jax.core.surgery import prune as cut
from dhp_jax.core.survivors import survivor_counts
from dhp_jax.tracing.layer_terms import layer_terms

RESNETS = {  # FLOPs, params, latents, as published for 32x32 images and 10 classes
    20: (41_214_592, 272_474, 13),
    56: (126_837_376, 855_770, 31),
    110: (171_895_296, 1_147_738, 77),
    164: (254_175_744, 1_704_154, 113),
}


def flops_and_params(found):
    """Of amounts or shares by name."""
    return found["flops"], found["params"]


def abstract_resnet(depth, **arguments):
    return dhp.models.build_abstract("resnet", depth=depth, **arguments)


def cifar_resnet_cost(depth, classes=10):
    """FLOPs and params of a CIFAR ResNet, from its description alone."""
    bottleneck = depth > 56
    blocks, expansion = (depth - 2) // (9 if bottleneck else 6), 4 if bottleneck else 1
    flops = params = 0

    def conv_norm(kernel, size, inputs, outputs):
        nonlocal flops, params
        flops += kernel**2 * size**2 * inputs * outputs + 2 * size**2 * outputs
        params += kernel**2 * inputs * outputs + 2 * outputs

    conv_norm(3, 32, 3, 16)
    inputs = 16
    for size, width in ((32, 16), (16, 32), (8, 64)):
        for block in range(blocks):
            before = 2 * size if block == 0 and size < 32 else size
            if bottleneck:
                conv_norm(1, before, inputs, width)
                conv_norm(3, size, width, width)
                conv_norm(1, size, width, 4 * width)
            else:
                conv_norm(3, size, inputs, width)
                conv_norm(3, size, width, width)
            if inputs != expansion * width:
                conv_norm(1, size, inputs, expansion * width)
            inputs = expansion * width
    return flops + inputs * classes, params + inputs * classes + classes


def test_a_cost_is_printed_in_one_line():
    printed = repr(dhp.measure_cost(abstract_resnet(20), (32, 32, 3)))
    assert printed.startswith("Cost(flops=41_214_592, params=272_474, activations=")
    assert len(printed) < 100


@pytest.mark.parametrize(
    "depth", [pytest.param(d, marks=[pytest.mark.slow] * (d in (110, 164))) for d in RESNETS]
)
def test_resnets_cost_exactly_what_is_published(depth):
    model = abstract_resnet(depth)
    cost = dhp.measure_cost(model, (32, 32, 3))
    assert (cost.flops, cost.params, len(dhp.latents(model))) == RESNETS[depth]
    assert cifar_resnet_cost(depth) == RESNETS[depth][:2]


@pytest.mark.parametrize("depth", [32, pytest.param(44, marks=pytest.mark.slow)])
def test_resnets_without_published_counts_cost_what_their_description_says(depth):
    cost = dhp.measure_cost(abstract_resnet(depth, num_classes=100), (32, 32, 3))
    assert (cost.flops, cost.params) == cifar_resnet_cost(depth, 100)


# The network `Mixed`, by hand


def mixed_cost(a, b, c):
    """FLOPs and params of `Mixed` on 4x4 images; `c` is computed on 2x2 positions."""
    flops = (
        (9 * 16 * 3 * a + 2 * 16 * a)
        + 16 * 3 * b
        + (9 * 4 * (a + b) * c + 2 * 4 * c)
        + 9 * 4 * c * c
        + 4 * c * 5
    )
    params = (
        (9 * 3 * a + 2 * a)
        + (3 * b + b)
        + (9 * (a + b) * c + c + 2 * c)
        + (9 * c * c + c)
        + (4 * c * 5 + 5)
    )
    return flops, params


@pytest.fixture(scope="module")
def mixed():
    return dhp.measure_cost(filled(Mixed), MIXED_INPUT)


def mixed_counts(a, b, c, image=3):
    return {MIXED_LATENTS[n]: s for n, s in zip("abc", (a, b, c), strict=True)} | {
        MIXED_LATENTS["image"]: image
    }


def test_the_cost_of_a_network_is_the_sum_over_its_layers(mixed):
    assert (mixed.flops, mixed.params) == mixed_cost(7, 5, 6)
    assert (type(mixed.flops), type(mixed.params)) == (int, int)
    by_path = {layer.path: (layer.kind, layer.flops, layer.params) for layer in mixed.layers}
    assert by_path == {
        "left": ("HyperConv", 9 * 16 * 3 * 7, 9 * 3 * 7),
        "left_norm": ("BatchNorm", 2 * 16 * 7, 2 * 7),
        "right": ("HyperConv", 16 * 3 * 5, 3 * 5 + 5),
        "join": ("HyperConv", 9 * 4 * 12 * 6, 9 * 12 * 6 + 6),
        "join_norm": ("BatchNorm", 2 * 4 * 6, 2 * 6),
        "refine": ("HyperConv", 9 * 4 * 6 * 6, 9 * 6 * 6 + 6),
        "classifier": ("Linear", 24 * 5, 24 * 5 + 5),
    }
    assert [layer.path for layer in mixed.layers] == list(by_path)  # in order of execution
    assert mixed.sizes == mixed_counts(7, 5, 6)


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 6))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_the_cost_of_survivors_is_that_of_the_smaller_network(mixed, a, b, c):
    assert flops_and_params(mixed.amounts(mixed_counts(a, b, c))) == mixed_cost(a, b, c)
    flops, params = flops_and_params(mixed.shares(mixed_counts(a, b, c)))
    whole = mixed_cost(7, 5, 6)
    assert (flops * whole[0], params * whole[1]) == pytest.approx(mixed_cost(a, b, c))


def test_costs_inside_jit_are_those_outside(mixed):
    counts = mixed_counts(4, 2, 5)
    names = list(counts)

    @jax.jit
    def inside(values):
        given = dict(zip(names, values, strict=True))
        return flops_and_params(mixed.amounts(given)), flops_and_params(mixed.shares(given))

    (flops, params), ratio = inside(jnp.array([counts[name] for name in names]))
    assert (int(flops), int(params)) == mixed_cost(4, 2, 5)
    assert flops.dtype == params.dtype == np.int64
    np.testing.assert_allclose(ratio, flops_and_params(mixed.shares(counts)), rtol=1e-7)
    assert {share.dtype for share in ratio} == {np.dtype("float32")}


class Wide(nnx.Module):
    """Two convolutions, of large images."""

    def __init__(self, rngs):
        image, a, b = (dhp.Latent(size, rngs=rngs) for size in (3, 61, 67))
        self.first = dhp.HyperConv(image, a, (3, 3), rngs=rngs)
        self.second = dhp.HyperConv(a, b, (3, 3), rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_costs_are_exact_beyond_31_bits_inside_jit_too():
    cost = dhp.measure_cost(filled(Wide), (1001, 1003, 3))
    assert cost.flops == 9 * 1001 * 1003 * (3 * 61 + 61 * 67) > 2**35
    counts = {"first.z_in": 3, "first.z_out": 59, "second.z_out": 53}
    exact = 9 * 1001 * 1003 * (3 * 59 + 59 * 53)
    assert cost.amounts(counts)["flops"] == exact
    flops, params = flops_and_params(
        jax.jit(cost.amounts)({name: jnp.asarray(n) for name, n in counts.items()})
    )
    assert int(flops) == exact
    assert int(params) == 9 * (3 * 59 + 59 * 53) + 59 + 53
    ratio = jax.jit(lambda counts: cost.shares(counts)["flops"])(counts)
    np.testing.assert_allclose(ratio, exact / cost.flops, rtol=1e-7)


def test_numpy_counts_are_counts(mixed):
    counts = {name: np.int64(count) for name, count in mixed_counts(4, 2, 5).items()}
    assert tuple(map(int, flops_and_params(mixed.amounts(counts)))) == mixed_cost(4, 2, 5)


@pytest.mark.parametrize(
    "count", [4.5, jnp.ones(7, bool), True, "4", None, 8, -1, np.int64(8), jnp.array([3, 8])]
)
def test_counts_that_are_no_whole_numbers_or_out_of_range_are_refused(mixed, count):
    wrong = {**mixed_counts(4, 2, 5), MIXED_LATENTS["a"]: count}
    name = re.escape(f"counts['{MIXED_LATENTS['a']}']")
    with pytest.raises(ValueError, match=f"^{name}: expected whole numbers from 0 to 7, got .*$"):
        mixed.shares(wrong)


def test_counts_within_jit_are_of_whole_numbers_too(mixed):
    with pytest.raises(ValueError, match=r"^counts\['left.z_out'\]: expected whole numbers from 0"):
        jax.jit(mixed.amounts)({**mixed_counts(4, 2, 5), MIXED_LATENTS["a"]: 4.5})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda counts: counts.pop("left.z_out"), "none for 'left.z_out'"),
        (lambda counts: counts.update(stem=3), "one for 'stem'"),
        (lambda counts: counts.update({3: 3}), "one for 3"),
    ],
)
def test_counts_of_other_latents_are_refused(mixed, change, told):
    counts = mixed_counts(4, 2, 5)
    change(counts)
    lead = r"^counts: expected one for each of \[.*\], got "
    for count in (mixed.amounts, mixed.shares):
        with pytest.raises(ValueError, match=f"{lead}{told}$"):
            count(counts)
    with pytest.raises(ValueError, match=rf"{lead}\[4, 2\]$"):
        mixed.amounts([4, 2])


# What is counted is what is there


def counted_resnet_flops(small, size):
    """FLOPs by the arrays of a pruned ResNet and the sizes of its feature maps."""
    flops, in_a_stage = 0, len(small.blocks) // 3

    def conv_norm(layer, size):
        nonlocal flops
        flops += layer.conv.kernel.size * size**2 + 2 * layer.norm.scale.size * size**2

    conv_norm(small.stem, size)
    for number, block in enumerate(small.blocks):
        block_size = size >> number // in_a_stage
        for layer in [*block.layers, block.projection]:
            if layer is not None:
                conv_norm(layer, block_size)
    return flops + small.classifier.kernel.size


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_a_pruned_resnet_costs_what_its_arrays_say_and_what_was_predicted(seed):
    model = thin_resnet()
    masks = drawn_masks(model, seed)
    small = cut(model, masks)
    found = dhp.measure_cost(small, (16, 16, 3))
    params = sum(p.get_value().size for _, p in nnx.to_flat_state(nnx.state(small, nnx.Param)))
    assert (found.flops, found.params) == (counted_resnet_flops(small, 16), params)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    assert flops_and_params(dhp.measure_cost(model, (16, 16, 3)).amounts(counts)) == (
        found.flops,
        found.params,
    )


def test_the_prediction_inside_jit_is_the_cost_of_the_pruned_network():
    model = thin_resnet(min_channels=2)
    cost = dhp.measure_cost(model, (32, 32, 3))
    graphdef, state = nnx.split(model)

    @jax.jit
    def predicted(state, threshold):
        left = survivor_counts(nnx.merge(graphdef, state, copy=True), threshold)
        return flops_and_params(cost.amounts(left))

    for threshold in (0.0, 0.2, 0.5, 10.0):
        small = cut(model, dhp.survivors(model, threshold))
        found = dhp.measure_cost(small, (32, 32, 3))
        assert tuple(map(int, predicted(state, threshold))) == (found.flops, found.params)
        params = sum(p.get_value().size for _, p in nnx.to_flat_state(nnx.state(small, nnx.Param)))
        assert (found.flops, found.params) == (counted_resnet_flops(small, 32), params)


def test_a_pruned_network_of_ones_own_costs_what_its_arrays_say():
    model = filled(Mixed)
    masks = drawn_masks(model, 1)
    widths = [int(masks[MIXED_LATENTS[name]].sum()) for name in "abc"]
    found = dhp.measure_cost(cut(model, masks), MIXED_INPUT)
    assert (found.flops, found.params) == mixed_cost(*widths)
    assert found.sizes == {}
    assert flops_and_params(found.amounts({})) == mixed_cost(*widths)


# Activations


def mixed_activations(a, b, c):
    """Bytes of what the layers of `Mixed` that have FLOPs return for a 4x4 image."""
    return 4 * (16 * (a + a + b) + 4 * (c + c + c) + 5)


def test_activations_are_the_bytes_of_all_outputs_of_layers_with_flops(mixed):
    assert mixed.activations == mixed_activations(7, 5, 6)
    assert mixed.amounts(mixed_counts(3, 2, 4))["activations"] == mixed_activations(3, 2, 4)
    share = mixed_activations(3, 2, 4) / mixed_activations(7, 5, 6)
    assert mixed.shares(mixed_counts(3, 2, 4))["activations"] == share


def test_activations_are_predicted_in_jit_and_are_those_of_the_pruned_network():
    model = thin_resnet()
    cost, masks = dhp.measure_cost(model, (16, 16, 3)), drawn_masks(model, 5)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    found = dhp.measure_cost(cut(model, masks), (16, 16, 3))
    amounts, shares = jax.jit(lambda counts: (cost.amounts(counts), cost.shares(counts)))(counts)
    assert int(amounts["activations"]) == found.activations < cost.activations
    for name in ("flops", "params", "activations"):
        left = getattr(found, name) / getattr(cost, name)
        np.testing.assert_allclose(shares[name], left, rtol=1e-7)


def test_activations_take_half_the_bytes_in_bfloat16():
    def of(dtype):
        build = dhp.models.build_abstract
        model = build("resnet", depth=20, width=0.25, num_classes=10, dtype=dtype)
        return dhp.measure_cost(model, (16, 16, 3)).activations

    assert of("bfloat16") == of("float32") / 2


def test_of_nothing_everything_is_left():
    cost = dhp.measure_cost(Net(lambda net, x: x), (4, 4, 6))
    assert cost.shares({}) == {"flops": 1.0, "params": 1.0, "activations": 1.0}


# Ordinary layers, and more than one call


RNGS = nnx.Rngs(0)


@pytest.mark.parametrize(
    ("make", "flops", "params"),
    [
        (
            lambda rngs: nnx.Conv(3, 8, (3, 5), padding="VALID", rngs=rngs),
            15 * 6 * 4 * 24,
            15 * 24 + 8,
        ),
        (lambda rngs: nnx.Conv(3, 8, (1, 1), 2, use_bias=False, rngs=rngs), 4 * 4 * 24, 24),
        (
            lambda rngs: nnx.Conv(3, 9, (3, 3), feature_group_count=3, rngs=rngs),
            9 * 64 * 9,
            9 * 9 + 9,
        ),
        (
            lambda rngs: nnx.ConvTranspose(3, 8, (2, 2), (2, 2), rngs=rngs),
            4 * 16 * 16 * 24,
            4 * 24 + 8,
        ),
        (
            lambda rngs: nnx.ConvTranspose(3, 8, (3, 2), use_bias=False, rngs=rngs),
            6 * 64 * 24,
            6 * 24,
        ),
        (lambda rngs: ChannelBias(3, rngs=rngs), 0, 3),
        (lambda rngs: nnx.PReLU(), 64 * 3, 1),
        (lambda rngs: ReLU(), 64 * 3, 0),
        (lambda rngs: nnx.Linear(3, 7, rngs=rngs), 64 * 21, 21 + 7),
        (lambda rngs: nnx.Linear(3, 7, use_bias=False, rngs=rngs), 64 * 21, 21),
        (lambda rngs: nnx.BatchNorm(3, rngs=rngs), 2 * 64 * 3, 6),
        (lambda rngs: nnx.BatchNorm(3, use_scale=False, rngs=rngs), 2 * 64 * 3, 3),
        (lambda rngs: nnx.Dropout(0.5), 0, 0),
    ],
)
def test_ordinary_layers_are_counted(make, flops, params):
    net = Net(lambda net, x: net.layer(x), layer=filled(make))
    cost = dhp.measure_cost(net, (8, 8, 3))
    assert (cost.flops, cost.params) == (flops, params)
    params_there = nnx.to_flat_state(nnx.state(net, nnx.Param))
    assert cost.params == sum(p.get_value().size for _, p in params_there)


def one_axis(make):
    """A model that is one layer on a latent of 6 channels."""
    return filled(lambda rngs: make(dhp.Latent(6, rngs=rngs), rngs))


def shrinking(z, rngs):
    """A transposed convolution from 6 channels to 4."""
    return dhp.HyperConvTranspose(z, dhp.Latent(4, rngs=rngs), (2, 2), 2, rngs=rngs)


@pytest.mark.parametrize(
    ("make", "channels", "whole", "left", "counts"),
    [
        (
            shrinking,
            6,
            (4 * 64 * 6 * 4, 4 * 6 * 4 + 4),
            (4 * 64 * 5 * 3, 4 * 5 * 3 + 3),
            {"z_in": 5, "z_out": 3},
        ),
        (
            lambda z, rngs: dhp.HyperConv(z, z, (3, 3), feature_group_count=6, rngs=rngs),
            6,
            (9 * 16 * 6, 9 * 6 + 6),
            (9 * 16 * 2, 9 * 2 + 2),
            {"z_in": 2, "z_group": 1},
        ),
        (
            lambda z, rngs: dhp.HyperConv(
                *[dhp.repeat(z, 3)] * 2, (3, 3), feature_group_count=6, use_bias=False, rngs=rngs
            ),
            18,
            (9 * 16 * 3 * 18, 9 * 3 * 18),
            (9 * 16 * 3 * 12, 9 * 3 * 12),
            {"z_in.base": 4, "z_group": 3},
        ),
        (lambda z, rngs: dhp.Bias(z, rngs=rngs), 6, (0, 6), (0, 5), {"z": 5}),
        (
            lambda z, rngs: dhp.Bias(dhp.concat(z, z), rngs=rngs),
            12,
            (0, 12),
            (0, 2),
            {"z.parts.0": 1},
        ),
    ],
)
def test_transposed_and_grouped_convolutions_and_biases_on_latents(
    make, channels, whole, left, counts
):
    model = one_axis(make)
    cost = dhp.measure_cost(model, (4, 4, channels))
    assert (cost.flops, cost.params) == whole
    assert flops_and_params(cost.amounts(counts)) == left
    masks = {name: np.arange(size) < counts[name] for name, size in cost.sizes.items()}
    small = cut(model, masks)
    inputs = getattr(small, "in_features", None) or small.num_features
    found = dhp.measure_cost(small, (4, 4, inputs))
    assert (found.flops, found.params) == left


def test_arrays_of_layers_that_have_no_flops_are_params():
    net = Net(
        lambda net, x: net.head(net.norm(x)),
        norm=nnx.LayerNorm(3, rngs=RNGS),
        idle=nnx.GroupNorm(3, num_groups=3, rngs=RNGS),
        head=nnx.Linear(3, 2, rngs=RNGS),
    )
    cost = dhp.measure_cost(net, (4, 4, 3))
    assert (cost.flops, cost.params) == (16 * 6, 8 + 6)


class Scale(nnx.Module):
    def __init__(self, size):
        self.vector = nnx.Param(jnp.ones(size))

    def __call__(self, x):
        return x * self.vector[...]


def test_a_parameter_is_counted_whatever_its_name():
    z = dhp.Latent(6, rngs=RNGS)
    net = Net(
        lambda net, x: net.scale(net.head(x)), scale=Scale(4), head=dhp.Linear(z, 4, rngs=RNGS)
    )
    cost = dhp.measure_cost(net, (6,))
    assert cost.params == dhp.measure_cost(dhp.prune(net), (6,)).params == 6 * 4 + 4 + 4
    (name,) = dhp.latents(net)
    assert cost.amounts({name: 4})["params"] == 4 * 4 + 4 + 4


def test_nothing_is_warned_of_where_all_layers_are_known(caplog):
    for model in (filled(Mixed), dhp.prune(filled(Mixed)), nnx.Dropout(0.5)):
        dhp.measure_cost(model, MIXED_INPUT)
    assert caplog.records == []


def subclasses(kind):
    """All classes below a class."""
    return {below for each in kind.__subclasses__() for below in {each} | subclasses(each)}


def test_measuring_again_makes_no_classes():
    models = [filled(Mixed), dhp.prune(filled(Mixed))]
    for model in models:
        dhp.measure_cost(model, MIXED_INPUT)
    before = subclasses(nnx.Module)
    for model in models * 2:
        dhp.measure_cost(model, MIXED_INPUT)
    assert subclasses(nnx.Module) == before


def test_a_layer_alone_is_a_model():
    assert dhp.measure_cost(nnx.Linear(3, 7, rngs=RNGS), (3,)).flops == 21


def test_a_layer_that_is_called_again_costs_flops_again_but_no_params():
    def make(rngs):
        z = dhp.Latent(6, rngs=rngs)
        conv = dhp.HyperConv(z, z, (3, 3), rngs=rngs)
        return Net(lambda net, x: net.conv(net.also(net.conv(x))), conv=conv, also=conv)

    cost = dhp.measure_cost(filled(make), (5, 5, 6))
    assert (cost.flops, cost.params) == (3 * 9 * 25 * 36, 9 * 36 + 6)
    assert flops_and_params(cost.amounts({"also.z_in": 2})) == (3 * 9 * 25 * 4, 9 * 4 + 2)


def test_a_layer_that_is_not_called_costs_nothing():
    net = Net(
        lambda net, x: net.used(x),
        used=nnx.Linear(3, 2, rngs=RNGS),
        idle=nnx.Linear(3, 9, rngs=RNGS),
    )
    cost = dhp.measure_cost(net, (3,))
    assert (cost.flops, cost.params) == (6, 8)


class TwoHeads(nnx.Module):
    """Two outputs, one of them behind a hidden layer; the layers are made by a function."""

    def __init__(self, layer):
        self.trunk, self.first = layer(4, 8), layer(8, 3)
        self.hidden, self.second = layer(8, 6), layer(6, 5)

    def __call__(self, x):
        x = nnx.relu(self.trunk(x))
        apart = jax.jit(lambda x: self.second(nnx.relu(self.hidden(x))) * np.arange(5.0))
        return self.first(x), apart(x)


@pytest.mark.parametrize("declared", [False, True])
def test_what_the_call_leaves_out_has_no_flops(declared):
    rngs = nnx.Rngs(0)

    def layer(before, after):
        if declared:
            return dhp.Linear(dhp.Latent(before, rngs=rngs), after, rngs=rngs)
        return nnx.Linear(before, after, rngs=rngs)

    model, trunk, first, second = TwoHeads(layer), 4 * 8, 8 * 3, 8 * 6 + 6 * 5
    assert dhp.measure_cost(model, (4,)).flops == trunk + first + second
    cost = dhp.measure_cost(model, (4,), call=lambda model, x: model(x)[0])
    assert cost.flops == trunk + first
    cost = dhp.measure_cost(model, (4,), call=lambda model, x: model(x)[1])
    assert cost.flops == trunk + second


def test_of_branches_the_one_of_most_flops_counts_and_contractions_in_groups_as_others_do():
    def forward(p, x):
        def deep(h):  # few numbers, for all 32 rows
            return h @ p["b"] @ p["c"]

        def wide(h):
            return h.mean(0) @ p["d"] @ p["e"] + h

        h = jax.lax.cond(x.sum() > 0, deep, wide, x @ p["a"])
        return jax.lax.ragged_dot(h, p["experts"], jnp.array([12, 20]))

    shapes = {"a": (3, 6), "b": (6, 8), "c": (8, 6), "d": (6, 100), "e": (100, 6)}
    params = {name: jnp.ones(shape) for name, shape in (shapes | {"experts": (2, 6, 5)}).items()}
    model, x = dhp.FromFunction(forward, params), jax.ShapeDtypeStruct((32, 3), jnp.float32)
    assert dhp.measure_cost(model, x).flops == 32 * (3 * 6 + 6 * 8 + 8 * 6 + 6 * 5)
    cost = dhp.measure_cost(dhp.with_latents(model, x, min_channels=2), x)
    few = {name: 2 if size == 8 else size for name, size in cost.sizes.items()}
    assert cost.amounts(few)["flops"] == 32 * (3 * 6 + 6 * 5) + 2 * 6 * 100  # the wide one


@pytest.mark.parametrize("name", ["KernelOfEach", "RowsOfExperts"])
def test_what_is_left_of_kernels_of_an_example_or_group_counts_as_it_is_run(name):
    case = CASES[name]
    (x,) = case.inputs()
    net = dhp.with_latents(case.build(nnx.Rngs(0)), x, min_channels=1)
    keep = {name: np.arange(z.size) % 3 > 0 for name, z in dhp.latents(net).items()}
    cost = dhp.measure_cost(net, x).amounts({name: int(m.sum()) for name, m in keep.items()})
    assert cost == dhp.measure_cost(dhp.prune(net, keep), x).amounts({})


@jax.custom_batching.custom_vmap
def own_batching(x, w, u):
    return nnx.relu(x @ w) @ u


@own_batching.def_vmap
def _(size, batched, x, w, u):
    return own_batching(x, w, u), True


@pytest.mark.parametrize(
    "hidden", [jax.lax.composite(lambda x, w, u: nnx.relu(x @ w) @ u, "own.mlp"), own_batching]
)
def test_what_a_function_in_the_program_contracts_counts_as_it_does_elsewhere(hidden):
    shapes = {"a": (4, 8), "b": (8, 4), "w": (4, 64), "u": (64, 4)}
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=n), jnp.float32) for name, n in shapes.items()}

    def forward(p, x):
        return nnx.relu(x @ p["a"]) @ p["b"] + hidden(x, p["w"], p["u"])

    model = dhp.FromFunction(forward, params)
    assert dhp.measure_cost(model, (4,)).flops == 4 * 8 + 8 * 4 + 4 * 64 + 64 * 4
    small = dhp.prune_to(dhp.with_latents(model, (4,), min_channels=1), (4,), flops=0.5)
    flops = sum(kernel.size for kernel in small.parameters().values())
    assert flops == dhp.measure_cost(small, (4,)).flops
    assert 0.48 * 576 < flops <= 0.5 * 576


def in_shards(x, w):
    mesh, whole = jax.make_mesh((1,), ("d",)), jax.sharding.PartitionSpec()
    return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(whole, whole), out_specs=whole)(x, w)


def in_a_kernel(x, w):
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    shape = jax.ShapeDtypeStruct((len(x), w.shape[1]), x.dtype)
    return pallas.pallas_call(kernel, out_shape=shape, interpret=True)(x, w)


def until_it_is_large(x, w):
    return jax.lax.while_loop(lambda h: (h @ w).sum() < 1, lambda h: h * 2, x) @ w


def steps_of_a_solver(x, w):
    square = w @ w.T
    return jax.lax.custom_linear_solve(lambda v: v @ square, x, lambda of, b: of(b)) @ w


def sparse_product(x, w):
    return x @ sparse.BCOO.fromdense(w, nse=4)


@pytest.mark.parametrize(
    ("product", "told"),
    [
        (in_shards, "shard_map at core/test_cost.py:{} runs a contraction or convolution in a"),
        (in_a_kernel, "pallas_call at core/test_cost.py:{} runs a contraction or convolution in a"),
        (until_it_is_large, "the loop at core/test_cost.py:{} runs as often as its data wants"),
        (steps_of_a_solver, "custom_linear_solve at core/test_cost.py:{} runs a contraction or"),
        (sparse_product, "bcoo_dot_general at core/test_cost.py:{} is a product of sparse arrays"),
    ],
)
def test_products_of_which_nothing_tells_how_often_they_run_are_refused(product, told):
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 3))}
    model = dhp.FromFunction(lambda p, x: product(x @ p["a"], p["b"]), params)
    with pytest.raises(ValueError, match="so what it costs cannot be counted") as error:
        dhp.measure_cost(model, (4,))
    lines, first = inspect.getsourcelines(product)
    line = first + next(n for n in range(len(lines) - 1, -1, -1) if "return" in lines[n])
    assert str(error.value).startswith("model: " + told.format(line))


def test_a_solve_counts_nothing_of_the_product_that_it_inverts():
    params = {"a": jnp.ones((4, 8)), "b": jnp.eye(8)}
    model = dhp.FromFunction(lambda p, x: jnp.linalg.solve(p["b"], (x @ p["a"]).T), params)
    assert dhp.measure_cost(model, (4,)).flops == 4 * 8


def test_a_layer_of_ones_own_can_be_counted():
    class Scale(nnx.Module):
        def __init__(self, z):
            self.z, self.scale = z, nnx.Param(jnp.ones(z.size))

        def __call__(self, x):
            return x * self.scale

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.scale = Scale(dhp.Latent(6, rngs=rngs))

        def __call__(self, x):
            return self.scale(x)

    assert dhp.measure_cost(filled(Net), (4, 4, 6)).flops == 0

    @layer_terms.register(Scale)  # a class of this test only
    def _(layer, output_shape):
        return layer.z, layer.z, (0, int(np.prod(output_shape[:-1]))), (0, 1)

    cost = dhp.measure_cost(filled(Net), (4, 4, 6))
    assert (cost.flops, cost.params) == (16 * 6, 6)
    assert flops_and_params(cost.amounts({"scale.z": 2})) == (32, 2)


@pytest.mark.parametrize("train", [True, False])
def test_measuring_leaves_the_model_as_it_was(train):
    model = filled(Mixed)
    model.train() if train else model.eval()
    before, classes = arrays(model), [type(module) for _, module in nnx.iter_modules(model)]
    dhp.measure_cost(model, MIXED_INPUT)
    assert model.join_norm.use_running_average is not train
    assert [type(module) for _, module in nnx.iter_modules(model)] == classes
    after = arrays(model)
    assert after.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 4, 5), "HyperConv: x: expected 3 channels on axis -1, got shape (1, 4, 4, 5)"),
        ((5, 5, 3), "Linear: x: expected 24 channels on axis -1, got shape (1, 54)"),
    ],
)
def test_an_input_that_the_model_does_not_take_is_refused(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dhp.measure_cost(filled(Mixed), shape)


def test_latents_of_different_length_that_are_added_are_refused_in_one_line():
    class Mismatch(nnx.Module):
        def __init__(self, rngs):
            image = dhp.Latent(3, prunable=False, rngs=rngs)
            narrow, wide = dhp.Latent(8, rngs=rngs), dhp.Latent(12, rngs=rngs)
            self.first = dhp.HyperConv(image, narrow, (3, 3), rngs=rngs)
            self.second = dhp.HyperConv(narrow, wide, (3, 3), rngs=rngs)

        def __call__(self, x):
            x = self.first(x)
            return x + self.second(x)

    for use in (dhp.measure_cost, lambda model, shape: dhp.prune_to(model, shape, flops=0.5)):
        with pytest.raises(ValueError, match="axes that are added must be one latent") as raised:
            use(Mismatch(nnx.Rngs(0)), (4, 4, 3))
        message = str(raised.value)
        assert "(1, 4, 4, 8), (1, 4, 4, 12)" in message
        assert "\n" not in message


@pytest.mark.parametrize("around", [nnx.jit, nnx.remat, lambda call: nnx.jit(nnx.jit(call))])
def test_arrays_that_one_method_hands_on_and_another_reads_are_params(around):
    class Coder(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 5, rngs=rngs)
            self.c, self.unread = nnx.Linear(5, 2, rngs=rngs), nnx.Param(jnp.ones(7))
            self.scale = nnx.Param(jnp.ones(2))

        @around
        def encode(self, x):
            return self.a(x)

        @around
        def decode(self, x):
            return self.inner(self.b(x)) * self.scale

        @around
        def inner(self, x):
            return self.c(x)

        def __call__(self, x):
            return self.decode(self.encode(x))

    model = Coder(nnx.Rngs(0))
    params = 3 * 4 + 4 + 4 * 5 + 5 + 5 * 2 + 2 + 2
    assert dhp.measure_cost(model, (3,)).params == params
    net = dhp.with_latents(model, (3,), min_channels=1)
    left = {name: z.size - 1 for name, z in dhp.latents(net).items()}
    small = dhp.prune(net, {name: np.arange(n + 1) < n for name, n in left.items()})
    fewer = 3 * 3 + 3 + 3 * 4 + 4 + 4 * 2 + 2 + 2
    assert dhp.measure_cost(small, (3,)).params == fewer
    assert dhp.measure_cost(net, (3,)).amounts(left)["params"] == fewer


def test_a_layer_that_is_called_under_remat_is_counted():
    class Remat(nnx.Module):
        def __init__(self, rngs):
            image = dhp.Latent(1, prunable=False, rngs=rngs)
            self.conv = dhp.HyperConv(image, dhp.Latent(8, rngs=rngs), (3, 3), rngs=rngs)

        def __call__(self, x):
            return nnx.remat(lambda conv, x: conv(x))(self.conv, x)

    cost = dhp.measure_cost(Remat(nnx.Rngs(0)), (5, 5, 1))
    assert (cost.flops, cost.params) == (5 * 5 * 9 * 8, 9 * 8 + 8)
    assert flops_and_params(cost.amounts({"conv.z_in": 1, "conv.z_out": 3})) == (
        5 * 5 * 9 * 3,
        9 * 3 + 3,
    )


@pytest.mark.parametrize("shape", [(0, 8, 3), (8, 8, -3), (8.0, 8, 3), (), None, 8, "883"])
def test_what_is_no_shape_of_an_example_is_refused(shape):
    for function in (dhp.measure_cost, dhp.check_axes):
        with pytest.raises(ValueError, match=r"^input_shape: expected positive integers, such as"):
            function(thin_resnet(), shape)


def test_the_last_call_of_an_activation_counts_and_no_other():
    """As the published costs have it: one count a module, however often it is called."""

    def forward(net, x):
        y = net.layer(x)
        return net.layer(jnp.concatenate([y, y], axis=1))

    for make, slopes in ((lambda rngs: ReLU(), 0), (lambda rngs: nnx.PReLU(), 1)):
        cost = dhp.measure_cost(Net(forward, layer=filled(make)), (4, 6, 5))
        assert (cost.flops, cost.params) == (2 * 4 * 6 * 5, slopes)


@pytest.mark.parametrize(
    ("layer", "slopes", "left"),
    [(ReLU, 0, 0), (PReLU, 6, 5), (functools.partial(PReLU, shared=True), 1, 1)],
)
def test_elements_of_activations_on_latents_count_by_survivors(layer, slopes, left):
    model = Net(lambda net, x: net.layer(x), layer=layer(dhp.Latent(6, rngs=nnx.Rngs(0))))
    cost = dhp.measure_cost(model, (4, 4, 6))
    amounts = cost.amounts(dict.fromkeys(cost.sizes, 5))
    assert (cost.flops, cost.params) == (16 * 6, slopes)
    assert (amounts["flops"], amounts["params"]) == (16 * 5, left)
    small = cut(model, {name: np.arange(6) < 5 for name in cost.sizes})
    found = dhp.measure_cost(small, (4, 4, 5))
    assert (found.flops, found.params) == (16 * 5, left)
    x = jnp.linspace(-1, 1, 80).reshape(1, 4, 4, 5)
    expected = np.where(x > 0, x, (0.25 if slopes else 0.0) * x)
    np.testing.assert_allclose(small(x), expected, atol=1e-7)
