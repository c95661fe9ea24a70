"""Latents for a pruned network, so that it can be pruned again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from flax import linen, nnx
import numpy as np

from dhp_jax.core.hypernet import HypernetArrays
from dhp_jax.core.latent import Axis, Concat, Latent, Repeat, latents, walk
from dhp_jax.core.layers import Hyper
from dhp_jax.core.plain import Keep, Model, is_prunable, select_entries, slice_axes
from dhp_jax.core.provenance import Architecture, architecture_of, set_architecture
from dhp_jax.errors import ArgumentError, check_integer, shown
from dhp_jax.models import registry
from dhp_jax.pruned.fresh_weights import take_arrays
from dhp_jax.tracing.declared import kept_of_layer
from dhp_jax.tracing.layer_sizes import resize
from dhp_jax.tracing.network import traced

KeptAxes = Sequence[np.ndarray]  # of each axis of an array, a mask


def with_latents(
    model: Model,
    inputs: Any = None,
    *,
    call: Callable[..., Any] | None = None,
    embedding: int | None = None,
    min_channels: int | None = None,
    rngs: nnx.Rngs | None = None,
    build: Callable[..., nnx.Module] | None = None,
) -> Model:
    """A network as one of latents, so that it can be searched and pruned.

    With `inputs` it may be any network of `flax.nnx`, with its trained weights. It is traced to
    find which channels can go (`dhp.explain` tells); the arrays that these are axes of are
    generated from latents, and all else stays: the network is called, trained, saved, jitted as it
    was. Latents begin at 1, and it computes what `model` computes, to the bit in float32. By
    default each number of an array is multiplied by the latents of its axes, and the arrays of
    `model` are shared, so copy it before donating buffers, if you still need it.

    Without `inputs` it is a network that `prune` or a run of this library has made of latents. It
    computes what `model` computes: the hypernetworks are fresh, but their last biases make up for
    the difference to its kernels. The latents, of the sizes that pruning has left, are drawn from
    N(0, 1), so the proximal step has to run before their magnitudes mean something.

    Args:
      model: a network; left as it was.
      inputs: the shape of one example, such as `(height, width, channels)`; an array or abstract
        array with its batch axis; or a tuple or list of arguments or a dict, of these.
      call: with `inputs`, a function of the model and these, where that is not `model(*inputs)`.
      embedding: with `inputs`, size `m` of the embedding of each pair of channels, for arrays that
        a hypernetwork generates; `None` for no hypernetworks. Arrays of another type than
        `nnx.Param`, such as `nnx.LoRAParam`, or with metadata have none, and keep both.
      min_channels: how many entries of each latent survive at least. `None` for 4, and without
        `inputs` for what the network is built with.
      rngs: the `params` stream draws what hypernetworks, and without `inputs` latents, begin with.
      build: without `inputs`, for a network of your own class: makes the unpruned network, as for
        `load`.

    Returns:
      The network, in the mode of `model` with `inputs`, in training mode without.

    Raises:
      ValueError: the network does not take such inputs, or nothing of it can be pruned; without
        `inputs` a network that was not pruned, has latents, or is folded; one of your own class
        without `build`; a layer of your own whose `plain` does not keep parts of its arrays.

    Example:
      >>> net = dhp.with_latents(model, (224, 224, 3))
      >>> small = dhp.prune_to(net, flops=0.5)
      >>> again = dhp.with_latents(dhp.load("runs/resnet56/model"), rngs=nnx.Rngs(1))
    """
    if inputs is not None:
        if build is not None:
            raise ArgumentError("build", "None with inputs", shown(build))
        if rngs is not None and not isinstance(rngs, nnx.Rngs):
            raise ArgumentError("rngs", "nnx.Rngs or None", shown(rngs))
        if callable(model) and not isinstance(model, nnx.Module | type):
            of_linen = isinstance(model, linen.Module)
            made = "FromLinen(module, variables)" if of_linen else "FromFunction(function, params)"
            raise ArgumentError("model", f"an nnx.Module, such as dhp.{made}", shown(model))
        if latents(model):
            raise ValueError("model: expected a network without latents; prune(model) makes one")
        if any(isinstance(module, nnx.bridge.ToNNX) for _, _, module in walk(model)):
            wanted = "dhp.FromLinen(module, variables) for one of flax.linen"
            raise ArgumentError("model", wanted, "one of nnx.bridge.ToNNX")
        return traced(
            model,
            inputs,
            call=call,
            embedding=embedding,
            min_channels=4 if min_channels is None else min_channels,
            rngs=rngs,
        )
    for name, value in (("embedding", embedding), ("call", call)):
        if value is not None:
            raise ArgumentError(name, "None without inputs", shown(value))
    if min_channels is not None:
        check_integer("min_channels", min_channels)
    made = architecture_of(model)
    if isinstance(model, nnx.Module) and made == Architecture() and not latents(model):
        raise ValueError(
            "inputs: expected the shape of one example, such as with_latents(model, (32, 32, 3)), "
            "for a network that this library has not pruned; got None"
        )
    if not isinstance(rngs, nnx.Rngs):
        raise ArgumentError("rngs", "nnx.Rngs for a network that was pruned", shown(rngs))
    if made.survivors is None or made.folded or latents(model):
        raise ValueError("model: expected a pruned network, without latents and not folded")
    if made.cuts is not None:
        raise ValueError("inputs: expected those of a network whose axes are found by tracing")
    if (made.family is None) != (build is not None):
        raise ValueError(
            f"build: expected {'a function' if made.family is None else 'none'} for a network of "
            f"{'your own class' if made.family is None else f'family {made.family!r}'}"
        )
    whole = (
        make_network(build, rngs)
        if build
        else registry.build(made.family, rngs=rngs, **made.arguments)
    )
    fresh = narrow(whole, made.survivors)
    take_arrays(model, fresh)
    if min_channels is not None:
        for z in latents(fresh).values():
            z.vector.set_metadata(min_channels=min(int(min_channels), z.size))
    fresh.train()
    return fresh


def narrow(model: nnx.Module, survivors: Mapping[str, tuple[int, ...]]) -> nnx.Module:
    """Removes all entries of latents but survivors; computes what `prune` leaves, on latents still.

    The model is left as it was, and may be abstract.
    """
    model = nnx.clone(model)
    masks: dict[Latent, np.ndarray] = {}
    for name, z in latents(model).items():
        masks[z] = np.zeros(z.size, bool)
        masks[z][list(survivors[name])] = True
    modules = [module for _, _, module in walk(model)]
    _narrow_layers([module for module in modules if not isinstance(module, Axis)], masks)
    for z, mask in masks.items():
        z.vector.set_value(select_entries(z.vector, mask))
        z.size = int(mask.sum())
        z.vector.set_metadata(min_channels=min(z.min_channels, z.size))
    for module in modules:
        if isinstance(module, Axis):
            module.size = _size(module)
    kept = {name: tuple(survivors[name]) for name in latents(model)}
    made = replace(architecture_of(model), survivors=kept, renewed=True)
    set_architecture(model, made)
    return model


def _size(axis: Axis) -> int:
    """The number of channels of an axis, from the sizes of its latents."""
    match axis:
        case Concat():
            return sum(map(_size, axis.parts))
        case Repeat():
            return axis.times * _size(axis.base)
        case _:
            return axis.size


def _narrow_layers(layers: list[nnx.Module], keep: Keep) -> None:
    """Cuts layers on latents down to the channels in `keep`; they stay layers on latents.

    Raises:
      ValueError: layers keep different parts of a variable that they share.
    """
    kept = [(layer, _kept_of(layer, keep)) for layer in layers]
    parts: dict[int, tuple[nnx.Variable, KeptAxes]] = {}
    for layer, own in kept:
        for name, axes in own.items():
            variable = getattr(layer, name)
            _, known = parts.setdefault(id(variable), (variable, axes))
            if not all(map(np.array_equal, known[::-1], axes[::-1])):
                raise ValueError(
                    f"model: expected layers that share arrays to keep the same channels; "
                    f"{name!r} of a {type(layer).__name__} keeps others"
                )
    for variable, axes in parts.values():
        masks = dict(zip(range(-len(axes), 0), axes, strict=True))
        variable.set_value(slice_axes(variable[...], masks))
    for layer, own in kept:
        if not isinstance(layer, Hyper):
            if is_prunable(layer):
                resize(layer, own)
        elif getattr(layer, "feature_group_count", 1) != 1:
            channels = int(layer.z_in.keep(keep).sum())
            layer.feature_group_count = channels // layer.z_group.size


def _kept_of(layer: nnx.Module, keep: Keep) -> dict[str, KeptAxes]:
    """What a layer keeps of the last axes of its arrays, by name."""
    if isinstance(layer, Hyper):
        rows, columns = layer.kernel_axis().keep(keep), layer.z_out.keep(keep)
        kept: dict[str, KeptAxes] = {name: [rows, columns] for name in HypernetArrays._fields}
        return kept if layer.bias is None else kept | {"bias": [columns]}
    return dict(kept_of_layer(layer, keep)) if is_prunable(layer) else {}


def make_network(
    build: Callable[..., nnx.Module],
    rngs: nnx.Rngs,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> nnx.Module:
    """Calls `build(rngs)` or `build(rngs=rngs)`, whichever it takes, and with what else."""
    if not registry.taken(build, ["rngs"]):
        return build(rngs)
    return build(rngs=rngs, **{name: arguments[name] for name in registry.taken(build, arguments)})
