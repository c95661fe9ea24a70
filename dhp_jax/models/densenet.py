"""DenseNets without bottlenecks, as used on CIFAR: 40 layers of growth 12, and their like."""

from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.core.hypernet import EMBEDDING
from dhp_jax.core.latent import Axis, Latent, concat
from dhp_jax.core.layers import BatchNorm, HyperConv, Linear
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.models.arguments import (
    MAX_CHANNELS,
    check_arguments,
    check_images,
    check_positive_integer,
)
from dhp_jax.models.blocks import Family, scaled

BLOCKS = 3
MAX_DEPTH = 304  # layers read all before them, so that their number counts twice
STEM_GROWTHS = 2  # width of the stem, in units of the growth


class NormConv(nnx.Module):
    """BatchNorm and ReLU, then a convolution without bias, padded by half its kernel.

    BatchNorm is pruned with the input. `kernel` is the size, the same in both directions.
    """

    def __init__(
        self, z_in: Axis, z_out: Axis, kernel: int, *, dtype: Any, rngs: nnx.Rngs, **options: Any
    ):
        self.norm = BatchNorm(z_in, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)
        options |= {"use_bias": False, "padding": kernel // 2, "dtype": dtype, "rngs": rngs}
        self.conv = HyperConv(z_in, z_out, (kernel, kernel), **options)

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n h w out"]:
        return self.conv(nnx.relu(self.norm(x)))


class DenseNet(Family):
    """A DenseNet: one latent for every convolution, and a layer reads all before it.

    Three dense blocks; the transitions between them keep all channels. All latents but that of the
    image are prunable, and what is concatenated takes its channels along wherever it is read.

    Args:
      depth: `3 n + 4` with `n` layers in every dense block.
      growth: channels that every layer adds; the stem has twice as many.
      num_classes: number of outputs.
      channels: channels of the input images.
      width: multiplies the growth.
      embedding, min_channels, dtype, rngs: see `models.blocks.Family`.

    Raises:
      ValueError: a depth that is not of the family or above 304, an argument that is not positive
        or makes too many channels; when called, images of another rank or channel count.

    References: Huang et al., Densely connected convolutional networks, 2017; DHP, section 4.2.
    """

    def __init__(
        self,
        depth: int = 40,
        growth: int = 12,
        *,
        num_classes: int = 10,
        channels: int = 3,
        width: float = 1.0,
        embedding: int = EMBEDDING,
        min_channels: int = 4,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        _check_depth(depth)
        growths = STEM_GROWTHS + depth - 4  # at most, that a layer reads
        check_positive_integer("growth", growth, MAX_CHANNELS // growths)
        check_arguments(locals(), widest=growths * growth)

        def latent(size: int) -> Latent:
            return Latent(size, min_channels=min_channels, rngs=rngs)

        options = {"embedding": embedding, "dtype": dtype, "rngs": rngs}
        self.channels = channels
        self.image = Latent(channels, prunable=False, min_channels=min_channels, rngs=rngs)
        z = latent(scaled(STEM_GROWTHS * growth, width))
        self.stem = HyperConv(self.image, z, (3, 3), padding=1, use_bias=False, **options)
        self.blocks, self.transitions = nnx.List(), nnx.List()
        for number in range(BLOCKS):
            if number > 0:
                z_in, z = z, latent(z.size)
                self.transitions.append(NormConv(z_in, z, 1, **options))
            parts = [z]
            block = nnx.List()
            for _ in range((depth - 4) // BLOCKS):
                parts.append(latent(scaled(growth, width)))
                block.append(NormConv(z, parts[-1], 3, **options))
                z = concat(*parts)
            self.blocks.append(block)
        self.norm = BatchNorm(z, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.classifier = Linear(z, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "n h w channels"]) -> Float[Array, "n classes"]:
        check_images(images, self.channels)
        x = self.stem(images)
        for number, block in enumerate(self.blocks):
            if number > 0:
                x = _halve(self.transitions[number - 1](x))
            for layer in block:
                x = jnp.concatenate([x, layer(x)], axis=-1)
        return self.classifier(jnp.mean(nnx.relu(self.norm(x)), axis=(1, 2)))


def _halve(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Averages 2 by 2 pixels; at an odd edge, the pixels that there are."""
    return nnx.avg_pool(
        x, window_shape=(2, 2), strides=(2, 2), padding="SAME", count_include_pad=False
    )


def _check_depth(depth: int) -> None:
    check_positive_integer("depth", depth, MAX_DEPTH)
    if depth <= 4 or (depth - 4) % BLOCKS:
        raise ArgumentError("depth", "3 n + 4, such as 40 or 100", shown(depth))
