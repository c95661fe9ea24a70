"""VGG networks with BatchNorm and a single linear layer, as used on CIFAR."""

from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.core.hypernet import EMBEDDING
from dhp_jax.core.latent import Latent
from dhp_jax.core.layers import Linear
from dhp_jax.models.arguments import check_arguments, check_choice, check_images
from dhp_jax.models.blocks import ConvNorm, Family, scaled

# Convolutions of each stage, by depth; a max pool ends the stage.
CONVOLUTIONS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}

STAGE_WIDTHS = (64, 128, 256, 512, 512)


class VGG(Family):
    """A VGG network: one latent for every convolution, all of them prunable.

    The mean over what the last max pool leaves, one pixel of a CIFAR image, goes to the classifier,
    whose rows go with the channels of the last convolution.

    Args:
      depth: 11, 13, 16 or 19.
      num_classes: number of outputs.
      channels: channels of the input images.
      width: multiplies the widths 64, 128, 256, 512, 512 of the stages.
      embedding, min_channels, dtype, rngs: see `models.blocks.Family`.

    Raises:
      ValueError: a depth that is not of the family, an argument that is not positive or makes too
        many channels; when called, images of another rank or channel count.

    References: Simonyan and Zisserman, Very deep convolutional networks, 2015; DHP, section 4.2.
    """

    def __init__(
        self,
        depth: int = 16,
        *,
        num_classes: int = 10,
        channels: int = 3,
        width: float = 1.0,
        embedding: int = EMBEDDING,
        min_channels: int = 4,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_choice("depth", depth, CONVOLUTIONS)
        check_arguments(locals(), widest=max(STAGE_WIDTHS))
        self.channels = channels
        self.image = Latent(channels, prunable=False, min_channels=min_channels, rngs=rngs)
        self.stages = nnx.List()
        z = self.image
        for size, convolutions in zip(STAGE_WIDTHS, CONVOLUTIONS[depth], strict=True):
            layers = nnx.List()
            for _ in range(convolutions):
                z_out = Latent(scaled(size, width), min_channels=min_channels, rngs=rngs)
                layers.append(ConvNorm(z, z_out, 3, embedding=embedding, dtype=dtype, rngs=rngs))
                z = z_out
            self.stages.append(layers)
        self.classifier = Linear(z, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "n h w channels"]) -> Float[Array, "n classes"]:
        check_images(images, self.channels)
        x = images
        for stage in self.stages:
            for layer in stage:
                x = nnx.relu(layer(x))
            x = nnx.max_pool(
                x, window_shape=(2, 2), strides=(2, 2), padding="SAME"
            )  # of any size, down to one pixel
        return self.classifier(jnp.mean(x, axis=(1, 2)))
