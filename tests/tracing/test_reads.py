"""What one mode alone reads: gates close it in both modes, and scores know it."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.provenance import architecture_of
from dhp_jax.tracing.reads import all_reads, read_axes

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 6)).astype(np.float32)


class Auxiliary(nnx.Module):
    """A head of one layer or two for training alone beside a main one, a layer or a sum."""

    def __init__(self, rngs, *, deep=False, summed=False):
        self.a = nnx.Linear(6, 9, use_bias=False, rngs=rngs)
        self.main = None if summed else nnx.Linear(9, 3, rngs=rngs)
        self.hidden = nnx.Linear(9, 7, rngs=rngs) if deep else None
        self.aux = nnx.Linear(7 if deep else 9, 3, rngs=rngs)
        self.deterministic = False

    def features(self, x):
        return nnx.relu(self.a(x))

    def heads(self, h):
        y = jnp.abs(h).sum(-1, keepdims=True) if self.main is None else self.main(h)
        z = h if self.hidden is None else jnp.tanh(self.hidden(h))
        return y if self.deterministic else y + self.aux(z)

    def __call__(self, x):
        return self.heads(self.features(x))


KINDS = {
    "one layer": {},
    "two layers": {"deep": True},
    "the only layer": {"summed": True},
    "the only two layers": {"deep": True, "summed": True},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
modes = pytest.mark.parametrize("training", [True, False])


def in_mode(model, training):
    model.train() if training else model.eval()
    return model


def squares(network, x):
    return jnp.mean(network(x) ** 2)


@kinds
def test_closed_gates_compute_what_the_pruned_network_computes_in_both_modes(options):
    net = dhp.with_latents(Auxiliary(nnx.Rngs(0), **options), X.shape[1:], min_channels=1)
    gated = dhp.with_gates(net, rngs=nnx.Rngs(0))
    keep = {name: np.arange(z.size) % 3 > 0 for name, z in dhp.latents(gated).items()}
    small = dhp.prune(net, keep)
    before = [np.asarray(in_mode(gated, training)(X)) for training in (True, False)]
    for name, z in dhp.latents(gated).items():
        z.vector.set_value(jnp.asarray(keep[name], jnp.float32))
    for training, whole in zip((True, False), before, strict=True):
        found, expected = (np.asarray(in_mode(m, training)(X)) for m in (gated, small))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert np.abs(whole - expected).max() > 0.1


@kinds
@modes
def test_taylor_terms_are_derivatives_by_factors_of_channels_in_each_mode(options, training):
    model = Auxiliary(nnx.Rngs(0), **options)
    net = in_mode(dhp.with_latents(model, X.shape[1:], min_channels=1), training)
    in_mode(model, training)
    h = model.features(X)
    expected = jax.grad(lambda g: jnp.mean(model.heads(h * g) ** 2))(jnp.ones(9))
    found = dhp.taylor_scores(net, squares, [X], squared=False)["a"]
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, np.abs(expected), rtol=1e-4, atol=1e-6)


def test_gates_have_the_derivatives_of_the_loss_of_the_auxiliary_head():
    model = in_mode(Auxiliary(nnx.Rngs(0)), training=True)
    net = dhp.with_latents(model, X.shape[1:], min_channels=1)
    gated = in_mode(dhp.with_gates(net, rngs=nnx.Rngs(0)), training=True)
    h, weights = model.features(X), jnp.arange(3.0)

    def auxiliary(network, x):
        return ((network(x) - network.main(network.features(x))) * weights).mean()

    expected = jax.grad(lambda g: (model.aux(h * g) * weights).mean())(jnp.ones(9))
    found = dhp.gradient_scores(gated, auxiliary, [X])["a"]
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, np.abs(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_kernels_that_are_stacked_of_arrays_are_read(axis):
    arrays = {
        name: RNG.normal(size=n) for name, n in {"a": (6, 9), "b": (9, 3), "c": (9, 3)}.items()
    }

    def forward(p, x, factors=1.0):
        kernels = jnp.moveaxis(jnp.stack([p["b"], p["c"]], axis), axis, 0)
        h = nnx.relu(x @ p["a"]) * factors
        return h @ (kernels[0] * 2) + jnp.tensordot(h, kernels, (1, 1)).sum(1)

    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
    net = dhp.with_latents(dhp.FromFunction(lambda p, x: forward(p, x), arrays), X.shape[1:])
    ((name, found),) = dhp.taylor_scores(net, squares, [X], squared=False).items()
    expected = jax.grad(lambda g: jnp.mean(forward(arrays, X, g) ** 2))(jnp.ones(9))
    np.testing.assert_allclose(found, np.abs(expected), rtol=1e-4, atol=1e-6)
    filters = np.abs(np.asarray(arrays["a"], np.float64)).sum(0)
    np.testing.assert_allclose(dhp.l1_scores(net)[name], filters / filters.mean(), rtol=1e-5)


def test_filters_are_those_of_each_kernel_where_convolutions_are_batched():
    shapes = {"a": (3, 3, 2, 6), "b": (2, 3, 3, 6, 5), "c": (5, 3)}
    arrays = {name: jnp.asarray(RNG.normal(size=n), jnp.float32) for name, n in shapes.items()}

    def convolved(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def forward(p, x):
        h = jnp.stack([nnx.relu(convolved(x, p["a"]))] * 2)
        return nnx.relu(jax.vmap(convolved)(h, p["b"])).mean((0, 2, 3)) @ p["c"]

    net = dhp.with_latents(dhp.FromFunction(forward, arrays), (4, 4, 2))
    found = dhp.l1_scores(net)
    for name, axes in {"a": (0, 1, 2), "b": (0, 1, 2, 3)}.items():
        filters = np.abs(np.asarray(arrays[name], np.float64)).sum(axes)
        np.testing.assert_allclose(found[name], filters / filters.mean(), rtol=1e-5)


@pytest.mark.parametrize("deep", [False, True])
def test_slices_that_a_head_reads_are_no_filters(deep):
    model = Auxiliary(nnx.Rngs(0), deep=deep)
    net = dhp.with_latents(model, X.shape[1:], min_channels=1)
    makers = {"a": model.a, "hidden": model.hidden} if deep else {"a": model.a}
    for name, layer in makers.items():
        filters = np.asarray(layer.kernel[...], np.float64).T
        apart = np.linalg.norm(filters[:, None] - filters, axis=-1).sum(1)
        for score, numbers in (
            (dhp.l1_scores, np.abs(filters).sum(1)),
            (dhp.l2_scores, np.linalg.norm(filters, axis=1)),
            (dhp.fpgm_scores, apart),
        ):
            np.testing.assert_allclose(score(net)[name], numbers / numbers.mean(), rtol=1e-5)


def test_axes_that_either_mode_reads_are_read():
    model = Auxiliary(nnx.Rngs(0), deep=True)
    net = dhp.with_latents(model, X.shape[1:], min_channels=1)
    analysis = architecture_of(net).axes.analysis(model)
    found = read_axes(analysis, all_reads(analysis))
    expected = {f"{name}.kernel": {0} for name in ("a", "main", "hidden", "aux")}
    assert {name: set(axes) for name, axes in found.items() if axes} == expected


class Attention(nnx.Module):
    """Queries and keys of one array each, or of one for both."""

    def __init__(self, rngs, *, fused, tied=False):
        make = functools.partial(nnx.Linear, 6, rngs=rngs)
        self.both = make(10) if fused else None
        self.q, self.k = (None, None) if fused else (make(5), make(5))
        self.v, self.out = nnx.Linear(6, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        if tied:
            self.k = self.q

    def __call__(self, x, factors=None):
        q, k = jnp.split(self.both(x), 2, -1) if self.both else (self.q(x), self.k(x))
        q = q if factors is None else q * factors
        weights = nnx.softmax(jnp.einsum("bqd,bkd->bqk", q, k), -1)
        return self.out(jnp.tanh(jnp.einsum("bqk,bkd->bqd", weights, self.v(x))))


class Positive(nnx.Module):
    """A kernel that is not zero where its array is."""

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, factors=None):
        h = nnx.relu(self.first(x))
        h = h if factors is None else h * factors
        return h @ jax.nn.softplus(self.last.kernel[...])


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(Attention, fused=False),
        functools.partial(Attention, fused=True),
        functools.partial(Attention, fused=False, tied=True),
        Positive,
    ],
    ids=["separate", "fused", "tied", "softplus"],
)
def test_derivatives_of_gates_and_taylor_terms_are_those_of_a_factor_of_the_channels(build):
    x = RNG.normal(size=(4, 5, 6)).astype(np.float32)
    model = build(nnx.Rngs(0))
    expected = jax.grad(lambda factors: jnp.mean(model(x, factors) ** 2))(jnp.ones(5))
    net = dhp.with_latents(model, x.shape[1:], min_channels=1)
    (name,) = (name for name, z in dhp.latents(net).items() if z.size == 5)
    terms = dhp.taylor_scores(net, squares, [x], squared=False)[name]
    np.testing.assert_allclose(terms, np.abs(expected), rtol=1e-3, atol=1e-6)
    gates = dhp.with_gates(net, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(dhp.gradient_scores(gates, squares, [x])[name], terms, rtol=1e-3)
