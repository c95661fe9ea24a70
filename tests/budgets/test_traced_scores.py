"""Scores and gates of a traced network are those of its twin with declared latents."""

import functools
from types import SimpleNamespace

from flax import nnx
import jax
import jax.numpy as jnp
from networks import RNGS, filled, run
import numpy as np
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.budgets import selection
from dhp_jax.budgets.limits import with_limits
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.surgery import prune as cut
from dhp_jax.tracing.programs import EVALUATION, default_call, trace_program
from dhp_jax.tracing.reads import all_reads, by_array, operands, read_axes
from dhp_jax.tracing.weights import SCALED, weights_of

SHAPE = (16, 16, 3)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(8, *SHAPE)).astype(np.float32)
LABELS = np.arange(8) % 10


@functools.cache
def twins(depth):
    """A ResNet of declared latents, its plain form as one of traced latents, and their names."""
    declared = filled(
        lambda _: dhp.models.build("resnet", depth=depth, width=0.5, num_classes=10, rngs=RNGS)
    )
    net = dhp.with_latents(dhp.prune(declared), SHAPE)
    ours, theirs = dhp.l1_scores(net), dhp.l1_scores(declared)
    names = {}
    for name, score in theirs.items():
        (names[name],) = [
            other
            for other, found in ours.items()
            if found.shape == score.shape and np.allclose(found, score, rtol=1e-6)
        ]
    (last,) = ours.keys() - set(names.values())  # the declared last stage stays
    return declared, net, names, last


def loss(network, batch):
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(network(images), labels).mean()


@pytest.mark.parametrize(
    "score",
    [
        dhp.l1_scores,
        dhp.l2_scores,
        dhp.fpgm_scores,
        dhp.group_scores,
        dhp.scale_scores,
        lambda model: dhp.taylor_scores(model, loss, [(IMAGES, LABELS)]),
    ],
)
def test_scores_are_the_same_numbers(score):
    declared, net, names, last = twins(8)
    for model in (declared, net):
        model.eval()
    theirs, ours = score(declared), score(net)
    assert ours.keys() == {*names.values(), last}
    for name, numbers in theirs.items():
        assert numbers.std() > 0
        np.testing.assert_allclose(ours[names[name]], numbers, rtol=1e-3, atol=1e-7)


def test_the_same_scores_leave_the_same_survivors():
    declared, net, names, last = twins(8)
    scores = dhp.random_scores(declared, 0)
    ours = {names[name]: numbers for name, numbers in scores.items()}
    ours[last] = np.ones(dhp.latents(net)[last].size)
    small = dhp.prune_to(net, flops=0.5, by=ours, keep={last: 1.0})
    other = dhp.prune_to(declared, SHAPE, flops=0.5, by=scores)
    small.eval(), other.eval()
    assert jax.tree.map(jnp.shape, nnx.state(small)) == jax.tree.map(jnp.shape, nnx.state(other))
    (found, _), (expected, _) = run(small, IMAGES), run(other, IMAGES)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gates_have_the_same_derivatives_and_fade_to_the_same_survivors():
    declared, net, names, last = twins(8)
    nets = [dhp.with_gates(model, rngs=nnx.Rngs(1)) for model in (declared, net)]
    nets[1] = with_limits(nets[1], {last: 1.0})
    for model in (net, *nets):
        model.eval()
    np.testing.assert_array_equal(dhp.prune(nets[1])(IMAGES), dhp.prune(net)(IMAGES))
    slopes = [dhp.gradient_scores(model, loss, [(IMAGES, LABELS)]) for model in nets]
    for name, other in names.items():
        np.testing.assert_allclose(slopes[1][other], slopes[0][name], rtol=1e-3, atol=1e-5)
    left = []
    for model in nets:
        model.train()
        cost = dhp.measure_cost(model, SHAPE)
        tx = dhp.fade_to_budget(optax.sgd(0.01), model, cost, steps=8, stages=2, flops=0.6)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda m: loss(m, (IMAGES, LABELS)))(model))

        for _ in range(8):
            step(model, optimizer)
        keep = {n: np.asarray(z.value()) != 0 for n, z in dhp.latents(model).items()}
        assert 0.4 < cost.shares({n: int(k.sum()) for n, k in keep.items()})["flops"] <= 0.6
        left.append(keep)
    for name, other in names.items():
        np.testing.assert_array_equal(left[1][other], left[0][name])
    small = cut(nets[1], left[1])
    for model in (small, nets[1]):
        model.eval()
    np.testing.assert_allclose(small(IMAGES), nets[1](IMAGES), rtol=1e-4, atol=1e-5)


class Attention(nnx.Module):
    """Heads that code keeps, dimensions of query and key that no kernel reads, and a raw array."""

    def __init__(self, rngs):
        def array(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / 3)

        self.inputs = nnx.Linear(5, 8, rngs=rngs)
        self.query, self.key, self.value = array(8, 6), array(8, 6), array(7, 8)
        self.output = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        x = self.inputs(x)
        query, key = x @ self.query[...], jnp.einsum("btc,cd->btd", x, self.key[...])
        weights = nnx.softmax(query @ key.swapaxes(1, 2) * 0.3, -1)
        return self.output(weights @ (x @ self.value[...].T))


def test_which_axes_kernels_read_is_seen_in_the_program():
    model = Attention(nnx.Rngs(0))
    net = dhp.with_latents(model, (4, 5), min_channels=2)
    analysis = architecture_of(net).axes.analysis(model)
    reads = read_axes(analysis, all_reads(analysis))
    expected = {"query": {0}, "key": {0}, "value": {1}}
    expected |= {"inputs.kernel": {0}, "output.kernel": {0}}
    assert {name: set(axes) for name, axes in reads.items() if axes} == expected
    scores = dhp.l1_scores(net)
    kernel = np.abs(np.asarray(model.value[...], np.float64)).sum(1)
    by_size = {len(score): score for score in scores.values()}
    np.testing.assert_allclose(by_size[7], kernel / kernel.mean(), rtol=1e-6)


def blurred(x):
    kernel = np.ones((3, 3, 1, x.shape[-1]), np.float32)
    numbers, groups = ("NHWC", "HWIO", "NHWC"), x.shape[-1]
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


@pytest.mark.parametrize(
    ("made", "kernel", "others", "never"),
    [
        (nnx.sigmoid, lambda b: jnp.clip(b, -1, 1), "", ""),
        (nnx.sigmoid, lambda b: jnp.where(b > 0.1, b, 0), "", ""),
        (nnx.sigmoid, lambda b: jnp.clip(b, 0.1, 1), "", "ab"),
        (nnx.sigmoid, lambda b: b**-1, "", "ab"),
        (lambda x: blurred(nnx.sigmoid(x)), lambda b: b, "", ""),
        (lambda x: blurred(nnx.sigmoid(x)), nnx.softplus, "", "ab"),
        (lambda x: blurred(nnx.relu6(x)), nnx.softplus, "ab", ""),
        (lambda x: nnx.max_pool(nnx.relu(x), (2, 2)), lambda b: b - b.mean(0), "ab", ""),
    ],
)
def test_which_axes_zeros_close_is_seen_in_the_program(made, kernel, others, never):
    def forward(p, x):
        return made(x @ p["a"]) @ kernel(p["b"])

    model = dhp.FromFunction(forward, {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 2))})
    program = trace_program(model, default_call, (jnp.ones((1, 4, 4, 3)),))
    analysis = SimpleNamespace(programs={EVALUATION: program}, names=program.names)
    read = all_reads(analysis)
    named = [by_array(analysis, axes) for axes in (read.others, read.never)]
    found = [{(a, k) for a, axes in one.items() for k in axes} for one in named]
    axes = {"a": ("a", 1), "b": ("b", 0)}
    assert found == [{axes[a] for a in told} for told in (others, never)]


def test_gates_of_what_no_kernel_reads_close_all_that_it_is_in():
    model = Attention(nnx.Rngs(0))
    net = dhp.with_latents(model, (4, 5), min_channels=2)
    gates = dhp.with_gates(net, rngs=nnx.Rngs(0))
    x = RNG.normal(size=(2, 4, 5)).astype(np.float32)
    keep = {n: np.arange(z.size) % 3 > 0 for n, z in dhp.latents(gates).items()}
    small = cut(gates, keep)
    np.testing.assert_array_equal(gates(x), model(x))
    for name, z in dhp.latents(gates).items():
        z.vector.set_value(jnp.asarray(keep[name], jnp.float32))
    np.testing.assert_allclose(gates(x), small(x), rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(gates(x)) - np.asarray(model(x))).max() > 0.01
    with pytest.raises(ValueError, match=r"^model: a network of gates is not saved"):
        dhp.save("nowhere", gates)


@pytest.mark.slow
def test_kernels_of_experts_that_the_input_chooses_are_read_and_gated():
    def forward(p, x):
        h = jnp.tanh(x @ p["inputs"])
        chosen = p["up"][jnp.argmax(h @ p["route"], -1)]
        return jnp.einsum("bd,bdh->bh", h, chosen) @ p["out"]

    rng = np.random.default_rng(0)
    shapes = {"inputs": (5, 6), "route": (6, 3), "up": (3, 6, 8), "out": (8, 2)}
    params = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    net = dhp.with_latents(dhp.FromFunction(forward, params), (5,), min_channels=2)
    gates, x = dhp.with_gates(net, rngs=nnx.Rngs(0)), rng.normal(size=(4, 5)).astype(np.float32)
    for z in dhp.latents(gates).values():
        z.vector.set_value(jnp.asarray(np.arange(z.size) % 3 > 0, jnp.float32))
    left = dict(params)
    for name, axis in (("inputs", 1), ("route", 0), ("up", 1), ("up", 2), ("out", 0)):
        kept = np.flatnonzero(np.arange(left[name].shape[axis]) % 3)
        left[name] = np.take(left[name], kept, axis)
    np.testing.assert_allclose(gates(x), forward(left, x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_gates_close_what_positive_kernels_read_and_leave_what_they_cannot_close():
    def forward(p, x):
        h = nnx.relu(x @ p["inputs"] + p["bias"]) @ nnx.softplus(p["grown"])
        query, key = (nnx.elu(h @ p[name]) + 1 for name in ("query", "key"))
        return jnp.einsum("bqd,bkd->bqk", query, key) @ (h @ p["value"]) @ p["out"]

    rng = np.random.default_rng(0)
    shapes = {"inputs": (5, 6), "bias": (6,), "grown": (6, 4), "query": (4, 6), "key": (4, 6)}
    shapes |= {"value": (4, 6), "out": (6, 2)}
    params = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    net = dhp.with_latents(dhp.FromFunction(forward, params), (3, 5), min_channels=2)
    with pytest.warns(UserWarning, match=r"^with_gates: 'query': all entries stay"):
        gates = dhp.with_gates(net, rngs=nnx.Rngs(0))
    found, x = dhp.latents(gates), rng.normal(size=(2, 3, 5)).astype(np.float32)
    least = {name: z.min_channels for name, z in found.items()}
    assert least == {"grown": 2, "inputs": 2, "query": 6, "value": 2}
    np.testing.assert_allclose(gates(x), forward(params, x), rtol=1e-5)
    left, kept = dict(params), np.array([1, 2, 4, 5])
    for name, axis in (("inputs", 1), ("bias", 0), ("grown", 0), ("value", 1), ("out", 0)):
        left[name] = np.take(left[name], kept, axis)
    for name in ("inputs", "value"):
        found[name].vector.set_value(jnp.zeros(6).at[kept].set(1))
    np.testing.assert_allclose(gates(x), forward(left, x), rtol=1e-4)


def test_group_norms_rank_where_no_latent_was_searched():
    net = dhp.with_latents(Attention(nnx.Rngs(0)), (4, 5), min_channels=2)
    x = RNG.normal(size=(2, 4, 5)).astype(np.float32)
    small, by_norms = (dhp.prune_to(net, flops=0.6, by=by) for by in (None, dhp.group_scores(net)))
    np.testing.assert_array_equal(small(x), by_norms(x))
    for z in dhp.latents(net).values():  # the first entries are the largest
        z.vector.set_value(jnp.linspace(1, 0.1, z.size))
    searched = dhp.prune_to(net, flops=0.6)
    width = searched.inputs.out_features
    assert 2 <= width < 8
    np.testing.assert_array_equal(
        searched.inputs.kernel[...], dhp.prune(net).inputs.kernel[...][:, :width]
    )
    assert np.abs(np.asarray(small(x)) - np.asarray(searched(x))).max() > 0.01


class Scaled(nnx.Module):
    """A layer of one's own, of which group norms know nothing."""

    def __init__(self, z, *, rngs):
        self.z, self.scale = z, nnx.Param(jax.random.normal(rngs.params(), (z.size,)))


def test_a_latent_that_no_norms_rank_asks_for_scores():
    model = Scaled(dhp.Latent(6, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    model.z.vector.set_value(jnp.linspace(1, 0.1, 6))
    assert selection.default_scores(model) is None
    model.z.vector.set_value(jnp.ones(6))
    with pytest.raises(ValueError, match=r"^by: expected scores by latent, .* 'z' has none$"):
        selection.default_scores(model)


def test_latents_that_were_trained_but_not_searched_rank_nothing():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    net = dhp.with_latents(nnx.Sequential(*layers(nnx.Rngs(0))), x, min_channels=1)
    optimizer = nnx.Optimizer(net, optax.sgd(0.01), wrt=nnx.Param)
    for _ in range(3):
        optimizer.update(net, nnx.grad(lambda net: jnp.mean(net(x) ** 2))(net))
    assert any(np.ptp(z.value()) > 0 for z in dhp.latents(net).values())
    with pytest.warns(UserWarning, match="^prune_to: group norms rank, and not the latents"):
        small = dhp.prune_to(net, flops=0.5)
    by_norms = dhp.prune_to(net, flops=0.5, by=dhp.group_scores(net))
    assert architecture_of(small).survivors == architecture_of(by_norms).survivors
    for z in dhp.latents(net).values():
        z.vector.set_value(jnp.linspace(1, 0.1, z.size))
    searched = architecture_of(dhp.prune_to(net, flops=0.5)).survivors
    assert searched == {name: tuple(range(len(kept))) for name, kept in searched.items()}


def layers(rngs):
    return nnx.Linear(3, 12, rngs=rngs), nnx.relu, nnx.Linear(12, 2, rngs=rngs)


class Joined(nnx.Module):
    """Kernels that are joined of two."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
        self.q, self.k = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)
        self.last = nnx.Linear(5, 6, rngs=rngs)

    def __call__(self, x):
        x = nnx.sigmoid(self.a(x.mean((1, 2))))
        kernel = jnp.concatenate([self.q.kernel[...], self.k.kernel[...]], 1)
        left, right = jnp.split(x @ kernel, 2, -1)
        return left * right + self.last(nnx.relu(self.b(x)))


class Transposed(nnx.Module):
    """A transposed convolution that reads its kernel backwards."""

    def __init__(self, rngs):
        self.a, self.b = (nnx.Conv(n, 8 - n, (3, 3), rngs=rngs) for n in (3, 5))
        options = {"strides": (2, 2), "transpose_kernel": True, "rngs": rngs}
        self.up, self.last = nnx.ConvTranspose(5, 6, (2, 2), **options), nnx.Linear(3, 6, rngs=rngs)

    def __call__(self, x):
        x = nnx.sigmoid(self.a(x))
        return self.up(x).mean((1, 2)) + self.last(self.b(x).mean((1, 2)))


class Mixed(nnx.Module):
    """A convolution whose kernel is mixed of several, by weights that depend on the input."""

    def __init__(self, rngs):
        self.a, self.b = (nnx.Conv(n, 8 - n, (3, 3), rngs=rngs) for n in (3, 5))
        self.weights, self.last = nnx.Linear(5, 2, rngs=rngs), nnx.Linear(3, 6, rngs=rngs)
        self.kernels = nnx.Param(jax.random.normal(rngs.params(), (2, 3, 3, 5, 6)))

    def __call__(self, x):
        x = nnx.sigmoid(self.a(x))
        weights = nnx.sigmoid(self.weights(x.mean((0, 1, 2))))
        kernel = jnp.einsum("k,khwio->hwio", weights, self.kernels[...])
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return y.mean((1, 2)) + self.last(self.b(x).mean((1, 2)))


class Generated(nnx.Module):
    """A convolution whose kernel is an output of the network, and a vector as a kernel."""

    def __init__(self, rngs):
        self.a, self.b = (nnx.Conv(n, 8 - n, (3, 3), rngs=rngs) for n in (3, 5))
        self.kernels = nnx.Linear(3, 5 * 6, bias_init=nnx.initializers.normal(1), rngs=rngs)
        self.vector = nnx.Param(jax.random.normal(rngs.params(), 5))
        self.last = nnx.Linear(3, 6, rngs=rngs)

    def __call__(self, x):
        kernel = self.kernels(x.mean((0, 1, 2))).reshape(1, 1, -1, 6)
        x = nnx.sigmoid(self.a(x))
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        y = y * nnx.sigmoid(x @ self.vector[...])[..., None]
        return y.mean((1, 2)) + self.last(self.b(x).mean((1, 2)))


@pytest.mark.parametrize(
    "kind",
    [Transposed, Mixed, *(pytest.param(k, marks=pytest.mark.slow) for k in (Joined, Generated))],
)
def test_a_kernel_is_gated_and_ranked_by_the_arrays_that_it_is_made_of(kind):
    model = kind(nnx.Rngs(0))
    shape, x = (6, 6, 3), jax.random.normal(jax.random.key(1), (1, 6, 6, 3))
    net = dhp.with_latents(model, shape, min_channels=1)
    keep = {name: np.arange(z.size) % 3 > 0 for name, z in dhp.latents(net).items()}
    gated = dhp.with_gates(net, rngs=nnx.Rngs(0))
    for name, z in dhp.latents(gated).items():
        z.vector.set_value(jnp.asarray(keep[name], jnp.float32))
    np.testing.assert_allclose(gated(x), dhp.prune(net, keep)(x), rtol=1e-4, atol=1e-5)
    found = dhp.explain(net).latents.items()
    (name,) = (n for n, (_, places) in found if any(p.startswith("a.kernel") for p in places))
    filters = np.abs(np.asarray(model.a.kernel[...], np.float64)).reshape(-1, len(keep[name]))
    expected = filters.sum(0) / filters.sum(0).mean()
    np.testing.assert_allclose(dhp.l1_scores(net)[name], expected, rtol=1e-6)


def test_scores_of_complex_arrays_are_of_their_magnitudes():
    rng = np.random.default_rng(0)
    first, last = (rng.normal(size=s) + 1j * rng.normal(size=s) for s in ((3, 6), (6, 2)))
    params = {"first": jnp.asarray(first, "complex64"), "last": jnp.asarray(last, "complex64")}
    net = dhp.FromFunction(lambda p, x: jnp.abs(x @ p["first"] @ p["last"]), params)
    net = dhp.with_latents(net, (3,))
    l1, squares = np.abs(first).sum(0), (np.abs(first) ** 2).sum(0)
    both = np.sqrt(squares + (np.abs(last) ** 2).sum(1))
    apart = np.linalg.norm(first[:, :, None] - first[:, None], axis=0).sum(0)
    for score, numbers in (
        (dhp.l1_scores, l1),
        (dhp.l2_scores, np.sqrt(squares)),
        (dhp.group_scores, both),
        (dhp.fpgm_scores, apart),
    ):
        (found,) = score(net).values()
        np.testing.assert_allclose(found, numbers / numbers.mean(), rtol=1e-5)


def test_an_axis_of_heads_times_features_is_counted_as_their_product():
    class Heads(nnx.Module):
        def __init__(self):
            rng = np.random.default_rng(0)
            shapes = {"first": (5, 3, 8), "last": (3, 8, 2)}
            for name, shape in shapes.items():
                setattr(self, name, nnx.Param(jnp.asarray(rng.normal(size=shape), "float32")))

        def __call__(self, x):
            heads = jnp.einsum("bi,ihd->bhd", x, self.first[...])
            kernel = self.last[...].reshape(-1, self.last.shape[-1])
            return nnx.relu(heads).reshape(len(x), -1) @ kernel

    net = dhp.with_latents(Heads(), (5,), min_channels=1)
    sizes = {z.size: name for name, z in dhp.latents(net).items()}
    cost = dhp.measure_cost(net, (5,))
    for heads, features in ((3, 8), (2, 8), (3, 5), (2, 3)):
        found = cost.amounts({sizes[3]: heads, sizes[8]: features})
        both = heads * features
        expected = {"flops": 7 * both, "params": 7 * both, "activations": 4 * (both + 2)}
        assert {name: int(found[name]) for name in expected} == expected


def test_frozen_kernels_beside_adapters_are_ranked_and_masks_of_zeros_and_ones_are_not():
    rng = np.random.default_rng(0)
    kernel, down = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 8), (4, 3)))
    mask = (rng.random((4, 8)) < 0.6).astype(np.float32)

    class Adapted(nnx.Module):
        def __init__(self):
            self.kernel, self.mask = nnx.Variable(jnp.array(kernel)), nnx.Variable(jnp.array(mask))
            self.down, self.up = nnx.Param(jnp.array(down)), nnx.Param(jnp.zeros((3, 8)))
            self.mean = nnx.Variable(jnp.full((1, 8), -3.0))
            self.last = nnx.Variable(jnp.ones((8, 2)) / 2)

        def __call__(self, x):
            hidden = x @ (self.kernel[...] * self.mask[...]) + x @ self.down[...] @ self.up[...]
            return nnx.relu(hidden - self.mean[...]) @ self.last[...]

    net = dhp.with_latents(Adapted(), (4,))
    norms = np.abs(kernel).sum(0)
    np.testing.assert_allclose(dhp.l1_scores(net)["kernel"], norms / norms.mean(), rtol=1e-5)
    x = rng.normal(size=(16, 4)).astype(np.float32)
    found = dhp.taylor_scores(net, lambda network, batch: network(batch).mean(), [x])["kernel"]
    hidden = np.maximum(x @ (kernel * mask) + 3, 0)  # read by twice a half
    np.testing.assert_allclose(found, (hidden.mean(0) / 2) ** 2, rtol=1e-5)


def by_hand(filters, whole):
    """What scores of filters, and of all weights, are; the rows of matrices belong to entries."""
    apart = [np.linalg.norm(f[:, None] - f, axis=-1).sum(1) for f in filters]
    scores = {
        dhp.l1_scores: sum(np.abs(f).sum(1) for f in filters),
        dhp.l2_scores: sum(np.linalg.norm(f, axis=1) for f in filters),
        dhp.fpgm_scores: sum(apart),
        dhp.group_scores: np.sqrt(sum((f**2).sum(1) for f in (*filters, *whole))),
    }
    return {score: numbers / numbers.mean() for score, numbers in scores.items()}


def test_biases_of_several_axes_are_no_filters():
    class Heads(nnx.Module):
        def __init__(self, rngs):
            self.inputs = nnx.Linear(4, 8, rngs=rngs)
            options = {"decode": False, "bias_init": nnx.initializers.normal(9), "rngs": rngs}
            self.heads = nnx.MultiHeadAttention(4, 8, **options)
            self.place = nnx.Param(jax.random.normal(rngs.params(), (5, 8)) * 9)
            self.outputs = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            x = self.inputs(x) + self.place[...]
            return self.outputs(x + self.heads(x))

    model = Heads(nnx.Rngs(0))
    net = dhp.with_latents(model, (5, 4), min_channels=1)
    parts = (model.heads.query, model.heads.key, model.heads.value)
    kernels = [np.asarray(part.kernel[...], np.float64) for part in parts]
    out = np.asarray(model.heads.out.kernel[...], np.float64)
    makers = [kernel.swapaxes(0, 1).reshape(4, -1) for kernel in kernels]
    for score, expected in by_hand(makers, [out.reshape(4, -1)]).items():
        np.testing.assert_allclose(score(net)["heads.query"], expected, rtol=1e-5)
    (stream,) = (name for name, z in dhp.latents(net).items() if z.size == 8)
    first, last = (np.asarray(x.kernel[...], np.float64) for x in (model.inputs, model.outputs))
    makers = [first.T, out.reshape(-1, 8).T]
    readers = [last, *(kernel.reshape(8, -1) for kernel in kernels)]
    for score, expected in by_hand(makers, readers).items():
        np.testing.assert_allclose(score(net)[stream], expected, rtol=1e-5)


class Block(nnx.Module):
    """A residual block whose biases and scales are not those of a fresh one."""

    def __init__(self, rngs):
        options = {"bias_init": nnx.initializers.normal(9), "rngs": rngs}
        self.first, self.second = nnx.Linear(6, 10, **options), nnx.Linear(10, 6, **options)
        self.norm = nnx.BatchNorm(6, scale_init=nnx.initializers.normal(1), **options)

    def __call__(self, x):
        return x + self.norm(self.second(nnx.relu(self.first(x))))


class Blocks(nnx.Module):
    """Blocks one after another, which are a stack that is scanned if so asked for."""

    def __init__(self, stacked):
        rngs = nnx.Rngs(0)
        self.inputs, self.outputs = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
        blocks = [Block(nnx.Rngs(n)) for n in range(3)]
        if stacked:
            states = [nnx.state(block) for block in blocks]
            whole = jax.tree.map(lambda *x: jnp.stack(x), *states)
            blocks = nnx.merge(nnx.graphdef(blocks[0]), whole)
        self.blocks = blocks if stacked else nnx.List(blocks)

    def __call__(self, x):
        x = self.inputs(x)
        if isinstance(self.blocks, nnx.List):
            for block in self.blocks:
                x = block(x)
        else:
            step = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            x = step(x, self.blocks)
        return self.outputs(x)


def test_scores_of_layers_in_a_stack_are_those_of_the_layers_one_by_one():
    model = Blocks(False)
    stacked, apart = (dhp.with_latents(m, (4,), min_channels=1) for m in (Blocks(True), model))
    layers = [(block.first, block.second) for block in model.blocks]
    kernels = [[np.asarray(x.kernel[...], np.float64) for x in pair] for pair in layers]
    hidden = by_hand([first.T for first, _ in kernels], [second for _, second in kernels])
    for score, expected in hidden.items():
        found, other = score(stacked), score(apart)
        np.testing.assert_allclose(found["blocks.first"], expected, rtol=1e-5)
        np.testing.assert_allclose(found["inputs"], other["inputs"], rtol=1e-6)
    makers = [np.asarray(model.inputs.kernel[...]).T, *(second.T for _, second in kernels)]
    expected = by_hand(makers, [])[dhp.fpgm_scores]
    np.testing.assert_allclose(dhp.fpgm_scores(stacked)["inputs"], expected, rtol=1e-5)
    roles = {weights.array: weights.role for weights in weights_of(stacked)}
    assert roles["blocks.norm.scale"] == SCALED
    assert not [array for array in roles if array.endswith("bias")]


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda p, x: nnx.relu(x @ p["a"] + p["b"][0]) @ p["c"], {"a": {0, 1}, "c": {0, 1}}),
        (lambda p, x: x @ (p["a"] * p["gain"]) @ p["c"], {"a": {0, 1}, "c": {0, 1}}),
        (lambda p, x: x @ (p["a"] - p["a"].mean(0)), {"a": {0, 1}}),
        (
            lambda p, x: x @ (p["down"].T[:1] @ p["a"] + p["gain"]).T[:4],
            {"down": {0, 1}, "a": {0, 1}},
        ),
        (
            lambda p, x: x @ (p["a"] + p["down"] @ p["up"]),
            {"a": {0, 1}, "down": {0, 1}, "up": {0, 1}},
        ),
        (lambda p, x: (x @ p["a"] + p["b"]) @ p["c"], {"a": {0, 1}, "c": {0, 1}}),
        (lambda p, x: p["b"][x[:, 0].astype(int)] + p["gain"], {"b": {0, 1}}),
        (lambda p, x: jnp.einsum("bi,eio->ebo", x, p["stack"]) * p["gain"], {"stack": {0, 1, 2}}),
        (lambda p, x: jax.vmap(jnp.matmul)(jnp.stack([x, x, x]), p["stack"]), {"stack": {1, 2}}),
        (
            lambda p, x: jax.lax.scan(lambda h, k: (h @ k[:, :4], None), x, p["stack"])[0],
            {"stack": {1, 2}},
        ),
    ],
)
def test_which_arrays_kernels_are_made_of_is_seen_in_the_program(forward, expected):
    shapes = {"a": (4, 8), "b": (5, 8), "c": (8, 3), "gain": (8,), "down": (4, 2), "up": (2, 8)}
    params = {name: jnp.ones(shape) for name, shape in (shapes | {"stack": (3, 4, 8)}).items()}
    program = trace_program(dhp.FromFunction(forward, params), default_call, (jnp.ones((5, 4)),))
    analysis = SimpleNamespace(programs={EVALUATION: program}, names=program.names)
    found = operands(analysis, all_reads(analysis))
    assert found == expected


@pytest.mark.parametrize("name", ["gain", "scale"])
def test_an_array_that_is_a_kernel_is_one_whatever_its_name_is(name):
    rng = np.random.default_rng(0)
    first, gain, shift = (rng.normal(size=s).astype(np.float32) for s in ((4, 8), (8, 6), (8, 6)))

    def forward(p, x):
        hidden = nnx.sigmoid(x @ p["a"])
        return hidden @ p["film"][name] * 2 + hidden @ p["film"]["shift"]

    model = dhp.FromFunction(forward, {"a": first, "film": {name: gain, "shift": shift}})
    net = dhp.with_latents(model, (4,), min_channels=1)
    x, kept = rng.normal(size=(5, 4)).astype(np.float32), np.arange(8) % 2 > 0
    hidden = 1 / (1 + np.exp(-x.astype(np.float64) @ first))
    gates = dhp.with_gates(net, rngs=nnx.Rngs(0))
    dhp.latents(gates)["a"].vector.set_value(jnp.asarray(kept, jnp.float32))
    left = (hidden * kept) @ (2 * gain + shift)
    np.testing.assert_allclose(gates(x), left, rtol=1e-5, atol=1e-5)
    found = dhp.taylor_scores(net, lambda n, x: (n(x) ** 2).mean(), [x], squared=False)["a"]
    kernel = 2 * gain + shift  # with g = 1, the mean over b, o of 2 y dy/dg_i
    terms = (2 * (hidden @ kernel)[:, None] * hidden[:, :, None] * kernel).mean((0, 2))
    np.testing.assert_allclose(found, np.abs(terms), rtol=1e-4)
    with pytest.raises(ValueError, match="expected a normalisation"):
        dhp.scale_scores(net)
