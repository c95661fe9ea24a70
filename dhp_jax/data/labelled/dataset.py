"""The interface of data sets of labelled images."""

from collections.abc import Callable
from dataclasses import dataclass, replace
import functools
import math
from typing import Protocol
import zlib

from jaxtyping import Int, UInt8
import numpy as np

from dhp_jax.data.held_out import hold_out
from dhp_jax.data.stream import Batch, Stream
from dhp_jax.errors import DataNotFoundError, shown


class Labelled(Protocol):
    """Labelled images that are read one by one, in any order."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> tuple[UInt8[np.ndarray, "h w c"], int]: ...


@dataclass(frozen=True, eq=False)
class ReadLabelled:
    """Reads batches of labelled images: uint8 `(n, h, w, c)` and int32 `(n,)`."""

    images: Labelled

    def __call__(
        self,
        chosen: Int[np.ndarray, " n"],
        rows: Int[np.ndarray, " rows"],
        random: np.random.Generator,
    ) -> Batch:
        del random  # images are drawn from on the device
        pixels, labels = zip(*(self.images[int(i)] for i in chosen[rows]), strict=True)
        return np.stack(pixels), np.array(labels, np.int32)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set of labelled images, and the training augmentation that suits it.

    Attributes:
      name: what `load` was asked for.
      image_shape: `(h, w, c)` of every image.
      class_names: one name a class.
      train_size, test_size, validation_size: how many images there are.
      mean: mean of each channel of the training images, in units of the stored pixels.
      std: standard deviation of each channel, in the same units.
      crop_padding: width in pixels of the border that a random crop may move into.
      flip: whether a mirrored image is still an image of its class.
      peak: the largest value of a stored pixel.
      resize: the shorter side that test images were brought to before their centre was cut out;
        `None` if they were not.
      read: `read("train")`, `read("test")` and, where images are held out, `read("validation")`
        give the images, uint8 `(n, h, w, c)`, and their labels, int32 `(n,)` in
        `0 .. num_classes - 1`.
      one_by_one: gives the images of a split to read in any order, and a text that tells them from
        others; `None` for what is so small that processes may read all of it.
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
    resize: int | None = None
    one_by_one: Callable[[str], tuple[Labelled, str]] | None = None
    validation_size: int = 0

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def size(self, split: str) -> int:
        """How many images a split has."""
        return getattr(self, f"{split}_size")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have images."""
        return ("train", *["validation"] * (self.validation_size > 0), "test")

    def hold_out(self, share: float) -> "Source":
        """The same data set with a share of its training images as the split "validation".

        Mean and standard deviation stay those of all of them; see `data.held_out`. Both splits are
        decoded when one is read; the other waits until it is read, too.
        """
        if not share:
            return self
        chosen = dict(zip(("train", "validation"), hold_out(self.train_size, share), strict=True))
        waiting: dict[str, tuple[np.ndarray, np.ndarray]] = {}

        def read(split: str) -> tuple[np.ndarray, np.ndarray]:
            if split not in chosen:
                return self.read(split)
            if split not in waiting:
                images, labels = self.read("train")
                waiting.update({name: (images[n], labels[n]) for name, n in chosen.items()})
            return waiting.pop(split)

        def one_by_one(split: str) -> tuple[Labelled, str]:
            if split not in chosen:
                return self._one_by_one(split)
            images, identity = self._one_by_one("train")
            return _Chosen(images, chosen[split]), f"{identity} {share}"

        sizes = {f"{split}_size": len(numbers) for split, numbers in chosen.items()}
        return replace(self, read=read, one_by_one=one_by_one, **sizes)

    def loaded(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Reads a split whose images and labels are as the attributes say.

        Raises:
          DataNotFoundError: they are not, or there are none.
        """
        images, labels = self.read(split)
        what, count = f"{split} images of {self.name!r}", self.size(split)
        if not count:
            raise DataNotFoundError("data.name", what, "none")
        shape = (count, *self.image_shape)
        if images.shape != shape or images.dtype != np.uint8:
            got = f"{images.dtype} of shape {images.shape}"
            raise DataNotFoundError("data.name", f"{what}, uint8 of shape {shape}", got)
        found, known = np.unique(labels), np.arange(self.num_classes)
        whole = labels.shape == (count,) and labels.dtype.kind in "iu"
        if not (whole and np.isin(found, known).all()):
            expected = f"{count} labels from 0 to {known[-1]} of the {what}"
            got = f"{len(labels)}, which are {shown(found.tolist())}"
            raise DataNotFoundError("data.name", expected, got)
        return images, labels

    def bytes(self, split: str) -> int:
        """What the images of a split take as they are read."""
        return self.size(split) * math.prod(self.image_shape)

    def stream(self, split: str, workers: int) -> Stream:
        """A stream of the images of a split, for data that do not fit on the device."""
        images, identity = self._one_by_one(split)
        checksum = self._checksum(split, identity)
        return Stream(self.size(split), ReadLabelled(images), checksum, workers)

    def checksum(self, split: str) -> int:
        """Tells the images of a split from others, without decoding them."""
        _, identity = self._one_by_one(split)
        return self._checksum(split, identity)

    def _checksum(self, split: str, identity: str) -> int:
        about = f"{split} {self.image_shape} {self.mean} {self.std}"
        return zlib.crc32(f"{identity} {about}".encode())

    def _one_by_one(self, split: str) -> tuple[Labelled, str]:
        if self.one_by_one is None:
            return Loaded(self.loaded, split, self.size(split)), self.name
        return self.one_by_one(split)


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Some of the labelled images that are read one by one."""

    images: Labelled
    numbers: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        return self.images[int(self.numbers[number])]


@dataclass
class Loaded:
    """Labelled images that are loaded whole on first use."""

    read: Callable[[str], tuple[np.ndarray, np.ndarray]]
    split: str
    size: int

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.read(self.split)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        images, labels = self.arrays
        return images[number], int(labels[number])
