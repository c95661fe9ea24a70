"""Networks whose layers run in transformations of flax.nnx have gates and hypernetworks too."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.state import variables_of
from dhp_jax.tracing.generated import GeneratedArray

LAYERS, WIDTH, HIDDEN = 3, 6, 8
INPUT = (5,)
EXAMPLES = jnp.asarray(np.random.default_rng(0).normal(size=(7, *INPUT)), jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(*INPUT, WIDTH, rngs=rngs)
        self.blocks = self.layers(rngs)
        self.head = nnx.Linear(WIDTH, 4, rngs=rngs)

    def layers(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def create(rngs):
            return Block(rngs)

        return create(rngs)

    def __call__(self, x):
        return self.head(self.body(self.stem(x)))

    def body(self, x):
        raise NotImplementedError


class Unrolled(Network):
    def layers(self, rngs):
        return nnx.List([Block(rngs) for _ in range(LAYERS)])

    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Scanned(Network):
    def body(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


class ScannedAnew(Network):
    """With what the layers compute computed again for the gradient."""

    def body(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


class Ensemble(Network):
    def body(self, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.blocks, x).mean(0)


class Branched(Network):
    def layers(self, rngs):
        return Block(rngs)

    def body(self, x):
        def run(block, x):
            return block(x)

        return nnx.cond(x.shape[0] > jnp.sum(x), run, lambda block, x: x, self.blocks, x)


@functools.cache
def trained(kind):
    net = kind(nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for variable in variables_of(net).values():
        if isinstance(variable, nnx.BatchStat):
            drawn = rng.uniform(0.5, 1.5, variable.shape)
            variable.set_value(jnp.asarray(drawn, jnp.float32))
    net.eval()
    return net


@functools.cache
def on_gates(kind):
    net = dhp.with_latents(trained(kind), INPUT, min_channels=1)
    return dhp.with_gates(net, rngs=nnx.Rngs(1))


@nnx.jit
def outputs(net, x):
    return net(x)


KINDS = pytest.mark.parametrize("kind", [Scanned, ScannedAnew, Ensemble, Branched])


@KINDS
def test_open_gates_give_the_outputs_of_the_network_to_the_bit(kind):
    gated = nnx.clone(on_gates(kind))
    gated.eval()
    assert isinstance(gated, kind)
    assert all(dhp.latents(gated)[name].prunable for name in dhp.latents(gated))
    assert np.array_equal(gated(EXAMPLES), trained(kind)(EXAMPLES))
    assert np.array_equal(outputs(gated, EXAMPLES), outputs(trained(kind), EXAMPLES))
    assert any(isinstance(node, GeneratedArray) for _, node in nnx.iter_graph(gated.blocks))


@KINDS
def test_closed_gates_compute_what_pruning_leaves(kind):
    gated = nnx.clone(on_gates(kind))
    gated.eval()
    rng = np.random.default_rng(2)
    keep = {name: rng.permutation(z.size) > 1 for name, z in dhp.latents(gated).items()}
    small = dhp.prune(gated, keep, INPUT)
    assert type(small) is kind
    assert not dhp.latents(small)
    for name, z in dhp.latents(gated).items():
        z.vector.set_value(jnp.asarray(keep[name], jnp.float32))
    np.testing.assert_allclose(outputs(gated, EXAMPLES), small(EXAMPLES), rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(small(EXAMPLES) - trained(kind)(EXAMPLES))).max() > 0.01


def gradients(net):
    graphdef, state = nnx.split(net)

    @jax.jit
    @jax.grad
    def derivatives(values):
        copy = nnx.merge(graphdef, state, copy=True)
        for name, z in dhp.latents(copy).items():
            z.vector.set_value(values[name])
        return jnp.sum(copy(EXAMPLES) ** 2)

    return derivatives({name: z.value() for name, z in dhp.latents(net).items()})


@pytest.mark.parametrize("kind", [Scanned, ScannedAnew])
def test_gradients_by_gates_are_those_of_an_unrolled_network(kind):
    plain = Unrolled(nnx.Rngs(0))
    stacked = variables_of(trained(kind))
    for name, variable in variables_of(plain).items():
        if not isinstance(variable, nnx.RngState):
            part, _, rest = name.partition(".")
            number, _, array = rest.partition(".")
            within = part == "blocks"
            whole = stacked[f"blocks.{array}" if within else name][...]
            variable.set_value(whole[int(number)] if within else whole)
    plain.eval()
    unrolled = dhp.with_gates(dhp.with_latents(plain, INPUT), rngs=nnx.Rngs(1))
    gated = nnx.clone(on_gates(kind))
    for net in (unrolled, gated):
        net.eval()
    wanted, found = gradients(unrolled), gradients(gated)
    of_blocks = sum(value for name, value in wanted.items() if name.startswith("blocks"))
    assert len(found) == 2
    assert len(wanted) == 1 + LAYERS
    for name, value in found.items():
        expected = of_blocks if name.startswith("blocks") else wanted[name]
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


@KINDS
def test_what_a_call_sets_is_set(kind):
    gated, plain = nnx.clone(on_gates(kind)), nnx.clone(trained(kind))
    for net in (gated, plain):
        net.train()
    for _ in range(2):
        np.testing.assert_allclose(
            outputs(gated, EXAMPLES), outputs(plain, EXAMPLES), rtol=1e-5, atol=1e-5
        )
    after, untrained = variables_of(gated), variables_of(trained(kind))
    for name, variable in variables_of(plain).items():
        if isinstance(variable, nnx.BatchStat):
            assert not np.array_equal(variable[...], untrained[name][...])
            np.testing.assert_allclose(after[name][...], variable[...], rtol=1e-5)
        elif isinstance(variable, nnx.RngCount):
            assert np.array_equal(after[name][...], variable[...])


@pytest.mark.parametrize("kind", [Scanned, ScannedAnew])
def test_a_search_ends_within_the_budget(kind, tmp_path):
    gated = nnx.clone(on_gates(kind))
    gated.train()
    cost = dhp.measure_cost(gated, INPUT)
    search = dhp.fade_to_budget(optax.adam(1e-2), gated, cost, steps=6, stages=2, flops=0.5)
    optimizer = nnx.Optimizer(gated, search, wrt=nnx.Param)

    @nnx.jit
    def step(gated, optimizer):
        optimizer.update(gated, nnx.grad(lambda net: jnp.mean(net(EXAMPLES) ** 2))(gated))

    before = np.asarray(variables_of(gated)["blocks.up.kernel.weight"][...])
    for _ in range(6):
        step(gated, optimizer)
    assert not np.array_equal(variables_of(gated)["blocks.up.kernel.weight"][...], before)
    gated.eval()
    small = dhp.prune(gated, dhp.survivors(gated), INPUT)
    assert dhp.measure_cost(small, INPUT).flops <= 0.5 * cost.flops
    np.testing.assert_allclose(outputs(gated, EXAMPLES), small(EXAMPLES), rtol=1e-4, atol=1e-5)
    dhp.save(tmp_path / "small", small)
    loaded = dhp.load(tmp_path / "small", build=kind)
    loaded.eval()
    assert np.array_equal(loaded(EXAMPLES), small(EXAMPLES))


@pytest.mark.parametrize("embedding", [None, 2])
def test_kernels_of_stacked_layers_are_generated_also_of_a_file(embedding, tmp_path):
    net = dhp.with_latents(trained(Scanned), INPUT, embedding=embedding)
    made = {"blocks.up.kernel", "blocks.down.kernel", "stem.kernel", "head.kernel"}
    assert made <= set(architecture_of(net).axes.notes["generated"])
    np.testing.assert_allclose(net(EXAMPLES), trained(Scanned)(EXAMPLES), rtol=1e-6)
    for z in dhp.latents(net).values():
        z.vector.set_value(z.vector[...].at[0].set(0.5))
    dhp.save(tmp_path / "net", net)
    loaded = dhp.load(tmp_path / "net", build=Scanned)
    loaded.eval()
    assert np.array_equal(loaded(EXAMPLES), net(EXAMPLES))
    assert not np.allclose(loaded(EXAMPLES), trained(Scanned)(EXAMPLES))


class OfItself(nnx.Module):
    """All of whose own arrays are stacked."""

    def __init__(self, rngs):
        self.first = nnx.Linear(*INPUT, HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, 4, rngs=rngs)

    @nnx.vmap(in_axes=(0, None))
    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_a_network_that_is_taken_apart_as_a_whole_has_gates():
    build = nnx.split_rngs(splits=LAYERS)(nnx.vmap(OfItself))
    net = build(nnx.Rngs(0))
    gated = dhp.with_gates(dhp.with_latents(net, INPUT), rngs=nnx.Rngs(1))
    assert np.array_equal(gated(EXAMPLES), net(EXAMPLES))


def test_a_network_of_latents_is_called_by_the_name_of_its_class():
    class Listed(Scanned):
        def __init_subclass__(cls):
            super().__init_subclass__()  # it takes no options

    net = dhp.with_latents(trained(Listed), INPUT)
    gated = dhp.with_gates(net, rngs=nnx.Rngs(1))
    for each in (net, gated):
        kind = type(each)
        assert isinstance(each, Listed)
        assert [getattr(kind, name) for name in ("__name__", "__qualname__", "__module__")] == [
            getattr(Listed, name) for name in ("__name__", "__qualname__", "__module__")
        ]
        assert repr(each).startswith("Listed(")
        with pytest.raises(ValueError, match=r"got a Listed$"):
            dhp.prunable_latents(each)
        assert type(dhp.prune(each)) is Listed
    with pytest.raises(ValueError, match=r"got a Listed$"):
        dhp.explain(dhp.prune(net))


def test_a_network_of_a_class_that_takes_no_subclass_is_pruned_without_gates():
    class Final(Scanned):
        def __init_subclass__(cls):
            raise TypeError("Final has no subclasses")

    net = dhp.with_latents(trained(Final), INPUT)
    small = dhp.prune_to(net, flops=0.6, by=dhp.group_scores(net))
    assert type(net) is type(small) is Final
    with pytest.raises(ValueError, match=r"^model: the code allows no gates on .*: Final has no "):
        dhp.with_gates(net, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("pruned", [False, True])
def test_a_network_comes_back_from_a_file_as_one_of_its_class(pruned, tmp_path):
    net = dhp.with_latents(trained(Scanned), INPUT)
    saved = dhp.prune_to(net, flops=0.6, by=dhp.group_scores(net)) if pruned else net
    dhp.save(tmp_path / "net", saved)
    assert "Scanned" not in (tmp_path / "net/model.json").read_text()
    back = dhp.load(tmp_path / "net", build=Scanned)
    assert isinstance(back, Scanned)
    assert (type(back) is Scanned) == pruned
    assert type(dhp.prune(back)) is Scanned
    for each in (back, saved):
        each.eval()
    np.testing.assert_array_equal(outputs(back, EXAMPLES), outputs(saved, EXAMPLES))


def test_a_part_of_a_network_that_is_taken_apart_outside_of_it_is_refused():
    class Square(nnx.Module):
        def __init__(self, rngs):
            create = nnx.split_rngs(splits=8)(nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs)))
            self.stem, self.layers = nnx.Linear(*INPUT, 8, rngs=rngs), create(rngs)
            self.head = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.head(layers_of(self, self.stem(x)))

    def layers_of(net, x):  # as many layers as latents have entries
        run = nnx.scan(lambda x, layer: x + layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, net.layers)

    net = dhp.with_latents(Square(nnx.Rngs(0)), INPUT)
    net(EXAMPLES)
    with pytest.raises(ValueError, match=r"'layers.kernel' is taken apart, .* call the network"):
        layers_of(net, net.stem(EXAMPLES))


class Setting(nnx.Module):
    """Sets an array on latents, in what is computed anew."""

    def __init__(self, rngs):
        self.stem = nnx.Linear(*INPUT, HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, 4, rngs=rngs)

    def __call__(self, x):
        @nnx.remat
        def run(head, x):
            x = head(x)
            head.kernel.set_value(head.kernel[...] * 1.5)
            return x

        return run(self.head, self.stem(x))


def test_a_call_that_sets_an_array_on_latents_is_refused_with_its_place():
    net = dhp.with_latents(Setting(nnx.Rngs(0)), INPUT)
    wanted = r"sets 'head.kernel' at tracing/test_ordinary_calls.py:\d+; dhp.prune_to"
    with pytest.raises(ValueError, match=wanted):
        dhp.with_gates(net, rngs=nnx.Rngs(1))


def test_what_is_told_of_a_spectral_norm_is_that_it_sets_its_kernel(recwarn):
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.SpectralNorm(nnx.Linear(*INPUT, HIDDEN, rngs=rngs), rngs=rngs)
            self.head = nnx.Linear(HIDDEN, 4, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.stem(x)))

    net = dhp.with_latents(Normed(nnx.Rngs(0)), INPUT)
    name = "stem.layer_instance.kernel"
    assert any(f"the code reads or sets it: {name}." in note for note in dhp.explain(net).notes)
    wanted = rf"^model: the code allows no gates on '{name}': .* it sets '{name}' at .*:\d+; dhp\."
    with pytest.raises(ValueError, match=wanted):
        dhp.with_gates(net, rngs=nnx.Rngs(1))
    assert not recwarn, "as of gates that would stay"
    small = dhp.prune_to(net, INPUT, flops=0.5, by=dhp.group_scores(net))
    assert small.stem.layer_instance.out_features < HIDDEN


def test_a_method_that_sets_an_array_on_latents_is_refused():
    class Averaging(Scanned):
        def average(self):
            self.head.kernel.set_value(self.head.kernel[...] / 2)

        def renew(self):
            self.head.kernel = nnx.Param(self.head.kernel[...] / 2)

    net = dhp.with_latents(trained(Averaging), INPUT)
    with pytest.raises(ValueError, match=r"it sets 'head.kernel' at .*test_ordinary_calls.py:\d+"):
        net.average()
    with pytest.raises(ValueError, match=r"it sets 'head.kernel'"):
        jax.eval_shape(nnx.jit(lambda net: net.average()), net)
    with pytest.raises(ValueError, match="leaves arrays on latents where they stand"):
        net.renew()
