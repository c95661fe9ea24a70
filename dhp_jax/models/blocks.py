"""What several families are built of."""

from collections.abc import Iterator
from typing import Any

from flax import nnx
from flax.nnx import reprlib
from jaxtyping import Array, Float

from dhp_jax.core.latent import Axis, latents
from dhp_jax.core.layers import BatchNorm, Bias, HyperConv
from dhp_jax.core.provenance import architecture_of

# The `initial_gain` of restoration networks, PyTorch's; He's takes far longer without BatchNorm.
SMALL_GAIN = 1 / 3


class Family(nnx.Module):
    """Base of the families: what `repr` shows of a network are its arguments, not its layers.

    Args:
      embedding: size of the embedding of each pair of channels in the hypernetworks.
      min_channels: entries that every latent keeps at least.
      dtype: of activations and kernels, but for the last convolution of networks that restore
        images, whose pixels are float32; parameters stay float32.
      rngs: the `params` stream draws the initial values.
    """

    def __nnx_repr__(self) -> Iterator[Any]:
        made = architecture_of(self)
        if made.family is None:  # not from `dhp.models.build`
            yield from super().__nnx_repr__()
            return
        left = f"{len(latents(self))} latents" if latents(self) else "no latents"
        yield reprlib.Object(type(self), comment=f"  # {left}")
        yield from (reprlib.Attr(name, value) for name, value in made.arguments.items())


class ConvNorm(nnx.Module):
    """A convolution without bias, padded by half its kernel, then BatchNorm.

    `kernel` is its size, the same in both directions; of a depthwise one, `groups` is `z_in.size`.
    Other options are the convolution's.
    """

    def __init__(
        self,
        z_in: Axis,
        z_out: Axis,
        kernel: int,
        strides: int = 1,
        *,
        groups: int = 1,
        dtype: Any,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        options |= {"use_bias": False, "padding": kernel // 2, "feature_group_count": groups}
        options |= {"dtype": dtype, "rngs": rngs}
        self.conv = HyperConv(z_in, z_out, (kernel, kernel), strides, **options)
        self.norm = BatchNorm(z_out, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n h2 w2 out"]:
        return self.norm(self.conv(x))


class ConvBiasNorm(nnx.Module):
    """A 3x3 convolution, its bias as a layer (see `backend.norm`), then BatchNorm."""

    def __init__(self, z_in: Axis, z_out: Axis, *, dtype: Any, rngs: nnx.Rngs, **options: Any):
        options |= {"use_bias": False, "padding": 1, "dtype": dtype, "rngs": rngs}
        self.conv = HyperConv(z_in, z_out, (3, 3), **options)
        self.bias = Bias(z_out, rngs=rngs)
        self.norm = BatchNorm(z_out, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n h w out"]:
        return self.norm(self.bias(self.conv(x)))


def scaled(size: int, width: float) -> int:
    """A number of channels multiplied by a width, at least 1."""
    return max(1, round(size * width))
