"""MobileNets, versions 1 and 2: depthwise convolutions, and a classifier that may be pruned."""

from collections.abc import Callable, Iterator
import math
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.core.hypernet import EMBEDDING
from dhp_jax.core.latent import Axis, Latent
from dhp_jax.core.layers import Linear
from dhp_jax.models.arguments import check_arguments, check_images
from dhp_jax.models.blocks import ConvNorm, Family, scaled

STEM = 32

V1_BLOCKS = (  # channels and stride, of all but the last
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
)

V2_GROUPS = (  # channels, blocks, stride of the first block, expansion
    (16, 1, 1, 1),
    (24, 2, 1, 6),  # of stride 2 on ImageNet, whose images are larger
    (32, 3, 2, 6),
    (64, 4, 2, 6),
    (96, 3, 1, 6),
    (160, 3, 2, 6),
    (320, 1, 1, 6),
)


class ConvNormReLU(ConvNorm):
    """`ConvNorm`, then ReLU, or ReLU6."""

    def __init__(self, *arguments: Any, relu6: bool = False, **options: Any):
        super().__init__(*arguments, **options)
        self.relu6 = relu6

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n h2 w2 out"]:
        x = super().__call__(x)
        return nnx.relu6(x) if self.relu6 else nnx.relu(x)


class InvertedResidual(nnx.Module):
    """The block of MobileNetV2: expansion, depthwise convolution, projection without ReLU.

    Args:
      z_in, z_out: axes of input and output; the input is added where they are one and `stride` 1.
      hidden: axis of the depthwise convolution; `z_in` itself for a block without expansion.
      stride: of the depthwise convolution.
      relu6: whether ReLU6 takes the place of ReLU.
      **options: `embedding`, `dtype` and `rngs`.
    """

    def __init__(
        self,
        z_in: Axis,
        hidden: Axis,
        z_out: Axis,
        stride: int,
        *,
        relu6: bool = False,
        **options: Any,
    ):
        self.layers = nnx.List()
        activated = {"relu6": relu6, **options}
        if hidden is not z_in:
            self.layers.append(ConvNormReLU(z_in, hidden, 1, **activated))
        self.layers.append(ConvNormReLU(hidden, hidden, 3, stride, groups=hidden.size, **activated))
        self.layers.append(ConvNorm(hidden, z_out, 1, **options))
        self.identity = stride == 1 and z_in is z_out

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n h2 w2 out"]:
        y = x
        for layer in self.layers:
            y = layer(y)
        return x + y if self.identity else y


class MobileNet(Family):
    """Base of both versions: everything but the layers between stem and classifier.

    One latent rules a depthwise convolution and its neighbours.

    Args:
      num_classes: number of outputs.
      channels: channels of the input images.
      width: multiplies all widths; expansions are multiples of what is expanded.
      prune_classifier: whether the channels of the last convolution, and the classifier's rows with
        them, may be pruned; they are trained in any case.
      classifier_keep: share of these channels that stays at least, if they may be pruned.
      dropout: share of the classifier's inputs that training leaves out at random, 0.2 in the
        paper. In a training loop of your own, give the layer `dropout` its `rngs`; runs do.
      stem_stride: 2 for images of 64 by 64 pixels or more, 1 for smaller ones.
      relu6: whether ReLU6 takes the place of ReLU, as in the ordinary networks of the paper's code.
      embedding, min_channels, dtype, rngs: see `models.blocks.Family`.

    Raises:
      ValueError: an argument that is not positive or makes too many channels, a share outside
        [0, 1], a dropout of 1, another stride; when called, images of another rank or channel
        count.
    """

    features_size: int  # channels of the last convolution

    def __init__(
        self,
        *,
        num_classes: int = 200,
        channels: int = 3,
        width: float = 1.0,
        prune_classifier: bool = True,
        classifier_keep: float = 0.4,
        dropout: float = 0.0,
        stem_stride: int = 2,
        relu6: bool = False,
        embedding: int = EMBEDDING,
        min_channels: int = 4,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_arguments(locals(), widest=self.features_size)

        def latent(size: int) -> Latent:
            return Latent(size, min_channels=min_channels, rngs=rngs)

        size = scaled(self.features_size, width)
        keep = max(min_channels, math.ceil(classifier_keep * size))
        self.channels = channels
        self.image = Latent(channels, prunable=False, rngs=rngs)
        self.features = Latent(size, prunable=prune_classifier, min_channels=keep, rngs=rngs)
        z = latent(scaled(STEM, width))
        options = {"relu6": relu6, "embedding": embedding, "dtype": dtype, "rngs": rngs}
        self.stem = ConvNormReLU(self.image, z, 3, stem_stride, **options)
        self.layers = nnx.List(self.body(z, latent, width, **options))
        self.dropout = nnx.Dropout(dropout)
        self.classifier = Linear(self.features, num_classes, dtype=dtype, rngs=rngs)

    def body(
        self, z: Latent, latent: Callable[[int], Latent], width: float, **options: Any
    ) -> Iterator[nnx.Module]:
        """The layers from the stem's axis to `self.features`."""
        raise NotImplementedError

    def __call__(self, images: Float[Array, "n h w channels"]) -> Float[Array, "n classes"]:
        check_images(images, self.channels)
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.dropout(jnp.mean(x, axis=(1, 2))))


class MobileNetV1(MobileNet):
    """A MobileNetV1: one latent for every convolution that is not depthwise.

    Args and Raises: see `MobileNet`.

    References: Howard et al., MobileNets, 2017; DHP, sections 3.4 and 4.2.
    """

    features_size = 1024

    def body(
        self, z: Latent, latent: Callable[[int], Latent], width: float, **options: Any
    ) -> Iterator[nnx.Module]:
        for size, stride in V1_BLOCKS:
            yield ConvNormReLU(z, z, 3, stride, groups=z.size, **options)
            z_out = latent(scaled(size, width))
            yield ConvNormReLU(z, z_out, 1, **options)
            z = z_out
        yield ConvNormReLU(z, z, 3, groups=z.size, **options)
        yield ConvNormReLU(z, self.features, 1, **options)


class MobileNetV2(MobileNet):
    """A MobileNetV2 with ReLU: one latent for each group of blocks of a width, one an expansion.

    Args and Raises: see `MobileNet`.

    References: Sandler et al., MobileNetV2, 2018; DHP, sections 3.4 and 4.2.
    """

    features_size = 1280

    def body(
        self, z: Latent, latent: Callable[[int], Latent], width: float, **options: Any
    ) -> Iterator[nnx.Module]:
        for size, blocks, first_stride, expansion in V2_GROUPS:
            z_out = latent(scaled(size, width))
            for i in range(blocks):
                hidden = z if expansion == 1 else latent(expansion * z.size)
                stride = first_stride if i == 0 else 1
                yield InvertedResidual(z, hidden, z_out, stride, **options)
                z = z_out
        yield ConvNormReLU(z, self.features, 1, **options)
