"""Drawings of a run as SVG that stands in a page and takes its colours from the page's style."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import itertools
import math

from dhp_jax.report.markup import Markup, element, joined

WIDTH, HEIGHT = 360, 240


LEFT, RIGHT, TOP, BOTTOM = 56, 10, 18, 40


DECADES = 6  # of values beside 0 on one axis, at most


MOST_POINTS = 400  # of a line


MARKED = 60  # a line of so many points or fewer shows each


LETTER, LINE = 6.2, 13  # of a label: the width of a letter, the height of the line


NAMED = 48  # layers of which each has its name beside it


MOST_LATENTS = 32  # that are drawn, each with its name


Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Values over time, or points by themselves.

    Attributes:
      label: in the legend; empty for one that another entry stands for.
      points: finite `(x, y)`; `None` is where the pen is lifted.
      colour: number of its colour, from 0.
      joined: whether points are connected.
      spreads: for each point the ends of a bar through it, along x; none if empty.
    """

    label: str
    points: Sequence[Point | None]
    colour: int = 0
    joined: bool = True
    spreads: Sequence[Point] = ()


@dataclass(frozen=True)
class Rule:
    """A straight line across a chart: `at` a value of y, or of x if it is `upright`."""

    label: str
    at: float
    upright: bool = False


def figure(title: str, drawing: Markup, *, legend: Markup | None = None, note: str = "") -> Markup:
    """A drawing with its title above, and below it what its colours mean and a remark."""
    return element(
        "figure",
        element("h3", title),
        element("div", drawing, class_="scroll"),
        legend,
        element("figcaption", note) if note else None,
    )


def legend(lines: Sequence[Line]) -> Markup:
    """What the colours of lines mean."""
    return key([(f"c{line.colour % 8}", line.label) for line in lines if line.label])


def key(entries: Sequence[tuple[str, str]]) -> Markup:
    """What colours mean, each given by a class of the style sheet."""
    swatches = (
        element("span", element("i", class_=f"swatch {name}"), label) for name, label in entries
    )
    return element("p", *swatches, class_="legend")


def chart(
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    rules: Sequence[Rule] = (),
    log: bool = False,
    low: float | None = None,
    x_low: float | None = None,
    text: Callable[[float], str] = "{:.4g}".format,
) -> Markup:
    """A chart of lines.

    Args:
      lines: at least one of them has a point.
      x, y: names of the axes.
      rules: lines across it.
      log: a logarithmic y axis, where values differ enough for it and none is negative; one that
        is linear down to 0 where some are 0.
      low, x_low: where the axes begin, if not at the smallest value.
      text: a y value for people, shown when pointed at.
    """
    points = [point for line in lines for point in line.points if point]
    level = [rule.at for rule in rules if not rule.upright]
    wide = [end for line in lines for spread in line.spreads for end in spread]
    wide += [rule.at for rule in rules if rule.upright]
    room = 0.05 * any(line.spreads for line in lines)
    across = Scale.over([p[0] for p in points] + wide, LEFT, WIDTH - RIGHT, low=x_low, margin=room)
    up = Scale.over(
        [p[1] for p in points] + level, HEIGHT - BOTTOM, TOP, log=log, low=low, margin=0.05
    )
    bent = f", linear below {up.linear:.2g}" if up.linear else ""
    drawn = [_axes(across, up, x, y + bent)]
    drawn += _rules(rules, across, up, [_trace(line, across, up) for line in lines])
    for line in lines:
        path = _path(line.points, across, up) if line.joined else None
        shown = [p for p in line.points if p]
        marks = [
            _mark(p, across, up, f"{line.label}: {text(p[1])} at {p[0]:g}", line.joined)
            for p in (shown if len(shown) <= MARKED or not line.joined else [])
        ]
        bars = [_bar(p, ends, across, up) for p, ends in zip(shown, line.spreads, strict=False)]
        drawn.append(element("g", path, *bars, *marks, class_=f"c{line.colour % 8}"))
    return svg(WIDTH, HEIGHT, f"{y} over {x}", *drawn)


def fan(
    times: Sequence[float],
    quantiles: Sequence[Sequence[float]],
    threshold: float,
    *,
    x: str,
    y: str,
) -> Markup:
    """Bands between quantiles that are followed over time, the darker the nearer to the median.

    Args:
      times: when, ascending; at least two.
      quantiles: ascending values at each time, as many at all of them.
      threshold: below which values count as dead; the y axis is linear around 0, far below it.
      x, y: names of the axes.
    """
    chosen = _thinned(list(zip(times, quantiles, strict=True)), 120)
    across = Scale.over([time for time, _ in chosen], LEFT, WIDTH - RIGHT)
    highest = max(threshold, *(values[-1] for _, values in chosen))
    up = Scale.bent(highest, threshold / 5, HEIGHT - BOTTOM, TOP)
    bands = len(chosen[0][1]) - 1
    drawn = [_axes(across, up, x, y)]
    for band in range(bands):
        lower = [(across(time), up(values[band])) for time, values in chosen]
        upper = [(across(time), up(values[band + 1])) for time, values in reversed(chosen)]
        corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in lower + upper)
        title = element("title", f"{100 * band // bands} to {100 * (band + 1) // bands} %")
        opacity = 0.2 + 0.6 * (1 - abs(2 * band + 1 - bands) / bands)
        drawn.append(element("polygon", title, points=corners, fill_opacity=opacity))
    rule = Rule(f"threshold {threshold:g}", threshold)
    area = element("g", *drawn[1:], class_="area")
    return svg(WIDTH, HEIGHT, y, drawn[0], area, *_rules([rule], across, up, [], over=True))


def silhouette(layers: Sequence[tuple[str, int, int]], details: Sequence[str]) -> Markup:
    """The outline of a network: how wide each layer was, pale, and what is left of it.

    Args:
      layers: name, channels before and after, in order of execution.
      details: what is told of each layer that is pointed at.
    """
    named = len(layers) <= NAMED
    step = max(19, 430 / len(layers)) if named else max(6, 900 / len(layers))
    foot = 12 + 5.9 * max(len(name) + 8 for name, _, _ in layers) if named else 24
    width, tall = 16 + step * len(layers), 150
    middle, widest = 8 + tall / 2, max(before for _, before, _ in layers)
    drawn = []
    for place, ((name, before, after), detail) in enumerate(zip(layers, details, strict=True)):
        left = 8 + place * step
        bars = []
        for channels, kind in ((before, "before"), (after, "after")):
            high = max(1.5, tall * channels / widest)
            bars.append(
                element(
                    "rect",
                    x=left,
                    y=middle - high / 2,
                    width=step - (2 if step > 12 else 0.5),
                    height=high,
                    class_=kind,
                )
            )
        label = None
        if named:
            x, y = left + step / 2 + 3, tall + 16
            count = f"{after} of {before}" if after != before else f"{before}"
            label = element(
                "text",
                joined(f"{name} ", element("tspan", count, class_="strong")),
                transform=f"translate({x:.1f} {y}) rotate(-90)",
                text_anchor="end",
                class_="small",
            )
        drawn.append(element("g", element("title", detail), *bars, label))
    if not named:
        drawn.append(_groups([name for name, _, _ in layers], step, tall + 22))
    limits = f"min-width:{width:.0f}px;max-width:{(1.6 if named else 1.3) * width:.0f}px"
    label = "Channels of every layer, before and after"
    return svg(width, tall + 16 + foot, label, *drawn, style=limits)


def decline(
    times: Sequence[float], rows: Sequence[tuple[str, int, Sequence[int]]], *, x: str
) -> Markup:
    """How many entries of each latent are left over time, one strip a latent.

    Args:
      times: when, ascending; at least two.
      rows: name of each latent, its size, and the entries left at each of those times.
      x: name of the time axis.
    """
    high, gap, right = 15, 3, 66
    left = 14 + 6.1 * max(len(name) for name, _, _ in rows)
    width = max(WIDTH, left + right + 160)
    across = Scale.over(times, left, width - right)
    drawn = []
    for place, (name, size, counts) in enumerate(rows):
        bottom = 4 + (place + 1) * (high + gap) - gap
        corners = [(across(times[0]), bottom)]
        steps = _thinned(list(zip(times, counts, strict=True)), 80)
        corners += [(across(time), bottom - high * count / size) for time, count in steps]
        corners.append((across(times[-1]), bottom))
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        drawn.append(
            element(
                "g",
                element("title", f"{name}: {counts[-1]} of {size} left"),
                element(
                    "rect",
                    x=left,
                    y=bottom - high,
                    width=width - right - left,
                    height=high,
                    class_="before",
                ),
                element("polygon", points=path, class_="after"),
                element("text", name, x=left - 6, y=bottom - 4, text_anchor="end"),
                element("text", f"{counts[-1]} of {size}", x=width - right + 6, y=bottom - 4),
            )
        )
    bottom = 4 + len(rows) * (high + gap)
    drawn += [
        element("text", f"{times[0]:g}", x=left, y=bottom + 13),
        element("text", f"{times[-1]:g}", x=width - right, y=bottom + 13, text_anchor="end"),
        element("text", x, x=(left + width - right) / 2, y=bottom + 28, text_anchor="middle"),
    ]
    return svg(width, bottom + 34, "Entries of every latent that are left over time", *drawn)


def svg(
    width: float, height: float, label: str, *content: Markup, style: str | None = None
) -> Markup:
    """A drawing of a size that a page may scale, within the limits of its style."""
    view = f"0 0 {width:.0f} {height:.0f}"
    return element("svg", *content, viewBox=view, role="img", aria_label=label, style=style)


@dataclass(frozen=True)
class Scale:
    """From values to places on an axis, and the values that are written at it.

    Attributes:
      place: of a value.
      ticks: values that are written.
      linear: below which an axis that is logarithmic above is linear, if it is such a one.
    """

    place: Callable[[float], float]
    ticks: Sequence[float]
    linear: float | None = None

    def __call__(self, value: float) -> float:
        return self.place(value)

    @classmethod
    def over(
        cls,
        values: Sequence[float],
        start: float,
        end: float,
        *,
        log: bool = False,
        low: float | None = None,
        margin: float = 0.0,
    ) -> "Scale":
        """A linear axis over some values, or a logarithmic one where that shows more."""
        smallest, largest = min(values), max(values)
        least = max(min((v for v in values if v > 0), default=largest), largest / 10**DECADES)
        if log and smallest == 0 and largest > 5 * least:
            return cls.bent((1 + margin) * largest, least, start, end)
        log = log and smallest > 0 and largest > 5 * smallest
        smallest = smallest if low is None or log else min(low, smallest)
        bend = math.log10 if log else float
        first, last = bend(smallest), bend(largest)
        if first == last:
            first, last = (first - 0.5, last + 0.5) if first else (0.0, 1.0)
        room = margin * (last - first)
        first, last = first - (room if low is None or log else 0), last + room

        def place(value: float) -> float:
            return start + (end - start) * (bend(value) - first) / (last - first)

        return cls(place, _log_ticks(first, last) if log else _ticks(first, last))

    @classmethod
    def bent(cls, largest: float, linear: float, start: float, end: float) -> "Scale":
        """From 0: linear up to about `linear`, and logarithmic above."""
        whole = math.asinh(largest / linear)
        ticks = _log_ticks(math.log10(linear), math.log10(largest))

        def place(value: float) -> float:
            return start + (end - start) * math.asinh(value / linear) / whole

        return cls(place, [0.0, *ticks], linear)


def _ticks(first: float, last: float) -> list[float]:
    """Round values, four to eight of them."""
    raw = (last - first) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    begin, end = math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9)
    return [n * step for n in range(begin, end + 1)]


def _log_ticks(first: float, last: float) -> list[float]:
    """Round values between powers of ten, not too many of them."""
    for digits in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(first), math.ceil(last) + 1)
        ticks = [m * 10.0**p for p in powers for m in digits]
        ticks = [t for t in ticks if t and first - 1e-9 <= math.log10(t) <= last + 1e-9]
        if len(ticks) <= 8:
            break
    return ticks


def _axes(across: Scale, up: Scale, x: str, y: str) -> Markup:
    """Grid lines, the values at them and the names of both axes."""
    bottom = HEIGHT - BOTTOM
    drawn = []
    for tick in up.ticks:
        at = up(tick)
        drawn.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        drawn.append(element("text", f"{tick:g}", x=LEFT - 6, y=at + 4, text_anchor="end"))
    for tick in across.ticks:
        at = across(tick)
        drawn.append(element("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="grid"))
        drawn.append(element("text", f"{tick:g}", x=at, y=bottom + 16, text_anchor="middle"))
    middle = (TOP + bottom) / 2
    turned = f"translate(11 {middle:.1f}) rotate(-90)"
    drawn.append(element("text", y, transform=turned, text_anchor="middle", class_="axis"))
    centre = (LEFT + WIDTH - RIGHT) / 2
    drawn.append(element("text", x, x=centre, y=HEIGHT - 5, text_anchor="middle", class_="axis"))
    return element("g", *drawn)


@dataclass(frozen=True)
class _Label:
    """A line of text by its left or right end, and how many lines it is away from what it names."""

    text: str
    x: float
    y: float
    anchor: str = "start"
    away: int = 0

    @property
    def left(self) -> float:
        return self.x - (self.width if self.anchor == "end" else 0)

    @property
    def width(self) -> float:
        """About as wide as it is drawn."""
        return LETTER * len(self.text)

    def meets(self, other: "_Label") -> bool:
        """Whether one lies on the other."""
        aside = self.left > other.left + other.width or other.left > self.left + self.width
        return not aside and abs(self.y - other.y) < LINE

    def hidden(self, traces: Sequence[Sequence[Point]]) -> int:
        """How much of lines it covers, or what being away from its place is held to be worth."""
        right, top, bottom = self.left + self.width, self.y - LINE, self.y + 3
        covered = (self.left <= x <= right and top <= y <= bottom for t in traces for x, y in t)
        return sum(covered) + 6 * self.away


def _rules(
    rules: Sequence[Rule],
    across: Scale,
    up: Scale,
    traces: Sequence[Sequence[Point]],
    *,
    over: bool = False,
) -> list[Markup]:
    """Rules, the topmost first, with labels that keep clear of each other and of lines."""
    drawn, taken = [], []
    for rule in sorted(rules, key=lambda rule: (not rule.upright, -rule.at)):
        if rule.upright:
            at = across(rule.at)
            ends = {"x1": at, "x2": at, "y1": TOP, "y2": HEIGHT - BOTTOM}
            places = [_Label(rule.label, at, TOP - 5)]
        else:
            at = up(rule.at)
            ends = {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": at, "y2": at}
            places = _places(rule.label, at)
        free = [place for place in places if not any(map(place.meets, taken))]
        label = min(free or places, key=lambda place: place.hidden(traces))
        taken.append(label)
        text = element("text", label.text, x=label.x, y=label.y, text_anchor=label.anchor)
        line = element("line", **ends)
        drawn.append(element("g", line, text, class_="rule over" if over else "rule"))
    return drawn


def _places(text: str, at: float) -> list[_Label]:
    """Where the label of a level rule may be, the best first if nothing is in the way."""
    return [
        _Label(text, x, y, anchor, away)
        for away in range(4)
        for y in (at - 4 - away * LINE, at + (1 + away) * LINE)
        if LINE <= y < HEIGHT - BOTTOM
        for x, anchor in ((WIDTH - RIGHT - 2, "end"), (LEFT + 4, "start"))
    ]


def _trace(line: Line, across: Scale, up: Scale) -> list[Point]:
    """Places along a line, a few pixels from each other."""
    found = []
    for there, part in itertools.groupby(line.points, key=lambda point: point is not None):
        places = [(across(a), up(b)) for a, b in _thinned(list(part), MOST_POINTS)] if there else []
        for (x, y), (to_x, to_y) in itertools.pairwise(places if line.joined else []):
            count = math.ceil(math.hypot(to_x - x, to_y - y) / 4)
            found += [
                (x + k / count * (to_x - x), y + k / count * (to_y - y)) for k in range(count)
            ]
        found += places
    return found


def _path(points: Sequence[Point | None], across: Scale, up: Scale) -> Markup:
    """A line through points, of which neighbours are left out where there are too many."""
    strokes = []
    for there, part in itertools.groupby(points, key=lambda point: point is not None):
        if there:
            places = [f"{across(a):.1f} {up(b):.1f}" for a, b in _thinned(list(part), MOST_POINTS)]
            strokes.append("M" + "L".join(places))
    return element("path", d="".join(strokes), class_="line")


def _mark(point: Point, across: Scale, up: Scale, title: str, joined: bool) -> Markup:
    x, y = across(point[0]), up(point[1])
    return element("circle", element("title", title), cx=x, cy=y, r=2.5 if joined else 5.0)


def _bar(point: Point, ends: Point, across: Scale, up: Scale) -> Markup:
    """The spread of a point along x."""
    at = up(point[1])
    return element("line", x1=across(ends[0]), x2=across(ends[1]), y1=at, y2=at, class_="spread")


def _thinned(items: list, most: int) -> list:
    """At most about so many of some items, evenly; the last is among them."""
    every = max(1, math.ceil(len(items) / most))
    return items[(len(items) - 1) % every :: every]


def _groups(names: Sequence[str], step: float, at: float) -> Markup:
    """Names of the parts that layers belong to, below them, as far as there is room."""
    drawn, place, free = [], 0, 0.0
    for group, members in itertools.groupby(names, key=lambda n: ".".join(n.split(".")[:-2])):
        left, count = 8 + place * step, len(list(members))
        place += count
        label = group or names[place - 1]
        if left >= free:
            drawn.append(element("line", x1=left, x2=left, y1=at - 14, y2=at - 8, class_="grid"))
            drawn.append(element("text", label, x=left, y=at + 4))
            free = left + 6.5 * len(label) + 8
    return element("g", *drawn)
