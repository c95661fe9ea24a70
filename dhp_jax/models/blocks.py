"""What several families are built of, and the checks of their arguments."""

from collections.abc import Iterable
import math
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from dhp_jax.latent import Axis
from dhp_jax.layers import BatchNorm, Bias, HyperConv
from dhp_jax.names import shown

# The `initial_gain` of restoration networks, PyTorch's; He's takes far longer without BatchNorm.
SMALL_GAIN = 1 / 3
MAX_CHANNELS = 32_768  # of a layer; one with as many on both sides has billions of parameters


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


def check_positive_integer(argument: str, value: Any, most: int = MAX_CHANNELS) -> None:
    """Raises a `ValueError` that names the argument unless its value is an integer, 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument}: expected a positive integer, got {shown(value)}")
    if value > most:
        raise ValueError(f"{argument}: expected at most {most}, got {shown(value)}")


def check_positive(argument: str, value: Any, most: float = math.inf) -> None:
    """Raises a `ValueError` that names the argument unless its value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{argument}: expected a positive number, got {shown(value)}")
    if value > most:
        raise ValueError(f"{argument}: expected at most {most:g}, got {shown(value)}")


def check_width(width: Any, widest: int) -> None:
    """Raises a `ValueError` unless `width` is a number above 0 that `widest` channels can bear."""
    check_positive("width", width)
    if width > MAX_CHANNELS / widest:
        raise ValueError(
            f"width: expected at most {MAX_CHANNELS / widest:g}, for layers of no more than "
            f"{MAX_CHANNELS} channels, got {shown(width)}"
        )


def check_choice(argument: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises a `ValueError` that names the argument unless its value is one of some."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{argument}: expected one of {expected}, got {shown(value)}")


def check_boolean(argument: str, value: Any) -> None:
    """Raises a `ValueError` that names the argument unless its value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{argument}: expected True or False, got {shown(value)}")


def check_images(images: Array, channels: int) -> None:
    """Raises a `ValueError` unless `images` has the shape `(batch, height, width, channels)`."""
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(
            f"images: expected shape (batch, height, width, {channels}), got {images.shape}"
        )
