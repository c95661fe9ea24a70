"""Hypernetworks on accelerators: packed arrays, and small kernels generated together."""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any
import weakref

from flax import nnx
import jax
from jaxtyping import Array

from dhp_jax.core.hypernet import HypernetArrays, KernelGenerator, hyper_kernels
from dhp_jax.core.latent import Axis, Latent, walk
from dhp_jax.core.surgery import override

MAX_SMALL_SIZE = 2**20  # numbers of an array that is small work for a GPU


def pack_axes(model: nnx.Module) -> nnx.Module:
    """Reshapes the arrays of hypernetworks so that a TPU stores them without padding, in a copy.

    A TPU pads the last axis of an array to 128 numbers, and arrays of 16 channels take 8 times the
    memory, and the time to read it. There the arrays of hypernetworks have both channel axes as
    one, but for layers that share some of them, or generate their kernel in a way of their own.
    Elsewhere the model itself is returned.
    """
    if jax.default_backend() != "tpu":
        return model
    model = nnx.clone(model)
    layers = _generators(model)
    of_each = [[getattr(layer, name) for name in HypernetArrays._fields] for layer in layers]
    uses = Counter(id(variable) for variables in of_each for variable in variables)
    for layer, variables in zip(layers, of_each, strict=True):
        is_shared = any(uses[id(variable)] > 1 for variable in variables)
        if _is_ordinary(layer) and not is_shared and layer.b0[...].ndim == 2:
            for variable in variables:
                x = variable[...]
                variable.set_value(x.reshape(*x.shape[:-2], -1))
    return model


def generate_together(model: nnx.Module) -> None:
    """Makes layers generate small kernels of one shape together, in place; same numbers.

    A GPU takes longer to start many small programs than to run them. A layer generates its kernel
    by itself where that is not known to be the same: if its arrays or axes change before it is
    called, if it is called within a transformation, and if its class or its latents override how
    the kernel is computed. The model is one that was merged within a jitted function.
    """
    alike = defaultdict(list)
    for layer in _generators(model):
        if _is_ordinary(layer) and _is_small(layer):
            inputs = *(axis.value() for axis in layer.kernel_axes()), layer.arrays()
            shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(inputs))
            alike[shapes].append((layer, inputs))
    for group in alike.values():
        if len(group) > 1:
            layers, inputs = zip(*group, strict=True)
            for layer, kernel in zip(layers, hyper_kernels(list(inputs)), strict=True):
                _MADE[layer] = _sources(layer), kernel.astype(layer.param_dtype)
                override(layer, kernel=_made_kernel)


def _generators(model: nnx.Module) -> list[KernelGenerator]:
    """The layers and arrays of a network that have a hypernetwork."""
    found = (layer for _, _, layer in walk(model) if isinstance(layer, KernelGenerator))
    return [layer for layer in found if hasattr(layer, "w2")]


def _is_ordinary(layer: KernelGenerator) -> bool:
    """Whether the kernel follows from the layer's arrays and ordinary latents, in the usual way."""
    own = any(
        getattr(type(layer), name) is not getattr(KernelGenerator, name) or name in vars(layer)
        for name in ("kernel", "arrays")
    )
    ours = (type(axis).value.__module__.startswith("dhp_jax.") for axis in _axes(layer))
    return not own and all(ours)


def _is_small(layer: KernelGenerator) -> bool:
    """Whether a hypernetwork is a single one, not stacked, and small."""
    w2 = layer.w2[...]
    return w2.ndim == len(layer.kernel_size) + 3 and w2.size <= MAX_SMALL_SIZE


def _axes(layer: KernelGenerator) -> list[Axis]:
    """The axes of the kernel, each with those that it consists of."""
    parts = (part for axis in layer.kernel_axes() for _, _, part in walk(axis))
    return [part for part in parts if isinstance(part, Axis)]


def _sources(layer: KernelGenerator) -> list[Any]:
    """All objects that an ordinary kernel follows from."""
    axes = _axes(layer)
    vectors = [axis.value() for axis in axes if isinstance(axis, Latent)]
    return [*axes, *vectors, *layer.arrays()]


# Kernels that were generated together, and what from, while their network is traced.
_MADE: weakref.WeakKeyDictionary[KernelGenerator, tuple[list[Any], Array]] = (
    weakref.WeakKeyDictionary()
)


def _made_kernel(generate: Callable[[KernelGenerator], Array], layer: KernelGenerator) -> Array:
    if layer in _MADE:  # and not a copy within a transformation
        (before, made), now = _MADE[layer], _sources(layer)
        if len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True)):
            return made
    return generate(layer)
