"""A run's directory belongs to one configuration, and to one process at a time."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import os
from pathlib import Path
import shlex
from typing import Any

import filelock
from ml_collections import ConfigDict

from dhp_jax import files
from dhp_jax.config.fields import absent_values
from dhp_jax.config.methods import METHODS
from dhp_jax.errors import ConfigError

CONFIG, LOCK, COMMANDS = "config.json", ".lock", "command.txt"
CHECKPOINTS = "checkpoints"  # a folder for each phase
LEARNT = (f"{CHECKPOINTS}/*/[0-9]*", "search", "best", "model")  # exist once a step was trained
DATA = "data.json"  # what the data were when the run began

# Fields that may have another value when a run is started again in its directory.
MAY_CHANGE = (
    "log_every",
    "nonfinite",
    "source",  # `source_run.check` decides
    "data.dir",
    "data.archive",
    "data.streamed",  # `settle_data` decides
    "data.workers",
    "data.cache",
)

MAY_CHANGE_GROUPS = ("checkpoint.", "mesh.")
MAY_MOVE = ("data.test_dir", "model.weights")  # to another place, but they keep their name
MAY_GROW = ("search.epochs", "converge.epochs", "baseline.epochs")  # where learning rates drop


@contextlib.contextmanager
def hold(workdir: str | os.PathLike, config: ConfigDict) -> Iterator[None]:
    """Locks the directory of a run against other processes; makes it if it is not there.

    The operating system releases the lock when the process ends, even if it is killed.

    Raises:
      ConfigError: another process has the lock, the directory belongs to another configuration,
        or it cannot be written.
    """
    workdir = Path(workdir)
    check_directory(workdir, config)
    with contextlib.ExitStack() as stack:
        with refuse_unwritable(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(filelock.FileLock(workdir / LOCK, timeout=0))
            except filelock.Timeout:
                raise ConfigError(
                    "workdir",
                    detail=f"another process is at work in {workdir}; wait until it ends, or give "
                    "another --workdir",
                ) from None
            check_directory(workdir, config)
            files.write(workdir / CONFIG, json.dumps(_as_stored(workdir, config), indent=1))
        yield


def _as_stored(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """A configuration as it is stored: fields that may grow keep their value until `grow`."""
    kept, path = as_json(config), workdir / CONFIG
    if path.is_file():
        there = json.loads(path.read_text())
        for name in MAY_GROW:
            group, field = name.split(".")
            kept[group][field] = there[group][field]
    return kept


def read_field(workdir: str | os.PathLike, name: str) -> Any:
    """The value of a field, such as "converge.epochs", in the directory of a run."""
    return flatten(json.loads((Path(workdir) / CONFIG).read_text()))[name]


def grow(workdir: str | os.PathLike, name: str, value: int) -> None:
    """Stores a larger value of a field that may grow, once training goes beyond the old one."""
    path = Path(workdir) / CONFIG
    there = json.loads(path.read_text())
    group, field = name.split(".")
    there[group][field] = value
    files.write(path, json.dumps(there, indent=1))


def read_data_choice(workdir: str | os.PathLike) -> bool | None:
    """Whether the data of a run are streamed; `None` if the run has not begun."""
    path = Path(workdir) / DATA
    return _read_data_or_tell(path)["streamed"] if path.is_file() else None


def read_data_checksums(workdir: str | os.PathLike) -> dict[str, int]:
    """Checksums of the training and the test images that a run began with, if it noted them."""
    return _read_data(Path(workdir) / DATA)["checksums"]


def settle_data(
    workdir: str | os.PathLike,
    streamed: bool,
    checksums: Mapping[str, int],
    origin: Mapping[str, str] | None = None,
) -> None:
    """Stores what the data of a run are when it begins; later checks that they are the same.

    They may change until the first step is trained, for instance when a damaged file is replaced.
    So may the network that it starts from, whose digest `origin` has by the field that names it.
    """
    path, here = Path(workdir) / DATA, {"streamed": streamed, "checksums": dict(checksums)}
    here["origin"] = origin or {}
    learnt = any(any(path.parent.glob(pattern)) for pattern in LEARNT)
    if not path.is_file() or not learnt:
        files.write(path, json.dumps(here))
        return
    there = _read_data_or_tell(path)
    for split, checksum in there["checksums"].items():
        if checksums[split] != checksum:
            raise ConfigError(
                "config.data",
                detail=f"expected the {split} images that the run in {workdir} began with; got "
                "others (their names, sizes or statistics differ); give another --workdir, "
                f"or delete {path} to go on with these",
            )
    for field, digest in here["origin"].items():
        if there["origin"].get(field, digest) != digest:
            raise ConfigError(
                field,
                detail=f"expected the network that the run in {workdir} began with; got another "
                "one; give another --workdir",
            )
    if there["streamed"] != streamed:
        raise ConfigError(
            "config.data.streamed",
            f"{there['streamed']}, with which the run in {workdir} began",
            streamed,
        )


def typed(command: Sequence[str]) -> str:
    """A command line of a process as people type it; a console command is called by its name."""
    program, *given = command
    name = ["python", program] if program.endswith(".py") else [Path(program).name]
    return shlex.join([*name, *given])


def note_command(workdir: str | os.PathLike, command: Sequence[str]) -> None:
    """Adds a command line and the current folder to the commands of a run, unless it is there."""
    path = Path(workdir) / COMMANDS
    line = f"cd {shlex.quote(os.getcwd())} && {typed(command)}\n"
    there = path.read_text(errors="replace") if path.is_file() else ""
    if line not in there.splitlines(keepends=True):
        files.write(path, there + line)


def _read_data_or_tell(path: Path) -> dict[str, Any]:
    try:
        return _read_data(path)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigError(
            "workdir",
            detail=f"cannot read {path}: {error}; delete it if the data are those it began with",
        ) from error


def _read_data(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    noted = {"streamed": bool(found["streamed"]), "checksums": dict(found["checksums"])}
    return noted | {"origin": dict(found.get("origin", {}))}  # of which earlier runs have none


@contextlib.contextmanager
def refuse_unwritable(workdir: Path) -> Iterator[None]:
    """Turns an `OSError` in the block into a `ConfigError` about the directory."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            "workdir",
            detail=f"expected a directory that can be written; got {str(workdir)!r} "
            f"({error.strerror})",
        ) from error


def check_directory(workdir: str | os.PathLike, config: ConfigDict) -> None:
    """Raises a `ConfigError` unless a directory is new, empty, or has this configuration."""
    workdir = Path(workdir)
    if patterns := set("*?[").intersection(str(workdir.absolute())):  # Orbax looks there by pattern
        expected = f"a path without {' and '.join(sorted(patterns))}"
        raise ConfigError("workdir", expected, repr(str(workdir.absolute())))
    if why := files.why_unwritable(workdir):
        raise ConfigError("workdir", "a directory that can be written", f"{str(workdir)!r} ({why})")
    path = workdir / CONFIG
    if not path.is_file():
        ours = {LOCK, files.unfinished(path).name}
        if workdir.is_dir() and any(item.name not in ours for item in workdir.iterdir()):
            raise ConfigError("workdir", "a new or empty directory, or a run's", workdir)
        return
    try:
        there = flatten(dict(json.loads(path.read_text())))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "workdir",
            detail=f"{path} is no configuration: {error}; mend it, or give another --workdir",
        ) from error
    there = absent_values(there.get("task.name")) | there
    here = flatten(as_json(config))
    differing = [
        f"config.{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in {**here, **there}
        if there.get(name) != here.get(name) and not _may_differ(name, there, here)
    ]
    if differing:
        raise ConfigError(
            "workdir",
            detail=f"{workdir} holds a run with another configuration: {', '.join(differing)}; "
            "give another --workdir",
        )


def _may_differ(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether a field may have another value than the one that is stored; of flat fields."""
    before, now = there.get(name), here.get(name)
    if name in MAY_GROW:
        phase = name.removesuffix(".epochs")
        # Others fall to zero, or fade what is to go, until the last epoch.
        fades = phase == "search" and METHODS[here["method"]].fades
        fixed = fades or here[f"{phase}.schedule"] != "drops"
        return not fixed and isinstance(before, int) and isinstance(now, int) and now > before
    if name in MAY_MOVE:
        return len({path and Path(path).name for path in (before, now)}) == 1
    return name in MAY_CHANGE or name.startswith(MAY_CHANGE_GROUPS)


def stored_config(workdir: str | os.PathLike) -> ConfigDict:
    """The configuration of a run, with the fields that earlier code did not store."""
    there = json.loads((Path(workdir) / CONFIG).read_text())
    for name, value in absent_values(there["task"]["name"]).items():
        *groups, field = name.split(".")
        group = there
        for part in groups:
            group = group.setdefault(part, {})
        group.setdefault(field, value)
    return ConfigDict(there)


def as_json(config: ConfigDict) -> dict[str, Any]:
    """A configuration as JSON values."""
    return json.loads(config.to_json_best_effort())


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration by their full names, such as "converge.epochs"."""
    found = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        found |= flatten(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found
