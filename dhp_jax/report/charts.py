"""The charts of reports: lines, points, bands, strips and the outline of a network."""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from dhp_jax.report.figures import COLOURS, SOFT, STYLE, Chart
from dhp_jax.report.scales import (
    linear_below,
    name_points,
    round_steps,
    scale_note,
    set_scale,
    thinned,
)

if TYPE_CHECKING:  # it is slow to import, and commands that draw nothing do without
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 360, 230  # of a chart without its legend, in pixels of a page
MAX_MARKED = 30  # a line of so many points or fewer has a marker at each
MARKERS = "os^DvPX*"
Point = tuple[float, float]


class Line(NamedTuple):
    """Values over time; `None` among the points is where the pen is lifted."""

    label: str
    points: Sequence[Point | None]
    colour: int = 0  # its number


class Rule(NamedTuple):
    """A line across a chart: `at` a value of y, or of x if it is `upright`."""

    label: str
    at: float
    upright: bool = False


class Dot(NamedTuple):
    """A point by itself, with its name beside it; those of one group are joined by a line."""

    label: str
    x: float
    y: float
    colour: int = 0  # its number, and that of the shape
    spread: Sequence[float] = ()  # ends of a bar through it along x
    group: Any = None


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    rules: Sequence[Rule] = (),
    log: bool = False,
    low: float | None = None,
    note: str = "",
    text: Callable[[float], str] = "{:.4g}".format,
) -> Chart:
    """A chart of lines, of which at least one has a point.

    Args:
      title: above it.
      lines, rules: in it, and across it.
      x, y: names of the axes.
      log: a logarithmic y axis, where values differ enough for it and none is negative; one that
        is linear down to 0 where some are 0.
      low: where the y axis begins, if not at the smallest value.
      note: below it.
      text: a y value for people, shown when pointed at.
    """
    values = [point[1] for line in lines for point in line.points if point]
    values += [rule.at for rule in rules if not rule.upright]
    bent = log and linear_below(values)

    def draw(axes: "Axes") -> dict[str, list[str]]:
        tips = {}
        for place, line in enumerate(lines):
            shown = thinned(line.points)
            marked = [point for point in shown if point]
            few = len(marked) <= MAX_MARKED
            if few:
                tips[f"line{place}"] = [f"{line.label}: {text(b)} at {a:.7g}" for a, b in marked]
            axes.plot(
                *zip(*(point or (math.nan, math.nan) for point in shown), strict=True),
                color=COLOURS[line.colour % len(COLOURS)],
                marker="o" if few else None,
                linewidth=1.6 if place else 3,  # one that lies on the first does not hide it
                markersize=3.5 if place else 5.5,
                label=line.label,
                gid=f"line{place}",
            )
        for rule in rules:
            draw_rule(axes, rule)
        set_scale(axes, values, log=log, low=low)
        round_steps(axes, xlabel=x, ylabel=y)
        return tips

    if bent:
        note = f"{note} {scale_note(bent)}".lstrip()
    return new_chart(title, draw, note)


def dot_chart(
    title: str,
    dots: Sequence[Dot],
    *,
    x: str,
    y: str,
    rules: Sequence[Rule] = (),
    log: bool = False,
    x_low: float | None = None,
    note: str = "",
) -> Chart:
    """A chart of points by themselves, each with its name; arguments as of `line_chart`."""

    def draw(axes: "Axes") -> dict[str, list[str]]:
        axes.margins(0.12, 0.15)
        groups = {dot.group for dot in dots} - {None}
        paths = [sorted((dot.x, dot.y) for dot in dots if dot.group == group) for group in groups]
        for path in paths:
            axes.plot(*zip(*path, strict=True), color=SOFT, linewidth=1, gid="joined")
        for place, dot in enumerate(dots):
            colour, marker = COLOURS[dot.colour % len(COLOURS)], MARKERS[dot.colour % len(MARKERS)]
            if dot.spread:
                axes.plot(dot.spread, [dot.y] * 2, color=colour, alpha=0.55, gid="spread")
            hollow = {"markerfacecolor": "none", "markeredgewidth": 2, "markersize": 8}
            axes.plot(dot.x, dot.y, marker, color=colour, gid=f"dot{place}", **hollow)
        for rule in rules:
            draw_rule(axes, rule)
        set_scale(axes, [dot.y for dot in dots], log=log)
        round_steps(axes, xlabel=x, ylabel=y)
        if x_low is not None:
            axes.set_xlim(left=x_low)
        paths += [[(end, dot.y) for end in dot.spread] for dot in dots if dot.spread]
        name_points(axes, [(dot.label, dot.x, dot.y) for dot in dots], paths)
        return {f"dot{i}": [f"{d.label}: {d.y:.4g} at {d.x:.4g}"] for i, d in enumerate(dots)}

    return new_chart(title, draw, note, height=HEIGHT + 30)


def new_chart(
    title: str,
    draw: Callable[["Axes"], Mapping[str, Sequence[str]]],
    note: str = "",
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> Chart:
    """A figure of one drawing, with room for its legend below it; sizes in pixels of a page.

    `draw` draws on the axes and returns what is told of marks that are pointed at, see `Chart`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.subplots()
        tips = draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            widest = 40 + 6.3 * max(map(len, labels))
            columns = max(1, min(len(labels), int(width / widest)))
            rows = math.ceil(len(labels) / columns)
            figure.set_size_inches(width / 72, (height + 8 + 17 * rows) / 72)
            figure.legend(handles, labels, loc="outside lower left", ncols=columns)
    return Chart(title, figure, note, tips)


def draw_rule(axes: "Axes", rule: Rule) -> None:
    """Draws a line across a chart."""
    style = {"color": SOFT, "linewidth": 1, "linestyle": "--", "gid": "rule"}
    if rule.upright:
        axes.axvline(rule.at, **style)
        above = axes.get_xaxis_transform()
        axes.text(rule.at, 1.01, rule.label, transform=above, fontsize=11, color=SOFT)
    else:
        axes.axhline(rule.at, label=rule.label, **style)
