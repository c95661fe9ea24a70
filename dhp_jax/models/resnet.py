"""ResNets of CIFAR and of ImageNet shape, with basic or bottleneck blocks, and ResNeXts."""

from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.core.hypernet import EMBEDDING
from dhp_jax.core.latent import Axis, Latent, repeat
from dhp_jax.core.layers import Linear
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.models.arguments import (
    MAX_CHANNELS,
    check_arguments,
    check_images,
    check_positive_integer,
)
from dhp_jax.models.blocks import ConvNorm, Family, scaled

# Blocks of each stage, by depth.
CIFAR_BASIC = {depth: ((depth - 2) // 6,) * 3 for depth in (8, 14, 20, 32, 44, 56)}
CIFAR_BOTTLENECK = {depth: ((depth - 2) // 9,) * 3 for depth in (110, 164)}
IMAGENET_BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
IMAGENET_BOTTLENECK = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BOTTLENECK = CIFAR_BOTTLENECK | IMAGENET_BOTTLENECK
IMAGENET = IMAGENET_BASIC | IMAGENET_BOTTLENECK
BLOCKS = CIFAR_BASIC | BOTTLENECK | IMAGENET
CIFAR_WIDTHS = (16, 32, 64)
IMAGENET_WIDTHS = (64, 128, 256, 512)
EXPANSION = 4  # of bottleneck blocks


class Block(nnx.Module):
    """A residual block: convolutions through hidden axes, added to the input or its projection.

    Args:
      z_in, z_out: axes of input and output; the input is added as it is where they are one and
        `stride` 1.
      hidden: axes between the convolutions.
      kernels: kernel size of each convolution; the stride goes to the first of size 3.
      groups: of the convolutions of size 3.
      **options: of the convolutions with their BatchNorm.
    """

    def __init__(
        self,
        z_in: Axis,
        hidden: list[Axis],
        z_out: Axis,
        kernels: tuple[int, ...],
        stride: int,
        *,
        groups: int = 1,
        **options: Any,
    ):
        axes = [z_in, *hidden, z_out]
        strided = kernels.index(3)
        self.hidden = nnx.List(hidden)
        self.layers = nnx.List(
            ConvNorm(
                a,
                b,
                kernel,
                stride if i == strided else 1,
                groups=groups if kernel == 3 else 1,
                **options,
            )
            for i, (a, b, kernel) in enumerate(zip(axes[:-1], axes[1:], kernels, strict=True))
        )
        identity = stride == 1 and z_in is z_out
        self.projection = (
            nnx.data(None) if identity else ConvNorm(z_in, z_out, 1, stride, **options)
        )

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n h2 w2 out"]:
        shortcut = x if self.projection is None else self.projection(x)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return nnx.relu(self.layers[-1](x) + shortcut)


class ResNet(Family):
    """A ResNet: one latent for each residual stage, one for every convolution inside a block.

    The depth tells the shape: CIFAR networks have three stages and a 3 by 3 stem, ImageNet networks
    four, a 7 by 7 stem of stride 2 and a max pool. The last stage, which the classifier reads, is
    trained but not pruned. With groups a network is a ResNeXt, whose 3 by 3 convolutions lose whole
    groups: `depth=50, groups=32, group_width=4` is ResNeXt-50 32x4d.

    Args:
      depth: of a CIFAR network 8, 14, 20, 32, 44 or 56 (basic blocks), 110 or 164 (bottleneck
        blocks); of an ImageNet network 18 or 34 (basic blocks), 50 or 101 (bottleneck blocks).
      num_classes: number of outputs.
      channels: channels of the input images.
      width: multiplies the widths of the stages (16, 32, 64, or 64, 128, 256, 512), and that of
        groups.
      groups: of the 3 by 3 convolutions of bottleneck blocks.
      group_width: channels of a group in the first stage; they double with every stage. Given if,
        and only if, there are several groups.
      embedding, min_channels, dtype, rngs: see `models.blocks.Family`.

    Raises:
      ValueError: a depth that is not of the family, an argument that is not positive or makes too
        many channels, groups in basic blocks or without their width; when called, images of another
        rank or channel count.

    References: He et al., Deep residual learning, 2016, sections 4.1 and 4.2; Xie et al.,
    Aggregated residual transformations, 2017; DHP, sections 3.4 and 4.2.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        channels: int = 3,
        width: float = 1.0,
        groups: int = 1,
        group_width: int | None = None,
        embedding: int = EMBEDDING,
        min_channels: int = 4,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        _check_depth(depth)
        kernels = (1, 3, 1) if depth in BOTTLENECK else (3, 3)
        expansion = EXPANSION if depth in BOTTLENECK else 1
        widths = IMAGENET_WIDTHS if depth in IMAGENET else CIFAR_WIDTHS
        doublings = 2 ** (len(widths) - 1)
        _check_groups(depth, groups, group_width, MAX_CHANNELS // doublings)
        check_arguments(
            locals(), widest=max(widths[-1] * expansion, groups * (group_width or 1) * doublings)
        )

        def latent(size: int, prunable: bool = True) -> Latent:
            return Latent(size, prunable=prunable, min_channels=min_channels, rngs=rngs)

        def hidden_axes(stage: int) -> list[Axis]:
            if group_width is not None:  # an entry stands for a group
                return [repeat(latent(groups), scaled(group_width * 2**stage, width))] * 2
            return [latent(scaled(widths[stage], width)) for _ in kernels[1:]]

        options = {"embedding": embedding, "dtype": dtype, "rngs": rngs}
        self.channels = channels
        self.max_pool = depth in IMAGENET
        self.image = latent(channels, prunable=False)
        self.stages = nnx.List(
            latent(scaled(size, width) * expansion, prunable=size != widths[-1]) for size in widths
        )
        z = latent(scaled(widths[0], width)) if depth in BOTTLENECK else self.stages[0]
        kernel, stride = (7, 2) if depth in IMAGENET else (3, 1)
        self.stem = ConvNorm(self.image, z, kernel, stride, **options)
        self.blocks = nnx.List()
        for stage, (z_stage, blocks) in enumerate(zip(self.stages, BLOCKS[depth], strict=True)):
            for i in range(blocks):
                hidden = hidden_axes(stage)
                stride = 2 if stage > 0 and i == 0 else 1
                block = Block(z, hidden, z_stage, kernels, stride, groups=groups, **options)
                self.blocks.append(block)
                z = z_stage
        self.classifier = Linear(z, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "n h w channels"]) -> Float[Array, "n classes"]:
        check_images(images, self.channels)
        x = nnx.relu(self.stem(images))
        if self.max_pool:
            # After ReLU zeros never win, and ONNX exporters know no other padding of a pool.
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2))
        for block in self.blocks:
            x = block(x)
        return self.classifier(jnp.mean(x, axis=(1, 2)))


def _check_depth(depth: int) -> None:
    if not isinstance(depth, int) or depth not in BLOCKS:
        raise ArgumentError(
            "depth",
            f"one of {tuple(CIFAR_BASIC)} or {tuple(IMAGENET_BASIC)} (basic blocks), "
            f"{tuple(CIFAR_BOTTLENECK)} or {tuple(IMAGENET_BOTTLENECK)} (bottleneck "
            "blocks)",
            shown(depth),
        )


def _check_groups(depth: int, groups: int, group_width: int | None, most: int) -> None:
    """Raises unless there is one group of no given width, or the blocks can have several.

    Groups have `most` channels together in the first stage.
    """
    check_positive_integer("groups", groups, most)
    if groups == 1:
        if group_width is not None:
            raise ArgumentError("group_width", "None with groups=1", shown(group_width))
        return
    if depth not in BOTTLENECK:
        raise ArgumentError("groups", f"1 at depth {depth} (basic blocks)", shown(groups))
    check_positive_integer("group_width", group_width, most // groups)
