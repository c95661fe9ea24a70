"""What survives, exact budgets, and surgery that changes nothing but the size."""

import functools
import itertools
import math
import re

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
import jax
import jax.numpy as jnp
from networks import (
    MIXED_INPUT,
    MIXED_LATENTS,
    Mixed,
    PlainMixed,
    arrays,
    drawn_masks,
    filled,
    images,
    keep_all,
    resnet20,
    run,
)
import numpy as np
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.budgets.counted import check_budget, smallest_ratio, survivors_within
from dhp_jax.core.survivors import latent_history, survivor_counts, survivor_mask

MAGNITUDES = st.floats(0, 2, width=16)


def check_same(found, expected):
    """Arrays of two models, or statistics by path, are the same bit for bit."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=str(name))


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


# Which entries survive


def test_the_history_of_a_search_counts_prunable_latents_only():
    model = filled(Mixed)
    found = jax.jit(lambda: latent_history(model, 0.5))()
    prunable = {name: z for name, z in dhp.latents(model).items() if z.prunable}
    masks = dhp.survivors(model, 0.5)
    assert found["survivors"].tolist() == [masks[name].sum() for name in prunable]
    magnitudes = np.sort(np.concatenate([np.abs(z.value()) for z in prunable.values()]))
    assert found["magnitudes"].shape == (11,)
    assert np.asarray(found["magnitudes"])[[0, 10]].tolist() == magnitudes[[0, -1]].tolist()
    assert latent_history(dhp.prune(model), 0.5) == {}


@given(
    npst.arrays(np.float32, st.integers(1, 12), elements=st.floats(-2, 2, width=16)),
    MAGNITUDES,
    st.integers(1, 14),
)
@settings(deadline=None, derandomize=True, max_examples=30)
def test_survivors_are_those_of_the_definition(vector, threshold, min_channels):
    magnitude = np.abs(vector)
    largest = sorted(range(len(vector)), key=lambda i: (-magnitude[i], i))[:min_channels]
    expected = magnitude >= np.float32(threshold)
    expected[largest] = True
    found = np.asarray(survivor_mask(jnp.asarray(vector), threshold, min_channels))
    np.testing.assert_array_equal(found, expected)
    assert found.sum() >= min(min_channels, len(vector))
    assert found[magnitude >= threshold].all()


def test_a_latent_that_is_not_finite_has_no_survivors():
    model = resnet20()
    name, z = next((name, z) for name, z in dhp.latents(model).items() if z.prunable)
    z.vector.set_value(z.vector[...].at[1].set(jnp.nan))
    with pytest.raises(ValueError, match=f"finite latents, got NaN or infinity in '{name}'"):
        dhp.survivors(model)


@pytest.mark.parametrize("left", range(6))
def test_of_channels_that_are_all_gone_no_more_survive_than_have_to(left):
    class Alone(nnx.Module):
        def __init__(self, rngs):
            self.z = dhp.Latent(16, rngs=rngs)

    model = filled(Alone)
    model.z.vector.set_value(jnp.where(jnp.arange(16) >= 16 - left, 1.0, 0.0))
    kept = dhp.survivors(model)["z"]
    assert kept[16 - left :].all()
    assert kept.sum() == survivor_counts(model, 5e-3)["z"] == max(4, left)


def test_survivors_are_the_same_inside_jit():
    vector = jnp.asarray(np.random.default_rng(0).normal(size=30), jnp.float32)
    jitted = jax.jit(survivor_mask, static_argnums=2)(vector, 0.7, 4)
    np.testing.assert_array_equal(jitted, np.abs(vector) >= np.float32(0.7))


def test_latents_that_are_not_prunable_keep_everything():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fixed = dhp.Latent(6, prunable=False, rngs=rngs)
            self.free = dhp.Latent(6, min_channels=2, rngs=rngs)

    model = filled(Net)
    masks = dhp.survivors(model, threshold=100.0)
    magnitude = np.abs(model.free.value())
    np.testing.assert_array_equal(masks["fixed"], np.ones(6, bool))
    np.testing.assert_array_equal(masks["free"], magnitude >= np.sort(magnitude)[-2])
    check_same(dhp.survivors(model, threshold=0), keep_all(model))


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_a_threshold_that_is_negative_is_refused(threshold):
    with pytest.raises(ValueError, match=f"^threshold: expected a number >= 0, got {threshold}$"):
        dhp.survivors(filled(Mixed), threshold)


# Keeping everything changes nothing


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: filled(Mixed), MIXED_INPUT), (resnet20, (8, 8, 3))]
)
def test_keeping_everything_changes_nothing(make, shape, train):
    model, x = make(), images(4, *shape)
    small = dhp.prune(model, keep_all(model))
    scores, statistics = run(model, x, train=train)
    small_scores, small_statistics = run(small, x, train=train)
    np.testing.assert_allclose(small_scores, scores, rtol=1e-4, atol=1e-4)
    check_close(small_statistics, statistics)


def test_keeping_everything_keeps_every_generated_kernel_of_bottleneck_blocks():
    model = resnet20(depth=110)
    layers = dict(nnx.iter_modules(model))
    whole = dict(nnx.iter_modules(dhp.prune(model, keep_all(model))))
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
    whole, small = arrays(dhp.prune(model, keep_all(model))), arrays(dhp.prune(model, masks))
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


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_pruned_network_computes_what_the_whole_one_does_with_channels_masked(seed, train):
    model, x = filled(Mixed), images(3, *MIXED_INPUT)
    masks = drawn_masks(model, seed)
    scores, statistics = run(
        model, x, train=train, mask=lambda name, h: h * masks[MIXED_LATENTS[name]]
    )
    small_scores, small_statistics = run(dhp.prune(model, masks), x, train=train)
    np.testing.assert_allclose(small_scores, scores, rtol=1e-4, atol=1e-4)
    axes = {"left_norm": MIXED_LATENTS["a"], "join_norm": MIXED_LATENTS["c"]}
    expected = {path: stat[masks[axes[path[0]]]] for path, stat in statistics.items()}
    check_close(small_statistics, expected)


@pytest.mark.parametrize(("seed", "train"), [(0, True), (1, False)])
def test_a_pruned_resnet_computes_what_the_whole_one_does_with_channels_at_zero(seed, train):
    """A channel is gone where BatchNorm makes it zero and nothing that is added brings it back."""
    model, x = resnet20(width=0.5), images(4, 8, 8, 3)
    masks = drawn_masks(model, seed)
    whole, small = dhp.prune(model, keep_all(model)), dhp.prune(model, masks)
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
    model = resnet20()
    masks = drawn_masks(model, 5)
    small = dhp.prune(model, masks)
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
    for model in (resnet20(), filled(Mixed)):
        small = dhp.prune(model, drawn_masks(model, 2))
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
    small, by_hand = dhp.prune(model, masks), filled(lambda rngs: PlainMixed(4, 3, 5, rngs))
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
        small = dhp.prune(model, drawn_masks(model, 0))
        assert type(small) is Mixed
        assert small.join_norm.use_running_average is not mode


def test_pruning_leaves_its_argument_as_it_was():
    model = filled(Mixed)
    before, nodes = arrays(model), [id(node) for _, node in nnx.iter_modules(model)]
    small = dhp.prune(model, drawn_masks(model, 0))
    small.classifier.kernel[...] = jnp.zeros_like(small.classifier.kernel[...])
    small.classifier.bias[...] = jnp.ones_like(small.classifier.bias[...])
    dhp.prune_to(model, MIXED_INPUT, flops=0.6)
    check_same(arrays(model), before)
    assert [id(node) for _, node in nnx.iter_modules(model)] == nodes


def test_a_pruned_network_pruned_again_is_the_same():
    model = resnet20()
    small = dhp.prune(model, drawn_masks(model, 0))
    again = dhp.prune(small, {})
    check_same(arrays(again), arrays(small))
    assert again.dhp_architecture == small.dhp_architecture


def test_pruning_works_on_shapes_alone():
    model = filled(Mixed)
    masks = drawn_masks(model, 3)
    abstract = nnx.eval_shape(lambda: dhp.prune(Mixed(nnx.Rngs(0)), masks))
    shapes = {
        ".".join(map(str, path)): variable.get_value().shape
        for path, variable in nnx.to_flat_state(nnx.state(abstract))
    }
    assert shapes == {n: array.shape for n, array in arrays(dhp.prune(model, masks)).items()}


def test_a_single_layer_can_be_pruned():
    conv = filled(
        lambda rngs: dhp.HyperConv(
            dhp.Latent(4, rngs=rngs), dhp.Latent(5, rngs=rngs), (3, 3), rngs=rngs
        )
    )
    masks = {"z_in": np.array([1, 0, 1, 1], bool), "z_out": np.array([0, 0, 1, 0, 1], bool)}
    small = dhp.prune(conv, masks)
    assert type(small) is nnx.Conv
    expected = np.asarray(conv.kernel())[:, :, [0, 2, 3]][..., [2, 4]]
    np.testing.assert_array_equal(small.kernel[...], expected)


class Net(nnx.Module):
    """Layers by name and a function that calls them."""

    def __init__(self, forward, **layers):
        self.forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, x):
        return self.forward(self, x)


def image_and(*sizes, rngs, **options):
    """An image latent of 3 channels and prunable ones of the given sizes."""
    image = dhp.Latent(3, prunable=False, rngs=rngs)
    return image, *(dhp.Latent(size, min_channels=1, rngs=rngs, **options) for size in sizes)


def conv(z_in, z_out, rngs, kernel=1, **options):
    return dhp.HyperConv(z_in, z_out, (kernel, kernel), rngs=rngs, **options)


def test_a_layer_that_two_parents_share_stays_shared():
    def make(rngs):
        image, z = image_and(6, rngs=rngs)
        shared = conv(z, z, rngs)
        parents = nnx.List([Net(lambda net, x: net.c(x), c=shared) for _ in range(2)])
        forward = lambda net, x: net.parents[1](net.parents[0](net.stem(x)))  # noqa: E731
        return Net(forward, stem=conv(image, z, rngs), parents=parents)

    model = filled(make)
    mask = np.array([1, 0, 0, 1, 1, 0], bool)
    small = dhp.prune(model, {"stem.z_in": np.ones(3, bool), "stem.z_out": mask})
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
    small = dhp.prune(model, masks)
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
        dhp.prune(model, masks)


# Budgets


def mixed_by_greed(model, cost, **budget):
    """The survivors, found one entry after another."""
    masks = keep_all(model)
    entries = sorted(
        (abs(float(value)), name, index)
        for name, z in dhp.latents(model).items()
        if z.prunable
        for index, value in enumerate(np.asarray(z.value()))
    )

    def fits():
        shares = cost.shares({name: int(mask.sum()) for name, mask in masks.items()})
        return all(shares[name] <= share for name, share in budget.items())

    removed = []
    for _, name, index in entries:
        if fits():
            break
        if masks[name].sum() > dhp.latents(model)[name].min_channels:
            masks[name][index] = False
            removed.append((name, index))
    for name, index in reversed(removed):
        masks[name][index] = True
        masks[name][index] = fits()
    return masks


@pytest.fixture(scope="module")
def mixed():
    model = filled(Mixed)
    return model, dhp.measure_cost(model, MIXED_INPUT)


BUDGETS = st.one_of(
    st.builds(dict, flops=st.floats(0.25, 1)),
    st.builds(dict, params=st.floats(0.25, 1)),
    st.builds(dict, flops=st.floats(0.25, 1), params=st.floats(0.25, 1)),
    st.builds(dict, activations=st.floats(0.45, 1)),
    st.builds(dict, params=st.floats(0.25, 1), activations=st.floats(0.45, 1)),
)


def within(cost, budget, counts):
    """Whether numbers of survivors keep a budget."""
    shares = cost.shares(counts)
    return all(shares[name] <= share for name, share in budget.items())


def with_ties(model, seed):
    """The same network, latents drawn from few values."""
    model = nnx.clone(model)
    rng = np.random.default_rng(seed)
    for z in dhp.latents(model).values():
        z.vector[...] = jnp.asarray(rng.integers(-9, 9, z.size) / 4, jnp.float32)
    return model


@given(st.integers(0, 1000), BUDGETS)
@settings(deadline=None, derandomize=True, max_examples=30)
def test_budgets_are_met_and_used_up_by_magnitude(mixed, seed, budget):
    model, cost = with_ties(mixed[0], seed), mixed[1]
    masks = survivors_within(model, cost, **budget)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}

    fits = functools.partial(within, cost, budget)
    assert fits(counts)
    for name, z in dhp.latents(model).items():
        assert counts[name] >= (z.min_channels if z.prunable else z.size)
        if counts[name] < z.size:
            assert not fits({**counts, name: counts[name] + 1})
        magnitude = np.abs(z.value())
        if not masks[name].all():
            assert magnitude[masks[name]].min() >= magnitude[~masks[name]].max()

    def slack(masks):
        used = cost.shares({name: int(mask.sum()) for name, mask in masks.items()})
        return min(share - used[name] for name, share in budget.items())

    greedy = mixed_by_greed(model, cost, **budget)
    if slack(greedy) <= 0.005:
        check_same(masks, greedy)
    else:  # channels may have been traded
        assert slack(masks) <= slack(greedy)


def test_no_larger_network_of_the_same_kind_fits_a_budget(mixed):
    """Against every choice of widths: none that has all of these channels and more is within it."""
    model, cost = mixed
    every = list(itertools.product(range(2, 8), range(2, 6), range(2, 7)))
    names = [MIXED_LATENTS[name] for name in "abc"]
    for target in (0.3, 0.5, 0.7, 0.9, 1.0):
        masks = survivors_within(model, cost, flops=target)
        found = tuple(int(masks[name].sum()) for name in names)
        shares = {
            widths: cost.shares(
                {**dict(zip(names, widths, strict=True)), MIXED_LATENTS["image"]: 3}
            )["flops"]
            for widths in every
        }
        within = [widths for widths, share in shares.items() if share <= target]
        assert found in within
        larger = [w for w in within if w != found and all(np.array(w) >= np.array(found))]
        assert larger == []


@given(st.integers(0, 1000), BUDGETS, st.integers(1, 5))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_rounded_widths_keep_the_budget_and_go_by_magnitude(mixed, seed, budget, multiple_of):
    model, cost = with_ties(mixed[0], seed), mixed[1]
    smallest = smallest_ratio(model, cost, multiple_of)
    budget = {name: max(share, smallest[name]) for name, share in budget.items()}
    masks = survivors_within(model, cost, multiple_of, **budget)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}

    fits = functools.partial(within, cost, budget)
    assert fits(counts)
    for name, z in dhp.latents(model).items():
        count, magnitude = counts[name], np.abs(z.value())
        if count < z.size:
            assert z.prunable
            assert count % multiple_of == 0
            assert count >= z.min_channels
            assert magnitude[masks[name]].min() >= magnitude[~masks[name]].max()
            assert not fits({**counts, name: min(z.size, count + multiple_of)})


def test_the_smallest_rounded_widths_are_multiples_above_min_channels(mixed):
    """Of 7, 5 and 6 channels that keep 2 at least."""
    model, cost = mixed
    for multiple_of, widths in ((1, (2, 2, 2)), (2, (2, 2, 2)), (3, (3, 3, 3)), (4, (4, 4, 4))):
        counts = dict(zip((MIXED_LATENTS[name] for name in "abc"), widths, strict=True))
        counts[MIXED_LATENTS["image"]] = 3
        shares = cost.shares(counts)
        assert smallest_ratio(model, cost, multiple_of) == shares
        masks = survivors_within(model, cost, multiple_of, **shares)
        assert {name: int(mask.sum()) for name, mask in masks.items()} == counts
    sizes = {name: z.size for name, z in dhp.latents(model).items() if z.prunable}
    whole = smallest_ratio(model, cost, sizes)
    assert whole == {"flops": 1, "params": 1, "activations": 1}
    with pytest.raises(dhp.BudgetError, match=r", up to a multiple of 5$"):
        survivors_within(model, cost, 5, flops=0.2)


NUMBER = "an integer of at least 1, 'auto' or such by latent"


@pytest.mark.parametrize(
    ("multiple_of", "told"),
    [
        *((value, f"{NUMBER}, got {value!r}") for value in (0, 2.0, True)),
        (
            6,
            "at most 5, the size of the smallest prunable latent; got 6, which "
            f"{MIXED_LATENTS['b']!r} cannot keep; 'auto' and numbers by name leave such latents "
            "at 1",
        ),
        (
            8,
            "at most 5, the size of the smallest prunable latent; got 8, which "
            f"{MIXED_LATENTS['c']!r} and 2 more cannot keep; 'auto' and numbers by name leave such "
            "latents at 1",
        ),
    ],
)
def test_what_widths_cannot_be_rounded_to_is_refused(mixed, multiple_of, told):
    with pytest.raises(ValueError, match=f"^multiple_of: expected {told}$"):
        dhp.prune_to(mixed[0], MIXED_INPUT, multiple_of, flops=0.5)


@pytest.mark.parametrize("budget", [{"flops": 0.5}, {"params": 0.4}, {"flops": 0.6, "params": 0.5}])
def test_prune_to_makes_the_network_of_the_survivors_within_the_budget(budget):
    model = resnet20(min_channels=2, width=0.5)
    cost = dhp.measure_cost(model, (16, 16, 3))
    small = dhp.prune_to(model, (16, 16, 3), **budget)
    check_same(arrays(small), arrays(dhp.prune(model, survivors_within(model, cost, **budget))))
    found = dhp.measure_cost(small, (16, 16, 3))
    shares = {"flops": found.flops / cost.flops, "params": found.params / cost.params}
    for name, target in budget.items():
        assert shares[name] <= target
    assert max(shares[name] - target for name, target in budget.items()) > -0.05


def test_a_budget_of_all_keeps_all(mixed):
    model, cost = mixed
    check_same(survivors_within(model, cost, flops=1.0), keep_all(model))
    check_same(survivors_within(model, cost, params=1), keep_all(model))


def test_the_smallest_share_can_be_reached_and_is_told_when_less_is_asked_for(mixed):
    model, cost = mixed
    smallest = smallest_ratio(model, cost)
    counts = {**dict.fromkeys((MIXED_LATENTS[n] for n in "abc"), 2), MIXED_LATENTS["image"]: 3}
    assert smallest == cost.shares(counts)
    for name, share in smallest.items():
        masks = survivors_within(model, cost, **{name: share})
        assert {latent: int(mask.sum()) for latent, mask in masks.items()} == counts
        told = f"possible share is {math.ceil(1e4 * share) / 1e4:.4f}"  # one that can be asked for
        with pytest.raises(dhp.BudgetError, match=re.escape(told)):
            survivors_within(model, cost, **{name: share - 1e-3})
        with pytest.raises(dhp.BudgetError, match=f"^{name}: 0.01 cannot be reached"):
            dhp.prune_to(model, MIXED_INPUT, **{name: 0.01})


def test_an_unreachable_budget_is_a_value_error():
    assert issubclass(dhp.BudgetError, ValueError)


@pytest.mark.parametrize("target", [0, -0.5, 1.5, True, "half", None, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(mixed, target):
    with pytest.raises(ValueError, match=r"^flops: expected a share in \(0, 1\], got "):
        check_budget(*mixed, flops=target)


@pytest.mark.parametrize("budget", [{}, {"flop": 0.5}, {"flops": 0.9, "latency": 0.5}])
def test_a_budget_of_something_else_is_refused(mixed, budget):
    with pytest.raises(
        ValueError, match=r"^budget: expected some of flops=, params=, activations=, got \["
    ):
        check_budget(*mixed, **budget)


# Axes that meet must be one latent


def added(size_b, forward=lambda net, x: net.a(x) + net.b(x), *, fixed=False):
    """A network that adds two axes which are not one latent."""

    def make(rngs):
        image, a = image_and(8, rngs=rngs)
        b = dhp.Latent(size_b, prunable=not fixed, rngs=rngs)
        return Net(forward, a=conv(image, a, rngs), b=conv(image, b, rngs))

    return filled(make)


def test_an_addition_of_two_latents_is_found_and_both_are_named():
    with pytest.raises(ValueError, match="axes that meet are not the same latent") as raised:
        dhp.check_axes(added(8), (4, 4, 3))
    assert "'a.z_out' (8 channels) or 'b.z_out' (8 channels)" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_addition_to_a_latent_that_is_not_prunable_is_found():
    with pytest.raises(
        ValueError, match=r"pruning 'a\.z_out' \(8 channels\) alone breaks"
    ) as raised:
        dhp.check_axes(added(8, fixed=True), (4, 4, 3))
    assert "fixed width, such as latent 'b.z_out' or a number in its code;" in str(raised.value)


def test_an_addition_to_an_ordinary_layer_is_found():
    def make(rngs):
        image, a = image_and(8, rngs=rngs)
        ordinary = nnx.Conv(3, 8, (1, 1), rngs=rngs)
        return Net(lambda net, x: net.a(x) + net.b(x), a=conv(image, a, rngs), b=ordinary)

    with pytest.raises(
        ValueError, match=r"pruning 'a\.z_out' \(8 channels\) alone breaks"
    ) as raised:
        dhp.check_axes(filled(make), (4, 4, 3))
    assert "fixed width, such as 'b' (Conv) or a number in its code;" in str(raised.value)


def test_a_parameter_that_was_forgotten_is_found_before_a_budget_is_refused():
    def make(rngs):
        image, a = image_and(8, rngs=rngs)
        net = Net(lambda net, x: net.a(x) * net.scale[...], a=conv(image, a, rngs))
        net.scale = nnx.Param(jnp.ones(8))
        return net

    with pytest.raises(ValueError, match=r"fixed width, such as 'scale' \(Param\) or a number"):
        dhp.prune_to(filled(make), (4, 4, 3), flops=0.01)


def test_only_the_axes_of_networks_can_be_checked():
    with pytest.raises(ValueError, match=r"^model: expected a network, got <class"):
        dhp.check_axes(Net, (4, 4, 3))


def test_an_axis_that_lacks_a_part_of_a_concatenation_is_found():
    def make(rngs):
        image, a, b, c = image_and(4, 4, 8, rngs=rngs)

        def forward(net, x):
            return net.join(jnp.concatenate([net.a(x), net.b(x)], -1))

        return Net(forward, a=conv(image, a, rngs), b=conv(image, b, rngs), join=conv(c, c, rngs))

    with pytest.raises(ValueError, match="axes that meet are not the same latent") as raised:
        dhp.check_axes(filled(make), (4, 4, 3))
    for name in ("a.z_out", "b.z_out", "join.z_in"):
        assert repr(name) in str(raised.value)


def test_one_wrong_addition_among_many_latents_is_found_wherever_it_is():
    def make(rngs, wrong):
        image, *zs = image_and(*[5] * 10, rngs=rngs)
        layers = nnx.List([conv(z, z, rngs) for z in zs])
        stems = nnx.List([conv(image, z, rngs) for z in zs])

        def forward(net, x):
            ys = [layer(stem(x)) for stem, layer in zip(net.stems, net.layers, strict=True)]
            return ys[wrong[0]] + ys[wrong[1]]

        return Net(forward, stems=stems, layers=layers)

    for wrong in ((0, 9), (3, 7)):
        model = filled(lambda rngs, wrong=wrong: make(rngs, wrong))
        with pytest.raises(ValueError, match="axes that meet") as raised:
            dhp.check_axes(model, (4, 4, 3))
        assert re.findall(r"'(.*?)' \(5", str(raised.value)) == [f"layers.{n}.z_in" for n in wrong]


def test_right_axes_are_accepted():
    dhp.check_axes(filled(Mixed), MIXED_INPUT)
    dhp.check_axes(resnet20(), (8, 8, 3))
    dhp.check_axes(dhp.prune(resnet20(), keep_all(resnet20())), (8, 8, 3))


def test_prune_to_checks_the_axes_first():
    with pytest.raises(ValueError, match="axes that meet are not the same latent"):
        dhp.prune_to(added(8), (4, 4, 3), flops=0.8)


def test_checking_axes_with_a_wrong_input_says_so():
    with pytest.raises(ValueError, match=r"^input_shape: the model does not take \(4, 4, 5\)"):
        dhp.check_axes(filled(Mixed), (4, 4, 5))


def test_a_pixel_shuffle_is_accepted_and_pruned_to_whole_channels():
    def make(rngs):
        image, z = image_and(5, rngs=rngs)

        def forward(net, x):
            y = net.up(x)
            n, h, w, c = y.shape
            y = y.reshape(n, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
            return net.last(y.reshape(n, 2 * h, 2 * w, c // 4))

        up, last = conv(image, dhp.repeat(z, 4), rngs), conv(z, image, rngs)
        return Net(forward, up=up, last=last)

    model, x = filled(make), images(1, 3, 3, 3)
    dhp.check_axes(model, (3, 3, 3))
    mask = np.array([1, 0, 1, 0, 1], bool)
    small = dhp.prune(model, {"last.z_in": mask, "last.z_out": np.ones(3, bool)})
    kernel = np.asarray(model.last.kernel()) * mask[:, None]
    whole = dhp.prune(model, keep_all(model))
    whole.last.kernel[...] = kernel
    np.testing.assert_allclose(small(x), whole(x), rtol=1e-5, atol=1e-5)


class CheapAndCostly(nnx.Module):
    """Eight costly channels of small magnitude beside 64 cheap ones of large magnitude."""

    def __init__(self, rngs):
        image, out = (dhp.Latent(1, prunable=False, rngs=rngs) for _ in range(2))
        self.costly = dhp.Latent(8, min_channels=1, rngs=rngs)
        self.cheap = dhp.Latent(64, min_channels=1, rngs=rngs)
        self.costly.vector[...] = jnp.linspace(0.1, 0.2, 8)
        self.cheap.vector[...] = jnp.linspace(1.0, 2.0, 64)
        self.convs = nnx.List(
            dhp.HyperConv(*axes, (size, size), rngs=rngs)
            for axes, size in [
                ((image, self.costly), 3),
                ((self.costly, out), 3),
                ((image, self.cheap), 1),
                ((self.cheap, out), 1),
            ]
        )

    def __call__(self, x):
        return self.convs[1](self.convs[0](x)) + self.convs[3](self.convs[2](x))


@pytest.mark.parametrize("target", [0.3, 0.5, 0.6, 0.7, 0.9])
def test_costly_channels_are_traded_for_cheap_ones_where_the_budget_would_be_missed(target):
    model = CheapAndCostly(nnx.Rngs(0))
    cost = dhp.measure_cost(model, (8, 8, 1))
    small = dhp.prune_to(model, (8, 8, 1), flops=target)
    ratio = dhp.measure_cost(small, (8, 8, 1)).flops / cost.flops
    cheapest = 2 / (2 * 9 * 8 + 2 * 64 + 2)  # one cheap channel of all
    assert target - max(0.005, cheapest) < ratio <= target
