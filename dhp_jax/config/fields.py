"""The rule of every field of a configuration."""

from collections.abc import Callable, Mapping
import os
from pathlib import Path
from typing import Any

from absl.flags import BooleanParser
from ml_collections import ConfigDict

from dhp_jax.budgets.rounding import AUTO, parse_multiples
from dhp_jax.config.defaults import TASKS
from dhp_jax.config.methods import METHODS
from dhp_jax.data.labelled import registry
from dhp_jax.data.photos import files as photos_files
from dhp_jax.models.arguments import MAX_CHANNELS
from dhp_jax.train import optimizer

DTYPES = ("float32", "bfloat16")


MOST = 1_000_000  # of what is counted, if nothing else is said


LARGEST = 1e30  # of other numbers; float32 ends at 3e38


LONGEST_SIDE = 10_000  # of images, in pixels


MOST_TARGETS = 20


SHARES = f"up to {MOST_TARGETS} shares > 0 and <= 1 in descending order, such as (0.75, 0.5)"


MOST_DROPS = 100  # each makes the compiled step larger


MOST_WORKERS = 1024


MOST_EXAMPLES = 2**28  # of an epoch; their order takes 4 bytes each


OR_NONE = ", or None"


READERS = {  # of the text of a flag, by the type of its field
    int: (int, "an integer"),
    float: (float, "a number"),
    bool: (BooleanParser().parse, "True or False"),
}


Rule = tuple[Callable[[Any], bool], str]  # whether a value is possible, and what is expected


def _number(low: float, high: float = LARGEST, *, above: bool = False, below: bool = False) -> Rule:
    interval = f"a number {'>' if above else '>='} {low:g} and {'<' if below else '<='} {high:g}"

    def possible(value: Any) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (value > low if above else value >= low)
            and (value < high if below else value <= high)
        )

    return possible, interval


def _integer(low: int, high: int = MOST) -> Rule:
    def possible(value: Any) -> bool:
        integer = isinstance(value, int) and not isinstance(value, bool)
        return integer and low <= value <= high

    return possible, f"an integer >= {low} and <= {high}"


def _devices(value: Any) -> bool:
    return (type(value) is int and value == -1) or _integer(1)[0](value)


def _one_of(*values: str | int) -> Rule:
    def possible(value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in values)

    return possible, f"one of {', '.join(map(str, values))}"


def _shares(value: Any) -> bool:
    """Whether a value is shares, each smaller than the one before."""
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MOST_TARGETS:
        return False
    return all(map(_SHARE[0], value)) and list(value) == sorted(set(value), reverse=True)


def _multiple(value: Any) -> bool:
    if not isinstance(value, str):
        return _integer(1, MAX_CHANNELS)[0](value)
    try:
        return value == AUTO or all(
            number <= MAX_CHANNELS for number in parse_multiples(value).values()
        )
    except ValueError:
        return False


def _epochs(value: Any) -> bool:
    few = isinstance(value, list | tuple) and len(value) <= MOST_DROPS
    return few and all(_number(0, MOST)[0](v) for v in value) and list(value) == sorted(set(value))


def _path(value: Any) -> bool:
    """Whether a value is a path that a file system can be asked for."""
    try:
        os.stat(Path(value).expanduser())
    except (FileNotFoundError, NotADirectoryError):
        return True
    except Exception:  # of a type or form that is none, too long, the home of nobody, forbidden
        return False
    return True


def _reads_as(read: Callable[[str], Any], text: str) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True


def _or_none(rule: Rule, meaning: str) -> Rule:
    possible, expected = rule
    return (lambda value: value is None or possible(value)), f"{expected}{OR_NONE} {meaning}"


_PATH: Rule = (_path, "a path")


_BOOLEAN: Rule = (lambda value: isinstance(value, bool), "True or False")


_SCHEDULE: Mapping[str, Any] = {
    "epochs": _integer(1),
    "learning_rate": _number(0, above=True),
    "drops": (_epochs, f"up to {MOST_DROPS} epochs in ascending order, such as (150, 225)"),
}


_SHARE = _number(0, 1, above=True)


_BUDGET = _or_none(_SHARE, "for no such budget")


FIELDS: Mapping[str, Any] = {
    "seed": _integer(0, 2**32 - 1),  # of larger ones JAX would use the last 32 bits
    "method": _one_of(*METHODS),
    "source": _or_none(_PATH, "for a method that starts from no other run"),
    "target": _SHARE,
    "targets": _or_none((_shares, SHARES), "for the target alone"),
    "budget": {
        **dict.fromkeys(("flops", "params", "activations", "latency"), _BUDGET),
        "batch": _or_none(_integer(1), "for one input"),
    },
    "multiple_of": (
        _multiple,
        f"{_integer(1, MAX_CHANNELS)[1]}, auto, or numbers by latent, such as stages.*:8,head:4",
    ),
    "batch_size": _integer(1),
    "dtype": _one_of(*DTYPES),
    "log_every": _integer(1),
    "nonfinite": _one_of("stop", "skip"),
    "checkpoint": {
        "seconds": _number(0),
        "keep": _integer(2),
        "grace": _number(0, 86_400, above=True),  # which threads can wait
    },
    "mesh": {
        "data": (_devices, f"an integer >= 1 and <= {MOST}, or -1 for all devices"),
        "model": _integer(1),
    },
    "task": {"name": _one_of(*TASKS)},
    "model": (
        lambda value: isinstance(value, ConfigDict),
        "the name of a network and its arguments",
    ),
    "optimizer": {
        "name": _one_of(*optimizer.NAMES),
        "momentum": _number(0, 1, below=True),
        "weight_decay": _number(0),
    },
    "search": {
        **_SCHEDULE,
        "strength": _number(0),
        "threshold": _number(0),
        "stop_limit": _number(0, 1),
        "min_channels": _integer(1, MAX_CHANNELS),
    },
    "converge": _SCHEDULE,
    "baseline": _SCHEDULE,
}


_RESTORATION: Mapping[str, Any] = {
    "patch": _integer(1, LONGEST_SIDE),
    "channels": _one_of(1, 3),
    "steps_per_epoch": _integer(1),
    "tile": _or_none(_integer(1, LONGEST_SIDE), "to run test images whole"),
    "overlap": _or_none(_integer(0, LONGEST_SIDE), "for as far as the network sees"),
}


_READING: Mapping[str, Any] = {
    "streamed": _or_none(_BOOLEAN, "for whether they do not fit on the device"),
    "workers": _or_none(_integer(0, MOST_WORKERS), "for all cores but one"),
}


_LABELLED: Mapping[str, Any] = {
    **_READING,
    "name": _one_of(*registry.NAMES),
    "dir": _or_none(_PATH, "for the default of tensorflow-datasets"),
    "image_size": _or_none(_integer(1, LONGEST_SIDE), "for the size of the data"),
    "archive": _or_none(_PATH, "if there is none"),
    "crop_padding": _or_none(_integer(0, LONGEST_SIDE), "for what suits the data"),
    "flip": _or_none(_BOOLEAN, "likewise"),
}


_PHOTOGRAPHS: Mapping[str, Any] = {
    **_READING,
    "cache": _or_none(_PATH, "for the user's cache folder"),
    "name": _one_of(*photos_files.NAMES),
    "dir": _or_none(_PATH, "for embedded photographs"),
    "test_dir": _or_none(_PATH, "for embedded photographs"),
}


TASK_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "classification": {"task": {}, "data": _LABELLED},
    "super_resolution": {
        "task": {**_RESTORATION, "scale": _one_of(2, 3, 4), "psnr": _one_of("y", "rgb")},
        "data": _PHOTOGRAPHS,
    },
    "denoising": {"task": {**_RESTORATION, "sigma": _number(0)}, "data": _PHOTOGRAPHS},
}
