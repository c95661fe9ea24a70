"""What a run leaves for people: a page, a table of its layers, a summary, and plots."""

from collections.abc import Mapping, Sequence
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from dhp_jax import files
from dhp_jax.activity import doing
from dhp_jax.budgets.layer_table import layer_table
from dhp_jax.report.comparison import comparison, comparison_charts
from dhp_jax.report.crops import Crop, crops, grid
from dhp_jax.report.figures import Chart
from dhp_jax.report.page import page
from dhp_jax.report.run_charts import run_charts
from dhp_jax.report.run_report import RunReport, tested_task
from dhp_jax.workdir import target_dirs
from dhp_jax.workdir.reader import SUMMARY, Result, read
from dhp_jax.workdir.summary import checksums, latency, read_baseline, summarize

logger = logging.getLogger(__name__)
PAGE = "report.html"
COMPARED = "compare.html"
LAYERS = "layers.md"
PLOTS = "plots"


class Unpruned(NamedTuple):
    """The run of the unpruned network that a run is compared with: its directory and summary."""

    folder: Path
    summary: Mapping[str, Any]


def write(
    workdir: str | os.PathLike, *, baseline: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Writes `report.html`, `summary.json`, `layers.md` and the plots of a finished run.

    The latency of its networks is measured, unless `summary.json` has it of the same networks.

    Args:
      workdir: directory of the run.
      baseline: directory of a finished run of the unpruned network; left out of the report if there
        is none.

    Returns:
      The summary.

    Raises:
      ValueError: the folder is not that of a run, or the run is not finished.
    """
    with doing("reading what the run has left"):
        result = read(workdir)
    if not result.finished:
        raise ValueError(f"run: expected a run that is finished; got {str(workdir)!r}")
    return _write(result, _comparable(result, baseline), latency(result))


@doing("writing the report")
def _write(
    result: Result, unpruned: Unpruned | None, times: Mapping[str, Any] | None
) -> dict[str, Any]:
    summary = summarize(result, unpruned and unpruned.summary, times)
    _save_summary(result, summary)
    files.write(result.workdir / LAYERS, layer_table(result.before, result.after))
    run = RunReport(result, summary)
    charts, pictures = run_charts(run), crops(result, unpruned and unpruned.folder)
    files.write(result.workdir / PAGE, page(run, charts, pictures))
    _save_plots(run, charts, pictures)
    return summary


def _save_summary(result: Result, summary: Mapping[str, Any]) -> None:
    files.write(result.workdir / SUMMARY, json.dumps(summary, indent=1) + "\n")


def _save_plots(run: RunReport, charts: Mapping[str, Chart], pictures: Sequence[Crop]) -> None:
    """Writes every chart of the page as PNG, for papers and slides."""
    folder = run.result.workdir / PLOTS
    folder.mkdir(exist_ok=True)
    for name, chart in charts.items():
        with files.naming(folder / f"{name}.png"):
            chart.save(folder / f"{name}.png")
    if pictures:
        grid(pictures).savefig(folder / "crops.png", dpi=150)


@doing("writing the page")
def write_page(
    workdir: str | os.PathLike,
    *,
    baseline: str | os.PathLike | None = None,
    measure: bool = False,
    out: str | os.PathLike | None = None,
) -> Path:
    """Writes the page of a run again, or that of one that is not finished.

    Numbers come from `summary.json`, which is made if a finished run lacks it.

    Args:
      workdir: directory of the run.
      baseline: directory of a finished run of the unpruned network, whose test metrics are then
        those in `summary.json` too; left out if there is none.
      measure: whether to measure the latency, here and now, and note it in `summary.json`.
      out: the file; `report.html` in `workdir` if not given.

    Returns:
      The file.

    Raises:
      ValueError: the folder is not that of a run, or there is nothing yet to be measured.
    """
    result = read(workdir)
    if measure and not result.finished:
        raise ValueError(f"latency: expected a run that is finished; got {str(workdir)!r}")
    path = Path(out or result.workdir / PAGE)
    _renew(result, path, baseline, measure)
    return path


def _renew(
    result: Result, path: Path, baseline: str | os.PathLike | None, measure: bool
) -> RunReport:
    """Writes the page of a run; returns what it tells."""
    unpruned = _comparable(result, baseline)
    run = _report(result, unpruned)
    if measure:
        run = RunReport(result, {**run.summary, "latency": latency(result, again=True)})
        _save_summary(result, run.summary)
    pictures = crops(result, unpruned and unpruned.folder)
    files.write(path, page(run, run_charts(run), pictures))
    return run


def _report(result: Result, unpruned: Unpruned | None = None) -> RunReport:
    """A run with its summary, which is made if it lacks it, and brought up to the baseline."""
    if not result.finished:
        return RunReport(result, None)
    if not result.summary:
        return RunReport(result, _write(result, unpruned, None))
    if unpruned is None:
        return RunReport(result, result.summary)
    told = {
        "test": result.summary["test"] | {"unpruned": unpruned.summary["test"]["last"]},
        "unpruned_epochs": unpruned.summary["phases"]["baseline"]["epochs"],
    }
    run = RunReport(result, result.summary | told)
    if run.summary != result.summary:
        _save_summary(result, run.summary)
        _save_plots(run, run_charts(run), crops(result, unpruned.folder))
    return run


@doing("writing the page")
def write_comparison(
    workdirs: Sequence[str | os.PathLike], out: str | os.PathLike = COMPARED
) -> Path:
    """Writes a page that compares runs of one task.

    Args:
      workdirs: directories of the runs, two or more.
      out: the file.

    Returns:
      The file.

    Raises:
      ValueError: a folder is not that of a run, or the tasks of the runs differ.
    """
    runs = [_report(read(workdir)) for workdir in workdirs]
    files.write(Path(out), comparison(runs, comparison_charts(runs)))
    return Path(out)


@doing("writing the pages")
def write_sizes(
    workdir: str | os.PathLike,
    *,
    baseline: str | os.PathLike | None = None,
    measure: bool = False,
    out: str | os.PathLike | None = None,
) -> Path:
    """Writes the pages of a run of several targets again, and one that compares its sizes.

    Args:
      workdir: directory of the run; not all of its sizes need be finished, or have begun.
      baseline: as for `write_page`; the unpruned network is compared with them.
      measure: as for `write_page`, of those that are finished.
      out: the file; `compare.html` in `workdir` if not given.

    Returns:
      The file.

    Raises:
      ValueError: no size has begun, or there is nothing yet to be measured.
    """
    results = [read(folder) for folder in target_dirs.begun(workdir) or [workdir]]
    if measure and not any(result.finished for result in results):
        raise ValueError(f"latency: expected a size that is finished; got {str(workdir)!r}")
    runs = [
        _renew(result, result.workdir / PAGE, baseline, measure and result.finished)
        for result in results
    ]
    if unpruned := _comparable(results[0], baseline):
        runs = [_report(read(unpruned.folder)), *runs]
    path = Path(out or Path(workdir) / COMPARED)
    files.write(path, comparison(runs, comparison_charts(runs), target_dirs.absent(workdir)))
    return path


def _comparable(result: Result, baseline: str | os.PathLike | None) -> Unpruned | None:
    """A finished run of the same network, unpruned, on the same data; `None` if there is none."""
    if baseline is None or not result.method.prunes or not (Path(baseline) / SUMMARY).is_file():
        return None
    try:
        summary = read_baseline(baseline)
    except ValueError as error:
        logger.warning("%s; left out", error)
        return None
    config = result.config
    network = tested_task(config["task"]), _network(config["model"]), config["data"]["name"]
    same = network == (tested_task(summary["task"]), _network(summary["model"]), summary["data"])
    if result.finished:
        inputs = result.notes["model"]["without_network"] or None  # tells test images apart
        same = same and summary["test"].get("without_network") == inputs
        held = (summary.get("validation") or {}).get("examples")  # it has not trained on these
        same = same and held == result.notes["model"].get("validation_examples")
        sums = checksums(result.notes["model"]), summary.get("checksums")
        same = same and (None in sums or sums[0] == sums[1])
    if not same:
        logger.warning("baseline: %s is of another network or other data; left out", baseline)
        return None
    return Unpruned(Path(baseline), summary)


def _network(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of a network, whatever weights it starts from."""
    return {name: value for name, value in model.items() if name != "weights"}
