"""Surgery that changes nothing but the size."""

import re

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from networks import (
    MIXED_INPUT,
    MIXED_LATENTS,
    Mixed,
    Net,
    PlainMixed,
    arrays,
    check_same,
    conv,
    drawn_masks,
    filled,
    image_and,
    images,
    keep_all,
    run,
    thin_resnet,
)
import numpy as np
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.core.surgery import prune as cut

pytestmark = pytest.mark.usefixtures("fast_compilation")


def check_close(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-4, err_msg=str(name))


def mixed_masks(a, b, c):
    """Masks of `Mixed` from lists of zeros and ones."""
    masks = {MIXED_LATENTS["image"]: np.ones(3, bool)}
    return masks | {
        MIXED_LATENTS[n]: np.array(m, bool) for n, m in zip("abc", (a, b, c), strict=True)
    }


# Keeping everything changes nothing


@pytest.mark.parametrize(
    ("make", "shape", "train"),
    [
        (lambda: filled(Mixed), MIXED_INPUT, True),
        (lambda: filled(Mixed), MIXED_INPUT, False),
        *(
            pytest.param(thin_resnet, (8, 8, 3), train, marks=pytest.mark.slow)
            for train in (True, False)
        ),
    ],
)
def test_keeping_everything_changes_nothing(make, shape, train):
    model, x = make(), images(4, *shape)
    small = cut(model, keep_all(model))
    scores, statistics = run(model, x, train=train)
    small_scores, small_statistics = run(small, x, train=train)
    np.testing.assert_allclose(small_scores, scores, rtol=1e-4, atol=1e-4)
    check_close(small_statistics, statistics)


@pytest.mark.slow
def test_keeping_everything_keeps_every_generated_kernel_of_bottleneck_blocks():
    model = thin_resnet(depth=110)
    layers = dict(nnx.iter_modules(model))
    whole = dict(nnx.iter_modules(cut(model, keep_all(model))))
    convs = [path for path, layer in whole.items() if isinstance(layer, nnx.Conv)]
    assert len(convs) == 1 + 3 * 36 + 3
    for path in convs[::10]:
        np.testing.assert_array_equal(whole[path].kernel[...], layers[path].kernel())


# Pruning is exact


KEPT = st.lists(st.booleans(), min_size=7, max_size=7).map(lambda bits: [*bits[:-1], True])


@given(KEPT, KEPT, KEPT)
@settings(deadline=None, derandomize=True, max_examples=15)
def test_every_pruned_array_is_the_whole_one_sliced_bit_for_bit(a, b, c):
    model = filled(Mixed)
    masks = mixed_masks(a, b[-5:], c[-6:])
    whole, small = arrays(cut(model, keep_all(model))), arrays(cut(model, masks))
    kept = {name: np.flatnonzero(masks[latent]) for name, latent in MIXED_LATENTS.items()}
    joined = np.concatenate([kept["a"], 7 + kept["b"]])
    flattened = np.concatenate([kept["c"] + 6 * position for position in range(4)])
    expected = {
        "left.kernel": whole["left.kernel"][..., kept["a"]],
        "right.kernel": whole["right.kernel"][..., kept["b"]],
        "right.bias": whole["right.bias"][kept["b"]],
        "join.kernel": whole["join.kernel"][:, :, joined][..., kept["c"]],
        "join.bias": whole["join.bias"][kept["c"]],
        "refine.kernel": whole["refine.kernel"][:, :, kept["c"]][..., kept["c"]],
        "refine.bias": whole["refine.bias"][kept["c"]],
        "classifier.kernel": whole["classifier.kernel"][flattened],
        "classifier.bias": whole["classifier.bias"],
    }
    for name in ("scale", "bias", "mean", "var"):
        expected[f"left_norm.{name}"] = whole[f"left_norm.{name}"][kept["a"]]
        expected[f"join_norm.{name}"] = whole[f"join_norm.{name}"][kept["c"]]
    check_same(small, expected)


@pytest.mark.parametrize(
    ("seed", "train"),
    [
        (0, True),
        (0, False),
        (1, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1, False), (2, True), (2, False))
        ),
    ],
)
def test_a_pruned_network_computes_what_the_whole_one_does_with_channels_masked(seed, train):
    model, x = filled(Mixed), images(3, *MIXED_INPUT)
    masks = drawn_masks(model, seed)
    scores, statistics = run(
        model, x, train=train, mask=lambda name, h: h * masks[MIXED_LATENTS[name]]
    )
    small_scores, small_statistics = run(cut(model, masks), x, train=train)
    np.testing.assert_allclose(small_scores, scores, rtol=1e-4, atol=1e-4)
    axes = {"left_norm": MIXED_LATENTS["a"], "join_norm": MIXED_LATENTS["c"]}
    expected = {path: stat[masks[axes[path[0]]]] for path, stat in statistics.items()}
    check_close(small_statistics, expected)


@pytest.mark.parametrize(
    ("seed", "train"), [(0, True), pytest.param(1, False, marks=pytest.mark.slow)]
)
def test_a_pruned_resnet_computes_what_the_whole_one_does_with_channels_at_zero(seed, train):
    """A channel is gone where BatchNorm makes it zero and nothing that is added brings it back."""
    model, x = thin_resnet(width=0.5), images(4, 8, 8, 3)
    masks = drawn_masks(model, seed)
    whole, small = cut(model, keep_all(model)), cut(model, masks)
    by_latent = {z: masks[name] for name, z in dhp.latents(model).items()}
    kept = {
        path: by_latent[norm.z]
        for path, norm in nnx.iter_modules(model)
        if isinstance(norm, dhp.BatchNorm)
    }
    norms = dict(nnx.iter_modules(whole))
    for path, mask in kept.items():
        norms[path].scale[...] = norms[path].scale[...] * mask
        norms[path].bias[...] = norms[path].bias[...] * mask
    scores, statistics = run(whole, x, train=train)
    small_scores, small_statistics = run(small, x, train=train)
    np.testing.assert_allclose(small_scores, scores, rtol=1e-3, atol=1e-3)
    check_close(
        small_statistics, {path: stat[kept[path[:-1]]] for path, stat in statistics.items()}
    )


def test_everything_shared_by_a_residual_stage_is_pruned_consistently():
    model = thin_resnet(depth=20)
    masks = drawn_masks(model, 5)
    small = cut(model, masks)
    names = {z: name for name, z in dhp.latents(model).items()}
    for stage, z in enumerate(model.stages):
        kept = np.flatnonzero(masks[names[z]])
        for number in range(3 * stage, 3 * stage + 3):
            block, small_block = model.blocks[number], small.blocks[number]
            writers = [block.layers[1]] + ([block.projection] if block.projection else [])
            small_writers = [small_block.layers[1]]
            small_writers += [small_block.projection] if block.projection else []
            for layer, small_layer in zip(writers, small_writers, strict=True):
                rows = np.flatnonzero(masks[names[layer.conv.z_in]])
                sliced = np.asarray(layer.conv.kernel())[:, :, rows][..., kept]
                np.testing.assert_array_equal(small_layer.conv.kernel[...], sliced)
                mean = np.asarray(layer.norm.mean[...])[kept]
                np.testing.assert_array_equal(small_layer.norm.mean[...], mean)


# What is left is an ordinary network


def test_no_latent_no_hypernetwork_and_no_mask_is_left():
    for model in (thin_resnet(), filled(Mixed)):
        small = cut(model, drawn_masks(model, 2))
        assert dhp.latents(small) == {}
        for path, node in nnx.iter_graph(small):
            assert not isinstance(node, dhp.Axis | dhp.HyperConv | dhp.BatchNorm | dhp.Linear), path
            assert not isinstance(node, dhp.LatentVector), path
            if isinstance(node, nnx.Variable):
                assert type(node) in (nnx.Param, nnx.BatchStat), path
        last = {name.split(".")[-1] for name in arrays(small)}
        assert last == {"kernel", "bias", "scale", "mean", "var"}


def train_step_jaxpr(model, x, optimizer):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params, rest, optimizer_state, x):
        def loss(params):
            merged = nnx.merge(graphdef, params, rest, copy=True)
            scores = merged(x)
            return jnp.mean(scores**2), nnx.state(merged, nnx.BatchStat)

        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return value, statistics, optax.apply_updates(params, updates), optimizer_state

    jaxpr = jax.make_jaxpr(step)(params, rest, optimizer.init(params), x)
    return re.sub("0x[0-9a-f]+", "address", str(jaxpr))


def test_the_train_step_of_a_pruned_network_is_that_of_an_ordinary_one():
    model = filled(Mixed)
    masks = mixed_masks([1, 0, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1])
    small, by_hand = cut(model, masks), filled(lambda rngs: PlainMixed(4, 3, 5, rngs))
    small.train()
    by_hand.train()
    optimizer, x = optax.sgd(0.1, momentum=0.9), images(2, *MIXED_INPUT)
    expected = train_step_jaxpr(by_hand, x, optimizer)
    assert train_step_jaxpr(small, x, optimizer) == expected
    assert "conv_general_dilated" in expected


def test_a_pruned_network_has_the_class_and_the_mode_of_the_whole_one():
    model = filled(Mixed)
    for mode in (True, False):
        model.train() if mode else model.eval()
        small = cut(model, drawn_masks(model, 0))
        assert type(small) is Mixed
        assert small.join_norm.use_running_average is not mode


def test_pruning_leaves_its_argument_as_it_was():
    model = filled(Mixed)
    before, nodes = arrays(model), [id(node) for _, node in nnx.iter_modules(model)]
    small = cut(model, drawn_masks(model, 0))
    small.classifier.kernel[...] = jnp.zeros_like(small.classifier.kernel[...])
    small.classifier.bias[...] = jnp.ones_like(small.classifier.bias[...])
    dhp.prune_to(model, MIXED_INPUT, flops=0.6)
    check_same(arrays(model), before)
    assert [id(node) for _, node in nnx.iter_modules(model)] == nodes


def test_a_pruned_network_pruned_again_is_the_same():
    model = thin_resnet()
    small = cut(model, drawn_masks(model, 0))
    again = cut(small, {})
    check_same(arrays(again), arrays(small))
    assert again.dhp_architecture == small.dhp_architecture


def test_pruning_works_on_shapes_alone():
    model = filled(Mixed)
    masks = drawn_masks(model, 3)
    abstract = nnx.eval_shape(lambda: cut(Mixed(nnx.Rngs(0)), masks))
    shapes = {
        ".".join(map(str, path)): variable.get_value().shape
        for path, variable in nnx.to_flat_state(nnx.state(abstract))
    }
    assert shapes == {n: array.shape for n, array in arrays(cut(model, masks)).items()}


def test_a_single_layer_can_be_pruned():
    conv = filled(
        lambda rngs: dhp.HyperConv(
            dhp.Latent(4, rngs=rngs), dhp.Latent(5, rngs=rngs), (3, 3), rngs=rngs
        )
    )
    masks = {"z_in": np.array([1, 0, 1, 1], bool), "z_out": np.array([0, 0, 1, 0, 1], bool)}
    small = cut(conv, masks)
    assert type(small) is nnx.Conv
    expected = np.asarray(conv.kernel())[:, :, [0, 2, 3]][..., [2, 4]]
    np.testing.assert_array_equal(small.kernel[...], expected)


class Trained(nnx.Param):
    """A parameter of a type of one's own."""


def with_metadata(rngs):
    """`Mixed` whose variables are told what they are, each by a note of its path."""
    model = Mixed(rngs)
    model.left_norm.scale = Trained(jnp.ones(7), rate=0.1)
    for name, layer in (("left", model.left), ("join", model.join), ("refine", model.refine)):
        layer.b2.set_metadata(out_sharding=(None, None, None, "model"), note=name)
    model.join.bias.set_metadata(note="join bias")
    model.join_norm.mean.set_metadata(note="mean")
    model.classifier.kernel.set_metadata(note="rows")
    model.right.bias.set_metadata(on_get_value=lambda variable, x: 2 * x)
    return model


@pytest.mark.parametrize("gates", [False, True])
def test_variables_of_declared_layers_keep_their_types_and_metadata(gates):
    model = with_metadata(nnx.Rngs(0))
    network = dhp.with_gates(model, rngs=nnx.Rngs(0)) if gates else model
    small = cut(network, mixed_masks([0, 1] * 3 + [1], [1, 0, 1, 0, 1], [1, 1, 0] * 2))
    for name, layer in (("left", small.left), ("join", small.join), ("refine", small.refine)):
        told = layer.kernel.get_metadata(exclude_required=True)
        assert told == {"out_sharding": (None, None, None, "model"), "note": name}
        assert type(layer.kernel) is nnx.Param
    assert type(small.left_norm.scale) is Trained
    assert small.left_norm.scale.get_metadata("rate") == 0.1
    assert small.join.bias.get_metadata("note") == "join bias"
    assert type(small.join_norm.mean) is nnx.BatchStat
    assert small.join_norm.mean.get_metadata("note") == "mean"
    assert small.classifier.kernel.get_metadata("note") == "rows"
    twice = small.right.bias  # it holds what was read of it, so it is not read so again
    np.testing.assert_array_equal(twice[...], 2 * model.right.bias.get_raw_value()[::2])


def test_a_layer_that_two_parents_share_stays_shared():
    def make(rngs):
        image, z = image_and(6, rngs=rngs)
        shared = conv(z, z, rngs)
        parents = nnx.List([Net(lambda net, x: net.c(x), c=shared) for _ in range(2)])
        forward = lambda net, x: net.parents[1](net.parents[0](net.stem(x)))  # noqa: E731
        return Net(forward, stem=conv(image, z, rngs), parents=parents)

    model = filled(make)
    mask = np.array([1, 0, 0, 1, 1, 0], bool)
    small = cut(model, {"stem.z_in": np.ones(3, bool), "stem.z_out": mask})
    assert small.parents[0].c is small.parents[1].c
    assert small.parents[0].c.kernel.shape == (1, 1, 3, 3)
    assert len(arrays(small)) == 4
    before = np.asarray(small.parents[1].c.kernel[...])
    small.parents[0].c.kernel[...] = small.parents[0].c.kernel[...] + 1
    np.testing.assert_array_equal(small.parents[1].c.kernel[...], before + 1)


@pytest.mark.parametrize("container", [nnx.List, nnx.data, lambda layers: nnx.Sequential(*layers)])
def test_layers_in_every_kind_of_container_are_pruned(container):
    def make(rngs):
        image, a, b = image_and(4, 5, rngs=rngs)
        net = Net(None)
        net.layers = container([conv(image, a, rngs), nnx.relu, conv(a, b, rngs)])
        return net

    model = filled(make)
    masks = {
        z: (np.arange(axis.size) != 1) | (not axis.prunable)
        for z, axis in dhp.latents(model).items()
    }
    small = cut(model, masks)
    assert dhp.latents(small) == {}
    layers = small.layers.layers if isinstance(small.layers, nnx.Sequential) else small.layers
    assert [type(layers[i]) for i in (0, 2)] == [nnx.Conv, nnx.Conv]
    assert layers[1] is nnx.relu
    assert [layers[i].kernel.shape for i in (0, 2)] == [(1, 1, 3, 3), (1, 1, 3, 4)]
    assert not [n for n, _ in nnx.iter_graph(small) if isinstance(_, dhp.LatentVector)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("left.z_out"), "keep: has no mask for latent 'left.z_out'; the model's"),
        (lambda m: m.update(other=np.ones(2, bool)), "keep: has a mask for unknown latent 'other'"),
        (
            lambda m: m.update({"lefty": m.pop("left.z_out")}),
            "keep: has a mask for unknown latent 'lefty'",
        ),
        (lambda m: m.update({"left.z_out": np.ones(6, bool)}), "got bool of shape (6,) that keeps"),
        (
            lambda m: m.update({"left.z_out": np.zeros(7, bool)}),
            "got bool of shape (7,) that keeps 0",
        ),
        (lambda m: m.update({"left.z_out": np.ones(7)}), "got float64 of shape (7,) that keeps 7"),
        (lambda m: m.update({"left.z_out": [0, 2, 3]}), "got int64 of shape (3,) that keeps 5"),
        (
            lambda m: m.update({"left.z_in": np.array([True, True, False])}),
            "keep['left.z_in']: expected a mask that keeps all 3 entries, for it is not prunable; "
            "got one that drops 1",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused(change, message):
    model = filled(Mixed)
    masks = keep_all(model)
    change(masks)
    with pytest.raises(ValueError, match=re.escape(message)):
        cut(model, masks)


def test_what_is_no_network_or_no_masks_by_name_is_refused():
    model = filled(Mixed)
    with pytest.raises(ValueError, match=r"^keep: expected masks by latent, got \[array"):
        dhp.prune(model, list(keep_all(model).values()))
    for wrong in (dhp.prune, dhp.latents, dhp.survivors, dhp.check_axes):
        with pytest.raises(ValueError, match=r"^model: expected an nnx.Module, got \{\}$"):
            wrong({}, *[(3,)] * (wrong is dhp.check_axes))


class Block(nnx.Pytree):
    """A convolution and a scale, in a block that is no module."""

    def __init__(self, z, rngs):
        self.conv = conv(z, z, rngs)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.conv(x) * self.scale[...]


def test_blocks_that_are_no_modules_and_variables_beside_modules_stay_shared():
    def make(rngs):
        image, z = image_and(6, rngs=rngs)
        block, scale = Block(z, rngs), nnx.Param(jnp.ones(()))
        parts = nnx.data({"conv": conv(z, z, rngs), "scale": scale})
        forward = lambda net, x: net.b(net.a(net.parts["conv"](net.stem(x))))  # noqa: E731
        stem = conv(image, z, rngs)
        return Net(forward, stem=stem, a=block, b=block, parts=parts, scale=scale)

    small = dhp.prune(filled(make))
    assert small.a is small.b
    assert isinstance(small.a.conv, nnx.Conv)
    assert small.parts["scale"] is small.scale


def test_an_attribute_called_plain_makes_no_layer_prunable():
    def make(rngs):
        image, z = image_and(6, rngs=rngs)
        own = nnx.Linear(2, 2, rngs=rngs)
        return Net(lambda net, x: net.stem(x), stem=conv(image, z, rngs), plain=own)

    small = dhp.prune(filled(make))
    assert isinstance(small.plain, nnx.Linear)
