"""The page of one run, finished or not."""

import base64
from collections.abc import Mapping, Sequence
import io
import json
import shlex
from typing import Any

from PIL import Image

from dhp_jax.budgets.layer_table import compact, layer_rows, percent
from dhp_jax.models.own import is_own
from dhp_jax.report.crops import Crop
from dhp_jax.report.figures import Chart
from dhp_jax.report.format import (
    compared_with,
    faster,
    interval,
    load_call,
    loss_text,
    main_metric,
    milliseconds,
    remarks,
    start_text,
    timed_batches,
)
from dhp_jax.report.render import Cell, Table, render
from dhp_jax.report.run_report import RunReport, number, tested, when
from dhp_jax.tasks.task import METRICS

STAGES = {  # of summary["test"], in the order of their becoming, each with what it is
    "without_network": ("the input as it is", ""),
    "unpruned": ("unpruned, last epoch", ""),
    "given": ("the given weights", "before anything is trained"),
    "after_search": ("after the search", "all channels are still there"),
    "after_pruning": (
        "right after pruning",
        "channels are cut off, and nothing is trained since; the last phase goes on from here",
    ),
    "renewed": (
        "with renewed statistics",
        "the mean and variance of BatchNorm, measured on training data; nothing is trained",
    ),
    "last": ("last epoch", "the result"),
    "best": ("best epoch on these data", "chosen on these same data, so rather too good"),
}
OTHERS = {  # networks beside the one that a run leaves
    "best": "the network after its best epoch",
    "pruned": "just after pruning, not trained further",
    "search": "the network of latents at the end of the search, for dhp.prune_to",
}
Card = tuple[str, str, Sequence[str]]  # what a number is, the number, what to compare it with


def page(run: RunReport, charts: Mapping[str, Chart], pictures: Sequence[Crop] = ()) -> str:
    """The page of a run as HTML, with those charts of `run_charts` and crops that are given."""
    result, summary = run.result, run.summary

    def of(*names: str) -> list[Chart]:
        return [charts[name] for name in names if name in charts]

    return render(
        "report.html",
        title=f"{run.network}: {result.workdir.name}",
        heading=run.network,
        lead=_lead(run),
        missing=run.missing(),
        cards=answer(run),
        begun=summary and start_text(summary),
        remarks=remarks(summary) if summary else [],
        stages=_stages(run),
        channels=of("channels"),
        budgets=result.budgets,
        training=of("ratio", "loss", run.metric.name),
        searches=result.method.searches,
        latents=of("magnitudes", "survivors", "latents"),
        told="magnitudes" in charts,
        layers=_layers(run),
        pictures=[(crop.name, _sources(crop)) for crop in pictures],
        load=_load(run),
        commands=result.commands,
        summary=summary,
        config=json.dumps(result.config, indent=1),
    )


def _lead(run: RunReport) -> str:
    result, summary, metric = run.result, run.summary, run.metric
    if summary is None:
        return f"A run of the method {result.config['method']!r} that is not finished."
    value = metric.text(summary["test"]["last"][metric.name])
    if not result.pruned:
        return f"The unpruned network: test {metric.label} {value}."
    beside = "of the unpruned network it is not known, for no run of it was given"
    if whole := compared_with(summary):
        beside = f"{whole[0]}, {metric.text(whole[1][metric.name])}"
    flops, params = (percent(summary[name]["ratio"]) for name in ("flops", "params"))
    left = f"{flops} of the FLOPs and {params} of the params"
    return f"{result.method.lead.format(left=left)}: test {metric.label} {value}; {beside}."


def answer(run: RunReport) -> list[Card]:
    """The numbers that a reader looks for first."""
    result, found = run.result, _metric_cards(run)
    if result.before is not None and result.after is not None:
        for name, label in (("flops", "FLOPs"), ("params", "Params")):
            before, after = getattr(result.before, name), getattr(result.after, name)
            kept = [f"{percent(after / before)} of {compact(before)}"] if before != after else []
            found.append((label, compact(after), [*kept, f"{after:,}"]))
    elif last := run.last_ratio:
        for name, label in (("flops_ratio", "FLOPs"), ("params_ratio", "Params")):
            if number(last.get(name)) is not None:
                told = f"would survive after step {last['step']}"
                found.append((label, percent(last[name]), [told]))
    for row in timed_batches(run.summary):
        details = []
        if before := row.get("before_ms"):
            details = [f"before {milliseconds(before['median'])}", faster(row)]
        value = milliseconds(row["after_ms"]["median"])
        found.append((f"Latency, batch {row['batch']}", value, details))
    return found


def _metric_cards(run: RunReport) -> list[Card]:
    """The test metric, with its interval, and what it was before pruning."""
    metric, last = run.metric, run.last_tested
    if run.summary is None:
        value = tested(last).get(metric.name) if last else None
        if value is None:
            return []
        details = [when(last), *_counted(run, value)]
        return [(f"Test {metric.label} so far", metric.text(value), details)]
    test = run.summary["test"]
    value, whole = test["last"][metric.name], compared_with(run.summary)
    details = _counted(run, value)
    if whole:
        change = metric.factor * (value - whole[1][metric.name])
        unit = "points" if metric.unit == "%" else metric.unit
        details.append(f"{whole[0]} {metric.text(whole[1][metric.name])}")
        details.append(f"{change:+.2f} {unit}".replace("-", "\u2212"))
    elif run.result.pruned:
        details.append("unpruned: not known")
    return [(f"Test {metric.label}", metric.text(value), details)]


def _counted(run: RunReport, value: float) -> list[str]:
    """How sure an error is, and on how many examples it was found."""
    interval, count = run.interval(run.metric, value), run.test_examples
    return ([f"95 %: {interval}"] if interval else []) + (
        [f"{count:,} test examples"] if count else []
    )


def _stages(run: RunReport) -> Table | None:
    """Metrics on the test data, from the input to the last epoch."""
    if run.summary is None:
        return None
    test = run.summary["test"]
    there = [(told, test[name]) for name, told in stages(run.summary).items() if test.get(name)]
    metrics = sorted({m for _, values in there for m in values}, key=list(METRICS).index)

    def cell(metric: str, value: float | None) -> Cell:
        if value is None:
            return Cell("")
        if metric == "loss":
            return Cell(loss_text(value))
        return Cell(METRICS[metric].text(value), run.interval(METRICS[metric], value))

    count = run.test_examples
    intervals = ". Below each error is its 95 % interval (Wilson's)" if "error" in metrics else ""
    return Table(
        ["test data", *(METRICS[metric].label for metric in metrics)],
        [[Cell(*stage), *(cell(m, values.get(m)) for m in metrics)] for stage, values in there],
        note=f"On {count:,} test examples{intervals}." if count else "",
    )


def stages(summary: Mapping[str, Any]) -> Mapping[str, tuple[str, str]]:
    """What each stage of `summary["test"]` is, and what to know of it."""
    validation = summary.get("validation")
    if not validation:
        return STAGES
    name, count = main_metric(validation["best"]), validation["examples"]
    value = validation["best"][name]
    told = f"{METRICS[name].label} there {METRICS[name].text(value)}"
    told += f" ({interval(value, count)})" if name == "error" else ""
    chosen = f"chosen on {count:,} validation examples, {told}"
    return {**STAGES, "best": ("best epoch by the validation data", chosen)}


def _layers(run: RunReport) -> Table | None:
    """Widths and costs of every layer, with the shares that are left if it was pruned."""
    result = run.result
    if result.after is None or result.before is None:
        return None

    def share(value: float | None) -> Cell:
        return Cell("" if value is None else percent(value), share=value)

    rows = []
    for row in layer_rows(result.before, result.after, " \u2192 "):
        flops, params = ([text] for text in (row.flops, row.params))
        if result.pruned:
            flops.append(share(row.flops_share))
            params.append(share(row.params_share))
        rows.append([row.layer, row.inputs, row.outputs, *flops, *params])
    costs = ["FLOPs", "", "params", ""] if result.pruned else ["FLOPs", "params"]
    return Table(["layer", "channels in", "channels out", *costs], rows[:-1], rows[-1])


def _sources(crop: Crop) -> list[dict[str, Any]]:
    """The images of a crop, each as what an element `img` needs."""
    found = []
    for title, pixels in crop.images.items():
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG", optimize=True)
        data = base64.b64encode(content.getvalue()).decode()
        height, width = pixels.shape[:2]
        told = f"{crop.psnr[title]:.2f} dB" if title in crop.psnr else ""
        size = {"width": width, "height": height}
        found.append({"title": title, "data": data, "told": told, **size})
    return found


def _load(run: RunReport) -> Mapping[str, Any] | None:
    """What of the network must be known to use it, in Python and in a shell."""
    result = run.result
    if result.after is None:
        return None
    which = "model" if result.finished else "pruned"
    noted, shape, task = result.notes[which], result.input_shape, result.config["task"]
    name = result.config["model"].get("name")
    options = "" if which == "model" else f" --which={which}"
    options += f" --build={shlex.quote(name)}" if is_own(name) else ""
    return {
        "call": load_call(result.workdir / which, result.config["model"]),
        "run": shlex.quote(str(result.workdir)) + options,
        "shape": (1, *shape),
        "pixels": {1: "gray ", 3: "RGB "}.get(shape[-1], "") + "pixels from 0 to 255",
        "labels": task.get("name") == "classification",
        "times": f", {task['scale']} times as large" if "scale" in task else "",
        "peak": noted.get("peak", 255),
        "normalised": "mean" in noted and "std" in noted,
        **{
            name: ", ".join(f"{value:.9g}" for value in noted.get(name, ()))
            for name in ("mean", "std")
        },
        "beside": [
            f"{result.workdir / name}: {what}"
            for name, what in OTHERS.items()
            if (result.workdir / name).is_dir() and name != which
        ],
    }
