"""The plots of a run as pictures, for papers and slides."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from dhp_jax.artifact.reading import read_description
from dhp_jax.core.latent import latents
from dhp_jax.report.crops import Crop, crops
from dhp_jax.report.wording import main_metric
from dhp_jax.tasks.task import METRICS, Metric
from dhp_jax.workdir.reader import Result

if TYPE_CHECKING:  # it is slow, and pages do without
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BEFORE, AFTER, REMOVED, RULE = "#c3cad4", "#1f6fb2", "#d9603b", "#7a828c"


def plots(
    result: Result,
    unpruned: Mapping[str, Any] | None = None,
    baseline: Path | None = None,
) -> dict[str, "Figure"]:
    """The figures of a run by name; `unpruned` is the summary of the run in `baseline`."""
    metric = main_metric(result.notes["model"]["phase"]["last"])
    figures = {metric: _figure(_plot_metric, result, METRICS[metric], unpruned)}
    if result.pruned:
        figures["channels"] = _figure(_plot_channels, result, width=9)
    if result.search is not None:
        survivors = read_description(result.workdir / "model")["survivors"]
        figures["ratio"] = _figure(_plot_ratio, result)
        figures["latents"] = _figure(_plot_latents, result, result.search, survivors)
    pictures = crops(result, baseline)
    if pictures:
        figures["crops"] = _crops(pictures)
    return figures


def _figure(plot, *arguments, width: float = 7) -> "Figure":
    figure = _empty(width, 3.8)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ed")
    axes.set_axisbelow(True)
    plot(axes, *arguments)
    return figure


def _empty(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plot_channels(axes: "Axes", result: Result) -> None:
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
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def _plot_ratio(axes: "Axes", result: Result) -> None:
    records = [r for r in result.records if "flops_ratio" in r]
    steps = [0, *(r["step"] for r in records)]
    for name, label, color in (
        ("flops_ratio", "FLOPs", AFTER),
        ("params_ratio", "params", REMOVED),
    ):
        axes.plot(steps, [100, *(100 * r[name] for r in records)], color=color, label=label)
    target = 100 * result.asked["flops"]
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
    axes: "Axes", result: Result, search: nnx.Module, survivors: Mapping[str, Sequence[int]]
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
    axes: "Axes", result: Result, metric: Metric, unpruned: Mapping[str, Any] | None
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
    if unpruned is not None and result.prunes:
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


def _crops(rows: Sequence[Crop]) -> "Figure":
    """Details of test pictures: the input, what networks make of it, and the original."""
    columns = len(rows[0].images)
    figure = _empty(2.2 * columns, 2.2 * len(rows) + 0.3)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        for axes, (title, image) in zip(line, row.images.items(), strict=True):
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="none")
            axes.set_axis_off()
            if row is rows[0]:
                axes.set_title(title, fontsize=9)
    return figure
