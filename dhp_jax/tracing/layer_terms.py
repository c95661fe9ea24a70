"""What one call of each kind of layer costs, as products of its widths."""

from collections.abc import Sequence
import functools
import math

from flax import nnx

from dhp_jax.core.activations import ReLU
from dhp_jax.core.cost import Width
from dhp_jax.core.latent import Axis
from dhp_jax.core.layers import (
    BatchNorm,
    Bias,
    ChannelBias,
    GroupNorm,
    Hyper,
    LayerNorm,
    Linear,
    RMSNorm,
)


def in_one(axes: Sequence[tuple[Width, ...]]) -> Width:
    """The width of an axis, at its full size if it is a product; 1 if there is none."""
    (factors,) = axes or [(Width(1, 1),)]
    full = math.prod(width.full for width in factors)
    return factors[0] if len(factors) == 1 else Width(full, full)


Terms = tuple[Axis | int, Axis | int, tuple[int, int], tuple[int, ...]]


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

    `ScaleOf` of the example is that of docs/extending.md.

    Example:
      >>> @dhp.layer_terms.register
      ... def _(layer: ScaleOf, output_shape):  # one multiplication an element, a number a channel
      ...     return layer.z, layer.z, (0, math.prod(output_shape[:-1])), (0, 1)
    """
    return None


@layer_terms.register
def _(layer: Hyper | nnx.Conv | nnx.ConvTranspose, output_shape):
    if isinstance(layer, Hyper):
        inputs, outputs = layer.kernel_axes()
    else:
        inputs = layer.in_features // getattr(layer, "feature_group_count", 1)
        outputs = layer.out_features
    taps, positions = math.prod(layer.kernel_size), math.prod(output_shape[:-1])
    return inputs, outputs, (taps * positions, 0), (taps, int(layer.use_bias))


@layer_terms.register
def _(layer: nnx.BatchNorm, output_shape):
    channels = layer.z if isinstance(layer, BatchNorm) else layer.num_features
    positions = math.prod(output_shape) // layer.num_features
    return channels, channels, (0, 2 * positions), (0, layer.use_scale + layer.use_bias)


@layer_terms.register
def _(layer: GroupNorm | LayerNorm | RMSNorm, output_shape):
    return layer.z, layer.z, (0, 0), (0, layer.use_scale + getattr(layer, "use_bias", 0))


@layer_terms.register
def _(layer: ChannelBias, output_shape):
    channels = layer.z if isinstance(layer, Bias) else layer.num_features
    return channels, channels, (0, 0), (0, 1)


@layer_terms.register
def _(layer: ReLU | nnx.PReLU, output_shape):
    channels = getattr(layer, "z", None) or output_shape[-1]
    slopes = layer.negative_slope.get_value().shape if isinstance(layer, nnx.PReLU) else (0,)
    of_each = slopes == output_shape[-1:]
    params = (0, 1) if of_each else (0, 0, math.prod(slopes))
    return channels, channels, (0, math.prod(output_shape[:-1])), params


@layer_terms.register
def _(layer: nnx.Linear, output_shape):
    inputs = layer.z_in if isinstance(layer, Linear) else layer.in_features
    positions = math.prod(output_shape[:-1])
    return inputs, layer.out_features, (positions, 0), (1, int(layer.use_bias))
