"""The arrays of a saved network: names, shapes, bits."""

from collections.abc import Iterator, Mapping
import contextlib
import os
from pathlib import Path
from typing import Any, BinaryIO

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax.artifact.description import (
    DTYPES,
    LONGEST_DESCRIPTION,
    ArtifactError,
    check_header,
    check_like,
    check_names,
    parsed,
)
from dhp_jax.errors import shown

DESCRIPTION = "model.json"


ARRAYS = "arrays.safetensors"


def _entry(array: np.ndarray | jax.ShapeDtypeStruct) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


# Reading


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ArtifactError(f"path: {path} cannot be read: {error.strerror}") from error


def _read_header(file: BinaryIO, arrays: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The header of arrays.safetensors, if it tells of just these arrays; they come next."""
    length = os.fstat(file.fileno()).st_size - 8
    size = int.from_bytes(file.read(8), "little")
    if size > min(length, LONGEST_DESCRIPTION):
        raise ArtifactError(
            f"path: {where} cannot be read: expected a header of at most "
            f"{max(0, min(length, LONGEST_DESCRIPTION))} bytes, got {size}"
        )
    header = parsed(file.read(size), f"{where}: its header")
    check_header(header, arrays, length - size, str(where))
    return header


def _filled(abstract: nnx.State, arrays: Mapping[str, Any], path: Path) -> nnx.State:
    """A state with arrays in place of abstract ones; none may be missing, left over or unlike."""
    leaves = {_name(location): (location, leaf) for location, leaf in nnx.to_flat_state(abstract)}
    if leaves.keys() > arrays.keys():
        raise ArtifactError(
            f"path: {path / ARRAYS} lacks array {shown(min(leaves.keys() - arrays.keys()))}; the "
            "class of the network has gained arrays that the file does not have"
        )
    check_names(arrays, leaves, str(path / ARRAYS))
    for name, (_, leaf) in leaves.items():
        check_like(name, _entry(_as_stored(_value(leaf))), arrays[name], str(path / ARRAYS))
    with _opened(path / ARRAYS) as file:
        stored = _read(file, arrays, path / ARRAYS)
    filled = []
    for name, (location, leaf) in leaves.items():
        value = _restored(stored[name], _value(leaf))
        filled.append((location, leaf.replace(value) if isinstance(leaf, nnx.Variable) else value))
    return nnx.from_flat_state(filled)


def _read(file: BinaryIO, arrays: Mapping[str, Any], where: Path) -> dict[str, np.ndarray]:
    """The arrays, which are those of the table and finite."""
    header = _read_header(file, arrays, where)
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        dtype = jnp.dtype(DTYPES[entry["dtype"]])
        found[name] = np.frombuffer(file.read(end - begin), dtype).reshape(entry["shape"])
        if not _is_finite(found[name]):
            raise ArtifactError(
                f"path: array {name!r} in {where}: expected finite numbers, got NaN or infinity"
            )
    return found


# Arrays


def _name(location: tuple) -> str:
    return ".".join(map(str, location))


def _value(leaf: nnx.Variable | jax.Array) -> jax.Array:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _is_key(array: jax.Array | jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _stored(array: jax.Array) -> jax.Array:
    """What is on disk of an array: of random keys their numbers, all else as it is."""
    return jax.random.key_data(array) if _is_key(array) else array


def _as_stored(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(_stored, like) if _is_key(like) else like


def _restored(stored: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    array = jnp.asarray(stored)
    return jax.random.wrap_key_data(array) if _is_key(like) else array


def _is_finite(array: np.ndarray) -> bool:
    return not jnp.issubdtype(array.dtype, jnp.inexact) or bool(np.isfinite(array).all())
