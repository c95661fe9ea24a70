"""What a run prints at its end: layers, details, files, and last of all what came of it."""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any

from dhp_jax.budgets.layer_table import (
    LayerChange,
    aligned,
    compact,
    percent,
    short_layer_table,
)
from dhp_jax.config.methods import METHODS
from dhp_jax.report.format import (
    compared_with,
    duration,
    faster,
    interval,
    labelled,
    load_call,
    main_metric,
    metrics_text,
    milliseconds,
    remarks,
    start_text,
    timed_batches,
)
from dhp_jax.report.page import STAGES, stages
from dhp_jax.report.write import COMPARED, LAYERS, PAGE, PLOTS
from dhp_jax.tasks.task import METRICS
from dhp_jax.workdir import metrics as workdir_metrics
from dhp_jax.workdir.reader import SUMMARY

Rows = list[tuple[str, str]]


def text(workdir: str | os.PathLike, summary: Mapping[str, Any], missing: str = "") -> str:
    """What to tell at the end of a run; what came of it is at the bottom.

    `missing` is the command that trains the unpruned network, told where its error is not known.
    """
    workdir, prunes = Path(workdir), METHODS[summary["method"]].prunes
    layers = []
    if prunes:
        changes = [LayerChange(**layer) for layer in summary["layers"]]
        layers = [short_layer_table(changes), f"all layers: {workdir / LAYERS}", ""]
    files = [
        ("network", f"{workdir / 'model'}   ({load_call(workdir / 'model', summary['model'])})"),
        ("of best epoch", str(workdir / "best")),
        ("summary", str(workdir / SUMMARY)),
        ("plots", str(workdir / PLOTS)),
        ("records", f"{workdir / workdir_metrics.RECORDS}, {workdir / 'tensorboard'}"),
    ]
    answer = [*_answer(summary, missing), ("report", str(workdir / PAGE))]
    return "\n".join(["", *layers, _lines([*_details(summary), *files]), "", _lines(answer)])


def sizes_text(
    workdir: str | os.PathLike, summaries: Mapping[str, Mapping[str, Any]], missing: str = ""
) -> str:
    """What to tell at the end of a run of several targets: one table of all sizes.

    Summaries are by the names of their folders; `missing` as for `text`.
    """
    workdir, some = Path(workdir), next(iter(summaries.values()))
    metric = METRICS[main_metric(some["test"]["last"])]
    rows = [["size", f"test {metric.label}", "FLOPs", "params", "times as fast"]]
    unpruned = compared_with(some)
    if unpruned:
        whole = [compact(some[name]["before"]) for name in ("flops", "params")]
        stage = "unpruned" if some["test"].get("unpruned") else "given"
        rows.append([unpruned[0], _score(some, stage), *whole, ""])
    for name, summary in summaries.items():
        left = [percent(summary[cost]["ratio"]) for cost in ("flops", "params")]
        timed = [row["speedup"] for row in timed_batches(summary) if "speedup" in row][-1:]
        speed = ["{median:.2f} ({low:.2f} to {high:.2f})".format(**row) for row in timed]
        rows.append([name, _score(summary, "last"), *left, *(speed or [""])])
    notes: Rows = [("networks", f"{workdir}/SIZE/model, of SIZE {', '.join(summaries)}")]
    if some.get("test_examples"):
        told = "; 95 % intervals (Wilson) in brackets" if metric.name == "error" else ""
        notes.append(("tested on", f"{some['test_examples']:,} examples{told}"))
    timed = [row["batch"] for row in timed_batches(some) if "speedup" in row][-1:]
    notes += [("timed with", f"batches of {batch}") for batch in timed]
    if unpruned is None:
        notes.append(_unknown(metric.label, missing))
    notes.append(("report", str(workdir / COMPARED)))
    return "\n".join(["", *aligned(rows, "  "), "", _lines(notes)])


def _details(summary: Mapping[str, Any]) -> Rows:
    """What led to the result, budgets, times, and what is to be known of them."""
    test, phases = summary["test"], summary["phases"]
    trained = phases.get("converge") or phases["baseline"]
    label = METRICS[main_metric(test["last"])].label
    rows = []
    if "without_network" in test:
        rows.append((f"test {label}, input", metrics_text(test["without_network"])))
    if "after_search" in test:
        reached = f"epoch {phases['search']['epochs']}"
        rows.append(("after the search", f"{_score(summary, 'after_search')}, {reached}"))
    if "after_pruning" in test:
        cut = STAGES["after_pruning"][1]
        rows.append(("right after pruning", f"{_score(summary, 'after_pruning')}: {cut}"))
    if "renewed" in test:
        rows.append((STAGES["renewed"][0], f"{_score(summary, 'renewed')}: {STAGES['renewed'][1]}"))
    chosen = f"epoch {trained['best_epoch']}: {stages(summary)['best'][1]}"
    rows.append(("best epoch", f"{_score(summary, 'best')}, {chosen}"))
    rows += _budget_rows(summary.get("budgets", {}))
    begun = start_text(summary)
    rows += [("starts from", begun)] if begun else []
    rows.append(("time", f"{duration(summary['seconds'])} on {summary['hardware']}"))
    return rows + [("note", remark) for remark in remarks(summary)]


def _answer(summary: Mapping[str, Any], missing: str) -> Rows:
    """The error before and after, FLOPs, params and speed."""
    test, phases = summary["test"], summary["phases"]
    metric, prunes = METRICS[main_metric(test["last"])], METHODS[summary["method"]].prunes
    rows, count = [], summary.get("test_examples")
    if prunes and test.get("unpruned"):
        epochs = f"epoch {summary['unpruned_epochs']}"
        rows.append((f"test {metric.label}, unpruned", f"{_score(summary, 'unpruned')}, {epochs}"))
    elif prunes and test.get("given"):
        rows.append((f"test {metric.label}, given", _score(summary, "given")))
    elif prunes:
        rows.append(_unknown(f"{metric.label}, unpruned", missing))
    trained = phases.get("converge") or phases["baseline"]
    which = "pruned" if prunes else "last epoch"
    reached = f"{_score(summary, 'last')}, epoch {trained['epochs']}"
    rows.append((f"test {metric.label}, {which}", reached))
    if metric.name == "error" and count:
        rows.append(("", f"on {count:,} test examples; 95 % intervals (Wilson) in brackets"))
    for name, label in (("flops", "FLOPs"), ("params", "params")):
        change = summary[name]
        told = f"{change['after']:,}"
        if prunes:
            told = f"{change['before']:,} -> {told} ({percent(change['ratio'])})"
        rows.append((label, told))
    return rows + _latency_rows(summary)


def _unknown(what: str, missing: str) -> tuple[str, str]:
    """A row that tells how to find what is not known."""
    told = "unknown"
    if missing:
        told += f"; this trains it, then give the same command again:\n  {missing}"
    return f"test {what}", told


def _score(summary: Mapping[str, Any], which: str) -> str:
    """Metrics on the test data at a stage of a run; an error with its interval."""
    values, count = summary["test"][which], summary.get("test_examples")
    told = metrics_text(values)
    return f"{told} ({interval(values['error'], count)})" if "error" in values and count else told


def _budget_rows(budgets: Mapping[str, Mapping[str, Any]]) -> Rows:
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


def _latency_rows(summary: Mapping[str, Any]) -> Rows:
    """The latency of one input and of a batch in words."""
    rows = []
    for row in timed_batches(summary):
        shown = milliseconds(row["after_ms"]["median"])
        if "before_ms" in row:
            before = milliseconds(row["before_ms"]["median"])
            shown = f"{before} -> {shown}; {faster(row)}"
        rows.append((f"latency, batch {row['batch']}", shown))
    return rows


def _lines(rows: Rows) -> str:
    """Labels with their texts within `COLUMNS`; what follows a line break stays whole."""
    width = max(len(label) for label, _ in rows)
    lines = []
    for label, told in rows:
        first, *whole = told.split("\n")
        lines += [labelled(label, first, width), *whole]
    return "\n".join(lines)
