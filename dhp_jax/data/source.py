"""What a data set is to the rest of the library."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


class DataNotFoundError(ValueError):
    """The data are not on this machine in a form that can be read, and cannot be fetched."""


@dataclass(frozen=True, eq=False)
class Source:
    """A data set of labelled images, and the training augmentation that suits it.

    Attributes:
      name: what `load` was asked for.
      image_shape: `(h, w, c)` of every image.
      class_names: one name a class.
      train_size, test_size: how many images there are.
      mean: mean of each channel of the training images, in units of the stored pixels.
      std: standard deviation of each channel, in the same units.
      crop_padding: width in pixels of the border that a random crop may move into.
      flip: whether a mirrored image is still an image of its class.
      peak: the largest value of a stored pixel.
      read: `read("train")` and `read("test")` give the images, uint8 `(n, h, w, c)`, and their
        labels, int32 `(n,)` in `0 .. num_classes - 1`.
    """

    name: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    train_size: int
    test_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool
    read: Callable[[str], tuple[np.ndarray, np.ndarray]]
    peak: int = 255

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)
