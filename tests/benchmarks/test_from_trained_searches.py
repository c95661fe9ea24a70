"""The searches that `benchmarks/from_trained.py` tries beside the library's."""

from pathlib import Path
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dhp_jax as dhp

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import from_trained_programs
import from_trained_searches as searches

RATES = np.linspace(0.05, 0.01, 10)


@pytest.fixture(scope="module")
def net():
    return from_trained_programs.Network(8, jnp.float32)


@pytest.fixture(scope="module")
def arrays(net):
    return net.fresh(0)


@pytest.mark.parametrize("name", ["gates, l1", "gates, l1 relative to the axis"])
def test_a_rule_is_the_proximal_step_of_its_term(name):
    """No point near the result has less of the term and half the squared distance."""
    rng = np.random.default_rng(0)
    z, amount = rng.normal(size=8).astype(np.float32), 0.3
    found = np.asarray(searches.RULES[name](z, amount, 1.0), np.float64)
    strength = amount * (np.abs(z).mean() if "relative" in name else 1)

    def total(x):
        return strength * np.abs(x).sum() + ((x - z) ** 2).sum() / 2

    near = [found + step for step in rng.normal(scale=1e-3, size=(200, 8))]
    assert total(found) <= min(map(total, near)) + 1e-6
    assert 0 < np.sum(found == 0) < len(found)


def test_polarisation_parts_small_latents_from_large_ones():
    z = np.array([0.2, 0.4, 0.9, 1.3], np.float32)
    found = np.asarray(searches.polarised(z, 0.01, 1.0))
    expected = z - 0.01 * (1.2 - np.array([-1, -1, 1, 1]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_dearest_channel_has_the_whole_strength(net, arrays):
    model = searches.with_costs(net, dhp.with_gates(net.model(arrays), rngs=nnx.Rngs(0)))
    costs = {name: dhp.latents(model)[name].vector[...] for name in net.prunable}
    saved = {}
    for name in net.prunable:
        counts = net.sizes | {name: net.sizes[name] - 1}
        saved[name] = net.cost.flops - net.cost.amounts(counts)["flops"]
    for name, cost in costs.items():
        np.testing.assert_allclose(cost, float(saved[name]) / float(max(saved.values())), rtol=1e-4)


@pytest.mark.parametrize("name", ["gates, l1", "gates, l1, Adam", "gates, l1 per flop"])
def test_latents_that_the_loss_does_not_hold_end_at_zero(net, arrays, name):
    """All but the last step, which would leave none, and those that cost less than others."""
    model, transformation = searches.gates(name, net, arrays, RATES, 1.0)
    params = nnx.state(model, nnx.Param)
    state = transformation.init(params)
    for _ in RATES:
        updates, state = transformation.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    last = 1 / len(RATES) if "Adam" in name else RATES[-1] / RATES.sum()
    nnx.update(model, params)
    ends = {name: z.vector[...] for name, z in dhp.latents(model).items() if z.prunable}
    if "flop" not in name:
        for z in ends.values():
            np.testing.assert_allclose(z, last, rtol=1e-3)
    else:
        costs = dhp.latents(searches.with_costs(net, model))
        dearest = max(ends, key=lambda name: float(costs[name].vector[0]))
        np.testing.assert_allclose(ends[dearest], last, rtol=1e-3)
        for name, z in ends.items():
            cost = costs[name].vector[...]
            np.testing.assert_allclose(z, np.where(cost < 1, 1 - cost, last), rtol=1e-3)
    kept = {name: z.vector[...] for name, z in dhp.latents(model).items() if not z.prunable}
    assert all((z == 1).all() for z in kept.values())


def test_a_group_is_all_that_a_cut_removes(net):
    """Without statistics: all arrays with an axis that gets shorter when one entry is pruned."""
    whole = {name: np.ones(size, bool) for name, size in net.sizes.items()}
    before = {name: v.shape for name, (_, v) in net.variables.items()}
    for latent in ("stages.0", "blocks.1.hidden.0"):
        mask = np.arange(net.sizes[latent]) > 0
        after, _ = net.split(dhp.prune(net.latents, whole | {latent: mask}))
        shorter = {
            (name, axis)
            for name, x in after.items()
            for axis, (size, left) in enumerate(zip(before[name], x.shape, strict=True))
            if left < size
        }
        assert set(searches.members(net, latent)) == shorter


def test_a_step_of_the_group_lasso_shortens_norms_by_as_much(net, arrays):
    model, transformation = searches.grouped(net, arrays, RATES, 0.5)
    params = nnx.state(model, nnx.Param)
    weights, _ = net.split(model)
    norms = {
        latent: np.sqrt(
            sum(
                (np.moveaxis(np.asarray(weights[part], np.float64), axis, 0) ** 2)
                .reshape(net.sizes[latent], -1)
                .sum(1)
                for part, axis in searches.members(net, latent)
            )
        )
        for latent in net.prunable
    }
    mean = np.concatenate(list(norms.values())).mean()
    amount = 0.5 * RATES[0] / RATES.sum() * mean
    # The gradient takes the weight decay back, so that the proximal step is all that is left.
    against = jax.tree.map(lambda x: -from_trained_programs.WEIGHT_DECAY * x, params)
    updates, _ = transformation.update(against, transformation.init(params), params)
    nnx.update(model, optax.apply_updates(params, updates))
    found, _ = net.split(model)
    for name, x in weights.items():
        expected = np.asarray(x, np.float64)
        for latent in net.prunable:
            for part, axis in searches.members(net, latent):
                if part == name:
                    shape = [1] * expected.ndim
                    shape[axis] = -1
                    factor = np.maximum(1 - amount / norms[latent], 0)
                    expected = expected * factor.reshape(shape)
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-6)
