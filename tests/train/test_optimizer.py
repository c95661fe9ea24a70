"""SGD and Adam with weight decay, and the proximal step on prunable latents alone."""

from flax import nnx
import jax
import jax.numpy as jnp
from networks import Mixed, filled
import numpy as np
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.backend.hypernets import pack_axes
from dhp_jax.core.latent import prunable_latents
from dhp_jax.train.optimizer import is_kernel, largest_to_vanish, optimizer, shrink_latents
from dhp_jax.train.schedules import decay_schedule, drop_schedule

LR = 0.5


class Axes(nnx.Module):
    """Latents of several kinds, and a weight."""

    def __init__(self, rngs):
        self.wide = dhp.Latent(6, min_channels=2, rngs=rngs)
        self.other = dhp.Latent(5, min_channels=4, rngs=rngs)
        self.fixed = dhp.Latent(4, prunable=False, min_channels=1, rngs=rngs)
        self.weight = nnx.Param(jnp.zeros(3))


def parameters(**values):
    """The state of `Axes` with the given values."""
    model = filled(Axes)
    for name, value in values.items():
        variable = model.weight if name == "weight" else getattr(model, name).vector
        variable[...] = jnp.asarray(value, jnp.float32)
    return nnx.state(model, nnx.Param)


def stepped(params, transformation, steps=1):
    """Parameters after steps with a gradient of zero."""
    state = transformation.init(params)
    for _ in range(steps):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = transformation.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    return params


def value(params, name):
    return np.asarray(params[name].vector[...])


# Optimizers


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 1e-2), (0.0, 1e-2), (0.9, 0.0)])
def test_sgd_is_that_of_the_textbook(momentum, weight_decay):
    rng = np.random.default_rng(0)
    schedule = drop_schedule(0.3, (1,), steps_per_epoch=2)
    sgd = optimizer("sgd", schedule, momentum=momentum, weight_decay=weight_decay)
    params = jnp.asarray(rng.normal(size=5), jnp.float32)
    state = sgd.init(params)
    expected, velocity = np.asarray(params, np.float64), np.zeros(5)
    for step in range(5):
        gradient = rng.normal(size=5)
        updates, state = sgd.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        velocity = momentum * velocity + gradient + weight_decay * expected
        expected = expected - (0.3 if step < 2 else 0.03) * velocity
        np.testing.assert_allclose(params, expected, rtol=1e-5, atol=1e-6)


def test_adam_is_that_of_the_textbook():
    rng = np.random.default_rng(0)
    adam = optimizer("adam", lambda step: 0.1, momentum=0.8, weight_decay=1e-2)
    params = jnp.asarray(rng.normal(size=5), jnp.float32)
    state = adam.init(params)
    expected, first, second = np.asarray(params, np.float64), np.zeros(5), np.zeros(5)
    for step in range(1, 5):
        gradient = rng.normal(size=5)
        updates, state = adam.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        gradient = gradient + 1e-2 * expected
        first = 0.8 * first + 0.2 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rescaled = first / (1 - 0.8**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        expected = expected - 0.1 * rescaled
        np.testing.assert_allclose(params, expected, rtol=1e-4, atol=1e-6)


def test_adamw_is_that_of_the_textbook():
    rng = np.random.default_rng(0)
    adamw = optimizer("adamw", lambda step: 0.1, momentum=0.8, weight_decay=0.2)
    params = jnp.asarray(rng.normal(size=5), jnp.float32)
    state = adamw.init(params)
    expected, first, second = np.asarray(params, np.float64), np.zeros(5), np.zeros(5)
    for step in range(1, 5):
        gradient = rng.normal(size=5)
        updates, state = adamw.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        first = 0.8 * first + 0.2 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rescaled = first / (1 - 0.8**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        expected = expected - 0.1 * (rescaled + 0.2 * expected)
        np.testing.assert_allclose(params, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", [0.5, 1.0, 20.0])
def test_a_gradient_is_scaled_down_to_the_largest_norm_before_weights_decay(norm):
    sgd = optimizer("sgd", lambda step: 1.0, momentum=0.0, weight_decay=0.1, clip=norm)
    params = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([[3.0]])}
    gradient = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([[4.0]])}  # of norm 5
    updates, _ = sgd.update(gradient, sgd.init(params), params)
    share = min(1, norm / 5)
    for name, values in gradient.items():
        np.testing.assert_allclose(updates[name], -(share * values + 0.1 * params[name]))


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        *(("sgd", False), ("adamw", True)),
        *(pytest.param(n, False, marks=pytest.mark.slow) for n in ("adam", "adamw")),
    ],
)
def test_decay_of_kernels_leaves_out_latents_biases_and_norms(monkeypatch, name, packed):
    if packed:
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    model = pack_axes(filled(Mixed))
    monkeypatch.undo()
    params = nnx.state(model, nnx.Param)
    given = {"momentum": 0.0, "weight_decay": 0.5, "decayed": "kernels"}
    after = jax.jit(lambda p: stepped(p, optimizer(name, lambda step: 0.1, **given)))(params)
    moved = {
        ".".join(map(str, path))
        for path, variable in nnx.to_flat_state(params)
        if not np.array_equal(variable[...], dict(nnx.to_flat_state(after))[path][...])
    }
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    kept = {path for path in paths if path.endswith((".bias", ".scale", ".vector"))}
    assert len(kept) > 5
    assert moved == paths - kept
    assert (model.left.b0[...].ndim == 1) == packed


class Named(nnx.Module):
    """Arrays of one's own by the names that hypernetworks have for theirs."""

    def __init__(self, rngs):
        self.b1 = nnx.Param(jnp.ones(3))
        self.w1 = nnx.Linear(3, 3, rngs=rngs)
        self.b2 = nnx.BatchNorm(3, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.one = nnx.Linear(1, 3, rngs=rngs)
        self.gamma = nnx.Param(jnp.ones((1, 1, 1, 8)))
        self.positions = nnx.Param(jnp.ones((1, 4, 8)))


def test_names_of_hypernetworks_and_biases_of_several_axes_do_not_decide_what_decays():
    params = nnx.state(Named(nnx.Rngs(0)), nnx.Param)
    found = {".".join(map(str, p)): x for p, x in nnx.to_flat_state(is_kernel(params))}
    kernels = ["w1.kernel", *(f"attention.{n}.kernel" for n in ("query", "key", "value", "out"))]
    kernels += ["one.kernel", "positions"]
    assert params["attention"]["query"]["bias"][...].ndim == 2
    assert {name for name, decays in found.items() if decays} == set(kernels)


def test_an_unknown_optimizer_is_refused():
    message = "^optimizer.name: expected one of sgd, adam, adamw; got 'rmsprop'$"
    with pytest.raises(ValueError, match=message):
        optimizer("rmsprop", lambda step: 0.1, momentum=0.9, weight_decay=0.0)


def test_an_unknown_choice_of_what_decays_is_refused():
    message = "^optimizer.decayed: expected one of all, kernels; got 'none'$"
    with pytest.raises(ValueError, match=message):
        optimizer("sgd", lambda step: 0.1, momentum=0.9, weight_decay=0.1, decayed="none")


# What is shrunk


def test_the_mask_marks_each_prunable_latent_and_nothing_else():
    model = filled(Mixed)
    state = nnx.state(model, nnx.Param)
    mask = dict(nnx.to_flat_state(prunable_latents(state)))
    marked = [variable[...] for path, variable in nnx.to_flat_state(state) if mask[path]]
    expected = [z.value() for z in dhp.latents(model).values() if z.prunable]
    assert len(mask) == len(nnx.to_flat_state(state))
    assert sorted(map(list, marked)) == sorted(map(list, expected))
    assert len(marked) == 3


def test_only_prunable_latents_shrink_by_strength_times_learning_rate():
    z = [3.0, -2.0, 0.1, -0.1, 1.0, 0.0]
    before = parameters(
        wide=z, other=[1, 2, 3, 4, -5], fixed=[0.3, 0.2, -1, 2], weight=[0.01, 1, -1]
    )
    shrink = shrink_latents(before, strength=0.4, schedule=lambda step: LR, threshold=0.005)
    after = stepped(before, shrink)
    np.testing.assert_allclose(value(after, "wide"), [2.8, -1.8, 0, 0, 0.8, 0], rtol=1e-6)
    np.testing.assert_allclose(value(after, "other"), [0.8, 1.8, 2.8, 3.8, -4.8], rtol=1e-6)
    np.testing.assert_array_equal(value(after, "fixed"), value(before, "fixed"))
    np.testing.assert_array_equal(after["weight"][...], before["weight"][...])


def test_shrinking_follows_the_drops_of_the_schedule():
    before = parameters(wide=[5.0] * 6)
    schedule = drop_schedule(1.0, (1,), steps_per_epoch=2)
    shrink = shrink_latents(before, strength=0.1, schedule=schedule, threshold=0.0)
    for steps, amount in ((1, 0.1), (2, 0.2), (3, 0.21), (4, 0.22)):
        after = stepped(before, shrink, steps)
        np.testing.assert_allclose(value(after, "wide"), [5 - amount] * 6, rtol=1e-6)


@pytest.mark.parametrize(
    ("wide", "shrinks"),
    [
        ([1, 1, 1, 0, 0, 0], True),  # 3 entries reach the threshold, 2 are kept in any case
        ([1, 0.5, -0.5, 0.4, 0, 0], True),  # to reach it is enough, whatever the sign
        ([1, 1, 0.49, 0.49, 0.49, 0.49], False),
        ([1, 0.49, 0.49, 0.49, 0.49, 0.49], False),
    ],
)
def test_a_latent_shrinks_only_while_more_than_its_min_channels_reach_the_threshold(wide, shrinks):
    before = parameters(wide=wide, other=[1, -1, 1, 1, 1])
    shrink = shrink_latents(before, strength=0.2, schedule=lambda step: LR, threshold=0.5)
    after = stepped(before, shrink)
    expected = np.sign(wide) * np.maximum(np.abs(wide) - 0.1, 0) if shrinks else wide
    np.testing.assert_allclose(value(after, "wide"), expected, atol=1e-6)
    # Its neighbour has another number of channels to keep, and looks at itself alone.
    np.testing.assert_allclose(value(after, "other"), [0.9, -0.9, 0.9, 0.9, 0.9], rtol=1e-6)


def test_a_latent_looks_at_where_the_step_before_leads():
    before = parameters(wide=[1, 1, 0.6, 0, 0, 0])
    shrink = shrink_latents(before, strength=0.2, schedule=lambda step: LR, threshold=0.5)
    chain = optax.chain(optax.add_decayed_weights(-0.5), shrink)  # halves every parameter
    after = stepped(before, chain)
    np.testing.assert_allclose(value(after, "wide"), [0.5, 0.5, 0.3, 0, 0, 0], rtol=1e-6)


def test_latents_shrink_down_to_their_min_channels_and_no_further():
    before = parameters(wide=[0.9, -0.8, 0.7, -0.6, 0.5, 0.4], other=[0.9, 0.8, 0.7, 0.6, 0.5])
    shrink = shrink_latents(before, strength=0.02, schedule=lambda step: LR, threshold=0.05)
    after = stepped(before, shrink, steps=200)
    assert np.sum(np.abs(value(after, "wide")) >= 0.05) == 2
    assert np.sum(np.abs(value(after, "other")) >= 0.05) == 4
    assert np.all(np.abs(value(after, "wide"))[:2] > 0)


def test_a_network_without_latents_is_left_alone_and_that_is_told():
    params = nnx.state(dhp.prune(filled(Mixed)), nnx.Param)
    with pytest.warns(
        UserWarning, match=r"^prunable_latents: .* so nothing shrinks; dhp\.with_lat"
    ):
        shrink = shrink_latents(params, strength=1.0, schedule=lambda step: 1.0, threshold=0.0)
    before, after = jax.tree.leaves(params), jax.tree.leaves(stepped(params, shrink))
    assert len(before) == len(after) > 0
    for b, a in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_shrinking_is_the_same_inside_jit():
    before = parameters(wide=[3.0, -2.0, 0.1, -0.1, 1.0, 0.0])
    shrink = shrink_latents(before, strength=0.4, schedule=lambda step: LR, threshold=0.005)
    after = jax.jit(lambda params: stepped(params, shrink))(before)
    np.testing.assert_allclose(value(after, "wide"), [2.8, -1.8, 0, 0, 0.8, 0], rtol=1e-6)


def test_a_mask_of_bare_arrays_is_refused_rather_than_empty():
    with pytest.raises(ValueError, match=r"prunable_latents: expected a state of nnx\.Variables"):
        dhp.prunable_latents({"z": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"such as nnx\.state\(model, nnx\.Param\); got a Mixed"):
        dhp.prunable_latents(filled(Mixed))


# What a search can bring to zero


@pytest.mark.parametrize(
    ("name", "momentum", "weight_decay"),
    [("sgd", 0.0, 0.0), ("sgd", 0.0, 0.02), ("adam", 0.9, 0.0)],
)
def test_what_vanishes_under_a_flat_loss_is_what_was_said_to(name, momentum, weight_decay):
    schedule = drop_schedule(0.1, (1.5,), 10)
    steps = {"strength": 1.0, "threshold": 0.05}
    given = {"momentum": momentum, "weight_decay": weight_decay}
    largest = largest_to_vanish(name, schedule, 20, **steps, **given)
    taken = 15 * 0.1 + 5 * 0.01 + 0.05
    assert largest > 1.001 * taken if weight_decay else largest == pytest.approx(taken)
    before = parameters(wide=[largest - 1e-4, largest + 1e-4, 9, 9, 9, 9])
    shrink = shrink_latents(before, schedule=schedule, **steps)
    after = stepped(before, optax.chain(optimizer(name, schedule, **given), shrink), steps=20)
    gone, left, *_ = np.abs(value(after, "wide"))
    assert gone < 0.05 < left


def test_adamw_takes_its_share_whatever_the_momentum():
    given = {"strength": 0.0, "threshold": 0.05, "momentum": 0.9, "weight_decay": 0.5}
    found = largest_to_vanish("adamw", drop_schedule(0.1, (), 1), 20, **given)
    assert found == pytest.approx(0.05 / 0.95**20, rel=1e-5)


def test_momentum_makes_weight_decay_stronger_as_it_was_said_to():
    given = {"momentum": 0.9, "weight_decay": 1e-3}
    schedule = drop_schedule(0.1, (), 100)
    largest = largest_to_vanish("sgd", schedule, 2000, strength=0.01, threshold=0.05, **given)
    before = parameters(wide=[0.98 * largest, 1.02 * largest, 99, 99, 99, 99])
    shrink = shrink_latents(before, strength=0.01, schedule=schedule, threshold=0.05)
    chain = optax.chain(optimizer("sgd", schedule, **given), shrink)
    state, params = chain.init(before), before

    @jax.jit
    def step(params, state):
        updates, state = chain.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(2000):
        params, state = step(params, state)
    gone, left, *_ = np.abs(value(params, "wide"))
    assert gone < 0.05 < left


@pytest.mark.parametrize("steps", [50, 5000])
@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_what_vanishes_under_a_cosine_is_the_sum_of_its_steps(steps, weight_decay):
    given = {"momentum": 0.0, "weight_decay": weight_decay, "strength": 0.1, "threshold": 0.05}
    schedule = decay_schedule("cosine", 0.1, steps, 1, warmup=10)
    expected = 0.05
    for s in reversed(range(steps)):
        rise = 0.5 * (1 + np.cos(np.pi * (s - 10) / (steps - 10)))
        rate = 0.1 * ((s + 1) / 10 if s < 10 else rise)
        expected = (expected + 0.1 * rate) / (1 - weight_decay * rate)
    found = largest_to_vanish("sgd", schedule, steps, **given)
    assert found == pytest.approx(expected, rel=1e-3 if steps > 2000 else 1e-5)


@pytest.mark.parametrize("weight_decay", [1.0, 1e30])
def test_weight_decay_that_takes_all_leaves_nothing(weight_decay):
    found = largest_to_vanish(
        *("sgd", drop_schedule(1.0, (), 10_000), 10**8),
        **{"strength": 0.0, "threshold": 1e-3, "momentum": 0.0, "weight_decay": weight_decay},
    )
    assert found == np.inf


def test_super_resolution_shrinks_by_twice_as_much_in_2013_steps_an_epoch_as_in_1000():
    given = {"strength": 0.1, "threshold": 0.0, "momentum": 0.9, "weight_decay": 0.0}
    few, all_steps = (
        largest_to_vanish("adam", drop_schedule(1e-4, (40,), steps), 40 * steps, **given)
        for steps in (1000, 2013)
    )
    assert (few, all_steps) == (pytest.approx(0.4), pytest.approx(0.8052))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_nesterovs_sgd_is_that_of_the_textbook(momentum):
    rng = np.random.default_rng(0)
    sgd = optimizer("sgd", lambda step: 0.3, momentum=momentum, weight_decay=0.01, nesterov=True)
    params = jnp.asarray(rng.normal(size=5), jnp.float32)
    state, expected, velocity = sgd.init(params), np.asarray(params, np.float64), np.zeros(5)
    for _ in range(4):
        gradient = rng.normal(size=5)
        updates, state = sgd.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        gradient = gradient + 0.01 * expected
        velocity = momentum * velocity + gradient
        expected = expected - 0.3 * (gradient + momentum * velocity)
        np.testing.assert_allclose(params, expected, rtol=1e-5)
