"""Weights that a network starts from: those of a saved network, or of a file of safetensors."""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from flax import nnx
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dhp_jax.artifact.arrays import ARRAYS, digest_of, is_finite
from dhp_jax.artifact.description import DTYPES, ArtifactError
from dhp_jax.artifact.reading import MODEL, exists, verify
from dhp_jax.core.state import path_name, value_of
from dhp_jax.errors import ArgumentError, shown, some_of


class Weights(NamedTuple):
    """Arrays by their paths in a network, such as "stem.kernel", and the digest of their file.

    A folder tells the family of the network that they are of, and its arguments.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]
    sha256: str
    family: str | None = None
    arguments: Mapping[str, Any] = {}


def read_weights(path: str | os.PathLike) -> Weights:
    """Reads weights from a folder that `save` wrote, a run's folder, or a file of safetensors."""
    path, described = Path(path).expanduser(), {}
    if path.is_dir():
        path = path if exists(path) or not exists(path / MODEL) else path / MODEL
        described = verify(path)
        path = path / ARRAYS
    digest = digest_of(path)
    try:
        with safe_open(path, "np") as file:
            names = list(file.keys())
            for name in names:
                if (code := file.get_slice(name).get_dtype()) not in DTYPES:
                    expected = f"one of {', '.join(DTYPES)}"
                    detail = f"array {shown(name)}: expected {expected}, got {shown(code)}"
                    raise ArtifactError(f"path: {path}: {detail}")
            arrays = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"path: {path} cannot be read: {shown(str(error))}") from error
    return Weights(path, arrays, digest, described.get("family"), described.get("arguments", {}))


def take_weights(model: nnx.Module, weights: Weights) -> None:
    """Gives an ordinary network other arrays, in place; floats become of its dtypes.

    Random state stays as it is. Arrays that are missing, left over, of another shape or kind, or
    not finite are refused, by an error of `weights`.
    """
    places = {path_name(path): (path, x) for path, x in nnx.to_flat_state(nnx.state(model))}
    others, found = [name for name in weights.arrays if name not in places], []
    for name, (path, leaf) in places.items():
        if isinstance(leaf, nnx.RngState):
            continue
        like = value_of(leaf)
        if name not in weights.arrays:
            surplus = some_of([shown(other) for other in others])
            few = f"; it has {surplus}, that the network lacks" if others else ""
            _refuse(name, weights, f"{like.dtype} of shape {like.shape}", f"none{few}")
        array = weights.arrays[name]
        both_floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (array, like))
        if array.shape != like.shape or not (both_floats or array.dtype == like.dtype):
            expected = f"{like.dtype} of shape {like.shape}"
            _refuse(name, weights, expected, f"{array.dtype} of shape {array.shape}")
        array = jnp.asarray(array, like.dtype)
        if not is_finite(array):
            _refuse(name, weights, f"finite numbers of {like.dtype}", "NaN or infinity")
        found.append((path, leaf.replace(array)))
    if others:
        _refuse(others[0], weights, "no such array, for the network has none", "one")
    nnx.update(model, nnx.from_flat_state(found))


def _refuse(name: str, weights: Weights, expected: str, got: str) -> NoReturn:
    where = f"array {shown(name)} in {weights.path}"
    raise ArgumentError("weights", expected, got, f"{where}: expected {expected}; got {got}")
