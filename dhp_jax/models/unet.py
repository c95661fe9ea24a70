"""U-Net: down to coarse features and back, with skip connections at every scale."""

from typing import Any, ClassVar

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.core.activations import ReLU
from dhp_jax.core.hypernet import EMBEDDING
from dhp_jax.core.latent import Axis, Latent, concat
from dhp_jax.core.layers import HyperConv, HyperConvTranspose
from dhp_jax.models.arguments import (
    MAX_CHANNELS,
    check_arguments,
    check_images,
    check_positive_integer,
)
from dhp_jax.models.blocks import SMALL_GAIN, ConvNorm, Family, scaled

MAX_DEPTH = 8  # resolutions; every one has four times the parameters of the one before


class Double(nnx.Module):
    """Two 3x3 convolutions, each with a ReLU behind it.

    The convolutions have biases. With `batch_norm` they have none, and BatchNorm follows the first.
    """

    def __init__(
        self, z_in: Axis, z_hidden: Latent, z_out: Latent, *, batch_norm: bool, **options: Any
    ):
        self.hidden, self.output = z_hidden, z_out
        padded = {"padding": 1, "use_bias": not batch_norm, **options}
        self.first = (
            ConvNorm(z_in, z_hidden, 3, **options)
            if batch_norm
            else HyperConv(z_in, z_hidden, (3, 3), **padded)
        )
        self.second = HyperConv(z_hidden, z_out, (3, 3), **padded)
        self.first_activation, self.second_activation = ReLU(z_hidden), ReLU(z_out)

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n h w out"]:
        x = self.first_activation(self.first(x))
        return self.second_activation(self.second(x))


class Up(nnx.Module):
    """Doubles the resolution, then two convolutions of that and of the skip, in this order."""

    def __init__(
        self,
        z_in: Latent,
        z_skip: Latent,
        axes: list[Latent],
        *,
        batch_norm: bool,
        **options: Any,
    ):
        z_up, z_hidden, z_out = axes
        self.upsampled = z_up
        strided = {"strides": (2, 2), "padding": "VALID", **options}
        self.up = HyperConvTranspose(z_in, z_up, (2, 2), **strided)
        both = concat(z_up, z_skip)
        self.convs = Double(both, z_hidden, z_out, batch_norm=batch_norm, **options)

    def __call__(
        self, x: Float[Array, "n h w in"], skip: Float[Array, "n 2*h 2*w skip"]
    ) -> Float[Array, "n 2*h 2*w out"]:
        return self.convs(jnp.concatenate([self.up(x), skip], axis=-1))


class UNet(Family):
    """A U-Net that gives an image of the size of its input: one latent for every convolution.

    Images whose sides are no multiples of `multiple` are extended by their last row and column, and
    the result is cut back. The image channels on both sides are trained but not pruned.

    Args:
      depth: number of resolutions.
      features: channels at the finest; every coarser one has twice as many.
      channels: channels of the images.
      width: multiplies `features`.
      batch_norm: whether BatchNorm follows the first of each two convolutions, which have no biases
        then. The network of the paper has none.
      embedding, min_channels, dtype, rngs: see `models.blocks.Family`.

    Raises:
      ValueError: an argument that is not positive or makes too many channels, a depth above 8; when
        called, images of another rank or channel count.

    References: Ronneberger et al., U-Net, 2015; DHP, section 4.4.
    """

    initial_gain = SMALL_GAIN
    absent: ClassVar = {"batch_norm": True}  # what a file means that does not say it

    def __init__(
        self,
        depth: int = 5,
        *,
        features: int = 32,
        channels: int = 1,
        width: float = 1.0,
        batch_norm: bool = False,
        embedding: int = EMBEDDING,
        min_channels: int = 4,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_positive_integer("depth", depth, MAX_DEPTH)
        coarsest = 2 ** (depth - 1)  # features of the coarsest resolution, in units of the finest's
        check_positive_integer("features", features, MAX_CHANNELS // coarsest)
        check_arguments(locals(), widest=coarsest * features)
        options = {"batch_norm": batch_norm, "embedding": embedding, "dtype": dtype, "rngs": rngs}
        widths = [scaled(features * 2**level, width) for level in range(depth)]

        def latents(size: int, count: int) -> list[Latent]:
            return [Latent(size, min_channels=min_channels, rngs=rngs) for _ in range(count)]

        self.channels = channels
        self.multiple = 2 ** (depth - 1)
        self.reach = 8 * self.multiple  # at least how far away an output depends on the input
        self.image = Latent(channels, prunable=False, rngs=rngs)
        self.output = Latent(channels, prunable=False, rngs=rngs)
        z, self.down, self.up = self.image, nnx.List(), nnx.List()
        for size in widths:
            self.down.append(Double(z, *latents(size, 2), **options))
            z = self.down[-1].output
        for size, level in list(zip(widths, self.down, strict=True))[-2::-1]:
            self.up.append(Up(z, level.output, latents(size, 3), **options))
            z = self.up[-1].convs.output
        self.tail = HyperConv(
            z, self.output, (1, 1), embedding=embedding, dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, images: Float[Array, "n h w channels"]) -> Float[Array, "n h w channels"]:
        check_images(images, self.channels)
        _, height, width, _ = images.shape
        below, right = (-side % self.multiple for side in (height, width))
        x = _extend(_extend(images, 1, below), 2, right)
        skips = []
        for level in self.down[:-1]:
            x = level(x)
            skips.append(x)
            x = nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = self.down[-1](x)
        for level, skip in zip(self.up, reversed(skips), strict=True):
            x = level(x, skip)
        return self.tail(x)[:, :height, :width]


def _extend(x: Float[Array, "n h w c"], axis: int, times: int) -> Float[Array, "n h2 w2 c"]:
    """The image with its last row or column repeated, which ONNX has no padding for."""
    last = x[:, -1:] if axis == 1 else x[:, :, -1:]
    return jnp.concatenate([x, *[last] * times], axis) if times else x
