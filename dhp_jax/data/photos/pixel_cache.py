"""A file of decoded photographs on disk, and patches cut from it.

Decoding a photograph takes a hundred times as long as cutting a patch from it. So all of them are
decoded once, into a file that the reading processes map into memory; later runs find it there.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
import functools
import hashlib
import logging
import os
from pathlib import Path
import shutil

from filelock import FileLock
from jaxtyping import Int, UInt8
import numpy as np

from dhp_jax.data.stream import Batch
from dhp_jax.files import unfinished

logger = logging.getLogger(__name__)

# Of a photograph, with its low-resolution image where there is one.
Pixels = tuple[UInt8[np.ndarray, "h w c"], UInt8[np.ndarray, "h2 w2 c"] | None]


@dataclass
class ReadPatches:
    """Reads patches at random places: of the low-resolution images, or none, and of the targets.

    The file of pixels has of each photograph the target, then its low-resolution image. `sizes` are
    height and width of each target, and `patch` is the side of a patch of it.
    """

    path: str
    sizes: Sequence[tuple[int, int]]
    channels: int
    scale: int
    patch: int

    def __call__(
        self,
        chosen: Int[np.ndarray, " n"],
        rows: Int[np.ndarray, " rows"],
        random: np.random.Generator,
    ) -> Batch:
        # Not `chosen`: an epoch is a number of patches, whatever the number of photographs.
        images = random.integers(len(self.sizes), size=len(chosen))[rows]
        places = random.random((len(chosen), 2))[rows]
        targets, degraded = zip(*map(self._patch, images, places), strict=True)
        return (None if self.scale == 1 else np.stack(degraded)), np.stack(targets)

    def _patch(self, image: int, place: Int[np.ndarray, " 2"]) -> Pixels:
        """The patch of an image at a place, as shares of the room that there is for it."""
        target, degraded = self._photograph(image)
        side = self.patch // self.scale
        cells = np.array(target.shape[:2]) // self.scale
        row, column = (place * (cells - side + 1)).astype(int)
        if degraded is not None:
            degraded = degraded[row : row + side, column : column + side]
        row, column = row * self.scale, column * self.scale
        return target[row : row + self.patch, column : column + self.patch], degraded

    def _photograph(self, image: int) -> Pixels:
        (height, width), start = self.sizes[image], self._starts[image]
        end = start + height * width * self.channels
        target = self._pixels[start:end].reshape(height, width, self.channels)
        if self.scale == 1:
            return target, None
        height, width = height // self.scale, width // self.scale
        degraded = self._pixels[end : end + height * width * self.channels]
        return target, degraded.reshape(height, width, self.channels)

    @functools.cached_property
    def _pixels(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, mode="r")

    @functools.cached_property
    def _starts(self) -> Int[np.ndarray, " images"]:
        lengths = [pixel_bytes([size], self.channels, self.scale) for size in self.sizes]
        return np.cumsum([0, *lengths])

    def __getstate__(self) -> dict:  # for another process, which maps the file itself
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def pixel_bytes(sizes: Sequence[tuple[int, int]], channels: int, scale: int) -> int:
    """What photographs of some sizes take, with their low-resolution images."""
    targets = sum(height * width for height, width in sizes)
    return channels * (targets + (targets // scale**2 if scale > 1 else 0))


def store(
    folder: Path,
    identity: str,
    sizes: Sequence[tuple[int, int]],
    channels: int,
    scale: int,
    decode: Callable[[int], Pixels],
) -> Path:
    """Decodes photographs into a file in a folder, unless an earlier run has; returns its path.

    Args:
      folder: made if it is not there.
      identity: tells these photographs from others.
      sizes, channels, scale: see `ReadPatches`.
      decode: the pixels of a photograph.

    Raises:
      OSError: the file cannot be written, or would not fit on the disk.
    """
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.pixels"
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [pixel_bytes([size], channels, scale) for size in sizes]
    with FileLock(path.with_suffix(".lock")):
        if path.exists() and path.stat().st_size != sum(lengths):
            logger.warning("%s has been cut short; it is made again", path)
            path.unlink()
        if not path.exists():
            unfinished(path).unlink(missing_ok=True)  # of a process that was killed
            _check_room(folder, sum(lengths))
            _fill(path, np.cumsum([0, *lengths[:-1]]), decode)
    return path


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"data.cache: {folder} needs {needed:,} bytes for decoded photographs; "
            f"{free:,} are free there"
        )


def _fill(path: Path, starts: Int[np.ndarray, " images"], decode: Callable[[int], Pixels]) -> None:
    part = unfinished(path)
    file = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)

    def write(image: int) -> None:
        content = b"".join(array.tobytes() for array in decode(image) if array is not None)
        at, view = int(starts[image]), memoryview(content)
        while view:
            written = os.pwrite(file, view, at)
            at, view = at + written, view[written:]

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(write, range(len(starts))):
                pass
        os.fsync(file)
        part.replace(path)
    finally:
        os.close(file)
        part.unlink(missing_ok=True)
