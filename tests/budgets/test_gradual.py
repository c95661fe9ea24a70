"""The search from trained weights: its choice by hand, its budget, and a cut that loses nothing."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from networks import MIXED_INPUT, Mixed, filled
import numpy as np
from operations import count_operations
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.budgets.counted import removals
from dhp_jax.budgets.gradual import entries_that_stay, finish_fade
from dhp_jax.core.cost import Cost, LayerCost, Product, Width
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.surgery import prune as cut
from dhp_jax.tasks import Classification
from dhp_jax.train.state import start
from dhp_jax.train.step import make_step

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(16, *MIXED_INPUT)).astype(np.float32)
LABELS = np.arange(16) % 5
SEEDS = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))]


@functools.cache
def gated_once():
    model = dhp.with_gates(filled(Mixed), rngs=nnx.Rngs(1))
    model.train()
    return model, dhp.measure_cost(model, MIXED_INPUT)


def gated():
    """A network of gates, and its cost."""
    model, cost = gated_once()
    return nnx.clone(model), cost


def loss(model):
    return optax.softmax_cross_entropy_with_integer_labels(model(IMAGES), LABELS).mean()


@nnx.jit
def step(model, optimizer):
    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def prunable(model):
    return {name: z for name, z in dhp.latents(model).items() if z.prunable}


def shares_left(model, cost):
    counts = {n: int((np.asarray(z.value()) != 0).sum()) for n, z in dhp.latents(model).items()}
    return cost.shares(counts)


def test_a_step_has_the_contractions_of_a_plain_one():
    plain = dhp.prune(filled(Mixed))
    model, cost = gated()
    search = dhp.fade_to_budget(optax.sgd(0.02), model, cost, steps=20, flops=0.5)
    counts = []
    for network, tx in ((plain, optax.sgd(0.02)), (model, search)):
        network.train()
        graphdef, state = nnx.split((network, nnx.Optimizer(network, tx, wrt=nnx.Param)))

        def update(state, graphdef=graphdef):
            network, optimizer = nnx.merge(graphdef, state)
            step(network, optimizer)
            return nnx.state((network, optimizer))

        counts.append(count_operations(update, state))
    assert counts[0] > 10
    assert counts[1] == counts[0]


@pytest.mark.parametrize("budget", [{"flops": 0.5}, {"flops": 0.7, "params": 0.6}])
def test_the_budget_is_met_in_time_and_the_cut_changes_nothing(budget):
    model, cost = gated()
    tx = dhp.fade_to_budget(
        optax.sgd(0.02, momentum=0.9), model, cost, steps=20, stages=3, **budget
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    shares = []
    for _ in range(20):
        step(model, optimizer)
        shares.append(shares_left(model, cost))
    assert shares[4]["flops"] == shares[8]["flops"] == 1
    assert all(shares[-1][name] <= share for name, share in budget.items())
    gone = {name: np.asarray(z.value()) == 0 for name, z in prunable(model).items()}
    for _ in range(3):
        step(model, optimizer)
    for name, z in prunable(model).items():
        assert np.array_equal(np.asarray(z.value()) == 0, gone[name])
        assert z.size - gone[name].sum() >= z.min_channels
    model.eval()
    masks = {name: np.asarray(z.value()) != 0 for name, z in dhp.latents(model).items()}
    small = cut(model, masks)
    np.testing.assert_allclose(small(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


class Coarse(nnx.Module):
    """A trunk whose channels cost much, beside hidden ones that cost little."""

    def __init__(self, rngs, kernel=9):
        image = dhp.Latent(1, prunable=False, rngs=rngs)
        self.trunk = dhp.Latent(8, min_channels=1, rngs=rngs)
        hidden = [dhp.Latent(6, min_channels=1, rngs=rngs) for _ in range(3)]
        self.stem = dhp.HyperConv(image, self.trunk, (kernel, kernel), rngs=rngs)
        self.into = nnx.List([dhp.HyperConv(self.trunk, z, (1, 1), rngs=rngs) for z in hidden])
        self.out = nnx.List([dhp.HyperConv(z, self.trunk, (1, 1), rngs=rngs) for z in hidden])
        self.head = dhp.Linear(self.trunk, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for into, out in zip(self.into, self.out, strict=True):
            x = x + out(nnx.relu(into(x)))
        return self.head(x.mean((1, 2)))


def values_of(model, params):
    """The vectors of prunable latents by name, as parameters have them, in float64."""
    model = nnx.clone(model)
    nnx.update(model, params)
    return {name: np.asarray(z.value(), np.float64) for name, z in prunable(model).items()}


def flops_of(cost, counts):
    return cost.shares(cost.sizes | counts)["flops"]


def slope_of(cost, counts, name):
    """Twice the derivative of the FLOPs, a polynomial of degree 2, by the entries of a latent."""
    n = counts[name]

    def flops(count):
        return flops_of(cost, counts | {name: count})

    if n < cost.sizes[name]:
        return flops(n + 1) - flops(n - 1)
    return 3 * flops(n) - 4 * flops(n - 1) + flops(n - 2)


def chosen_by_hand(cost, scores, alive, floors, limit):
    """What stays: the smallest scores go, down to the floors, and those that fit come back."""
    left = {name: set(np.flatnonzero(mask)) for name, mask in alive.items()}
    order = sorted((scores[name][i], name, i) for name in left for i in left[name])
    for _, name, i in order:
        if flops_of(cost, {n: len(kept) for n, kept in left.items()}) <= limit:
            break
        if len(left[name]) > floors[name]:
            left[name].remove(i)
    for _, name, i in reversed(order):
        more = {n: len(kept | {i} if n == name else kept) for n, kept in left.items()}
        if flops_of(cost, more) <= limit:
            left[name].add(i)
    return {name: np.isin(np.arange(mask.size), list(left[name])) for name, mask in alive.items()}


def test_the_first_choice_is_that_of_squared_taylor_terms_per_flop():
    model, cost = gated()
    tx = dhp.fade_to_budget(
        optax.set_to_zero(), model, cost, steps=8, stages=1, power=1.0, memory=0.5, flops=0.6
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    terms = {n: g**2 for n, g in values_of(model, nnx.jit(nnx.grad(loss))(model)).items()}
    for _ in range(5):  # four that measure, one that chooses
        step(model, optimizer)
    whole = {name: z.size for name, z in prunable(model).items()}
    scores = {}
    for name in whole:
        scores[name] = terms[name] / slope_of(cost, whole, name)
    alive = {name: np.ones(size, bool) for name, size in whole.items()}
    floors = {name: z.min_channels for name, z in prunable(model).items()}
    stays = chosen_by_hand(cost, scores, alive, floors, 0.6)
    assert not all(mask.all() for mask in stays.values())
    for name, z in prunable(model).items():
        expected = np.where(stays[name], 1, 0.75)
        np.testing.assert_allclose(np.asarray(z.value()), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("power", "memory"),
    [
        *((0, 0.9), (1, 0.3)),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in ((0, 0.3), (1, 0.9))),
    ],
)
def test_every_step_is_that_of_the_equations(power, memory):
    steps, stages, target = 12, 3, 0.5
    network = filled(lambda rngs: Coarse(rngs, kernel=1))
    model = dhp.with_gates(network, rngs=nnx.Rngs(1))
    cost = dhp.measure_cost(model, (6, 6, 1))
    floors = {name: z.min_channels for name, z in prunable(model).items()}
    tx = dhp.fade_to_budget(
        optax.sgd(0.01),
        model,
        cost,
        steps=steps,
        stages=stages,
        power=power,
        memory=memory,
        flops=target,
    )
    params, rng = nnx.state(model, nnx.Param), np.random.default_rng(5)
    state, z = tx.init(params), values_of(model, params)
    v = {name: np.zeros_like(x) for name, x in z.items()}
    stays = {name: x != 0 for name, x in z.items()}
    shares = []
    for t in range(steps):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, g in values_of(model, grads).items():
            v[name] = memory * v[name] + (1 - memory) * (g * z[name]) ** 2
        part, within = divmod(t, steps // (stages + 1))
        if part and not within:
            counts = {name: int(mask.sum()) for name, mask in stays.items()}
            scores = {}
            for name in counts:
                scores[name] = v[name] / slope_of(cost, counts, name) ** power
            limit = 1 - (1 - target) * (1 - (1 - part / stages) ** 2)
            stays = chosen_by_hand(cost, scores, stays, floors, limit)
            shares.append(flops_of(cost, {name: mask.sum() for name, mask in stays.items()}))
        left = steps // (stages + 1) - within
        z = {name: np.where(stays[name], x, x * (1 - 1 / left)) for name, x in z.items()}
        for name, found in values_of(model, params).items():
            np.testing.assert_allclose(found, z[name], rtol=1e-5, atol=1e-7)
    assert 1 > shares[0] > shares[2]
    assert target >= shares[2] <= shares[1] <= shares[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_that_goes_at_once_would_fit_the_budget(seed):
    model = dhp.with_gates(filled(Coarse, seed), rngs=nnx.Rngs(1))
    cost = dhp.measure_cost(model, (6, 6, 1))
    tx = dhp.fade_to_budget(optax.sgd(0.01), model, cost, steps=2, stages=1, power=0.5, flops=0.45)
    params = nnx.state(model, nnx.Param)
    state = tx.init(params)
    rng = np.random.default_rng(seed)
    for _ in range(2):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    nnx.update(model, params)
    counts = {n: int(np.sum(np.asarray(z.value()) != 0)) for n, z in dhp.latents(model).items()}
    assert cost.shares(counts)["flops"] <= 0.45
    for name, z in prunable(model).items():
        if counts[name] < z.size:
            assert cost.shares(counts | {name: counts[name] + 1})["flops"] > 0.45


@pytest.mark.parametrize(
    ("seed", "stages", "multiple_of"),
    [(0, 1, 2), (1, 3, 3), *(pytest.param(n, 2, 1 + n, marks=pytest.mark.slow) for n in (2, 3))],
)
def test_entries_go_in_groups_that_leave_multiples(seed, stages, multiple_of):
    model = dhp.with_gates(filled(Coarse, seed), rngs=nnx.Rngs(1))
    cost = dhp.measure_cost(model, (6, 6, 1))
    given = {"steps": stages + 1, "stages": stages, "memory": 0.0, "multiple_of": multiple_of}
    tx = dhp.fade_to_budget(optax.sgd(0.01), model, cost, power=0, flops=0.45, **given)
    params = nnx.state(model, nnx.Param)
    state, rng = tx.init(params), np.random.default_rng(seed)
    for _ in range(stages + 1):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        before = {name: z != 0 for name, z in values_of(model, params).items()}
        terms = {name: g**2 for name, g in values_of(model, grads).items()}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, z in values_of(model, params).items():
            stays, went = terms[name][z != 0], terms[name][before[name] & (z == 0)]
            assert (z != 0).sum() in (z.size, *range(multiple_of, z.size, multiple_of))
            assert (z != 0).sum() >= prunable(model)[name].min_channels
            assert not went.size or stays.min() >= went.max()
    nnx.update(model, params)
    counts = {n: int(np.sum(np.asarray(z.value()) != 0)) for n, z in dhp.latents(model).items()}
    assert cost.shares(counts)["flops"] <= 0.45
    rounded = [name for name, z in prunable(model).items() if counts[name] < z.size]
    assert rounded
    for name in rounded if stages == 1 else ():
        wider = min(counts[name] + multiple_of, prunable(model)[name].size)
        assert cost.shares(counts | {name: wider})["flops"] > 0.45


def test_where_nothing_can_go_all_stays():
    model = dhp.with_gates(filled(Mixed), rngs=nnx.Rngs(1))
    sizes = {name: z.size for name, z in prunable(model).items()}
    cost = dhp.measure_cost(model, MIXED_INPUT)
    given = {"steps": 2, "stages": 1, "multiple_of": sizes, "flops": 1.0}
    tx = dhp.fade_to_budget(optax.sgd(0.01), model, cost, **given)
    params = nnx.state(model, nnx.Param)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert all((z == 1).all() for z in values_of(model, params).values())


def stays_plainly(cost, average, z, removed, most):
    """What stays, one group after another; of groups of equal scores those of the first latent."""
    scores = {name: np.where(z[name] != 0, average[name], np.float32(-1)) for name in z}
    orders = {name: np.argsort(score, kind="stable") for name, score in scores.items()}
    groups = [
        (scores[name][orders[name][end - 1]], name, end, before)
        for name, ends in removed.items()
        for before, end in zip([0, *ends], ends, strict=False)
    ]
    groups.sort(key=lambda group: group[0])
    counts = {name: x.size for name, x in z.items()}

    def fits(counts):
        amounts = cost.amounts({**cost.sizes, **counts})
        return all(amounts[name] <= limit for name, limit in most.items())

    for _, name, end, _ in groups:
        if fits(counts):
            break
        counts[name] = z[name].size - end
    alive = {name: int((x != 0).sum()) for name, x in z.items()}
    counts = {name: min(count, alive[name]) for name, count in counts.items()}
    for _, name, end, before in reversed(groups):
        size = z[name].size
        wider = {**counts, name: size - before}
        if counts[name] == size - end and size - before <= alive[name] and fits(wider):
            counts = wider
    return {
        name: np.isin(np.arange(x.size), orders[name][x.size - counts[name] :]) & (x != 0)
        for name, x in z.items()
    }


@pytest.mark.parametrize(
    ("multiple_of", "budget"), [(1, ["flops"]), (2, ["params", "activations"]), (3, ["flops"])]
)
def test_a_choice_is_bit_for_bit_that_of_one_group_after_another(multiple_of, budget):
    model = filled(Coarse)
    cost = dhp.measure_cost(model, (6, 6, 1))
    found = dict(sorted(prunable(model).items()))  # as JAX has the keys of a dictionary
    sizes = {name: z.size for name, z in found.items()}
    removed = {name: np.array(removals(z, multiple_of), int) for name, z in found.items()}
    shares = np.linspace(1, 0.3, 8)
    limits = {name: (shares * getattr(cost, name)).astype(np.int64) for name in budget}
    choice = jax.jit(lambda *given: entries_that_stay(*given, cost, removed, 0, limits))
    rng, left = np.random.default_rng(multiple_of), []
    for _ in range(24):
        stage = rng.integers(8)
        average = {n: rng.integers(0, 9, k).astype(np.float32) for n, k in sizes.items()}  # ties
        gone = rng.choice([0, 0.2, 0.5])
        z = {name: (rng.random(k) >= gone).astype(np.float32) for name, k in sizes.items()}
        most = {name: limit[stage] for name, limit in limits.items()}
        expected = stays_plainly(cost, average, z, removed, most)
        found = choice(average, z, stage)
        for name, mask in expected.items():
            np.testing.assert_array_equal(found[name], mask)
        left.append(sum(mask.sum() for mask in found.values()) / sum(sizes.values()))
    assert min(left) < 0.5 < max(left)


def test_the_program_of_a_choice_grows_as_the_number_of_latents():
    def operations(number):
        """Of layers each of which reads what all before it have made."""
        names = [f"z{i}" for i in range(number)]
        calls = []
        for i in range(1, number):
            read = Width(8 * i, 0, tuple((name, 1) for name in names[:i]))
            made = Width(8, 0, ((names[i], 1),))
            terms = (Product(9, (read, made)),), (Product(9, (read, made)),), (Product(4, (made,)),)
            calls.append(LayerCost(f"layers.{i}", "HyperConv", read, made, *terms))
        cost = Cost.of_calls(calls, dict.fromkeys(names, 8))
        removed, limits = dict.fromkeys(names, np.arange(1, 7)), {"flops": np.array([cost.flops])}
        z = dict.fromkeys(names, jax.ShapeDtypeStruct((8,), jnp.float32))
        return count_operations(
            lambda *given: entries_that_stay(*given, 0, cost, removed, 1.0, limits),
            z,
            z,
            names=None,
        )

    few, more, most = map(operations, (6, 12, 24))
    assert most - more <= 2 * (more - few)
    assert more - few <= 6 * 60


def counts_after_one_choice(dtype, size, target):
    """Counts after a search of two steps; gradients of latents fall from twice `size` to it."""
    model = dhp.with_gates(filled(Coarse), rngs=nnx.Rngs(1))
    cost = dhp.measure_cost(model, (6, 6, 1))
    tx = dhp.fade_to_budget(optax.sgd(0.01), model, cost, steps=2, stages=1, power=0, flops=target)
    params = jax.tree.map(lambda p: p.astype(dtype), nnx.state(model, nnx.Param))
    state = tx.init(params)
    for _ in range(2):
        grads = jax.tree.map(lambda p: jnp.linspace(2 * size, size, p.size, dtype=dtype), params)
        grads = jax.tree.map(lambda g, p: g.reshape(p.shape), grads, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    nnx.update(model, params)
    kept = {name: np.asarray(z.value()) != 0 for name, z in dhp.latents(model).items()}
    return cost, {name: int(mask.sum()) for name, mask in kept.items()}, kept


def test_a_budget_is_not_exceeded_by_less_than_float32_can_tell():
    cost, counts, _ = counts_after_one_choice(jnp.float32, 1, 0.5)
    reached = cost.shares(counts)["flops"]
    target = reached * (1 - 1e-9)
    _, counts, _ = counts_after_one_choice(jnp.float32, 1, target)
    assert cost.shares(counts)["flops"] <= target


def test_small_gradients_of_float16_rank_as_those_of_float32():
    _, _, narrow = counts_after_one_choice(jnp.float16, 1e-4, 0.5)
    _, _, wide = counts_after_one_choice(jnp.float32, 1e-4, 0.5)
    for name, mask in wide.items():
        assert np.array_equal(narrow[name], mask)
    assert not all(mask.all() for mask in wide.values())


def test_all_but_latents_is_trained_as_the_optimizer_says_and_gates_that_stay_are_1():
    model, cost = gated()
    inner = optax.adam(0.01)
    tx = dhp.fade_to_budget(inner, model, cost, steps=4, stages=1, flops=0.6)
    params = nnx.state(model, nnx.Param)
    state, alone = tx.init(params), inner.init(params)
    for k in range(4):
        grads = jax.tree.map(lambda p, k=k: jnp.cos(k + 7 * p), params)
        updates, state = tx.update(grads, state, params)
        wanted, alone = inner.update(grads, alone, params)
        wanted = dict(nnx.to_flat_state(wanted))
        for path, update in nnx.to_flat_state(updates):
            if path[-1] != "vector":
                np.testing.assert_allclose(update[...], wanted[path][...], rtol=1e-6)
        params = optax.apply_updates(params, updates)
    nnx.update(model, params)
    values = np.concatenate([z.value() for z in dhp.latents(model).values()])
    assert set(values.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("of_latents", [100.0, np.nan])
def test_gradients_of_latents_do_not_scale_down_those_of_all_else(of_latents):
    model, cost = gated()
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    tx = dhp.fade_to_budget(inner, model, cost, steps=4, stages=1, flops=0.6)
    params = nnx.state(model, nnx.Param)
    flat = nnx.to_flat_state(params)
    grads = nnx.from_flat_state(
        [
            (path, p.replace(jnp.full(p[...].shape, of_latents if path[-1] == "vector" else 1.0)))
            for path, p in flat
        ]
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = {path: np.asarray(u[...]) for path, u in nnx.to_flat_state(updates)}
    others = [u for path, u in moved.items() if path[-1] != "vector"]
    norm = np.sqrt(sum(u.size for u in others))
    for update in others:
        np.testing.assert_allclose(update, -1 / norm, rtol=1e-4)


def test_parameters_may_be_latent_vectors_and_others():
    model, cost = gated()
    tx = dhp.fade_to_budget(optax.sgd(0.01), model, cost, steps=6, stages=2, flops=0.5)
    graphdef, vectors, others, rest = nnx.split(model, dhp.LatentVector, nnx.Param, ...)
    params = vectors, others
    state = tx.init(params)
    gradient = jax.jit(jax.grad(lambda p: loss(nnx.merge(graphdef, *p, rest, copy=True))))
    update = jax.jit(tx.update)
    for _ in range(6):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    assert shares_left(nnx.merge(graphdef, *params, rest), cost)["flops"] <= 0.5


class WithVector(Mixed):
    """A network with a parameter of its own that has the name of a latent's vector."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.vector = nnx.Param(jnp.zeros(5))

    def __call__(self, x):
        return super().__call__(x) + self.vector[...]


def test_a_parameter_named_as_latents_are_is_trained_and_values_are_handed_on():
    model = dhp.with_gates(filled(WithVector), rngs=nnx.Rngs(1))
    cost = dhp.measure_cost(model, MIXED_INPUT)
    tx = dhp.fade_to_budget(optax.scale(-0.5), model, cost, steps=20, flops=0.5)
    params = nnx.state(model, nnx.Param)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params, value=1.0)
    assert (updates["vector"][...] == -0.5).all()
    assert not any(
        update.any() for update in jax.tree.leaves(nnx.filter_state(updates, dhp.LatentVector))
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"^steps: expected a positive integer, got 0"),
        ({"steps": 6}, r"^steps: expected more than the 6 stages, got 6"),
        ({"stages": 0}, r"^stages: expected a positive integer, got 0"),
        ({"power": -1}, r"^power: expected a number >= 0, got -1"),
        ({"memory": 1}, r"^memory: expected a number in \[0, 1\), got 1"),
        ({"flops": 0.01}, r"^flops: 0.01 cannot be reached"),
        ({"multiple_of": 0}, r"^multiple_of: expected an integer of at least 1, .* got 0"),
        ({"flops": 2}, r"^flops: expected a share in \(0, 1\], got 2"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    model, cost = gated()
    with pytest.raises(ValueError, match=message):
        dhp.fade_to_budget(optax.sgd(0.1), model, cost, **{"steps": 20, "flops": 0.5} | arguments)


def test_a_network_without_gates_is_refused():
    model = filled(Mixed)
    cost = dhp.measure_cost(model, MIXED_INPUT)
    message = "^model: expected a network of dhp.with_gates, got a Mixed that has none$"
    with pytest.raises(ValueError, match=message):
        dhp.fade_to_budget(optax.sgd(0.1), model, cost, steps=20, flops=0.5)


def test_what_is_no_optimizer_or_no_cost_is_refused():
    model, cost = gated()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    for inner, got in [(0.1, "0.1"), (optimizer, "a Optimizer"), (None, "None")]:
        message = rf"^inner: expected an optax transformation, such as optax.sgd\(0.1\), got {got}$"
        with pytest.raises(ValueError, match=message):
            dhp.fade_to_budget(inner, model, cost, steps=20, flops=0.5)
    with pytest.raises(
        ValueError, match=r"^cost: expected what dhp.measure_cost returns, got None$"
    ):
        dhp.fade_to_budget(optax.sgd(0.1), model, None, steps=20, flops=0.5)


def test_parameters_of_another_model_are_refused():
    model, cost = gated()
    tx = dhp.fade_to_budget(optax.sgd(0.1), model, cost, steps=20, flops=0.5)
    with pytest.raises(ValueError, match=r"^fade_to_budget: params: expected those of the model"):
        tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}), {"w": jnp.ones(3)})


def test_two_copies_of_the_parameters_are_refused():
    model, cost = gated()
    tx = dhp.fade_to_budget(optax.sgd(0.1), model, cost, steps=20, flops=0.5)
    params = nnx.state(model, nnx.Param)
    with pytest.raises(ValueError, match=r"with 4 latent vectors; got 8$"):
        tx.update((params, params), tx.init((params, params)), (params, params))


def test_it_may_be_made_where_the_learning_rate_is_traced():
    model, cost = gated()

    @optax.inject_hyperparams
    def fading(learning_rate):
        return dhp.fade_to_budget(optax.sgd(learning_rate), model, cost, steps=20, flops=0.5)

    params, tx = nnx.state(model, nnx.Param), fading(learning_rate=0.1)
    _, state = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert set(state.inner_state.keep) == set(prunable(model))


@pytest.mark.parametrize(
    ("other", "told"),
    [(0.3, True), (1e-4, False), (0, False), (1, False), (np.array([0.3, 1.2]), False)],
)
def test_survivors_of_a_search_that_has_not_ended_are_told(other, told, recwarn):
    model, _ = gated()
    for z in prunable(model).values():
        z.vector.set_value(jnp.ones(z.size).at[:2].set(other))
    dhp.survivors(model)
    assert [str(w.message)[:36] for w in recwarn] == ["survivors: 6 of 18 gates are neither"] * told
    for z in prunable(model).values():  # what stands behind a fade may scale all gates
        z.vector.set_value(1.15 * z.vector[...])
    recwarn.clear()
    dhp.survivors(model)
    assert len(recwarn) == told
    for z in prunable(model).values():
        z.vector.set_metadata(prunable=False)
    recwarn.clear()
    assert all(mask.all() for mask in dhp.survivors(model).values())
    assert not recwarn.list


class Given(Classification):
    """Classification of a network's inputs as they are."""

    def augmented(self, key, examples):
        return examples


@functools.cache
def faulty_steps():
    """A search of 20 steps that leaves out those whose gradients are not finite."""
    model, cost = gated()
    budget = {"flops": 0.5, "params": 0.6}
    sgd = optax.sgd(0.02, momentum=0.9)
    tx = dhp.fade_to_budget(sgd, model, cost, steps=20, stages=3, **budget)
    graphdef, optimizer, state = start(model, lambda params: tx)
    task = Given((0.0,), (1.0,))
    step = jax.jit(make_step(graphdef, optimizer, task, 16, skip_faulty=True))
    return cost, budget, graphdef, state, step


@pytest.mark.parametrize(
    "left_out",
    [
        pytest.param({5}, id="at the first choice"),
        pytest.param({15}, id="at the last choice"),
        pytest.param({9, 10, 11}, id="around a choice"),
        pytest.param({5, 6, 7, 8, 9, 12, 15, 16, 17, 18}, id="all of a part, and all but a step"),
        pytest.param({13, 18, 19}, id="at the end"),
    ],
)
def test_a_step_that_is_left_out_loses_no_choice(left_out):
    cost, budget, graphdef, state, step = faulty_steps()
    for k in range(20):
        images = np.full_like(IMAGES, np.nan) if k in left_out else IMAGES
        state = step(state, (images, jnp.asarray(LABELS)), jax.random.key(k))
    assert int(state.measures.skipped) == len(left_out)
    after = nnx.merge(graphdef, *state.params, state.rest)
    left = shares_left(after, cost)
    assert any(left[name] > share for name, share in budget.items()) == (19 in left_out)
    after, early = finish_fade(after)
    assert (early > 0) == (19 in left_out)
    left = shares_left(after, cost)
    assert all(left[name] <= share for name, share in budget.items())
    values = np.concatenate([z.value() for z in dhp.latents(after).values()])
    assert set(values.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_gradients_that_are_not_finite_count_for_nothing_and_the_fade_goes_on(value):
    model, cost = gated()
    inner = optax.apply_if_finite(optax.sgd(0.01), 3)
    tx = dhp.fade_to_budget(inner, model, cost, steps=8, stages=1, flops=0.6)
    params = nnx.state(model, nnx.Param)
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(8):
        finite = jax.tree.map(lambda p, k=k: jnp.cos(k + 7 * p), params)
        grads = jax.tree.map(lambda g: jnp.full_like(g, value), params) if k in (2, 7) else finite
        before = state.average
        updates, state = update(grads, state, params)
        for name in state.average if k in (2, 7) else ():
            np.testing.assert_array_equal(state.average[name], before[name])
        params = optax.apply_updates(params, updates)
    nnx.update(model, params)
    assert shares_left(model, cost)["flops"] <= 0.6
    values = np.concatenate([z.value() for z in dhp.latents(model).values()])
    assert set(values.tolist()) == {0.0, 1.0}


def half_open(model, rng):
    """Closes some gates of each latent at random; what is open, by name."""
    open_ = {}
    for name, z in prunable(model).items():
        mask = rng.permutation(z.size) < rng.integers(max(z.min_channels, z.size // 2), z.size)
        z.vector.set_value(jnp.asarray(mask, jnp.float32))
        open_[name] = mask
    return open_


@pytest.mark.parametrize("seed", SEEDS)
def test_a_budget_that_open_gates_fit_keeps_just_these(seed):
    model, cost = gated()
    rng = np.random.default_rng(seed)
    open_ = half_open(model, rng)
    left = shares_left(model, cost)["flops"]
    kept = dhp.prune_to(model, MIXED_INPUT, flops=min(1.0, left + rng.uniform(0, 0.05)))
    survivors = architecture_of(kept).survivors
    assert {name: survivors[name] for name in open_} == {
        name: tuple(np.flatnonzero(mask).tolist()) for name, mask in open_.items()
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_a_smaller_budget_takes_the_open_gates_of_the_smallest_group_norms(seed):
    model, cost = gated()
    open_ = half_open(model, np.random.default_rng(seed))
    norms = dhp.group_scores(model)
    left = shares_left(model, cost)["flops"]
    kept = dhp.prune_to(model, MIXED_INPUT, flops=0.8 * left)
    survivors = architecture_of(kept).survivors
    gone = 0
    for name, mask in open_.items():
        stay = np.isin(np.arange(mask.size), survivors[name])
        assert not (stay & ~mask).any()
        lost = mask & ~stay
        gone += lost.sum()
        assert norms[name][lost].max(initial=0) <= norms[name][stay].min()
    assert gone
