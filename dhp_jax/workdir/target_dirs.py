"""The directory of a run with several targets: each target has a folder with its own run."""

from collections.abc import Sequence
import json
import os
from pathlib import Path

from dhp_jax import files
from dhp_jax.errors import some_of
from dhp_jax.workdir.identity import CONFIG, refuse_unwritable

TARGETS = "targets.json"  # the targets of the last command


def folder_name(target: float) -> str:
    """The name of a target's folder, such as "0.75" or "1"; no two targets share one."""
    return repr(float(target)).removesuffix(".0")


def note(workdir: str | os.PathLike, targets: Sequence[float]) -> None:
    """Stores the targets of a run when it begins; makes its directory if it is not there."""
    workdir = Path(workdir)
    with refuse_unwritable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        files.write(workdir / TARGETS, json.dumps([float(target) for target in targets]))


def begun(workdir: str | os.PathLike) -> list[Path]:
    """The directories of targets whose run has begun, the largest target first."""
    workdir = Path(workdir)
    if not workdir.is_dir() or (workdir / CONFIG).is_file():
        return []
    there = [path for path in workdir.iterdir() if is_size(path) and (path / CONFIG).is_file()]
    return sorted(there, key=lambda path: -float(path.name))


def absent(workdir: str | os.PathLike) -> list[str]:
    """The folders of stored targets whose run has not begun, the largest first."""
    path = Path(workdir) / TARGETS
    if not path.is_file():
        return []
    try:
        names = [folder_name(target) for target in json.loads(path.read_text())]
    except (TypeError, ValueError) as error:
        raise ValueError(f"run: {path}: expected a list of targets; {error}") from error
    there = {run.name for run in begun(workdir)}
    return [name for name in names if name not in there]


def is_size(path: Path) -> bool:
    """Whether the name of a folder is the name of a target's folder."""
    try:
        target = float(path.name)
    except ValueError:
        return False
    return 0 < target <= 1 and folder_name(target) == path.name


def hint(workdir: str | os.PathLike) -> str:
    """What an error adds where one run was expected and the directory holds some."""
    runs, kind = begun(workdir), "sizes"
    if not runs:
        runs, kind = sorted(path.parent for path in Path(workdir).glob(f"*/{CONFIG}")), "runs"
    return f"; it holds {kind}, give one of them: {some_of(runs, most=5)}" if runs else ""
