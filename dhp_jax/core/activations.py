"""Activations whose elements count as FLOPs, as in the published costs of restoration networks."""

from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.core.latent import Axis, check_axis


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
    """`nnx.PReLU` over the channels of an axis; all of them share one slope.

    Args:
      z: the axis of the channels.
      slope: of negative inputs, before training.
      dtype: of the computation; the slope is float32.
    """

    def __init__(self, z: Axis, slope: float = 0.25, *, dtype: Any = None):
        check_axis("PReLU: z", z)
        super().__init__(slope, dtype=dtype)
        self.z = z

    def plain(self, keep: Any = None) -> nnx.PReLU:
        """`nnx.PReLU` with the same slope."""
        slope = self.negative_slope[...]
        layer = nnx.PReLU(0.0, dtype=self.dtype, param_dtype=self.param_dtype)
        layer.negative_slope = nnx.Param(jnp.asarray(slope, self.param_dtype))
        return layer
