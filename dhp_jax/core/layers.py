"""Layers on latents: each computes with its plain `flax.nnx` counterpart, and can turn into it.

A layer takes the arguments of its counterpart, with latents where that takes channel counts. Its
forward pass *is* the counterpart's: `plain()` builds the ordinary layer, `plain(keep)` the same one
restricted to surviving channels.
"""

from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.core.convolutions import Hyper, HyperConv, HyperConvTranspose, HyperLinear
from dhp_jax.core.initializers import lecun_normal
from dhp_jax.core.latent import Axis, check_axis, in_one_line
from dhp_jax.core.plain import (
    Keep,
    Layer,
    check_channels,
    initializer_of,
    make_like,
    select_entries,
)

__all__ = [
    "BatchNorm",
    "Bias",
    "ChannelBias",
    "GroupNorm",
    "Hyper",
    "HyperConv",
    "HyperConvTranspose",
    "HyperLinear",
    "LayerNorm",
    "Linear",
    "Norm",
    "RMSNorm",
]

_zeros = nnx.initializers.zeros_init()


class ChannelBias(nnx.Module):
    """Adds a learned number to each channel: a convolution's bias as a layer of its own.

    It is added in the dtype of the input; `bias_init` is as in `nnx.Conv`.
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

    def __nnx_repr__(self) -> Iterator[Any]:
        return in_one_line(self, self.z)

    def plain(self, keep: Keep | None = None) -> ChannelBias:
        """The `ChannelBias` of the channels in `keep`."""
        kept = self.z.keep(keep)
        given = initializer_of(select_entries(self.bias, kept))
        return make_like(ChannelBias, self, num_features=int(kept.sum()), bias_init=given)

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        check_channels(self, x, self.z)
        return super().__call__(x)


class Norm(nnx.Module):
    """Base of normalisations over the channels of an axis."""

    def __init__(self, z: Axis, *sizes: Any, **options: Any):
        check_axis(f"{type(self).__name__}: z", z)
        super().__init__(z.size, *sizes, **options)
        self.z = z

    def __nnx_repr__(self) -> Iterator[Any]:
        groups = {"num_groups": self.num_groups} if hasattr(self, "num_groups") else {}
        return in_one_line(self, self.z, **groups)

    def _plain(self, kind: type[Layer], keep: Keep | None, **sizes: Any) -> Layer:
        """The layer of a kind with this one's options, and the arrays of the channels in `keep`."""
        kept = self.z.keep(keep)
        for name in {"scale", "bias"} & vars(self).keys():
            sizes[f"{name}_init"] = initializer_of(select_entries(getattr(self, name), kept))
        return make_like(kind, self, num_features=int(kept.sum()), **sizes)

    def __call__(self, x: Float[Array, "*batch c"], *args: Any, **kwargs: Any):
        check_channels(self, x, self.z, getattr(self, "axis", -1))
        return super().__call__(x, *args, **kwargs)


class BatchNorm(Norm, nnx.BatchNorm):
    """`nnx.BatchNorm` over the channels of an axis.

    Args:
      z: the axis of the normalised channels.
      **options: as in `nnx.BatchNorm`.

    Raises:
      ValueError: `z` is no axis; when called, an input with another channel count.

    Example:
      >>> norm = dhp.BatchNorm(z, momentum=0.9, rngs=rngs)
    """

    def plain(self, keep: Keep | None = None) -> nnx.BatchNorm:
        """The `nnx.BatchNorm` with the scale, bias and statistics of the channels in `keep`."""
        norm = self._plain(nnx.BatchNorm, keep)
        kept = self.z.keep(keep)
        norm.mean[...] = select_entries(self.mean, kept)
        norm.var[...] = select_entries(self.var, kept)
        return norm


class GroupNorm(Norm, nnx.GroupNorm):
    """`nnx.GroupNorm` over the channels of an axis.

    Whole groups go where all channels of a group are one entry of a latent: the axis of groups of
    4 channels is `repeat(z, 4)`. Where a group has all entries of a latent, as with
    `concat(*[z] * num_groups)`, each loses the same channels, and what is left is normalised anew.

    Args:
      z: the axis of the normalised channels.
      num_groups: of how many groups.
      **options: as in `nnx.GroupNorm`, but for `group_size`.

    Raises:
      ValueError: `z` is no axis, groups that do not divide its channels or that pruning would tear
        apart; when called, an input with another channel count.

    Example:
      >>> norm = dhp.GroupNorm(dhp.repeat(z, 4), num_groups=z.size, rngs=rngs)
    """

    def __init__(self, z: Axis, num_groups: int = 32, **options: Any):
        check_axis("GroupNorm: z", z)
        positive = isinstance(num_groups, int) and num_groups > 0
        if not positive or z.size % num_groups:
            raise ValueError(
                f"GroupNorm: num_groups: expected a divisor of the {z.size} channels of z, "
                f"got {num_groups!r}"
            )
        entries, size = z.entries(), z.size // num_groups
        groups = [entries[i : i + size] for i in range(0, z.size, size)]
        is_torn = any(len(set(group)) > 1 for group in groups) and groups[1:] != groups[:-1]
        if is_torn and any(latent.prunable for latent, _ in entries):
            raise ValueError(
                f"GroupNorm: num_groups: pruning would leave groups of different sizes; whole "
                f"groups go with the axis repeat(z, {size}) of a latent of {num_groups} entries, "
                f"the same channels of each with concat(*[z] * {num_groups})"
            )
        super().__init__(z, num_groups, **options)

    def plain(self, keep: Keep | None = None) -> nnx.GroupNorm:
        """The `nnx.GroupNorm` of the groups that are left, of the channels in `keep`."""
        groups = self.z.keep(keep).reshape(self.num_groups, -1)
        return self._plain(
            nnx.GroupNorm, keep, num_groups=int(groups.any(1).sum()), group_size=None
        )


class LayerNorm(Norm, nnx.LayerNorm):
    """`nnx.LayerNorm` over the channels of an axis; what is left of them is normalised anew.

    Args:
      z: the axis of the normalised channels.
      **options: as in `nnx.LayerNorm`.

    Raises:
      ValueError: `z` is no axis; when called, an input with another channel count.

    Example:
      >>> norm = dhp.LayerNorm(z, rngs=rngs)
    """

    def plain(self, keep: Keep | None = None) -> nnx.LayerNorm:
        """The `nnx.LayerNorm` with the scale and bias of the channels in `keep`."""
        return self._plain(nnx.LayerNorm, keep)


class RMSNorm(Norm, nnx.RMSNorm):
    """`nnx.RMSNorm` over the channels of an axis; what is left of them is normalised anew.

    Args:
      z: the axis of the normalised channels.
      **options: as in `nnx.RMSNorm`.

    Raises:
      ValueError: `z` is no axis; when called, an input with another channel count.

    Example:
      >>> norm = dhp.RMSNorm(z, rngs=rngs)
    """

    def plain(self, keep: Keep | None = None) -> nnx.RMSNorm:
        """The `nnx.RMSNorm` with the scale of the channels in `keep`."""
        return self._plain(nnx.RMSNorm, keep)


class Linear(nnx.Linear):
    """`nnx.Linear` whose input is the channels of an axis.

    With a number of outputs none of them is pruned, and the kernel is trained as it is. With an
    axis for the outputs it is a `HyperLinear`, whose kernel is generated.

    Args:
      z_in: the axis of the input features.
      out_features: number of outputs, or their axis.
      **options: as in `nnx.Linear`; of a `HyperLinear` with an axis.

    Raises:
      ValueError: `z_in` is no axis; when called, an input with another feature count.

    Example:
      >>> hidden = dhp.Linear(z, z_hidden, rngs=rngs)
      >>> classifier = dhp.Linear(z_hidden, 10, rngs=rngs)
    """

    def __new__(cls, z_in: Any = None, out_features: Any = None, **options: Any):
        """A `HyperLinear` where the outputs are an axis."""
        hyper = cls is Linear and isinstance(out_features, Axis)
        return super().__new__(HyperLinear if hyper else cls)

    def __init__(self, z_in: Axis, out_features: int | Axis, **options: Any):
        check_axis("Linear: z_in", z_in)
        super().__init__(z_in.size, out_features, **{"kernel_init": lecun_normal, **options})
        self.z_in = z_in

    def __nnx_repr__(self) -> Iterator[Any]:
        return in_one_line(self, self.z_in, self.out_features)

    def plain(self, keep: Keep | None = None) -> nnx.Linear:
        """The `nnx.Linear` with the rows of the features in `keep`."""
        kept = self.z_in.keep(keep)
        return make_like(
            nnx.Linear,
            self,
            in_features=int(kept.sum()),
            kernel_init=initializer_of(select_entries(self.kernel, kept)),
            bias_init=initializer_of(None if self.bias is None else self.bias[...]),
        )

    def __call__(self, x: Float[Array, "*batch in"], *args: Any, **kwargs: Any):
        check_channels(self, x, self.z_in)
        return super().__call__(x, *args, **kwargs)
