"""What a run leaves for people: a page, a table of its layers, a summary, and plots.

Makes the page of a run again, finished or not, or one page that compares several runs.

    python -m dhp_jax.report runs/resnet20                 # writes runs/resnet20/report.html;
        # with targets, the pages of all sizes and runs/resnet20/compare.html
    python -m dhp_jax.report runs/resnet20 runs/resnet56   # writes compare.html
"""

import argparse
from collections.abc import Mapping, Sequence
import importlib.metadata
import json
import logging
import os
from pathlib import Path
from typing import Any

from dhp_jax import checkpoint, command, durable, journal, sizes
from dhp_jax.methods import METHODS
from dhp_jax.report.comparison import comparison
from dhp_jax.report.crops import crops
from dhp_jax.report.page import Told, page
from dhp_jax.report.plots import plots
from dhp_jax.report.wording import (
    faster,
    layer_table,
    main_metric,
    metrics_text,
    milliseconds,
    percent,
    start_text,
)
from dhp_jax.result import PICTURES, SUMMARY, Result, configuration, read, read_summary
from dhp_jax.source import folder_of
from dhp_jax.tasks.task import METRICS
from dhp_jax.timing import hardware, measure_latency, quartiles

__all__ = [
    "LAYERS",
    "PAGE",
    "PICTURES",
    "PLOTS",
    "SUMMARY",
    "beside",
    "hardware",
    "latency",
    "layer_table",
    "main",
    "main_metric",
    "metrics_text",
    "plots",
    "read",
    "read_baseline",
    "summarize",
    "summary_text",
    "text",
    "versions",
    "write",
    "write_comparison",
    "write_page",
    "write_sizes",
]

logger = logging.getLogger(__name__)

PAGE = "report.html"
COMPARED = "compare.html"
LAYERS = "layers.md"
PLOTS = "plots"
PACKAGES = ("dhp_jax", "jax", "jaxlib", "flax", "optax", "numpy")


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
    result = read(workdir)
    if not result.finished:
        raise ValueError(f"run: expected a run that is finished; got {str(workdir)!r}")
    unpruned = None if baseline is None else _comparable(result, baseline)
    return _write(result, unpruned, baseline, latency(result))


def _write(
    result: Result,
    unpruned: Mapping[str, Any] | None,
    baseline: str | os.PathLike | None,
    times: Mapping[str, Any] | None,
) -> dict[str, Any]:
    summary = summarize(result, unpruned, times)
    durable.write(result.workdir / SUMMARY, json.dumps(summary, indent=1) + "\n")
    (result.workdir / LAYERS).write_text(layer_table(result.before, result.after))
    pictured = None if unpruned is None else Path(baseline)
    _save_plots(result, unpruned, pictured)
    durable.write(result.workdir / PAGE, page(Told(result, summary), crops(result, pictured)))
    return summary


def _save_plots(result: Result, unpruned: Mapping[str, Any] | None, pictured: Path | None) -> None:
    for name, figure in plots(result, unpruned, pictured).items():
        folder = result.workdir / PLOTS
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")


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
    path = Path(out) if out is not None else result.workdir / PAGE
    _renew(result, path, baseline=baseline, measure=measure)
    return path


def _renew(
    result: Result, path: Path, *, baseline: str | os.PathLike | None, measure: bool
) -> Told:
    """Writes the page of a run; returns what it tells."""
    unpruned = None if baseline is None else _comparable(result, baseline)
    run = _told(result, unpruned, baseline)
    if measure:
        run = Told(result, {**run.summary, "latency": latency(result, again=True)})
        durable.write(result.workdir / SUMMARY, json.dumps(run.summary, indent=1) + "\n")
    pictured = None if unpruned is None else Path(baseline)
    durable.write(path, page(run, crops(result, pictured)))
    return run


def _told(
    result: Result,
    unpruned: Mapping[str, Any] | None = None,
    baseline: str | os.PathLike | None = None,
) -> Told:
    """A run with its summary, which is made if it lacks it, and brought up to the baseline."""
    if not result.finished:
        return Told(result, None)
    if not result.summary:
        return Told(result, _write(result, unpruned, baseline, None))
    beside = result.summary if unpruned is None else result.summary | _unpruned(result, unpruned)
    if beside != result.summary:
        durable.write(result.workdir / SUMMARY, json.dumps(beside, indent=1) + "\n")
        _save_plots(result, unpruned, Path(baseline))
    return Told(result, beside)


def _unpruned(result: Result, unpruned: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary says of the run of the unpruned network."""
    return {
        "test": result.summary["test"] | {"unpruned": unpruned["test"]["last"]},
        "unpruned_epochs": unpruned["phases"]["baseline"]["epochs"],
    }


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
    content = comparison([_told(read(workdir)) for workdir in workdirs])
    durable.write(Path(out), content)
    return Path(out)


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
      baseline: directory of a finished run of the unpruned network, which is compared with them;
        left out if there is none.
      measure: whether to measure the latency of those that are finished, here and now, and note it
        in their `summary.json`.
      out: the file; `compare.html` in `workdir` if not given.

    Returns:
      The file.

    Raises:
      ValueError: no size has begun, or there is nothing yet to be measured.
    """
    results = [read(folder) for folder in sizes.begun(workdir) or [workdir]]
    if measure and not any(result.finished for result in results):
        raise ValueError(f"latency: expected a size that is finished; got {str(workdir)!r}")
    runs = [
        _renew(
            result,
            result.workdir / PAGE,
            baseline=baseline,
            measure=measure and result.finished,
        )
        for result in results
    ]
    path = Path(out) if out is not None else Path(workdir) / COMPARED
    content = comparison([*_whole(results[0], baseline), *runs], sizes.absent(workdir))
    durable.write(path, content)
    return path


def _whole(result: Result, baseline: str | os.PathLike | None) -> list[Told]:
    """The run of the unpruned network, if there is one that compares with a run."""
    if baseline is None or _comparable(result, baseline) is None:
        return []
    return [_told(read(baseline))]


def latency(result: Result, *, again: bool = False) -> dict[str, Any]:
    """Times of the forward pass of a finished run's network, and of the unpruned one.

    Args:
      result: the run.
      again: whether to measure them even if its summary has those of these networks.

    Returns:
      A row for one input and one for the batch of the configuration, with quartiles of the
      milliseconds and of the speed-up of pairs of passes.
    """
    names = [name for name in ("search", "model") if name in result.notes]
    of = [checkpoint.read_description(result.workdir / name)["sha256"] for name in names]
    known = (result.summary or {}).get("latency")
    if known and known["of"] == of and not again:
        return known
    networks = {"before": result.unpruned()} if result.pruned else {}
    networks["after"] = result.trained
    batches = sorted({1, result.config["batch_size"]})
    return {
        "batches": [_timed(networks, result.input_shape, batch) for batch in batches],
        "input_shape": list(result.input_shape),
        "hardware": hardware(),
        "of": of,
    }


def _timed(networks: Mapping[str, Any], shape: Sequence[int], batch: int) -> dict[str, Any]:
    times = measure_latency(networks, shape, batch)
    row = {"batch": batch, "rounds": len(times["after"])}
    row |= {f"{name}_ms": quartiles(values) for name, values in times.items()}
    if "before" in times:
        pairs = zip(times["before"], times["after"], strict=True)
        row["speedup"] = quartiles([before / after for before, after in pairs])
    return row


def beside(workdir: str | os.PathLike, config: Mapping[str, Any]) -> str:
    """Where the run of the unpruned network lies if no other place is given.

    Args:
      workdir: directory of a run, such as `runs/NAME` or `runs/NAME-METHOD`, or of one of its
        sizes, such as `runs/NAME/0.5`.
      config: its configuration.

    Returns:
      Its source if that is a baseline that is there, and otherwise `runs/NAME-baseline`.
    """
    method = config["method"]
    begun = METHODS[method].source
    if begun is not None and not METHODS[begun].prunes and folder_of(config).is_dir():
        return str(folder_of(config))
    whole = Path(os.path.abspath(workdir))
    own, of_all = (
        f"{str(folder).removesuffix(f'-{method}')}-baseline" for folder in (whole, whole.parent)
    )
    found = of_all if sizes.is_size(whole) and not Path(own).is_dir() else own
    return found if os.path.isabs(workdir) else os.path.relpath(found)


def read_baseline(directory: str | os.PathLike) -> dict[str, Any]:
    """The summary of a finished run of the unpruned network.

    Raises:
      ValueError: there is none, or it lacks something.
    """
    path = Path(directory) / SUMMARY
    summary = read_summary(path) if path.is_file() else {}
    if summary.get("method") != "baseline":
        raise ValueError(
            "baseline: expected the directory of a finished run with config.method=baseline; "
            f"got {str(directory)!r}"
        )
    return summary


def summarize(
    result: Result,
    unpruned: Mapping[str, Any] | None = None,
    times: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The outcome of a run in numbers: metrics on the test data, cost, times.

    Args:
      result: the run.
      unpruned: the summary of a run with `method="baseline"`.
      times: from `latency`.
    """
    notes, trained = result.notes, result.notes["model"]["phase"]
    test = {"last": trained["last"], "best": trained["best"]}
    if notes["model"]["without_network"]:
        test["without_network"] = notes["model"]["without_network"]
    phases = {}
    if "search" in notes:
        test["after_search"] = notes["search"]["phase"]["last"]
        phases["search"] = notes["search"]["phase"]
    if result.prunes:
        if not result.method.fresh:
            test["after_pruning"] = notes["pruned"]["test"]
        test["unpruned"] = unpruned and unpruned["test"]["last"]
    phases[result.phases[-1]] = trained
    return {
        "method": result.config["method"],
        "task": result.config["task"],
        "model": result.config["model"],
        "data": result.config["data"]["name"],
        "seed": result.config["seed"],
        "target": result.config["target"] if result.prunes else None,
        "origin": result.origin,
        "test": test,
        "flops": _change(result.before.flops, result.after.flops),
        "params": _change(result.before.params, result.after.params),
        "budgets": result.budgets,
        "latency": times,
        "phases": phases,
        "unpruned_epochs": unpruned and unpruned["phases"]["baseline"]["epochs"],
        "seconds": sum(phase["seconds"] for phase in phases.values()),
        "hardware": hardware(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary as a few lines for a terminal."""
    test, phases = summary["test"], summary["phases"]
    trained = phases.get("converge") or phases["baseline"]
    metric = METRICS[main_metric(test["last"])]
    rows = []
    if "without_network" in test:
        rows.append((f"test {metric.label}, input", metrics_text(test["without_network"])))
    if METHODS[summary["method"]].prunes:
        epochs = summary["unpruned_epochs"]
        unpruned = (
            "unknown" if epochs is None else f"{metrics_text(test['unpruned'])} (epoch {epochs})"
        )
        rows.append(("  unpruned" if rows else f"test {metric.label}, unpruned", unpruned))
    if "after_search" in test:
        reached = f"(epoch {phases['search']['epochs']})"
        rows.append(("  after the search", f"{metrics_text(test['after_search'])} {reached}"))
    if "after_pruning" in test:
        rows.append(("  after pruning", metrics_text(test["after_pruning"])))
    rows += [
        (
            f"test {metric.label}, last epoch",
            f"{metrics_text(test['last'])} (epoch {trained['epochs']})",
        ),
        (
            "  best epoch",
            f"{metrics_text(test['best'])} (epoch {trained['best_epoch']}, by test {metric.label})",
        ),
    ]
    for name, label in (("flops", "FLOPs"), ("params", "params")):
        change = summary[name]
        text = f"{change['after']:,}"
        if METHODS[summary["method"]].prunes:
            text = f"{change['before']:,} -> {text} ({percent(change['ratio'])})"
        rows.append((label, text))
    rows += _budget_rows(summary.get("budgets", {}))
    rows += _latency_rows(summary.get("latency"))
    begun = start_text(summary)
    rows += [("starts from", begun)] if begun else []
    rows.append(("time", f"{summary['seconds']:.0f} s on {summary['hardware']}"))
    if "search" in phases and not phases["search"]["met_budget"]:
        rows.append(
            ("note", "the search ran out of epochs; the network was pruned to its budget anyway")
        )
    skipped = {name: phase["skipped"] for name, phase in phases.items() if phase["skipped"]}
    if skipped:
        counts = ", ".join(f"{count} in the {name} phase" for name, count in skipped.items())
        rows.append(("note", f"batches skipped because they were not finite: {counts}"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def _budget_rows(budgets: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The budgets that no other line tells of."""
    rows = []
    for name, row in budgets.items():
        if name == "latency":
            ratio = {key: percent(value) for key, value in row["ratio"].items()}
            text = "measured {median} ({low} to {high}) of the whole's".format(**ratio)
            text += f", predicted {percent(row['predicted'])}; asked for {percent(row['asked'])}"
            rows.append((f"time, batch {row['batch']}", text))
        elif name == "activations":
            text = f"{percent(row['counted'])}; asked for {percent(row['asked'])}"
            rows.append((name, text))
    return rows


def _latency_rows(latency: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The latency of one input and of a batch in words."""
    rows = []
    for row in latency["batches"] if latency else []:
        shown = milliseconds(row["after_ms"]["median"])
        if "before_ms" in row:
            before = milliseconds(row["before_ms"]["median"])
            shown = f"{before} -> {shown}; {faster(row['speedup'])}"
        rows.append((f"latency, batch {row['batch']}", shown))
    return rows


def text(workdir: str | os.PathLike, summary: Mapping[str, Any]) -> str:
    """What to tell at the end of a run: the layers, the summary, and where everything is."""
    workdir, prunes = Path(workdir), METHODS[summary["method"]].prunes
    paths = [
        (
            "pruned network" if prunes else "network",
            f'{workdir / "model"}   (dhp.load("{workdir / "model"}"))',
        ),
        ("of best epoch", str(workdir / "best")),
        ("summary", str(workdir / SUMMARY)),
        ("layers", str(workdir / LAYERS)),
        ("plots", str(workdir / PLOTS)),
        ("records", f"{workdir / journal.RECORDS}, {workdir / 'tensorboard'}"),
        ("report", str(workdir / PAGE)),
    ]
    return "\n".join(
        [
            "",
            *([(workdir / LAYERS).read_text()] if prunes else []),
            summary_text(summary),
            "",
            *(f"{label:<16} {path}" for label, path in paths),
        ]
    )


def _comparable(result: Result, baseline: str | os.PathLike) -> dict[str, Any] | None:
    """The summary of a finished run of the same network, unpruned, on the same data; or `None`."""
    if not result.prunes:
        return None
    if not (Path(baseline) / SUMMARY).is_file():
        return None
    try:
        summary = read_baseline(baseline)
    except ValueError as error:
        logger.warning("%s; left out", error)
        return None
    config = result.config
    network = config["task"], config["model"], config["data"]["name"]
    same = (summary["task"], summary["model"], summary["data"]) == network
    if result.finished:
        inputs = result.notes["model"]["without_network"] or None  # tells test images apart
        same = same and summary["test"].get("without_network") == inputs
    if not same:
        logger.warning("baseline: %s is of another network or other data; left out", baseline)
        return None
    return summary


def main(arguments: Sequence[str]) -> None:
    """Makes pages as the command line says, and prints where they are."""
    parser = command.Parser(
        prog="python -m dhp_jax.report",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help=f"RUN/{PAGE}, for a run with targets RUN/{COMPARED}, for several runs {COMPARED}, if "
        "not given",
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        help="run of the unpruned network to compare with; RUN-baseline if not given",
    )
    parser.add_argument(
        "--latency", action="store_true", help="measure the latency here and now, and note it"
    )
    print(_make(parser.parse_args(arguments)))


def _make(options: argparse.Namespace) -> Path:
    if options.out is not None:
        if Path(options.out).is_dir():
            raise ValueError(f"--out: expected a file; got the folder {options.out!r}")
        if not Path(options.out).parent.is_dir():
            raise ValueError(
                f"--out: expected a file in a folder that is there; got {options.out!r}"
            )
    if len(options.runs) > 1:
        for name in ("baseline", "latency"):
            if getattr(options, name):
                raise ValueError(f"--{name}: expected one run with it; got {len(options.runs)}")
        runs = [run for workdir in options.runs for run in sizes.begun(workdir) or [workdir]]
        return write_comparison(runs, options.out or COMPARED)
    (workdir,) = options.runs
    if options.baseline is not None:
        read_baseline(options.baseline)
    several = sizes.begun(workdir)
    config = configuration(several[0] if several else workdir)
    baseline = options.baseline or beside(workdir, config)
    make = write_sizes if several else write_page
    return make(workdir, baseline=baseline, measure=options.latency, out=options.out)


def _change(before: int, after: int) -> dict[str, Any]:
    return {"before": before, "after": after, "ratio": after / before}
