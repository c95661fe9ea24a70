"""What a run leaves for people: a table of its layers, a summary, and plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import importlib.metadata
import json
import logging
import os
from pathlib import Path
import platform
from typing import Any

from flax import nnx
import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
from PIL import Image

from dhp_jax import checkpoint, journal
from dhp_jax.cost import Cost, LayerCost, measure_cost
from dhp_jax.latent import latents
from dhp_jax.tasks.task import METRICS, Metric

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
LAYERS = "layers.md"
PLOTS = "plots"
PICTURES = "pictures"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")

BEFORE, AFTER, REMOVED, RULE = "#c3cad4", "#1f6fb2", "#d9603b", "#7a828c"


@dataclass(frozen=True)
class Result:
    """What a finished run has on disk."""

    workdir: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    notes: dict[str, dict[str, Any]]  # of each network saved, by its folder
    before: Cost
    after: Cost


def read(workdir: str | os.PathLike) -> Result:
    """Reads a finished run.

    Raises:
      ArtifactError: the run has not left its trained network yet.
    """
    workdir = Path(workdir)
    notes = {
        name: checkpoint.read_description(workdir / name)["notes"]
        for name in ("search", "pruned", "model")
        if checkpoint.exists(workdir / name) or name == "model"
    }
    shape = tuple(notes["model"]["input_shape"])
    after = measure_cost(checkpoint.load(workdir / "model"), shape)
    pruned = "search" in notes
    return Result(
        workdir=workdir,
        config=json.loads((workdir / "config.json").read_text()),
        records=journal.read(workdir / journal.RECORDS),
        notes=notes,
        before=measure_cost(checkpoint.load(workdir / "search"), shape) if pruned else after,
        after=after,
    )


def write(
    workdir: str | os.PathLike, *, baseline: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Writes `summary.json`, `layers.md` and the plots of a finished run.

    Args:
      workdir: directory of the run.
      baseline: directory of a finished run of the unpruned network; left out of the report if there
        is none.

    Returns:
      The summary.
    """
    result = read(workdir)
    unpruned = None if baseline is None else _comparable(result, baseline)
    summary = summarize(result, unpruned)
    (result.workdir / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    (result.workdir / LAYERS).write_text(layer_table(result.before, result.after))
    pictured = None if unpruned is None else Path(baseline)
    for name, figure in plots(result, unpruned, pictured).items():
        folder = result.workdir / PLOTS
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    return summary


def read_baseline(directory: str | os.PathLike) -> dict[str, Any]:
    """The summary of a finished run of the unpruned network.

    Raises:
      ValueError: there is none.
    """
    path = Path(directory) / SUMMARY
    summary = json.loads(path.read_text()) if path.is_file() else {}
    if summary.get("method") != "baseline":
        raise ValueError(
            "baseline: expected the directory of a finished run with config.method=baseline; "
            f"got {str(directory)!r}"
        )
    return summary


def summarize(result: Result, unpruned: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The outcome of a run in numbers: metrics on the test data, cost, times.

    Args:
      result: the run.
      unpruned: the summary of a run with `method="baseline"`.
    """
    notes, trained = result.notes, result.notes["model"]["phase"]
    test = {"last": trained["last"], "best": trained["best"]}
    if notes["model"]["without_network"]:
        test["without_network"] = notes["model"]["without_network"]
    phases = {}
    if "search" in notes:
        test |= {
            "after_search": notes["search"]["phase"]["last"],
            "after_pruning": notes["pruned"]["test"],
            "unpruned": unpruned and unpruned["test"]["last"],
        }
        phases["search"] = notes["search"]["phase"]
    phases["converge" if "search" in notes else "baseline"] = trained
    return {
        "method": result.config["method"],
        "task": result.config["task"],
        "model": result.config["model"],
        "data": result.config["data"]["name"],
        "seed": result.config["seed"],
        "target": result.config["target"] if "search" in notes else None,
        "test": test,
        "flops": _change(result.before.flops, result.after.flops),
        "params": _change(result.before.params, result.after.params),
        "phases": phases,
        "unpruned_epochs": unpruned and unpruned["phases"]["baseline"]["epochs"],
        "seconds": sum(phase["seconds"] for phase in phases.values()),
        "hardware": hardware(),
        "versions": versions(),
    }


def hardware() -> str:
    """The accelerator, or the processor and how many cores of it there are."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


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
    if summary["method"] != "baseline":
        epochs = summary["unpruned_epochs"]
        unpruned = (
            "unknown" if epochs is None else f"{metrics_text(test['unpruned'])} (epoch {epochs})"
        )
        search = phases["search"]
        rows += [
            ("  unpruned" if rows else f"test {metric.label}, unpruned", unpruned),
            (
                "  after the search",
                f"{metrics_text(test['after_search'])} (epoch {search['epochs']})",
            ),
            ("  after pruning", metrics_text(test["after_pruning"])),
        ]
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
        if summary["method"] != "baseline":
            text = f"{change['before']:,} -> {text} ({_percent(change['ratio'])})"
        rows.append((label, text))
    rows.append(("time", f"{summary['seconds']:.0f} s on {summary['hardware']}"))
    if "search" in phases and not phases["search"]["met_budget"]:
        rows.append(
            ("note", "the search ran out of epochs; the network was pruned to the target anyway")
        )
    skipped = {name: phase["skipped"] for name, phase in phases.items() if phase["skipped"]}
    if skipped:
        counts = ", ".join(f"{count} in the {name} phase" for name, count in skipped.items())
        rows.append(("note", f"batches skipped because they were not finite: {counts}"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def main_metric(values: Mapping[str, float]) -> str:
    """The metric of some that a task is judged by."""
    return "psnr" if "psnr" in values else "error"


def metrics_text(values: Mapping[str, float]) -> str:
    """Metrics for people: "2.00 %", or "24.93 dB, SSIM 0.6512"."""
    first = main_metric(values)
    shown = [METRICS[first].text(values[first])]
    others = [name for name in values if name not in (first, "loss")]
    return ", ".join(
        shown + [f"{METRICS[name].label} {METRICS[name].text(values[name])}" for name in others]
    )


def text(workdir: str | os.PathLike, summary: Mapping[str, Any]) -> str:
    """What to tell at the end of a run: the layers, the summary, and where everything is."""
    workdir = Path(workdir)
    paths = [
        (
            "pruned network" if summary["method"] == "dhp" else "network",
            f'{workdir / "model"}   (dhp.load("{workdir / "model"}"))',
        ),
        ("of best epoch", str(workdir / "best")),
        ("summary", str(workdir / SUMMARY)),
        ("layers", str(workdir / LAYERS)),
        ("plots", str(workdir / PLOTS)),
        ("records", f"{workdir / journal.RECORDS}, {workdir / 'tensorboard'}"),
    ]
    return "\n".join(
        [
            "",
            *([(workdir / LAYERS).read_text()] if summary["method"] != "baseline" else []),
            summary_text(summary),
            "",
            *(f"{label:<16} {path}" for label, path in paths),
        ]
    )


def layer_table(before: Cost, after: Cost) -> str:
    """A Markdown table of every layer: channels, FLOPs and params, before and after pruning."""
    rows = [("layer", "channels in", "channels out", "FLOPs", "", "params", "")]
    for b, a in zip(before.layers, after.layers, strict=True):
        rows.append(_layer_row(b, a))
    rows.append(
        (
            "total",
            "",
            "",
            _arrow(before.flops, after.flops),
            _share(before.flops, after.flops),
            _arrow(before.params, after.params),
            _share(before.params, after.params),
        )
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(_cells(row, widths)) + " |" for row in rows]
    ruler = "|" + "|".join(
        "-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)
    )
    return "\n".join([lines[0], ruler + "|", *lines[1:]]) + "\n"


def plots(
    result: Result,
    unpruned: Mapping[str, Any] | None = None,
    baseline: Path | None = None,
) -> dict[str, Figure]:
    """The figures of a run by name; `unpruned` is the summary of the run in `baseline`."""
    metric = main_metric(result.notes["model"]["phase"]["last"])
    figures = {metric: _figure(_plot_metric, result, METRICS[metric], unpruned)}
    if "search" in result.notes:
        search = checkpoint.load(result.workdir / "search")
        survivors = checkpoint.read_description(result.workdir / "model")["survivors"]
        figures["channels"] = _figure(_plot_channels, result, width=9)
        figures["ratio"] = _figure(_plot_ratio, result)
        figures["latents"] = _figure(_plot_latents, result, search, survivors)
    if (result.workdir / PICTURES).is_dir():
        figures["crops"] = _crops(result, baseline)
    return figures


def _comparable(result: Result, baseline: str | os.PathLike) -> dict[str, Any] | None:
    """The summary of a finished run of the same network, unpruned, on the same data; or `None`."""
    try:
        summary = read_baseline(baseline)
    except ValueError:
        return None
    config = result.config
    network = config["task"], config["model"], config["data"]["name"]
    inputs = result.notes["model"]["without_network"] or None  # tells test images apart
    same = (summary["task"], summary["model"], summary["data"]) == network
    if not same or summary["test"].get("without_network") != inputs:
        logger.warning("baseline: %s is of another network or other data; left out", baseline)
        return None
    return summary


def _figure(plot, *arguments, width: float = 7) -> Figure:
    figure = Figure(figsize=(width, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ed")
    axes.set_axisbelow(True)
    plot(axes, *arguments)
    return figure


def _plot_channels(axes: Axes, result: Result) -> None:
    pairs = zip(result.before.layers, result.after.layers, strict=True)
    convs = [(b, a) for b, a in pairs if "Conv" in b.kind]
    positions = np.arange(len(convs))
    axes.bar(positions, [b.outputs.full for b, _ in convs], 0.85, color=BEFORE, label="before")
    axes.bar(positions, [a.outputs.full for _, a in convs], 0.85, color=AFTER, label="after")
    if len(convs) <= 40:
        names = [b.path.removesuffix(".conv") for b, _ in convs]
        axes.set_xticks(positions, names, rotation=90, fontsize=7)
    else:
        axes.set_xlabel("convolution, in order of execution")
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.01)
    axes.set_ylabel("output channels")
    axes.set_title("Channels kept per layer", loc="left")
    axes.legend(frameon=False, ncols=2, loc="upper left")


def _plot_ratio(axes: Axes, result: Result) -> None:
    records = [r for r in result.records if "flops_ratio" in r]
    steps = [0, *(r["step"] for r in records)]
    for name, label, color in (
        ("flops_ratio", "FLOPs", AFTER),
        ("params_ratio", "params", REMOVED),
    ):
        axes.plot(steps, [100, *(100 * r[name] for r in records)], color=color, label=label)
    target = 100 * result.config["target"]
    stop = target + 100 * result.config["search"]["stop_limit"]
    axes.axhline(stop, color=RULE, linewidth=1, linestyle=":", label=f"search ends ({stop:g} %)")
    axes.axhline(target, color=RULE, linewidth=1, linestyle="--", label=f"target ({target:g} %)")
    axes.set_ylim(0, 104)
    axes.set_xlim(0)
    axes.set_xlabel("step of the search")
    axes.set_ylabel("% of the unpruned network")
    axes.set_title("What would survive, while searching", loc="left")
    axes.legend(frameon=False, loc="lower left")


def _plot_latents(
    axes: Axes, result: Result, search: nnx.Module, survivors: Mapping[str, Sequence[int]]
) -> None:
    magnitudes, kept = [], []
    for name, z in latents(search).items():
        if z.prunable:
            magnitudes.append(np.abs(np.asarray(z.value())))
            kept.append(np.isin(np.arange(z.size), survivors[name]))
    magnitudes, kept = np.concatenate(magnitudes), np.concatenate(kept)
    order = np.argsort(-magnitudes, kind="stable")
    magnitudes, kept, rank = magnitudes[order], kept[order], np.arange(len(order))
    threshold = result.config["search"]["threshold"]
    axes.set_yscale("symlog", linthresh=threshold / 5)
    axes.scatter(rank[kept], magnitudes[kept], 7, color=AFTER, label=f"kept ({kept.sum()})")
    axes.scatter(
        rank[~kept], magnitudes[~kept], 7, color=REMOVED, label=f"removed ({(~kept).sum()})"
    )
    axes.axhline(
        threshold, color=RULE, linewidth=1, linestyle="--", label=f"threshold {threshold:g}"
    )
    axes.set_ylim(0)
    axes.set_xlabel("entries of all prunable latents, sorted")
    axes.set_ylabel("|z| at the end of the search")
    axes.set_title("Latent magnitudes", loc="left")
    axes.legend(frameon=False, loc="lower left")


def _plot_metric(
    axes: Axes, result: Result, metric: Metric, unpruned: Mapping[str, Any] | None
) -> None:
    start = 0
    for name in dict.fromkeys(record["phase"] for record in result.records):
        records = [r for r in result.records if r["phase"] == name and f"test_{metric.name}" in r]
        if start:
            axes.axvline(start, color=RULE, linewidth=1)
            axes.annotate(" pruned", (start, 1), xycoords=("data", "axes fraction"), va="top")
        epochs = [start + r["epoch"] for r in records]
        color = BEFORE if name == "search" else AFTER
        values = [metric.factor * r[f"test_{metric.name}"] for r in records]
        axes.plot(epochs, values, color=color, label=name)
        start += records[-1]["epoch"]
    if unpruned is not None and "search" in result.notes:
        value = unpruned["test"]["last"][metric.name]
        label = f"unpruned, last epoch ({metric.text(value)})"
        axes.axhline(metric.factor * value, color=RULE, linewidth=1, linestyle="--", label=label)
    if not metric.higher_is_better:
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(0)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"test {metric.label}, {metric.unit}")
    axes.set_title(f"Test {metric.label}", loc="left")
    if axes.lines:
        axes.legend(frameon=False)


def _crops(result: Result, baseline: Path | None) -> Figure:
    """Details of test pictures: the input, what networks make of it, and the original."""
    pruned = "search" in result.notes
    names = sorted(folder.name for folder in (result.workdir / PICTURES).iterdir())
    columns = [("input", result.workdir, "input")]
    if pruned and baseline is not None and _has_pictures(baseline, names):
        columns.append(("unpruned", baseline, "output"))
    share = result.after.flops / result.before.flops
    columns.append(
        (f"pruned, {_percent(share)} FLOPs" if pruned else "unpruned", result.workdir, "output")
    )
    columns.append(("original", result.workdir, "target"))
    figure = Figure(figsize=(2.2 * len(columns), 2.2 * len(names) + 0.3), layout="constrained")
    grid = figure.subplots(len(names), len(columns), squeeze=False)
    for name, row in zip(names, grid, strict=True):
        images = [
            np.asarray(Image.open(workdir / PICTURES / name / f"{what}.png"))
            for _, workdir, what in columns
        ]
        rows, across = _detail(images[-1])
        for axes, image, (title, _, _) in zip(row, images, columns, strict=True):
            axes.imshow(image[rows, across], cmap="gray", vmin=0, vmax=255, interpolation="none")
            axes.set_axis_off()
            if name == names[0]:
                axes.set_title(title, fontsize=9)
    return figure


def _has_pictures(workdir: Path, names: Sequence[str]) -> bool:
    """Whether a run has left pictures of these test examples; it may have been tested on others."""
    return all((workdir / PICTURES / name / "output.png").is_file() for name in names)


def _detail(image: np.ndarray, side: int = 96) -> tuple[slice, slice]:
    """The square of a picture in which neighbouring pixels differ most."""
    gray = image.reshape(*image.shape[:2], -1).mean(-1)
    contrast = np.abs(np.diff(gray, axis=0))[:, 1:] + np.abs(np.diff(gray, axis=1))[1:]
    side = min(side, *contrast.shape)
    total = np.pad(contrast, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    top, left = np.unravel_index(np.argmax(sums), sums.shape)
    return slice(top, top + side), slice(left, left + side)


def _layer_row(before: LayerCost, after: LayerCost) -> tuple[str, ...]:
    return (
        before.path,
        _arrow(before.inputs.full, after.inputs.full),
        _arrow(before.outputs.full, after.outputs.full),
        _arrow(before.flops, after.flops),
        _share(before.flops, after.flops),
        _arrow(before.params, after.params),
        _share(before.params, after.params),
    )


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _change(before: int, after: int) -> dict[str, Any]:
    return {"before": before, "after": after, "ratio": after / before}


def _arrow(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


def _share(before: int, after: int) -> str:
    return "" if before == 0 else _percent(after / before)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
