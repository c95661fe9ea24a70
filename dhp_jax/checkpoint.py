"""Networks on disk: a JSON file that says what it is, and its arrays in safetensors. No pickle."""

from collections.abc import Callable, Mapping
import json
import os
from pathlib import Path
import shutil
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dhp_jax import models
from dhp_jax.architecture import architecture_of
from dhp_jax.latent import latents
from dhp_jax.prune import prune

FORMAT = "dhp_jax"
VERSION = 1
DESCRIPTION = "model.json"
ARRAYS = "arrays.safetensors"


class ArtifactError(ValueError):
    """A folder that does not hold a network that can be loaded."""


def save(path: str | os.PathLike, model: nnx.Module, **notes: Any) -> None:
    """Writes a network, pruned or not, to a folder.

    The folder appears whole or not at all; a network that is there already is replaced.

    Args:
      path: the folder.
      model: a network from `dhp.models.build` or of your own class.
      **notes: JSON values to keep with it, such as metrics.

    Raises:
      OSError: the folder cannot be written, or holds something else than a network.
      TypeError: a note that JSON cannot hold.

    Example:
      >>> dhp.save("out/", small, test_error=8.46)
    """
    path = Path(os.path.realpath(path))
    if path.is_file() or (
        path.exists() and not {item.name for item in path.iterdir()} <= {DESCRIPTION, ARRAYS}
    ):
        raise FileExistsError(
            f"path: expected no or an empty folder, or one with a network only, got {path}"
        )
    architecture = architecture_of(model)
    # safetensors writes memory as it lies, and device layouts need not be row-major.
    arrays = {
        ".".join(map(str, name)): np.asarray(_stored(_value(leaf)), order="C")
        for name, leaf in nnx.to_flat_state(nnx.state(model))
    }
    description = {
        "format": FORMAT,
        "version": VERSION,
        "family": architecture.family,
        "arguments": dict(architecture.arguments),
        "survivors": architecture.survivors and dict(architecture.survivors),
        "arrays": {
            name: {"shape": array.shape, "dtype": str(array.dtype)}
            for name, array in arrays.items()
        },
        "notes": notes,
    }
    text = json.dumps(description, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    (unfinished / DESCRIPTION).write_text(text)
    save_file(arrays, unfinished / ARRAYS)
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    unfinished.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def load(
    path: str | os.PathLike, *, build: Callable[[nnx.Rngs], nnx.Module] | None = None
) -> nnx.Module:
    """Reads a network that `save` has written.

    Args:
      path: the folder.
      build: for a network of your own class: makes the unpruned network, as `build(rngs)`.

    Returns:
      The network, in evaluation mode and ready to call; `.train()` makes it ready for fine-tuning.

    Raises:
      ArtifactError: a `ValueError`; the folder holds no network of this format, or its arrays are
        not those that the network needs (it tells which).

    Example:
      >>> small = dhp.load("out/")
      >>> logits = small(images)
    """
    path = Path(path)
    description = read_description(path)
    family, survivors = description["family"], description["survivors"]
    if build is None and family is None:
        raise ArtifactError(
            f"path: {path} holds a network of a class of its own; expected "
            "load(path, build=...) with a function build(rngs) that makes it unpruned"
        )

    if build is not None:
        whole = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    else:
        whole = models.build_abstract(family, **description["arguments"])
    masks = None if survivors is None else _masks(path, whole, survivors)

    def make(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(model if masks is None else prune(model, masks))

    graphdef, abstract = nnx.eval_shape(make, whole)
    model = nnx.merge(graphdef, _filled(path, abstract))
    model.eval()
    return model


def exists(path: str | os.PathLike) -> bool:
    """Whether a folder holds a network."""
    return all((Path(path) / name).is_file() for name in (DESCRIPTION, ARRAYS))


def read_description(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON side of an artifact: family, arguments, survivors, arrays and notes.

    Raises:
      ArtifactError: no artifact of this format and version is there.
    """
    path = Path(path)
    if not exists(path):
        raise ArtifactError(f"path: expected a folder with {DESCRIPTION} and {ARRAYS}, got {path}")
    try:
        description = json.loads((path / DESCRIPTION).read_text())
    except ValueError as error:
        raise ArtifactError(f"path: {path / DESCRIPTION} is not JSON: {error}") from error
    if not isinstance(description, dict):
        raise ArtifactError(f"path: {path / DESCRIPTION} holds no JSON object")
    found = (description.get("format"), description.get("version"))
    if found != (FORMAT, VERSION):
        raise ArtifactError(
            f"path: expected format {FORMAT!r} version {VERSION}, got {found[0]!r} version "
            f"{found[1]!r} in {path / DESCRIPTION}"
        )
    for key in ("family", "arguments", "survivors"):
        if key not in description:
            raise ArtifactError(f"path: {path / DESCRIPTION} lacks {key!r}")
    return description


def _value(leaf: nnx.Variable | jax.Array) -> jax.Array:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _stored(array: jax.Array) -> jax.Array:
    """What is on disk of an array: of random keys their numbers, all else as it is."""
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(array) if is_key else array


def _restored(stored: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    array = jnp.asarray(stored)
    return jax.random.wrap_key_data(array) if array.dtype != like.dtype else array


def _masks(
    path: Path, model: nnx.Module, survivors: Mapping[str, list[int]]
) -> dict[str, np.ndarray]:
    masks = {name: np.zeros(z.size, bool) for name, z in latents(model).items()}
    for name, indices in survivors.items():
        known = range(masks[name].size if name in masks else 0)
        if not indices or not all(isinstance(i, int) and i in known for i in indices):
            raise ArtifactError(
                f"path: {path} lists survivors of latent {name!r} that the network does not have"
            )
        masks[name][indices] = True
    return masks


def _filled(path: Path, abstract: nnx.State) -> nnx.State:
    """A state with arrays in place of abstract ones; none may be missing, left over or unlike."""
    try:
        arrays = load_file(path / ARRAYS)
    except SafetensorError as error:
        raise ArtifactError(f"path: {path / ARRAYS} cannot be read: {error}") from error
    leaves = {".".join(map(str, name)): (name, leaf) for name, leaf in nnx.to_flat_state(abstract)}
    for name in leaves.keys() ^ arrays.keys():
        what = "lacks" if name in leaves else "holds an unexpected"
        raise ArtifactError(f"path: {path / ARRAYS} {what} array {name!r}")
    filled = []
    for name, (location, leaf) in leaves.items():
        expected = jax.eval_shape(_stored, _value(leaf))
        if arrays[name].shape != expected.shape or arrays[name].dtype != expected.dtype:
            raise ArtifactError(
                f"path: array {name!r} in {path / ARRAYS}: expected {expected.dtype} of shape "
                f"{expected.shape}, got {arrays[name].dtype} of shape {arrays[name].shape}"
            )
        value = _restored(arrays[name], _value(leaf))
        filled.append((location, leaf.replace(value) if isinstance(leaf, nnx.Variable) else value))
    return nnx.from_flat_state(filled)
