"""SRResNet: residual blocks with BatchNorm at low resolution, then sub-pixel up-sampling."""

from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.core.activations import PReLU
from dhp_jax.core.hypernet import EMBEDDING
from dhp_jax.core.latent import Latent
from dhp_jax.core.layers import HyperConv
from dhp_jax.models.arguments import check_arguments, check_images
from dhp_jax.models.blocks import SMALL_GAIN, ConvBiasNorm, Family, scaled
from dhp_jax.models.upsampler import Upsampler


class Block(nnx.Module):
    """Two convolutions with BatchNorm, PReLU between them, added to their input."""

    def __init__(self, z: Latent, z_hidden: Latent, **options: Any):
        self.hidden = z_hidden
        self.first = ConvBiasNorm(z, z_hidden, **options)
        self.activation = PReLU(z_hidden, shared=True, dtype=options["dtype"])
        self.second = ConvBiasNorm(z_hidden, z, **options)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        return x + self.second(self.activation(self.first(x)))


class SRResNet(Family):
    """An SRResNet: one latent for all that is added and up-sampled, one inside every block.

    Args:
      scale: 2, 3, or 4.
      blocks: number of residual blocks.
      features: channels of the body.
      channels: channels of the images; they are trained but not pruned.
      width: multiplies `features`.
      prune_upsampler: whether the up-sampler is pruned with the body; it keeps a latent of its own
        that is not pruned otherwise.
      embedding, min_channels, dtype, rngs: see `models.blocks.Family`.

    Raises:
      ValueError: another scale, an argument that is not positive or makes too large a network; when
        called, images of another rank or channel count.

    References: Ledig et al., Photo-realistic single image super-resolution, 2017; DHP, section 4.3.
    """

    initial_gain = SMALL_GAIN

    def __init__(
        self,
        scale: int,
        *,
        blocks: int = 16,
        features: int = 64,
        channels: int = 3,
        width: float = 1.0,
        prune_upsampler: bool = True,
        embedding: int = EMBEDDING,
        min_channels: int = 4,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_arguments(locals(), widest=features)
        size = scaled(features, width)
        options = {"embedding": embedding, "dtype": dtype, "rngs": rngs}

        def latent(prunable: bool = True) -> Latent:
            return Latent(size, prunable=prunable, min_channels=min_channels, rngs=rngs)

        self.channels = channels
        self.reach = 2 * blocks + 7  # how many pixels away an output depends on the input
        self.image = Latent(channels, prunable=False, rngs=rngs)
        self.output = Latent(channels, prunable=False, rngs=rngs)
        self.body = latent()
        self.upsampled = self.body if prune_upsampler else latent(prunable=False)
        self.head = HyperConv(self.image, self.body, (9, 9), padding=4, **options)
        self.activation = PReLU(self.body, shared=True, dtype=dtype)
        self.blocks = nnx.List(Block(self.body, latent(), **options) for _ in range(blocks))
        self.last = ConvBiasNorm(self.body, self.body, **options)
        activation = PReLU(self.upsampled, shared=True, dtype=dtype)
        self.upsampler = Upsampler(
            self.body, self.upsampled, scale, activation=activation, **options
        )
        options = {**options, "dtype": jnp.float32}
        self.tail = HyperConv(self.upsampled, self.output, (3, 3), padding=1, **options)

    def __call__(
        self, images: Float[Array, "n h w channels"]
    ) -> Float[Array, "n scale*h scale*w channels"]:
        check_images(images, self.channels)
        shallow = x = self.activation(self.head(images))
        for block in self.blocks:
            x = block(x)
        return self.tail(self.upsampler(self.last(x) + shallow))
