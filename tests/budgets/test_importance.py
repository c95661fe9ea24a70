"""What decides which channels go: budgets hold, shares are one, scores are what they say."""

import functools
import re

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from networks import MIXED_INPUT, MIXED_LATENTS, SMALL, Mixed, filled, thin_resnet
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.budgets import selection
from dhp_jax.budgets.counted import removals, smallest_ratio, survivors_within
from dhp_jax.budgets.rounding import multiples
from dhp_jax.core.surgery import prune as cut
from dhp_jax.models import registry
from dhp_jax.models.registry import build_abstract, task_of


@functools.cache
def network(family):
    """A small network of a family, of shapes alone, and its cost."""
    arguments = SMALL[family] | {"min_channels": 2}
    restores = task_of(family) != "classification"
    arguments |= {"scale": 2} if task_of(family) == "super_resolution" else {}
    model = build_abstract(family, **arguments)
    return model, dhp.measure_cost(
        model, (32, 32, 1 if restores and "scale" not in arguments else 3)
    )


@st.composite
def asked(draw):
    """A network, a multiple of widths, and budgets that can be reached."""
    model, cost = network(draw(st.sampled_from(sorted(SMALL))))
    wide = {name: 2 for name, z in dhp.latents(model).items() if z.prunable and z.size > 1}
    multiple_of = draw(st.sampled_from([1, 1, wide]))
    smallest = smallest_ratio(model, cost, multiple_of)
    names = draw(st.sets(st.sampled_from(["flops", "params", "activations"]), min_size=1))
    budget = {name: draw(st.floats(smallest[name], 1.0)) for name in sorted(names)}
    return model, cost, multiple_of, budget


def used(cost, masks):
    return cost.shares({name: int(mask.sum()) for name, mask in masks.items()})


def check_within(model, cost, multiple_of, budget, masks):
    """Budgets hold, and every latent has a width that it may have."""
    shares, steps = used(cost, masks), multiples(model, multiple_of)
    assert all(shares[name] <= share for name, share in budget.items())
    for name, z in dhp.latents(model).items():
        assert z.size - masks[name].sum() in {0, *removals(z, steps.get(name, 1))}


@given(asked())
@settings(derandomize=True, deadline=None, max_examples=20)
def test_uniform_shares_are_one_to_within_a_step_and_the_largest_that_fit(example):
    model, cost, multiple_of, budget = example
    masks = dhp.uniform_within(model, cost, multiple_of, **budget)
    check_within(model, cost, multiple_of, budget, masks)
    steps = multiples(model, multiple_of)
    widths = {
        name: sorted(z.size - gone for gone in {0, *removals(z, steps.get(name, 1))})
        for name, z in dhp.latents(model).items()
    }

    def uniform(counts):
        """Whether there is a share that every count is the width below or above."""
        low, high = [0.0], [np.inf]
        for name, count in counts.items():
            place, size = widths[name].index(count), widths[name][-1]
            low += [widths[name][place - 1] / size] if place else []
            high += [widths[name][place + 1] / size] if place + 1 < len(widths[name]) else []
        return max(low) < min(high)

    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    assert uniform(counts)
    for name, possible in widths.items():
        for wider in [w for w in possible if w > counts[name]][:1]:
            trial = counts | {name: wider}
            if uniform(trial):
                shares = cost.shares(trial)
                assert any(shares[budgeted] > share for budgeted, share in budget.items())


@given(asked(), st.integers(0, 2**32 - 1))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_random_survivors_keep_the_budget_and_follow_from_the_seed(example, seed):
    model, cost, multiple_of, budget = example
    chosen = [
        survivors_within(model, cost, multiple_of, scores=dhp.random_scores(model, seed), **budget)
        for _ in range(2)
    ]
    check_within(model, cost, multiple_of, budget, chosen[0])
    assert all(np.array_equal(mask, chosen[1][name]) for name, mask in chosen[0].items())
    left = min(share - used(cost, chosen[0])[name] for name, share in budget.items())
    for name, mask in chosen[0].items():  # no channel of another latent fits in what is left
        if multiple_of == 1 and not mask.all():
            counts = {other: int(m.sum()) for other, m in chosen[0].items()}
            wider = cost.shares(counts | {name: counts[name] + 1})
            assert left < max(wider[b] - cost.shares(counts)[b] for b in budget)


def test_another_seed_draws_other_survivors():
    model = network("resnet")[0]
    one, other = (dhp.random_scores(model, seed) for seed in (0, 1))
    prunable = {name for name, z in dhp.latents(model).items() if z.prunable}
    assert one.keys() == other.keys() == prunable
    assert all(not np.array_equal(one[name], other[name]) for name in one)
    rng = np.random.default_rng(1)
    for name, z in dhp.latents(model).items():
        if z.prunable:
            np.testing.assert_array_equal(other[name], rng.uniform(0, 1, z.size))


def test_no_latent_is_likelier_to_lose_entries_at_random():
    model, cost = network("vgg")
    sizes = {name: z.size for name, z in dhp.latents(model).items() if z.prunable and z.size > 16}
    left = {name: [] for name in sizes}
    for seed in range(100):
        masks = survivors_within(model, cost, scores=dhp.random_scores(model, seed), flops=0.5)
        for name in sizes:
            left[name].append(masks[name].mean())
    means = [np.mean(shares) for shares in left.values()]
    assert max(means) - min(means) < 0.08  # cheap channels come back where they fit


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0", None])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ValueError, match=r"^seed: expected an integer of at least 0, got "):
        dhp.random_scores(network("vgg")[0], seed)


# The l1 norm


def filter_norms(kernel):
    """The l1 norm of each filter, one output channel at a time."""
    return np.array(
        [np.abs(kernel[..., o].astype(np.float64)).sum() for o in range(kernel.shape[-1])]
    )


def test_scores_of_a_residual_stage_add_up_over_all_layers_that_share_its_latent():
    model = thin_resnet(depth=20)
    plain = dhp.prune(model)
    scores = dhp.l1_scores(model)
    blocks = plain.blocks
    stage = [plain.stem.conv, *(block.layers[1].conv for block in blocks[:3])]
    expected = sum(filter_norms(conv.kernel[...]) for conv in stage)
    np.testing.assert_allclose(scores["stages.0"], expected / expected.mean(), rtol=1e-6)
    stage = [*(block.layers[1].conv for block in blocks[3:6]), blocks[3].projection.conv]
    expected = sum(filter_norms(conv.kernel[...]) for conv in stage)
    np.testing.assert_allclose(scores["stages.1"], expected / expected.mean(), rtol=1e-6)
    inside = filter_norms(blocks[0].layers[0].conv.kernel[...])
    np.testing.assert_allclose(scores["blocks.0.hidden.0"], inside / inside.mean(), rtol=1e-6)
    assert "stages.2" not in scores  # the classifier's input, which is not pruned


def test_an_entry_that_stands_for_several_channels_rules_all_their_filters():
    make = functools.partial(registry.build, "edsr", scale=2, blocks=1, features=8)
    model = filled(lambda rngs: make(rngs=rngs))
    plain = dhp.prune(model)
    kernels = [plain.head, plain.blocks[0].second, plain.last]
    expected = sum(filter_norms(conv.kernel[...]) for conv in kernels)
    shuffled = filter_norms(plain.upsampler.convs[0].kernel[...])
    expected = expected + shuffled.reshape(8, 4).sum(1)
    np.testing.assert_allclose(dhp.l1_scores(model)["body"], expected / expected.mean(), rtol=1e-6)


def test_the_scale_of_a_layer_does_not_count():
    model = filled(Mixed)
    before = dhp.l1_scores(model)
    for name in ("w2", "b2"):
        variable = getattr(model.left, name)
        variable.set_value(100 * variable[...])
    after = dhp.l1_scores(model)
    for name in before:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5)


def test_filters_of_zeros_go_first():
    model = filled(Mixed)
    for name in ("w2", "b2"):
        variable = getattr(model.left, name)
        variable.set_value(variable[...].at[..., 2].set(0))
    scores = dhp.l1_scores(model)
    assert scores[MIXED_LATENTS["a"]][2] == 0
    masks = survivors_within(model, dhp.measure_cost(model, MIXED_INPUT), scores=scores, flops=0.5)
    assert not masks[MIXED_LATENTS["a"]][2]


class Loose(nnx.Module):
    """A prunable latent that no convolution makes."""

    def __init__(self, rngs):
        self.z = dhp.Latent(8, rngs=rngs)
        self.head = dhp.Linear(self.z, 2, rngs=rngs)


def test_a_latent_without_filters_is_refused():
    with pytest.raises(ValueError, match=r"^model: expected a layer that makes .*; 'z' has none$"):
        dhp.l1_scores(filled(Loose))


# Pruning by them


def test_prune_to_goes_by_scores_instead_of_latents():
    model = filled(Mixed)
    cost = dhp.measure_cost(model, MIXED_INPUT)
    scores = {name: np.arange(z.size) for name, z in dhp.latents(model).items()}
    small = dhp.prune_to(model, MIXED_INPUT, flops=0.5, by=scores)
    masks = survivors_within(model, cost, scores=scores, flops=0.5)
    kept = small.dhp_architecture.survivors
    assert {name: list(np.flatnonzero(mask)) for name, mask in masks.items()} == {
        name: list(indices) for name, indices in kept.items()
    }
    name = MIXED_LATENTS["c"]
    size = dhp.latents(model)[name].size
    assert kept[name] == tuple(range(size - len(kept[name]), size))  # the largest scores
    narrow = dhp.prune_to(model, MIXED_INPUT, flops=0.5, by=dhp.uniform_within)
    assert dhp.measure_cost(narrow, MIXED_INPUT).flops <= 0.5 * cost.flops


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda scores: scores.pop("join.z_out"), "scores: expected those of latent 'join.z_out'"),
        (
            lambda scores: scores.update({"join.z_out": np.ones(3)}),
            "scores['join.z_out']: expected ",
        ),
        (lambda scores: scores.update(join=np.ones(3)), "scores: expected one of "),
        (lambda scores: scores["join.z_out"].fill(np.nan), "scores['join.z_out']: expected "),
        (lambda scores: scores["join.z_out"].fill(-1), "scores['join.z_out']: expected "),
        (
            lambda scores: scores.update({"join.z_out": np.full(6, 1j)}),
            "scores['join.z_out']: expected 6 finite numbers >= 0; got array([",
        ),
        (
            lambda scores: scores.update({"join.z_out": ["a"] * 6}),
            "scores['join.z_out']: expected 6 finite numbers >= 0; got ['a', ",
        ),
    ],
)
def test_scores_that_do_not_suit_the_latents_are_refused(change, told):
    model = filled(Mixed)
    scores = {name: np.ones(z.size) for name, z in dhp.latents(model).items() if z.prunable}
    change(scores)
    with pytest.raises(ValueError, match="^" + re.escape(told)) as caught:
        dhp.prune_to(model, MIXED_INPUT, flops=0.5, by=scores)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "use",
    [
        dhp.l1_scores,
        lambda small: dhp.random_scores(small, 0),
        lambda small: dhp.prune_to(small, MIXED_INPUT, flops=0.5),
        lambda small: dhp.prune_to(small, flops=0.5),
        lambda small: dhp.prune_to(small, MIXED_INPUT, flops=0.5, by=dhp.uniform_within),
        lambda small: dhp.prune_to(small, MIXED_INPUT, latency=0.5),
        lambda small: dhp.uniform_within(small, dhp.measure_cost(small, MIXED_INPUT), flops=0.5),
        lambda small: cut(small, {"left": np.ones(7, bool)}),
    ],
)
def test_a_network_that_has_been_pruned_is_named_and_how_to_prune_it_again(use):
    small = dhp.prune(filled(Mixed))
    with pytest.raises(
        ValueError, match=r"^model: expected a network with latents, got a Mixed "
    ) as caught:
        use(small)
    assert str(caught.value).endswith("; dhp.with_latents makes one of it")


@pytest.mark.parametrize("by", ["l1", dhp.l1_scores, dhp.random_scores])
def test_what_decides_nothing_is_refused_before_any_work(by, monkeypatch):
    monkeypatch.setattr(selection, "measure_cost", None)
    with pytest.raises(ValueError, match=r"^by: expected scores by latent, .*; got ") as told:
        dhp.prune_to(filled(Mixed), MIXED_INPUT, flops=0.5, by=by)
    assert str(told.value).endswith(repr(by))


def test_a_function_that_decides_is_held_to_the_budget():
    def generous(model, cost, multiple_of, *, flops):
        return dhp.uniform_within(model, cost, multiple_of, flops=1.2 * flops)

    def lists(model, cost, multiple_of, *, flops):
        masks = dhp.uniform_within(model, cost, multiple_of, flops=flops)
        return {name: mask.tolist() for name, mask in masks.items()}

    small = dhp.prune_to(filled(Mixed), MIXED_INPUT, flops=0.5, by=lists)
    same = dhp.prune_to(filled(Mixed), MIXED_INPUT, flops=0.5, by=dhp.uniform_within)
    assert dhp.measure_cost(small, MIXED_INPUT) == dhp.measure_cost(same, MIXED_INPUT)
    told = r"^by: expected survivors within flops=0\.5; got flops=0\.5\d+$"
    with pytest.raises(ValueError, match=told):
        dhp.prune_to(filled(Mixed), MIXED_INPUT, flops=0.5, by=generous)


# Other criteria, of a network whose layers are ordinary ones computed by hand


def by_hand(model):
    """The arrays of `Mixed`, and which rows of its kernels each latent rules."""
    plain = dhp.prune(model)
    arrays = {name: np.asarray(getattr(plain, name).kernel[...], np.float64) for name in KERNELS}
    return plain, arrays


KERNELS = ("left", "right", "join", "refine", "classifier")


def of_mean_one(values):
    return values / np.mean(values)


def norm(values):
    return np.sqrt(np.sum(np.square(values)))


def test_l2_scores_are_the_euclidean_norms_of_filters():
    model = filled(Mixed)
    _, k = by_hand(model)
    scores = dhp.l2_scores(model)
    a = [norm(k["left"][..., o]) for o in range(7)]
    np.testing.assert_allclose(scores[MIXED_LATENTS["a"]], of_mean_one(a), rtol=1e-5)
    c = [norm(k["join"][..., o]) + norm(k["refine"][..., o]) for o in range(6)]
    np.testing.assert_allclose(scores[MIXED_LATENTS["c"]], of_mean_one(c), rtol=1e-5)


def test_fpgm_scores_are_sums_of_distances_within_a_layer():
    model = filled(Mixed)
    _, k = by_hand(model)
    scores = dhp.fpgm_scores(model)

    def distances(kernel):
        n = kernel.shape[-1]
        return np.array(
            [sum(norm(kernel[..., i] - kernel[..., j]) for j in range(n)) for i in range(n)]
        )

    b = distances(k["right"])
    np.testing.assert_allclose(scores[MIXED_LATENTS["b"]], of_mean_one(b), rtol=1e-5)
    c = distances(k["join"]) + distances(k["refine"])
    np.testing.assert_allclose(scores[MIXED_LATENTS["c"]], of_mean_one(c), rtol=1e-5)


def test_group_scores_take_in_all_that_an_entry_rules():
    model = filled(Mixed)
    plain, k = by_hand(model)
    scores = dhp.group_scores(model)
    scale = np.asarray(plain.left_norm.scale[...])
    a = [norm([norm(k["left"][..., e]), norm(k["join"][:, :, e]), scale[e]]) for e in range(7)]
    np.testing.assert_allclose(scores[MIXED_LATENTS["a"]], of_mean_one(a), rtol=1e-5)
    b = [norm([norm(k["right"][..., e]), norm(k["join"][:, :, 7 + e])]) for e in range(5)]
    np.testing.assert_allclose(scores[MIXED_LATENTS["b"]], of_mean_one(b), rtol=1e-5)
    scale = np.asarray(plain.join_norm.scale[...])
    c = [
        norm(
            [
                norm(k["join"][..., e]),
                norm(k["refine"][..., e]),
                norm(k["refine"][:, :, e]),
                norm(k["classifier"][e::6]),
                scale[e],
            ]
        )
        for e in range(6)
    ]
    np.testing.assert_allclose(scores[MIXED_LATENTS["c"]], of_mean_one(c), rtol=1e-5)


def test_scale_scores_are_the_magnitudes_of_scales_summed_over_a_stage():
    model = thin_resnet(depth=20)
    rng = np.random.default_rng(0)
    blocks = model.blocks
    norms = [model.stem.norm, *(block.layers[1].norm for block in blocks[:3])]
    for layer in norms:
        layer.scale.set_value(jnp.asarray(rng.normal(size=layer.num_features), jnp.float32))
    expected = sum(np.abs(np.asarray(layer.scale[...])) for layer in norms)
    scores = dhp.scale_scores(model)
    np.testing.assert_allclose(scores["stages.0"], expected, rtol=1e-6)
    inside = np.abs(np.asarray(blocks[0].layers[0].norm.scale[...]))
    np.testing.assert_allclose(scores["blocks.0.hidden.0"], inside, rtol=1e-6)


def squared_outputs(network, images):
    return jnp.mean(network(images) ** 2)


@pytest.mark.parametrize("squared", [True, False])
def test_taylor_scores_are_derivatives_by_what_layers_read(squared):
    model = filled(Mixed)
    model.eval()
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(4, *MIXED_INPUT)).astype(np.float32) for _ in range(3)]
    scores = dhp.taylor_scores(model, squared_outputs, batches, squared=squared)

    def loss_with(gates, images):
        """The loss where what layers read is multiplied by the gates of its channels."""
        small = dhp.prune(model)
        a = gates["a"] * nnx.relu(small.left_norm(small.left(images)))
        b = gates["b"] * nnx.relu(small.right(images))
        c = nnx.relu(small.join_norm(small.join(jnp.concatenate([a, b], -1))))
        c = gates["c"] * (c + small.refine(gates["c"] * c))
        return jnp.mean(small.classifier(c.reshape(len(c), -1)) ** 2)

    gates = {"a": jnp.ones(7), "b": jnp.ones(5), "c": jnp.ones(6)}
    gradient = jax.jit(jax.grad(loss_with))
    terms = [gradient(gates, images) for images in batches]
    for name in gates:
        each = np.array([term[name] for term in terms], np.float64)
        wanted = (each**2 if squared else np.abs(each)).mean(0)
        np.testing.assert_allclose(scores[MIXED_LATENTS[name]], wanted, rtol=1e-3)


def test_channels_that_nothing_depends_on_have_no_taylor_score_and_go_first():
    model = filled(Mixed)
    model.eval()
    classifier = model.classifier.kernel[...]
    for name in ("w2", "b2"):
        variable = getattr(model.refine, name)
        variable.set_value(variable[...].at[..., 2, :].set(0))
    model.classifier.kernel.set_value(classifier.at[2::6].set(0))
    images = np.random.default_rng(0).normal(size=(4, *MIXED_INPUT)).astype(np.float32)
    scores = dhp.taylor_scores(model, squared_outputs, [images])
    assert scores[MIXED_LATENTS["c"]][2] == 0
    assert (np.delete(scores[MIXED_LATENTS["c"]], 2) > 0).all()


def test_taylor_scores_want_batches():
    with pytest.raises(ValueError, match=r"^batches: expected at least one batch, got none"):
        dhp.taylor_scores(filled(Mixed), squared_outputs, [])


@pytest.mark.parametrize("scores_of", [dhp.taylor_scores, dhp.gradient_scores])
def test_a_loss_of_more_than_one_number_is_refused(scores_of):
    def each(network, images):
        return network(images).mean(1)

    def with_more(network, images):
        return network(images).mean(), images

    for loss, got in ((each, r"shape \(2,\)"), (with_more, "a tuple")):
        told = f"^loss: expected a function that returns a number, got {got}"
        with pytest.raises(ValueError, match=told):
            scores_of(filled(Mixed), loss, [np.ones((2, *MIXED_INPUT), np.float32)])


def test_scores_per_flop_divide_by_what_an_entry_costs():
    model = filled(Mixed)
    cost = dhp.measure_cost(model, MIXED_INPUT)
    ones = {name: np.ones(z.size) for name, z in dhp.latents(model).items() if z.prunable}
    # By hand: multiply-accumulates of 3x3 (stride 1), 1x1, 3x3 (stride 2), 3x3 and a linear layer.
    flops = {"left": 16 * 9 * 3 * 7 + 2 * 16 * 7, "right": 16 * 3 * 5, "join": 4 * 9 * 12 * 6}
    flops |= {"join_norm": 2 * 4 * 6, "refine": 4 * 9 * 6 * 6, "classifier": 4 * 6 * 5}
    assert cost.flops == sum(flops.values())
    a = (16 * 9 * 3 + 2 * 16 + 4 * 9 * 6) / cost.flops
    b = (16 * 3 + 4 * 9 * 6) / cost.flops
    once, root = (dhp.per_cost(ones, cost, power=power) for power in (1.0, 0.5))
    np.testing.assert_allclose(once[MIXED_LATENTS["a"]], 1 / a)
    np.testing.assert_allclose(once[MIXED_LATENTS["b"]], 1 / b)
    np.testing.assert_allclose(root[MIXED_LATENTS["a"]], a**-0.5)
    lists = {name: values.tolist() for name, values in ones.items()}
    assert all((dhp.per_cost(lists, cost, power=0)[name] == 1).all() for name in ones)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measure": "time"}, r"^measure: expected one of flops, params, activations; got 'time'"),
        ({"power": -1}, r"^power: expected a number >= 0, got -1"),
        ({"more": {"none": np.ones(3)}}, r"^scores: expected one of .*; got 'none'"),
        ({"more": {MIXED_LATENTS["a"]: np.ones(3)}}, r"^scores\['.*'\]: expected 7 .*\(3,\)$"),
        ({"more": {MIXED_LATENTS["a"]: 1.0}}, r"^scores\['.*'\]: expected 7 .*, got shape \(\)$"),
        (
            {"scores": {"none": np.ones(3)}},
            "^cost: expected that of a network with latent 'none'",
        ),
        ({"scores": np.ones(3)}, r"^scores: expected scores by latent, .*, got array"),
        (
            {"cost": {"flops": 3}},
            r"^cost: expected what measure_cost\(model, inputs\) returns",
        ),
    ],
)
def test_wrong_arguments_of_scores_per_cost_are_refused(arguments, message):
    model = filled(Mixed)
    given = {"scores": dhp.l1_scores(model), "cost": dhp.measure_cost(model, MIXED_INPUT)}
    arguments = dict(arguments)
    given["scores"] = {**given["scores"], **arguments.pop("more", {})}
    with pytest.raises(ValueError, match=message):
        dhp.per_cost(**given | arguments)


def test_scores_and_a_cost_in_the_wrong_order_are_refused():
    model = filled(Mixed)
    with pytest.raises(ValueError, match=r"^scores: expected scores by latent, such as.*Cost"):
        dhp.per_cost(dhp.measure_cost(model, MIXED_INPUT), dhp.l1_scores(model))


class Blurred(nnx.Module):
    """Pools with a fixed kernel, which is a bare array or a parameter."""

    def __init__(self, rngs, bare):
        kernel = jnp.full((2, 2, 1, 8), 0.25)
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.kernel = kernel if bare else nnx.Param(kernel)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        kernel = self.kernel[...]
        dims = ("NHWC", "HWIO", "NHWC")
        x = nnx.relu(self.first(x))
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=dims, feature_group_count=x.shape[-1]
        )
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("score", [dhp.l1_scores, dhp.group_scores, dhp.fpgm_scores])
def test_bare_arrays_count_as_parameters_do(score):
    bare, other = (
        score(dhp.with_latents(Blurred(nnx.Rngs(0), kind), (6, 6, 3), min_channels=1))
        for kind in (True, False)
    )
    assert bare.keys() == other.keys()
    for name, found in bare.items():
        np.testing.assert_array_equal(found, other[name])
