"""The page of one run, finished or not."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import io
import json
import math
import shlex
from typing import Any

import numpy as np
from PIL import Image

from dhp_jax.core.cost import Cost, LayerCost
from dhp_jax.core.latent import latents
from dhp_jax.report import drawing
from dhp_jax.report.crops import Crop
from dhp_jax.report.document import Card, cards, code, document, meter, notice, section, table
from dhp_jax.report.drawing import Line, Rule
from dhp_jax.report.markup import Markup, element, joined
from dhp_jax.report.wording import (
    LABELS,
    compact,
    duration,
    faster,
    in_row,
    loss_text,
    main_metric,
    milliseconds,
    percent,
    start_text,
)
from dhp_jax.tasks.task import METRICS, Metric
from dhp_jax.workdir.reader import Result

STAGES = {  # of summary["test"], in the order of their becoming
    "without_network": "the input as it is",
    "unpruned": "unpruned, last epoch",
    "after_search": "after the search",
    "after_pruning": "just after pruning",
    "last": "last epoch",
    "best": "best epoch on these data",
}


PHASES = {"search": "search", "converge": "pruned", "baseline": "unpruned"}


@dataclass(frozen=True)
class Told:
    """A run, and what it came to if it is finished; see `report.summarize`."""

    result: Result
    summary: Mapping[str, Any] | None

    @property
    def metric(self) -> str:
        """What its task is judged by."""
        return "error" if self.result.config["task"].get("name") == "classification" else "psnr"


def page(run: Told, pictures: Sequence[Crop] = ()) -> str:
    """The page of a run as HTML.

    Args:
      run: the run.
      pictures: details of restored pictures.
    """
    result, summary = run.result, run.summary
    begun = _begun(summary) if summary else None
    parts = [
        ("channels", "Channels kept", _channels(result)),
        ("budgets", "Budgets", _budgets(result)),
        ("training", "Training", _training(result, summary)),
        ("latents", "Latents", _latents(result) if result.searches else None),
        ("layers", "Layers", _layers(result)),
        ("pictures", "Pictures", _pictures(pictures)),
        ("load", "The network", _load(result)),
        ("made", "How it was made", _made(result, summary)),
    ]
    parts = [part for part in parts if part[2]]
    links = (element("a", title, href=f"#{name}") for name, title, _ in parts)
    return document(
        f"{network(result)}: {result.workdir.name}",
        element(
            "header",
            element("h1", network(result)),
            element("p", _lead(result, summary), class_="lead"),
        ),
        notice("This run is not finished. Missing are:", missing(result)),
        cards(answer(result, summary)),
        element("p", _noise(summary), class_="soft") if summary else None,
        element("p", begun) if begun else None,
        notice("Note:", _remarks(summary)),
        _stages(summary),
        element("nav", *links),
        *(section(*part) for part in parts),
    )


def network(result: Result) -> str:
    """What is trained on what: "resnet (depth 20, width 1) on digits"."""
    model = dict(result.config["model"])
    name = model.pop("name", "network")
    arguments = ", ".join(f"{key} {_short(value)}" for key, value in model.items())
    shown = f"{name} ({arguments})" if arguments else name
    return f"{shown} on {result.config['data'].get('name', 'its data')}"


def missing(result: Result) -> list[str]:
    """What a run that is not finished has not left yet; empty for one that is."""
    if result.finished:
        return _to_come(result)
    found = []
    recorded = {record["phase"] for record in result.records}
    if not recorded:
        found.append("records of training: no step has been recorded")
    if result.searches and result.search is None:
        found.append(
            "the end of the search, and with it which channels go: no channels, layers, FLOPs and "
            "params to show"
        )
    elif result.prunes and result.after is None:
        found.append("the pruned network: no channels, layers, FLOPs and params to show")
    last = result.phases[-1]
    began = "has not ended" if last in recorded else "has not begun"
    found.append(f"the trained network: the {last} phase {began}, so no final result, no latency")
    return found


def _to_come(result: Result) -> list[str]:
    """The rest of a finished run that was given more epochs."""
    phase = result.phases[-1]
    done, asked = result.notes["model"]["phase"], result.config.get(phase, {}).get("epochs", 0)
    if done["met_budget"] or done["epochs"] >= asked:
        return []
    return [f"epochs {done['epochs'] + 1} to {asked}: the run has since been given more of them"]


# The answer


def _lead(result: Result, summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return f"A run of the method {result.config['method']!r} that is not finished."
    test, metric = summary["test"], _metric(summary["test"]["last"])
    value = metric.text(test["last"][metric.name])
    if not result.pruned:
        return f"The unpruned network: test {metric.label} {value}."
    unpruned = test.get("unpruned")
    beside = (
        f"; unpruned, {metric.text(unpruned[metric.name])}"
        if unpruned
        else "; of the unpruned network it is not known, for no run of it was given"
    )
    flops, params = (percent(summary[name]["ratio"]) for name in ("flops", "params"))
    left = f"{flops} of the FLOPs and {params} of the params"
    return f"{result.method.lead.format(left=left)}: test {metric.label} {value}{beside}."


def answer(result: Result, summary: Mapping[str, Any] | None) -> list[Card]:
    """The numbers that a reader looks for first."""
    found = [_metric_card(result, summary)]
    if result.before is not None and result.after is not None:
        for name, label in (("flops", "FLOPs"), ("params", "Params")):
            before, after = getattr(result.before, name), getattr(result.after, name)
            found.append(_cost_card(label, before, after))
    else:
        found += _ratio_cards(result)
    return [card for card in found if card] + _latency_cards(summary)


def _metric_card(result: Result, summary: Mapping[str, Any] | None) -> Card | None:
    if summary is None:
        last = last_tested(result)
        if last is None:
            return None
        metric = _metric(_tested(last))
        value = metric.text(_tested(last)[metric.name])
        return Card(f"Test {metric.label} so far", value, [when(last)])
    test, metric = summary["test"], _metric(summary["test"]["last"])
    value, unpruned = test["last"][metric.name], test.get("unpruned")
    details = []
    if result.pruned:
        details.append(
            f"unpruned {metric.text(unpruned[metric.name])}" if unpruned else "unpruned: not known"
        )
    if unpruned:
        change = metric.factor * (value - unpruned[metric.name])
        unit = "points" if metric.unit == "%" else metric.unit
        details.append(f"{change:+.2f} {unit}".replace("-", "\u2212"))
    return Card(f"Test {metric.label}", metric.text(value), details)


def _cost_card(label: str, before: int, after: int) -> Card:
    if before == after:
        return Card(label, compact(after), [f"{after:,}"])
    kept = f"{percent(after / before)} of {compact(before)}"
    return Card(label, compact(after), [kept, f"{after:,}"])


def _ratio_cards(result: Result) -> list[Card]:
    """What would survive of the network so far."""
    last = last_ratio(result)
    if last is None:
        return []
    return [
        Card(label, percent(last[name]), [f"would survive after step {last['step']}"])
        for name, label in (("flops_ratio", "FLOPs"), ("params_ratio", "Params"))
        if _number(last.get(name)) is not None
    ]


def _latency_cards(summary: Mapping[str, Any] | None) -> list[Card]:
    latency = summary and summary.get("latency")
    found = []
    for row in latency["batches"] if latency else []:
        after, before = row["after_ms"]["median"], row.get("before_ms")
        details = []
        if before:
            details = [f"before {milliseconds(before['median'])}", faster(row["speedup"])]
        found.append(Card(f"Latency, batch {row['batch']}", milliseconds(after), details))
    return found


def _noise(summary: Mapping[str, Any]) -> str:
    """What a reader must know of the latency."""
    latency = summary.get("latency")
    if not latency:
        return "Latency was not measured; python -m dhp_jax.report RUN --latency measures it."
    shape = " x ".join(map(str, latency["input_shape"]))
    rounds = " and ".join(dict.fromkeys(str(row["rounds"]) for row in latency["batches"]))
    row_pairs = any("speedup" in row for row in latency["batches"])
    return (
        f"Latency: compiled forward passes on inputs of {shape}, on {latency['hardware']}; medians "
        f"of {rounds} passes"
        + (", the networks in turn, with the quartiles of pairs. " if row_pairs else ". ")
        + "So few tell large differences from none, no more; benchmarks/pruned.py takes longer."
    )


def last_tested(result: Result) -> Mapping[str, Any] | None:
    """The last record with metrics on the test data."""
    return next((r for r in reversed(result.records) if _tested(r)), None)


def last_ratio(result: Result) -> Mapping[str, Any] | None:
    """The last record that tells what would survive."""
    found = (r for r in reversed(result.records) if _number(r.get("flops_ratio")) is not None)
    return next(found, None)


def when(record: Mapping[str, Any]) -> str:
    """When in a run it was tested."""
    return f"{record['phase']} phase, epoch {record.get('epoch')}"


def _begun(summary: Mapping[str, Any]) -> str | None:
    """What the network was trained from, where that was no search of this run."""
    begun = start_text(summary)
    return f"Trained from {begun}." if begun else None


def _remarks(summary: Mapping[str, Any] | None) -> list[str]:
    found = []
    phases = summary["phases"] if summary else {}
    if "search" in phases and not phases["search"]["met_budget"]:
        found.append("the search ran out of epochs; the network was pruned to its budget anyway")
    for name, phase in phases.items():
        if phase.get("skipped"):
            found.append(f"{phase['skipped']} batches of the {name} phase were skipped: not finite")
    return found


def _stages(summary: Mapping[str, Any] | None) -> Markup | None:
    """Metrics on the test data, from the input to the last epoch."""
    if summary is None:
        return None
    rows = [(name, summary["test"][name]) for name in STAGES if summary["test"].get(name)]
    metrics = sorted({m for _, values in rows for m in values}, key=list(METRICS).index)
    header = ["test data", *(f"{METRICS[m].label}" for m in metrics)]
    cells = [
        [STAGES[name], *(_text(m, values[m]) if m in values else "" for m in metrics)]
        for name, values in rows
    ]
    return table(header, cells)


def _text(metric: str, value: float) -> str:
    return loss_text(value) if metric == "loss" else METRICS[metric].text(value)


# Drawings


def _channels(result: Result) -> Markup | None:
    if not result.pruned:
        return None
    pairs = list(zip(result.before.layers, result.after.layers, strict=True))
    convs = [(b, a) for b, a in pairs if "Conv" in b.kind]
    layers = [(b.path.removesuffix(".conv"), b.outputs.full, a.outputs.full) for b, a in convs]
    shape = drawing.silhouette(layers, [_told(b, a) for b, a in convs])
    return drawing.figure(
        "Output channels of every convolution, in order of execution",
        shape,
        legend=drawing.key([("before", "before"), ("after", "after pruning")]),
    )


def _told(before: LayerCost, after: LayerCost) -> str:
    share = f", {percent(after.flops / before.flops)} of its FLOPs" if before.flops else ""
    return f"{before.path}: {before.outputs.full} to {after.outputs.full} channels{share}"


def _budgets(result: Result) -> Markup | None:
    """What was asked for, predicted, and is; nothing for a run with a target only."""
    rows = result.budgets
    if rows.keys() <= {"flops"}:
        return None
    cells = [
        [
            LABELS.get(name, "latency"),
            percent(row["asked"]),
            percent(row["predicted"]),
            percent(row["counted"]) if name in LABELS else _ratio_of_times(row["ratio"]),
        ]
        for name, row in rows.items()
    ]
    shown = table(("budget", "asked for", "predicted", "counted or measured"), cells)
    return joined(shown, _tried(rows["latency"]) if "latency" in rows else None)


def _ratio_of_times(ratio: Mapping[str, float]) -> str:
    return "{} ({} to {})".format(*(percent(ratio[name]) for name in ("median", "low", "high")))


def _tried(row: Mapping[str, Any]) -> Markup:
    """How the survivors within a latency were found."""
    text = (
        f"Latency: the time of the pruned network as a share of the whole one's, both in turn, "
        f"{row['rounds']} passes of batch {row['batch']} each, with the quartiles of pairs, on "
        f"{row['hardware']}. The upper quartile is within the budget. It was predicted to be the "
        "share of the FLOPs. All measurements in turn; two of three have to be within the budget:"
    )
    cells = [[percent(tried["flops"]), _ratio_of_times(tried)] for tried in row["tried"]]
    return joined(element("p", text, class_="soft"), table(("FLOPs", "time"), cells))


def _training(result: Result, summary: Mapping[str, Any] | None) -> Markup | None:
    found = [_ratio(result), _loss(result), _score(result, summary)]
    return element("div", *found, class_="charts") if any(found) else None


def _ratio(result: Result) -> Markup | None:
    records = [r for r in result.records if r["phase"] == "search"]
    asked = result.asked
    shown = [name for name in LABELS if name in {"flops", "params", *asked}]
    lines = [
        Line(LABELS[name], [(0, 100.0), *points], colour)
        for colour, name in enumerate(shown)
        if (points := _points(records, f"{name}_ratio", factor=100))
    ]
    if not lines:
        return None
    stops = {}
    for name, share in asked.items():
        stop = f"{100 * share + 100 * result.config['search']['stop_limit']:g}"
        stops.setdefault(stop, []).append(LABELS[name])
    rules = [
        Rule(f"{'search ends at' if len(stops) == 1 else in_row(names)} {stop} %", float(stop))
        for stop, names in stops.items()
    ]
    drawn = drawing.chart(
        lines,
        x="step of the search",
        y="% of the unpruned network",
        rules=rules,
        low=0,
        text="{:.2f} %".format,
    )
    note = f"The network is then pruned to {_percents(asked)}."
    if len(stops) > 1:
        note = f"The search ends when each share is within its dashed line. {note}"
    return drawing.figure(
        "What would survive, while searching", drawn, legend=drawing.legend(lines), note=note
    )


def _percents(asked: Mapping[str, float]) -> str:
    return " and ".join(f"{100 * share:g} % of the {LABELS[n]}" for n, share in asked.items())


def _loss(result: Result) -> Markup | None:
    lines, rules = curves(result, {"loss": "training", "test_loss": "test"})
    if not lines:
        return None
    drawn = drawing.chart(lines, x="step", y="loss", rules=rules, log=True)
    return drawing.figure("Loss", drawn, legend=drawing.legend(lines))


def _score(result: Result, summary: Mapping[str, Any] | None) -> Markup | None:
    names = {name.removeprefix("test_") for r in result.records for name in r}
    metric = METRICS["psnr" if "psnr" in names else "error"]
    shown = {metric.name: "training", f"test_{metric.name}": "test"}
    lines, rules = curves(result, shown, factor=metric.factor)
    if not lines:
        return None
    unpruned = summary and summary["test"].get("unpruned")
    if unpruned:
        value = metric.factor * unpruned[metric.name]
        rules.append(Rule(f"unpruned {metric.text(unpruned[metric.name])}", value))
    title = metric.label[0].upper() + metric.label[1:]
    axis = f"{metric.label}, {metric.unit}"
    log = not metric.higher_is_better
    drawn = drawing.chart(lines, x="step", y=axis, rules=rules, log=log)
    return drawing.figure(title, drawn, legend=drawing.legend(lines))


def curves(
    result: Result, names: Mapping[str, str], *, factor: float = 1.0
) -> tuple[list[Line], list[Rule]]:
    """Lines of what was recorded through all phases, and where one phase follows another.

    Args:
      result: the run.
      names: labels of the fields of records.
      factor: by which values are multiplied.
    """
    start, starts, points = 0, [], {name: [] for name in names}
    for phase in result.phases:
        records = [r for r in result.records if r["phase"] == phase]
        if not records:
            continue
        if start:
            starts.append(Rule(PHASES[phase], start, upright=True))
        for name, line in points.items():
            line += [None] if line else []
            line += [(start + x, y) for x, y in _points(records, name, factor)]
        start += records[-1]["step"]
    lines = [
        Line(names[name], line, colour)
        for colour, (name, line) in enumerate(points.items())
        if any(line)
    ]
    return lines, starts if lines else []


def _points(
    records: Sequence[Mapping[str, Any]], name: str, factor: float = 1.0
) -> list[tuple[float, float]]:
    """Step and value of the records that have a finite number by that name."""
    values = [(record["step"], _number(record.get(name))) for record in records]
    return [(step, factor * value) for step, value in values if value is not None]


def _latents(result: Result) -> Markup:
    records = [r for r in result.records if r["phase"] == "search" and "magnitudes" in r]
    if len(records) < 2:
        return element(
            "p",
            "How the latents died is not shown: the records hold fewer than two looks at their "
            "magnitudes (those of earlier versions hold none).",
        )
    steps = [record["step"] for record in records]
    magnitudes = [record["magnitudes"] for record in records]
    threshold = result.config["search"]["threshold"]
    bands = drawing.figure(
        "Magnitudes of all prunable entries",
        drawing.fan(steps, magnitudes, threshold, x="step of the search", y="|z|"),
        note=(
            f"Each band holds a tenth of the entries. Those below the threshold {threshold:g} die; "
            "the axis is linear below it and logarithmic above."
        ),
    )
    counts = np.array([record["survivors"] for record in records])
    rows = [
        (name, size, counts[:, i].tolist()) for i, (name, size) in enumerate(_sizes(result, counts))
    ]
    shown = _most_pruned(rows)
    note = "Layers whose outputs are added share a latent. Pale is what the latent began with."
    if result.pruned:
        note += (
            " The numbers are of the end of the search; the network was then pruned to its budget, "
            "and the channels above are what that left."
        )
    if len(shown) < len(rows):
        note += (
            f" Shown are the {len(shown)} of {len(rows)} latents that lost the largest share of "
            "their entries, in the order of the network."
        )
    strips = drawing.figure(
        f"Entries left of {'every latent' if len(shown) == len(rows) else 'latents'}",
        drawing.decline(steps, shown, x="step of the search"),
        note=note,
    )
    return element("div", bands, strips, class_="charts")


def _most_pruned(rows: Sequence[tuple[str, int, list[int]]]) -> list[tuple[str, int, list[int]]]:
    """As many latents as have room, those that lost the largest share, in the order given."""
    left = [counts[-1] / size for _, size, counts in rows]
    chosen = sorted(range(len(rows)), key=left.__getitem__)[: drawing.MOST_LATENTS]
    return [rows[i] for i in sorted(chosen)]


def _sizes(result: Result, counts: np.ndarray) -> list[tuple[str, int]]:
    """Names and sizes of the prunable latents; before the search has ended, as far as is known."""
    if result.search is None:
        return [(f"latent {i + 1}", int(column.max())) for i, column in enumerate(counts.T)]
    return [(name, z.size) for name, z in latents(result.search).items() if z.prunable]


# Layers, pictures, and what a reader does next


def _layers(result: Result) -> Markup | None:
    if result.after is None or result.before is None:
        return None
    pairs = list(zip(result.before.layers, result.after.layers, strict=True))
    rows = [[b.path, *_widths(b, a), *_changes(b, a, result.pruned)] for b, a in pairs]
    whole = ["total", "", "", *_changes(result.before, result.after, result.pruned)]
    costs = ["FLOPs", "", "params", ""] if result.pruned else ["FLOPs", "params"]
    header = ["layer", "channels in", "channels out", *costs]
    return table(header, rows, total=whole, long=True)


def _widths(before: LayerCost, after: LayerCost) -> list[str]:
    return [
        _arrow(before.inputs.full, after.inputs.full),
        _arrow(before.outputs.full, after.outputs.full),
    ]


def _changes(before: Cost | LayerCost, after: Cost | LayerCost, shares: bool) -> list[Any]:
    """FLOPs and params, each with the share that is left if that is wanted."""
    cells = []
    for name in ("flops", "params"):
        b, a = getattr(before, name), getattr(after, name)
        cells.append(_arrow(b, a))
        if shares:
            cells.append(joined(percent(a / b), meter(a / b)) if b else "")
    return cells


def _arrow(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} \u2192 {after:,}"


def _pictures(pictures: Sequence[Crop]) -> Markup | None:
    if not pictures:
        return None
    titles = list(pictures[0].images)
    head = element("tr", *(element("th", title) for title in titles))
    rows = []
    for crop in pictures:
        cells = (
            element("td", _image(image, f"{crop.name}: {title}"))
            for title, image in crop.images.items()
        )
        rows.append(element("tr", *cells))
    shown = element("table", element("thead", head), element("tbody", *rows), class_="crops")
    text = "Of each test picture the square with most detail."
    return joined(element("p", text), element("div", shown, class_="scroll"))


def _image(pixels: np.ndarray, text: str) -> Markup:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    data = base64.b64encode(content.getvalue()).decode()
    height, width = pixels.shape[:2]
    return element(
        "img", src=f"data:image/png;base64,{data}", alt=text, title=text, width=width, height=height
    )


def _load(result: Result) -> Markup | None:
    if result.after is None:
        return None
    which = "model" if result.finished else "pruned"
    folder = result.workdir / which
    inputs, note = _inputs(result, which)
    lines = [
        "import numpy as np",
        "",
        "import dhp_jax as dhp",
        "",
        f"network = dhp.load({json.dumps(str(folder))})",
        "run = dhp.inference(network)  # compiled, in evaluation mode",
        *inputs,
    ]
    others = {
        "best": "the network after its best epoch on the test data",
        "pruned": "just after pruning, not trained further",
        "search": "the network of latents at the end of the search, for dhp.prune_to",
    }
    there = [
        f"{result.workdir / name}: {what}"
        for name, what in others.items()
        if (result.workdir / name).is_dir() and name != folder.name
    ]
    beside = element("ul", *(element("li", text) for text in there)) if there else None
    return joined(
        element("p", note),
        code("\n".join(lines)),
        element("p", "On image files, and for use without this library:"),
        code("\n".join(_commands(result, which)), kind="command"),
        element("p", "Beside it:") if there else None,
        beside,
    )


def _inputs(result: Result, which: str) -> tuple[list[str], str]:
    """Code from images of 0 .. 255 to what the network returns, and what must be known of it."""
    task, noted = result.config["task"], result.notes[which]
    shape, kind = result.input_shape, {1: "gray", 3: "RGB"}.get(result.input_shape[-1], "")
    pixels = f"{kind} pixels from 0 to 255".strip()
    images = f"images = np.zeros({(1, *shape)}, np.uint8)  # yours: {pixels}"
    if task.get("name") != "classification":
        times = f", {task['scale']} times as large" if "scale" in task else ""
        lines = [f"{images}, of any size", f"y = run(np.float32(images))  # 0 to 255{times}"]
        return lines, "The network takes and returns pixels from 0 to 255; round and clip them."
    if "mean" not in noted or "std" not in noted:
        lines = [f"x = np.zeros({(1, *shape)}, np.float32)  # yours", "y = run(x)  # class scores"]
        return lines, (
            "The network takes pixels that are normalised as in training: less their mean, by "
            "their standard deviation. This run is of an earlier version, which has noted neither."
        )
    peak = noted.get("peak", 255)
    mean, std = (", ".join(f"{value:.9g}" for value in noted[name]) for name in ("mean", "std"))
    stored = "images" if peak == 255 else f"images * np.float32({peak} / 255)"
    lines = [
        images,
        f"mean, std = np.float32([{mean}]), np.float32([{std}])",
        f"x = ({stored} - mean) / std",
        "y = run(x)  # a score for each class",
        "labels = y.argmax(-1)",
    ]
    note = "The network takes normalised pixels, as in training; others it labels wrongly."
    if peak != 255:
        note += f" The training data store pixels from 0 to {peak}."
    return lines, note


def _commands(result: Result, which: str) -> list[str]:
    """What a shell can do with the network."""
    run = shlex.quote(str(result.workdir))
    run += "" if which == "model" else f" --which={which}"
    labels = result.config["task"].get("name") == "classification"
    return [
        f"python -m dhp_jax.predict {run} image.png {'--resize' if labels else '--out=restored'}",
        f"python -m dhp_jax.export {run} --format=onnx",
    ]


def _made(result: Result, summary: Mapping[str, Any] | None) -> Markup:
    parts = []
    if result.commands:
        several = len(result.commands) > 1
        parts.append(element("h3", "Commands, in order" if several else "Command"))
        parts.append(code("\n".join(result.commands), kind="command"))
    else:
        parts.append(
            element("p", "No command was noted: it was run from Python, or by an earlier version.")
        )
    if summary is not None:
        parts += [element("h3", "Time"), _times(summary)]
        parts += [
            element("h3", "Versions"),
            table(("package", "version"), list(summary["versions"].items())),
        ]
    parts += [
        element("h3", "Configuration"),
        code(json.dumps(result.config, indent=1), kind="long"),
    ]
    return joined(*parts)


def _times(summary: Mapping[str, Any]) -> Markup:
    rows = [
        (name, f"{phase['epochs']:,}", f"{phase['steps']:,}", duration(phase["seconds"]))
        for name, phase in summary["phases"].items()
    ]
    total = ("all", "", "", duration(summary["seconds"]))
    shown = table(("phase", "epochs", "steps", "time"), rows, total=total)
    return joined(shown, element("p", f"On {summary['hardware']}.", class_="soft"))


def _metric(values: Mapping[str, float]) -> Metric:
    return METRICS[main_metric(values)]


def _tested(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics on test data of a record, by name."""
    return {
        name.removeprefix("test_"): value
        for name, value in record.items()
        if name.startswith("test_") and _number(value) is not None
    }


def _number(value: Any) -> float | None:
    """A finite number, or nothing."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
