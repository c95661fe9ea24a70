"""The bytes of a training state's arrays in one array, with a checksum of each.

Orbax takes about a millisecond an array, and a network has thousands of them.
"""

from collections.abc import Mapping
from typing import Any
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from dhp_jax.core.state import numbers_of


class UnlikeError(ValueError):
    """A state that is undamaged, but has other arrays than those that are expected."""


def pack(state: PyTree) -> tuple[np.ndarray, dict[str, list]]:
    """Puts the bytes of all arrays of a tree into one array.

    Returns:
      The bytes, and the layout: of each array in turn its dtype, shape and checksum, by its path.

    Raises:
      FloatingPointError: an array has numbers that are not finite.
    """
    arrays = jax.device_get({name: numbers_of(leaf) for name, leaf in _by_path(state).items()})
    packed = np.empty(1 + sum(array.nbytes for array in arrays.values()), np.uint8)
    packed[-1], at, layout = 0, 0, {}  # the last because Orbax takes no empty array
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all():
            raise FloatingPointError(f"array {name!r}")
        piece = packed[at : at + array.nbytes]
        piece[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        layout[name] = [str(array.dtype), array.shape, zlib.crc32(piece)]
        at += array.nbytes
    return packed, layout


def unpack(packed: np.ndarray, layout: Mapping[str, list], like: PyTree) -> PyTree:
    """Takes the arrays that were packed apart again: a tree of NumPy arrays, and of random keys.

    `like` is a tree of the structure, shapes and dtypes that are expected.

    Raises:
      UnlikeError: the arrays are others than those of `like`.
      ValueError: an array does not have its checksum.
    """
    expected = _by_path(like)
    if other := expected.keys() ^ layout.keys():
        raise UnlikeError(f"array {min(other)!r} is missing or unexpected")
    leaves, at = {}, 0
    for name, (dtype, shape, checksum) in layout.items():
        wanted = jax.eval_shape(numbers_of, expected[name])
        if (dtype, tuple(shape)) != (str(wanted.dtype), wanted.shape):
            raise UnlikeError(
                f"array {name!r}: expected {wanted.dtype} of shape {wanted.shape}, "
                f"got {dtype} of shape {tuple(shape)}"
            )
        piece = packed[at : at + wanted.size * wanted.dtype.itemsize]
        if zlib.crc32(piece) != checksum:
            raise ValueError(f"array {name!r} has another checksum")
        array = piece.copy().view(wanted.dtype).reshape(wanted.shape)
        is_key = expected[name].dtype != wanted.dtype
        leaves[name] = jax.random.wrap_key_data(array) if is_key else array
        at += piece.size
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in expected])


def _by_path(tree: PyTree) -> dict[str, Any]:
    """The arrays of a tree by their paths in it."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
