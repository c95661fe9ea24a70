"""Photographs to restore: those that scikit-image ships, or the user's folders; no download."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
import functools
import itertools
import os
from pathlib import Path
from typing import NamedTuple
import zlib

from jaxtyping import UInt8
import numpy as np

from dhp_jax.data.decode import decode
from dhp_jax.data.held_out import hold_out
from dhp_jax.data.photos.bicubic import bicubic
from dhp_jax.data.photos.files import (
    PhotoFile,
    check_color,
    check_names,
    check_pair,
    check_sizes,
    find_in_folder,
    find_shipped,
    target_size,
)
from dhp_jax.data.photos.pixel_cache import Pixels, ReadPatches, pixel_bytes, store
from dhp_jax.data.stream import Stream
from dhp_jax.errors import FieldError


class Photograph(NamedTuple):
    """A photograph: what a network should give, and the low-resolution image that it is given.

    The name is that of the file without its suffix, and without `_HR`. `degraded` has the size of
    `target` divided by the scale; it is `None` at scale 1.
    """

    name: str
    target: UInt8[np.ndarray, "h w c"]
    degraded: UInt8[np.ndarray, "h2 w2 c"] | None


@dataclass(frozen=True, eq=False)
class Photographs:
    """A data set of photographs of any size.

    Attributes:
      files: of each split, "train", "test" and, if some are held out, "validation".
      channels: 1 for gray, 3 for red, green and blue.
      scale: size of a target over that of its low-resolution image; 1 if there is none.
    """

    files: Mapping[str, Sequence[PhotoFile]]
    channels: int
    scale: int

    @property
    def sizes(self) -> dict[str, int]:
        """How many photographs each split has."""
        return {split: len(files) for split, files in self.files.items()}

    @property
    def bytes(self) -> int:
        """What the training photographs take, with their low-resolution images."""
        return pixel_bytes(self._target_sizes(), self.channels, self.scale)

    def checksum(self, split: str) -> int:
        """Tells the photographs of a split from others, without decoding them."""
        lines = [f"{self.channels} {self.scale}"]
        for file in self.files[split]:
            lines.append(f"{file.name} {file.size} {[path.stat().st_size for path in file.paths]}")
        return zlib.crc32("\n".join(lines).encode())

    def read(self, split: str) -> list[Photograph]:
        """Reads a split in threads: Pillow and NumPy let go of the interpreter."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self._photograph, self.files[split]))

    def stream(self, patch: int, workers: int, cache: Path) -> Stream:
        """Patches of training photographs, decoded into a file in the folder `cache` beforehand."""
        train, sizes = self.files["train"], self._target_sizes()
        identity = "\n".join(map(_identity, train)) + f"\n{self.channels} {self.scale} upright"

        def decode_image(image: int) -> Pixels:
            photo = self._photograph(train[image])
            return photo.target, photo.degraded

        path = store(cache, identity, sizes, self.channels, self.scale, decode_image)
        read = ReadPatches(str(path), sizes, self.channels, self.scale, patch)
        return Stream(len(train), read, self.checksum("train"), workers)

    def _target_sizes(self) -> list[tuple[int, int]]:
        return [target_size(file, self.scale) for file in self.files["train"]]

    def _photograph(self, file: PhotoFile) -> Photograph:
        """Decodes a photograph and its low-resolution image, or makes that."""
        mode = "L" if self.channels == 1 else "RGB"
        height, width = target_size(file, self.scale)
        read = functools.partial(decode, mode=mode, argument=file.argument, upright=True)
        target = read(file.path)[:height, :width]
        if self.scale == 1:
            degraded = None
        elif file.low is None:
            degraded = bicubic(target, Fraction(1, self.scale))
        else:
            degraded = read(file.low)
        return Photograph(file.name, target, degraded)


def _identity(file: PhotoFile) -> str:
    """A text that identifies the files of a photograph."""
    states = [(path, path.stat()) for path in file.paths]
    return " ".join(f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in states)


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    test_dir: str | os.PathLike | None = None,
    *,
    channels: int = 3,
    scale: int = 1,
    patch: int,
    smallest_test: int = 1,
    validation: float = 0.0,
) -> Photographs:
    """Finds photographs and checks the header of every file, without decoding them.

    A folder holds images, or pairs of a photograph and its low-resolution image: files `*_HR.png`
    and `*_LR.png`, or folders `HR/` and `LR/` of the same names (or `0801.png` and `0801x4.png`);
    `HR` and `LR` may be in lower case. Low-resolution images of a folder without pairs are made by
    `bicubic`; at scale 1 those of pairs are not looked at. All are turned upright, as their EXIF
    orientation says. One warning tells how many files are left out. Targets lose what exceeds a
    multiple of the scale at the bottom and on the right.

    Args:
      name: "photographs", a handful that ships with scikit-image, or "photo_folder", one's own.
      data_dir: folder of the training photographs (bmp, gif, jpeg, png, tiff, webp); not for
        "photographs".
      test_dir: folder of the test photographs.
      channels: 3 for color: all training photographs have to be, and gray test photographs get
        three equal channels. 1 for gray: the luma (ITU-R 601) of what is in color.
      scale: of super-resolution; 1 for denoising.
      patch: height and width of what training crops from a target, a multiple of `scale`.
      smallest_test: height and width that test targets must have for metrics to be defined; those
        for validation, too.
      validation: share of the training photographs that is held out; see `data.held_out`.

    Returns:
      The photographs, which are decoded when asked for.

    Raises:
      ValueError: photographs that do not suit the arguments: gray among color, smaller than a
        patch, a pair that is incomplete, has two files for one image, is of gray and color where
        there are 3 channels, or does not have sizes in the ratio of `scale`.
      DataNotFoundError: a folder is missing or empty, or a file is no image that can be read (that
        it is cut off is found out by `read`).

    Example:
      >>> load("photographs", scale=4, patch=96).read("test")[0].degraded.shape
      (75, 112, 3)
    """
    if name == "photographs":
        for argument, folder in (("data.dir", data_dir), ("data.test_dir", test_dir)):
            if folder is not None:
                raise FieldError(
                    argument,
                    detail="expected none for data.name='photographs', which ships with "
                    f"scikit-image; got {os.fspath(folder)!r}; folders are "
                    "data.name='photo_folder'",
                )
        files = find_shipped(channels)
    else:
        files = {
            "train": find_in_folder("data.dir", data_dir, scale),
            "test": find_in_folder("data.test_dir", test_dir, scale),
        }
    if channels == 3:
        check_color(files["train"])
    check_sizes(files["train"], scale, patch, "a patch")
    train, held = hold_out(len(files["train"]), validation)
    if validation:
        files["validation"] = [files["train"][number] for number in held]
        files["train"] = [files["train"][number] for number in train]
    for split in files.keys() - {"train"}:
        check_sizes(files[split], scale, max(scale, smallest_test), "metrics need")
    for file in itertools.chain(*files.values()):
        check_pair(file, channels, scale)
    names = [(file.name, file.path) for file in files["test"]]  # what is made is stored under them
    check_names(files["test"][0].argument, "photograph", names)
    return Photographs(files, channels, scale)
