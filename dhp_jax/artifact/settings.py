"""What the modules of a network hold beside arrays, and a warning where it is not as it was saved.

A network of one's own is loaded into what the caller's function makes now. Its arrays are checked,
but an activation, a stride or an epsilon leaves no array. So `save` notes what each module holds,
and `load` warns of what has another value.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from enum import Enum
import functools
from typing import Any
import warnings
import zlib

from flax import nnx
import numpy as np

from dhp_jax.core.provenance import Architecture
from dhp_jax.core.state import path_name

Settings = Sequence[Mapping[str, Any]]  # of some modules, by their paths, the text of each value
CLASS = "class"  # stands among the attributes, none of which has this name
MODES = {"deterministic", "use_running_average"}  # what `train` and `eval` set
UNKNOWN = "?"
LONGEST = 200  # characters of a text
MOST_TOLD = 3  # differences in a warning


def settings_of(model: nnx.Module) -> list[dict[str, Any]]:
    """What the modules of a network hold beside arrays and modules, as model.json tells it.

    Values are numbers, texts, classes, dtypes and functions, these by their names, and containers
    and dataclasses of them. Modules that hold the same stand together.
    """
    alike: dict[tuple, list[str]] = {}
    for path, texts in _texts_of(model):
        alike.setdefault(tuple(texts.items()), []).append(path)
    return [{"modules": paths, "values": dict(texts)} for texts, paths in alike.items()]


def warn_of_settings(saved: Settings, model: nnx.Module) -> None:
    """Warns if a module holds something else than when its network was saved.

    Modules and attributes that only one of the two has are passed over: a class may gain some.
    """
    before = {path: same["values"] for same in saved for path in same["modules"]}
    found: dict[tuple, list[str]] = {}
    for path, texts in _texts_of(model):
        was = before.get(path, {})
        for name, now in texts.items():
            if was.get(name, now) != now:
                found.setdefault((name, was[name], now), []).append(path)
    if not found:
        return
    told = [_difference(*key, paths) for key, paths in list(found.items())[:MOST_TOLD]]
    more = f"; and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
    warnings.warn(
        "build: makes a network that may compute something else than the one that was saved: "
        f"{'; '.join(told)}{more}",
        stacklevel=3,
    )


def _difference(name: str, was: str, now: str, paths: Sequence[str]) -> str:
    first = repr(paths[0]) if paths[0] else "the network"
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{name} of {first}{more} was {was}, is {now}"


def _texts_of(model: nnx.Module) -> Iterable[tuple[str, dict[str, str]]]:
    """Of each module its path, and the texts of its values by their names."""
    for path, module in nnx.iter_modules(model):
        texts = {CLASS: _text(type(module))} if path else {}  # `build` may make a subclass
        for name, value in sorted(vars(module).items()):
            of_the_file = isinstance(value, Architecture)  # which holds it elsewhere
            if not (name.startswith("_") or name in MODES or of_the_file):
                texts |= _named_texts(name, value)
        yield path_name(path), texts


def _named_texts(name: str, value: Any) -> dict[str, str]:
    """The text of a value unless it has none; of a dataclass its name and those of its fields."""
    if not _is_dataclass(value):
        return {} if (text := _text(value)) == UNKNOWN else {name: text}
    texts = {name: type(value).__name__}
    for field, inner in _fields_of(value).items():
        texts |= _named_texts(f"{name}.{field}", inner)
    return texts


def _is_dataclass(value: Any) -> bool:
    """Whether a value is a dataclass that is none of Flax's NNX."""
    is_one = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return is_one and not isinstance(value, nnx.Pytree | nnx.Variable)


def _fields_of(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value) if f.repr}


def _text(value: Any) -> str:
    """A text that is the same in every process, or "?" for what has none.

    What is too long ends with a number that tells it from others.
    """
    text = _whole_text(value).encode("ascii", "backslashreplace").decode()
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}... ({zlib.crc32(text.encode()):08x})"


def _whole_text(value: Any) -> str:
    if isinstance(value, nnx.Pytree | nnx.Variable):
        return UNKNOWN
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_whole_text, value))})"
    if isinstance(value, Mapping):
        return f"({_named(value)})"
    if isinstance(value, functools.partial):
        of = f"{_whole_text(value.func)}, {_whole_text(value.args)}"
        return f"partial({of}, {_named(value.keywords)})"
    if _is_dataclass(value):
        return f"{type(value).__name__}({_named(_fields_of(value))})"
    return str(getattr(value, "__name__", UNKNOWN)) if callable(value) else UNKNOWN


def _named(values: Mapping[Any, Any]) -> str:
    return ", ".join(f"{name}={_whole_text(value)}" for name, value in values.items())
