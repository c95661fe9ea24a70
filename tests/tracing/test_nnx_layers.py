"""Every layer of flax.nnx between two others: what of it may go, and that the rest is right."""

import re
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from restricted import difference, gone_of, proved_cut, randomised, restricted

import dhp_jax as dhp
from dhp_jax.tracing import discover, resize
from dhp_jax.tracing.marks import depends_on_widths

R = nnx.Rngs(0)
IMAGE, SEQUENCE, VECTOR = (2, 6, 6, 3), (2, 4, 3), (4, 3)


def linear(into, out):
    return nnx.Linear(into, out, rngs=R)


class Between(nnx.Module):
    """A layer after a linear one, and before another."""

    def __init__(self, features, layer, made, last=None):
        self.first, self.layer = linear(3, features), layer
        self.last = last or linear(made, 2)

    def __call__(self, x):
        return self.last(self.layer(self.first(x)))


def heads():
    return nnx.LinearGeneral((2, 4), 3, axis=(-2, -1), rngs=R)


def recurrent(kind):
    return lambda: Between(6, nnx.RNN(kind(6, 8, rngs=R)), 8)


LAYERS = {
    "Conv in 1-D": (lambda: Between(6, nnx.Conv(6, 8, 3, rngs=R), 8), SEQUENCE, [6, 8]),
    "Conv in 3-D": (
        lambda: Between(6, nnx.Conv(6, 8, (3, 3, 3), rngs=R), 8),
        (2, 4, 4, 4, 3),
        [6, 8],
    ),
    "Conv, dilated": (
        lambda: Between(
            6, nnx.Conv(6, 8, (3, 3), kernel_dilation=2, padding="CIRCULAR", rngs=R), 8
        ),
        IMAGE,
        [6, 8],
    ),
    "ConvTranspose": (
        lambda: Between(6, nnx.ConvTranspose(6, 8, (2, 2), 2, rngs=R), 8),
        IMAGE,
        [6, 8],
    ),
    "ConvTranspose, transposed": (
        lambda: Between(6, nnx.ConvTranspose(6, 8, (2, 2), 2, transpose_kernel=True, rngs=R), 8),
        IMAGE,
        [6, 8],
    ),
    "LinearGeneral": (
        lambda: Between(6, nnx.LinearGeneral(6, (2, 4), rngs=R), 0, heads()),
        VECTOR,
        [2, 4, 6],
    ),
    "Einsum": (
        lambda: Between(6, nnx.Einsum("bc,chd->bhd", (6, 2, 4), (2, 4), rngs=R), 0, heads()),
        VECTOR,
        [2, 4, 6],
    ),
    "PReLU": (lambda: Between(6, nnx.PReLU(jnp.full(6, 0.25)), 6), VECTOR, [6]),
    "BatchNorm": (lambda: Between(6, nnx.BatchNorm(6, rngs=R), 6), IMAGE, [6]),
    "GroupNorm": (lambda: Between(6, nnx.GroupNorm(6, 3, rngs=R), 6), IMAGE, [2, 3]),
    "InstanceNorm": (lambda: Between(6, nnx.InstanceNorm(6, rngs=R), 6), IMAGE, [6]),
    "LayerNorm": (lambda: Between(6, nnx.LayerNorm(6, rngs=R), 6), IMAGE, [6]),
    "RMSNorm": (lambda: Between(6, nnx.RMSNorm(6, rngs=R), 6), IMAGE, [6]),
    "WeightNorm": (lambda: Between(6, nnx.WeightNorm(linear(6, 8), rngs=R), 8), VECTOR, [6, 8]),
    "SpectralNorm": (lambda: Between(6, nnx.SpectralNorm(linear(6, 8), rngs=R), 8), VECTOR, [6, 8]),
    "MultiHeadAttention": (  # divides by the root of its width, which therefore stays
        lambda: Between(6, nnx.MultiHeadAttention(2, 6, 8, decode=False, rngs=R), 6),
        SEQUENCE,
        [2, 6, 6],
    ),
    "LoRA": (lambda: Between(6, nnx.LoRA(6, 4, 8, rngs=R), 8), VECTOR, [4, 6, 8]),
    "LoRALinear": (
        lambda: Between(6, nnx.LoRALinear(6, 8, lora_rank=4, rngs=R), 8),
        VECTOR,
        [4, 6, 8],
    ),
    "LSTMCell": (recurrent(nnx.LSTMCell), SEQUENCE, [6, 8]),
    "OptimizedLSTMCell": (recurrent(nnx.OptimizedLSTMCell), SEQUENCE, [6, 8]),
    "GRUCell": (recurrent(nnx.GRUCell), SEQUENCE, [6, 8]),
    "SimpleCell": (recurrent(nnx.SimpleCell), SEQUENCE, [6, 8]),
    "Sequential": (
        lambda: nnx.Sequential(linear(3, 6), nnx.relu, linear(6, 8), linear(8, 2)),
        VECTOR,
        [6, 8],
    ),
    "Dropout": (lambda: Between(6, nnx.Dropout(0.5, rngs=nnx.Rngs(1)), 6), VECTOR, [6]),
}


def some_survivors(found):
    rng = np.random.default_rng(1)
    masks = {family.name: rng.random(family.size) < 0.6 for family in found.families}
    for mask in masks.values():
        mask[rng.choice(len(mask), 2, replace=False)] = [True, False]
    return masks


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_left_of_a_layer_computes_what_the_whole_one_does_without_the_rest(name):
    build, shape, sizes = LAYERS[name]
    model = randomised(build())
    model.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    found = discover(model, x)
    assert sorted(family.size for family in found.families) == sizes
    assert not found.analysis.flow.unknown
    assert not found.analysis.untrainable
    masks = some_survivors(found)
    small = proved_cut(found, masks)
    expected = restricted(found.analysis, gone_of(found, masks), (x,))
    assert difference(small(x), expected) < 1e-6
    small.train()
    assert np.isfinite(np.asarray(small(x))).all()


class Packed(nnx.Module):
    """Two halves, whose sizes stand in a text beside the kernel."""

    def __init__(self):
        self.kernel = nnx.Param(
            jnp.asarray(np.random.default_rng(2).normal(size=(6, 8)), "float32")
        )
        self.sizes = "2 4"

    def __call__(self, x):
        sizes = map(int, self.sizes.split())
        left, right = jnp.moveaxis((x @ self.kernel[...]).reshape(len(x), *sizes), 1, 0)
        return left * right


class Sized(Packed):
    pass


@resize.register
def _(module: Sized, kept):
    module.sizes = f"2 {kept['kernel'][1].sum() // 2}"


@pytest.mark.parametrize(
    ("kind", "sizes"), [(Packed, {"first": 6}), (Sized, {"first": 6, "layer": 4})]
)
def test_a_layer_of_ones_own_that_keeps_sizes_is_registered(kind, sizes):
    model = Between(6, kind(), 4)
    net = dhp.with_latents(model, (3,), min_channels=2)
    assert {name: z.size for name, z in dhp.latents(net).items()} == sizes
    assert ("layer.kernel[1]" in str(dhp.explain(net))) == (kind is Packed)
    keep = {name: np.arange(n) % 3 > 0 for name, n in sizes.items()}
    small = dhp.prune(net, keep)
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    hidden = np.asarray(model.first(x))[:, keep["first"]]
    halves = hidden @ np.asarray(model.layer.kernel)[keep["first"]]
    left = (halves[:, :4] * halves[:, 4:])[:, keep.get("layer", np.ones(4, bool))]
    rows = np.asarray(model.last.kernel)[keep.get("layer", np.ones(4, bool))]
    np.testing.assert_allclose(small(x), left @ rows, rtol=1e-4, atol=1e-5)


def test_a_function_on_the_host_that_is_another_at_each_call_keeps_all_channels():
    class Hosted(nnx.Module):
        def __init__(self):
            self.first, self.second, self.last = linear(3, 6), linear(6, 5), linear(5, 2)

        def __call__(self, x):
            y = nnx.relu(self.first(x))
            one = jax.ShapeDtypeStruct((), jnp.float32)
            scale = jax.pure_callback(lambda mean: mean, one, y.mean())
            return self.last(nnx.relu(self.second(y))) * scale

    with pytest.raises(ValueError, match=r"callback of pure_callback is .* at tracing/test_nnx_l"):
        dhp.with_latents(Hosted(), (3,))


def test_what_takes_numbers_apart_keeps_its_channels():
    class Bits(nnx.Module):
        def __init__(self):
            self.first, self.last = linear(3, 6), linear(6, 2)

        def __call__(self, x):
            bits = jax.lax.bitcast_convert_type(self.first(x), jnp.uint8)
            return self.last(bits.sum(-1).astype(jnp.float32))

    found = discover(Bits(), (3,))
    assert not found.families
    assert any("takes numbers apart at tracing/test_nnx_layers.py" in why for why in found.fixed())


def test_an_einsum_whose_order_depends_on_sizes_is_pruned_and_counted_as_it_is_run():
    class Attention(nnx.Module):  # linear: over tokens first where there are few features
        def __init__(self):
            self.key, self.value, self.last = linear(3, 12), linear(3, 12), linear(12, 2)

        def __call__(self, x):
            k = self.key(x)
            return self.last(jnp.einsum("qd,kd,ke->qe", k, k, self.value(x)))

    model, x = Attention(), jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    net = dhp.with_latents(model, x, min_channels=2)
    keep = {name: np.arange(12) < 3 for name in dhp.latents(net)}
    small = dhp.prune(net, keep)
    k, v = (np.asarray(layer(x))[:, :3] for layer in (model.key, model.value))
    expected = k @ k.T @ v @ np.asarray(model.last.kernel)[:3] + np.asarray(model.last.bias)
    np.testing.assert_allclose(small(x), expected, rtol=1e-4, atol=1e-4)
    layers = 8 * (2 * 3 * 3 + 3 * 2)
    assert dhp.measure_cost(small, x).flops == layers + 2 * (8 * 3 * 3)  # over tokens first
    assert dhp.measure_cost(model, x).flops == 8 * (2 * 3 * 12 + 12 * 2) + 2 * (8 * 8 * 12)


def test_a_budget_holds_where_fewer_channels_make_the_order_of_an_einsum_costlier():
    def forward(p, x):
        return jnp.einsum("bi,bj,ijk->bk", x @ p["a"], x @ p["b"], p["mix"]) @ p["out"]

    shapes = {"a": (3, 16), "b": (3, 8), "mix": (16, 8, 4), "out": (4, 2)}
    model = dhp.FromFunction(forward, {k: jnp.ones(n) for k, n in shapes.items()})
    x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
    net = dhp.with_latents(model, x, min_channels=2)
    cost = dhp.measure_cost(net, x)
    assert cost.amounts({"a": 6, "b": 8, "mix": 4})["flops"] == 2192
    keep = {
        name: np.arange(z.size) < (6 if name == "a" else 9) for name, z in dhp.latents(net).items()
    }
    assert cost.recount(keep).flops == 2320  # the two inputs first
    by = {name: np.ones(z.size) for name, z in dhp.latents(net).items()}
    small = dhp.prune_to(net, flops=2192 / cost.flops, by=by, keep={"b": 1.0, "mix": 1.0})
    assert dhp.measure_cost(small, x).flops <= 2192
    assert small.a.shape == (3, 5)
    asked, used = 2192 / cost.flops, 2320 / cost.flops
    line = rf"^flops: {asked!r} cannot be reached: the smallest network uses {used:.4f}, counted as"
    with pytest.raises(ValueError, match=line):
        dhp.prune_to(net, flops=asked, by=by, keep={"a": 6 / 16, "b": 1.0, "mix": 1.0})


MATRIX = np.ones((3, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "depends"),
    [
        (lambda x: jnp.einsum("bi,ij,jk->bk", x, MATRIX, MATRIX), True),
        (jax.vmap(lambda row: jnp.einsum("i,ij,jk", row, MATRIX, MATRIX)), True),
        (lambda x: jnp.linalg.multi_dot([x, MATRIX, MATRIX]), True),
        (lambda x: jnp.einsum("bi,ij->bj", x, MATRIX) @ MATRIX, False),
        (lambda x: jnp.dot(x, MATRIX) @ MATRIX, False),
    ],
)
def test_where_the_order_of_contractions_depends_on_sizes_is_seen(call, depends):
    assert depends_on_widths(jax.make_jaxpr(call)(jnp.ones((4, 3))).jaxpr) is depends


def test_a_jitted_einsum_is_counted_in_the_order_of_its_sizes_after_it_was_traced():
    @jax.jit
    def mixed(k, v):
        return jnp.einsum("qd,kd,ke->qe", k, k, v)

    def forward(p, x):
        return mixed(x @ p["key"], x @ p["value"]) @ p["out"]

    params = {"key": jnp.ones((3, 6)), "value": jnp.ones((3, 6)), "out": jnp.ones((6, 2))}
    x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
    net = dhp.with_latents(dhp.FromFunction(forward, params), x)
    assert dhp.measure_cost(net, x).flops == 8 * (2 * 3 * 6 + 6 * 2) + 2 * (8 * 6 * 6)


def test_why_an_axis_stays_is_told_with_the_first_cause():
    class Mixed(nnx.Module):
        def __init__(self):
            self.first, self.second, self.last = linear(3, 6), linear(6, 6), linear(6, 2)

        def __call__(self, x):
            x = jax.lax.cumsum(self.first(x), 1)
            return self.last(nnx.relu(x + self.second(x)))

    fixed = {
        array: why for why, places in discover(Mixed(), (3,)).fixed().items() for array in places
    }
    at = r" at tracing/test_nnx_layers.py:\d+"
    for array, why in {
        ("first.kernel", 0): f".*{at}: it is that of an input of the network",
        ("first.kernel", 1): f"cumsum goes along it{at}",
        ("second.kernel", 1): f"add meets an axis that stays{at}: cumsum goes along it{at}",
        ("last.kernel", 0): f"dot_general meets an axis that stays{at}: cumsum goes along it{at}",
    }.items():
        assert re.fullmatch(why, fixed[array]), fixed[array]


@pytest.mark.parametrize("drawn_in", ["eval", "train"])
def test_what_evaluation_draws_from_a_fixed_key_keeps_its_channels(drawn_in):
    class Noisy(nnx.Module):
        def __init__(self):
            self.first, self.last = linear(3, 6), linear(6, 2)
            self.noise = nnx.Dropout(0.5, deterministic=False)

        def __call__(self, x):
            x = self.first(x)
            if drawn_in == "eval" or not self.noise.deterministic:
                x = x * jax.random.normal(jax.random.key(0), x.shape[-1:])
            return self.last(x)

    found = discover(Noisy(), (3,))
    assert [family.size for family in found.families] == [6] * (drawn_in == "train")
    told = [why for why in found.fixed() if "mul meets an axis that stays at tracing/te" in why]
    assert bool(told) == (drawn_in == "eval")


class Failing(Packed):
    pass


@resize.register
def _(module: Failing, kept):
    module.sizes = (2, int(kept["weight"][1].sum()) // 2)


class Shown(NamedTuple):
    y: jax.Array
    name: str


@pytest.mark.parametrize(
    ("layer", "call", "message"),
    [
        (
            Failing(),
            None,
            "^model: .* tracing.resize that suits Failing 'layer'; it fails: 'weight'",
        ),
        (
            nnx.PReLU(jnp.ones(6)),
            None,
            r"^model: expected an array in variable 'extra', got .* int",
        ),
        (Packed(), lambda m, x: Shown(m(x), "y"), "^call: .* outputs are arrays, .* a str among"),
    ],
)
def test_what_cannot_be_traced_is_told_with_what_is_wrong(layer, call, message):
    model = Between(6, layer, 6 if isinstance(layer, nnx.PReLU) else 4)
    if isinstance(layer, nnx.PReLU):
        model.extra = nnx.Param(3)
    with pytest.raises(ValueError, match=message):
        dhp.with_latents(model, (3,), call=call)
