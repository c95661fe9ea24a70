"""Several targets from one search: each gives a network, which converges on its own.

Each target has its own run in its own directory, and ends with the network that it would give
alone. The targets share the search. A search depends on the seed and the step, and the target only
says when it ends. So the search of a smaller target continues from the last checkpoint of the
search of a larger one.
"""

from collections.abc import Callable, Sequence
import contextlib
import os
from pathlib import Path
import shutil
from typing import Any

from ml_collections import ConfigDict

from dhp_jax.artifact.reading import exists, read_description
from dhp_jax.config.checks import check
from dhp_jax.config.methods import METHODS
from dhp_jax.distributed.processes import from_first
from dhp_jax.errors import ConfigError
from dhp_jax.pipeline import execution, preparation
from dhp_jax.pipeline.preparation import Run
from dhp_jax.report.write import write_sizes
from dhp_jax.train.checkpoints import Checkpoints, known_notes
from dhp_jax.train.phase import Observer
from dhp_jax.workdir import target_dirs
from dhp_jax.workdir.identity import CHECKPOINTS, CONFIG


def prepare(
    config: ConfigDict, workdir: str | os.PathLike, observers: Sequence[Observer] = ()
) -> list[Run]:
    """Checks everything that can be checked before work is done; see `preparation.prepare`.

    Args:
      config: with `targets`, or without for a single run.
      workdir: directory of the run; with `targets` it gets one for each, such as `workdir/0.75`.
      observers: are told how training goes.

    Returns:
      A run for each target, the largest first.
    """
    check(config)
    method = METHODS[config.method]
    if config.targets is None or not method.prunes:
        return [preparation.prepare(config, workdir, observers)]
    if not method.chooses:
        raise ConfigError(
            "config.targets",
            f"None with config.method={config.method!r}, whose source has a single target",
            tuple(config.targets),
        )
    if (Path(workdir) / CONFIG).is_file():
        raise ConfigError(
            "workdir", detail=f"{workdir} holds a run of a single target; give another --workdir"
        )
    runs = []
    for target in reversed(config.targets):  # what is out of reach comes before anything is made
        one = config.copy_and_resolve_references()
        one.update(target=target, targets=None)
        try:
            folder = Path(workdir) / target_dirs.folder_name(target)
            runs.append(preparation.prepare(one, folder, observers))
        except ConfigError as error:
            if error.field != "config.target":
                raise
            raise ConfigError.of("config.targets", error) from error
    return runs[::-1]


def execute(
    runs: Sequence[Run],
    workdir: str | os.PathLike,
    *,
    baseline: str | os.PathLike | None = None,
    stopping: Callable[[], bool] = lambda: False,
    command: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Carries out runs, or what is left of them, and with `targets` writes `compare.html`.

    Args:
      runs: from `prepare`.
      workdir: as for `prepare`.
      baseline, stopping, command: as for `execution.execute`.

    Returns:
      The summary of each.

    Raises:
      As `execution.execute`.
    """
    sized = runs[0].workdir != Path(workdir)
    if sized:
        from_first(lambda: target_dirs.note(workdir, [run.config.target for run in runs]))
    summaries = []
    for place, run in enumerate(runs):
        if place and not run.method.fades:  # which begins with trained weights
            larger = runs[place - 1].workdir
            from_first(lambda larger=larger, run=run: _continue_search(larger, run.workdir))
        summaries.append(
            execution.execute(run, baseline=baseline, stopping=stopping, command=command)
        )
    if sized:
        from_first(lambda: str(write_sizes(workdir, baseline=baseline)))
    return summaries


def _continue_search(larger: Path, smaller: Path) -> None:
    """Copies the last checkpoint before a larger target was met to a search that has not begun."""
    begun, folder = smaller / CHECKPOINTS / "search", larger / CHECKPOINTS / "search"
    if begun.exists() or exists(smaller / "search") or not folder.is_dir():
        return
    end = read_description(larger / "search")["notes"]["phase"]["steps"]
    with contextlib.closing(Checkpoints(folder)) as there:
        for step in there.steps():
            if step < end and known_notes(there, step):  # if not, an earlier one will do
                unfinished = begun.with_name("search.unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                shutil.copytree(folder / str(step), unfinished / str(step))
                unfinished.rename(begun)
                return
