"""Exact budgets: they hold, and are used up."""

import functools
import itertools
import math
import re

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax.numpy as jnp
from networks import (
    MIXED_INPUT,
    MIXED_LATENTS,
    Mixed,
    arrays,
    check_same,
    filled,
    keep_all,
    thin_resnet,
)
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.budgets.counted import check_budget, smallest_ratio, survivors_within
from dhp_jax.core.surgery import prune as cut


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
    with pytest.raises(dhp.BudgetError, match=r", up to a multiple of 5"):
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


@pytest.mark.parametrize(
    "budget",
    [
        {"flops": 0.6, "params": 0.5},
        *(pytest.param(b, marks=pytest.mark.slow) for b in ({"flops": 0.5}, {"params": 0.4})),
    ],
)
def test_prune_to_makes_the_network_of_the_survivors_within_the_budget(budget):
    model = thin_resnet(min_channels=2, width=0.5)
    cost = dhp.measure_cost(model, (16, 16, 3))
    small = dhp.prune_to(model, (16, 16, 3), **budget)
    check_same(arrays(small), arrays(cut(model, survivors_within(model, cost, **budget))))
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


def test_smaller_floors_are_named_only_where_they_let_more_go(mixed):
    model, cost = mixed
    sizes = {name: z.size for name, z in dhp.latents(model).items() if z.prunable}
    few = min(sizes, key=sizes.get)
    size = sizes[few]
    with pytest.raises(dhp.BudgetError) as caught:
        survivors_within(model, cost, flops=0.01)
    hint = f"; min_channels=1 of small latents, as {few!r} of {size} entries, lets more go"
    assert str(caught.value).endswith(hint)
    with pytest.raises(dhp.BudgetError) as caught:
        survivors_within(model, cost, 2, flops=0.01)
    assert str(caught.value).endswith("left in every prunable latent, up to a multiple of 2")


@pytest.mark.parametrize("choose", [survivors_within, dhp.uniform_within])
def test_the_cost_of_another_network_is_refused(mixed, choose):
    model, _ = mixed
    whole = dhp.measure_cost(dhp.prune(model), MIXED_INPUT)  # without latents
    with pytest.raises(ValueError, match=r"^cost: expected the measure_cost of the model, with "):
        choose(model, whole, flops=0.5)


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"flops": 2}, r"^flops: expected a share in \(0, 1\], got 2"),
        ({"flops": 0.5, "latency": 0}, r"^latency: expected a share in \(0, 1\], got 0"),
        (
            {"flop": 0.5},
            r"^budget: expected some of flops=, params=, activations=, latency=, got \['flop'\]; "
            r"did you mean 'flops'\?",
        ),
        ({}, r"^budget: expected some of flops=, params=, activations=, latency=, got \[\]"),
        ({"flops": 0.5, "multiple_of": 0}, r"^multiple_of: expected an integer of at least 1"),
        ({"flops": 0.5, "by": {}}, r"^scores: expected those of latent "),
        ({"flops": 0.5, "by": {"none": np.ones(3)}}, r"^scores: expected one of .*; got 'none'"),
        ({"flops": 0.5, "batch": 4, "by": np.nan}, r"^scores\[.*finite numbers >= 0; got an array"),
    ],
)
def test_what_can_be_told_to_be_wrong_is_refused_before_the_network_is_called(given, message):
    class Untouched(Mixed):
        def __call__(self, x):
            raise AssertionError

    model = filled(Untouched)
    if given.get("by") is np.nan:
        scores = {name: np.full(z.size, np.nan) for name, z in dhp.latents(model).items()}
        given = {**given, "by": scores}
    with pytest.raises(ValueError, match=message):
        dhp.prune_to(model, MIXED_INPUT, **given)


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


@functools.cache
def cheap_and_costly():
    model = CheapAndCostly(nnx.Rngs(0))
    return model, dhp.measure_cost(model, (8, 8, 1))


@pytest.mark.parametrize("target", [0.3, 0.5, 0.6, 0.7, 0.9])
def test_costly_channels_are_traded_for_cheap_ones_where_the_budget_would_be_missed(target):
    model, cost = cheap_and_costly()
    small = dhp.prune_to(model, (8, 8, 1), flops=target)
    ratio = dhp.measure_cost(small, (8, 8, 1)).flops / cost.flops
    cheapest = 2 / (2 * 9 * 8 + 2 * 64 + 2)  # one cheap channel of all
    assert target - max(0.005, cheapest) < ratio <= target


class Branches(nnx.Module):
    """Three branches of equal cost, added up."""

    def __init__(self, rngs):
        image = dhp.Latent(3, prunable=False, rngs=rngs)
        zs = [dhp.Latent(16, min_channels=1, rngs=rngs) for _ in range(3)]
        self.first = nnx.List([dhp.Linear(image, z, rngs=rngs) for z in zs])
        self.second = nnx.List([dhp.Linear(z, 2, rngs=rngs) for z in zs])

    def __call__(self, x):
        branches = zip(self.first, self.second, strict=True)
        return sum(second(jnp.tanh(first(x))) for first, second in branches)


@functools.cache
def branches():
    model = Branches(nnx.Rngs(0))
    return model, dhp.measure_cost(model, (3,))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(1, 16), min_size=3, max_size=3), st.sampled_from([2, 4, 8]))
def test_of_gates_that_are_open_or_closed_rounding_keeps_as_many_open_ones_as_fit(open_, step):
    model, cost = branches()
    names = [name for name, z in dhp.latents(model).items() if z.prunable]
    scores = {
        name: np.isin(np.arange(16), np.random.default_rng(n).permutation(16)[:n]).astype(float)
        for name, n in zip(names, open_, strict=True)
    }
    masks = survivors_within(model, cost, step, scores=scores, flops=0.5)
    kept = sum(int(scores[name][masks[name]].sum()) for name in names)
    widths = [range(step, 17, step)] * 3
    most = max(
        sum(min(width, n) for width, n in zip(chosen, open_, strict=True))
        for chosen in itertools.product(*widths)
        if cost.shares(cost.sizes | dict(zip(names, chosen, strict=True)))["flops"] <= 0.5
    )
    assert kept == most
