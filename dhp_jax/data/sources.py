"""The data sets that a run can name."""

import os

from dhp_jax.data import cifar, digits
from dhp_jax.data.source import Source
from dhp_jax.names import unknown

NAMES = ("digits", "cifar10", "cifar100")


def load(name: str, data_dir: str | os.PathLike | None = None) -> Source:
    """Finds a data set; downloads CIFAR first if it is not there and a network is.

    Args:
      name: one of `NAMES`. "digits" (1,797 images of 8x8x1, pixels 0 .. 16) ships with
        scikit-learn and needs no network.
      data_dir: the TFDS directory that holds CIFAR, `data_dir/cifar10/3.0.2/...`; TFDS's own
        default, `~/tensorflow_datasets`, if `None`. "digits" does not look at it.

    Returns:
      The data set, whose images are read when asked for. The split of "digits" into 1,297
      training and 500 test images is always the same one.

    Raises:
      ValueError: `name` is none of `NAMES`.
      DataNotFoundError: the data are neither in `data_dir` in the array_record format nor can be
        downloaded (found out in seconds), or scikit-learn is missing.

    Example:
      >>> images, labels = load("digits").read("train")
      >>> images.shape
      (1297, 8, 8, 1)
    """
    if name not in NAMES:
        raise ValueError(unknown("data.name", name, NAMES))
    return digits.load() if name == "digits" else cifar.load(name, data_dir)
