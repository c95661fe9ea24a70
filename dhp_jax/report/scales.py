"""Axes of charts: scales, round values at them, and names beside points."""

from collections.abc import Sequence
import itertools
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it is slow to import, and commands that draw nothing do without
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

MAX_POINTS = 400  # of a line
DECADES = 6  # of values beside 0 on one axis, at most
MAX_TICKS = 8


def linear_below(values: Sequence[float]) -> float | None:
    """Where a logarithmic axis has to turn linear so that a 0 is on it; `None` if it need not."""
    largest = max(values)
    least = max(min((v for v in values if v > 0), default=largest), largest / 10**DECADES)
    return floor_round(least) if min(values) == 0 and largest > 5 * least else None


def scale_note(below: float) -> str:
    """What a reader must know of an axis that is logarithmic down to a value; see `bend`."""
    return f"The scale is logarithmic above {below:g} and linear below it." if below else ""


def floor_round(value: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50, ... (and 0.5, 0.2, ...) that is not above a value."""
    power = math.floor(math.log10(value) + 1e-9)
    return max(d * 10.0**power for d in (1, 2, 5) if d * 10.0**power <= value * (1 + 1e-9))


def set_scale(
    axes: "Axes", values: Sequence[float], *, log: bool, low: float | None = None
) -> None:
    """Makes the y axis logarithmic where that is asked for and shows more; all is drawn already.

    `low` is where a linear axis begins, if not at the smallest value.
    """
    smallest, largest = min(values), max(values)
    below = linear_below(values) if log else None
    if below:
        bend(axes, below, largest)
    elif log and smallest > 0 and largest > 5 * smallest:
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        _write(axes, log_ticks(bottom, top))
    elif low is not None:
        axes.set_ylim(bottom=low)


def bend(axes: "Axes", below: float, largest: float) -> None:
    """Makes the y axis begin at 0, linear below a value and logarithmic above; linear for 0."""
    if below:
        axes.set_yscale("symlog", linthresh=below, linscale=0.5)
        _write(axes, [0.0, *log_ticks(below, largest)])
    axes.set_ylim(0, 1.15 * largest)


def _write(axes: "Axes", ticks: Sequence[float]) -> None:
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def log_ticks(smallest: float, largest: float) -> list[float]:
    """Round values from one positive value to another, at most `MAX_TICKS` of them."""
    powers = range(math.floor(math.log10(smallest)), math.ceil(math.log10(largest)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        ticks = [t for t in ticks if smallest * (1 - 1e-9) <= t <= largest * (1 + 1e-9)]
        if len(ticks) <= MAX_TICKS:
            break
    return ticks[:: math.ceil(len(ticks) / MAX_TICKS) or 1]


def round_steps(axes: "Axes", **names: str) -> None:
    """Names the axes, and writes few round values along x, so that they do not meet."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter("{x:.7g}")
    axes.set(**names)


def thinned(items: Sequence[Any]) -> list[Any]:
    """At most about `MAX_POINTS` of some items, evenly; the last of each stretch is among them.

    Stretches are separated by `None`, which is kept.
    """
    every, found = max(1, math.ceil(len(items) / MAX_POINTS)), []
    for there, part in itertools.groupby(items, key=lambda item: item is not None):
        stretch = list(part)
        found += stretch[(len(stretch) - 1) % every :: every] if there else [None]
    return found


def name_points(
    axes: "Axes",
    points: Sequence[tuple[str, float, float]],
    paths: Sequence[Sequence[tuple[float, float]]] = (),
) -> None:
    """Writes names beside points, clear of each other, of all points and of the lines of paths."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # from here on it is known where everything is
    place, radius = axes.transData.transform, 6 * axes.figure.dpi / 72
    taken = []
    for _, *point in points:
        x, y = place(point)
        taken.append(Bbox.from_extents(x - radius, y - radius, x + radius, y + radius))
    for start, end in itertools.chain.from_iterable(map(itertools.pairwise, paths)):
        (x, y), (to_x, to_y) = place((start, end))
        parts = (k / 25 for k in range(26))
        taken += [Bbox([[x + p * (to_x - x), y + p * (to_y - y)]] * 2) for p in parts]
    for name, *point in points:
        texts = [axes.annotate(name, point, at, fontsize=11, **look) for at, look in _PLACES]
        boxes = [text.get_window_extent() for text in texts]
        best = min(range(len(texts)), key=lambda i: _hidden(boxes[i], taken, axes.bbox))
        taken.append(boxes[best])
        for text in texts[:best] + texts[best + 1 :]:
            text.remove()


# Offsets of a name from its point, the best first if nothing is in the way.
_PLACES = [
    ((away * side, away * up), {"ha": ha, "va": va, "textcoords": "offset points"})
    for away in (8, 20, 32)
    for side, ha in ((0, "center"), (1, "left"), (-1, "right"))
    for up, va in ((1, "bottom"), (-1, "top"), (0, "center"))
    if side or up
]


def _hidden(box: "Bbox", taken: Sequence["Bbox"], inside: "Bbox") -> int:
    """How many others a box lies on; being outside is worse."""
    outside = box.x0 < inside.x0 - 4 or box.x1 > inside.x1 + 4
    return 1000 * outside + sum(map(box.overlaps, taken))
