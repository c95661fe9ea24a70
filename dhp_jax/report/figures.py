"""A matplotlib figure as SVG for a page, where it follows dark mode, and as PNG elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
import io
import os
import re
from typing import TYPE_CHECKING
import xml.etree.ElementTree as ET

if TYPE_CHECKING:  # it is slow to import, and commands that draw nothing do without
    from matplotlib.figure import Figure

INK, SOFT, EDGE, BEFORE = "#1b2026", "#59636e", "#dde2e8", "#ccd4de"
COLOURS = ["#1f6fb2", "#d9603b", "#2a9d6f", "#8a5bc4", "#b8860b", "#c2457f", "#4c8ea6", "#6b7280"]

# A page has a variable for each colour, with another value in dark mode.
NAMED = {"ink": INK, "soft": SOFT, "edge": EDGE, "before": BEFORE}
NAMED |= {f"c{place}": colour for place, colour in enumerate(COLOURS)}
VARIABLES = {colour: f"var(--{name})" for name, colour in NAMED.items()}
STYLE = {
    "font.size": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "axes.titlesize": 13,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": EDGE,
    "xtick.color": EDGE,
    "ytick.color": EDGE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": EDGE,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.5,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Chart:
    """A figure with what a page says beside it: a title above, and a note below unless it is empty.

    `tips` are for marks that are pointed at, by the `gid` of the artist that draws them.
    """

    title: str
    figure: "Figure"
    note: str = ""
    tips: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def svg(self) -> str:
        """The figure as an element of a page: text stays text, colours are the page's."""
        import matplotlib

        drawn = io.StringIO()
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.title}):
            self.figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
        return _inline(ET.fromstring(drawn.getvalue()), self.title, self.tips)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the figure with its title as PNG."""
        import matplotlib

        (axes, *_) = self.figure.axes
        with matplotlib.rc_context(STYLE):
            axes.set_title(self.title, loc="left")
            self.figure.savefig(path, dpi=200)
            axes.set_title("", loc="left")


def _inline(svg: ET.Element, title: str, tips: Mapping[str, Sequence[str]]) -> str:
    """The element `svg` of a file, made to stand in a page."""
    for parent in list(svg.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # a style would be the whole page's
                parent.remove(child)
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            name.rpartition("}")[2]: _short(name, value) for name, value in element.attrib.items()
        }
    for group in list(svg.iter("g")):
        told = tips.get(group.attrib.pop("id", ""), ())
        marks = list(group.iter("use")) or [group]
        for mark, tip in zip(marks, told, strict=bool(told)):
            ET.SubElement(mark, "title").text = tip
    view = svg.get("viewBox")
    style = f"--width:{float(view.split()[2]):.0f}px"
    svg.attrib = {"viewBox": view, "role": "img", "aria-label": title, "style": style}
    return re.sub(r"\s*\n\s*", " ", ET.tostring(svg, encoding="unicode"))


def _short(name: str, value: str) -> str:
    """An attribute with the page's colours and font, and with two digits after the point."""
    if name == "style":
        value = re.sub(r"font-family: [^;]*(; |$)", "", value)
        return re.sub("#[0-9a-f]{6}", lambda found: VARIABLES.get(found[0], found[0]), value)
    if name in ("d", "x", "y", "transform"):
        return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.2f}", value)
    return value
