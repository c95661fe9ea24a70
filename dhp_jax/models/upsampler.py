"""Sub-pixel up-sampling, and what the super-resolution families have in common."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from dhp_jax.latent import Latent, repeat
from dhp_jax.layers import HyperConv
from dhp_jax.models.blocks import (
    check_boolean,
    check_choice,
    check_positive_integer,
    check_width,
)

STAGES = {2: (2,), 3: (3,), 4: (2, 2)}  # the pixel shuffles that make up each scale
MAX_BLOCKS = 256


class Upsampler(nnx.Module):
    """Convolutions to `r * r` times the channels, each followed by a pixel shuffle by `r`.

    Args:
      z_in: axis of the input.
      z_out: axis of the output; `z_in` itself to prune the up-sampler with the body.
      scale: 2, 3, or 4.
      activation: applied after each stage, if any.
      **options: of the convolutions.

    Raises:
      ValueError: another scale.
    """

    def __init__(
        self,
        z_in: Latent,
        z_out: Latent,
        scale: int,
        *,
        activation: Callable[[Array], Array] | None = None,
        **options: Any,
    ):
        check_choice("scale", scale, tuple(STAGES))
        self.factors = STAGES[scale]
        self.activation = activation if activation is not None else nnx.data(None)
        self.convs = nnx.List()
        z = z_in
        for factor in self.factors:
            shuffled = repeat(z_out, factor**2)
            self.convs.append(HyperConv(z, shuffled, (3, 3), padding=1, **options))
            z = z_out

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n scale*h scale*w out"]:
        for conv, factor in zip(self.convs, self.factors, strict=True):
            x = pixel_shuffle(conv(x), factor)
            if self.activation is not None:
                x = self.activation(x)
        return x


def pixel_shuffle(x: Float[Array, "n h w c*r*r"], r: int) -> Float[Array, "n h*r w*r c"]:
    """Turns every `r * r` neighbouring channels into `r` by `r` pixels, row by row."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, c // r**2, r, r)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(n, h * r, w * r, c // r**2)


def check_arguments(
    scale: int,
    blocks: int,
    features: int,
    channels: int,
    width: float,
    prune_upsampler: bool,
    min_channels: int,
) -> None:
    """Raises a `ValueError` that names the first argument of a family that makes no network."""
    check_choice("scale", scale, tuple(STAGES))
    check_positive_integer("blocks", blocks, MAX_BLOCKS)
    check_positive_integer("features", features)
    check_positive_integer("channels", channels)
    check_positive_integer("min_channels", min_channels)
    check_width(width, features)
    check_boolean("prune_upsampler", prune_upsampler)
