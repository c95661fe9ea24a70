"""Functions of parameters are pruned as networks are."""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dhp_jax as dhp

SHAPE = (6, 6, 3)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, {"a": np.ones(2)}), "function: expected a function of parameters and inputs, got 3"),
        ((forward, {}), "params: expected a tree of arrays, of one path each, got {}"),
        ((forward, {"eval": np.ones(2)}), "params: expected paths that begin with other names"),
        ((forward, np.ones(2)), "params: expected paths that begin with other names"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dhp.FromFunction(*arguments)
