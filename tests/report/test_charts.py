"""Scales, lines and names of charts, and what they are in a page."""

import itertools
import math
import re
from types import SimpleNamespace
import xml.etree.ElementTree as ET

from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.report import figures, run_charts, scales, write
from dhp_jax.report.charts import Dot, Line, Rule, dot_chart, line_chart
from dhp_jax.report.render import STYLE_SHEET
from dhp_jax.report.run_charts import group_names


def axes_of(chart):
    return chart.figure.axes[0]


def lines_of(chart):
    """The lines of a chart by their labels."""
    return {line.get_label(): line for line in axes_of(chart).lines}


# Scales


@given(st.floats(1e-9, 1e9), st.floats(1.0, 1e12))
def test_round_values_of_a_logarithmic_axis_lie_on_it_and_are_few(smallest, factor):
    ticks = scales.log_ticks(smallest, smallest * factor)
    assert len(ticks) <= scales.MAX_TICKS
    assert ticks == sorted(set(ticks))
    assert all(0.999 * smallest <= tick <= 1.001 * smallest * factor for tick in ticks)
    assert all(f"{tick:.6e}"[:2] in ("1.", "2.", "3.", "5.") for tick in ticks)
    assert ticks or factor < 2.6


@pytest.mark.parametrize(
    ("values", "scale", "ticks"),
    [
        ([0.02, 2], "log", [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]),
        ([1, 1e6], "log", [1, 10, 100, 1e3, 1e4, 1e5, 1e6]),
        ([0, 0.078, 80], "symlog", [0, 0.1, 0.3, 1, 3, 10, 30]),
        ([3, 14], "linear", None),
        ([0, 5, 5], "linear", None),
    ],
)
def test_ticks_are_round(values, scale, ticks):
    axes = Figure().subplots()
    axes.plot(values)
    scales.set_scale(axes, values, log=True)
    assert axes.get_yscale() == scale
    if ticks:
        assert list(axes.get_yticks()) == pytest.approx(ticks)
        assert [text.get_text() for text in axes.get_yticklabels()] == [f"{t:g}" for t in ticks]


@given(st.floats(1e-9, 1e9))
def test_a_round_value_below_another_is_the_next_one(value):
    found = scales.floor_round(value)
    assert found <= value * (1 + 1e-9)
    assert value < 2.5 * found * (1 + 1e-9)
    assert f"{found:.6e}"[0] in "125"


def test_a_zero_makes_the_scale_linear_near_it_and_the_note_says_so():
    points = [(0, 80.0), (1, 0.078), (2, 0.0)]
    chart = line_chart("Error", [Line("a", points)], x="step", y="error, %", log=True)
    assert axes_of(chart).get_ylim()[0] == 0
    assert axes_of(chart).get_ylabel() == "error, %"
    assert chart.note == "The scale is logarithmic above 0.05 and linear below it."
    low, middle, high = axes_of(chart).transData.transform([(0, 0), (0, 1), (0, 80)])[:, 1]
    assert (middle - low) / (high - low) > 0.3  # on a linear axis 0.0125


# Lines


def test_a_pen_that_is_lifted_leaves_a_gap():
    points = [(0, 1.0), (1, 2.0), None, (2, 3.0), (3, 4.0)]
    chart = line_chart("A", [Line("a", points)], x="x", y="y")
    drawn = lines_of(chart)["a"].get_xydata()
    np.testing.assert_array_equal(drawn, [[0, 1], [1, 2], [math.nan] * 2, [2, 3], [3, 4]])
    titles = [title.text for title in ET.fromstring(chart.svg()).iter("title")]
    assert titles == ["a: 1 at 0", "a: 2 at 1", "a: 3 at 2", "a: 4 at 3"]


def test_long_lines_are_thinned_and_keep_their_end():
    points = [(i, math.sin(i)) for i in range(100_000)]
    drawn = lines_of(line_chart("A", [Line("a", points)], x="x", y="y"))["a"]
    assert scales.MAX_POINTS / 2 < len(drawn.get_xdata()) <= scales.MAX_POINTS
    assert drawn.get_xdata()[-1] == 99_999
    assert drawn.get_marker() == "None"


def test_a_rule_has_its_name_in_the_legend_and_so_lies_on_no_line():
    chart = line_chart("A", [Line("a", [(0, 1.0), (9, 9.0)])], x="x", y="y", rules=[Rule("r", 1.0)])
    (legend,) = chart.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "r"]
    assert set(lines_of(chart)["r"].get_ydata()) == {1.0}
    chart.figure.draw_without_rendering()
    inside = axes_of(chart).get_window_extent()
    assert legend.get_window_extent().y1 <= inside.y0


# Points


def extents(chart):
    """The boxes of the names in a chart."""
    chart.figure.draw_without_rendering()
    return [text.get_window_extent() for text in axes_of(chart).texts]


@pytest.mark.parametrize(
    "places", [[(1, 1)] * 4, [(1, 1), (1.01, 1), (1.02, 1)], [(5, 5), (1, 1), (9, 9), (1, 9)]]
)
def test_names_of_near_points_lie_neither_on_each_other_nor_outside(places):
    dots = [Dot(f"a run {i}", x, y, i) for i, (x, y) in enumerate(places)]
    chart = dot_chart("A", dots, x="x", y="y")
    boxes = extents(chart)
    assert [text.get_text() for text in axes_of(chart).texts] == [dot.label for dot in dots]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    bounds = chart.figure.bbox
    assert all(bounds.x0 <= box.x0 and box.x1 <= bounds.x1 for box in boxes)


def test_points_are_hollow_and_of_different_shapes_so_that_none_hides_another():
    chart = dot_chart("A", [Dot("a", 1, 1, 0), Dot("b", 1, 1, 1)], x="x", y="y")
    one, other = axes_of(chart).lines
    assert one.get_marker() != other.get_marker()
    assert {one.get_markerfacecolor(), other.get_markerfacecolor()} == {"none"}


def test_points_of_one_group_are_joined_in_order_of_x():
    dots = [Dot("a", 3, 1, 0, group="g"), Dot("b", 1, 2, 1, group="g"), Dot("c", 2, 3, 2)]
    (path,) = [
        line
        for line in axes_of(dot_chart("A", dots, x="x", y="y")).lines
        if len(line.get_xdata()) > 1
    ]
    assert path.get_xydata().tolist() == [[1, 2], [3, 1]]


def test_deep_networks_have_names_of_groups_instead_of_layers():
    names = [f"blocks.{i // 2}.layers.{i % 2}" for i in range(110)]
    found = group_names(names, 900 / 110)
    assert 3 <= len(found) <= 30
    assert found[0] == "blocks.0"
    assert all(names[place].startswith(group) for place, group in found.items())


# In a page


def test_a_network_without_convolutions_has_the_widths_of_its_layers():
    both = {}
    for when, width in (("before", 8), ("after", 3)):
        layers = nnx.Linear(4, width, rngs=nnx.Rngs(0)), nnx.Linear(width, 2, rngs=nnx.Rngs(0))
        both[when] = dhp.measure_cost(nnx.Sequential(*layers), (4,))
    chart = run_charts._channels(SimpleNamespace(result=SimpleNamespace(pruned=True, **both)))
    assert "every layer" in chart.title
    texts = [text.get_text() for text in axes_of(chart).get_xticklabels()]
    assert texts == ["layers.0  3 of 8", "layers.1  2"]


@pytest.mark.filterwarnings("error")
def test_the_outline_of_a_single_layer_has_room_to_be_drawn(tmp_path):
    net = nnx.Sequential(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)))
    cost = dhp.measure_cost(net, (8, 8, 4))
    run = SimpleNamespace(result=SimpleNamespace(pruned=True, before=cost, after=cost))
    run_charts._channels(run).save(tmp_path / "channels.png")  # matplotlib warns if it has none
    assert (tmp_path / "channels.png").stat().st_size > 0


@pytest.fixture(scope="module")
def svg():
    chart = line_chart(
        "A < B", [Line("a & b", [(0, 1.0), (1, 2.0)])], x="step", y="loss", rules=[Rule("r", 1.5)]
    )
    assert chart.svg() == chart.svg()
    return chart.svg()


def test_a_figure_in_a_page_has_its_colours_and_its_texts(svg):
    root = ET.fromstring(svg)
    assert (root.tag, root.get("role"), root.get("aria-label")) == ("svg", "img", "A < B")
    assert {"step", "loss", "a & b", "r"} <= {text.text for text in root.iter("text")}
    assert "var(--c0)" in svg
    assert "font-family" not in svg
    assert not re.search("#[0-9a-f]{6}", svg)
    assert root.find(".//style") is None
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    used = re.findall(r'href="#(\w+)"|url\(#(\w+)\)', svg)
    assert {name or other for name, other in used} <= set(ids)


def test_the_style_sheet_has_the_colours_of_figures_and_others_in_dark_mode():
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w+)", part)) for part in STYLE_SHEET.split("@media")[:2]
    )
    for name, colour in figures.NAMED.items():
        assert light[name] == colour
        assert dark[name] != colour


def test_a_picture_has_the_title_and_the_page_has_it_beside_the_figure(tmp_path):
    chart = line_chart("Loss of all", [Line("a", [(0, 1.0), (1, 2.0)])], x="x", y="y")
    before = chart.svg()
    chart.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ">Loss of all<" not in before
    assert chart.svg() == before


def test_a_plot_that_cannot_be_written_is_named(tmp_path):
    def full(path):
        raise OSError(28, "No space left on device")

    run = SimpleNamespace(result=SimpleNamespace(workdir=tmp_path))
    with pytest.raises(OSError, match="No space left on device") as caught:
        write._save_plots(run, {"loss": SimpleNamespace(save=full)}, [])
    assert caught.value.filename == str(tmp_path / "plots/loss.png")
