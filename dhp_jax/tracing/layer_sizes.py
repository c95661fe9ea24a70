"""Sizes that layers keep beside their arrays: the one table of layers.

A layer whose class is not here keeps the sizes that it had. Where its code needs them, the proof
fails and its axes stay.
"""

from collections.abc import Iterator, Mapping, Sequence
import copy
from dataclasses import fields, is_dataclass
import functools
from typing import Any

from flax import nnx
import numpy as np

from dhp_jax.core.layers import ChannelBias

KeptAxes = Mapping[str, Sequence[np.ndarray]]


@functools.singledispatch
def resize(module: nnx.Module, kept: KeptAxes) -> None:
    """Sets the sizes that a module keeps as numbers to those of its arrays.

    Register a function for a layer of your own:

    Args:
      module: its arrays are cut already; changed in place.
      kept: by attribute of the module what was kept of each axis of that array, boolean masks.

    Example:
      >>> @dhp_jax.tracing.resize.register
      ... def _(module: MyLayer, kept):
      ...     module.features = module.weight.shape[-1]
    """


@resize.register
def _(module: nnx.Linear, kept: KeptAxes) -> None:
    module.in_features, module.out_features = module.kernel.shape[-2:]


@resize.register
def _(module: nnx.LinearGeneral, kept: KeptAxes) -> None:
    batch, inputs = len(module.batch_axis), len(module.in_features)
    shape = tuple(module.kernel.shape)
    module.in_features = shape[batch : batch + inputs]
    module.out_features = shape[batch + inputs :]


@resize.register
def _(module: nnx.Einsum, kept: KeptAxes) -> None:
    module.kernel_shape = tuple(module.kernel.shape)
    module.bias_shape = None if module.bias is None else tuple(module.bias.shape)


@resize.register
def _(module: nnx.Conv, kept: KeptAxes) -> None:
    groups = module.feature_group_count
    if groups > 1 and "kernel" in kept:
        groups = int(kept["kernel"][-1].reshape(groups, -1).any(1).sum())
    shape = tuple(module.kernel.shape)
    module.feature_group_count, module.kernel_shape = groups, shape
    module.in_features, module.out_features = groups * shape[-2], shape[-1]


@resize.register
def _(module: nnx.ConvTranspose, kept: KeptAxes) -> None:
    shape = tuple(module.kernel.shape)
    into, out = (-1, -2) if module.transpose_kernel else (-2, -1)
    module.in_features, module.out_features = shape[into], shape[out]
    module.kernel_shape = shape


@resize.register
def _(module: nnx.BatchNorm, kept: KeptAxes) -> None:
    module.num_features = module.mean.shape[-1]


@resize.register(nnx.InstanceNorm)
@resize.register(nnx.LayerNorm)
@resize.register(nnx.RMSNorm)
def _(module: nnx.Module, kept: KeptAxes) -> None:
    for array in (module.scale, getattr(module, "bias", None)):
        if array is not None:
            module.num_features = array.shape[-1]


@resize.register
def _(module: ChannelBias, kept: KeptAxes) -> None:
    module.num_features = module.bias.shape[-1]


@resize.register
def _(module: nnx.GroupNorm, kept: KeptAxes) -> None:
    for name in ("scale", "bias"):
        if name in kept:
            grid = kept[name][0].reshape(module.num_groups, -1)
            module.num_groups = int(grid.any(1).sum())
            module.group_size = int(grid.any(0).sum())
            if hasattr(module, "num_features"):
                module.num_features = int(grid.sum())
            return


@resize.register
def _(module: nnx.Embed, kept: KeptAxes) -> None:
    module.num_embeddings, module.features = module.embedding.shape[-2:]


@resize.register
def _(module: nnx.LoRA, kept: KeptAxes) -> None:
    module.in_features, module.out_features = module.lora_a.shape[0], module.lora_b.shape[-1]


@resize.register(nnx.GRUCell)
@resize.register(nnx.OptimizedLSTMCell)
@resize.register(nnx.SimpleCell)
def _(module: nnx.Module, kept: KeptAxes) -> None:
    module.in_features = module.dense_i.kernel.shape[0]
    module.hidden_features = module.dense_h.kernel.shape[0]


@resize.register
def _(module: nnx.LSTMCell, kept: KeptAxes) -> None:
    module.in_features = module.ii.kernel.shape[0]
    module.hidden_features = module.hi.kernel.shape[0]


@resize.register
def _(module: nnx.MultiHeadAttention, kept: KeptAxes) -> None:
    module.in_features, module.num_heads, module.head_dim = module.query.kernel.shape
    module.in_kv_features = module.key.kernel.shape[0]
    if hasattr(module, "num_kv_heads"):
        module.num_kv_heads = module.key.kernel.shape[1]
    module.qkv_features = module.num_heads * module.head_dim
    module.out_features = module.out.kernel.shape[-1]


def numbers_in(module: nnx.Module) -> Iterator[tuple[str, int]]:
    """The integers that a module holds, by attribute.

    Those of a tuple are `shape.0`, and those of a dataclass, as of a configuration, `config.width`.
    """
    for attribute, value in vars(module).items():
        if type(value) is int:
            yield attribute, value
        elif type(value) is tuple and all(type(size) is int for size in value):
            yield from ((f"{attribute}.{place}", size) for place, size in enumerate(value))
        elif is_dataclass(value) and not isinstance(value, type | nnx.Pytree | nnx.Variable):
            held = ((field.name, getattr(value, field.name, None)) for field in fields(value))
            yield from ((f"{attribute}.{name}", size) for name, size in held if type(size) is int)


def set_number(module: nnx.Module, attribute: str, value: int) -> None:
    """Sets an integer that a module holds, by the name that `numbers_in` gives it.

    A dataclass becomes another one, for modules may share it.
    """
    if attribute in vars(module):
        setattr(module, attribute, value)
        return
    name, _, place = attribute.rpartition(".")
    held: Any = vars(module)[name]
    if isinstance(held, tuple):
        made = (*held[: int(place)], value, *held[int(place) + 1 :])
    else:
        made = copy.copy(held)
        object.__setattr__(made, place, value)  # it may be frozen
    setattr(module, name, made)
