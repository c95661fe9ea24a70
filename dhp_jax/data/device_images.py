"""Images stored on the device so that batches can be taken from them fast."""

from dataclasses import dataclass
import functools
import math

import jax
from jaxtyping import Array, Int, Shaped


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["pixels"], meta_fields=["image_shape"]
)
@dataclass(frozen=True, eq=False)
class Rows:
    """Images of one shape stored as rows of pixels; index them by an array of image numbers.

    A TPU lays out arrays with few channels so that images lie interleaved, and a program that takes
    some of them copies all first. Rows lie one after the other everywhere.

    Example:
      >>> Rows.of(np.zeros((5, 4, 4, 3), np.uint8))[np.array([0, 3])].shape
      (2, 4, 4, 3)
    """

    pixels: Shaped[Array, "n pixels"]
    image_shape: tuple[int, ...]

    @classmethod
    def of(cls, images: Shaped[Array, "n *shape"]) -> "Rows":
        """Images as rows."""
        shape = images.shape[1:]
        return cls(images.reshape(len(images), math.prod(shape)), shape)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, chosen: Int[Array, " k"]) -> Shaped[Array, "k *shape"]:
        return self.pixels[chosen].reshape(-1, *self.image_shape)
