"""Calls of BatchNorm and bias layers that keep less for the backward pass."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
from flax.nnx.nn import dtypes
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array

from dhp_jax.backend.cpu_conv import separate_computation, widen
from dhp_jax.core.layers import BatchNorm, Bias, ChannelBias
from dhp_jax.core.plain import check_channels


def normalize_batch(
    call: Callable[..., Array],
    layer: nnx.BatchNorm,
    x: Array,
    use_running_average: bool | None = None,
    **options: Any,
) -> Array:
    """Replaces the call of a BatchNorm layer; training keeps less for the backward pass.

    It takes less time to trace too: `[...] =` on statistics asks for their sharding, which takes
    time in proportion to the computation traced so far, `set_value` does not. What is not ordinary
    training is left to `call`, the layer's own method.
    """
    if use_running_average is None:
        use_running_average = layer.use_running_average
    ordinary = (
        layer.axis in (-1, x.ndim - 1)
        and layer.use_fast_variance
        and layer.promote_dtype is dtypes.promote_dtype
        and not options
    )
    if use_running_average is not False or not ordinary:
        return call(layer, x, use_running_average, **options)
    if isinstance(layer, BatchNorm):
        check_channels(layer, x, layer.z)
    scale = None if layer.scale is None else layer.scale[...]
    bias = None if layer.bias is None else layer.bias[...]
    given = (x, layer.mean[...], layer.var[...], scale, bias)
    x, _, _, scale, bias = layer.promote_dtype(given, dtype=layer.dtype)
    means = layer.mean[...], layer.var[...]
    y, means = _normalize(x, means, scale, bias, layer.momentum, layer.epsilon)
    for statistic, value in zip((layer.mean, layer.var), means, strict=True):
        statistic.set_value(value)
    return y


@functools.partial(jax.jit, static_argnums=(4, 5))  # layers that are alike are traced once
def _normalize(
    x: Array,
    statistics: tuple[Array, Array],
    scale: Array | None,
    bias: Array | None,
    momentum: float,
    epsilon: float,
) -> tuple[Array, tuple[Array, ...]]:
    """The normalised input and the mean and variance to keep."""
    wide = widen(x)
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(wide, axes)
    var = jnp.maximum(0, jnp.mean(wide * wide, axes) - mean * mean)
    kept = tuple(
        (momentum * old + (1 - momentum) * value).astype(old.dtype)
        for old, value in zip(statistics, (mean, var), strict=True)
    )
    slope = lax.rsqrt(var + epsilon)
    if scale is not None:
        slope = slope * scale
    # Written so, the backward pass keeps x alone, and takes two sums over the batch: what
    # several devices exchange is the statistics and the gradients of scale and bias.
    shift = -mean * slope
    return (x * slope + (shift if bias is None else shift + bias)).astype(x.dtype), kept


def add_bias_once(_: Callable[..., Array], layer: ChannelBias, x: Array) -> Array:
    """Replaces the call of a bias layer; XLA:CPU computes the sum once.

    It would keep the sum for BatchNorm, and what it is a sum of too, to add the bias again.
    """
    if isinstance(layer, Bias):
        check_channels(layer, x, layer.z)
    with separate_computation():
        return _add(x, layer.bias[...].astype(x.dtype))


_add = jax.jit(jnp.add)
