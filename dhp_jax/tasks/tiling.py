"""Runs networks over whole images of any size: in tiles without seams, with few compilations."""

from collections.abc import Callable, Iterable, Iterator
import logging
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float
import numpy as np

from dhp_jax.errors import FieldError

logger = logging.getLogger(__name__)
MAX_SHAPES = 16  # of images that are run whole; for more, images are cut into tiles
OVERLAP = 48  # pixels of a tile's border that are not used; more than DnCNN and SRResNet reach
Forward = Callable[[Float[Array, "1 h w c"]], Float[Array, "1 h2 w2 c"]]


class Tiling(NamedTuple):
    """How images are cut into tiles for a network.

    Attributes:
      overlap: pixels of a tile's border that are not used, a multiple of `multiple`.
      multiple: tiles begin at multiples of it.
    """

    overlap: int
    multiple: int

    def check(self, argument: str, side: int | None) -> None:
        """Raises a `ValueError` that names the argument if tiles of a side are too small."""
        if side is not None and side <= 2 * self.overlap:
            raise FieldError(argument, f"more than {2 * self.overlap}, twice the overlap", side)


def tiling(model: nnx.Module, overlap: int | None = None) -> Tiling:
    """How images are cut into tiles for a network.

    The overlap, in pixels, is as given, or else the network's attribute `reach`, how many pixels
    away an output depends on the input; 48 if it has none. It is rounded up to the attribute
    `multiple`, 1 if there is none.

    Example:
      >>> tiling(dhp.models.build_abstract("dncnn", depth=17))
      Tiling(overlap=17, multiple=1)
    """
    multiple = _pixels(model, "multiple", 1) or 1
    overlap = _pixels(model, "reach", OVERLAP) if overlap is None else overlap
    return Tiling(_round_up(overlap, multiple), multiple)


def _pixels(model: nnx.Module, attribute: str, default: int) -> int:
    """A number of pixels that a network tells; the default where it means something else."""
    value = getattr(model, attribute, default)
    return value if type(value) is int and value >= 0 else default


def restore(
    forward: Forward,
    image: Float[np.ndarray, "h w c"],
    *,
    tile: tuple[int, int] | None = None,
    overlap: int = OVERLAP,
    multiple: int = 1,
) -> Float[np.ndarray, "h2 w2 c"]:
    """Runs a network over an image, whole or tile by tile.

    Every pixel is taken from a tile in which it is at least `overlap` pixels from any side that is
    not a side of the image. If the network's reach is not larger, the result is that of the whole
    image. The output may be larger than the image by a whole factor.

    Args:
      forward: the network, for a batch of one.
      image: the image.
      tile: height and width of a tile, more than twice the overlap; smaller images are run whole.
        `None` runs all whole.
      overlap: in pixels of the input.
      multiple: tiles begin at multiples of it. The image is extended to a multiple by its last row
        and column, as networks that halve the resolution need it.
    """
    if _fits(image.shape[:2], tile):
        return np.asarray(forward(image[None])[0])
    height, width, _ = image.shape
    tile = tuple(_round_up(side, multiple) for side in tile)
    overlap = _round_up(overlap, multiple)
    if min(tile) <= 2 * overlap:
        raise FieldError("tile", detail=f"expected sides of more than {2 * overlap}, got {tile}")
    padding = (-height % multiple, -width % multiple)
    extended = np.pad(image, (*((0, beyond) for beyond in padding), (0, 0)), mode="edge")
    result = None
    for top, rows in _pieces(extended.shape[0], tile[0], overlap, multiple):
        for left, columns in _pieces(extended.shape[1], tile[1], overlap, multiple):
            piece = extended[top : top + tile[0], left : left + tile[1]]
            output = np.asarray(forward(piece[None])[0])
            scale = output.shape[0] // piece.shape[0]
            if result is None:
                shape = (scale * extended.shape[0], scale * extended.shape[1], output.shape[-1])
                result = np.empty(shape, output.dtype)
            inside = output[
                scale * (rows.start - top) : scale * (rows.stop - top),
                scale * (columns.start - left) : scale * (columns.stop - left),
            ]
            result[
                scale * rows.start : scale * rows.stop,
                scale * columns.start : scale * columns.stop,
            ] = inside
    return result[: scale * height, : scale * width]


def _fits(shape: tuple[int, int], tile: tuple[int, int] | None) -> bool:
    return tile is None or (shape[0] <= tile[0] and shape[1] <= tile[1])


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pieces(size: int, tile: int, overlap: int, multiple: int) -> Iterator[tuple[int, range]]:
    """Where tiles begin along a side, and the pixels that are taken from each."""
    if size <= tile:
        yield 0, range(size)
        return
    last = size - tile  # a multiple, as both are
    taken = 0
    for start in [*range(0, last, tile - 2 * overlap), last]:
        end = size if start == last else start + tile - overlap
        yield start, range(taken, end)
        taken = end


def tile_for(
    shapes: Iterable[tuple[int, int]],
    overlap: int = OVERLAP,
    multiple: int = 1,
    side: int | None = None,
) -> tuple[int, int] | None:
    """Chooses height and width of the tile that images are cut into, so that few are compiled.

    Up to 16 shapes are run whole (`None`). For more, the tile has the smallest height and the
    smallest width above `3 * overlap`. Images that are no larger than the tile in a direction are
    neither cut nor padded in it, as padding would change their border. Each of their sizes is
    compiled. A warning is given if that leaves more than 16 shapes. If cutting would leave as many,
    all are run whole. `side` is of a square tile, whatever the shapes are.

    Example:
      >>> tile_for([(200 + i, 300) for i in range(17)])
      (200, 300)
    """
    shapes = set(shapes)
    tile = _smallest(shapes, overlap) if side is None else (side, side)
    run = {_run(shape, tile, multiple) for shape in shapes}
    if side is None and len(run) == len(shapes):
        tile = None
    if len(run) > MAX_SHAPES:
        logger.warning(
            "the test images are run in %d shapes, each of which is compiled for; "
            "sides of up to %d pixels are not cut",
            len(run),
            3 * overlap if side is None else side,
        )
    return tile


def _smallest(shapes: set[tuple[int, int]], overlap: int) -> tuple[int, int] | None:
    """The smallest sides above `3 * overlap`, or that which no image has; `None` for few shapes."""
    if len(shapes) <= MAX_SHAPES:
        return None
    least = 3 * overlap + 1
    height, width = (
        min((side for side in sides if side >= least), default=least)
        for sides in zip(*shapes, strict=True)
    )
    return height, width


def _run(shape: tuple[int, int], tile: tuple[int, int] | None, multiple: int) -> tuple[int, int]:
    """Height and width of what is run of an image: all of it, or its tiles."""
    if _fits(shape, tile):
        return shape
    height, width = (
        _round_up(min(size, side), multiple) for size, side in zip(shape, tile, strict=True)
    )
    return height, width
