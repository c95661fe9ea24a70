"""Axes, lines and thinning of the drawings."""

import itertools
import math
import re

from hypothesis import given
from hypothesis import strategies as st
import pytest

from dhp_jax.report import drawing
from dhp_jax.report.drawing import Line, Rule, Scale

finite = st.floats(-1e9, 1e9)


@given(st.lists(finite, min_size=1, max_size=20), st.booleans())
def test_every_value_lies_on_the_axis_and_so_does_every_tick(values, log):
    scale = Scale.over(values, 10, 200, log=log)
    assert all(10 - 1e-6 <= scale(value) <= 200 + 1e-6 for value in (*values, *scale.ticks))


@pytest.mark.parametrize(
    ("values", "options", "ticks"),
    [
        ([0, 100], {}, [0, 20, 40, 60, 80, 100]),
        ([3, 17], {"low": 0}, [0, 5, 10, 15]),
        ([0.02, 2], {"log": True}, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]),
        ([1, 1e6], {"log": True}, [1, 10, 100, 1e3, 1e4, 1e5, 1e6]),
        ([0, 1000], {"log": True}, [0, 200, 400, 600, 800, 1000]),
        ([5, 5], {}, [4.6, 4.8, 5.0, 5.2, 5.4]),
    ],
)
def test_ticks_are_round(values, options, ticks):
    assert Scale.over(values, 0, 1, **options).ticks == pytest.approx(ticks)


def test_an_axis_that_is_bent_shows_zero_and_round_values():
    scale = Scale.bent(2.0, 0.001, 0, 100)
    assert scale(0) == 0
    assert scale(2.0) == pytest.approx(100)
    assert scale.ticks == pytest.approx([0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1])


def test_a_zero_bends_a_logarithmic_axis_and_the_axis_says_so():
    scale = Scale.over([0, 0.1, 80], 0, 100, log=True)
    assert scale.linear == 0.1
    assert scale(0) == 0
    assert scale(1) > 40  # on a linear axis 1.25
    drawn = drawing.chart([Line("a", [(0, 80.0), (1, 0.1), (2, 0.0)])], x="x", y="error", log=True)
    assert ">error, linear below 0.1<" in drawn
    assert Scale.over([0.01, 0.1, 80], 0, 100, log=True).linear is None


def test_a_pen_that_is_lifted_leaves_a_gap_and_points_by_themselves_have_no_line():
    points = [(0, 1.0), (1, 2.0), None, (2, 3.0), (3, 4.0)]
    drawn = drawing.chart([Line("a", points)], x="x", y="y")
    (path,) = re.findall(r'<path d="([^"]*)"', drawn)
    assert [len(stroke.split("L")) for stroke in path[1:].split("M")] == [2, 2]
    assert drawn.count("<circle") == 4
    alone = drawing.chart([Line("a", [(0, 1.0)], joined=False)], x="x", y="y")
    assert (alone.count("<path"), alone.count("<circle")) == (0, 1)


def test_long_lines_are_thinned_and_keep_their_end():
    points = [(i, math.sin(i)) for i in range(100_000)]
    drawn = drawing.chart([Line("a", points)], x="x", y="y")
    (path,) = re.findall(r'<path d="([^"]*)"', drawn)
    places = path[1:].split("L")
    assert drawing.MOST_POINTS / 2 < len(places) <= drawing.MOST_POINTS
    assert places[-1].split()[0] == f"{drawing.WIDTH - drawing.RIGHT:.1f}"
    assert "<circle" not in drawn


@pytest.mark.parametrize(
    ("points", "anchor"), [([(0, 9.0), (9, 1.0)], "start"), ([(0, 1.0), (9, 9.0)], "end")]
)
def test_the_label_of_a_rule_keeps_away_from_the_lines(points, anchor):
    drawn = drawing.chart([Line("a", points)], x="x", y="y", rules=[Rule("limit", 1.0)])
    assert re.search(rf'text-anchor="{anchor}">limit<', drawn)


@pytest.mark.parametrize("levels", [(92, 91.9), (92, 91, 90), (0, 1), (100, 99, 98, 3, 1)])
def test_labels_of_near_rules_do_not_lie_on_each_other(levels):
    rules = [Rule("a label that takes half of it", level) for level in levels]
    drawn = drawing.chart([Line("a", [(0, 100.0), (9, 0.0)])], x="x", y="y", rules=rules)
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">a label', drawn)
    for (_, one, anchor), (_, other, of_other) in itertools.combinations(found, 2):
        assert anchor != of_other or abs(float(one) - float(other)) > 12
    assert len(found) == len(levels)
    assert all(0 < float(y) < drawing.HEIGHT - drawing.BOTTOM for _, y, _ in found)


def test_deep_networks_have_names_of_groups_instead_of_layers():
    layers = [(f"blocks.{i // 2}.layers.{i % 2}", 16, 8) for i in range(110)]
    drawn = drawing.silhouette(layers, [name for name, _, _ in layers])
    assert drawn.count("<rect") == 220
    labels = re.findall(r"<text[^>]*>([^<]*)<", drawn)
    assert 3 <= len(labels) <= 30
    assert labels[0] == "blocks.0"
