"""The charts of one run."""

from collections.abc import Sequence
import itertools

import numpy as np

from dhp_jax.artifact.reading import read_description
from dhp_jax.budgets.layer_table import LABELS, percent
from dhp_jax.core.latent import latents
from dhp_jax.errors import in_row
from dhp_jax.report.charts import Line, Rule, draw_rule, line_chart, new_chart
from dhp_jax.report.figures import BEFORE, COLOURS, SOFT, Chart
from dhp_jax.report.format import compared_with, upper_first
from dhp_jax.report.run_report import RunReport, points
from dhp_jax.report.scales import bend, round_steps, scale_note, thinned

AFTER = COLOURS[0]
MAX_NAMED = 48  # layers of which each has its name below it
MIN_SLOTS = 7  # of the outline: with fewer layers its title would not fit
MAX_LATENTS = 32  # that are drawn, each with its name
SEARCH_STEP = "step of the search"


def run_charts(run: RunReport) -> dict[str, Chart]:
    """The charts that what a run has left is enough for, by name."""
    drawn = {
        "channels": _channels(run),
        "ratio": _ratio(run),
        "loss": _over_steps(run, "Loss", "loss", "loss", 1.0, [], log=True),
        run.metric.name: _score(run),
        "magnitudes": _magnitudes(run),
        "survivors": _survivors(run),
        "latents": _latents(run),
    }
    return {name: chart for name, chart in drawn.items() if chart is not None}


def _channels(run: RunReport) -> Chart | None:
    """The outline of a network: how wide each layer was, and what is left of it."""
    result = run.result
    if not result.pruned:
        return None
    pairs = list(zip(result.before.layers, result.after.layers, strict=True))
    convs = [(b, a) for b, a in pairs if "Conv" in b.kind]
    kind = "convolution" if convs else "layer"
    convs = convs or pairs
    names = [b.path.removesuffix(".conv") for b, _ in convs]
    widths = [(b.outputs.full, a.outputs.full) for b, a in convs]
    named = len(convs) <= MAX_NAMED
    step = min(60, max(19, 660 / len(convs))) if named else max(6, 900 / len(convs))
    slots = max(len(convs), MIN_SLOTS)

    def draw(axes):
        for which, (label, colour) in enumerate((("before", BEFORE), ("after pruning", AFTER))):
            high = np.array(widths)[:, which]
            look = {"color": colour, "edgecolor": colour, "linewidth": 0.8, "label": label}
            bars = axes.bar(range(len(high)), high, 0.92, -high / 2, **look)
            for number, bar in enumerate(bars):
                bar.set_gid(f"{which}.{number}")
        if named:
            left = [str(b) if a == b else f"{a} of {b}" for b, a in widths]
            texts = [f"{name}  {count}" for name, count in zip(names, left, strict=True)]
            axes.set_xticks(range(len(texts)), texts, rotation=90)
        else:
            groups = group_names(names, step)
            axes.set_xticks(list(groups), groups.values(), ha="left")
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.margins(0.005, 0)
        if slots > len(convs):
            axes.set_xlim(-0.5, slots - 0.5)
        told = [
            f"{b.path}: {b.outputs.full} to {a.outputs.full} channels"
            + (f", {percent(a.flops / b.flops)} of its FLOPs" if b.flops else "")
            for b, a in convs
        ]
        return {f"{which}.{n}": [text] for n, text in enumerate(told) for which in (0, 1)}

    title = f"Output channels of every {kind}, in order of execution"
    foot = 6.5 * (max(map(len, names)) + 9) if named else 25
    return new_chart(title, draw, width=16 + step * slots, height=150 + foot)


def group_names(names: Sequence[str], step: float) -> dict[int, str]:
    """Names of the parts that layers belong to, by their first layer, as far as there is room."""
    found, place, free = {}, 0, 0.0
    for group, members in itertools.groupby(names, key=lambda n: ".".join(n.split(".")[:-2])):
        if place * step >= free:
            found[place] = group or names[place]
            free = place * step + 6.8 * len(found[place]) + 8
        place += len(list(members))
    return found


def _ratio(run: RunReport) -> Chart | None:
    """What would survive, while searching."""
    records, asked = run.records("search"), run.result.asked
    margin = 0.0 if run.result.method.fades else run.result.config["search"]["stop_limit"]
    lines = [
        Line(LABELS[name], [(0, 100.0), *line], colour)
        for colour, name in enumerate(n for n in LABELS if n in {"flops", "params", *asked})
        if (line := points(records, f"{name}_ratio", 100))
    ]
    if not lines:
        return None
    stops = {}
    for name, share in asked.items():
        stop = f"{100 * share + 100 * margin:g}"
        stops.setdefault(stop, []).append(LABELS[name])
    rules = [
        Rule(f"{'search ends at' if len(stops) == 1 else in_row(names)} {stop} %", float(stop))
        for stop, names in stops.items()
    ]
    targets = " and ".join(f"{100 * share:g} % of the {LABELS[n]}" for n, share in asked.items())
    if run.result.config.get("budget", {}).get("latency"):  # which a search takes for FLOPs
        targets = "its budgets, the time as it is measured"
    ends = "The search ends when each share is within its dashed line. " * (len(stops) > 1)
    return line_chart(
        "What would survive, while searching",
        lines,
        x=SEARCH_STEP,
        y="% of the unpruned network",
        rules=rules,
        low=0,
        note=f"{ends}The network is then pruned to {targets}.",
        text="{:.2f} %".format,
    )


def _score(run: RunReport) -> Chart | None:
    metric, rules = run.metric, []
    if whole := run.summary and compared_with(run.summary):
        value = whole[1][metric.name]
        rules.append(Rule(f"{whole[0]} {metric.text(value)}", metric.factor * value))
    axis, log = f"{metric.label}, {metric.unit}", not metric.higher_is_better
    return _over_steps(
        run, upper_first(metric.label), axis, metric.name, metric.factor, rules, log=log
    )


def _over_steps(
    run: RunReport, title: str, axis: str, name: str, factor: float, rules: list[Rule], *, log: bool
) -> Chart | None:
    """What was recorded by a name, of training, test and validation."""
    shown = {"training": run.curve(name, factor)}
    shown |= {split: run.curve(f"{split}_{name}", factor) for split in ("test", "validation")}
    lines = [Line(label, line, i) for i, (label, line) in enumerate(shown.items()) if line]
    if not lines:
        return None
    starts = [Rule(phase, step, upright=True) for phase, step in run.starts()]
    return line_chart(title, lines, x="step", y=axis, rules=[*starts, *rules], log=log)


def _looks(run: RunReport) -> list:
    """The records of a search that tell the magnitudes of latents."""
    return [r for r in run.records("search") if "magnitudes" in r]


def _magnitudes(run: RunReport) -> Chart | None:
    """Bands between quantiles of all magnitudes, the darker the nearer to the median."""
    looks, threshold = thinned(_looks(run)), run.result.config["search"]["threshold"]
    if len(looks) < 2:
        return None
    times = [record["step"] for record in looks]
    borders = np.array([record["magnitudes"] for record in looks]).T
    bands = len(borders) - 1

    def draw(axes):
        for band, (lower, upper) in enumerate(itertools.pairwise(borders)):
            look = {"color": AFTER, "linewidth": 0, "gid": f"band{band}"}
            alpha = 0.2 + 0.6 * (1 - abs(2 * band + 1 - bands) / bands)
            axes.fill_between(times, lower, upper, alpha=alpha, **look)
        bend(axes, threshold / 5, max(threshold, *borders[-1]))
        axes.margins(x=0)
        draw_rule(axes, Rule(f"threshold {threshold:g}", threshold))
        round_steps(axes, xlabel=SEARCH_STEP, ylabel="|z|")
        shares = [f"{100 * k // bands} to {100 * (k + 1) // bands} %" for k in range(bands)]
        return {f"band{k}": [share] for k, share in enumerate(shares)}

    note = (
        f"Each band holds a tenth of the entries. Those below the threshold {threshold:g} die. "
        + scale_note(threshold / 5)
    )
    return new_chart("Magnitudes of all prunable entries", draw, note)


def _survivors(run: RunReport) -> Chart | None:
    """How many entries of each latent are left over time, one strip a latent."""
    looks = thinned(_looks(run))
    if len(looks) < 2:
        return None
    times = [record["step"] for record in looks]
    counts = np.array([record["survivors"] for record in looks]).T
    rows = [(*of, left) for of, left in zip(_sizes(run, counts), counts.tolist(), strict=True)]
    shown = most_pruned(rows)

    def draw(axes):
        for place, (_, size, left) in enumerate(shown):
            below = place + 0.4
            look = {"linewidth": 0, "gid": f"strip{place}"}
            labels = ("at the beginning", "left") if place == 0 else (None, None)
            whole = times[0], times[-1]
            axes.fill_between(whole, below, below - 0.8, color=BEFORE, label=labels[0], **look)
            tops = [below - 0.8 * count / size for count in left]
            axes.fill_between(times, below, tops, color=AFTER, label=labels[1], **look)
            at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            text = {"va": "center", "fontsize": 11, "color": SOFT}
            axes.annotate(f"{left[-1]} of {size}", (1, place), (5, 0), **at, **text)
        axes.set_yticks(range(len(shown)), [name for name, _, _ in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.margins(x=0)
        axes.grid(visible=False)
        round_steps(axes, xlabel=SEARCH_STEP)
        told = [f"{name}: {left[-1]} of {size} left" for name, size, left in shown]
        return {f"strip{place}": [text] for place, text in enumerate(told)}

    note = "Layers whose outputs are added share a latent."
    if run.result.pruned:
        note += (
            " The numbers are of the end of the search; the network was then pruned to its budget, "
            "and the channels above are what that left."
        )
    if len(shown) < len(rows):
        note += (
            f" Shown are the {len(shown)} of {len(rows)} latents that lost the largest share of "
            "their entries, in the order of the network."
        )
    title = f"Entries left of {'every latent' if len(shown) == len(rows) else 'latents'}"
    return new_chart(title, draw, note, height=45 + 18 * len(shown))


def most_pruned(rows: Sequence[tuple[str, int, list[int]]]) -> list[tuple[str, int, list[int]]]:
    """As many latents as have room, those that lost the largest share, in the order given."""
    left = [counts[-1] / size for _, size, counts in rows]
    chosen = sorted(range(len(rows)), key=left.__getitem__)[:MAX_LATENTS]
    return [rows[place] for place in sorted(chosen)]


def _sizes(run: RunReport, counts: np.ndarray) -> list[tuple[str, int]]:
    """Names and sizes of the prunable latents; before the search has ended, as far as is known."""
    if run.result.search is None:
        return [(f"latent {place + 1}", int(row.max())) for place, row in enumerate(counts)]
    return [(name, z.size) for name, z in latents(run.result.search).items() if z.prunable]


def _latents(run: RunReport) -> Chart | None:
    """Magnitudes at the end of the search, in order of their size; which of them were kept."""
    result = run.result
    if result.search is None or result.trained is None:
        return None
    folder = result.workdir / ("model" if result.finished else "pruned")
    survivors, threshold = (
        read_description(folder)["survivors"],
        result.config["search"]["threshold"],
    )
    magnitudes, kept = [], []
    for name, z in latents(result.search).items():
        if z.prunable:
            magnitudes.append(np.abs(np.asarray(z.value())))
            kept.append(np.isin(np.arange(z.size), survivors[name]))
    magnitudes, kept = np.concatenate(magnitudes), np.concatenate(kept)
    order = np.argsort(-magnitudes, kind="stable")
    magnitudes, kept, rank = magnitudes[order], kept[order], np.arange(len(order))

    def draw(axes):
        for label, chosen, colour in (("kept", kept, AFTER), ("removed", ~kept, COLOURS[1])):
            look = {"color": colour, "label": f"{label} ({chosen.sum()})"}
            axes.scatter(rank[chosen], magnitudes[chosen], 7, **look)
        bend(axes, threshold / 5, max(threshold, magnitudes.max()))
        draw_rule(axes, Rule(f"threshold {threshold:g}", threshold))
        round_steps(axes, xlabel="entries of all prunable latents, sorted", ylabel="|z|")
        return {}

    title = "Magnitudes at the end of the search"
    return new_chart(title, draw, scale_note(threshold / 5))
