"""Trained networks whose latents are gates on what layers read."""

from collections.abc import Callable, Mapping
from typing import Any
import warnings

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.core.activations import PReLU, ReLU
from dhp_jax.core.hypernet import HypernetArrays
from dhp_jax.core.latent import Axis, has_gates, latents, walk
from dhp_jax.core.layers import ChannelBias, Hyper, Linear, Norm
from dhp_jax.core.plain import Model, is_prunable
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.state import value_of, variables_of, with_metadata_of
from dhp_jax.core.surgery import override, prune
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.pruned.fresh_weights import carry_kernels
from dhp_jax.pruned.relatent import with_latents
from dhp_jax.tracing.gating import CLOSED, gating
from dhp_jax.tracing.generated import GeneratedArray, ordinary
from dhp_jax.tracing.network import gated, install, is_traced
from dhp_jax.tracing.reads import all_reads, read_axes
from dhp_jax.tracing.weights import READ, makers, weights_of

KNOWN = Hyper | Linear | Norm | ChannelBias | PReLU | ReLU  # layers: what each reads


def with_gates(
    model: Model,
    *,
    rngs: nnx.Rngs,
    build: Callable[..., nnx.Module] | None = None,
) -> Model:
    """A trained network as one of latents that are all 1 and gate what layers read.

    The kernel of a layer that reads the axis of a latent `z` is `K[.., i, o] = z[i] W[.., i, o]`,
    with the trained kernel for `W`. At `z = 1` it is that kernel to the bit. At `z[i] = 0` the
    network computes exactly what is left when `dhp.prune` removes entry `i`, whatever stands
    between the layers, for nothing reads the channel; but a mean or maximum over channels, as in
    LayerNorm, still counts it, and with declared latents a sum in your own code, too. The
    derivative of the loss by `z[i]` at 1 is the first-order Taylor term of the channel (see
    `dhp.taylor_scores`).

    This is the hypernetwork with an embedding of 1 and no biases, without the factor of the output
    axis. A BatchNorm behind the convolution would undo that factor, and would go on adding its bias
    to a channel whose filters are zero.

    Of a network of traced latents, gates close channels in training and in evaluation, also those
    that a head for training alone reads. Gates of kernels do not close all channels: not those that
    no kernel reads in one of these modes, as of queries and keys, which are multiplied with each
    other; not those that the code adds up, as in a squared norm; and not those of a kernel that is
    not zero where its array is, as a softplus, or not in proportion to it, as one that is rounded
    or normalised. Such a latent gates every array that it is in, and its derivative is that by a
    factor of what makes its channels. If even that does not close them, as behind `elu(q) + 1`, or
    has no such derivative, as behind a tanh that a rounded kernel reads, all of its entries stay,
    with a warning: `min_channels` is its size. Arrays of integers have no gates.

    Args:
      model: a network of latents, whose kernels are generated for the last time; or an ordinary one
        as of `with_latents`. Left as it was; arrays without gates are shared with the result, so
        copy it before donating buffers, if you still need it.
      rngs: the `params` stream, as for `with_latents`.
      build: for an ordinary network of your own class, as for `with_latents`.

    Returns:
      The network, in the mode of a network of latents, or in training mode if it was ordinary.

    Raises:
      ValueError: as `with_latents`, if the network is ordinary; it has gates; the code of one of
        traced latents allows no gates on an array, as where a call sets it, one that reads is no
        `nnx.Param`, or only arrays of integers could close a latent; of declared latents a prunable
        one is read by no convolution on latents and no `dhp.Linear`, or is in a layer of your own
        that has a kernel.

    Example:
      >>> model = dhp.with_gates(dhp.load("runs/resnet20-baseline/model"), rngs=nnx.Rngs(0))
    """
    if not isinstance(rngs, nnx.Rngs):
        raise ArgumentError("rngs", "nnx.Rngs", shown(rngs))
    if build is not None and latents(model):
        raise ArgumentError("build", "None for a network of latents", shown(build))
    if has_gates(model):  # others would open those that are closed
        raise ArgumentError("model", "a network without gates", f"{type(model).__name__} with some")
    if is_traced(model):
        _check_kernels(model)
        gates = gating(model)
        net = gated(model, gates, rngs)
        if gates.stay:
            named = ", ".join(map(repr, gates.stay))
            warnings.warn(
                f"with_gates: {named}: all entries stay, for what is read of them is not {CLOSED}",
                stacklevel=2,
            )
        return net
    kernels = {
        path: layer.kernel() if isinstance(layer, Hyper) else layer.kernel[...]
        for path, _, layer in walk(model)
        if isinstance(layer, Hyper | nnx.Conv | nnx.ConvTranspose | nnx.Linear)
    }
    given = bool(latents(model))
    net = nnx.clone(model) if given else with_latents(model, rngs=rngs, build=build)
    shared: dict[Any, nnx.Param] = {}
    for path, _, layer in walk(net):
        if isinstance(layer, Hyper):
            weight = with_metadata_of(layer.b2, nnx.Param(jnp.array(kernels[path])))
            weight = shared.setdefault(makers(layer), weight)
            for name in HypernetArrays._fields:
                delattr(layer, name)
            layer.weight = weight
            override(layer, kernel=_gated_kernel)
        elif isinstance(layer, Linear):
            gate(layer)
    _check_closed(net)
    for z in latents(net).values():
        z.vector.set_value(jnp.ones_like(z.vector[...]))
        z.vector.set_metadata(gate=True)
    return net


def gate(layer: Linear) -> None:
    """Makes the latents of a linear layer gates on the rows of its kernel, in place."""
    override(layer, plain=_gated_plain, __call__=_call_plain)


def _check_closed(net: nnx.Module) -> None:
    """Raises if something else may read the channels of a declared latent than what is gated."""
    read = [weights.entries for weights in weights_of(net) if weights.role == READ]
    ruled = {entry[0] for entries in read for entry in filter(None, entries)}
    for name, z in latents(net).items():
        if z.prunable and z not in ruled:
            detail = (
                "expected a convolution on latents or a dhp.Linear to read each prunable latent"
            )
            raise ArgumentError("model", detail=f"{detail}; {name!r} is read by none")
    for path, _, layer in walk(net):
        if isinstance(layer, KNOWN) or not is_prunable(layer):
            continue
        axes = [axis for axis in vars(layer).values() if isinstance(axis, Axis)]
        arrays = [x for x in vars(layer).values() if isinstance(x, nnx.Param) and x[...].ndim > 1]
        if arrays and any(z.prunable for axis in axes for z, _ in axis.entries()):
            detail = "expected layers of the library where kernels are on prunable axes"
            kind = type(layer).__name__
            raise ArgumentError("model", detail=f"{detail}; {path!r} is a {kind} of your own")


def _check_kernels(model: nnx.Module) -> None:
    """Raises if a kernel that reads traced latents is no `nnx.Param`, which alone has gates."""
    table, plain = architecture_of(model).axes, ordinary(model)
    variables, taken = variables_of(plain), nnx.Param | nnx.Cache | nnx.BatchStat
    others = {array: variables[array] for array in table.places}
    others = {n: v for n, v in others.items() if not isinstance(v, taken) and value_of(v).ndim > 1}
    if not others:  # as of most networks, which need not be traced for this
        return
    analysis = table.analysis(plain)
    reads = read_axes(analysis, all_reads(analysis))
    for array, variable in others.items():
        if reads[array] & table.places[array].keys():
            kind = type(variable).__name__
            detail = f"expected kernels that are nnx.Param; {array!r} is a {kind}"
            raise ArgumentError("model", detail=detail)


def ungate(net: nnx.Module, model: nnx.Module) -> nnx.Module:
    """The network of latents with the kernels of one with gates, and the gates for latents.

    `model` is the network of latents that `net` was made of, or a fresh one; both are left as they
    were. The result computes what `net` does, and its entries survive by their gates. It can be
    saved and loaded. Its latents do not act on its kernels; where those were found by tracing and
    an array has one number a weight, those that are 0 do.
    """
    gates = latents(net)
    if is_traced(net):
        return _ungated(prune(net), model, {name: z.value() for name, z in gates.items()})
    model = nnx.clone(model)
    carry_kernels(prune(net), model)
    for name, z in latents(model).items():
        z.vector.set_value(gates[name].value())
    return model


def _ungated(plain: nnx.Module, model: nnx.Module, gates: Mapping[str, Array]) -> nnx.Module:
    """An ordinary network as one of traced latents that are given, and do not act on its arrays."""
    table, named = architecture_of(model).axes, latents(model)
    least = {name: z.min_channels for name, z in named.items()}
    net = install(plain, table, table.notes["generated"], min_channels=least, rngs=nnx.Rngs(0))
    arrays = [node for _, node in nnx.iter_graph(net) if isinstance(node, GeneratedArray)]
    values = [node.get_value() for node in arrays]
    for name, z in latents(net).items():
        z.vector.set_value(gates[name])
    for node, value in zip(arrays, values, strict=True):
        node.hold(value)
    return net


def _gated_kernel(_: Callable[..., Any], layer: Hyper) -> Float[Array, "*k in out"]:
    if layer.kernel_axis() is not layer.z_in:  # channels of a group are read by their own group
        return layer.weight[...]
    gates = layer.z_in.value().astype(layer.weight[...].dtype)
    return layer.weight[...] * gates[:, None]


def _gated_plain(plain: Callable[..., Any], layer: Linear, keep: Any = None) -> nnx.Linear:
    small = plain(layer, keep)
    kept = layer.z_in.keep(keep)
    gates = layer.z_in.value()[kept].astype(small.kernel[...].dtype)
    small.kernel.set_value(small.kernel[...] * gates[:, None])
    return small


def _call_plain(_: Callable[..., Any], layer: Linear, x: Array) -> Array:
    return layer.plain()(x)
