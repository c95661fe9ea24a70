"""Layers on latents: each computes with its plain `flax.nnx` counterpart, and can turn into it.

A layer takes the arguments of its counterpart, with latents where that takes channel counts. Its
forward pass *is* the counterpart's: `plain()` builds the ordinary layer, `plain(keep)` the same one
restricted to surviving channels.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.core.convolutions import Hyper, HyperConv, HyperConvTranspose
from dhp_jax.core.latent import Axis, check_axis
from dhp_jax.core.plain import NO_RNGS, Keep, check_channels, initializer_of, select_entries

__all__ = [
    "BatchNorm",
    "Bias",
    "ChannelBias",
    "Hyper",
    "HyperConv",
    "HyperConvTranspose",
    "Linear",
]

_zeros = nnx.initializers.zeros_init()


class ChannelBias(nnx.Module):
    """Adds a learned number to each channel: a convolution's bias as a layer of its own.

    Args:
      num_features: number of channels.
      param_dtype: of the bias; it is added in the dtype of the input.
      bias_init: initial values, as in `nnx.Conv`.
      rngs: the `params` stream draws the initial values.
    """

    def __init__(
        self,
        num_features: int,
        *,
        param_dtype: Any = jnp.float32,
        bias_init: Callable[..., Any] = _zeros,
        rngs: nnx.Rngs,
    ):
        self.num_features = num_features
        self.param_dtype = param_dtype
        self.bias = nnx.Param(bias_init(rngs.params(), (num_features,), param_dtype))

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        return x + self.bias[...].astype(x.dtype)


class Bias(ChannelBias):
    """`ChannelBias` over the channels of an axis.

    Args:
      z: the axis of the channels.
      **options: as in `ChannelBias`.

    Raises:
      ValueError: `z` is no axis; when called, an input with another channel count.

    Example:
      >>> shift = dhp.Bias(z, rngs=rngs)
    """

    def __init__(self, z: Axis, **options: Any):
        check_axis("Bias: z", z)
        super().__init__(z.size, **options)
        self.z = z

    def plain(self, keep: Keep | None = None) -> ChannelBias:
        """The `ChannelBias` of the channels in `keep`."""
        kept = self.z.keep(keep)
        given = initializer_of(select_entries(self.bias, kept))
        return ChannelBias(
            int(kept.sum()), param_dtype=self.param_dtype, bias_init=given, rngs=NO_RNGS
        )

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        check_channels(self, x, self.z)
        return super().__call__(x)


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` over the channels of an axis.

    Args:
      z: the axis of the normalised channels.
      **options: as in `nnx.BatchNorm`.

    Raises:
      ValueError: `z` is no axis; when called, an input with another channel count.

    Example:
      >>> norm = dhp.BatchNorm(z, momentum=0.9, rngs=rngs)
    """

    def __init__(self, z: Axis, **options: Any):
        check_axis("BatchNorm: z", z)
        super().__init__(z.size, **options)
        self.z = z

    def plain(self, keep: Keep | None = None) -> nnx.BatchNorm:
        """The `nnx.BatchNorm` with the scale, bias and statistics of the channels in `keep`."""
        kept = self.z.keep(keep)
        norm = nnx.BatchNorm(
            int(kept.sum()),
            use_running_average=self.use_running_average,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_bias=self.use_bias,
            use_scale=self.use_scale,
            bias_init=initializer_of(select_entries(self.bias, kept)),
            scale_init=initializer_of(select_entries(self.scale, kept)),
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            use_fast_variance=self.use_fast_variance,
            promote_dtype=self.promote_dtype,
            rngs=NO_RNGS,
        )
        norm.mean[...] = select_entries(self.mean, kept)
        norm.var[...] = select_entries(self.var, kept)
        return norm

    def __call__(self, x: Float[Array, "*batch c"], *args: Any, **kwargs: Any):
        check_channels(self, x, self.z, self.axis)
        return super().__call__(x, *args, **kwargs)


class Linear(nnx.Linear):
    """`nnx.Linear` whose input is the channels of an axis; its outputs are never pruned.

    Args:
      z_in: the axis of the input features.
      out_features: number of outputs.
      **options: as in `nnx.Linear`.

    Raises:
      ValueError: `z_in` is no axis, or `out_features` is one; when called, an input with another
        feature count.

    Example:
      >>> classifier = dhp.Linear(z, 10, rngs=rngs)
    """

    def __init__(self, z_in: Axis, out_features: int, **options: Any):
        check_axis("Linear: z_in", z_in)
        if isinstance(out_features, Axis):
            raise ValueError(
                "Linear: out_features: expected a number, for outputs are never pruned; got a "
                f"{type(out_features).__name__}: a hidden layer is HyperConv(z_in, z_out, (1, 1))"
            )
        super().__init__(z_in.size, out_features, **options)
        self.z_in = z_in

    def plain(self, keep: Keep | None = None) -> nnx.Linear:
        """The `nnx.Linear` with the rows of the features in `keep`."""
        kept = self.z_in.keep(keep)
        return nnx.Linear(
            int(kept.sum()),
            self.out_features,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=initializer_of(select_entries(self.kernel, kept)),
            bias_init=initializer_of(None if self.bias is None else self.bias[...]),
            dot_general=self.dot_general,
            promote_dtype=self.promote_dtype,
            preferred_element_type=self.preferred_element_type,
            rngs=NO_RNGS,
        )

    def __call__(self, x: Float[Array, "*batch in"], *args: Any, **kwargs: Any):
        check_channels(self, x, self.z_in)
        return super().__call__(x, *args, **kwargs)
