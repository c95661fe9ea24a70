"""The directory of a run: of one configuration, and of one process at a time."""

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
from dhp_jax.errors import ConfigError
from dhp_jax.files import unfinished

CONFIG, LOCK, COMMANDS = "config.json", ".lock", "command.txt"


CHECKPOINTS = "checkpoints"  # a folder for each phase


LEARNT = (f"{CHECKPOINTS}/*/[0-9]*", "search", "best", "model")  # what is there after training


DATA = "data.json"  # what the data were when it began


# What may differ when a run is started again in its directory.
MAY_CHANGE = (
    "log_every",
    "nonfinite",
    "source",  # `dhp_jax.source.check` sees to it
    "data.dir",
    "data.archive",
    "data.streamed",  # `settle_data` sees to it
    "data.workers",
    "data.cache",
)


MAY_CHANGE_GROUPS = ("checkpoint.", "mesh.")


MAY_MOVE = ("data.test_dir",)  # may lie elsewhere, by the same name


MAY_GROW = ("search.epochs", "converge.epochs", "baseline.epochs")


@contextlib.contextmanager
def held(workdir: str | os.PathLike, config: ConfigDict) -> Iterator[None]:
    """Holds the directory of a run against other processes; made if it is not there.

    The operating system lets go of it when the process ends, whichever way.

    Raises:
      ConfigError: another process holds it, it is that of another configuration, or it cannot be
        written.
    """
    workdir = Path(workdir)
    _check(workdir, config)
    with contextlib.ExitStack() as stack:
        with written(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(filelock.FileLock(workdir / LOCK, timeout=0))
            except filelock.Timeout:
                raise ConfigError(
                    "workdir",
                    detail=f"another process is at work in {workdir}; wait until it ends, or give "
                    "another --workdir",
                ) from None
            _check(workdir, config)
            files.write(workdir / CONFIG, json.dumps(_kept(workdir, config), indent=1))
        yield


def _kept(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """A configuration as it is stored: what may grow stays as it was until `grow` is called."""
    kept, path = plain(config), workdir / CONFIG
    if path.is_file():
        there = json.loads(path.read_text())
        for name in MAY_GROW:
            group, field = name.split(".")
            kept[group][field] = there[group][field]
    return kept


def stored(workdir: str | os.PathLike, name: str) -> Any:
    """The value of a field, such as "converge.epochs", that the directory of a run holds."""
    return flat(json.loads((Path(workdir) / CONFIG).read_text()))[name]


def grow(workdir: str | os.PathLike, name: str, value: int) -> None:
    """Notes that a run has gone beyond what a field said that may grow."""
    path = Path(workdir) / CONFIG
    there = json.loads(path.read_text())
    group, field = name.split(".")
    there[group][field] = value
    files.write(path, json.dumps(there, indent=1))


def data_choice(workdir: str | os.PathLike) -> bool | None:
    """Whether the data of a run that has begun are streamed; `None` if it has not."""
    path = Path(workdir) / DATA
    return _data(path)["streamed"] if path.is_file() else None


def data_checksums(workdir: str | os.PathLike) -> dict[str, int]:
    """What tells the training and the test images of a run from others.

    Raises:
      KeyError, OSError, TypeError, ValueError: the directory does not tell.
    """
    return _read_data(Path(workdir) / DATA)["checksums"]


def settle_data(workdir: str | os.PathLike, streamed: bool, checksums: Mapping[str, int]) -> None:
    """Notes what the data of a run are when it begins, and later checks that they still are.

    They may change as long as nothing has been learnt from them, as when a damaged file is mended.

    Raises:
      ConfigError: they differ.
    """
    path, here = Path(workdir) / DATA, {"streamed": streamed, "checksums": dict(checksums)}
    learnt = any(any(path.parent.glob(pattern)) for pattern in LEARNT)
    if not path.is_file() or not learnt:
        files.write(path, json.dumps(here))
        return
    there = _data(path)
    for split, checksum in there["checksums"].items():
        if checksums[split] != checksum:
            raise ConfigError(
                "config.data",
                detail=f"expected the {split} images that the run in {workdir} began with; got "
                "others (their names, sizes or statistics differ); give another --workdir, "
                f"or delete {path} to go on with these",
            )
    if there["streamed"] != streamed:
        raise ConfigError(
            "config.data.streamed",
            f"{there['streamed']}, with which the run in {workdir} began",
            streamed,
        )


def note_command(workdir: str | os.PathLike, command: Sequence[str]) -> None:
    """Adds a command line, with the folder that it was given in, to those that a run has had."""
    path = Path(workdir) / COMMANDS
    line = f"cd {shlex.quote(os.getcwd())} && {shlex.join(['python', *command])}\n"
    there = path.read_text(errors="replace") if path.is_file() else ""
    if line not in there.splitlines(keepends=True):
        files.write(path, there + line)


def _data(path: Path) -> dict[str, Any]:
    try:
        return _read_data(path)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigError(
            "workdir",
            detail=f"cannot read {path}: {error}; delete it if the data are those it began with",
        ) from error


def _read_data(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    return {"streamed": bool(found["streamed"]), "checksums": dict(found["checksums"])}


@contextlib.contextmanager
def written(workdir: Path) -> Iterator[None]:
    """Tells of a directory that cannot be written by a `ConfigError`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            "workdir",
            detail=f"expected a directory that can be written; got {str(workdir)!r} "
            f"({error.strerror})",
        ) from error


def _check(workdir: Path, config: ConfigDict) -> None:
    """Raises a `ConfigError` unless a directory is new, empty, or that of this configuration."""
    path = workdir / CONFIG
    if not path.is_file():
        ours = {LOCK, unfinished(path).name}
        if workdir.is_dir() and any(item.name not in ours for item in workdir.iterdir()):
            raise ConfigError("workdir", "a new or empty directory, or a run's", workdir)
        return
    try:
        there = flat(dict(json.loads(path.read_text())))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "workdir",
            detail=f"{path} is no configuration: {error}; mend it, or give another --workdir",
        ) from error
    here = flat(plain(config))
    differing = [
        f"config.{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in {**here, **there}
        if there.get(name) != here.get(name) and not _may(name, there.get(name), here.get(name))
    ]
    if differing:
        raise ConfigError(
            "workdir",
            detail=f"{workdir} holds a run with another configuration: {', '.join(differing)}; "
            "give another --workdir",
        )


def _may(name: str, there: Any, here: Any) -> bool:
    """Whether a field may have another value than before."""
    if name in MAY_GROW:
        return isinstance(there, int) and isinstance(here, int) and here > there
    if name in MAY_MOVE:
        return len({path and Path(path).name for path in (there, here)}) == 1
    return name in MAY_CHANGE or name.startswith(MAY_CHANGE_GROUPS)


def plain(config: ConfigDict) -> dict[str, Any]:
    """A configuration as JSON values."""
    return json.loads(config.to_json_best_effort())


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration by their full names, such as "converge.epochs"."""
    found = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found
