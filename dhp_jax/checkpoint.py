"""Networks on disk: a JSON file that says what it is, and its arrays in safetensors. No pickle."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
import shutil
import stat
from types import SimpleNamespace
from typing import Any, BinaryIO

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as serialized

import dhp_jax
from dhp_jax import models
from dhp_jax.architecture import architecture_of
from dhp_jax.cost import measure_cost
from dhp_jax.durable import put, unfinished, write
from dhp_jax.fold import contracted
from dhp_jax.latent import latents
from dhp_jax.names import shown, unknown
from dhp_jax.prune import prune
from dhp_jax.reuse import built, narrowed
from dhp_jax.schema import (
    DTYPES,
    FORMAT,
    LONGEST_DESCRIPTION,
    LONGEST_TEXT,
    VERSION,
    ArtifactError,
    check_description,
    check_header,
    check_like,
    check_names,
    parsed,
)

__all__ = ["ArtifactError", "exists", "load", "read_description", "save", "verify"]

DESCRIPTION = "model.json"
ARRAYS = "arrays.safetensors"
MODEL = "model"  # of the folders in a run's, the one that it ends with


def save(
    path: str | os.PathLike,
    model: nnx.Module,
    *,
    input_shape: tuple[int, ...] | None = None,
    **notes: Any,
) -> None:
    """Writes a network, pruned or not, to a folder that says what it is.

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
        the network says of itself (see `dhp_jax.schema`). What was there before is left as it was.

    Example:
      >>> dhp.save("out/", small, input_shape=(32, 32, 3), test_error=8.46)
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"model: expected an nnx.Module, got {shown(model)}")
    path = Path(os.path.realpath(path))
    if not may_hold(path):
        raise FileExistsError(
            f"path: expected no or an empty folder, or one with a network only, got {path}"
        )
    arrays = _arrays(model)
    for name, array in arrays.items():
        if not _is_finite(array):
            raise ValueError(f"model: array {name!r}: expected finite numbers, got NaN or infinity")
    content = serialized(arrays)
    description = _description(model, arrays, content, notes)
    if input_shape is not None:
        cost = measure_cost(model, input_shape)
        description["cost"] = {"flops": cost.flops, "params": cost.params}
        notes["input_shape"] = list(input_shape)
    text = json.dumps(description, indent=1)
    _check_text(text.encode(), path / DESCRIPTION)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = unfinished(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write(part / ARRAYS, content)
    write(part / DESCRIPTION, text)
    put(part, path)


def load(
    path: str | os.PathLike, *, build: Callable[[nnx.Rngs], nnx.Module] | None = None
) -> nnx.Module:
    """Reads a network that `save` has written; safe with files from strangers.

    A file can do no more than be refused or become arrays. What `model.json` says is checked
    (see `dhp_jax.schema`), then that the files agree with each other, down to the digest. Then the
    network is built, abstractly, of no more layers than there are arrays for. Only if it needs just
    these arrays are they read; they must be finite.

    Args:
      path: the folder; the two files in it may not be links.
      build: for a network of your own class: makes the unpruned network, as `build(rngs)` or
        `build(rngs=rngs)`, whichever it takes. Random state that the file lacks, of a layer of
        dropout that is new, is that of `build(nnx.Rngs(0))`.

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
    description = verify(path)
    whole = _of_family(description, path / DESCRIPTION) if build is None else _of_function(build)
    masks = _masks(whole, description["survivors"], path / DESCRIPTION)
    folded = description.get("folded", [])

    def make(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State]:
        if description.get("renewed"):
            model = narrowed(model, description["survivors"] or {})
        elif masks is not None:
            model = prune(model, masks)
        return nnx.split(contracted(model, folded))

    try:
        graphdef, abstract = nnx.eval_shape(make, whole)
    except (ValueError, KeyError) as error:  # such as layers that are not there
        raise ArtifactError(f"path: {path / DESCRIPTION}: {error}") from error
    gained, known = nnx.split_state(abstract, _random_besides(description["arrays"]), ...)
    state = _filled(known, description["arrays"], path)
    if gained:
        state = nnx.merge_state(state, _drawn(lambda: make(built(build, nnx.Rngs(0)))[1], gained))
    model = nnx.merge(graphdef, state)
    model.eval()
    return model


def verify(path: str | os.PathLike) -> dict[str, Any]:
    """Checks the files of a network: what each says, and that they are those that were saved.

    `load` does this too. The network is not built, and no array is read.

    Args:
      path: the folder.

    Returns:
      What `model.json` says, as from `read_description`.

    Raises:
      ArtifactError: no artifact of this format and version is there, or the arrays are not those
        that were saved with it.

    Example:
      >>> dhp.checkpoint.verify("out/")["notes"]
    """
    path = Path(path)
    description = read_description(path)
    with _opened(path / ARRAYS) as file:
        _read_header(file, description["arrays"], path / ARRAYS)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != description["sha256"]:
        raise ArtifactError(
            f"path: {path / ARRAYS} is not what was saved: expected SHA-256 "
            f"{description['sha256']}, got {digest}"
        )
    return description


def exists(path: str | os.PathLike) -> bool:
    """Whether a folder holds a network."""
    return all(os.path.isfile(Path(path) / name) for name in (DESCRIPTION, ARRAYS))


def may_hold(path: str | os.PathLike) -> bool:
    """Whether `save` may write there: nothing is there, an empty folder, or a network only."""
    path = Path(path)
    if not path.is_dir():
        return not path.exists()
    return {item.name for item in path.iterdir()} <= {DESCRIPTION, ARRAYS}


def read_description(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON side of an artifact: family, arguments, survivors, arrays and notes.

    Raises:
      ArtifactError: no artifact of this format and version is there.
    """
    path = Path(path)
    for name in (DESCRIPTION, ARRAYS):
        try:
            mode = os.lstat(path / name).st_mode
        except (OSError, ValueError):
            hint = f"; {path / MODEL} is one" if exists(path / MODEL) else ""
            raise ArtifactError(
                f"path: expected a folder with {DESCRIPTION} and {ARRAYS}, got {path}{hint}"
            ) from None
        if not stat.S_ISREG(mode):
            what = "a link" if stat.S_ISLNK(mode) else "something else"
            raise ArtifactError(f"path: {path / name}: expected a file, got {what}")
    with _opened(path / DESCRIPTION) as file:
        return _check_text(file.read(LONGEST_DESCRIPTION + 1), path / DESCRIPTION)


# Writing


def _arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """Every array of a network by its path."""
    # safetensors writes memory as it lies, and device layouts need not be row-major.
    return {
        _name(location): np.asarray(_stored(_value(leaf)), order="C")
        for location, leaf in nnx.to_flat_state(nnx.state(model))
    }


def _description(
    model: nnx.Module, arrays: Mapping[str, np.ndarray], content: bytes, notes: Mapping[str, Any]
) -> dict[str, Any]:
    architecture = architecture_of(model)
    return {
        "format": FORMAT,
        "version": VERSION,
        "sha256": hashlib.sha256(content).hexdigest(),
        "family": architecture.family,
        "arguments": dict(architecture.arguments),
        "survivors": architecture.survivors and dict(architecture.survivors),
        "arrays": {name: _entry(array) for name, array in arrays.items()},
        "renewed": architecture.renewed,
        "folded": [list(chain) for chain in architecture.folded],
        "provenance": _provenance(),
        "notes": notes,
    }


def _provenance() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
    return {"dhp_jax": dhp_jax.__version__, **packages}


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


def _check_text(content: bytes, where: Path) -> dict[str, Any]:
    """What model.json says, if an artifact's may say that."""
    if len(content) > LONGEST_DESCRIPTION:
        raise ArtifactError(
            f"path: {where}: expected at most {LONGEST_DESCRIPTION} bytes, got more"
        )
    description = parsed(content, str(where))
    check_description(description, str(where))
    return description


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


def _of_family(description: Mapping[str, Any], where: Path) -> nnx.Module:
    """The unpruned network of a family, abstractly.

    Building takes bounded time and memory, whatever the arguments are: every layer and latent draws
    initial values, and the first that is too many for the arrays of the file ends it. How wide they
    are is limited by the families.
    """
    family = description["family"]
    if family is None:
        raise ArtifactError(
            f"path: {where.parent} holds a network of a class of its own; expected "
            "load(path, build=...) with a function build(rngs) that makes it unpruned"
        )
    if family not in models.FAMILIES:
        raise ArtifactError(f"path: {where}: {unknown('family', family, models.FAMILIES)}")
    # With latents, of which no network has more than arrays; folded layers have had four each.
    left = 2 * len(description["arrays"]) + 8 * sum(map(len, description.get("folded", [])))

    def draw() -> jax.Array:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("expected a network of the arrays in the file, got one of more layers")
        return jax.random.key(0)

    def build() -> nnx.Module:
        return models.build(family, rngs=SimpleNamespace(params=draw), **description["arguments"])

    try:
        return nnx.eval_shape(build)
    except Exception as error:  # whatever hostile arguments lead to
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"path: {where}: arguments: {what[:LONGEST_TEXT]}") from None


def _of_function(build: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """The unpruned network that the reader's own function makes, abstractly."""

    def made() -> nnx.Module:
        model = built(build, nnx.Rngs(0))
        if not isinstance(model, nnx.Module):
            raise TypeError(f"it returns {shown(model)}")
        return model

    try:
        return nnx.eval_shape(made)
    except Exception as error:  # whatever the function raises, or what is none
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(
            "build: expected a function build(rngs) that makes the unpruned network, an "
            f"nnx.Module; got {shown(build)}: {what}"
        ) from error


def _masks(
    model: nnx.Module, survivors: Mapping[str, list[int]] | None, where: Path
) -> dict[str, np.ndarray] | None:
    """What was kept of every latent, if the network has just these; latents that are not prunable
    keep everything."""
    if survivors is None:
        return None
    axes = latents(model)
    for name in sorted(axes.keys() ^ survivors.keys()):
        what = "lacks" if name in axes else "holds an unexpected"
        raise ArtifactError(f"path: {where}: survivors: {what} latent {name!r}")
    masks = {}
    for name, indices in survivors.items():
        size = axes[name].size
        if indices[-1] >= size or not (axes[name].prunable or len(indices) == size):
            expected = "indices below" if axes[name].prunable else "all indices below"
            raise ArtifactError(
                f"path: {where}: survivors[{name!r}]: expected {expected} {size}, got "
                f"{shown(indices)}"
            )
        masks[name] = np.zeros(size, bool)
        masks[name][indices] = True
    return masks


def _random_besides(arrays: Mapping[str, Any]) -> Callable[[tuple, Any], bool]:
    """A filter for the states of random generators that are not among these arrays."""
    return lambda location, leaf: isinstance(leaf, nnx.RngState) and _name(location) not in arrays


def _drawn(make: Callable[[], nnx.State], like: nnx.State) -> nnx.State:
    """What `make` has in the places of `like`; nothing else of it is computed."""
    places = dict(nnx.to_flat_state(like))

    @jax.jit
    def chosen() -> nnx.State:
        found = nnx.to_flat_state(make())
        return nnx.from_flat_state([(place, leaf) for place, leaf in found if place in places])

    return chosen()


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
