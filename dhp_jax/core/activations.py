"""Activations whose elements count as FLOPs, as in the published costs of restoration networks."""

from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from dhp_jax.core.latent import Axis, check_axis
from dhp_jax.core.plain import Keep, slice_axes


class ReLU(nnx.Module):
    """`nnx.relu` as a layer, which `measure_cost` counts with 1 for each element.

    Args:
      z: the axis of the channels; `None` in a network without latents.
    """

    def __init__(self, z: Axis | None = None):
        if z is not None:
            check_axis("ReLU: z", z)
        self.z = nnx.data(z)

    def plain(self, keep: Any = None) -> "ReLU":
        """The same layer without a latent."""
        return ReLU()

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        return nnx.relu(x)


class PReLU(nnx.PReLU):
    """`nnx.PReLU` over the channels of an axis, each with a slope of its own.

    Args:
      z: the axis of the channels.
      slope: of negative inputs, before training.
      shared: whether all channels share one slope.
      dtype: of the computation; slopes are float32.

    Raises:
      ValueError: `z` is no axis.

    Example:
      >>> activation = dhp.PReLU(z)
    """

    def __init__(self, z: Axis, slope: float = 0.25, *, shared: bool = False, dtype: Any = None):
        check_axis("PReLU: z", z)
        super().__init__(slope if shared else np.full(z.size, slope), dtype=dtype)
        self.z = z

    def plain(self, keep: Keep | None = None) -> nnx.PReLU:
        """`nnx.PReLU` with the slopes of the channels in `keep`."""
        slope = self.negative_slope[...]
        slope = slice_axes(slope, {0: self.z.keep(keep)}) if slope.ndim else slope
        layer = nnx.PReLU(0.0, dtype=self.dtype, param_dtype=self.param_dtype)
        layer.negative_slope = nnx.Param(jnp.asarray(slope, self.param_dtype))
        return layer
