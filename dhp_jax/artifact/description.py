"""Checks of `model.json`, made before a network is built or an array is read.

An artifact may come from a stranger. So every field has a type and a limit, names and sizes are
given twice and must agree, and what is not expected is refused. The limits are far above what
networks need, and low enough that a file within them costs little time and memory to look at. What
`save` writes is held to the same rules, so that it can be loaded.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
import json
import math
import re
from typing import Any, NoReturn

import jax.numpy as jnp

from dhp_jax.errors import ArgumentError, shown

FORMAT = "dhp_jax"
VERSION = 1
MAX_DESCRIPTION_BYTES = 2**24  # bytes of model.json
MAX_FILE_BYTES = 2**32  # bytes of all arrays
MAX_ARRAYS = 2**14
MAX_AXES = 32  # of an array
MAX_DEPTH = 32  # lists and objects within each other
MAX_DIGITS = 20  # digits
MAX_TEXT = 1024  # characters of a name
MAX_NUMBER = 2**20  # among arguments, and the largest index of a survivor
MAX_LIST = 64  # of an argument
MAX_EXAMPLE = 2**28  # numbers in an input of the network
MIN_SCALE = 1e-6  # that pixels are divided by
CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")  # characters that a terminal may obey

FIELDS = {  # of model.json, with what they hold
    "format": (str,),
    "version": (int,),
    "sha256": (str,),
    "family": (str, type(None)),
    "arguments": (dict,),
    "survivors": (dict, type(None)),
    "arrays": (dict,),
    "notes": (dict,),
}

OPTIONAL = {
    "renewed": (bool,),
    "folded": (list,),
    "cuts": (dict,),
    "latents": (dict,),
    "settings": (list,),
    "cost": (dict,),
    "provenance": (dict,),
}

KINDS = {
    str: "a text",
    int: "an integer",
    dict: "an object",
    list: "a list",
    bool: "true or false",
    type(None): "null",
}

DTYPES = {  # by their codes in safetensors
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}


class ArtifactError(ValueError):
    """Raised for a folder from which no network can be loaded."""

    @property
    def detail(self) -> str:
        """What is wrong, without the name of the argument."""
        return str(self).removeprefix("path: ")


def parse_json(content: bytes, where: str) -> Any:
    """Parses strict JSON in UTF-8: no NaN or infinity, no name twice, bounded depth and numbers."""
    try:
        value = json.loads(
            content.decode(),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_integer,
        )
    except ValueError as error:
        raise ArtifactError(f"path: {where} is not JSON: {error}") from error
    except RecursionError:
        _refuse_depth(where)
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for item in level for inner in _inside(item)]
        if not level:
            return value
    _refuse_depth(where)


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def check_description(description: Any, where: str) -> None:
    """Raises unless `model.json` has the fields of a saved network, each of its type.

    Whether its family takes the arguments, and has such survivors and arrays, is found out by
    building the network, which is safe after this.
    """
    if not isinstance(description, dict):
        raise ArtifactError(f"path: {where} holds no JSON object")
    found = description.get("format"), description.get("version")
    if found != (FORMAT, VERSION) or type(found[1]) is not int:
        raise ArtifactError(
            f"path: expected format {FORMAT!r} version {VERSION}, got {shown(found[0])} version "
            f"{shown(found[1])} in {where}"
        )
    if "sha256" not in description:
        raise ArtifactError(
            f"path: {where} lacks 'sha256': it was written by an earlier version of dhp_jax, that "
            "this one does not read; make the network again"
        )
    for name in FIELDS:
        if name not in description:
            raise ArtifactError(f"path: {where} lacks {name!r}")
    known = FIELDS | OPTIONAL
    for name, value in description.items():
        if name not in known:
            raise ArtifactError(
                f"path: {where} holds an unknown field {shown(name)}; expected {', '.join(known)}"
            )
        if type(value) not in known[name]:
            _refuse(where, name, " or ".join(KINDS[kind] for kind in known[name]), value)
    if not re.fullmatch("[0-9a-f]{64}", description["sha256"]):
        _refuse(where, "sha256", "64 hexadecimal digits", description["sha256"])
    _check_arguments(description["arguments"], where)
    _check_survivors(description["survivors"] or {}, where)
    _check_table(description["arrays"], where)
    _check_folded(description.get("folded", []), where)
    _check_settings(description.get("settings", []), where)


def check_notes(notes: Mapping[str, Any]) -> None:
    """Raises an `ArgumentError` unless the notes that commands read are well formed.

    Other notes may be any JSON.
    """
    shape = notes.get("input_shape")
    channels, side = (shape[-1], shape[0]) if _is_input_shape(shape) else (None, 1)
    a_channel = "a list of numbers" if channels is None else f"a list of {channels} numbers"
    of_scale = f"{MIN_SCALE} .. {MAX_NUMBER}"
    for name, fits, expected in (
        ("task", lambda task: isinstance(task, str), "a text"),
        (
            "input_shape",
            _is_input_shape,
            f"a list of positive integers, of at most {MAX_EXAMPLE} as their product",
        ),
        (
            "mean",
            lambda mean: _are_numbers(mean, -MAX_NUMBER, channels),
            f"{a_channel} of at most {MAX_NUMBER}, one for each channel",
        ),
        (
            "std",
            lambda std: _are_numbers(std, MIN_SCALE, channels),
            f"{a_channel} in {of_scale}, one for each channel",
        ),
        ("peak", lambda peak: _are_numbers([peak], MIN_SCALE), f"a number in {of_scale}"),
        (
            "resize",
            lambda size: type(size) is int and side <= size <= MAX_NUMBER,
            f"an integer of {side} .. {MAX_NUMBER}, the shorter side before the centre is cut out",
        ),
        (
            "class_names",
            _are_names,
            f"a list of texts of at most {MAX_TEXT} characters, none of them a control one",
        ),
    ):
        if name in notes and not fits(notes[name]):
            raise ArgumentError(name, expected, shown(notes[name]))
    if "std" in notes and "peak" not in notes and max(notes["std"]) < 1:
        expected = "a standard deviation of pixels of 0 .. 255, or their largest value as peak"
        raise ArgumentError("std", expected, shown(notes["std"]))


def _is_input_shape(value: Any) -> bool:
    return bool(value) and _is_shape(value) and 0 < math.prod(value) <= MAX_EXAMPLE


def _are_numbers(values: Any, least: float, count: int | None = None) -> bool:
    return (
        isinstance(values, list)
        and len(values) == (count or len(values)) > 0
        and all(type(value) in (int, float) for value in values)
        and all(least <= value <= MAX_NUMBER for value in values)
    )


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(name, str) and len(name) <= MAX_TEXT and not CONTROL.search(name)
        for name in values
    )


def _check_arguments(arguments: Mapping[str, Any], where: str) -> None:
    for name, value in arguments.items():
        if not name.isidentifier() or len(name) > MAX_TEXT:
            _refuse(where, "arguments", "names of arguments", name)
        try:
            check_argument(name, value)
        except ArgumentError as error:
            raise ArtifactError(f"path: {where}: arguments.{error}") from None


def check_argument(name: str, value: Any) -> None:
    """Raises an `ArgumentError` unless `model.json` can hold the argument of a network."""
    items = value if isinstance(value, list | tuple) else [value]
    if len(items) > MAX_LIST or not all(map(_is_argument, items)):
        expected = (
            f"null, true, false, a number of at most {MAX_NUMBER}, a text of at most "
            f"{MAX_TEXT} characters, or a list of at most {MAX_LIST} of them"
        )
        raise ArgumentError(name, expected, shown(value))


def _is_argument(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    return value is None or (isinstance(value, int | float) and abs(value) <= MAX_NUMBER)


def _check_survivors(survivors: Mapping[str, Any], where: str) -> None:
    if len(survivors) > MAX_ARRAYS:
        _refuse(where, "survivors", f"at most {MAX_ARRAYS} latents", len(survivors))
    for name, indices in survivors.items():
        _check_name("survivors", name, where)
        rising = (
            isinstance(indices, list)
            and len(indices) > 0
            and all(type(index) is int for index in indices)
            and indices[0] >= 0
            and all(low < high for low, high in pairwise(indices))
            and indices[-1] < MAX_NUMBER
        )
        if not rising:
            expected = f"at least one index, each above the one before, below {MAX_NUMBER}"
            _refuse(where, f"survivors[{name!r}]", expected, indices)


def _check_folded(chains: list[Any], where: str) -> None:
    for chain in chains:
        if not isinstance(chain, list) or len(chain) < 2 or not all(type(n) is str for n in chain):
            _refuse(where, "folded", "lists of two or more names of layers", chain)
    count = sum(map(len, chains))
    if count > MAX_ARRAYS:
        _refuse(where, "folded", f"at most {MAX_ARRAYS} layers", count)


def _check_settings(settings: list[Any], where: str) -> None:
    for same in settings:
        modules, values = (
            (same["modules"], same["values"])
            if isinstance(same, dict) and same.keys() == {"modules", "values"}
            else (None, None)
        )
        texts = isinstance(modules, list) and isinstance(values, dict)
        if not texts or not _are_names([*modules, *values, *values.values()]):
            _refuse(where, "settings", "modules, and texts of what they hold by name", same)


def _check_table(arrays: Mapping[str, Any], where: str) -> None:
    """Raises unless every array has a shape and a dtype, and together they are not too large."""
    if len(arrays) > MAX_ARRAYS:
        _refuse(where, "arrays", f"at most {MAX_ARRAYS} arrays", len(arrays))
    for name, entry in arrays.items():
        _check_name("arrays", name, where)
        if not isinstance(entry, dict) or entry.keys() != {"shape", "dtype"}:
            _refuse(where, f"arrays[{name!r}]", "an object of shape and dtype", entry)
        if not _is_shape(entry["shape"]):
            expected = f"a list of at most {MAX_AXES} integers of at least 0"
            _refuse(where, f"arrays[{name!r}].shape", expected, entry["shape"])
        if entry["dtype"] not in DTYPES.values():
            expected = f"one of {', '.join(DTYPES.values())}"
            _refuse(where, f"arrays[{name!r}].dtype", expected, entry["dtype"])
    total = sum(map(size_of, arrays.values()))
    if total > MAX_FILE_BYTES:
        _refuse(where, "arrays", f"at most {MAX_FILE_BYTES} bytes together", total)


def _is_shape(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) <= MAX_AXES
    return is_list and all(type(size) is int and size >= 0 for size in value)


def size_of(entry: Mapping[str, Any]) -> int:
    """The size of an array in bytes."""
    return math.prod(entry["shape"]) * jnp.dtype(entry["dtype"]).itemsize


def check_names(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raises unless the names are those that are expected."""
    for name in sorted(found.keys() ^ expected.keys()):
        what = "lacks" if name in expected else "holds an unexpected"
        raise ArtifactError(f"path: {where} {what} array {shown(name)}")


def check_like(
    name: str, expected: Mapping[str, Any], found: Mapping[str, Any], where: str
) -> None:
    """Raises unless an array has the shape and dtype that are expected."""
    if found != expected:
        raise ArtifactError(
            f"path: array {name!r} in {where}: expected {_describe(expected)}, got "
            f"{_describe(found)}"
        )


def _describe(entry: Mapping[str, Any]) -> str:
    dtype = entry["dtype"]
    known = dtype in DTYPES.values()
    return f"{dtype if known else shown(dtype)} of shape {shown(entry['shape'])}"


def _check_name(field: str, name: str, where: str) -> None:
    if not 0 < len(name) <= MAX_TEXT or not name.isprintable():
        _refuse(where, field, f"names of at most {MAX_TEXT} characters", name)


def _refuse(where: str, field: str, expected: str, value: Any) -> NoReturn:
    raise ArtifactError(f"path: {where}: {field}: expected {expected}, got {shown(value)}")


def _refuse_depth(where: str) -> NoReturn:
    raise ArtifactError(f"path: {where} holds lists or objects more than {MAX_DEPTH} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {shown(name)} comes twice in an object")
        found[name] = value
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _float(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is no number that can be held")
    return float(text)


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)
