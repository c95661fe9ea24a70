"""EDSR: residual blocks without BatchNorm at low resolution, then sub-pixel up-sampling."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from dhp_jax.core.activations import ReLU
from dhp_jax.core.hypernet import EMBEDDING
from dhp_jax.core.latent import Latent
from dhp_jax.core.layers import Bias, HyperConv
from dhp_jax.models.arguments import check_arguments, check_images
from dhp_jax.models.blocks import SMALL_GAIN, Family, scaled
from dhp_jax.models.upsampler import Upsampler

MEAN = (114.4, 111.5, 103.0)  # of red, green and blue in DIV2K's training images


class Constant(nnx.Variable):
    """An array of a network that is not trained."""


class Block(nnx.Module):
    """Two convolutions, ReLU between them, added to their input.

    All blocks of the released network share one ReLU module, and its last call alone counts.
    """

    def __init__(self, z: Latent, z_hidden: Latent, *, counted: bool, **options: Any):
        self.hidden = z_hidden
        self.activation = ReLU(z_hidden) if counted else nnx.relu
        self.first = HyperConv(z, z_hidden, (3, 3), padding=1, **options)
        self.second = HyperConv(z_hidden, z, (3, 3), padding=1, **options)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        return x + self.second(self.activation(self.first(x)))


class EDSR(Family):
    """An EDSR: one latent for all that is added and up-sampled, one inside every block.

    The mean colour is subtracted from its input and added to its output, by convolutions that are
    not trained.

    Args:
      scale: 2, 3, or 4.
      blocks: number of residual blocks.
      features: channels of the body.
      channels: channels of the images; they are trained but not pruned.
      width: multiplies `features`.
      initial_scale: multiplies the kernels before training. 1 is the paper's; 0.58, which makes
        them as small as PyTorch's, trains this network without BatchNorm much faster at first.
      prune_upsampler: whether the up-sampler is pruned with the body; it keeps a latent of its own
        that is not pruned otherwise.
      embedding, min_channels, dtype, rngs: see `models.blocks.Family`.

    Raises:
      ValueError: another scale, an argument that is not positive or makes too large a network; when
        called, images of another rank or channel count.

    References: Lim et al., Enhanced deep residual networks, 2017; DHP, section 4.3.
    """

    initial_gain = SMALL_GAIN

    def __init__(
        self,
        scale: int,
        *,
        blocks: int = 8,
        features: int = 128,
        channels: int = 3,
        width: float = 1.0,
        initial_scale: float = 1.0,
        prune_upsampler: bool = True,
        embedding: int = EMBEDDING,
        min_channels: int = 4,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_arguments(locals(), widest=features)
        size = scaled(features, width)
        options = {
            "embedding": embedding,
            "dtype": dtype,
            "initial_scale": initial_scale,
            "rngs": rngs,
        }

        def latent(prunable: bool = True) -> Latent:
            return Latent(size, prunable=prunable, min_channels=min_channels, rngs=rngs)

        def conv(z_in: Latent, z_out: Latent, use_bias: bool = True) -> HyperConv:
            return HyperConv(z_in, z_out, (3, 3), padding=1, use_bias=use_bias, **options)

        self.channels = channels
        self.reach = 2 * blocks + 4  # how many pixels away an output depends on the input
        self.image = Latent(channels, prunable=False, rngs=rngs)
        self.output = Latent(channels, prunable=False, rngs=rngs)
        self.body = latent()
        self.upsampled = self.body if prune_upsampler else latent(prunable=False)
        self.center = _shift(channels, -1, rngs=rngs)
        self.head = conv(self.image, self.body)
        self.blocks = nnx.List(
            Block(self.body, latent(), counted=i == blocks - 1, **options) for i in range(blocks)
        )
        self.last = conv(self.body, self.body, use_bias=False)
        self.bias = Bias(self.body, rngs=rngs)
        self.upsampler = Upsampler(self.body, self.upsampled, scale, **options)
        options = {**options, "dtype": jnp.float32}
        self.tail = HyperConv(self.upsampled, self.output, (3, 3), padding=1, **options)
        self.restore = _shift(channels, 1, rngs=rngs)

    def __call__(
        self, images: Float[Array, "n h w channels"]
    ) -> Float[Array, "n scale*h scale*w channels"]:
        check_images(images, self.channels)
        shallow = x = self.head(self.center(images))
        for block in self.blocks:
            x = block(x)
        x = self.bias(self.last(x)) + shallow
        return self.restore(self.tail(self.upsampler(x)))


def _shift(channels: int, sign: int, *, rngs: nnx.Rngs) -> nnx.Conv:
    """A 1x1 convolution that adds or subtracts the mean colour, in full precision, untrained."""
    mean = np.asarray(MEAN if channels == len(MEAN) else (np.mean(MEAN),) * channels)
    shift = nnx.Conv(
        channels,
        channels,
        (1, 1),
        dtype=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
        kernel_init=lambda *_: jnp.eye(channels)[None, None],
        bias_init=lambda *_: jnp.asarray(sign * mean, jnp.float32),
        rngs=rngs,
    )
    shift.kernel, shift.bias = Constant(shift.kernel[...]), Constant(shift.bias[...])
    return shift
