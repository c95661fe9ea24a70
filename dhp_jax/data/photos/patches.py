"""Photographs laid out for the device, where square patches are cut from them and mirrored."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, UInt8, UInt32
import numpy as np

from dhp_jax.data.photos.photographs import Photograph
from dhp_jax.errors import ArgumentError, FieldError

CELLS_PER_BLOCK = 1024  # so that no index needs more than 32 bits

# Patches of low-resolution images, where there are any, and of targets.
Pairs = tuple[UInt8[Array, "n p p c"] | None, UInt8[Array, "n scale*p scale*p c"]]


class Patches(NamedTuple):
    """Photographs laid out so that square patches of them are one gather on the device.

    A cell is a pixel of the low-resolution image together with the `scale` by `scale` pixels of the
    target that it stands for; the cells of all photographs lie one after another, row by row,
    cut into blocks of 1,024.
    """

    targets: UInt8[Array, "blocks 1024 scale*scale*c"]
    degraded: UInt8[Array, "blocks 1024 c"] | None  # low-resolution pixels, where there are any
    starts: UInt32[Array, " images"]  # first cell of each photograph
    heights: Int[Array, " images"]  # in cells
    widths: Int[Array, " images"]


def patches(photographs: Sequence[Photograph], scale: int = 1) -> Patches:
    """Lays photographs, whose sides are multiples of `scale`, out for training, as NumPy arrays.

    Raises:
      ValueError: no photographs, or 2^32 cells or more.
    """
    if not photographs:
        raise ArgumentError("photographs", "at least one", "none")
    heights = np.array([photo.target.shape[0] // scale for photo in photographs], np.int64)
    widths = np.array([photo.target.shape[1] // scale for photo in photographs], np.int64)
    ends = np.cumsum(heights * widths)
    if ends[-1] >= 2**32:
        raise FieldError(
            "photographs",
            detail="expected fewer than 2^32 pixels together (at the low resolution), got "
            f"{ends[-1]:,}; use fewer or smaller ones",
        )
    degraded = None
    if scale > 1:
        degraded = _blocks([_cells(photo.degraded, 1) for photo in photographs])
    return Patches(
        targets=_blocks([_cells(photo.target, scale) for photo in photographs]),
        degraded=degraded,
        starts=np.uint32(ends - heights * widths),
        heights=np.int32(heights),
        widths=np.int32(widths),
    )


def cut_patches(
    key: Key[Array, ""], data: Patches, images: Int[Array, " n"], *, patch: int, scale: int
) -> Pairs:
    """Cuts a patch at a random place out of each of some photographs; within a jitted function.

    `patch` is its side in the target, in pixels, and `scale` as for `patches`.
    """
    side, n = patch // scale, len(images)
    rows, columns = (
        jnp.floor(u * (size[images] - side + 1)).astype(jnp.int32)
        for u, size in zip(
            jax.random.uniform(key, (2, n)), (data.heights, data.widths), strict=True
        )
    )
    rows = rows[:, None] + jnp.arange(side)
    columns = columns[:, None] + jnp.arange(side)
    start, width = data.starts[images], data.widths[images]
    inside = (rows * width[:, None])[:, :, None] + columns[:, None, :]
    cells = start[:, None, None] + inside.astype(jnp.uint32)
    at = (cells // CELLS_PER_BLOCK).astype(jnp.int32), (cells % CELLS_PER_BLOCK).astype(jnp.int32)
    target = data.targets[at].reshape(n, side, side, scale, scale, -1)
    target = target.transpose(0, 1, 3, 2, 4, 5).reshape(n, patch, patch, -1)
    return None if data.degraded is None else data.degraded[at], target


def mirror_patches(
    images: UInt8[Array, "n p p c"], flags: Bool[Array, "3 n 1 1 1"]
) -> UInt8[Array, "n p p c"]:
    """Mirrors square images left to right, top to bottom, and along the diagonal.

    The three together give the eight ways to turn and mirror a square. `flags` tell for each of
    them which images are mirrored.
    """
    images = jnp.where(flags[0], images[:, :, ::-1], images)
    images = jnp.where(flags[1], images[:, ::-1], images)
    return jnp.where(flags[2], images.swapaxes(1, 2), images)


def _cells(image: UInt8[np.ndarray, "h w c"], scale: int) -> UInt8[np.ndarray, "cells s*s*c"]:
    h, w, c = image.shape
    blocks = image.reshape(h // scale, scale, w // scale, scale, c).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(-1, scale * scale * c)


def _blocks(cells: Sequence[UInt8[np.ndarray, "cells k"]]) -> UInt8[np.ndarray, "blocks 1024 k"]:
    count, size = sum(map(len, cells)), cells[0].shape[-1]
    blocks = np.zeros((-(-count // CELLS_PER_BLOCK), CELLS_PER_BLOCK, size), np.uint8)
    np.concatenate(cells, out=blocks.reshape(-1, size)[:count])
    return blocks
