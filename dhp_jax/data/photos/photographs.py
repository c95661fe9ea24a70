"""Photographs to restore: those that scikit-image ships, or the user's folders; no download."""

from collections.abc import Callable, Mapping
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
    NAMES,
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
from dhp_jax.errors import FieldError, shown


class Photograph(NamedTuple):
    """A photograph.

    Attributes:
      name: file name without its suffix, and without `_HR`.
      target: what a network should give.
      degraded: the low-resolution image that it is given, `target`'s size divided by the scale;
        `None` at scale 1.
    """

    name: str
    target: UInt8[np.ndarray, "h w c"]
    degraded: UInt8[np.ndarray, "h2 w2 c"] | None


@dataclass(frozen=True, eq=False)
class Photographs:
    """A data set of photographs of any size.

    Attributes:
      name: what `load` was asked for.
      channels: 1 for gray, 3 for red, green and blue.
      scale: size of a target over that of its low-resolution image; 1 if there is none.
      sizes: how many photographs each split has, by "train", "validation" and "test".
      smallest: the smallest height and the smallest width of the training targets.
      bytes: what the training photographs take, with their low-resolution images.
      checksum: `checksum("train")` tells the photographs of a split from others, without decoding
        them.
      read: `read("train")` gives the photographs of a split.
      stream: `stream(patch, workers, cache)` gives patches of the training photographs, which are
        decoded into a file in the folder `cache` first.
    """

    name: str
    channels: int
    scale: int
    sizes: Mapping[str, int]
    smallest: tuple[int, int]
    bytes: int
    checksum: Callable[[str], int]
    read: Callable[[str], list[Photograph]]
    stream: Callable[[int, int, Path], Stream]


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
      name: one of `NAMES`. "photographs" is a handful that ships with scikit-image; "photo_folder"
        is the user's own.
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
      ValueError: an argument is out of range, or the photographs do not suit it: gray among color,
        smaller than a patch, a pair that is incomplete, has two files for one image, is of gray
        and color where there are 3 channels, or does not have sizes in the ratio of `scale`.
      DataNotFoundError: a folder is missing or empty, or a file is no image that can be read (that
        it is cut off is found out by `read`).

    Example:
      >>> load("photographs", scale=4, patch=96).read("test")[0].degraded.shape
      (75, 112, 3)
    """
    _check_arguments(name, channels, scale, patch)
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
    sizes = [target_size(file, scale) for file in files["train"]]
    heights, widths = zip(*sizes, strict=True)
    return Photographs(
        name=name,
        channels=channels,
        scale=scale,
        sizes={split: len(found) for split, found in files.items()},
        smallest=(min(heights), min(widths)),
        bytes=pixel_bytes(sizes, channels, scale),
        checksum=functools.partial(_checksum, files, channels, scale),
        read=functools.partial(_read, files, channels, scale),
        stream=functools.partial(_stream, files, channels, scale),
    )


# Checking them


def _check_arguments(name: str, channels: int, scale: int, patch: int) -> None:
    if name not in NAMES:
        raise FieldError.unknown("data.name", name, NAMES)
    if channels not in (1, 3):
        raise FieldError("channels", "1 (gray) or 3 (color)", shown(channels))
    if not isinstance(scale, int) or scale < 1:
        raise FieldError("scale", "a whole number of at least 1", shown(scale))
    if not isinstance(patch, int) or patch < 1 or patch % scale:
        raise FieldError("patch", f"a positive multiple of the scale, {scale}", shown(patch))


# Reading them


def _read(
    files: dict[str, list[PhotoFile]], channels: int, scale: int, split: str
) -> list[Photograph]:
    """Reads a split in threads: Pillow and NumPy let go of the interpreter."""
    read = functools.partial(_photograph, channels=channels, scale=scale)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, files[split]))


def _photograph(file: PhotoFile, channels: int, scale: int) -> Photograph:
    """Decodes a photograph and its low-resolution image, or makes that."""
    mode = "L" if channels == 1 else "RGB"
    height, width = target_size(file, scale)
    read = functools.partial(decode, mode=mode, argument=file.argument, upright=True)
    target = read(file.path)[:height, :width]
    if scale == 1:
        degraded = None
    elif file.low is None:
        degraded = bicubic(target, Fraction(1, scale))
    else:
        degraded = read(file.low)
    return Photograph(file.name, target, degraded)


def _stream(
    files: dict[str, list[PhotoFile]],
    channels: int,
    scale: int,
    patch: int,
    workers: int,
    cache: Path,
) -> Stream:
    """Patches of training photographs, which are decoded beforehand."""
    train = files["train"]
    sizes = [target_size(file, scale) for file in train]
    identity = "\n".join(map(_identity, train)) + f"\n{channels} {scale} upright"

    def decode_image(image: int) -> Pixels:
        photo = _photograph(train[image], channels, scale)
        return photo.target, photo.degraded

    path = store(cache, identity, sizes, channels, scale, decode_image)
    read = ReadPatches(str(path), sizes, channels, scale, patch)
    return Stream(len(train), read, _checksum(files, channels, scale, "train"), workers)


def _checksum(files: dict[str, list[PhotoFile]], channels: int, scale: int, split: str) -> int:
    lines = [f"{channels} {scale}"]
    for file in files[split]:
        paths = [file.path] if file.low is None else [file.path, file.low]
        lines.append(f"{file.name} {file.size} {[path.stat().st_size for path in paths]}")
    return zlib.crc32("\n".join(lines).encode())


def _identity(file: PhotoFile) -> str:
    """A text that identifies the files of a photograph."""
    paths = [file.path] if file.low is None else [file.path, file.low]
    return " ".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)
