"""DnCNN: a chain of convolutions that predicts the noise of an image."""

from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.core.activations import ReLU
from dhp_jax.core.hypernet import EMBEDDING
from dhp_jax.core.latent import Latent
from dhp_jax.core.layers import HyperConv
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.models.arguments import check_arguments, check_images, check_positive_integer
from dhp_jax.models.blocks import SMALL_GAIN, ConvBiasNorm, Family, scaled

MAX_DEPTH = 256


class DnCNN(Family):
    """A DnCNN, which adds what it predicts to its input: one latent for every convolution.

    The image channels on both sides are trained but not pruned.

    Args:
      depth: number of convolutions, all but the first and the last with BatchNorm.
      features: channels between convolutions.
      channels: channels of the images.
      width: multiplies `features`.
      head_activation: whether ReLU follows the first convolution, as in the paper's unpruned
        network; in those that its code searches and prunes, none does.
      embedding, min_channels, dtype, rngs: see `models.blocks.Family`.

    Raises:
      ValueError: an argument that is not positive or makes too many channels, a depth below 3 or
        above 256; when called, images of another rank or channel count.

    References: Zhang et al., Beyond a Gaussian denoiser, 2017; DHP, section 4.4.
    """

    initial_gain = SMALL_GAIN

    def __init__(
        self,
        depth: int = 17,
        *,
        features: int = 64,
        channels: int = 1,
        width: float = 1.0,
        head_activation: bool = True,
        embedding: int = EMBEDDING,
        min_channels: int = 4,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_positive_integer("depth", depth, MAX_DEPTH)
        if depth < 3:
            raise ArgumentError("depth", "at least 3", shown(depth))
        check_arguments(locals(), widest=features)
        self.channels = channels
        self.head_activation = head_activation
        self.reach = depth  # how many pixels away an output depends on the input
        self.image = Latent(channels, prunable=False, rngs=rngs)
        self.output = Latent(channels, prunable=False, rngs=rngs)
        self.features = nnx.List(
            Latent(scaled(features, width), min_channels=min_channels, rngs=rngs)
            for _ in range(depth - 1)
        )
        first, last = self.features[0], self.features[-1]
        self.head = HyperConv(
            self.image, first, (3, 3), padding=1, embedding=embedding, dtype=dtype, rngs=rngs
        )
        self.middle = nnx.List(
            ConvBiasNorm(z_in, z_out, embedding=embedding, dtype=dtype, rngs=rngs)
            for z_in, z_out in zip(self.features[:-1], self.features[1:], strict=True)
        )
        self.activations = nnx.List(ReLU(z) for z in self.features[1:])
        self.tail = HyperConv(
            last, self.output, (3, 3), padding=1, embedding=embedding, dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, images: Float[Array, "n h w channels"]) -> Float[Array, "n h w channels"]:
        check_images(images, self.channels)
        x = self.head(images)
        if self.head_activation:
            x = nnx.relu(x)
        for layer, activation in zip(self.middle, self.activations, strict=True):
            x = activation(layer(x))
        return images + self.tail(x)
