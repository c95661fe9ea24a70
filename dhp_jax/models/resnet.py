"""CIFAR ResNets: 20, 32, 44, 56 with basic blocks, 110 and 164 with bottleneck blocks."""

import math
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.latent import Axis, Latent
from dhp_jax.layers import BatchNorm, HyperConv, Linear

BASIC_DEPTHS = (20, 32, 44, 56)
BOTTLENECK_DEPTHS = (110, 164)
STAGE_WIDTHS = (16, 32, 64)
EXPANSION = 4  # of bottleneck blocks


class ConvNorm(nnx.Module):
    """A convolution without bias, then BatchNorm."""

    def __init__(self, z_in: Axis, z_out: Axis, kernel: int, strides: int, *, dtype, rngs):
        size, padding = (kernel, kernel), kernel // 2
        self.conv = HyperConv(
            z_in, z_out, size, strides, padding=padding, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.norm = BatchNorm(z_out, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n h2 w2 out"]:
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """A residual block: convolutions through hidden axes, added to the input or its projection.

    Args:
      z_in: axis of the input.
      hidden: axes between the convolutions.
      z_out: axis of the output; the input is added as it is where this is `z_in` and `stride` 1.
      kernels: kernel size of each convolution; the stride goes to the first of size 3.
    """

    def __init__(
        self,
        z_in: Axis,
        hidden: list[Latent],
        z_out: Axis,
        kernels: tuple[int, ...],
        stride: int,
        *,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        axes = [z_in, *hidden, z_out]
        strided = kernels.index(3)
        self.hidden = nnx.List(hidden)
        self.layers = nnx.List(
            ConvNorm(a, b, kernel, stride if i == strided else 1, dtype=dtype, rngs=rngs)
            for i, (a, b, kernel) in enumerate(zip(axes[:-1], axes[1:], kernels, strict=True))
        )
        identity = stride == 1 and z_in is z_out
        self.projection = (
            nnx.data(None) if identity else ConvNorm(z_in, z_out, 1, stride, dtype=dtype, rngs=rngs)
        )

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n h2 w2 out"]:
        shortcut = x if self.projection is None else self.projection(x)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return nnx.relu(self.layers[-1](x) + shortcut)


class ResNet(nnx.Module):
    """A CIFAR ResNet: one latent for each residual stage, one for every convolution inside a block.

    The last stage, which the classifier reads, is trained but not pruned.

    Args:
      depth: 20, 32, 44 or 56 (basic blocks), 110 or 164 (bottleneck blocks).
      num_classes: number of outputs.
      channels: channels of the input images.
      width: multiplies the widths 16, 32, 64 of the stages.
      min_channels: entries that every latent keeps at least.
      dtype: of activations and kernels; parameters stay float32.
      rngs: the `params` stream draws the initial values.

    Raises:
      ValueError: a depth that is not of the family, an argument that is not positive; when called,
        images of another rank or channel count.

    References: He et al., Deep residual learning, 2016, section 4.2; DHP, sections 3.4 and 4.2.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        channels: int = 3,
        width: float = 1.0,
        min_channels: int = 4,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if not isinstance(depth, int) or depth not in BASIC_DEPTHS + BOTTLENECK_DEPTHS:
            raise ValueError(
                f"depth: expected one of {BASIC_DEPTHS} (basic blocks) or {BOTTLENECK_DEPTHS} "
                f"(bottleneck blocks), got {depth!r}"
            )
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes: expected a positive integer, got {num_classes!r}")
        if not isinstance(width, int | float) or not 0 < width < math.inf:
            raise ValueError(f"width: expected a positive number, got {width!r}")
        bottleneck = depth in BOTTLENECK_DEPTHS
        blocks = (depth - 2) // (9 if bottleneck else 6)
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        widths = [max(1, round(size * width)) for size in STAGE_WIDTHS]

        def latent(size: int, prunable: bool = True) -> Latent:
            return Latent(size, prunable=prunable, min_channels=min_channels, rngs=rngs)

        self.channels = channels
        self.image = latent(channels, prunable=False)
        self.stages = nnx.List(
            latent(size * (EXPANSION if bottleneck else 1), prunable=prunable)
            for size, prunable in zip(widths, (True, True, False), strict=True)
        )
        z = latent(widths[0]) if bottleneck else self.stages[0]
        self.stem = ConvNorm(self.image, z, 3, 1, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List()
        for stage, (z_stage, size) in enumerate(zip(self.stages, widths, strict=True)):
            for i in range(blocks):
                hidden = [latent(size) for _ in kernels[1:]]
                stride = 2 if stage > 0 and i == 0 else 1
                self.blocks.append(
                    Block(z, hidden, z_stage, kernels, stride, dtype=dtype, rngs=rngs)
                )
                z = z_stage
        self.classifier = Linear(z, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "n h w channels"]) -> Float[Array, "n classes"]:
        if images.ndim != 4 or images.shape[-1] != self.channels:
            raise ValueError(
                f"images: expected shape (batch, height, width, {self.channels}), "
                f"got {images.shape}"
            )
        x = nnx.relu(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return self.classifier(jnp.mean(x, axis=(1, 2)))
