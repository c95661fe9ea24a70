"""What model.json says of networks whose axes were found by tracing: cuts of arrays, and latents.

Positions of an axis that are the same in many arrays are written once, as runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax.artifact.description import DTYPES, MAX_ARRAYS, MAX_AXES, MAX_NUMBER, ArtifactError
from dhp_jax.core.state import path_name
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.tracing.cuts import ArrayCuts
from dhp_jax.tracing.generated import Positions
from dhp_jax.tracing.layer_sizes import numbers_in
from dhp_jax.tracing.programs import default_call
from dhp_jax.tracing.table import ORDINARY_CALLS, LatentTable, SizeEntry

Runs = tuple[tuple[int, ...], ...]
MOST = 2**40  # numbers of an array
MOST_POSITIONS = 2**23  # of all lists together: a short file must not take all memory


class _Listed:
    """Lists that are written once each, and the number of each."""

    def __init__(self):
        self.lists: list[list[list[int]]] = []
        self.numbers: dict[Any, int] = {}
        self.positions = 0

    def number(self, columns: Sequence[Sequence[int]]) -> int:
        """The number of a list of tuples, given by column."""
        runs = _as_runs(np.array(columns, np.int64).T)
        if runs not in self.numbers:
            self.positions += len(columns[0])
            if len(columns[0]) > MAX_NUMBER:
                raise ArgumentError("model", f"axes of at most {MAX_NUMBER}", len(columns[0]))
            if self.positions > MOST_POSITIONS:
                raise ArgumentError("model", f"at most {MOST_POSITIONS} positions to tell", "more")
            self.numbers[runs] = len(self.lists)
            self.lists.append([list(run) for run in runs])
        return self.numbers[runs]


def _as_runs(rows: np.ndarray) -> Runs:
    """Rows as runs `(count, step, first row ...)` whose last number rises by `step`."""
    runs: list[tuple[int, ...]] = []
    start = 0
    while start < len(rows):
        step, end = 0, start + 1
        if end < len(rows) and (rows[end, :-1] == rows[start, :-1]).all():
            step = int(rows[end, -1] - rows[start, -1])
            while (
                end < len(rows)
                and (rows[end, :-1] == rows[start, :-1]).all()
                and rows[end, -1] - rows[end - 1, -1] == step
            ):
                end += 1
        runs.append((end - start, step, *map(int, rows[start])))
        start = end
    return tuple(runs)


def _all_from_runs(value: Any, columns: int, where: str) -> list[np.ndarray]:
    """The rows of every list of runs that a file holds."""
    lists, left = [], MOST_POSITIONS
    for runs in _list(value, where):
        lists.append(_from_runs(runs, columns, min(left, MAX_NUMBER), where))
        left -= len(lists[-1])
    return lists


def _from_runs(runs: Any, columns: int, most: int, where: str) -> np.ndarray:
    """The rows of runs that a file holds, `most` at most."""
    rows: list[np.ndarray] = []
    total = 0
    for run in runs if isinstance(runs, list) and runs else [runs]:
        fits = (
            isinstance(run, list)
            and len(run) == columns + 2
            and all(type(n) is int and abs(n) <= MAX_NUMBER for n in run)
            and run[0] > 0
        )
        total += run[0] if fits else 0
        if not fits or total > most:
            expected = f"runs of at most {most} positions"
            raise ArtifactError(f"path: {where}: expected {expected}, got {shown(run)}")
        count, step, *first = run
        made = np.tile(np.array(first, np.int64), (count, 1))
        made[:, -1] += step * np.arange(count)
        rows.append(made)
    return np.concatenate(rows)


def cuts_as_json(cuts: ArrayCuts) -> dict[str, Any]:
    """Cuts as model.json holds them."""
    listed = _Listed()
    kept = {
        name: {str(k): listed.number([positions]) for k, positions in axes.items()}
        for name, axes in cuts.kept.items()
    }
    numbers = [list(entry) for entry in cuts.numbers]
    return {"kept": kept, "positions": listed.lists, "numbers": numbers}


def cuts_from_json(value: Mapping[str, Any], where: str) -> ArrayCuts:
    """Cuts from model.json, of whose content nothing is trusted."""
    where = f"{where}: cuts"
    _check_keys(value, {"kept", "positions", "numbers"}, where)
    rows = _all_from_runs(value["positions"], 1, where)
    if any(x.min() < 0 or not (np.diff(x, axis=0) > 0).all() for x in rows):
        raise ArtifactError(f"path: {where}: expected rising positions")
    lists = [tuple(x[:, 0].tolist()) for x in rows]
    kept = {
        name: {k: lists[number] for k, number in axes.items()}
        for name, axes in _axes(value["kept"], len(lists), where).items()
    }
    numbers = []
    for entry in _list(value["numbers"], where):
        if not isinstance(entry, list) or list(map(type, entry)) != [str, str, int]:
            raise ArtifactError(f"path: {where}: numbers: got {shown(entry)}")
        numbers.append(tuple(entry))
    return ArrayCuts(kept, tuple(numbers))


def table_as_json(table: LatentTable, least: Mapping[str, int]) -> dict[str, Any]:
    """A table of latents as model.json holds it, and how many entries of each survive at least."""
    listed, inputs = _Listed(), _inputs_as_json(table.inputs)
    places = {
        name: {str(k): listed.number([p.owner, p.entry]) for k, p in axes.items()}
        for name, axes in table.places.items()
    }
    numbers = [
        [n.path, n.attribute, n.latent, n.array, n.times if n.latent else n.axis]
        for n in table.numbers
    ]
    calls = {ORDINARY_CALLS: True} if table.notes.get(ORDINARY_CALLS) else {}
    return calls | {
        "sizes": dict(table.sizes),
        "least": dict(least),
        "places": places,
        "positions": listed.lists,
        "numbers": numbers,
        "generated": list(table.notes["generated"]),
        "embedding": table.notes["embedding"],
        "inputs": inputs if table.call is default_call else {"own_call": inputs},
    }


def table_from_json(value: Mapping[str, Any], where: str) -> tuple[LatentTable, dict[str, int]]:
    """A table of latents from model.json, and how many entries of each survive at least."""
    where = f"{where}: latents"
    keys = {"sizes", "least", "places", "positions", "numbers", "generated", "embedding", "inputs"}
    _check_keys(value, keys | ({ORDINARY_CALLS} & set(value)), where)
    if value.get(ORDINARY_CALLS, True) is not True:  # of most networks files do not tell it
        raise ArtifactError(f"path: {where}: {ORDINARY_CALLS}: expected true")
    sizes, least, embedding = value["sizes"], value["least"], value["embedding"]
    _check_sizes(sizes, least, where)
    if embedding is not None and not (type(embedding) is int and 0 < embedding <= MAX_NUMBER):
        raise ArtifactError(f"path: {where}: embedding: got {shown(embedding)}")
    lists = _positions(value["positions"], list(sizes.values()), where)
    places = {
        name: {k: Positions(*lists[number].T) for k, number in axes.items()}
        for name, axes in _axes(value["places"], len(lists), where).items()
    }
    generated = _list(value["generated"], where)
    if not all(isinstance(name, str) and name in places for name in generated):
        raise ArtifactError(f"path: {where}: generated: got {shown(generated)}")
    inputs, call = value["inputs"], default_call
    if inputs is None or isinstance(inputs, dict):  # of a function that no file holds
        inputs, call = (inputs or {}).get("own_call"), None
    notes = {"generated": generated, "embedding": embedding}
    notes[ORDINARY_CALLS] = ORDINARY_CALLS in value
    table = LatentTable(
        sizes,
        places,
        tuple(_size_entry(entry, sizes, where) for entry in _list(value["numbers"], where)),
        None if inputs is None else _inputs_from_json(inputs, where),
        call,
        notes,
    )
    return table, least


def check_table(table: LatentTable, model: nnx.Module) -> None:
    """Raises a `ValueError` unless a network, which may be abstract, has what a table tells of."""
    shapes = {path_name(path): x.shape for path, x in nnx.to_flat_state(nnx.state(model))}
    for name, axes in table.places.items():
        for k, positions in axes.items():
            size = shapes.get(name, ())[k : k + 1]
            if size != (len(positions.owner),):
                expected = f"an axis {k} of {len(positions.owner)} in array {name!r}"
                raise ValueError(f"latents: expected {expected}, got {shapes.get(name, 'none')}")
    modules = {path_name(path): module for path, module in nnx.iter_modules(model)}
    for n in table.numbers:
        held = n.path in modules and n.attribute in dict(numbers_in(modules[n.path]))
        if not held or (n.array and not 0 <= n.axis < len(shapes.get(n.array, ()))):
            raise ValueError(f"latents: the network has no number {n.attribute!r} in {n.path!r}")


def _check_sizes(sizes: Any, least: Any, where: str) -> None:
    """Raises unless these are numbers by name, and names and sizes fit each other."""
    for numbers in (sizes, least):
        if not isinstance(numbers, dict) or len(numbers) > MAX_ARRAYS:
            raise ArtifactError(f"path: {where}: got {shown(numbers)}")
        for number in numbers.values():
            if type(number) is not int or not 0 <= number <= MOST:
                raise ArtifactError(f"path: {where}: expected a size, got {shown(number)}")
    if sizes.keys() != least.keys():
        raise ArtifactError(f"path: {where}: sizes or least lack something")
    if not all(0 < size <= MAX_NUMBER for size in sizes.values()):
        raise ArtifactError(f"path: {where}: sizes: got {shown(sizes)}")


def _positions(value: Any, sizes: list[int], where: str) -> list[np.ndarray]:
    """Lists of positions, as rows of the number of a latent, or -1, and an entry of it."""
    lists = _all_from_runs(value, 2, where)
    widths = np.array([1, *sizes])
    for rows in lists:
        owner, entry = rows[:, 0], rows[:, 1]
        if owner.min() < -1 or owner.max() >= len(sizes):
            raise ArtifactError(f"path: {where}: positions of an unknown latent")
        if entry.min() < 0 or (entry >= widths[owner + 1]).any():
            raise ArtifactError(f"path: {where}: positions of an unknown entry")
    return lists


def _size_entry(entry: Any, sizes: Mapping[str, int], where: str) -> SizeEntry:
    if isinstance(entry, list) and len(entry) == 5:
        path, attribute, latent, array, number = entry
        texts = all(isinstance(text, str) for text in (path, attribute))
        of_latent = isinstance(latent, str) and latent in sizes and array is None
        of_array = latent is None and isinstance(array, str)
        if texts and (of_latent or of_array) and type(number) is int:
            if of_latent:  # of files without times it is 0
                return SizeEntry(path, attribute, latent, times=max(1, number))
            return SizeEntry(path, attribute, None, array, number)
    raise ArtifactError(f"path: {where}: numbers: got {shown(entry)}")


def _axes(value: Any, lists: int, where: str) -> dict[str, dict[int, int]]:
    """By array and axis the number of a list."""
    found: dict[str, dict[int, int]] = {}
    for name, axes in value.items() if isinstance(value, dict) else [("", None)]:
        if not isinstance(axes, dict):
            raise ArtifactError(f"path: {where}: expected axes of arrays, got {shown(axes)}")
        for k, number in axes.items():
            if not k.isdecimal() or len(k) > 2 or type(number) is not int:
                raise ArtifactError(f"path: {where}: {shown(name)}: got {shown({k: number})}")
            if not 0 <= number < lists:
                raise ArtifactError(f"path: {where}: {shown(name)}: no list {number}")
            found.setdefault(name, {})[int(k)] = number
    return found


def _inputs_as_json(inputs: Any) -> Any:
    if isinstance(inputs, tuple | list):
        return [_inputs_as_json(item) for item in inputs]
    if isinstance(inputs, dict):
        for key in inputs:
            if not isinstance(key, str):
                raise ArgumentError("model", "inputs by names that are texts", shown(key))
        return {"named": {k: _inputs_as_json(item) for k, item in inputs.items()}}
    if inputs is None:
        return None
    return {"shape": list(inputs.shape), "dtype": str(inputs.dtype)}


def _inputs_from_json(value: Any, where: str) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        return tuple(_inputs_from_json(item, where) for item in value)
    if isinstance(value, dict) and value.keys() == {"named"} and isinstance(value["named"], dict):
        return {k: _inputs_from_json(item, where) for k, item in value["named"].items()}
    shape = value.get("shape") if isinstance(value, dict) else None
    sizes = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    key = jax.eval_shape(jax.random.key, 0).dtype
    dtypes = {name: jnp.dtype(name) for name in DTYPES.values()} | {str(key): key}
    dtype = dtypes.get(value["dtype"]) if sizes and isinstance(value.get("dtype"), str) else None
    if dtype is None or len(shape) > MAX_AXES:
        raise ArtifactError(f"path: {where}: inputs: got {shown(value)}")
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_NUMBER:
        raise ArtifactError(f"path: {where}: expected a list, got {shown(value)}")
    return value


def _check_keys(value: Any, keys: set[str], where: str) -> None:
    if not isinstance(value, dict) or value.keys() != keys:
        raise ArtifactError(f"path: {where}: expected {sorted(keys)}, got {shown(value)}")
