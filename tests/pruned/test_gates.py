"""Gates: the trained kernels to the bit, and at zero exactly what the pruned network computes."""

from flax import nnx
import jax
import jax.numpy as jnp
from networks import MIXED_INPUT, MIXED_LATENTS, RNGS, SMALL, Mixed, filled, run, short
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.hypernet import HypernetArrays
from dhp_jax.core.surgery import prune as cut
from dhp_jax.pruned.gates import ungate

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(6, *MIXED_INPUT)).astype(np.float32)


def gated_mixed():
    return dhp.with_gates(filled(Mixed), rngs=nnx.Rngs(1))


def squared_outputs(network, images):
    return jnp.mean(network(images) ** 2)


def set_to(model, masks):
    """Gives the latents of a network the values of masks."""
    for name, z in dhp.latents(model).items():
        z.vector.set_value(jnp.asarray(masks[name], jnp.float32))


def test_open_gates_generate_the_trained_kernels_to_the_bit():
    trained = filled(Mixed)
    plain = dhp.prune(trained)
    gated = dhp.prune(dhp.with_gates(trained, rngs=nnx.Rngs(1)))
    for name in ("left", "right", "join", "refine", "classifier"):
        wanted = np.asarray(getattr(plain, name).kernel[...])
        assert np.array_equal(getattr(gated, name).kernel[...], wanted)


@pytest.mark.parametrize("training", [True, False])
def test_closed_gates_compute_exactly_what_the_pruned_network_computes(training):
    model = gated_mixed()
    model.train() if training else model.eval()
    cost = dhp.measure_cost(model, MIXED_INPUT)
    masks = dhp.uniform_within(model, cost, flops=0.5)
    small = dhp.prune(model, masks, MIXED_INPUT)  # proved
    before = np.asarray(nnx.clone(model)(IMAGES))
    set_to(model, masks)
    np.testing.assert_allclose(model(IMAGES), small(IMAGES), rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(small(IMAGES)) - before).max() > 0.1


def test_the_derivative_by_a_gate_is_the_taylor_term():
    model = gated_mixed()
    model.eval()
    trained = filled(Mixed)
    trained.eval()
    scores = dhp.taylor_scores(trained, squared_outputs, [IMAGES], squared=False)
    graphdef, vectors, rest = nnx.split(model, dhp.LatentVector, ...)

    def loss(vectors):
        return jnp.mean(nnx.merge(graphdef, vectors, rest, copy=True)(IMAGES) ** 2)

    found = nnx.merge(graphdef, jax.grad(loss)(vectors), rest, copy=True)
    for name, z in dhp.latents(found).items():
        if name in scores:
            np.testing.assert_allclose(np.abs(z.value()), scores[name], rtol=1e-3)


def test_gates_between_0_and_1_go_into_the_kernels_of_the_pruned_network():
    model = gated_mixed()
    model.eval()
    masks = {name: np.ones(z.size, bool) for name, z in dhp.latents(model).items()}
    masks[MIXED_LATENTS["a"]][2] = masks[MIXED_LATENTS["c"]][4] = False
    for name, z in dhp.latents(model).items():
        values = RNG.uniform(0.5, 1.5, z.size) * masks[name]
        z.vector.set_value(jnp.asarray(values, jnp.float32))
    small = cut(model, masks)
    np.testing.assert_allclose(small(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


def test_what_is_ungated_computes_the_same_and_survives_by_its_gates():
    model = gated_mixed()
    model.eval()
    values = {name: RNG.uniform(0.5, 1.5, z.size) for name, z in dhp.latents(model).items()}
    values[MIXED_LATENTS["b"]][3] = 0
    set_to(model, values)
    found = ungate(model, filled(Mixed))
    found.eval()
    np.testing.assert_allclose(found(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    assert list(np.flatnonzero(~dhp.survivors(found)[MIXED_LATENTS["b"]])) == [3]


class Tied(nnx.Module):
    """Two convolutions with one hypernetwork, each with a bias of its own."""

    def __init__(self, rngs):
        image, z = dhp.Latent(3, prunable=False, rngs=rngs), dhp.Latent(6, rngs=rngs)
        self.stem = dhp.HyperConv(image, z, (3, 3), rngs=rngs)
        self.first, self.second = (dhp.HyperConv(z, z, (3, 3), rngs=rngs) for _ in range(2))
        for name in HypernetArrays._fields:
            setattr(self.second, name, getattr(self.first, name))
        self.head = dhp.Linear(z, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))).mean((1, 2)))


def test_layers_of_one_hypernetwork_have_one_weight_and_its_params_count_once():
    model = filled(Tied)
    gated = dhp.with_gates(model, rngs=nnx.Rngs(0))
    assert gated.first.weight is gated.second.weight
    plain = dhp.prune(gated)
    assert plain.first.kernel is plain.second.kernel
    params = 9 * 3 * 6 + 9 * 6 * 6 + 3 * 6 + 6 * 2 + 2
    for network in (model, gated, plain):
        assert dhp.measure_cost(network, MIXED_INPUT).params == params
    counts = {name: min(z.size, 4) for name, z in dhp.latents(model).items()}
    left = dhp.measure_cost(model, MIXED_INPUT).amounts(counts)["params"]
    assert left == 9 * 3 * 4 + 9 * 4 * 4 + 3 * 4 + 4 * 2 + 2


def test_layers_of_one_hypernetwork_are_ungated_and_share_it_still():
    model = filled(Tied)
    gated = dhp.with_gates(model, rngs=nnx.Rngs(0))
    gated.eval()
    (z,) = (name for name, z in dhp.latents(gated).items() if z.prunable)
    set_to(
        gated, {n: np.ones(z.size) for n, z in dhp.latents(gated).items()} | {z: [1, 0, 1, 1, 0, 1]}
    )
    found = ungate(gated, filled(Tied))
    found.eval()
    assert found.first.b2 is found.second.b2
    np.testing.assert_allclose(found(IMAGES), gated(IMAGES), rtol=1e-5, atol=1e-6)
    assert np.flatnonzero(~dhp.survivors(found)[z]).tolist() == [1, 4]


class TiedAcross(Tied):
    """The same of two convolutions with latents of their own."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.first.z_out = self.second.z_in = dhp.Latent(6, rngs=rngs)


def test_kernels_that_differ_of_layers_that_share_a_hypernetwork_are_not_carried_over():
    gated = dhp.with_gates(filled(TiedAcross), rngs=nnx.Rngs(0))
    message = r"^model: expected one kernel of layers that share .*; that of 'second' is its own$"
    with pytest.raises(ValueError, match=message):
        ungate(gated, filled(TiedAcross))


def test_a_kernel_of_two_layers_counts_once_in_scores():
    model = filled(Tied)
    model.eval()
    gated = dhp.with_gates(model, rngs=nnx.Rngs(0))
    terms = dhp.taylor_scores(model, squared_outputs, [IMAGES], squared=False)
    for name, gradient in dhp.gradient_scores(gated, squared_outputs, [IMAGES]).items():
        np.testing.assert_allclose(terms[name], gradient, rtol=1e-3, atol=1e-6)
    (z,) = (name for name, z in dhp.latents(model).items() if z.prunable)
    plain = dhp.prune(model)
    stem, middle, head = (
        np.asarray(layer.kernel[...], np.float64) for layer in (plain.stem, plain.first, plain.head)
    )
    squares = (stem**2).sum((0, 1, 2)) + (head**2).sum(1)
    squares += (middle**2).sum((0, 1, 2)) + (middle**2).sum((0, 1, 3))
    norms = np.sqrt(squares)
    np.testing.assert_allclose(dhp.group_scores(model)[z], norms / norms.mean(), rtol=1e-5)


def test_gates_are_neither_made_twice_nor_saved_of_declared_latents(tmp_path):
    model = gated_mixed()
    plain = dhp.prune(filled(Mixed))
    traced = dhp.with_gates(dhp.with_latents(plain, MIXED_INPUT), rngs=nnx.Rngs(1))
    for gated in (model, traced):
        with pytest.raises(ValueError, match=r"^model: expected a network without gates, got "):
            dhp.with_gates(gated, rngs=nnx.Rngs(1))
    for options, message in [
        ({"rngs": 3}, "rngs: expected nnx.Rngs, got 3"),
        ({"build": Mixed}, "build: expected None for a network of latents, got <class"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            dhp.with_gates(filled(Mixed), **{"rngs": nnx.Rngs(1)} | options)
    with pytest.raises(ValueError, match=r"^model: a network of gates is not saved"):
        dhp.save(tmp_path / "net", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("traced", [False, True])
def test_gates_close_what_a_fresh_classifier_reads(traced):
    model = filled(Tied)
    model.eval()
    if traced:
        model = dhp.with_latents(dhp.prune(model), MIXED_INPUT, min_channels=1)
    gated = dhp.with_gates(model, rngs=nnx.Rngs(0))
    other = dhp.with_classes(gated, 5, rngs=nnx.Rngs(1), layer="head")
    other.eval()
    masks = {name: np.ones(z.size, bool) for name, z in dhp.latents(other).items()}
    (name,) = (name for name, z in dhp.latents(other).items() if z.prunable)
    masks[name][[1, 4]] = False
    set_to(other, masks)
    np.testing.assert_allclose(cut(other, masks)(IMAGES), other(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"embedding": 1}])
def test_what_is_ungated_of_a_traced_network_computes_the_same(options, tmp_path):
    plain = dhp.prune(filled(Mixed))
    plain.eval()
    net = dhp.with_latents(plain, IMAGES.shape[1:], min_channels=1, **options)
    gated = dhp.with_gates(net, rngs=nnx.Rngs(2))
    values = {name: RNG.uniform(0.5, 1.5, z.size) for name, z in dhp.latents(gated).items()}
    first = min(values)
    values[first][2] = 0
    set_to(gated, values)
    found = ungate(gated, net)
    np.testing.assert_allclose(found(IMAGES), gated(IMAGES), rtol=1e-5, atol=1e-5)
    assert list(np.flatnonzero(~dhp.survivors(found)[first])) == [2]
    dhp.save(tmp_path / "net", found)
    loaded = dhp.load(tmp_path / "net", build=lambda rngs: dhp.prune(Mixed(rngs)))
    np.testing.assert_array_equal(loaded(IMAGES), found(IMAGES))


class Adding(nnx.Module):
    """Channels that a kernel reads, and that the code adds up in another place."""

    def __init__(self, made, added, *, rngs):
        self.first, self.norm = nnx.Linear(3, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.weights = nnx.Param(jax.random.normal(rngs.params(), (6,)))
        self.last = nnx.Linear(6, 2, rngs=rngs)
        self.made, self.added, self.factors = made, added, 1.0

    def __call__(self, x):
        h = self.made(self.norm(self.first(x))) * self.factors
        return self.last(h) + self.added(h, self.weights[...])


SUMS = {
    "a squared norm": lambda h, w: (h**2).sum(-1, keepdims=True),
    "a product with an array": lambda h, w: (h * w).sum(-1, keepdims=True),
    "a product with itself": lambda h, w: (h * h * h).sum(-1, keepdims=True),
    "a cosine": lambda h, w: (
        (h * w).sum(-1, keepdims=True) / jnp.sqrt((h**2).sum(-1, keepdims=True) + 1e-3)
    ),
}


@pytest.mark.parametrize("added", SUMS.values(), ids=SUMS)
def test_gates_close_channels_that_the_code_adds_up(added):
    model = Adding(nnx.relu, added, rngs=nnx.Rngs(0))
    model.norm.bias.set_value(jnp.linspace(0.2, 1.0, 6))
    x = RNG.normal(size=(5, 3)).astype(np.float32)
    gated = dhp.with_gates(dhp.with_latents(model, (3,), min_channels=1), rngs=nnx.Rngs(0))
    model.train()
    graphdef, gates, others = nnx.split(gated, dhp.LatentVector, ...)
    whole, arrays = nnx.split(model)

    def by_gates(gates):
        return (nnx.merge(graphdef, gates, others, copy=True)(x) ** 2).mean()

    def by_factors(factors):
        own = nnx.merge(whole, arrays, copy=True)
        own.factors = factors
        return (own(x) ** 2).mean()

    (found,) = jax.tree.leaves(jax.grad(by_gates)(gates))
    np.testing.assert_allclose(found, jax.grad(by_factors)(jnp.ones(6)), rtol=1e-4, atol=1e-5)
    masks = {"first": np.arange(6) % 3 > 0}
    set_to(gated, masks)
    np.testing.assert_allclose(dhp.prune(gated, masks)(x), gated(x), rtol=1e-5, atol=1e-6)


def test_channels_stay_that_are_added_up_and_that_no_gate_closes():
    model = Adding(nnx.softplus, SUMS["a squared norm"], rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match=r"^with_gates: 'first': all entries stay, for what is "):
        gated = dhp.with_gates(dhp.with_latents(model, (3,), min_channels=1), rngs=nnx.Rngs(0))
    assert dhp.latents(gated)["first"].min_channels == 6


def test_kernels_that_are_no_params_have_no_gates():
    class Quantised(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
            self.kernel = nnx.Variable(jnp.ones((6, 6), jnp.int8))

        def __call__(self, x):
            x = nnx.relu(self.first(x))
            return self.last(x + x @ self.kernel[...].astype(x.dtype))

    net = dhp.with_latents(Quantised(nnx.Rngs(0)), (3,))
    with pytest.raises(ValueError, match=r"^model: .* are nnx.Param; 'kernel' is a Variable$"):
        dhp.with_gates(net, rngs=nnx.Rngs(0))


def test_fixed_arrays_that_are_no_kernels_need_no_gates():
    class Positions(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
            self.positions = nnx.Variable(jax.random.normal(rngs.params(), (5, 6)))

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x) + self.positions[...]))

    net = dhp.with_latents(Positions(nnx.Rngs(0)), (5, 3), min_channels=1)
    gated = dhp.with_gates(net, rngs=nnx.Rngs(0))
    masks = {"first": np.arange(6) % 3 > 0}
    set_to(gated, masks)
    x = RNG.normal(size=(2, 5, 3)).astype(np.float32)
    small = dhp.prune(gated, masks)
    assert small.positions.shape == (5, 4)
    np.testing.assert_allclose(small(x), gated(x), rtol=1e-5, atol=1e-6)


def test_fixed_arrays_whose_channels_kernels_read_need_no_gates():
    class Offsets(nnx.Module):
        # A table of positions that is projected, as in Transformer-XL, and a random projection.
        def __init__(self, rngs):
            self.table = nnx.Variable(jax.random.normal(rngs.params(), (5, 6)))
            self.random = nnx.Variable(jax.random.normal(rngs.params(), (3, 8)))
            self.project, self.last = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.tanh(x @ self.random[...] + self.project(self.table[...])))

    net = dhp.with_latents(Offsets(nnx.Rngs(0)), (5, 3), min_channels=1)
    gated = dhp.with_gates(net, rngs=nnx.Rngs(0))
    masks = {name: np.arange(z.size) % 3 > 0 for name, z in dhp.latents(gated).items()}
    set_to(gated, masks)
    x = RNG.normal(size=(2, 5, 3)).astype(np.float32)
    small = dhp.prune(gated, masks)
    assert (small.table.shape, small.random.shape) == ((5, 4), (3, 5))
    np.testing.assert_allclose(small(x), gated(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family",
    [pytest.param("resnet", marks=pytest.mark.slow), "mobilenet_v2", "densenet", "edsr", "unet"],
)
def test_families_compute_the_same_and_zeros_compute_what_is_pruned(family):
    arguments = SMALL[family] | ({"scale": 2} if family == "edsr" else {})
    with short():
        whole = filled(lambda _: dhp.models.build(family, **arguments, rngs=RNGS))
        trained = dhp.prune(whole)
        gated = dhp.with_gates(trained, rngs=nnx.Rngs(3))
    shape = (8, 8, 1 if family == "unet" else 3)
    x = RNG.normal(size=(1, *shape)).astype(np.float32)
    np.testing.assert_allclose(run(gated, x)[0], run(trained, x)[0], rtol=1e-4, atol=1e-3)
    cost = dhp.measure_cost(gated, shape)
    masks = dhp.uniform_within(gated, cost, flops=0.7)
    small = cut(gated, masks)
    set_to(gated, masks)
    wanted, _ = run(small, x)
    found, _ = run(gated, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


class Queries(nnx.Module):
    """Queries and keys are multiplied with each other, and no kernel reads them."""

    def __init__(self, rngs):
        image, z = dhp.Latent(3, prunable=False, rngs=rngs), dhp.Latent(12, rngs=rngs)
        self.q, self.k = (dhp.Linear(image, z, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return jnp.einsum("bqd,bkd->bqk", self.q(x), self.k(x))


class Own(nnx.Module):
    """A dense layer of one's own on the axis of a latent."""

    def __init__(self, z, kernel):
        self.z, self.kernel = nnx.data(z), nnx.Param(kernel)

    def plain(self, keep=None):
        return type(self)(None, self.kernel[...][self.z.keep(keep)])

    def __call__(self, x):
        return x @ self.kernel[...]


class Scaled(Own):
    """A number for each channel."""

    def __call__(self, x):
        return x * self.kernel[...]


class WithOwn(nnx.Module):
    """A latent that both a layer of the library and one of one's own have."""

    def __init__(self, rngs, own=Own, shape=(6, 2)):
        image, z = (
            dhp.Latent(3, prunable=False, rngs=rngs),
            dhp.Latent(6, min_channels=1, rngs=rngs),
        )
        self.stem = dhp.Linear(image, z, rngs=rngs)
        self.own = own(z, RNG.normal(size=shape).astype(np.float32))
        self.head = dhp.Linear(z, 2, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.stem(x))
        return (
            self.own(x) + self.head(x) if self.own.kernel[...].ndim > 1 else self.head(self.own(x))
        )


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Queries, r"model: expected .* to read each prunable latent; 'k\.z_out' is read by none"),
        (WithOwn, "model: expected layers of the library .*; 'own' is a Own of your own"),
    ],
)
def test_declared_latents_whose_channels_no_gate_closes_are_refused(network, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dhp.with_gates(network(nnx.Rngs(0)), rngs=nnx.Rngs(0))


def test_gates_close_channels_that_a_layer_of_ones_own_scales():
    model = dhp.with_gates(WithOwn(nnx.Rngs(0), Scaled, (6,)), rngs=nnx.Rngs(0))
    (name,) = (name for name, z in dhp.latents(model).items() if z.prunable)
    masks = {n: np.ones(z.size, bool) for n, z in dhp.latents(model).items()}
    masks[name][[1, 4]] = False
    set_to(model, masks)
    x = RNG.normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(cut(model, masks)(x), model(x), rtol=1e-5, atol=1e-6)


class Held(nnx.Module):
    """Kernels in a container that is no module."""

    def __init__(self, kind, rngs):
        shapes = [(4, 8), (8, 6), (6, 3)]
        kernels = [nnx.Param(jax.random.normal(rngs.params(), shape)) for shape in shapes]
        kinds = {
            "list": kernels,
            "tuple": tuple(kernels),
            "nested": {"first": [kernels[0]], "others": (kernels[1], kernels[2])},
        }
        self.kernels, self.kind = nnx.data(kinds[kind]), kind

    def __call__(self, x):
        kernels = self.kernels
        if self.kind == "nested":
            kernels = [*kernels["first"], *kernels["others"]]
        for kernel in kernels[:-1]:
            x = nnx.relu(x @ kernel[...])
        return x @ kernels[-1][...]


@pytest.mark.parametrize("kind", ["list", "tuple", "nested"])
def test_latents_act_on_kernels_in_containers(kind):
    model = Held(kind, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    net = dhp.with_latents(model, (4,), min_channels=1)
    gates = dhp.with_gates(net, rngs=nnx.Rngs(0))
    keep = {name: np.arange(z.size) % 2 > 0 for name, z in dhp.latents(net).items()}
    small = dhp.prune(net, keep)
    for made in (net, gates):
        np.testing.assert_array_equal(made(x), model(x))
        for name, z in dhp.latents(made).items():
            z.vector.set_value(jnp.asarray(keep[name], jnp.float32))
        np.testing.assert_allclose(made(x), small(x), rtol=1e-5, atol=1e-5)
    assert float(np.abs(small(x) - model(x)).max()) > 1
