"""Kernels that are not in proportion to their arrays: gates and Taylor terms of what they read."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dhp_jax as dhp

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4)).astype(np.float32)
ARRAYS = {
    "a": RNG.normal(size=(4, 8)).astype(np.float32),
    "c": RNG.normal(size=8).astype(np.float32),
    "b": RNG.normal(size=(8, 3)).astype(np.float32),
}


def squares(network, x):
    return jnp.mean(network(x) ** 2)


def rounded(b):
    step = jnp.abs(b).max() / 7
    return b + jax.lax.stop_gradient(jnp.round(b / step) * step - b)


@jax.custom_vjp
def signs(b):
    return jnp.sign(b) * jnp.abs(b).mean()


signs.defvjp(lambda b: (signs(b), None), lambda _, slopes: (slopes,))


@jax.custom_jvp
def reversed_derivative(b):
    return b


reversed_derivative.defjvp(lambda given, slopes: (given[0], -slopes[0]))

BENT = {
    "tanh": jnp.tanh,
    "square": jnp.square,
    "square with sign": lambda b: b * jnp.abs(b),
    "normalised": lambda b: b / jnp.linalg.norm(b, axis=0),
    "sign": lambda b: jnp.sign(b) * 0.3,
    "ternary": lambda b: jnp.where(jnp.abs(b) > 0.3, jnp.sign(b), 0.0),
    "large ones": lambda b: jnp.where(jnp.abs(b) > 0.3, b, 0.0),
    "straight through": lambda b: b + jax.lax.stop_gradient(jnp.sign(b) - b),
    "rounded": rounded,
    "own derivative": signs,
    "reversed derivative": reversed_derivative,
    "integers": lambda b: jnp.round(b * 10).astype(jnp.int8).astype(jnp.float32) / 10,
    "fixed": jax.lax.stop_gradient,
}
STRAIGHT = {
    "as it is": lambda b: b,
    "scaled": lambda b: -(b.T.T.astype(jnp.float32) * jnp.arange(1.0, 4)) / 2,
    "masked": lambda b: jnp.where(jnp.arange(3) > 0, b, 0),
    "mixed": lambda b: b @ jnp.ones((3, 3)) + b[:, ::-1],
    "looped": lambda b: jax.lax.fori_loop(0, 2, lambda _, k: k * 2, b),
    "magnitudes": jnp.abs,
}


def two_layers(kernel, act=nnx.relu):
    """A function of two layers, which takes factors of its hidden channels, and its network."""

    def forward(p, x, factors=1.0):
        return (act(x @ p["a"] + p["c"]) * factors) @ kernel(p["b"])

    return forward, dhp.FromFunction(lambda p, x: forward(p, x), ARRAYS)


def slopes(loss, size):
    return np.asarray(jax.grad(loss)(jnp.ones(size)), np.float64)


def closed_and_pruned(model, net, gates, name, x):
    """What closed gates and the pruned network compute; open ones compute what the model does."""
    np.testing.assert_array_equal(gates(x), model(x))
    keep = {n: np.ones(z.size, bool) for n, z in dhp.latents(net).items()}
    keep[name][::3] = False
    dhp.latents(gates)[name].vector.set_value(jnp.asarray(keep[name], jnp.float32))
    return gates(x), dhp.prune(net, keep)(x)


OF_THE_WHOLE = ("normalised", "rounded", "own derivative")  # kernels where a row changes others
KERNELS = [*BENT.items(), *STRAIGHT.items()]
CLOSE = [name for name in BENT if name not in OF_THE_WHOLE]
CASES = [pytest.param(nnx.relu, kernel, name in CLOSE, id=name) for name, kernel in KERNELS]
CASES += [pytest.param(act, rounded, False, id=act.__name__) for act in (nnx.leaky_relu, jnp.abs)]


@pytest.mark.parametrize(("act", "kernel", "close"), CASES)
def test_taylor_terms_are_derivatives_by_factors_of_channels_whatever_the_kernel(
    act, kernel, close
):
    """And where no row of the kernel changes others, closed gates are pruned channels."""
    forward, model = two_layers(kernel, act)
    expected = np.abs(slopes(lambda g: jnp.mean(forward(ARRAYS, X, g) ** 2), 8))
    assert expected.max() > 0.1
    net = dhp.with_latents(model, X.shape[1:], min_channels=1)
    (name,) = dhp.latents(net)
    terms = dhp.taylor_scores(net, squares, [X], squared=False)[name]
    np.testing.assert_allclose(terms, expected, rtol=1e-4, atol=1e-6)
    gates = dhp.with_gates(net, rngs=nnx.Rngs(0))
    found = dhp.gradient_scores(gates, squares, [X])[name]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    if close:
        found, expected = closed_and_pruned(model, net, gates, name, X)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class Quantised(nnx.Module):
    """Convolutions of rounded kernels with BatchNorm between, and a residual branch."""

    def __init__(self, rngs):
        make = {"use_bias": False, "padding": "SAME", "rngs": rngs}
        self.convs = nnx.List(
            [nnx.Conv(3, 6, (3, 3), **make), *(nnx.Conv(6, 6, (3, 3), **make) for _ in range(2))]
        )
        self.norms = nnx.List([nnx.BatchNorm(6, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(6, 3, rngs=rngs)
        for norm in self.norms:
            for array in (norm.scale, norm.bias, norm.mean):
                array.set_value(jnp.asarray(RNG.normal(size=6), jnp.float32))

    def layer(self, n, x):
        kernel, numbers = self.convs[n].kernel[...], ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, rounded(kernel), (1, 1), "SAME", dimension_numbers=numbers
        )
        return self.norms[n](x)

    def __call__(self, x, stream=1.0, inside=1.0):
        x = nnx.relu(self.layer(0, x))
        h = nnx.relu(self.layer(1, x * stream)) * inside
        x = nnx.relu(x + self.layer(2, h)) * stream
        return x.mean((1, 2)) @ rounded(self.head.kernel[...])


@pytest.mark.parametrize("training", [True, False])
def test_taylor_terms_of_quantised_convolutions_are_right_behind_batch_norm(training):
    x = RNG.normal(size=(4, 5, 5, 3)).astype(np.float32)
    model = Quantised(nnx.Rngs(0))
    net = dhp.with_latents(model, x.shape[1:], min_channels=1)
    for each in (model, net):
        each.train() if training else each.eval()
    found = dhp.taylor_scores(net, squares, [x], squared=False)
    assert len(found) == 2
    graphdef, state = nnx.split(model)
    for k in range(2):

        def loss(g, k=k):
            network = nnx.merge(graphdef, state, copy=True)
            return jnp.mean(network(x, **{("stream", "inside")[k]: g}) ** 2)

        expected = np.abs(slopes(loss, 6))
        (score,) = (s for n, s in found.items() if ("1" in n) == bool(k))
        assert expected.max() > 1e-3
        np.testing.assert_allclose(score, expected, rtol=1e-3, atol=1e-6)


def test_of_arrays_that_make_channels_one_after_another_the_last_counts():
    def forward(p, x, factors=1.0):
        h = jnp.where(x @ p["a"] > 0.2, x @ p["a"], 0) * p["c"]
        return (h * factors) @ nnx.softplus(p["b"])

    expected = np.abs(slopes(lambda g: jnp.mean(forward(ARRAYS, X, g) ** 2), 8))
    model = dhp.FromFunction(lambda p, x: forward(p, x), ARRAYS)
    net = dhp.with_latents(model, X.shape[1:], min_channels=1)
    (found,) = dhp.taylor_scores(net, squares, [X], squared=False).values()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("kernel", [rounded, jnp.tanh])
def test_what_no_gate_can_close_in_proportion_stays_and_has_no_taylor_terms(kernel):
    _, model = two_layers(kernel, jnp.tanh)
    net = dhp.with_latents(model, X.shape[1:], min_channels=1)
    (name,) = dhp.latents(net)
    with pytest.warns(
        UserWarning, match=f"^with_gates: '{name}': all entries stay, for .* in prop"
    ):
        gates = dhp.with_gates(net, rngs=nnx.Rngs(0))
    assert dhp.latents(gates)[name].min_channels == 8
    with pytest.raises(ValueError, match=f"^model: expected channels .*; those of latent '{name}'"):
        dhp.taylor_scores(net, squares, [X])


class OfIntegers(nnx.Module):
    """Two kernels, of which some are of integers, each a hundred times what is used."""

    def __init__(self, names):
        def param(name, *shape):
            dtype = jnp.int8 if name in names else jnp.float32
            numbers = np.random.default_rng(0).integers(-100, 100, shape)
            return nnx.Param(jnp.asarray(numbers, dtype))

        self.a, self.b = param("a", 4, 8), param("b", 8, 3)

    def __call__(self, x, factors=1.0):
        a, b = (array[...].astype(jnp.float32) * 0.01 for array in (self.a, self.b))
        return (nnx.relu(x @ a) * factors) @ b


@pytest.mark.parametrize("names", ["a", "b"])
def test_gates_and_taylor_terms_are_of_the_arrays_that_are_not_of_integers(names):
    model = OfIntegers(names)
    net = dhp.with_latents(model, X.shape[1:], min_channels=1)
    (name,) = dhp.latents(net)
    expected = np.abs(slopes(lambda g: jnp.mean(model(X, g) ** 2), 8))
    found = dhp.taylor_scores(net, squares, [X], squared=False)[name]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    gates = dhp.with_gates(net, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(dhp.gradient_scores(gates, squares, [X])[name], expected, rtol=1e-4)
    closed, pruned = closed_and_pruned(model, net, gates, name, X)
    np.testing.assert_allclose(closed, pruned, rtol=1e-5)
    dhp.latents(gates)[name].vector.set_value(jnp.full(8, 0.9))
    np.testing.assert_allclose(gates(X), 0.9 * model(X), rtol=1e-5)


def test_where_all_arrays_are_of_integers_gates_and_taylor_terms_are_refused():
    net = dhp.with_latents(OfIntegers("ab"), X.shape[1:], min_channels=1)
    told = "^model: expected floating-point numbers where latent 'a' is .* gates; 'a' is of int8$"
    for refused in (
        lambda: dhp.with_gates(net, rngs=nnx.Rngs(0)),
        lambda: dhp.taylor_scores(net, squares, [X]),
    ):
        with pytest.raises(ValueError, match=told):
            refused()
