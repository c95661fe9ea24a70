"""Variables keep their types and metadata through latents, gates, pruning and files."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.tracing.generated import GeneratedArray

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


class Slow(nnx.Param):
    """A parameter of a type of one's own, which is made in a way of its own."""

    def __init__(self, shape, seed):
        super().__init__(jax.random.normal(jax.random.key(seed), shape), rate=0.1)


class Adapted(nnx.Module):
    """Low-rank adapters, a sharded kernel, a type of one's own, and frozen numbers."""

    def __init__(self, rngs):
        self.a = nnx.LoRALinear(6, 16, lora_rank=8, rngs=rngs)
        self.a.lora.lora_b.set_value(jax.random.normal(rngs.params(), (8, 16)) / 3)
        self.b = nnx.Linear(16, 12, rngs=rngs)
        self.b.kernel.set_metadata(out_sharding=(None, "model"))
        self.b.bias.set_metadata(note="ours")
        self.c, self.scale = Slow((12, 10), 0), nnx.Variable(jnp.ones(10))
        self.d = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.b(nnx.relu(self.a(x))))
        return self.d(nnx.relu(x @ self.c[...]) * self.scale[...])


def model():
    return Adapted(nnx.Rngs(0))


def kinds(network):
    """The type and metadata of all variables but latents, by the path of what they stand for."""
    stand_ins = {p for p, node in nnx.iter_graph(network) if isinstance(node, GeneratedArray)}
    return {
        path[:-1] if path[:-1] in stand_ins else path: (type(leaf), leaf.get_metadata())
        for path, leaf in nnx.to_flat_state(nnx.state(network))
        if not isinstance(leaf, dhp.LatentVector)
    }


def some(network, values=None):
    """Entries of latents that stay; `values` are set to those left, and 0 to those gone."""
    keep = {n: np.arange(z.size) % 3 > 0 for n, z in dhp.latents(network).items()}
    for name, z in dhp.latents(network).items() if values else ():
        z.vector.set_value(jnp.where(keep[name], values, 0.0))
    return keep


@pytest.mark.parametrize("value", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_latents_gates_and_pruning_keep_types_and_metadata(value):
    before = kinds(model())
    assert before["a", "lora", "lora_a"][0] is nnx.LoRAParam
    assert before["b", "kernel"][1]["out_sharding"] == (None, "model")
    assert before["b", "bias"][1]["note"] == "ours"
    assert before["c",][0] is Slow
    assert before["c",][1]["rate"] == 0.1
    net = dhp.with_latents(model(), X.shape[1:], min_channels=1)
    gated = dhp.with_gates(net, rngs=nnx.Rngs(0))
    assert kinds(net) == kinds(gated) == before
    for network in (net, gated):
        keep = some(network, value)
        small = dhp.prune(network, keep)
        assert small.c.shape == (8, 6)
        assert kinds(small) == kinds(dhp.prune(network)) == before
        np.testing.assert_allclose(small(X), network(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("gates", "kind"),
    [
        *((False, nnx.LoRAParam), (True, Slow)),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((True, nnx.LoRAParam), (False, Slow))),
    ],
)
def test_training_of_one_type_changes_the_arrays_of_that_type_alone(gates, kind):
    net = dhp.with_latents(model(), X.shape[1:])
    net = dhp.with_gates(net, rngs=nnx.Rngs(0)) if gates else net
    optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=kind)
    state = nnx.to_flat_state(nnx.state(net))
    before = [(leaf, np.asarray(leaf.get_value())) for _, leaf in state]

    def loss(net):
        return jnp.mean(net(X) ** 2)

    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, kind))(net)
    optimizer.update(net, gradients)
    after = [leaf.get_value() for _, leaf in nnx.to_flat_state(nnx.state(net))]
    changed = [
        leaf
        for (leaf, value), now in zip(before, after, strict=True)
        if not np.array_equal(value, now)
    ]
    assert {type(leaf) for leaf in changed} == {kind}
    assert len(changed) == {nnx.LoRAParam: 2, Slow: 1}[kind]


def test_hypernetworks_make_plain_params_alone_and_explain_tells_the_others():
    net = dhp.with_latents(model(), X.shape[1:], embedding=2, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(net(X), model()(X))
    made = [node for _, node in nnx.iter_graph(net) if isinstance(node, GeneratedArray)]
    assert {node.name for node in made if node.pair} == {"a.kernel", "d.kernel"}
    generated = {("a", "kernel"), ("d", "kernel")}
    kept = {path: kind for path, kind in kinds(model()).items() if path not in generated}
    assert kinds(net).items() >= kept.items()
    names = "a.lora.lora_a, a.lora.lora_b, b.kernel and 1 more"
    assert f"Times latents, to keep their type or metadata: {names}." in dhp.explain(net).notes
    keep = some(net, 0.5)
    assert kinds(dhp.prune(net, keep)) == kinds(model())
    plain = dhp.with_latents(model(), X.shape[1:])
    assert not any("to keep their type" in note for note in dhp.explain(plain).notes)


@pytest.mark.parametrize("embedding", [None, 2])
def test_types_and_metadata_come_back_from_files(embedding, tmp_path):
    net = dhp.with_latents(model(), X.shape[1:], embedding=embedding, min_channels=1)
    small = dhp.prune(net, some(net))
    six = dhp.with_classes(net, 6, rngs=nnx.Rngs(1), layer="d")
    for network, classes in ((net, 3), (small, 3), (six, 6)):
        dhp.save(tmp_path / "net", network)
        loaded = dhp.load(tmp_path / "net", build=lambda rngs, n=classes: sized(n, rngs))
        np.testing.assert_array_equal(loaded(X), network(X))
        assert kinds(loaded) == kinds(network)


def sized(classes, rngs):
    network = Adapted(rngs)
    network.d = nnx.Linear(10, classes, rngs=rngs)
    return network
