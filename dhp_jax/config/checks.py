"""The check of a configuration, and of what the command line changes in it."""

import ast
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl.flags import BooleanParser
from ml_collections import ConfigDict, config_dict

from dhp_jax.config.fields import FIELDS, MAX_EXAMPLES, TASK_FIELDS, Field, fields_of
from dhp_jax.config.methods import METHODS, PHASES, TAUGHT
from dhp_jax.config.rules import PATH, or_none
from dhp_jax.errors import ConfigError, shown
from dhp_jax.models import registry
from dhp_jax.models.own import is_own

# How the text of a flag is read, by the type of its field, and what an error expects.
READERS: Mapping[type, tuple[Callable[[str], Any], str]] = {
    int: (int, "an integer"),
    float: (float, "a number"),
    bool: (BooleanParser().parse, "True or False"),
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
    for field, expected, got in _clashes(config):
        raise ConfigError(f"config.{field}", expected, got)


def _clashes(config: ConfigDict) -> Iterator[tuple[str, str, Any]]:
    """Fields whose value does not go with those of others: what was expected, and the value."""
    method, of_method = METHODS[config.method], f"for config.method={config.method}"
    steps = config.task.get("steps_per_epoch", 1)
    if steps * config.batch_size > MAX_EXAMPLES:
        most = MAX_EXAMPLES // config.batch_size
        examples = f"{MAX_EXAMPLES} examples of {config.batch_size} a step"
        yield "task.steps_per_epoch", f"at most {most}, for {examples}", steps
    if config.optimizer.nesterov and config.optimizer.name != "sgd":
        yield "optimizer.nesterov", f"False, for {config.optimizer.name} has none", True
    for phase in PHASES:
        epochs, warmup = config[phase].epochs, config[phase].warmup
        if warmup and warmup >= epochs:
            yield f"{phase}.warmup", f"less than {phase}.epochs={epochs}", warmup
    for phase in TAUGHT:
        weight = config[phase].distillation.weight
        if weight and (untaught := _why_untaught(config, phase)):
            yield f"{phase}.distillation.weight", f"0, {of_method} {untaught}", weight
    if config.per_flop and not method.ranks:
        expected = f"0, {of_method} ranks no channels by their importance"
        yield "per_flop", expected, config.per_flop


def _why_untaught(config: ConfigDict, phase: str) -> str:
    """Why no network is there that a phase could learn from; empty if one is."""
    method = METHODS[config.method]
    if not method.prunes:
        return "leaves no pruned network"
    if phase == "search" and not method.searches:
        return "has no search"
    if method.fresh:
        return "starts from fresh weights"
    if method.source is None and config.model.get("weights") is None:
        return "starts from no trained network without config.model.weights"
    return ""


def _check_filled_in(group: str, config: ConfigDict) -> None:
    """Raises for names that are no strings, and for placeholders that require a value."""
    try:
        names = list(config)
    except TypeError:  # it sorts them
        names = [None]
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(group, detail="expected strings as names of fields; got others")
        try:
            value = config[name]
        except config_dict.RequiredValueError:
            raise ConfigError(f"{group}.{name}", detail="expected a value; got none") from None
        if isinstance(value, ConfigDict):
            _check_filled_in(f"{group}.{name}", value)


def _check_source(config: ConfigDict) -> None:
    method, weights = METHODS[config.method], config.model.get("weights")
    needed = method.source
    if not or_none(PATH, "for fresh weights").allows(weights):
        raise ConfigError(
            "config.model.weights", "a path, or None for fresh weights", shown(weights)
        )
    from_source = needed is not None and config.source is not None
    if weights is not None and (from_source or (method.prunes and method.fresh)):
        start = "fresh weights" if method.fresh else "config.source"
        raise ConfigError(
            "config.model.weights",
            f"None, for a run with config.method={config.method} starts from {start}",
            shown(str(weights)),
        )
    if needed == "baseline" and weights is not None:
        return
    if needed is not None and config.source is None:
        weights = ", or config.model.weights in its place" if needed == "baseline" else ""
        raise ConfigError(
            "config.source",
            detail="expected the directory of a finished run with config.method="
            f"{' or '.join(method.sources)}{weights}, for config.method={config.method}; got None",
        )
    if needed is None and config.source is not None:
        raise ConfigError(
            "config.source",
            f"None, for config.method={config.method} starts from no other run",
            shown(str(config.source)),
        )


def _check_family(config: ConfigDict) -> None:
    name, task = config.model.get("name"), config.task.name
    if is_own(name):
        return
    families = sorted(family for family in registry.FAMILIES if registry.task_of(family) == task)
    if not isinstance(name, str) or name not in registry.FAMILIES:
        raise ConfigError.unknown("config.model.name", name, families)
    if name not in families:
        raise ConfigError(
            "config.model.name",
            detail=f"expected one of {', '.join(families)}, which are for {task}; got "
            f"{name!r}, which is for {registry.task_of(name)}",
        )


def check_overrides(config: ConfigDict, overrides: Mapping[str, str | None]) -> list[str]:
    """Raises a `ConfigError` for the first name that is no field, or text that is no value of it.

    Returns the names of those that become `None`.

    Args:
      config: the configuration whose fields are to be overridden.
      overrides: what the command line gives each field, such as `{"config.search.epochs": "50"}`;
        `None` where there is no "=".
    """
    absent = []
    for name, text in overrides.items():
        value, kind, rule, path = config, None, _fields(config), "config"
        for part in name.split(".")[1:]:
            if not isinstance(value, ConfigDict):
                raise ConfigError(name, detail=f"{path} has no fields, its value is {shown(value)}")
            if part not in value:
                hint = "; add other arguments of the network in the file"
                raise ConfigError.unknown(
                    f"{path}.{part}",
                    part,
                    value,
                    "unknown field: ",
                    hint if path == "config.model" else "",
                )
            kind = value.get_type(part)
            try:
                value = value[part]
            except config_dict.RequiredValueError:
                value = None
            path = f"{path}.{part}"
            rule = rule.get(part) if isinstance(rule, Mapping) else None
        if text is None:
            raise ConfigError(name, detail=f"expected --{name}=<value>; got none")
        if isinstance(value, ConfigDict) and not _is_dict(text):  # a group, and not a field
            first = next((n for n in ("name", "weight") if n in value), sorted(value)[0])
            raise ConfigError(
                name,
                detail=f"expected a field of it, such as --{name}.{first}=<value>; "
                f"got {shown(text)}",
            )
        if text == "None" and isinstance(rule, Field) and rule.rule.or_none:
            absent.append(name)
        elif kind in READERS and not _suits(READERS[kind][0], rule, text):
            expected = rule.rule.expected if isinstance(rule, Field) else READERS[kind][1]
            raise ConfigError(name, expected, shown(text))
    return absent


def _is_dict(text: str) -> bool:
    """Whether a text is a literal of a dict, such as "{'epochs': 3}"."""
    try:
        return isinstance(ast.literal_eval(text), dict)
    except (ValueError, SyntaxError):
        return False


def _suits(read: Callable[[str], Any], field: Any, text: str) -> bool:
    """Whether a text can be read as a value of a field, or is one itself."""
    try:
        read(text)
    except ValueError:
        return isinstance(field, Field) and field.rule.allows(text)
    return True


def _fields(config: ConfigDict) -> Mapping[str, Any]:
    """All fields; those of `task` and `data` depend on the task.

    Where that is none, fields of these two are not checked (`None`) but for `task.name`, whose
    rule tells.
    """
    task = config.get("task") if isinstance(config, ConfigDict) else None
    name = task.get("name") if isinstance(task, ConfigDict) else None
    if isinstance(name, str) and name in TASK_FIELDS:
        return fields_of(name)
    others = dict.fromkeys(task) if isinstance(task, ConfigDict) else {}
    any_task = fields_of("classification")["task"]
    return {**FIELDS, "data": None, "task": others | any_task}


def _check_group(prefix: str, config: Any, fields: Mapping[str, Any]) -> None:
    if not isinstance(config, ConfigDict):
        name = f"config.{prefix}".rstrip(".")
        expected = ", ".join(sorted(fields))
        raise ConfigError(name, f"fields {expected}", shown(config))
    for name in config:
        if name not in fields:
            raise ConfigError.unknown(f"config.{prefix}{name}", name, fields, "unknown field: ")
    for name, field in fields.items():
        if name not in config:
            raise ConfigError(f"config.{prefix}{name}", detail="missing")
        value = config[name]
        if isinstance(field, Mapping):
            _check_group(f"{prefix}{name}.", value, field)
        elif field is not None and not field.rule.allows(value):
            raise ConfigError(f"config.{prefix}{name}", str(field.rule), shown(value))
