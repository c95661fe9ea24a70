"""Image files: decoded by Pillow into one array of pixels that fits into memory, or left out."""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import logging
import math
import os
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dhp_jax.errors import DataNotFoundError

logger = logging.getLogger(__name__)

# What Pillow calls images of 8 bits or less a channel.
GRAY = ("1", "L", "LA")
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # also upper-case
ORIENTATION = 0x0112  # a tag of EXIF
TURNED = 5  # from this orientation on, width and height change places
ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}  # of files that are not truncated
CHUNK = 100  # images that one thread decodes in a row


def decode(
    file: str | os.PathLike | IO[bytes],
    mode: str,
    *,
    argument: str = "data.dir",
    name: object = None,
    upright: bool = False,
    resize: int | None = None,
    crop: int | None = None,
) -> np.ndarray:
    """The pixels of an image file.

    Args:
      file: its path, or the opened file.
      mode: "L" for gray or "RGB".
      argument: what an error says is to be changed.
      name: what an error calls the file; its path if `None`.
      upright: whether to turn it as its EXIF orientation says, as a phone's photograph.
      resize: the shorter side after a resize (bicubic, antialiased) that keeps the proportions;
        `None` keeps the size.
      crop: side of the square that is cut out of the centre; `None` keeps everything.

    Returns:
      uint8 `(h, w, c)`.

    Raises:
      DataNotFoundError: the file cannot be decoded.
    """
    with open_image(file, argument=argument, name=name) as encoded:
        turned = upright and _orientation(encoded) > 1
        image = (ImageOps.exif_transpose(encoded) if turned else encoded).convert(mode)
    if resize is not None and min(image.size) != resize:
        scale = resize / min(image.size)
        size = tuple(round(scale * side) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
    if crop is not None:
        left, top = ((side - crop) // 2 for side in image.size)
        image = image.crop((left, top, left + crop, top + crop))
    return np.asarray(image).reshape(image.height, image.width, -1)


def read_header(
    file: str | os.PathLike, argument: str = "data.dir"
) -> tuple[bool, tuple[int, int]]:
    """Whether an image is gray, and its height and width once it is turned upright.

    Raises:
      DataNotFoundError: no whole image is there, or one of more than 8 bits a channel.
    """
    with open_image(file, argument=argument) as image:
        mode = image.mode
        _check_whole(image)  # and then what may decode the image, which closes the file
        turned = _orientation(image) >= TURNED
    if mode not in GRAY + COLOUR:
        raise DataNotFoundError(
            argument,
            detail=f"expected images of 8 bits a channel; got {str(file)!r} in Pillow's mode "
            f"{mode!r}",
        )
    return mode in GRAY, image.size if turned else image.size[::-1]


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 if none is told.

    Pillow looks for EXIF behind the pixels of a PNG too, and decodes them for that; here it counts
    only where it stands before them.
    """
    if image.format == "PNG" and not any("exif" in str(name).lower() for name in image.info):
        return 1
    return image.getexif().get(ORIENTATION, 1)


@contextlib.contextmanager
def open_image(
    file: str | os.PathLike | IO[bytes], *, argument: str = "data.dir", name: object = None
) -> Iterator[Image.Image]:
    """Opens an image and reads its header; one line of error if the file is broken."""
    name = name or file
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError as error:
        raise DataNotFoundError(
            argument, detail=f"cannot read {str(name)!r}: it is no image"
        ) from error
    except Exception as error:  # a broken file makes Pillow raise errors of many kinds
        raise DataNotFoundError(argument, detail=f"cannot read {str(name)!r}: {error}") from error


def _check_whole(image: Image.Image) -> None:
    """Raises the error of decoding if an image is truncated, without decoding a complete one."""
    end = ENDS.get(image.format)
    if end is not None:
        image.fp.seek(-len(end), os.SEEK_END)
        if image.fp.read() == end:
            return
    image.load()


def empty_images(shape: tuple[int, int, int, int], name: str) -> np.ndarray:
    """Allocates uint8 `(n, h, w, c)` for the images of a split, if there is memory for it."""
    needed, available = math.prod(shape), memory_available()
    if needed > available:
        raise DataNotFoundError(
            "data.image_size",
            detail=f"{name} of {'x'.join(map(str, shape[1:]))} need {needed:,} bytes, expected "
            f"at most the {available:,} bytes of memory that are available",
        )
    return np.empty(shape, np.uint8)


def memory_available() -> int:
    """Bytes of memory that are available; all bytes where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        for line in lines:  # free pages alone would leave out what caches give back
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def for_each_chunk(work: Callable[[range], None], count: int, threads: int | None = None) -> None:
    """Calls `work` with consecutive ranges that together cover `range(count)`, in threads.

    As many calls as `threads` run at a time, one a core if `None`. Pillow decodes and resizes
    outside of Python's lock, so large images gain; small ones, such as CIFAR's, lose.
    """
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for _ in pool.map(work, chunks):
            pass


def tell_left_out(
    argument: str, folders: Collection[Path], read: Collection[Path], place: str
) -> None:
    """Warns if there are files that are not read: other endings, and folders too deep.

    Args:
      argument: what led to the folders, such as "data.dir".
      folders: where files are looked for, at any depth; hidden ones are not meant.
      read: the files that are read.
      place: where images are expected, in words.
    """
    known = set(read)
    left = [path for folder in folders for path in _visible_files(folder) if path not in known]
    if left:
        logger.warning(
            "%s: %d file%s left out, such as %s; images lie %s and end in %s",
            argument,
            len(left),
            "" if len(left) == 1 else "s",
            left[0],
            place,
            ", ".join(SUFFIXES),
        )


def _visible_files(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where, name) for name in sorted(files) if not name.startswith("."))
