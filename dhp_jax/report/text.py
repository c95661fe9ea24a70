"""The summary of a run as lines of text."""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any

from dhp_jax.config.methods import METHODS
from dhp_jax.report.format import (
    faster,
    interval,
    main_metric,
    metrics_text,
    milliseconds,
    percent,
    start_text,
)
from dhp_jax.report.write import LAYERS, PAGE, PLOTS
from dhp_jax.tasks.task import METRICS
from dhp_jax.workdir import metrics as workdir_metrics
from dhp_jax.workdir.reader import SUMMARY


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
    if metric.name == "error" and summary.get("test_examples"):
        count, error = summary["test_examples"], test["last"]["error"]
        rows.insert(-1, ("  95 % interval", f"{interval(error, count)}, of {count:,} examples"))
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
        ("records", f"{workdir / workdir_metrics.RECORDS}, {workdir / 'tensorboard'}"),
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
