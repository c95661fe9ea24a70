"""Saves networks: a JSON description and arrays in safetensors, whole or not at all."""

from collections.abc import Mapping
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
import shutil
from typing import Any

from flax import nnx
import numpy as np
from safetensors.numpy import save as serialized

import dhp_jax
from dhp_jax.artifact.arrays import (
    ARRAYS,
    DESCRIPTION,
    is_finite,
    shape_and_dtype,
)
from dhp_jax.artifact.description import DTYPES, FORMAT, VERSION, check_notes, parse_json
from dhp_jax.artifact.reading import parse_description
from dhp_jax.artifact.settings import settings_of
from dhp_jax.artifact.traced import cuts_as_json, table_as_json
from dhp_jax.core.latent import has_gates, latents
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.state import numbers_of, path_name, value_of
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.files import put, unfinished, write
from dhp_jax.models import registry
from dhp_jax.tracing.counts import measure_cost


def save(
    path: str | os.PathLike[str],
    model: nnx.Module,
    *,
    input_shape: tuple[int, ...] | None = None,
    **notes: Any,
) -> None:
    """Saves a network, pruned or not, to a folder that `load` reads.

    `model.json` tells the family and its arguments, the survivors of each latent, the versions that
    wrote it, and, with `input_shape`, the FLOPs and params.

    The folder appears whole or not at all, and is on the disk when this returns; a network that is
    there already is replaced.

    Args:
      path: the folder.
      model: a network from `dhp.models.build` or of your own class.
      input_shape: of one example, `(height, width, channels)`; kept among the notes too.
      **notes: JSON values to keep with it, such as metrics. `dhp_jax.predict` reads `task`
        ("classification", "super_resolution" or "denoising"), and for classification `mean`, `std`
        and `peak` (the largest value) of the pixels, and `class_names`.

    Raises:
      OSError: the folder cannot be written, or holds something else than a network.
      TypeError: a note that JSON cannot hold.
      ValueError: `model` is no module, an array holds NaN or infinity, or `load` would refuse what
        the network says of itself (see `dhp_jax.artifact.description`). What was there before is
        left as it was.

    Example:
      >>> dhp.save("out/", small, input_shape=(32, 32, 3), test_error=8.46)
    """
    if not isinstance(path, str | os.PathLike):  # as where the model comes first
        raise ArgumentError("path", "a folder, as in save(path, model)", type(path).__name__)
    path = Path(os.path.realpath(os.path.expanduser(path)))
    if not may_hold(path):
        raise FileExistsError(
            f"path: expected no or an empty folder, or one with a network only, got {path}"
        )
    if has_gates(model):
        raise ValueError("model: a network of gates is not saved; prune(model) is")
    arrays = _arrays(model)
    for name, array in arrays.items():
        if not is_finite(array):
            raise ValueError(f"model: array {name!r}: expected finite numbers, got NaN or infinity")
    content = serialized(arrays)
    description = _description(model, arrays, content, notes)
    if input_shape is not None:
        cost = measure_cost(model, input_shape)
        description["cost"] = {"flops": cost.flops, "params": cost.params}
        if all(isinstance(size, int | np.integer) for size in input_shape):
            notes["input_shape"] = list(map(int, input_shape))
    for name, note in notes.items():
        try:
            notes[name] = parse_json(json.dumps(note).encode(), f"note {name!r}")
        except TypeError as error:
            expected = "a JSON value, such as a number, a text or a list of them"
            raise TypeError(f"{name}: expected {expected}; got {shown(note)}") from error
    check_notes(notes)
    text = json.dumps(description, indent=1)
    parse_description(text.encode(), path / DESCRIPTION)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = unfinished(path)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        write(part / ARRAYS, content)
        write(part / DESCRIPTION, text)
        put(part, path)
    except OSError:  # such as a full disk
        shutil.rmtree(part, ignore_errors=True)
        raise


def may_hold(path: str | os.PathLike) -> bool:
    """Whether `save` may write to a path: nothing is there, an empty folder, or a saved network."""
    path = Path(path)
    if not path.is_dir():
        return not path.exists()
    return {item.name for item in path.iterdir()} in (set(), {DESCRIPTION, ARRAYS})


def _arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """Every array of a network by its path, but for what its last call has left."""
    found: dict[str, np.ndarray] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Intermediate))):
        name, value = path_name(path), numbers_of(value_of(leaf))
        dtype = str(getattr(value, "dtype", type(value).__name__))
        if dtype not in DTYPES.values():
            expected = f"an array of {', '.join(DTYPES.values())}"
            detail = f"array {shown(name)}: expected {expected}, got {dtype}"
            raise ArgumentError("model", detail=detail)
        if name in found:
            detail = f"expected arrays of different names, got two that are {shown(name)}"
            raise ArgumentError("model", detail=detail)
        # safetensors writes memory as it lies, and device layouts need not be row-major.
        found[name] = np.asarray(value, order="C")
    return found


def _description(
    model: nnx.Module, arrays: Mapping[str, np.ndarray], content: bytes, notes: Mapping[str, Any]
) -> dict[str, Any]:
    architecture = architecture_of(model)
    traced = {}
    if architecture.cuts is not None:
        traced["cuts"] = cuts_as_json(architecture.cuts)
    if architecture.family not in registry.FAMILIES:
        traced["settings"] = settings_of(model)
    if architecture.axes is not None:
        least = {name: z.min_channels for name, z in latents(model).items()}
        traced["latents"] = table_as_json(architecture.axes, least)
    return {
        "format": FORMAT,
        "version": VERSION,
        "sha256": hashlib.sha256(content).hexdigest(),
        "family": architecture.family,
        "arguments": dict(architecture.arguments),
        "survivors": architecture.survivors and dict(architecture.survivors),
        "arrays": {name: shape_and_dtype(array) for name, array in arrays.items()},
        "renewed": architecture.renewed,
        "folded": [list(chain) for chain in architecture.folded],
        **traced,
        "provenance": _provenance(),
        "notes": notes,
    }


def _provenance() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
    return {"dhp_jax": dhp_jax.__version__, **packages}
