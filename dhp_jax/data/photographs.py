"""Photographs to restore: those that scikit-image ships, or the user's folders; no download."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
import functools
import importlib.util
import os
from pathlib import Path
import re
from typing import NamedTuple
import zlib

from jaxtyping import UInt8
import numpy as np

from dhp_jax.data.decode import COLOUR, GRAY, check_whole, decode, opened
from dhp_jax.data.pixel_file import Pixels, ReadPatches, pixel_bytes, store
from dhp_jax.data.resize import bicubic
from dhp_jax.data.source import DataNotFoundError
from dhp_jax.data.stream import Stream
from dhp_jax.names import unknown

NAMES = ("photographs", "photo_folder")
MARKS = ("HR", "LR")  # of the two images of a pair, in upper or lower case
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Files in skimage/data. The stereo pair motorcycle_left, motorcycle_right is not divided.
SHIPPED = {
    "train": (
        "astronaut.png",
        "ihc.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "rocket.jpg",
    ),
    "test": ("chelsea.png", "coffee.png"),
}
SHIPPED_GRAY = {
    "train": ("brick.png", "coins.png", "grass.png", "gravel.png"),
    "test": ("camera.png",),
}


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
      train_size, test_size: how many photographs there are.
      smallest: the smallest height and the smallest width of the training targets.
      bytes: what the training photographs take, with their low-resolution images.
      checksum: `checksum("train")` and `checksum("test")` tell the photographs from others, without
        decoding them.
      read: `read("train")` and `read("test")` give the photographs.
      stream: `stream(patch, workers, cache)` gives patches of the training photographs, which are
        decoded into a file in the folder `cache` first.
    """

    name: str
    channels: int
    scale: int
    train_size: int
    test_size: int
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
) -> Photographs:
    """Finds photographs and checks the header of every file, without decoding them.

    A folder holds images, or pairs of a photograph and its low-resolution image: files `*_HR.png`
    and `*_LR.png`, or folders `HR/` and `LR/` of the same names (or `0801.png` and `0801x4.png`);
    `HR` and `LR` may be in lower case. Low-resolution images of a folder without pairs are made by
    `bicubic`; at scale 1 those of pairs are not looked at. Targets lose what exceeds a multiple of
    the scale at the bottom and on the right.

    Args:
      name: one of `NAMES`. "photographs" is a handful that ships with scikit-image; "photo_folder"
        is the user's own.
      data_dir: folder of the training photographs (bmp, jpeg, png, tiff, webp); not for
        "photographs".
      test_dir: folder of the test photographs.
      channels: 3 for color: all training photographs have to be, and gray test photographs get
        three equal channels. 1 for gray: the luma (ITU-R 601) of what is in color.
      scale: of super-resolution; 1 for denoising.
      patch: height and width of what training crops from a target, a multiple of `scale`.
      smallest_test: height and width that test targets must have for metrics to be defined.

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
                raise ValueError(
                    f"{argument}: expected none for data.name='photographs', which ships with "
                    f"scikit-image; got {os.fspath(folder)!r}; folders are data.name='photo_folder'"
                )
        files = _shipped(channels)
    else:
        files = {
            "train": _folder("data.dir", data_dir, scale),
            "test": _folder("data.test_dir", test_dir, scale),
        }
    if channels == 3:
        _check_color(files["train"])
    _check_sizes(files["train"], scale, patch, "a patch")
    _check_sizes(files["test"], scale, max(scale, smallest_test), "metrics need")
    for file in files["train"] + files["test"]:
        _check_pair(file, channels, scale)
    names = [(file.name, file.path) for file in files["test"]]  # what is made is stored under them
    _check_names(files["test"][0].argument, "photograph", names)
    sizes = [_target_size(file, scale) for file in files["train"]]
    heights, widths = zip(*sizes, strict=True)
    return Photographs(
        name=name,
        channels=channels,
        scale=scale,
        train_size=len(files["train"]),
        test_size=len(files["test"]),
        smallest=(min(heights), min(widths)),
        bytes=pixel_bytes(sizes, channels, scale),
        checksum=functools.partial(_checksum, files, channels, scale),
        read=functools.partial(_read, files, channels, scale),
        stream=functools.partial(_stream, files, channels, scale),
    )


class _File(NamedTuple):
    """A photograph that is not decoded yet, and the argument that led to it."""

    argument: str
    name: str
    path: Path
    size: tuple[int, int]
    gray: bool
    low: Path | None


# Finding files


def _shipped(channels: int) -> dict[str, list[_File]]:
    """The photographs of scikit-image; those that are gray only if that is asked for."""
    package = importlib.util.find_spec("skimage")  # no import: that takes a second
    folder = Path(package.origin).parent / "data"
    return {
        split: [
            _file("data.name", Path(name).stem, folder / name)
            for name in SHIPPED[split] + (SHIPPED_GRAY[split] if channels == 1 else ())
        ]
        for split in SHIPPED
    }


def _folder(argument: str, folder: str | os.PathLike | None, scale: int) -> list[_File]:
    """The photographs in a folder, with their low-resolution images if it holds pairs."""
    if folder is None:
        raise ValueError(f"{argument}: 'photo_folder' expects a folder of images; got None")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataNotFoundError(f"{argument}: expected a folder of images; got {str(folder)!r}")
    try:
        images = list(_images(folder))
    except OSError as error:
        raise DataNotFoundError(f"{argument}: cannot read {str(folder)!r}: {error}") from error
    targets = [(name, path) for name, mark, path in images if mark != "LR"]
    lows = [(name, path) for name, mark, path in images if mark == "LR"]
    if scale > 1 and any(mark for _, mark, _ in images):
        counterparts = _match(argument, targets, lows, scale)
    else:
        counterparts = [None] * len(targets)
    if not targets:
        raise DataNotFoundError(
            f"{argument}: expected images ({', '.join(SUFFIXES)}); found none in {str(folder)!r}"
        )
    return [
        _file(argument, name, path, low)
        for (name, path), low in zip(targets, counterparts, strict=True)
    ]


def _images(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """The images of a folder: name without mark, mark ("HR", "LR" or none) and path."""
    marked = [part for part in folder.iterdir() if part.name.upper() in MARKS and part.is_dir()]
    for part in (folder, *sorted(marked, key=lambda part: (part.name.upper(), part.name))):
        part_mark = "" if part is folder else part.name
        for path in sorted(part.iterdir()):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                name, mark = re.fullmatch(r"(.*?)(?:_(HR|LR))?", path.stem, re.IGNORECASE).groups()
                yield name, (mark or part_mark).upper(), path


def _match(
    argument: str, targets: list[tuple[str, Path]], lows: list[tuple[str, Path]], scale: int
) -> list[Path]:
    """The low-resolution image of every target; none may be missing or left."""
    _check_names(argument, "photograph", targets)
    _check_names(argument, "low-resolution image", lows)
    lows, matched = dict(lows), []
    for name, path in targets:
        low = lows.pop(name, None) or lows.pop(f"{name}x{scale}", None)
        if low is None:
            raise DataNotFoundError(
                f"{argument}: expected a low-resolution image to {str(path)!r}, "
                f"*_LR beside *_HR or the same name (or with x{scale}) in LR/; found none"
            )
        matched.append(low)
    for low in lows.values():
        raise DataNotFoundError(
            f"{argument}: expected a photograph to the low-resolution {str(low)!r}; found none"
        )
    return matched


def _file(argument: str, name: str, path: Path, low: Path | None = None) -> _File:
    """Reads the header of an image."""
    with opened(path, argument=argument) as image:
        mode, (width, height) = image.mode, image.size
        check_whole(image)
    if mode not in GRAY + COLOUR:
        raise DataNotFoundError(
            f"{argument}: expected images of 8 bits a channel; "
            f"got {str(path)!r} in Pillow's mode {mode!r}"
        )
    return _File(argument, name, path, (height, width), mode in GRAY, low)


# Checking them


def _check_arguments(name: str, channels: int, scale: int, patch: int) -> None:
    if name not in NAMES:
        raise ValueError(unknown("data.name", name, NAMES))
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 (gray) or 3 (color); got {channels!r}")
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale: expected a whole number of at least 1; got {scale!r}")
    if not isinstance(patch, int) or patch < 1 or patch % scale:
        raise ValueError(
            f"patch: expected a positive multiple of the scale, {scale}; got {patch!r}"
        )


def _check_color(files: list[_File]) -> None:
    gray, color = ([file for file in files if file.gray is value] for value in (True, False))
    if gray:
        mixed = f", and {str(color[0].path)!r} is in color" if color else ""
        raise ValueError(
            f"{gray[0].argument}: expected color photographs for 3 channels; "
            f"{str(gray[0].path)!r} is gray{mixed}"
        )


def _check_sizes(files: list[_File], scale: int, least: int, what: str) -> None:
    for file in files:
        if min(_target_size(file, scale)) < least:
            raise ValueError(
                f"{file.argument}: expected photographs no smaller than {what}, {least}x{least}; "
                f"got {str(file.path)!r} of {_pixels(file.size)}"
            )


def _check_names(argument: str, what: str, files: list[tuple[str, Path]]) -> None:
    """Raises if two files have one name, whatever their marks and suffixes."""
    seen: dict[str, Path] = {}
    for name, path in files:
        if name in seen:
            raise ValueError(
                f"{argument}: expected one {what} of the name {name!r}, got {str(seen[name])!r} "
                f"and {str(path)!r}"
            )
        seen[name] = path


def _check_pair(file: _File, channels: int, scale: int) -> None:
    if file.low is None:
        return
    low = _file(file.argument, file.name, file.low)
    target = _target_size(file, scale)
    expected = (target[0] // scale, target[1] // scale)
    if low.size != expected:
        raise ValueError(
            f"{file.argument}: expected {str(file.low)!r} of {_pixels(expected)}, for a scale of "
            f"{scale} to {str(file.path)!r} of {_pixels(file.size)}; got {_pixels(low.size)}"
        )
    if channels == 3 and low.gray != file.gray:
        raise ValueError(
            f"{file.argument}: expected {str(file.low)!r} {_kind(file.gray)}, as "
            f"{str(file.path)!r} is; got it {_kind(low.gray)}"
        )


def _kind(gray: bool) -> str:
    return "in gray" if gray else "in color"


def _target_size(file: _File, scale: int) -> tuple[int, int]:
    """Height and width, cropped to multiples of the scale."""
    height, width = file.size
    return height - height % scale, width - width % scale


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"


# Reading them


def _read(files: dict[str, list[_File]], channels: int, scale: int, split: str) -> list[Photograph]:
    """Reads a split in threads: Pillow and NumPy let go of the interpreter."""
    read = functools.partial(_photograph, channels=channels, scale=scale)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, files[split]))


def _photograph(file: _File, channels: int, scale: int) -> Photograph:
    """Decodes a photograph and its low-resolution image, or makes that."""
    mode = "L" if channels == 1 else "RGB"
    height, width = _target_size(file, scale)
    target = decode(file.path, mode, argument=file.argument)[:height, :width]
    if scale == 1:
        degraded = None
    elif file.low is None:
        degraded = bicubic(target, Fraction(1, scale))
    else:
        degraded = decode(file.low, mode, argument=file.argument)
    return Photograph(file.name, target, degraded)


def _stream(
    files: dict[str, list[_File]],
    channels: int,
    scale: int,
    patch: int,
    workers: int,
    cache: Path,
) -> Stream:
    """Patches of training photographs, which are decoded beforehand."""
    train = files["train"]
    sizes = [_target_size(file, scale) for file in train]
    identity = "\n".join(map(_identity, train)) + f"\n{channels} {scale}"

    def decoded(image: int) -> Pixels:
        photo = _photograph(train[image], channels, scale)
        return photo.target, photo.degraded

    path = store(cache, identity, sizes, channels, scale, decoded)
    read = ReadPatches(str(path), sizes, channels, scale, patch)
    return Stream(len(train), read, _checksum(files, channels, scale, "train"), workers)


def _checksum(files: dict[str, list[_File]], channels: int, scale: int, split: str) -> int:
    lines = [f"{channels} {scale}"]
    for file in files[split]:
        paths = [file.path] if file.low is None else [file.path, file.low]
        lines.append(f"{file.name} {file.size} {[path.stat().st_size for path in paths]}")
    return zlib.crc32("\n".join(lines).encode())


def _identity(file: _File) -> str:
    """What changes when another photograph takes the place of one."""
    paths = [file.path] if file.low is None else [file.path, file.low]
    return " ".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)
