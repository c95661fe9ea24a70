"""The page of several runs of one task, compared."""

from collections.abc import Mapping, Sequence
from typing import Any

from dhp_jax.budgets.layer_table import compact, percent
from dhp_jax.errors import in_row
from dhp_jax.report.charts import Dot, Line, Rule, dot_chart, line_chart
from dhp_jax.report.figures import Chart
from dhp_jax.report.format import duration, milliseconds, timed_batches, upper_first
from dhp_jax.report.render import Cell, Table, render
from dhp_jax.report.run_report import RunReport, tested_task, when
from dhp_jax.workdir.target_dirs import is_size

QUARTILES = ("low", "median", "high")


def comparison(
    runs: Sequence[RunReport], charts: Mapping[str, Chart], absent: Sequence[str] = ()
) -> str:
    """The page as HTML, of at least one run, with those of `comparison_charts` that are given.

    `absent` are names of runs that belong to them and have not begun.

    Raises:
      ValueError: the runs are not of the same task.
    """
    check_same_task(runs)
    names, metric = labels(runs), runs[0].metric
    pairs = list(zip(names, runs, strict=True))
    data = sorted({str(run.result.config["data"].get("name")) for run in runs})
    differing = (
        f"the runs are of different data ({', '.join(data)}): their {metric.label} does not compare"
    )
    folders = [
        [name, run.network, run.result.config["method"], str(run.result.workdir)]
        for name, run in pairs
    ]
    return render(
        "compare.html",
        title=f"{len(runs)} runs compared" if len(runs) > 1 else "1 run",
        remarks=[differing] if len(data) > 1 else [],
        unfinished=[f"{name}: {what}" for name, run in pairs for what in run.missing()]
        + [f"{name}: has not begun" for name in absent],
        metric=upper_first(metric.label),
        table=_table(names, runs),
        timed=any(timed_batches(run.summary) for run in runs),
        hardware=_differing(
            {n: r.summary["latency"]["hardware"] for n, r in pairs if timed_batches(r.summary)}
        ),
        networks=sorted({run.network for run in runs}),
        cost=[charts[name] for name in ("flops", "params", "speedup") if name in charts],
        training=[charts[name] for name in ("loss", "test") if name in charts],
        folders=Table(["run", "network", "method", "folder"], folders),
    )


def check_same_task(runs: Sequence[RunReport]) -> None:
    """Raises a `ValueError` unless all runs are of one task, with the same settings."""
    first = runs[0].result
    for run in runs[1:]:
        one, other = first.config["task"], run.result.config["task"]
        if tested_task(one) != tested_task(other):
            raise ValueError(
                f"run: expected runs of one task to compare; got {_task(one)} in {first.workdir} "
                f"and {_task(other)} in {run.result.workdir}"
            )


def _task(task: dict[str, Any]) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in task.items() if k != "name")
    return f"{task.get('name')} ({settings})" if settings else str(task.get("name"))


def labels(runs: Sequence[RunReport]) -> list[str]:
    """The last parts of the runs' paths, as many as tell them apart."""
    paths = [run.result.workdir.absolute().parts for run in runs]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


def _differing(places: Mapping[str, str]) -> str:
    """Where each run was timed, if that was not in one place."""
    several = len(set(places.values())) > 1
    return "; ".join(f"{name} on {place}" for name, place in places.items()) if several else ""


def _table(names: Sequence[str], runs: Sequence[RunReport]) -> Table:
    batches = sorted({row["batch"] for run in runs for row in timed_batches(run.summary)})
    label = f"test {runs[0].metric.label}"
    header = ["run", f"{label}, last epoch", f"{label}, best epoch", "FLOPs", "params"]
    for batch in batches:
        header += [f"{what}, batch\u00a0{batch}" for what in ("latency", "speed-up")]
    rows = [
        [
            Cell(name, colour=place),
            *_scores(run),
            *_costs(run),
            *(cell(run, batch) for batch in batches for cell in (_latency, _faster)),
            duration(run.summary["seconds"]) if run.summary else "",
            run.result.config.get("seed", ""),
        ]
        for place, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    counts = {run.test_examples for run in runs} - {None}
    note = ""
    if counts and runs[0].metric.name == "error":
        shown = " or ".join(f"{count:,}" for count in sorted(counts))
        note = f"Below each error is its 95 % interval (Wilson's), of {shown} test examples. "
    return Table([*header, "time", "seed"], rows, note=(note + _best_note(names, runs)).strip())


def _best_note(names: Sequence[str], runs: Sequence[RunReport]) -> str:
    """Of which runs the best epoch was chosen on the test data themselves."""
    finished = [(name, run.summary) for name, run in zip(names, runs, strict=True) if run.summary]
    on_test = [name for name, summary in finished if not summary.get("validation")]
    if not on_test:
        return "Best epochs are those of the validation data." if finished else ""
    of = f" of {in_row(on_test)}" if len(on_test) < len(finished) else ""
    return f"The best epoch{of} is chosen on the test data, so its value is rather too good."


def _scores(run: RunReport) -> list[Cell]:
    metric, name = run.metric, run.metric.name
    if run.summary:
        values = [run.summary["test"][which][name] for which in ("last", "best")]
        return [Cell(metric.text(value), run.interval(metric, value)) for value in values]
    last = run.last_tested
    if last is None:
        return [Cell("not finished"), Cell("")]
    value = last[f"test_{name}"]
    more = "; ".join(filter(None, [when(last), run.interval(metric, value)]))
    return [Cell(f"{metric.text(value)} so far", more), Cell("")]


def _costs(run: RunReport) -> list[Cell]:
    cells = []
    for name in ("flops", "params"):
        change, last = _change(run, name), run.last_ratio
        if change:
            cells.append(Cell(compact(change["after"]), percent(change["ratio"])))
        elif last:
            ratio = percent(last[f"{name}_ratio"])
            cells.append(Cell(f"{ratio} so far", f"after step {last['step']}"))
        else:
            cells.append(Cell(""))
    return cells


def _change(run: RunReport, name: str) -> Mapping[str, Any] | None:
    """What a run's network costs, once it has been pruned."""
    if run.summary:
        return run.summary[name]
    if run.result.before is None or run.result.after is None:
        return None
    before, after = (getattr(cost, name) for cost in (run.result.before, run.result.after))
    return {"after": after, "ratio": after / before}


def _value(run: RunReport) -> float | None:
    """What the network that a run leaves came to on the test data, so far if it is not finished."""
    metric, last = run.metric, run.last_tested
    if run.summary:
        return metric.factor * run.summary["test"]["last"][metric.name]
    if last is None or run.result.after is None or last["phase"] != run.result.method.phases[-1]:
        return None
    return metric.factor * last[f"test_{metric.name}"]


def _speedup(run: RunReport, batch: int) -> dict[str, float] | None:
    """Quartiles of pairs of passes; an unpruned network is as fast as itself."""
    for row in timed_batches(run.summary):
        if row["batch"] == batch:
            return row.get("speedup") if run.result.method.prunes else dict.fromkeys(QUARTILES, 1.0)
    return None


def _latency(run: RunReport, batch: int) -> str:
    (row,) = [row for row in timed_batches(run.summary) if row["batch"] == batch] or [{}]
    return milliseconds(row["after_ms"]["median"]) if "after_ms" in row else ""


def _faster(run: RunReport, batch: int) -> Cell:
    speedup = _speedup(run, batch)
    if speedup is None or not run.result.method.prunes:
        return Cell("" if speedup is None else "1")
    return Cell(f"{speedup['median']:.2f}", "{low:.2f} to {high:.2f}".format(**speedup))


def comparison_charts(runs: Sequence[RunReport]) -> dict[str, Chart]:
    """The charts that runs have left enough for, by name."""
    return _cost_charts(labels(runs), runs) | _training_charts(labels(runs), runs)


def _cost_charts(names: Sequence[str], runs: Sequence[RunReport]) -> dict[str, Chart]:
    """The metric against FLOPs, params and speed-up; sizes of one search are joined."""
    metric, charts = runs[0].metric, {}
    placed = [(i, run, y) for i, run in enumerate(runs) if (y := _value(run)) is not None]
    axis = {"y": f"test {metric.label}, {metric.unit}", "log": not metric.higher_is_better}

    def chart(label: str, dots: Sequence[tuple[float, Sequence[float]]], **options: Any) -> Chart:
        shown = []
        for (place, run, y), (x, spread) in zip(placed, dots, strict=True):
            name = names[place] if run.summary else f"{names[place]}, so far"
            folder = run.result.workdir.absolute()
            group = folder.parent if is_size(folder) else None
            shown.append(Dot(name, x, y, place, spread, group))
        return dot_chart(f"{upper_first(metric.label)} against {label}", shown, **axis, **options)

    for name, label in (("flops", "FLOPs"), ("params", "params")) if placed else ():
        counts = [_change(run, name)["after"] for _, run, _ in placed]
        unit, size = _unit(max(counts))
        x = f"{label}, {unit}" if unit else label
        charts[name] = chart(label, [(count / size, ()) for count in counts], x=x, x_low=0)
    placed = [(i, run, y) for i, run, y in placed if run.summary]
    of_each = [
        {row["batch"] for row in timed_batches(run.summary) if _speedup(run, row["batch"])}
        for _, run, _ in placed
    ]
    if common := set.intersection(*of_each) if of_each else None:
        quartiles = [_speedup(run, max(common)) for _, run, _ in placed]
        charts["speedup"] = chart(
            f"speed-up, batch {max(common)}",
            [(row["median"], (row["low"], row["high"])) for row in quartiles],
            x="times as fast as unpruned",
            rules=[Rule("unpruned", 1.0, upright=True)],
            note="Bars are the quartiles of pairs of passes, pruned and unpruned.",
        )
    return charts


def _unit(largest: int) -> tuple[str, int]:
    """What numbers up to this one are counted in."""
    for unit, size in (("billions", 10**9), ("millions", 10**6), ("thousands", 10**3)):
        if largest >= size:
            return unit, size
    return "", 1


def _training_charts(names: Sequence[str], runs: Sequence[RunReport]) -> dict[str, Chart]:
    """Loss and metric over the steps of all runs."""
    metric, found = runs[0].metric, {}
    note = "A line is interrupted where a network was pruned."
    for chart, title, unit, name, factor, log in (
        ("loss", "Training loss", "", "loss", 1.0, True),
        (
            "test",
            f"Test {metric.label}",
            f", {metric.unit}",
            f"test_{metric.name}",
            metric.factor,
            not metric.higher_is_better,
        ),
    ):
        curves = [(i, run.curve(name, factor)) for i, run in enumerate(runs)]
        lines = [Line(names[i], curve, i) for i, curve in curves if curve]
        axes = {"x": "step, of all phases", "y": f"{title}{unit}", "log": log}
        if lines:
            found[chart] = line_chart(title, lines, note=note, **axes)
    return found
