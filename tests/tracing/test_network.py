"""A network that nobody wrote for pruning, as one of latents: from its weights to files."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from restricted import randomised

import dhp_jax as dhp


class Net(nnx.Module):
    """A residual network with a hidden layer."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.first, self.second = (nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(2))
        self.hidden, self.head = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = (x + self.second(nnx.relu(self.first(x)))).mean((1, 2))
        return self.head(nnx.relu(self.hidden(x)))


SHAPE = (8, 8, 3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, *SHAPE)), jnp.float32)


def plain():
    model = randomised(Net(nnx.Rngs(0)))
    model.eval()
    return model


def compiled(model, x):
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s, copy=True)(x))(state, x))


@pytest.mark.parametrize("options", [{}, {"embedding": 8}, {"gates_above": 0}])
def test_before_training_it_computes_what_the_network_does_to_the_bit(options):
    model = plain()
    net = dhp.with_latents(model, SHAPE, **options)
    np.testing.assert_array_equal(net(X), model(X))
    np.testing.assert_array_equal(compiled(net, X), compiled(model, X))
    assert type(net) is Net
    assert {name: z.size for name, z in dhp.latents(net).items()} == {
        "stem": 8,
        "first": 8,
        "hidden": 16,
    }


def test_without_a_latent_there_is_nothing_left_of_what_it_rules():
    net = dhp.with_latents(plain(), SHAPE)
    z = dhp.latents(net)["first"]
    z.vector.set_value(z.vector[...].at[3].set(0))
    assert (np.asarray(net.first.kernel[...])[..., 3] == 0).all()
    assert (np.asarray(net.second.kernel[...])[:, :, 3] == 0).all()
    assert np.abs(np.asarray(net.first.kernel[...])[..., 2]).min() > 0


def test_training_reaches_latents_and_weights_and_the_proximal_step_shrinks_latents_alone():
    net = dhp.with_latents(plain(), SHAPE, embedding=2)
    net.train()
    mask = dhp.prunable_latents(nnx.state(net, nnx.Param))
    shrink = optax.masked(dhp.prox_l1(strength=1.0, learning_rate=0.1), mask)
    optimizer = nnx.Optimizer(net, optax.chain(optax.sgd(1e-3), shrink), wrt=nnx.Param)
    before = {path: np.asarray(x.get_value()) for path, x in nnx.to_flat_state(nnx.state(net))}
    grads = nnx.grad(lambda net: (net(X) ** 2).mean())(net)
    latents = [x for _, x in nnx.to_flat_state(grads) if isinstance(x, dhp.LatentVector)]
    assert len(latents) == 3
    assert all(np.abs(np.asarray(x.get_value())).sum() > 0 for x in latents)
    optimizer.update(net, grads)
    for path, leaf in nnx.to_flat_state(nnx.state(net)):
        after = np.asarray(leaf.get_value())
        if isinstance(leaf, dhp.LatentVector):
            assert (after < before[path] - 0.05).all()
        elif path[-1] in ("w2", "mean"):
            assert not np.array_equal(after, before[path])


def test_what_is_pruned_is_the_network_without_what_is_gone_and_comes_back_from_a_file(tmp_path):
    model = plain()
    net = dhp.with_latents(model, SHAPE)
    small = dhp.prune_to(net, flops=0.5, by=dhp.l1_scores(net), keep={"hidden": 0.75})
    small.eval()
    assert (small.hidden.in_features, small.hidden.out_features) == (small.stem.out_features, 16)
    whole, left = dhp.measure_cost(model, SHAPE), dhp.measure_cost(small, SHAPE)
    assert 0.4 < left.flops / whole.flops <= 0.5
    dhp.save(tmp_path / "small", small, input_shape=SHAPE)
    np.testing.assert_array_equal(dhp.load(tmp_path / "small", build=Net)(X), small(X))
    dhp.save(tmp_path / "net", net)
    loaded = dhp.load(tmp_path / "net", build=Net)
    np.testing.assert_array_equal(loaded(X), net(X))
    again = dhp.prune_to(loaded, flops=0.5, by=dhp.l1_scores(loaded), keep={"hidden": 0.75})
    again.eval()
    np.testing.assert_array_equal(again(X), small(X))
    twice = dhp.prune_to(dhp.with_latents(small, SHAPE, min_channels=2), flops=0.5)
    twice.eval()
    dhp.save(tmp_path / "twice", twice)
    np.testing.assert_array_equal(dhp.load(tmp_path / "twice", build=Net)(X), twice(X))


def test_costs_of_survivors_are_those_of_the_smaller_network():
    net = dhp.with_latents(plain(), SHAPE)
    cost = dhp.measure_cost(net, SHAPE)
    rng = np.random.default_rng(0)
    for _ in range(3):
        keep = {
            n: rng.permutation(z.size) < rng.integers(4, z.size)
            for n, z in dhp.latents(net).items()
        }
        small = dhp.prune(net, keep)
        found = dhp.measure_cost(small, SHAPE)
        counts = {name: int(mask.sum()) for name, mask in keep.items()}
        assert cost.amounts(counts) == found.amounts({})
        a, b, c = (counts[name] for name in ("stem", "first", "hidden"))
        flops = 64 * (9 * (3 * a + 2 * a * b) + 2 * a) + a * c + 4 * c
        assert found.flops == flops
        assert found.params == sum(x.size for x in jax.tree.leaves(nnx.state(small, nnx.Param)))
        assert int(jax.jit(lambda c: cost.amounts(c)["flops"])(counts)) == flops


def test_the_plain_form_of_a_family_is_pruned_as_its_declared_latents_are():
    declared = dhp.models.build("resnet", depth=8, width=0.5, num_classes=10, rngs=nnx.Rngs(0))
    ordinary = dhp.prune(declared)
    net = dhp.with_latents(ordinary, (16, 16, 3))
    ours, theirs = list(dhp.l1_scores(net).values()), list(dhp.l1_scores(declared).values())
    for score in theirs:  # the declared last stage stays
        assert any(len(o) == len(score) and np.allclose(o, score, rtol=1e-6) for o in ours)
    assert len(ours) == len(theirs) + 1
    found = dhp.measure_cost(net, (16, 16, 3))
    expected = dhp.measure_cost(declared, (16, 16, 3))
    assert (found.flops, found.params) == (expected.flops, expected.params)
    last = {"blocks.2.projection.conv": 1.0}
    small = dhp.prune_to(net, flops=0.5, by=dhp.l1_scores(net), keep=last)
    other = dhp.prune_to(declared, (16, 16, 3), flops=0.5, by=dhp.l1_scores(declared))
    shapes = [sorted(x.shape for x in jax.tree.leaves(nnx.state(m))) for m in (small, other)]
    assert shapes[0] == shapes[1]


def test_what_stays_is_told_with_its_reason():
    told = str(dhp.explain(dhp.with_latents(plain(), SHAPE)))
    assert "  stem: 8 entries, with first, hidden, norm" in told
    assert "conv_general_dilated meets an axis that stays at" in told  # the image's channels
    assert "  the windows of kernels: 3" in told.splitlines()
    assert max(map(len, told.splitlines())) <= 80
    assert "it is an output of the network" in told
    assert "test_network.py:" in told


def test_a_network_of_which_nothing_can_go_is_refused_with_the_place():
    class Fixed(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.b(self.a(x) * jnp.arange(1.0, 7.0))

    with pytest.raises(ValueError, match=r"^model: nothing of it can be pruned.*test_network.py:"):
        dhp.with_latents(Fixed(nnx.Rngs(0)), (4,))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"no": 0.5}, r"^keep: expected one of first, hidden, stem; got 'no'"),
        ({"stem": 2}, r"^keep\['stem'\]: expected a share in \(0, 1\], got 2"),
    ],
)
def test_least_shares_that_are_none_are_refused(keep, message):
    net = dhp.with_latents(plain(), SHAPE)
    with pytest.raises(ValueError, match=message):
        dhp.prune_to(net, flops=0.9, keep=keep)


def test_channels_over_which_a_softmax_or_maximum_goes_may_go_and_that_is_told():
    class Gated(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)

        def __call__(self, x):
            x = self.a(x)
            return self.b(nnx.softmax(x, -1) * x.max(-1, keepdims=True))

    model = randomised(Gated(nnx.Rngs(0)))
    net = dhp.with_latents(model, (3,), min_channels=2)
    assert "a: a maximum or softmax goes over it at tracing/test_network.py:" in str(
        dhp.explain(net)
    )
    keep = np.arange(6) % 3 > 0
    small = dhp.prune(net, {"a": keep})
    x = np.asarray(X[:, 0, 0], np.float64)
    left = (x @ np.asarray(model.a.kernel[...]) + np.asarray(model.a.bias[...]))[:, keep]
    powers = np.exp(left)
    y = powers / powers.sum(1, keepdims=True) * left.max(1, keepdims=True)
    expected = y @ np.asarray(model.b.kernel[...])[keep] + np.asarray(model.b.bias[...])
    np.testing.assert_allclose(small(x), expected, rtol=1e-4, atol=1e-5)
