"""What several families are built of, and the checks of their arguments."""

from collections.abc import Collection
import math
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from dhp_jax.latent import Axis
from dhp_jax.layers import BatchNorm, Bias, HyperConv


class ConvNorm(nnx.Module):
    """A convolution without bias, padded by half its kernel, then BatchNorm.

    Args:
      z_in, z_out: axes of its input and output.
      kernel: its size, the same in both directions.
      strides: its stride.
      groups: its number of groups; `z_in.size` for a depthwise convolution.
      dtype: of the computation.
      rngs: the `params` stream draws the initial values.
    """

    def __init__(
        self,
        z_in: Axis,
        z_out: Axis,
        kernel: int,
        strides: int = 1,
        *,
        groups: int = 1,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.conv = HyperConv(
            z_in,
            z_out,
            (kernel, kernel),
            strides,
            padding=kernel // 2,
            feature_group_count=groups,
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = BatchNorm(z_out, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n h2 w2 out"]:
        return self.norm(self.conv(x))


class ConvBiasNorm(nnx.Module):
    """A 3x3 convolution with its bias as a layer (see docs/architecture.md), then BatchNorm."""

    def __init__(self, z_in: Axis, z_out: Axis, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = HyperConv(
            z_in, z_out, (3, 3), padding=1, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.bias = Bias(z_out, rngs=rngs)
        self.norm = BatchNorm(z_out, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n h w out"]:
        return self.norm(self.bias(self.conv(x)))


def scaled(size: int, width: float) -> int:
    """A number of channels multiplied by a width, at least 1."""
    return max(1, round(size * width))


def check_positive_integer(argument: str, value: Any) -> None:
    """Raises a `ValueError` that names the argument unless its value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument}: expected a positive integer, got {value!r}")


def check_positive(argument: str, value: Any) -> None:
    """Raises a `ValueError` that names the argument unless its value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{argument}: expected a positive number, got {value!r}")


def check_choice(argument: str, value: Any, choices: Collection[Any]) -> None:
    """Raises a `ValueError` that names the argument unless its value is one of some."""
    if isinstance(value, bool | float) or value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{argument}: expected one of {expected}, got {value!r}")


def check_images(images: Array, channels: int) -> None:
    """Raises a `ValueError` unless `images` has the shape `(batch, height, width, channels)`."""
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(
            f"images: expected shape (batch, height, width, {channels}), got {images.shape}"
        )
