"""Sub-pixel up-sampling, and what the super-resolution families have in common."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from dhp_jax.core.latent import Latent, repeat
from dhp_jax.core.layers import HyperConv
from dhp_jax.models.arguments import STAGES, check_choice


class Upsampler(nnx.Module):
    """Convolutions to `r * r` times the channels, each followed by a pixel shuffle by `r`.

    Args:
      z_in, z_out: axes of input and output; one and the same to prune the up-sampler with the body.
      scale: 2, 3, or 4.
      activation: applied after each stage, if any.
      **options: of the convolutions.
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
