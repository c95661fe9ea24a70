"""The configuration of a run: its fields with their defaults, and the check of all of them."""

from collections.abc import Callable, Mapping
import os
from typing import Any

from ml_collections import ConfigDict, config_dict

from dhp_jax import optimizer
from dhp_jax.data import sources
from dhp_jax.names import unknown

METHODS = ("dhp", "baseline")
DTYPES = ("float32", "bfloat16")


class ConfigError(ValueError):
    """A field of a configuration that is unknown, missing, or has an impossible value."""


def default() -> ConfigDict:
    """The paper's recipe for ResNet-20 on CIFAR-10; configurations start from it."""
    return ConfigDict(
        {
            "seed": 0,
            "method": "dhp",  # "baseline" trains the unpruned network instead
            "target": 0.5,  # share of the FLOPs that the pruned network may use
            "batch_size": 64,
            "dtype": "float32",  # of activations and kernels; parameters stay float32
            "log_every": 100,  # steps between records, and between looks at the budget
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


def check(config: ConfigDict) -> None:
    """Raises a `ConfigError` for the first field that is unknown, missing or impossible.

    Looks at each field by itself; the fields of `model` are for `dhp.models.build` to judge.
    """
    _check_group("", config, FIELDS)


def check_overrides(config: ConfigDict, overrides: Mapping[str, str | None]) -> None:
    """Raises a `ConfigError` for the first name that is no field, or number that is none.

    Args:
      config: the configuration whose fields are to be overridden.
      overrides: what the command line gives each field, such as `{"config.search.epochs": "50"}`;
        `None` where there is no "=".
    """
    for name, text in overrides.items():
        value, rule, path = config, FIELDS, "config"
        for part in name.split(".")[1:]:
            if not isinstance(value, ConfigDict):
                raise ConfigError(f"{name}: {path} has no fields, its value is {value!r}")
            if part not in value:
                raise ConfigError(unknown(f"{path}.{part}: unknown field", part, value))
            value, path = value[part], f"{path}.{part}"
            rule = rule.get(part) if isinstance(rule, Mapping) else None
        if text is None:
            raise ConfigError(f"{name}: expected --{name}=<value>; got none")
        if type(value) in (int, float) and not _reads_as(type(value), text):
            expected = rule[1] if rule else {int: "an integer", float: "a number"}[type(value)]
            raise ConfigError(f"{name}: expected {expected}; got {text!r}")


Rule = tuple[Callable[[Any], bool], str]  # whether a value is possible, and what is expected


def _number(
    low: float, high: float = float("inf"), *, above: bool = False, below: bool = False
) -> Rule:
    interval = f"a number {'>' if above else '>='} {low:g}"
    if high < float("inf"):
        interval += f" and {'<' if below else '<='} {high:g}"

    def possible(value: Any) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (value > low if above else value >= low)
            and (value < high if below else value <= high)
            and value < float("inf")
        )

    return possible, interval


def _integer(low: int, high: int | None = None) -> Rule:
    def possible(value: Any) -> bool:
        return (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value >= low
            and (high is None or value <= high)
        )

    return possible, f"an integer >= {low}" + ("" if high is None else f" and <= {high}")


def _one_of(*values: str) -> Rule:
    return (lambda value: value in values), f"one of {', '.join(values)}"


def _epochs(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and all(_number(0)[0](v) for v in value)
    return numbers and list(value) == sorted(set(value))


def _reads_as(number: type, text: str) -> bool:
    try:
        number(text)
    except ValueError:
        return False
    return True


_DIRECTORY: Rule = (
    lambda value: value is None or isinstance(value, str | os.PathLike),
    "a path, or None for the default of tensorflow-datasets",
)
_SCHEDULE: Mapping[str, Any] = {
    "epochs": _integer(1),
    "learning_rate": _number(0, above=True),
    "drops": (_epochs, "epochs in ascending order, such as (150, 225)"),
}

FIELDS: Mapping[str, Any] = {
    "seed": _integer(0, 2**32 - 1),  # of larger ones JAX would use the last 32 bits
    "method": _one_of(*METHODS),
    "target": _number(0, 1, above=True),
    "batch_size": _integer(1),
    "dtype": _one_of(*DTYPES),
    "log_every": _integer(1),
    "model": None,
    "data": {"name": _one_of(*sources.NAMES), "dir": _DIRECTORY},
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
        "min_channels": _integer(1),
    },
    "converge": _SCHEDULE,
    "baseline": _SCHEDULE,
}


def _check_group(prefix: str, config: Any, rules: Mapping[str, Any]) -> None:
    if not isinstance(config, ConfigDict):
        name = f"config.{prefix}".rstrip(".")
        raise ConfigError(f"{name}: expected fields {', '.join(sorted(rules))}; got {config!r}")
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
            shown = value.to_dict() if isinstance(value, ConfigDict) else value
            raise ConfigError(f"config.{prefix}{name}: expected {rule[1]}; got {shown!r}")
