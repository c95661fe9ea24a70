"""What a type checker sees of the library in a program of a user; `make lint` checks this file.

It is read by the checker, not run: `assert_type` fails there where a type is another.
"""

from collections.abc import Callable, Mapping
from typing import Any, assert_type

from flax import nnx
from jax import Array
import numpy as np
import optax

import dhp_jax as dhp
from dhp_jax.export import Exported, export


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        image = dhp.Latent(1, prunable=False, rngs=rngs)
        z1, z2 = dhp.Latent(16, rngs=rngs), dhp.Latent(32, min_channels=8, rngs=rngs)
        both = dhp.concat(z1, dhp.repeat(z2, 2))
        self.conv1 = dhp.HyperConv(image, z1, (3, 3), use_bias=False, rngs=rngs)
        self.norm = dhp.BatchNorm(z1, momentum=0.9, rngs=rngs)
        self.conv2 = dhp.HyperConv(z1, dhp.repeat(z2, 2), 1, strides=2, rngs=rngs)
        self.hidden = dhp.Linear(both, z1, rngs=rngs)
        self.head = dhp.Linear(z1, 10, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.norm(self.conv1(x)))
        return self.head(self.hidden(self.conv2(x).mean(axis=(1, 2))))


class OfNames(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.head = dhp.Linear(dhp.Latent(4, rngs=rngs), 2, rngs=rngs)


class Scale(nnx.Module):
    """A layer of one's own, and below what stands in for it in a network of latents."""

    def __init__(self, scale: Array):
        self.scale = nnx.Param(scale)

    def __call__(self, x: Array) -> Array:
        return x * self.scale[...]


class ScaleOf(Scale):
    def __init__(self, z: dhp.Axis, scale: Array):
        super().__init__(scale)
        self.z = z

    def plain(self, keep: Mapping[dhp.Latent, np.ndarray] | None = None) -> Scale:
        return Scale(self.scale[...][self.z.keep(keep)])


def networks_keep_their_class(model: Net, x: Array) -> None:
    assert_type(dhp.prune(model), Net)
    assert_type(dhp.prune(model, dhp.survivors(model, threshold=5e-3)), Net)
    assert_type(dhp.prune_to(model, (8, 8, 1), flops=0.5), Net)
    assert_type(dhp.prune_to(model, (8, 8, 1), {"conv*": 8}, by=dhp.l1_scores(model)), Net)
    assert_type(dhp.fold(dhp.prune(model), (8, 8, 1)), Net)
    assert_type(dhp.with_latents(model, (8, 8, 1)), Net)
    assert_type(dhp.with_latents(model, rngs=nnx.Rngs(1), build=Net), Net)
    assert_type(dhp.with_gates(model, rngs=nnx.Rngs(1), build=Net), Net)
    assert_type(dhp.with_classes(model, 7, rngs=nnx.Rngs(1)), Net)
    assert_type(dhp.load("small", build=Net), Net)
    assert_type(dhp.load("small", build=lambda rngs: Net(rngs)), Net)
    assert_type(dhp.load("small", build=OfNames), OfNames)
    assert_type(dhp.prune_to(model, (8, 8, 1), flops=0.5)(x), Array)


def networks_of_families(path: str, x: Array) -> None:
    model = dhp.models.build("resnet", depth=20, rngs=nnx.Rngs(0))
    assert_type(model, nnx.Module)
    assert_type(dhp.load(path), nnx.Module)
    assert_type(dhp.prune_to(model, (32, 32, 3), params=0.5), nnx.Module)
    assert_type(dhp.inference(model)(x), Array)


def layers_are_called(model: Net, x: Array) -> None:
    assert_type(model.conv1(x), Array)
    assert_type(model.conv1.plain(), nnx.Conv)
    assert_type(model.norm.plain(), nnx.BatchNorm)
    assert_type(model.head.plain(), nnx.Linear)
    is_replaced(ScaleOf(dhp.Latent(4, rngs=nnx.Rngs(0)), x))


def is_replaced(layer: dhp.Prunable) -> None:
    assert_type(layer.plain(), nnx.Module)


def what_is_found_out(model: Net) -> None:
    latents = dhp.latents(model)
    assert_type(latents, dict[str, dhp.Latent])
    assert_type(latents["z1"].size, int)
    masks = dhp.survivors(model, threshold=5e-3)
    cost = dhp.measure_cost(model, (8, 8, 1))
    assert_type(cost, dhp.Cost)
    assert_type(cost.flops, int)
    assert_type(
        cost.shares({name: int(mask.sum()) for name, mask in masks.items()})["flops"], float | Array
    )
    scores: Mapping[str, np.ndarray] = dhp.per_cost(dhp.l1_scores(model), cost)
    dhp.prune_to(model, (8, 8, 1), flops=0.5, by=scores, keep={"z*": 0.25})
    dhp.prune_to(model, (8, 8, 1), flops=0.5, by=dhp.uniform_within)
    print(dhp.summary(model, dhp.prune(model), (8, 8, 1)))


def steps(model: Net, rate: Callable[[Any], Any]) -> None:
    mask = dhp.prunable_latents(nnx.state(model, nnx.Param))
    shrink = optax.masked(dhp.prox_l1(strength=0.5, learning_rate=rate), mask)
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(1e-3), shrink), wrt=nnx.Param)
    assert_type(optimizer, nnx.Optimizer[Net])
    dhp.prox_l1({"w": 0.1, "b": {"c": rate}}, 0.1)
    dhp.prox_l2(0.1, axis=(0, 1, 2))


def files(model: Net) -> None:
    dhp.save("small", model, input_shape=(8, 8, 1), classes=["a", "b"])
    made = export(model, "small.onnx", (8, 8, 1), format="onnx")
    assert_type(made, Exported)
    assert_type(made.fixed, str | None)
