"""The configuration of a run: its fields with their defaults, and the check of all of them."""

from collections.abc import Callable, Mapping
import os
from pathlib import Path
from typing import Any

from absl.flags import BooleanParser
from ml_collections import ConfigDict, config_dict

from dhp_jax import models, optimizer
from dhp_jax.data import photographs, sources
from dhp_jax.methods import METHODS
from dhp_jax.models.blocks import MAX_CHANNELS
from dhp_jax.names import shown, unknown
from dhp_jax.widths import AUTO, parsed

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


class ConfigError(ValueError):
    """A field of a configuration that is unknown, missing, or has an impossible value."""


def default(task: str = "classification") -> ConfigDict:
    """The paper's recipe for a task; configurations start from it.

    Args:
      task: "classification" (ResNet-20 on CIFAR-10), "super_resolution" (SRResNet x4) or
        "denoising" (DnCNN).

    Raises:
      ConfigError: another task.
    """
    if task not in TASKS:
        raise ConfigError(unknown("task", task, TASKS))
    config = ConfigDict(
        {
            "seed": 0,
            "method": "dhp",  # "baseline" trains the unpruned network; others: docs/methods.md
            "source": config_dict.placeholder(str),  # finished run that some methods start from
            "target": 0.5,  # share of the FLOPs that the pruned network may use
            "targets": config_dict.placeholder(tuple),  # one after another instead, from one search
            "budget": {  # further shares of the unpruned network's; all that are given hold
                "flops": config_dict.placeholder(float),
                "params": config_dict.placeholder(float),
                "activations": config_dict.placeholder(float),  # bytes of all layers' outputs
                "latency": config_dict.placeholder(float),  # measured where the run is
                "batch": config_dict.placeholder(int),  # of which latency is measured; 1
            },
            # Widths of pruned layers are multiples of it: a number, "auto", or such as
            # "stages.*:8,head:4" by latent; see dhp_jax/widths.py.
            "multiple_of": config_dict.FieldReference(1, field_type=object),
            "batch_size": 64,
            "dtype": "float32",  # of activations and kernels; parameters stay float32
            "log_every": 100,  # steps between records, and between looks at the budget
            "nonfinite": "stop",  # at a loss or latent that is not finite; or "skip" the batch
            "checkpoint": {
                "seconds": 60.0,  # between two of them; more where writing one takes long
                "keep": 3,  # of each phase
                "grace": 30.0,  # seconds that a run has to save its state when it is told to end
            },
            "mesh": {  # devices among which work is divided
                "data": -1,  # along the examples of a batch; -1 for all that there are
                "model": 1,  # along the arrays of hypernetworks and their optimizer state
            },
            "task": {"name": task},
            "model": {"name": "resnet", "depth": 20, "width": 1.0},
            "data": {"name": "cifar10", "dir": config_dict.placeholder(str)},
            "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
            "search": {
                "epochs": 100,  # at most; the search ends when the budget is nearly met
                "learning_rate": 0.1,
                "drops": (50.0,),  # epochs after which the learning rate is divided by 10
                "strength": 2e-4,  # regularization factor of the l1 norm of the latents
                "threshold": 5e-3,  # smaller entries of a latent count as gone
                "stop_limit": 0.02,  # the search ends at target + stop_limit
                "min_channels": 4,  # entries that every latent keeps
            },
            "converge": {"epochs": 300, "learning_rate": 0.1, "drops": (150.0, 225.0)},
            "baseline": {"epochs": 300, "learning_rate": 0.1, "drops": (150.0, 225.0)},
        }
    )
    TASKS[task](config)
    config.data.streamed = config_dict.placeholder(bool)  # not on the device; if not given, by size
    config.data.workers = config_dict.placeholder(int)  # processes that read what is streamed
    return config


def _classification(config: ConfigDict) -> None:
    config.data.image_size = config_dict.placeholder(int)  # sides of image folders and ImageNet
    config.data.archive = config_dict.placeholder(str)  # of Tiny-ImageNet
    config.data.crop_padding = config_dict.placeholder(int)  # what suits the data if not given
    config.data.flip = config_dict.placeholder(bool)


def _super_resolution(config: ConfigDict) -> None:
    _restoration(config)
    config.batch_size = 16
    config.task.update(scale=4, patch=96, channels=3, steps_per_epoch=1000)
    config.task.psnr = "y"  # or "rgb"
    config.model = ConfigDict(
        {"name": "srresnet", "blocks": 16, "width": 1.0, "prune_upsampler": True}
    )
    config.search.update(epochs=80, drops=(40.0,))
    for phase in (config.converge, config.baseline):
        phase.update(epochs=300, drops=(200.0,))


def _denoising(config: ConfigDict) -> None:
    _restoration(config)
    config.task.update(sigma=70.0, patch=64, channels=1, steps_per_epoch=10_000)
    config.model = ConfigDict({"name": "dncnn", "depth": 17, "width": 1.0})
    config.search.update(epochs=20, drops=(10.0,))
    for phase in (config.converge, config.baseline):
        phase.update(epochs=60, drops=(40.0,))


def _restoration(config: ConfigDict) -> None:
    config.target = 0.6
    config.task.tile = config_dict.placeholder(int)  # larger test images are cut into tiles
    config.task.overlap = config_dict.placeholder(int)  # of tiles; as far as the network sees
    config.data = ConfigDict(
        {
            "name": "photographs",  # those of scikit-image, or "photo_folder"
            "dir": config_dict.placeholder(str),
            "test_dir": config_dict.placeholder(str),
            "cache": config_dict.placeholder(str),  # for decoded photographs that are streamed
        }
    )
    config.optimizer.update(name="adam", weight_decay=0.0)
    config.search.strength = 0.1
    for phase in (config.search, config.converge, config.baseline):
        phase.learning_rate = 1e-4


TASKS: Mapping[str, Callable[[ConfigDict], None]] = {
    "classification": _classification,
    "super_resolution": _super_resolution,
    "denoising": _denoising,
}


def check(config: ConfigDict) -> None:
    """Raises a `ConfigError` for the first field that is unknown, missing or impossible.

    Looks at each field by itself, but for a source that the method does not take or lacks, a
    network that is for another task, and too many examples in an epoch. The arguments of the
    network are for `dhp.models.build` to judge.
    """
    if isinstance(config, ConfigDict):
        _check_filled_in("config", config)
    _check_group("", config, _fields(config))
    _check_source(config)
    _check_family(config)
    _check_examples(config)


def _check_filled_in(group: str, config: ConfigDict) -> None:
    """Raises for names that are no strings, and for placeholders that require a value."""
    try:
        names = list(config)
    except TypeError:  # it sorts them
        names = [None]
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"{group}: expected strings as names of fields; got others")
        try:
            value = config[name]
        except config_dict.RequiredValueError:
            raise ConfigError(f"{group}.{name}: expected a value; got none") from None
        if isinstance(value, ConfigDict):
            _check_filled_in(f"{group}.{name}", value)


def _check_source(config: ConfigDict) -> None:
    needed = METHODS[config.method].source
    if needed is not None and config.source is None:
        raise ConfigError(
            f"config.source: expected the directory of a finished run with config.method={needed}, "
            f"for config.method={config.method}; got None"
        )
    if needed is None and config.source is not None:
        raise ConfigError(
            f"config.source: expected None, for config.method={config.method} starts from no other "
            f"run; got {shown(str(config.source))}"
        )


def _check_family(config: ConfigDict) -> None:
    name, task = config.model.get("name"), config.task.name
    families = sorted(family for family in models.FAMILIES if models.task_of(family) == task)
    if not isinstance(name, str) or name not in models.FAMILIES:
        raise ConfigError(unknown("config.model.name", name, families))
    if name not in families:
        raise ConfigError(
            f"config.model.name: expected one of {', '.join(families)}, which are for {task}; "
            f"got {name!r}, which is for {models.task_of(name)}"
        )


def _check_examples(config: ConfigDict) -> None:
    steps = config.task.get("steps_per_epoch", 1)
    if steps * config.batch_size > MOST_EXAMPLES:
        raise ConfigError(
            f"config.task.steps_per_epoch: expected at most {MOST_EXAMPLES // config.batch_size}, "
            f"for {MOST_EXAMPLES} examples of {config.batch_size} a step; got {steps}"
        )


def check_overrides(config: ConfigDict, overrides: Mapping[str, str | None]) -> None:
    """Raises a `ConfigError` for the first name that is no field, or text that is no value of it.

    Args:
      config: the configuration whose fields are to be overridden.
      overrides: what the command line gives each field, such as `{"config.search.epochs": "50"}`;
        `None` where there is no "=".
    """
    for name, text in overrides.items():
        value, kind, rule, path = config, None, _fields(config), "config"
        for part in name.split(".")[1:]:
            if not isinstance(value, ConfigDict):
                raise ConfigError(f"{name}: {path} has no fields, its value is {shown(value)}")
            if part not in value:
                raise ConfigError(
                    unknown(f"{path}.{part}: unknown field", part, value)
                    + (
                        "; add other arguments of the network in the file"
                        * (path == "config.model")
                    )
                )
            kind = value.get_type(part)
            try:
                value = value[part]
            except config_dict.RequiredValueError:
                value = None
            path = f"{path}.{part}"
            rule = rule.get(part) if isinstance(rule, Mapping) else None
        if text is None:
            raise ConfigError(f"{name}: expected --{name}=<value>; got none")
        suits = isinstance(rule, tuple) and rule[0](text)
        if kind in READERS and not _reads_as(READERS[kind][0], text) and not suits:
            expected, _, _ = (rule or READERS[kind])[1].partition(OR_NONE)  # which is no text
            raise ConfigError(f"{name}: expected {expected}; got {shown(text)}")


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
        return value == AUTO or all(number <= MAX_CHANNELS for number in parsed(value).values())
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
    "name": _one_of(*sources.NAMES),
    "dir": _or_none(_PATH, "for the default of tensorflow-datasets"),
    "image_size": _or_none(_integer(1, LONGEST_SIDE), "for the size of the data"),
    "archive": _or_none(_PATH, "if there is none"),
    "crop_padding": _or_none(_integer(0, LONGEST_SIDE), "for what suits the data"),
    "flip": _or_none(_BOOLEAN, "likewise"),
}
_PHOTOGRAPHS: Mapping[str, Any] = {
    **_READING,
    "cache": _or_none(_PATH, "for the user's cache folder"),
    "name": _one_of(*photographs.NAMES),
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


def _fields(config: ConfigDict) -> Mapping[str, Any]:
    """The rules of all fields; those of `task` and `data` depend on the task."""
    task = config.get("task") if isinstance(config, ConfigDict) else None
    name = task.get("name") if isinstance(task, ConfigDict) else None
    if not isinstance(name, str) or name not in TASK_FIELDS:  # the rule of `task.name` will tell
        others = dict.fromkeys(task) if isinstance(task, ConfigDict) else {}
        return {**FIELDS, "data": None, "task": others | FIELDS["task"]}
    rules = TASK_FIELDS[name]
    return {**FIELDS, "task": {**FIELDS["task"], **rules["task"]}, "data": rules["data"]}


def _check_group(prefix: str, config: Any, rules: Mapping[str, Any]) -> None:
    if not isinstance(config, ConfigDict):
        name = f"config.{prefix}".rstrip(".")
        expected = ", ".join(sorted(rules))
        raise ConfigError(f"{name}: expected fields {expected}; got {shown(config)}")
    for name in config:
        if name not in rules:
            raise ConfigError(unknown(f"config.{prefix}{name}: unknown field", name, rules))
    for name, rule in rules.items():
        if name not in config:
            raise ConfigError(f"config.{prefix}{name}: missing")
        value = config[name]
        if isinstance(rule, Mapping):
            _check_group(f"{prefix}{name}.", value, rule)
        elif rule is not None and not rule[0](value):
            raise ConfigError(f"config.{prefix}{name}: expected {rule[1]}; got {shown(value)}")
