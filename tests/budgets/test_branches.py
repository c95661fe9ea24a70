"""Budgets of networks with branches, of which one runs: the costliest counts at all widths."""

import functools
import re
import warnings

from flax import nnx
from hypothesis import given, settings
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.core.activations import ReLU

ROWS = 8
X = np.random.default_rng(0).normal(size=(ROWS, 6)).astype(np.float32)
SHAPES = {"stem": (6, 10), "a": (10, 24), "b": (24, 10), "c": (10, 30), "d": (30, 10)}
SHAPES |= {"e": (10, 12), "f": (12, 10), "g": (10, 16), "h": (16, 4), "i": (10, 4)}


def nested(p, x):
    """Branches in a branch, in a loop, and others after them."""

    def through(into, out, h, _=None):
        return jnp.tanh(h @ p[into]) @ p[out]

    def inner(h):
        def twice(h):
            return jax.lax.scan(lambda h, _: (through("e", "f", h), None), h, length=2)[0]

        deep = [functools.partial(through, "c", "d"), twice, jnp.tanh]
        return jax.lax.switch(jnp.int32(h.sum()), deep, h @ p["f"].T @ p["f"])

    h = jnp.tanh(x @ p["stem"])
    h = jax.lax.cond(h.sum() > 0, functools.partial(through, "a", "b"), inner, h)
    return jax.lax.cond(h.sum() > 0, functools.partial(through, "g", "h"), lambda h: h @ p["i"], h)


def amounts_by_hand(stem, a, c, e, g):
    """FLOPs, params and activations by the widths of `nested`; of branches the most of each."""

    def of_pairs(pairs, times=1):
        flops = sum(ROWS * into * out for into, out in pairs)
        return np.array([times * flops, times * 4 * ROWS * sum(out for _, out in pairs)])

    deep = [of_pairs([(stem, c), (c, stem)]), of_pairs([(stem, e), (e, stem)], 2), 0]
    first = of_pairs([(stem, a), (a, stem)])
    other = of_pairs([(stem, e), (e, stem)]) + functools.reduce(np.maximum, deep)
    last = np.maximum(of_pairs([(stem, g), (g, 4)]), of_pairs([(stem, 4)]))
    flops, activations = of_pairs([(6, stem)]) + np.maximum(first, other) + last
    params = 6 * stem + 2 * stem * (a + c + e) + stem * g + 4 * g + 4 * stem
    return {"flops": flops, "params": params, "activations": activations}


def of_arrays(forward, shapes, seed=0):
    rng = np.random.default_rng(seed)
    params = {k: rng.normal(size=n).astype(np.float32) / 3 for k, n in shapes.items()}
    return dhp.with_latents(dhp.FromFunction(forward, params), X, min_channels=1)


@functools.cache
def deep_network():
    net = of_arrays(nested, SHAPES)
    cost = dhp.measure_cost(net, X)
    assert cost.sizes == {"stem": 10, "a": 24, "c": 30, "e": 12, "g": 16}
    return net, cost, jax.jit(cost.amounts)


def masks_of(counts, sizes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.permutation(size) < counts[name] for name, size in sizes.items()}


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_amounts_are_those_of_the_costliest_branches_for_all_widths(data):
    _, cost, jitted = deep_network()
    counts = {name: data.draw(st.integers(1, size), name) for name, size in cost.sizes.items()}
    expected = amounts_by_hand(**counts)
    assert cost.amounts(counts) == expected
    assert {name: int(n) for name, n in jitted(counts).items()} == expected


# For these widths other branches count than in the whole network, and others for activations.
@pytest.mark.parametrize(
    "counts", [(10, 24, 30, 12, 16), (7, 4, 20, 3, 2), (3, 4, 2, 5, 1), (10, 14, 1, 4, 9)]
)
def test_what_is_told_of_survivors_is_what_the_pruned_network_costs(counts):
    net, cost, _ = deep_network()
    counts = dict(zip(cost.sizes, counts, strict=True))
    found = dhp.measure_cost(dhp.prune(net, masks_of(counts, cost.sizes)), X)
    assert cost.amounts(counts) == found.amounts({}) == amounts_by_hand(**counts)
    for each in (cost, found):
        for measure in ("flops", "params", "activations"):
            assert sum(getattr(layer, measure) for layer in each.layers) == getattr(each, measure)
    assert [layer.path for layer in found.layers] == [layer.path for layer in cost.layers]


def test_entries_of_branches_of_nearly_equal_cost_have_their_share_of_it():
    def forward(p, x):
        h = jnp.tanh(x @ p["stem"])
        first, other = (
            lambda into=into, out=out: jnp.tanh(h @ p[into]) @ p[out]
            for into, out in (("a", "b"), ("c", "d"))
        )
        return jax.lax.cond(h.sum() > 0, first, other)

    shapes = {"stem": (6, 10), "a": (10, 24), "b": (24, 4), "c": (10, 23), "d": (23, 4)}
    net = of_arrays(forward, shapes)
    cost = dhp.measure_cost(net, X)
    whole = 6 * 10 + (10 + 4) * 24
    by_hand = {"stem": (6 + 24) / whole, "a": (10 + 4) / whole, "c": (10 + 4) / whole}
    found = dhp.per_cost({name: np.ones(size) for name, size in cost.sizes.items()}, cost)
    assert found.keys() == by_hand.keys()
    for name, share in by_hand.items():
        np.testing.assert_allclose(found[name], 1 / share, rtol=1e-12)


class Experts(nnx.Module):
    """Declared latents: two experts, of which the second is wider, and an activation of both."""

    def __init__(self, rngs):
        image = dhp.Latent(6, prunable=False, rngs=rngs)
        self.z, narrow, wide = (dhp.Latent(n, min_channels=1, rngs=rngs) for n in (7, 9, 12))
        self.stem = dhp.Linear(image, self.z, rngs=rngs)
        self.first = dhp.Linear(self.z, narrow, rngs=rngs)
        self.second = dhp.Linear(self.z, wide, rngs=rngs)
        self.out_first = dhp.Linear(narrow, 3, rngs=rngs)
        self.out_second = dhp.Linear(wide, 3, rngs=rngs)
        self.relu = ReLU(self.z)

    def __call__(self, x):
        def through(into, out):
            return lambda h: out(jnp.tanh(into(self.relu(h))))

        branches = through(self.first, self.out_first), through(self.second, self.out_second)
        h = self.stem(x)
        return jax.lax.cond(h.sum() > 0, *branches, h)


@pytest.mark.parametrize("widths", [(7, 9, 12), (7, 9, 5), (4, 1, 2)])
def test_branches_of_declared_latents_count_and_an_activation_counts_in_each(widths):
    model = Experts(nnx.Rngs(0))
    cost = dhp.measure_cost(model, (6,))
    left = dict(zip((7, 9, 12), widths, strict=True))
    counts = {name: left.get(size, size) for name, size in cost.sizes.items()}
    z, narrow, wide = widths
    found = dhp.measure_cost(dhp.prune(model, masks_of(counts, cost.sizes), (6,)), (6,))
    flops = 6 * z + z + max(width * (z + 3) for width in (narrow, wide))
    params = 7 * z + (z + 1 + 3) * (narrow + wide) + 2 * 3
    expected = {"flops": flops, "params": params, "activations": 4 * (z + max(narrow, wide) + 3)}
    assert cost.amounts(counts) == found.amounts({}) == expected


def unequal(p, x):
    def through(into, out):
        return lambda x: jnp.tanh(x @ p[into]) @ p[out]

    return jax.lax.cond(x.sum() > 0, through("a", "b"), through("c", "d"), x)


UNEQUAL = {"a": (6, 60), "b": (60, 3), "c": (6, 40), "d": (40, 3)}


def fade(net, seed=0, steps=4, stages=1, **budget):
    """The counts and the cut network after a search whose gradients are drawn."""
    model, rng = dhp.with_gates(net, rngs=nnx.Rngs(0)), np.random.default_rng(seed)
    cost = dhp.measure_cost(model, X)
    tx = dhp.fade_to_budget(optax.set_to_zero(), model, cost, steps=steps, stages=stages, **budget)
    params = nnx.state(model, nnx.Param)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        grads = jax.tree.map(lambda q: jnp.asarray(rng.normal(size=q.shape), q.dtype), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    nnx.update(model, params)
    masks = dhp.survivors(model)
    return {name: int(mask.sum()) for name, mask in masks.items()}, dhp.prune(model, masks)


def counts_of(small, arrays):
    return {name: getattr(small, name).shape[1] for name in arrays}


@pytest.mark.parametrize("flops", [0.9, 0.5, pytest.param(0.1, marks=pytest.mark.slow)])
def test_of_two_branches_both_are_cut_to_the_budget_and_no_more(flops):
    net = of_arrays(unequal, UNEQUAL)
    width = int(flops * 60)
    expected = {"a": width, "c": min(40, width)}
    assert counts_of(dhp.prune_to(net, flops=flops), "ac") == expected
    assert fade(net, flops=flops)[0] == expected
    assert fade(net, steps=14, stages=6, flops=flops)[0] == expected


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget", [{"flops": 0.5}, {"activations": 0.4}, {"params": 0.3}])
def test_budgets_of_nested_branches_hold_and_nothing_that_goes_at_once_would_fit(budget, seed):
    net, cost, _ = deep_network()
    ((measure, share),) = budget.items()
    scores, whole = dhp.random_scores(net, seed), amounts_by_hand(**cost.sizes)[measure]
    small = dhp.prune_to(net, by=scores, **budget)
    for counts, cut in ((counts_of(small, cost.sizes), small), fade(net, seed, **budget)):
        used = getattr(dhp.measure_cost(cut, X), measure)
        assert used == cost.amounts(counts)[measure] <= share * whole
        for name, count in counts.items():
            if count < cost.sizes[name]:
                more = amounts_by_hand(**counts | {name: count + 1})[measure]
                assert more > share * whole


def test_a_search_ranks_by_what_an_entry_costs_in_a_branch_if_it_is_not_the_costliest():
    net = dhp.with_gates(of_arrays(unequal, UNEQUAL), rngs=nnx.Rngs(0))
    cost, rng = dhp.measure_cost(net, X), np.random.default_rng(1)
    tx = dhp.fade_to_budget(
        optax.set_to_zero(), net, cost, steps=2, stages=1, memory=0.0, flops=0.4
    )
    params = nnx.state(net, nnx.Param)
    state = tx.init(params)
    for _ in range(2):
        grads = jax.tree.map(lambda q: jnp.asarray(rng.normal(size=q.shape), q.dtype), params)
        _, state = tx.update(grads, state, params)
    terms = {name: np.asarray(term) for name, term in state.average.items()}
    # An entry of each costs the same, so both lose their smallest until 24 of each fit.
    for name, term in terms.items():
        assert np.array_equal(np.asarray(state.keep[name]), np.argsort(np.argsort(-term)) < 24)


def test_a_search_warns_where_the_order_of_an_einsum_may_exceed_its_budget():
    def forward(p, x):
        h = jnp.einsum("bi,ij,jk->bk", x @ p["a"], p["b"], p["c"])
        return jnp.tanh(h) @ p["d"]

    net = of_arrays(forward, {"a": (6, 12), "b": (12, 14), "c": (14, 12), "d": (12, 3)})
    told = (
        "fade_to_budget: flops=0.5, activations=0.8 may be exceeded, for an einsum of several "
        "arrays is run in another order where that is cheaper; prune with dhp.prune_to, which "
        "counts anew"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(told)}$"):
        fade(net, flops=0.5, params=0.9, activations=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fade(net, params=0.5)  # no order changes these
        fade(of_arrays(unequal, UNEQUAL), flops=0.5)
