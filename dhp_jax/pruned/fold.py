"""Folding of BatchNorm and biases into the layers before them, where that is exact.

What follows what is read from a trace of the forward pass, in which layers are calls that cannot
be looked into. A layer is folded into a convolution if it is given the convolution's output and
nothing else is, neither of them is called twice, and nothing else reads their arrays. Then the
forward pass of the folded network is traced too: it must be the same program, less the layers that
are gone.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
import functools
import logging
import re
from typing import Any

from flax import linen, nnx
from flax.nnx.nn import dtypes
import jax
from jax.extend.core import ClosedJaxpr, Literal, Primitive, Var
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from dhp_jax.core.latent import latents, modules_by_path, walk
from dhp_jax.core.layers import ChannelBias
from dhp_jax.core.plain import Model
from dhp_jax.core.provenance import Chains, architecture_of, set_architecture
from dhp_jax.core.state import path_name, variables_of
from dhp_jax.core.surgery import override, replace_modules
from dhp_jax.models.linen import FromLinen
from dhp_jax.tracing.generated import is_read_as_stored
from dhp_jax.tracing.inputs import checked_inputs, outputs_of
from dhp_jax.tracing.programs import Call, called, without_unread

logger = logging.getLogger(__name__)
LINEAR = (nnx.Conv, nnx.ConvTranspose, nnx.Linear)
FOLLOWING = (nnx.BatchNorm, ChannelBias)
LINEAR_OF_LINEN = (linen.Conv, linen.ConvTranspose, linen.Dense)


class Identity(nnx.Module):
    """Takes the place of a layer that was folded into the one before it."""

    def __call__(
        self, x: Float[Array, "*batch c"], *, use_running_average: bool | None = None
    ) -> Float[Array, "*batch c"]:
        return x


def fold(model: Model, input_shape: Any, *, call: Call | None = None) -> Model:
    """Folds BatchNorm and `Bias` layers into the convolutions and linear layers before them.

    What cannot be shown to be exact stays as it is: BatchNorm before a convolution, as in a
    DenseNet; a layer that is called twice, whose output or arrays something else reads, that
    computes in another dtype, or whose convolution is a function of your own; layers within
    `nnx.jit`, `nnx.scan` and the like.

    Args:
      model: an ordinary or pruned network; left as it was.
      input_shape: shape of one example, such as `(height, width, channels)`, or other inputs, as
        for `measure_cost`, for which the forward pass is traced. Where the forward pass depends on
        shapes, these are those it is exact for.
      call: a function of the model and the inputs, where that is not `model(*inputs)`; the folded
        network is exact for this call.

    Returns:
      The network in evaluation mode, for inference only. It computes the same numbers up to
      rounding; layers that are gone are `Identity`, and skipped in a network of `FromLinen`.

    Raises:
      ValueError: the network has latents; make it ordinary with `prune(model)` first. It does not
        take such an input.

    Example:
      >>> fast = dhp.fold(small, (32, 32, 3))
    """
    arguments = checked_inputs(input_shape)
    whole, call = _in_evaluation(model), called(call)
    outputs_of(whole, input_shape, call)
    return fold_for(whole, arguments, call)


def fold_for(model: Model, arguments: tuple[Any, ...], call: Call) -> Model:
    """`fold` for abstract arguments of the forward pass, of which sizes may be symbolic."""
    whole = _in_evaluation(model)
    try:
        program = _Program(whole, arguments, call)
    except NotImplementedError as error:  # layers under jax.vmap, jax.grad and the like
        logger.warning("fold: nothing is folded: %s", str(error).splitlines()[0])
        return whole
    chains = program.chains()
    folded = remove_folded_layers(nnx.clone(whole), chains)
    layers = modules_by_path(folded)
    for path, array in _folded_arrays(whole, program, chains).items():
        if not jnp.isfinite(array).all():
            logger.warning("fold: nothing is folded: %r has numbers beyond %s", path, array.dtype)
            return whole
        layer, _, name = path.rpartition(".")
        getattr(layers[layer], name).set_value(array)
    if _Program(folded, arguments, call).rows() != program.rows(chains):
        logger.warning("fold: nothing is folded: the forward pass depends on what layers it has")
        return whole
    return folded


def _in_evaluation(model: Model) -> Model:
    """A copy of an ordinary network in evaluation mode."""
    if latents(model):
        raise ValueError(
            f"model: expected a network without latents, got {len(latents(model))}; "
            "dhp.prune(model) makes it ordinary"
        )
    whole = nnx.clone(model)
    whole.eval()
    return whole


def remove_folded_layers(model: nnx.Module, chains: Chains) -> nnx.Module:
    """Removes layers that are folded into others, in place; the kernels keep their values.

    Args:
      model: may be abstract.
      chains: paths of layers, each a linear one and those that are folded into it.

    Raises:
      ValueError: a path that leads to no layer of that kind, or comes twice.
    """
    if not chains:
        return model
    found = modules_by_path(model)
    of_linen = {path: each for path, each in found.items() if isinstance(each, FromLinen)}
    gone = set()
    for path, *following in chains:
        owner = next((name for name in of_linen if path.startswith(_below(name))), None)
        if owner is not None:
            names = [name.removeprefix(_below(owner)) for name in (path, *following)]
            layer, *norms = (tuple(name.split(".")) for name in names)
            of_linen[owner].remove_norms(layer, norms)
            continue
        _check_kind(found, path, LINEAR)
        layer = found.pop(path)
        if layer.bias is None:
            size = layer.kernel.shape[-1]
            layer.bias, layer.use_bias = nnx.Param(jnp.zeros(size, layer.param_dtype)), True
        for name in following:
            _check_kind(found, name, FOLLOWING)
            gone.add(id(found.pop(name)))
    model = replace_modules(model, lambda module: Identity() if id(module) in gone else module)
    made, following = architecture_of(model), dict[str, tuple[str, ...]]()
    for path, *names in (*made.folded, *chains):  # what was folded earlier comes first
        following[path] = (*following.get(path, ()), *names)
    folded = tuple((path, *names) for path, names in following.items())
    set_architecture(model, replace(made, folded=folded))
    return model


def _below(path: str) -> str:
    """How the paths of what is in a module begin."""
    return f"{path}." if path else ""


def _check_kind(found: dict[str, nnx.Module], path: str, kinds: tuple[type, ...]) -> None:
    if type(found.get(path)) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"folded: {path!r}: expected a {expected} that is named once")


# Values


def _folded_arrays(model: nnx.Module, program: "_Program", chains: Chains) -> dict[str, jax.Array]:
    """Kernels and biases by path, computed in float64.

    They are stored no narrower than the layer computes, for rounding changes what was folded.
    """
    found, arrays = modules_by_path(model), {}
    calls = program.calls()
    for path, *following in chains:
        kernel = found[path].kernel
        factor, offset = np.ones(kernel.shape[-1]), np.zeros(kernel.shape[-1])
        for name in (path, *following):
            layer = found[name]
            slope, shift = _affine(layer, calls[name]["epsilon"])
            factor, offset = slope * factor, slope * offset + shift
        dtype = jnp.promote_types(kernel.dtype, calls[path]["dtype"])
        arrays[f"{path}.kernel"] = jnp.asarray(factor * _float64(kernel), dtype)
        arrays[f"{path}.bias"] = jnp.asarray(offset, dtype)
    return arrays


def _affine(layer: Any, epsilon: float | None) -> tuple[Any, Any]:
    """The factor and the offset that a layer applies to each channel after its kernel.

    Args:
      layer: holds its arrays.
      epsilon: of BatchNorm, `None` for others.
    """
    bias, scale = (getattr(layer, name, None) for name in ("bias", "scale"))
    shift = 0.0 if bias is None else _float64(bias)
    if epsilon is None:
        return 1.0, shift
    slope = 1.0 if scale is None else _float64(scale)
    slope = slope / np.sqrt(_float64(layer.var) + epsilon)
    return slope, shift - slope * _float64(layer.mean)


def _float64(variable: nnx.Variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


# What follows what


class _Program:
    """The trace of a forward pass, in which each layer is one opaque call."""

    def __init__(self, model: nnx.Module, arguments: tuple[Any, ...], call: Call):
        graphdef, state = nnx.split(model)
        self.names = [path_name(name) for name, _ in nnx.to_flat_state(state)]
        self.names += [f"input {n}" for n in range(len(jax.tree.leaves(arguments)))]

        def forward(arrays: list[Array], *arguments: Any) -> Any:
            leaves = jax.tree.unflatten(jax.tree.structure(state), arrays)
            return call(_opaque(nnx.merge(graphdef, leaves, copy=True)), *arguments)

        traced, self.outputs = jax.make_jaxpr(forward, return_shape=True)(
            jax.tree.leaves(state), *arguments
        )
        read = without_unread(traced)
        self.jaxpr, self.constants = read.jaxpr, read.consts

    def calls(self) -> dict[str, dict[str, Any]]:
        """What is told of the calls of layers, by their paths."""
        return {e.params["path"]: e.params for e in self.jaxpr.eqns if e.primitive is _layer_call}

    def chains(self) -> Chains:
        """Paths of linear layers, each with those of the layers that can be folded into it."""
        reads = [*(v for eqn in self.jaxpr.eqns for v in eqn.invars), *self.jaxpr.outvars]
        uses = Counter(v for v in reads if isinstance(v, Var))
        stored = set(self.jaxpr.invars)
        ends: dict[Any, list[Any]] = {}  # the calls that lead to a variable
        for eqn in self.jaxpr.eqns:
            if eqn.primitive is not _layer_call:
                continue
            x, *arrays = eqn.invars
            # So the layer is called once, and nothing else reads its arrays or has changed them.
            if not all(isinstance(v, Var) and v in stored and uses[v] == 1 for v in arrays):
                continue
            if eqn.params["linear"]:
                ends[eqn.outvars[0]] = [eqn]
                continue
            before = ends.get(x, []) if isinstance(x, Var) and uses[x] == 1 else []
            if before and before[-1].params["dtype"] == eqn.params["dtype"]:
                ends[eqn.outvars[0]] = [*ends.pop(x), eqn]
        return tuple(
            tuple(call.params["path"] for call in calls)
            for calls in ends.values()
            if len(calls) > 1
        )

    def rows(self, chains: Chains = ()) -> list[Any]:
        """The program in a form that can be compared, without the layers that are folded."""
        gone = {name for _, *following in chains for name in following}
        names = dict(zip(self.jaxpr.invars, self.names, strict=True))
        names |= {
            v: (str(c.dtype), c.shape, np.asarray(c).tobytes())
            for v, c in zip(self.jaxpr.constvars, self.constants, strict=True)
        }
        rows: list[Any] = []

        def name(v: Any) -> Any:
            return ("literal", str(v.aval), str(v.val)) if isinstance(v, Literal) else names[v]

        for eqn in self.jaxpr.eqns:
            if eqn.primitive is _layer_call and eqn.params["path"] in gone:
                names[eqn.outvars[0]] = name(eqn.invars[0])
                continue
            # The arrays of a layer are its own; folding gives it others.
            read = eqn.invars[:1] if eqn.primitive is _layer_call else eqn.invars
            rows.append((eqn.primitive.name, _text(eqn.params), [name(v) for v in read]))
            names |= {v: (len(rows), i) for i, v in enumerate(eqn.outvars)}
        return [*rows, [name(v) for v in self.jaxpr.outvars], str(self.outputs)]


def _text(params: dict[str, Any]) -> str:
    """The parameters of an operation as text without memory addresses."""
    constants = [
        np.asarray(constant).tobytes()
        for value in params.values()
        if isinstance(value, ClosedJaxpr)
        for constant in value.consts
    ]
    return re.sub(" at 0x[0-9a-f]+", "", str(sorted(params.items()))) + str(constants)


_layer_call = Primitive("layer_call")


@_layer_call.def_abstract_eval
def _(x, *arrays, path, linear, epsilon, shape, dtype):
    return jax.core.ShapedArray(shape, dtype)


def _opaque(model: nnx.Module) -> nnx.Module:
    """Makes the layers that can be folded opaque calls of one primitive, in place."""
    for path, layer in list(_foldable(model)):
        layer.layer_path = nnx.static(path)
        override(layer, __call__=_call_opaquely)
    for path, _, module in walk(model):
        if isinstance(module, FromLinen):
            module.layer_path = nnx.static(path)
            override(module, __call__=_call_linen)
    return model


def _foldable(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Layers that may be folded, as long as nothing about them is customized."""
    for path, _, layer in walk(model):
        known = (
            type(layer) in (*LINEAR, *FOLLOWING)
            and getattr(layer, "promote_dtype", dtypes.promote_dtype) is dtypes.promote_dtype
            and getattr(layer, "mask", None) is None
            and all(map(is_read_as_stored, variables_of(layer).values()))
        )
        match layer:
            case nnx.Conv():
                known &= layer.conv_general_dilated is jax.lax.conv_general_dilated
            case nnx.ConvTranspose():
                known &= not layer.transpose_kernel  # the kernel's last axis would be the input's
            case nnx.Linear():
                known &= layer.dot_general is jax.lax.dot_general
            case nnx.BatchNorm():
                known &= layer.axis == -1 and layer.use_running_average is True
        if known:
            yield path, layer


def _call_opaquely(call, layer, x, *args, **options):
    told = {"use_running_average"} if isinstance(layer, nnx.BatchNorm) else set()
    if args or options.keys() - told or options.get("use_running_average") not in (None, True):
        return call(layer, x, *args, **options)
    output = jax.eval_shape(functools.partial(call, layer), x)
    return _layer_call.bind(
        jnp.asarray(x),
        *jax.tree.leaves(nnx.state(layer)),
        path=layer.layer_path,
        linear=isinstance(layer, LINEAR),
        epsilon=getattr(layer, "epsilon", None),
        shape=output.shape,
        dtype=output.dtype,
    )


def _call_linen(call, network, *args, **options):
    """Calls a network of flax.linen, of which the layers that can be folded are opaque."""
    if network.conv_general_dilated is not jax.lax.conv_general_dilated:
        return call(network, *args, **options)

    def intercept(method, args, options, context):
        layer = context.module
        is_linear = type(layer) in LINEAR_OF_LINEN
        known = context.method_name == "__call__" and _is_known(layer, args, options)
        y = method(*args, **options)
        if not known or layer.path in network.fixed.removed:
            return y
        return _layer_call.bind(  # and nothing reads what has been computed
            jnp.asarray(args[0]),
            *jax.tree.leaves(layer.variables),
            path=_below(network.layer_path) + ".".join(layer.path),
            linear=is_linear,
            epsilon=None if is_linear else layer.epsilon,
            shape=y.shape,
            dtype=y.dtype,
        )

    with linen.intercept_methods(intercept):
        return call(network, *args, **options)


def _is_known(layer: linen.Module, args: Any, options: Any) -> bool:
    """Whether a call of a layer of flax.linen is as of one with nothing customized."""
    if not args or not layer.path or layer.scope is None:
        return False
    if type(layer) is linen.BatchNorm and layer.axis == -1 and options.get("mask") is None:
        average = options.get("use_running_average", layer.use_running_average)
        return (args[1] if args[1:] else average) is True
    return (
        type(layer) in LINEAR_OF_LINEN
        and len(args) == 1
        and not any(getattr(layer, name, None) for name in ("dot_general", "dot_general_cls"))
        and getattr(layer, "mask", None) is None
        and not getattr(layer, "conv_general_dilated", None)
        and not getattr(layer, "conv_general_dilated_cls", None)
        and not getattr(layer, "transpose_kernel", False)
        and layer.promote_dtype is linen.dtypes.promote_dtype
    )
