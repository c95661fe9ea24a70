"""The page of several runs of one task, compared."""

from collections.abc import Mapping, Sequence
from typing import Any

from dhp_jax.report import drawing
from dhp_jax.report.document import document, notice, section, table
from dhp_jax.report.drawing import Line, Rule
from dhp_jax.report.markup import Markup, element, joined
from dhp_jax.report.page import Told, curves, last_ratio, last_tested, missing, network, when
from dhp_jax.report.wording import compact, duration, milliseconds, percent
from dhp_jax.tasks.task import METRICS, Metric

QUARTILES = ("low", "median", "high")


def comparison(runs: Sequence[Told], absent: Sequence[str] = ()) -> str:
    """The page as HTML.

    Args:
      runs: at least one, with what they came to.
      absent: names of runs that belong to them and have not begun.

    Raises:
      ValueError: the runs are not of the same task.
    """
    check_same_task(runs)
    names = labels(runs)
    metric = METRICS[runs[0].metric]
    unfinished = [
        f"{name}: {what}"
        for name, run in zip(names, runs, strict=True)
        for what in missing(run.result)
    ]
    unfinished += [f"{name}: has not begun" for name in absent]
    data = {run.result.config["data"].get("name") for run in runs}
    differing = (
        f"the runs are of different data ({', '.join(sorted(map(str, data)))}): their "
        f"{metric.label} does not compare"
    )
    title = f"{len(runs)} runs compared" if len(runs) > 1 else "1 run"
    return document(
        title,
        element("header", element("h1", title)),
        notice("Note:", [differing] if len(data) > 1 else []),
        notice("Not finished:", unfinished),
        _table(names, runs, metric),
        section("cost", f"{_title(metric)} against cost", _cost(names, runs, metric)),
        section("training", "Training", _training(names, runs, metric)),
        section("runs", "Runs", _folders(names, runs)),
    )


def check_same_task(runs: Sequence[Told]) -> None:
    """Raises a `ValueError` unless all runs are of one task, with the same settings."""
    first = runs[0].result
    for run in runs[1:]:
        one, other = first.config["task"], run.result.config["task"]
        if one != other:
            raise ValueError(
                f"run: expected runs of one task to compare; got {_task(one)} in {first.workdir} "
                f"and {_task(other)} in {run.result.workdir}"
            )


def _task(task: dict[str, Any]) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in task.items() if k != "name")
    return f"{task.get('name')} ({settings})" if settings else str(task.get("name"))


def labels(runs: Sequence[Told]) -> list[str]:
    """The last parts of the runs' paths, as many as tell them apart."""
    paths = [run.result.workdir.absolute().parts for run in runs]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


def _table(names: Sequence[str], runs: Sequence[Told], metric: Metric) -> Markup:
    batches = sorted({row["batch"] for run in runs for row in _latencies(run)})
    header = ["run", f"test {metric.label}", "best epoch", "FLOPs", "params"]
    for batch in batches:
        header += [f"{what}, batch\u00a0{batch}" for what in ("latency", "speed-up")]
    header += ["time", "seed"]
    rows = []
    for place, (name, run) in enumerate(zip(names, runs, strict=True)):
        swatch = element("i", class_=f"swatch c{place % 8}")
        rows.append(
            [
                joined(swatch, name),
                *_scores(run, metric),
                *_costs(run),
                *(cell(run, batch) for batch in batches for cell in (_latency, _faster)),
                duration(run.summary["seconds"]) if run.summary else "",
                run.result.config.get("seed", ""),
            ]
        )
    note = element("p", _timed(names, runs), class_="soft") if batches else None
    return joined(table(header, rows), note)


def _timed(names: Sequence[str], runs: Sequence[Told]) -> str:
    """What a reader must know of the speed-ups."""
    text = (
        "Latency: the median, measured at the end of each run or when that was asked for. What "
        "was measured on different occasions does not compare; speed-ups do: how many times as "
        "fast a network is as its own run's unpruned network, both timed in turn, with the "
        "quartiles of pairs. Where these lie on both sides of 1 there is no difference beyond the "
        "noise."
    )
    measured = [(name, run) for name, run in zip(names, runs, strict=True) if _latencies(run)]
    places = {name: run.summary["latency"]["hardware"] for name, run in measured}
    if len(set(places.values())) > 1:
        where = "; ".join(f"{name} on {hardware}" for name, hardware in places.items())
        text += f" The hardware differs: {where}."
    networks = {network(run.result) for run in runs}
    if len(networks) > 1:
        text += f" The unpruned networks differ: {'; '.join(sorted(networks))}."
    return text


def _scores(run: Told, metric: Metric) -> list[Markup | str]:
    if run.summary:
        test = run.summary["test"]
        return [metric.text(test[which][metric.name]) for which in ("last", "best")]
    last = last_tested(run.result)
    if last is None:
        return ["not finished", ""]
    return [_with(f"{metric.text(last[f'test_{metric.name}'])} so far", when(last)), ""]


def _costs(run: Told) -> list[Markup | str]:
    cells = []
    for name in ("flops", "params"):
        change, last = _change(run, name), last_ratio(run.result)
        if change:
            cells.append(_with(compact(change["after"]), percent(change["ratio"])))
        elif last:
            ratio = percent(last[f"{name}_ratio"])
            cells.append(_with(f"{ratio} so far", f"after step {last['step']}"))
        else:
            cells.append("")
    return cells


def _change(run: Told, name: str) -> Mapping[str, Any] | None:
    """What a run's network costs, once it has been pruned."""
    if run.summary:
        return run.summary[name]
    if run.result.before is None or run.result.after is None:
        return None
    before, after = (getattr(cost, name) for cost in (run.result.before, run.result.after))
    return {"after": after, "ratio": after / before}


def _value(run: Told, metric: Metric) -> float | None:
    """What the network that a run leaves came to on the test data, so far if it is not finished."""
    if run.summary:
        return metric.factor * run.summary["test"]["last"][metric.name]
    last = last_tested(run.result)
    if last is None or run.result.after is None or last["phase"] != run.result.phases[-1]:
        return None
    return metric.factor * last[f"test_{metric.name}"]


def _with(value: str, more: str) -> Markup:
    """A number and what belongs to it, below it where there is no room beside it."""
    return joined(f"{value} ", element("span", f"({more})", class_="aside"))


def _latencies(run: Told) -> list[dict[str, Any]]:
    latency = run.summary.get("latency") if run.summary else None
    return latency["batches"] if latency else []


def _speedup(run: Told, batch: int) -> dict[str, float] | None:
    """Quartiles of pairs of passes; an unpruned network is as fast as itself."""
    for row in _latencies(run):
        if row["batch"] == batch:
            return row.get("speedup") if run.result.prunes else dict.fromkeys(QUARTILES, 1.0)
    return None


def _latency(run: Told, batch: int) -> str:
    (row,) = [row for row in _latencies(run) if row["batch"] == batch] or [{}]
    return milliseconds(row["after_ms"]["median"]) if "after_ms" in row else ""


def _faster(run: Told, batch: int) -> Markup | str:
    speedup = _speedup(run, batch)
    if speedup is None:
        return ""
    if not run.result.prunes:
        return "1"
    return _with(f"{speedup['median']:.2f}", "{low:.2f} to {high:.2f}".format(**speedup))


def _cost(names: Sequence[str], runs: Sequence[Told], metric: Metric) -> Markup:
    placed = [
        (i, run, value) for i, run in enumerate(runs) if (value := _value(run, metric)) is not None
    ]
    if not placed:
        return element("p", "None of the networks has been tested after pruning.")
    charts = []
    for name, label in (("flops", "FLOPs"), ("params", "params")):
        unit, size = _unit(max(_change(run, name)["after"] for _, run, _ in placed))
        lines = []
        for i, run, value in placed:
            point = (_change(run, name)["after"] / size, value)
            shown = names[i] if run.summary else f"{names[i]}, so far"
            lines.append(Line(shown, [point], i, joined=False))
        axis = f"{label}, {unit}" if unit else label
        y = f"test {metric.label}, {metric.unit}"
        drawn = drawing.chart(lines, x=axis, y=y, x_low=0, log=not metric.higher_is_better)
        title = f"{_title(metric)} against {label}"
        charts.append(drawing.figure(title, drawn, legend=drawing.legend(lines)))
    finished = [(i, run) for i, run in enumerate(runs) if run.summary]
    return element("div", *charts, _against_speedup(names, finished, metric), class_="charts")


def _against_speedup(
    names: Sequence[str], finished: Sequence[tuple[int, Told]], metric: Metric
) -> Markup | None:
    """The metric against the speed-up with the largest batch that was measured in all runs."""
    batches = [
        {row["batch"] for row in _latencies(run) if _speedup(run, row["batch"])}
        for _, run in finished
    ]
    common = set.intersection(*batches) if batches else None
    if not common:
        return None
    batch, lines = max(common), []
    for i, run in finished:
        speedup = _speedup(run, batch)
        value = _value(run, metric)
        spread = (speedup["low"], speedup["high"])
        point = (speedup["median"], value)
        lines.append(Line(names[i], [point], i, joined=False, spreads=[spread]))
    drawn = drawing.chart(
        lines,
        x="times as fast as unpruned",
        y=f"test {metric.label}, {metric.unit}",
        rules=[Rule("unpruned", 1.0, upright=True)],
        log=not metric.higher_is_better,
    )
    title = f"{_title(metric)} against speed-up, batch {batch}"
    note = "Bars are the quartiles of pairs of passes of the pruned and the unpruned network."
    return drawing.figure(title, drawn, legend=drawing.legend(lines), note=note)


def _training(names: Sequence[str], runs: Sequence[Told], metric: Metric) -> Markup:
    charts = [
        _over_time(names, runs, "loss", "Training loss", "loss", 1.0, log=True),
        _over_time(
            names,
            runs,
            f"test_{metric.name}",
            f"Test {metric.label}",
            f"test {metric.label}, {metric.unit}",
            metric.factor,
            log=not metric.higher_is_better,
        ),
    ]
    if not any(charts):
        return element("p", "None of the runs has recorded a step.")
    return element("div", *charts, class_="charts")


def _over_time(names, runs, field, title, axis, factor, *, log) -> Markup | None:
    """What was recorded by a name, of all runs."""
    lines = []
    for place, (name, run) in enumerate(zip(names, runs, strict=True)):
        found, _ = curves(run.result, {field: name}, factor=factor)
        lines += [Line(line.label, line.points, place) for line in found]
    if not lines:
        return None
    drawn = drawing.chart(lines, x="step, of all phases", y=axis, log=log)
    note = "A line is interrupted where a network was pruned."
    return drawing.figure(title, drawn, legend=drawing.legend(lines), note=note)


def _folders(names: Sequence[str], runs: Sequence[Told]) -> Markup:
    rows = [
        (name, network(run.result), run.result.config["method"], str(run.result.workdir))
        for name, run in zip(names, runs, strict=True)
    ]
    return table(("run", "network", "method", "folder"), rows)


def _unit(largest: int) -> tuple[str, int]:
    """What numbers up to this one are counted in."""
    for unit, size in (("billions", 10**9), ("millions", 10**6), ("thousands", 10**3)):
        if largest >= size:
            return unit, size
    return "", 1


def _title(metric: Metric) -> str:
    return metric.label[0].upper() + metric.label[1:]
