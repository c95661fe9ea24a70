"""BatchNorm and biases that keep less for the backward pass."""

from typing import Any

from flax import nnx
from flax.nnx.nn import dtypes
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array

from dhp_jax.backend.cpu_conv import _not_inlined, _wide
from dhp_jax.core.layers import BatchNorm, Bias, ChannelBias


class _QuickBatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` that is quick to trace.

    Assigning statistics by `[...] =` asks for their sharding, which takes time in proportion to the
    computation traced so far, `set_value` does not.
    """

    def __call__(self, x: Array, use_running_average: bool | None = None, **options: Any) -> Array:
        if use_running_average is None:
            use_running_average = self.use_running_average
        ordinary = (
            self.axis in (-1, x.ndim - 1)
            and self.use_fast_variance
            and self.promote_dtype is dtypes.promote_dtype
            and not options
        )
        if use_running_average is not False or not ordinary:
            return super().__call__(x, use_running_average, **options)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        given = (x, self.mean[...], self.var[...], scale, bias)
        x, _, _, scale, bias = self.promote_dtype(given, dtype=self.dtype)
        wide = _wide(x)
        axes = tuple(range(x.ndim - 1))
        mean = jnp.mean(wide, axes)
        var = jnp.maximum(0, jnp.mean(wide * wide, axes) - mean * mean)
        for statistic, value in ((self.mean, mean), (self.var, var)):
            old = statistic[...]
            new = self.momentum * old + (1 - self.momentum) * value
            statistic.set_value(new.astype(old.dtype))
        slope = lax.rsqrt(var + self.epsilon)
        if scale is not None:
            slope = slope * scale
        # Written so, the backward pass keeps x alone, and takes two sums over the batch: what
        # several devices exchange is the statistics and the gradients of scale and bias.
        shift = -mean * slope
        return (x * slope + (shift if bias is None else shift + bias)).astype(x.dtype)


class _QuickHyperBatchNorm(BatchNorm, _QuickBatchNorm):
    """The same over the channels of an axis, which it checks."""


class _QuickBias(ChannelBias):
    """`ChannelBias` whose sum is computed once.

    XLA:CPU would keep it for BatchNorm, and what it is a sum of too, to add the bias again.
    """

    def __call__(self, x: Array) -> Array:
        with _not_inlined():
            return _shift(x, self.bias[...].astype(x.dtype))


class _QuickHyperBias(Bias, _QuickBias):
    """The same over the channels of an axis, which it checks."""


_shift = jax.jit(jnp.add)


QUICK = {nnx.BatchNorm: _QuickBatchNorm, BatchNorm: _QuickHyperBatchNorm}


QUICK_ON_CPU = {ChannelBias: _QuickBias, Bias: _QuickHyperBias}
