"""Functions of parameters, and trees of objects, are pruned as networks are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, dataclass_transform

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dhp_jax as dhp

SHAPE = (6, 6, 3)
META = ("shape", "width")  # fields of objects that are no leaves of a tree


class Head(NamedTuple):
    weight: jax.Array
    bias: jax.Array


def parameters(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    layers = [{"w1": draw(16, 24), "b1": draw(24), "w2": draw(24, 16)} for _ in range(2)]
    return {"stem": draw(3, 3, 3, 16), "layers": layers, "head": Head(draw(16, 4), draw(4))}


@jax.jit
def forward(params, x):
    x = jax.lax.conv_general_dilated(
        x, params["stem"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for layer in params["layers"]:
        x = x + jax.nn.gelu(x @ layer["w1"] + layer["b1"]) @ layer["w2"]
    return x.mean((1, 2)) @ params["head"].weight + params["head"].bias


def images(count=4):
    return jax.random.normal(jax.random.key(1), (count, *SHAPE))


def test_a_function_is_pruned_and_takes_what_is_left():
    params = parameters()
    net = dhp.FromFunction(forward, params)
    np.testing.assert_array_equal(net(images()), forward(params, images()))
    traced = dhp.with_latents(net, SHAPE)
    sizes = {name: z.size for name, z in dhp.latents(traced).items()}
    trunk = (sizes.keys() - {"layers.0", "layers.1"}).pop()
    assert sizes == {"layers.0": 24, "layers.1": 24, trunk: 16}
    masks = {name: np.ones(z.size, bool) for name, z in dhp.latents(traced).items()}
    masks[trunk][:3] = masks["layers.1"][[4, 9]] = False
    small = dhp.prune(traced, masks)
    params["stem"] = params["stem"] * masks[trunk]
    for number, layer in enumerate(params["layers"]):
        layer["b1"] = layer["b1"] * masks[f"layers.{number}"]
        layer["w1"] = layer["w1"] * masks[f"layers.{number}"]
        layer["w2"] = layer["w2"] * masks[trunk]
    np.testing.assert_allclose(small(images()), forward(params, images()), rtol=1e-5, atol=1e-5)
    left = small.parameters()
    assert left["head"].weight.shape == (13, 4)
    assert left["layers"][1]["w1"].shape == (13, 22)
    np.testing.assert_array_equal(forward(left, images()), small(images()))


def test_its_layers_are_told_by_their_names_and_it_is_saved(tmp_path):
    net = dhp.with_latents(dhp.FromFunction(forward, parameters()), SHAPE)
    small = dhp.prune_to(net, flops=0.6)
    names = [line.split()[0] for line in str(dhp.summary(net, small)).splitlines()[1:5]]
    assert names == ["stem", "layers.0", "layers.1", "head"]
    assert "entries, with\n" not in str(dhp.explain(net))
    dhp.save(tmp_path / "small", small)
    loaded = dhp.load(
        tmp_path / "small", build=lambda rngs: dhp.FromFunction(forward, parameters(3))
    )
    np.testing.assert_array_equal(loaded(images()), small(images()))


def test_it_is_searched_with_latents_and_trained():
    net = dhp.with_latents(dhp.FromFunction(forward, parameters()), SHAPE)
    optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        def loss(net):
            return jnp.square(net(images()) - 1).mean()

        value, grads = nnx.value_and_grad(loss)(net)
        optimizer.update(net, grads)
        return value

    losses = [float(step(net, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


@dataclass_transform(frozen_default=True)
def tree(kind):
    """Makes a class a frozen dataclass and a tree of its fields, but for those of `META`."""
    made = dataclass(frozen=True)(kind)
    data = [name for name in made.__annotations__ if name not in META]
    meta = [name for name in made.__annotations__ if name in META]
    return jax.tree_util.register_dataclass(made, data, meta)


@tree
class Normed:
    scale: jax.Array
    shape: tuple[int, ...]

    def __call__(self, x):
        if x.shape[-1:] != self.shape:
            raise ValueError(f"expected {self.shape}, got {x.shape}")
        return self.scale * x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


@tree
class Attention:
    qkv: jax.Array
    out: jax.Array
    heads: int  # a leaf of the tree
    width: int  # what no code reads

    def __call__(self, x):
        split = (x @ self.qkv).reshape(*x.shape[:2], 3, self.heads, 4)
        q, k, v = (split[:, :, part] for part in range(3))
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 2)
        y = jnp.einsum("bhts,bshd->bthd", weights, v)
        return y.reshape(*x.shape[:2], self.heads * 4) @ self.out


@tree
class Layer:
    norm: Normed
    attention: Attention
    activation: Callable
    rate: float

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return self.activation(x) if self.rate > 0 else x


@tree
class Objects:
    embed: jax.Array
    layers: list[Layer]
    head: jax.Array

    def __call__(self, x):
        x = x @ self.embed
        for layer in self.layers:
            x = layer(x)
        return x.mean(1) @ self.head


def objects(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    def layer():
        attention = Attention(draw(12, 72), draw(24, 12), 6, 12)
        return Layer(Normed(1 + draw(12), (12,)), attention, jnp.tanh, 0.5)

    return Objects(draw(5, 12), [layer(), layer()], draw(12, 3))


def from_objects(seed=0):
    return dhp.FromFunction(lambda model, x: model(x), objects(seed))


def test_objects_that_keep_sizes_are_pruned_and_come_back_as_objects(tmp_path):
    whole, x = objects(), jax.random.normal(jax.random.key(0), (2, 7, 5))
    net = dhp.with_latents(dhp.FromFunction(lambda model, x: model(x), whole), (7, 5))
    np.testing.assert_array_equal(net(x), whole(x))
    assert sorted(z.size for z in dhp.latents(net).values()) == [6, 6, 12]
    masks = {name: np.arange(z.size) % 3 > 0 for name, z in dhp.latents(net).items()}
    small = dhp.prune(net, masks)
    model = small.parameters()
    assert isinstance(model, Objects)
    first = model.layers[0]
    assert (first.norm.shape, first.attention.heads) == ((8,), 4)
    assert (first.attention.width, first.activation, first.rate) == (12, jnp.tanh, 0.5)
    assert (whole.layers[0].norm.shape, whole.layers[0].attention.heads) == ((12,), 6)
    np.testing.assert_array_equal(model(x), small(x))
    dhp.save(tmp_path / "small", small)
    loaded = dhp.load(tmp_path / "small", build=lambda rngs: from_objects(1))
    np.testing.assert_array_equal(loaded(x), small(x))
    dhp.save(tmp_path / "net", net)
    loaded = dhp.prune(dhp.load(tmp_path / "net", build=lambda rngs: from_objects(1)), masks)
    np.testing.assert_array_equal(loaded(x), small(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, {"a": np.ones(2)}), "function: expected a function of parameters and inputs, got 3"),
        ((forward, {}), "params: expected a tree of arrays, of one path each, got {}"),
        ((forward, {"eval": np.ones(2)}), "params: expected paths that begin with other names"),
        (
            (forward, {"a": {"b.c": np.ones(2)}, "a.b": {"c": np.ones(2)}}),
            "params: expected arrays of one path each, got two of 'a.b.c'",
        ),
        ((forward, np.ones(2)), "params: expected paths that begin with other names"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dhp.FromFunction(*arguments)
