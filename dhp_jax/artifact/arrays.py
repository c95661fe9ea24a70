"""The arrays of a saved network: their names, shapes and bits."""

from collections.abc import Iterator, Mapping
import contextlib
import hashlib
from pathlib import Path
from typing import Any, BinaryIO

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dhp_jax.artifact.description import DTYPES, ArtifactError, check_like, check_names, parse_json
from dhp_jax.core.state import is_key, numbers_of, path_name, value_of, with_value
from dhp_jax.errors import shown

DESCRIPTION = "model.json"
ARRAYS = "arrays.safetensors"


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading; an `ArtifactError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ArtifactError(f"path: {path} cannot be read: {error.strerror}") from error


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, as `model.json` holds it."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def open_arrays(path: Path, arrays: Mapping[str, Any]) -> Iterator[Any]:
    """Opens the file of arrays of given shapes and dtypes, and no others; checks its header."""
    try:
        with safe_open(path, "np") as file:
            _check_header_names(path, arrays)
            for name in arrays:
                array = file.get_slice(name)
                dtype = DTYPES.get(array.get_dtype(), array.get_dtype())
                found = {"shape": array.get_shape(), "dtype": dtype}
                check_like(name, arrays[name], found, str(path))
            yield file
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"path: {path} cannot be read: {shown(str(error))}") from error


def _check_header_names(path: Path, arrays: Mapping[str, Any]) -> None:
    """Raises for duplicate names and metadata, which safetensors accepts."""
    with open_file(path) as file:
        size = int.from_bytes(file.read(8), "little")  # which safetensors has checked
        header = parse_json(file.read(size), f"{path}: its header")
    check_names(header, arrays, str(path))


def read_arrays(abstract: nnx.State, arrays: Mapping[str, Any], path: Path) -> nnx.State:
    """Reads the arrays that a network needs from the file in a folder; all of them must be finite.

    Floats have the precision that they were saved in, which need not be that of the class.
    `arrays` is the table in model.json, already checked.
    """
    path = path / ARRAYS
    leaves = {path_name(place): (place, leaf) for place, leaf in nnx.to_flat_state(abstract)}
    if leaves.keys() > arrays.keys():
        raise ArtifactError(
            f"path: {path} lacks array {shown(min(leaves.keys() - arrays.keys()))}; the "
            "class of the network has gained arrays that the file does not have"
        )
    check_names(arrays, leaves, str(path))
    for name, (_, leaf) in leaves.items():
        like = value_of(leaf)
        stored = jax.eval_shape(numbers_of, like) if is_key(like) else like
        expected, dtype = shape_and_dtype(stored), arrays[name]["dtype"]
        if all(jnp.issubdtype(kind, jnp.floating) for kind in (stored.dtype, jnp.dtype(dtype))):
            expected["dtype"] = dtype
        check_like(name, expected, arrays[name], str(path))
    found = []
    with open_arrays(path, arrays) as file:
        for name, (place, leaf) in leaves.items():
            array = file.get_tensor(name)
            if not is_finite(array):
                raise ArtifactError(
                    f"path: array {name!r} in {path}: expected finite numbers, got NaN or infinity"
                )
            value = _from_stored(array, value_of(leaf))
            if not is_key(value) and value.dtype != array.dtype:
                detail = f"array {name!r} is of {array.dtype}; expected jax_enable_x64, for it"
                raise ArtifactError(f"path: {path}: {detail} is made {value.dtype} here")
            found.append((place, with_value(leaf, value)))
    return nnx.from_flat_state(found)


def shape_and_dtype(array: np.ndarray | jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Shape and dtype of an array, as `model.json` holds them."""
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def _from_stored(stored: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    array = jnp.asarray(stored)
    return jax.random.wrap_key_data(array) if is_key(like) else array


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers of an array are finite."""
    return not jnp.issubdtype(array.dtype, jnp.inexact) or bool(np.isfinite(array).all())
