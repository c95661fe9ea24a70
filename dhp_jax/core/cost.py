"""FLOPs, params and activations of a network, whole or pruned.

FLOPs are multiply-accumulates: convolutions (transposed ones as if every tap met every output) and
linear layers, plus 2 for every normalised element and 1 for every element of the last call of a
`ReLU` or PReLU layer; biases and `nnx.relu` are not counted. Params are kernels, biases, BatchNorm
scales and biases, slopes of PReLU. Activations are the bytes of the outputs of all other layers
that have FLOPs, each in the dtype that it computes in, for one example: a sum, and not the peak.
What ReLU, pools and additions return is not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
import functools
import logging
import math
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.core.activations import ReLU
from dhp_jax.core.latent import Axis, Latent, latents, walk
from dhp_jax.core.layers import BatchNorm, Bias, ChannelBias, HyperConv, HyperConvTranspose, Linear
from dhp_jax.core.surgery import override
from dhp_jax.errors import shown

logger = logging.getLogger(__name__)
Counts = Mapping[str, "int | Array"]
MEASURES = ("flops", "params", "activations")


@dataclass(frozen=True)
class Width:
    """A number of channels: `fixed + sum of times * survivors of a latent`."""

    full: int
    fixed: int
    latents: tuple[tuple[str, int], ...] = ()

    def channels(self, counts: Counts) -> "int | Array":
        """The number of channels when `counts[name]` entries of each latent survive."""
        return self.fixed + sum(times * counts[name] for name, times in self.latents)


@dataclass(frozen=True)
class LayerCost:
    """The cost of one call of a layer.

    FLOPs are `flops_terms[0] * in * out + flops_terms[1] * out`, activations likewise, and params
    too, plus `params_terms[2]` if there is one. A layer that is called again costs FLOPs and
    activations again, but no params.
    """

    path: str
    kind: str
    inputs: Width
    outputs: Width
    flops_terms: tuple[int, int]
    params_terms: tuple[int, ...]
    activations_terms: tuple[int, int]

    def amounts(self, counts: Counts) -> "tuple[int | Array, ...]":
        """FLOPs, params and activations when `counts[name]` entries of each latent survive."""
        return self._evaluate(self.inputs.channels(counts), self.outputs.channels(counts))

    @property
    def flops(self) -> int:
        return self._evaluate(self.inputs.full, self.outputs.full)[0]

    @property
    def params(self) -> int:
        return self._evaluate(self.inputs.full, self.outputs.full)[1]

    @property
    def activations(self) -> int:
        return self._evaluate(self.inputs.full, self.outputs.full)[2]

    def _evaluate(self, n_in, n_out):
        return tuple(
            per_pair * n_in * n_out + per_output * n_out + sum(fixed)
            for per_pair, per_output, *fixed in (
                self.flops_terms,
                self.params_terms,
                self.activations_terms,
            )
        )


@dataclass(frozen=True)
class Cost:
    """The cost of a network for one example, layer by layer in the order of execution.

    Attributes:
      layers: the cost of each call of a layer.
      sizes: entries of each latent by name.

    Example:
      >>> cost = dhp.measure_cost(model, (32, 32, 3))
      >>> counts = {name: mask.sum() for name, mask in dhp.survivors(model).items()}
      >>> cost.flops, cost.shares(counts)["flops"]
    """

    layers: tuple[LayerCost, ...]
    sizes: Mapping[str, int]

    def __repr__(self) -> str:
        """The totals in one line; `layers` holds the details."""
        totals = ", ".join(f"{name}={getattr(self, name):_}" for name in MEASURES)
        return f"Cost({totals}, layers={len(self.layers)})"

    @functools.cached_property
    def flops(self) -> int:
        """Multiply-accumulates of one forward pass of one example; exact."""
        return sum(layer.flops for layer in self.layers)

    @functools.cached_property
    def params(self) -> int:
        """Trainable parameters of the network (not of its hypernetworks); exact."""
        return sum(layer.params for layer in self.layers)

    @functools.cached_property
    def activations(self) -> int:
        """Bytes of the outputs of all layers that have FLOPs, for one example; exact."""
        return sum(layer.activations for layer in self.layers)

    def amounts(self, counts: Counts) -> "dict[str, int | Array]":
        """FLOPs, params and activations by name when `counts[name]` entries of latents survive.

        Args:
          counts: survivors of each latent by name, Python ints or (in a jitted function) integer
            arrays.

        Returns:
          Exact integers: Python ints, or int64 arrays.
        """
        if all(isinstance(count, int | np.integer) for count in counts.values()):
            return self._total({name: int(count) for name, count in counts.items()})
        with jax.enable_x64(True):  # FLOPs of large images do not fit 32 bits
            return self._total({name: jnp.int64(count) for name, count in counts.items()})

    def shares(self, counts: Counts) -> "dict[str, float | Array]":
        """`amounts(counts)` as shares of the whole model's (float32 in jit)."""
        amounts = self.amounts(counts)
        if all(isinstance(amount, int) for amount in amounts.values()):
            return {name: _share(amount, getattr(self, name)) for name, amount in amounts.items()}
        with jax.enable_x64(True):
            return {
                name: jnp.float32(_share(amount, getattr(self, name)))
                for name, amount in amounts.items()
            }

    def _total(self, counts):
        costs = [layer.amounts(counts) for layer in self.layers]
        return {name: sum(cost[i] for cost in costs) for i, name in enumerate(MEASURES)}


def _share(amount, whole: int):
    """A share of the whole; 1 where the whole is 0."""
    return amount / whole if whole else 1.0


def measure_cost(model: nnx.Module, input_shape: tuple[int, ...]) -> Cost:
    """Counts what a model costs by tracing one forward pass; nothing is computed.

    Works on models with hypernetworks and on pruned or ordinary ones. Counted are convolutions,
    transposed convolutions, `BatchNorm`, `Bias`, `Linear`, `nnx.PReLU` and what `layer_terms` is
    registered for; a warning names layers with parameters that are not counted.

    Args:
      model: called with one array; left as it was.
      input_shape: shape of one example without the batch axis, `(height, width, channels)`.

    Returns:
      The cost: `.flops`, `.params`, `.activations` (bytes, see the module), `.layers`; and
      `.amounts(counts)` or `.shares(counts)` of what survives, by these names.

    Raises:
      ValueError: no shape of an example; the forward pass fails on such an input, for instance
        because it adds axes of latents of different lengths.

    Example:
      >>> cost = dhp.measure_cost(model, (32, 32, 3))
      >>> cost.flops, cost.params, cost.activations
      (41214592, 272474, 1605672)
    """
    check_input_shape(input_shape)
    calls, names = _trace(model, input_shape)
    layers, seen = [], set()
    last = {path: call for call, (path, _, _) in enumerate(calls)}
    for call, (path, layer, output) in enumerate(calls):
        is_activation = isinstance(layer, ReLU | nnx.PReLU)
        if is_activation and call != last[path]:
            continue
        inputs, outputs, flops_terms, params_terms = layer_terms(layer, output.shape)
        outputs = _width(outputs, names)
        layers.append(
            LayerCost(
                path=path,
                kind=type(layer).__name__,
                inputs=_width(inputs, names),
                outputs=outputs,
                flops_terms=flops_terms,
                params_terms=(0, 0) if path in seen else params_terms,
                activations_terms=(0, 0)
                if is_activation
                else (0, any(flops_terms) * output.nbytes // outputs.full),
            )
        )
        seen.add(path)
    return Cost(tuple(layers), {name: latent.size for latent, name in names.items()})


Terms = tuple["Axis | int", "Axis | int", tuple[int, int], tuple[int, ...]]


@functools.singledispatch
def layer_terms(layer: nnx.Module, output_shape: tuple[int, ...]) -> Terms | None:
    """The cost of one call of a layer; register a function here to count a layer of your own.

    Args:
      layer: the layer.
      output_shape: shape of what the call returned, batch of one.

    Returns:
      Input and output width (an axis, or a number), the pair `(per in * out, per out)` of FLOPs,
      and that of params, to which a third number may be added; `None` for a module that costs
      nothing itself.
    """
    return None


@layer_terms.register
def _(layer: HyperConv | HyperConvTranspose, output_shape):
    return _conv_terms(layer, layer.kernel_axis(), layer.z_out, output_shape)


@layer_terms.register
def _(layer: nnx.Conv | nnx.ConvTranspose, output_shape):
    inputs = layer.in_features // getattr(layer, "feature_group_count", 1)
    return _conv_terms(layer, inputs, layer.out_features, output_shape)


def _conv_terms(layer, inputs, outputs, output_shape):
    taps = math.prod(layer.kernel_size)
    positions = math.prod(output_shape[:-1])
    return inputs, outputs, (taps * positions, 0), (taps, int(layer.use_bias))


@layer_terms.register
def _(layer: nnx.BatchNorm, output_shape):
    channels = layer.z if isinstance(layer, BatchNorm) else layer.num_features
    positions = math.prod(output_shape) // layer.num_features
    return channels, channels, (0, 2 * positions), (0, layer.use_scale + layer.use_bias)


@layer_terms.register
def _(layer: ChannelBias, output_shape):
    channels = layer.z if isinstance(layer, Bias) else layer.num_features
    return channels, channels, (0, 0), (0, 1)


@layer_terms.register
def _(layer: ReLU | nnx.PReLU, output_shape):
    channels = getattr(layer, "z", None) or output_shape[-1]
    slopes = int(isinstance(layer, nnx.PReLU))
    return channels, channels, (0, math.prod(output_shape[:-1])), (0, 0, slopes)


@layer_terms.register
def _(layer: nnx.Linear, output_shape):
    inputs = layer.z_in if isinstance(layer, Linear) else layer.in_features
    positions = math.prod(output_shape[:-1])
    return inputs, layer.out_features, (positions, 0), (1, int(layer.use_bias))


def _trace(model, input_shape):
    """Runs the model on an abstract example; returns calls of counted layers, and the latents."""
    calls: list[tuple[str, nnx.Module, _Output]] = []
    names: dict[Latent, str] = {}
    uncounted: dict[str, str] = {}
    graphdef, state = nnx.split(model)

    def forward(state, x):
        traced = nnx.merge(graphdef, state, copy=True)
        traced.eval()  # tracing the update of BatchNorm statistics is slow in deep networks
        names.update({latent: name for name, latent in latents(traced).items()})
        for path, _, module in list(walk(traced)):
            if _costs_something(module):
                # The module of this walk, not that of the call: under `nnx.jit` or `nnx.remat` the
                # latter is a copy whose latents are none of ours.
                module.report_call = nnx.static(_note_calls(calls, path, module))
                override(module, __call__=_report_call)
            elif _has_parameters(module):
                uncounted[type(module).__name__] = path
        return traced(x)

    try:
        jax.eval_shape(forward, state, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(input_refused(input_shape, error)) from error
    if uncounted:
        kinds = ", ".join(f"{kind} ({path})" if path else kind for kind, path in uncounted.items())
        logger.warning(
            "measure_cost: no FLOPs or params are counted for %s; register a function with "
            "dhp_jax.core.cost.layer_terms to count them",
            kinds,
        )
    return calls, names


def check_input_shape(input_shape: tuple[int, ...]) -> None:
    """Raises unless a value can be the shape of one example."""
    listed = isinstance(input_shape, tuple | list) and len(input_shape) > 0
    if not listed or not all(isinstance(n, int | np.integer) and n >= 1 for n in input_shape):
        raise ValueError(
            "input_shape: expected positive integers, such as (height, width, channels); got "
            f"{shown(input_shape)}"
        )


def input_refused(input_shape: tuple[int, ...], error: Exception) -> str:
    """The error message for an input on which the forward pass fails."""
    what = (str(error).splitlines() or [type(error).__name__])[0]
    message = f"input_shape: the model does not take {input_shape}: {what}"
    if "incompatible shapes" in message:
        message = message.rstrip(".") + "; axes that are added must be one latent"
    return message


def _costs_something(module: nnx.Module) -> bool:
    return layer_terms.dispatch(type(module)) is not layer_terms.dispatch(object)


def _has_parameters(module: nnx.Module) -> bool:
    values = vars(module).values()
    return not isinstance(module, Axis) and any(isinstance(v, nnx.Param) for v in values)


class _Output(NamedTuple):
    """Shape and bytes of what a call has returned."""

    shape: tuple[int, ...]
    nbytes: int


def _note_calls(calls: list, path: str, layer: nnx.Module):
    return lambda output: calls.append((path, layer, output))


def _report_call(call, layer, *args, **options):
    output = call(layer, *args, **options)
    layer.report_call(_Output(output.shape, output.size * output.dtype.itemsize))
    return output


def _width(channels: Axis | int, names: Mapping[Latent, str]) -> Width:
    if isinstance(channels, int):
        return Width(channels, channels)
    multiplicity = channels.multiplicity().items()
    return Width(channels.size, 0, tuple((names[latent], times) for latent, times in multiplicity))
