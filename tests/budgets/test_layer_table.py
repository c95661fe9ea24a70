"""The table of layers on a terminal fits it, and its sums are those of all layers."""

import re

from hypothesis import given
from hypothesis import strategies as st
import pytest

import dhp_jax as dhp
from dhp_jax.budgets.layer_table import (
    COLUMNS,
    LINES,
    LayerChange,
    compact,
    layer_changes,
    percent,
    short_layer_table,
)

NUMBERS = st.integers(0, 10**13)
PAIRS = st.tuples(NUMBERS, NUMBERS).map(lambda pair: tuple(sorted(pair, reverse=True)))
LAYERS = st.lists(
    st.builds(
        LayerChange,
        st.text("abc.0", min_size=1, max_size=90),
        st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
        PAIRS,
        PAIRS,
    ),
    min_size=1,
    max_size=60,
)


def cells(line):
    return re.split(r" {2,}", line.strip())


@given(LAYERS)
def test_the_table_of_any_network_fits_a_terminal_and_adds_up(layers):
    lines = short_layer_table(layers).splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    flops, params = ([getattr(layer, name) for layer in layers] for name in ("flops", "params"))
    expected = ["total"]
    for pairs in (flops, params):
        old, new = sum(before for before, _ in pairs), sum(after for _, after in pairs)
        expected += [compact(new), *([percent(new / old)] if old else [])]
    assert cells(lines[-1]) == expected
    named = len(lines) - 2
    if len(layers) <= LINES - 2:
        assert named == len(layers)
    else:
        assert cells(lines[-2])[0] == f"{len(layers) - named + 1} others"


def test_the_layers_with_most_flops_are_shown_in_their_order():
    layers = [LayerChange(f"layer{i}", (8, 4), (i, i), (1, 1)) for i in range(40)]
    lines = short_layer_table(layers).splitlines()
    assert [cells(line)[0] for line in lines[1:-2]] == [f"layer{i}" for i in range(23, 40)]
    assert cells(lines[-2]) == ["23 others", str(sum(range(23))), "100.00 %", "23", "100.00 %"]


@pytest.fixture(scope="module")
def model():
    from flax import nnx

    return dhp.models.build("resnet", depth=8, width=0.5, num_classes=10, rngs=nnx.Rngs(0))


def test_the_changes_of_layers_are_those_of_their_costs(model):
    small = dhp.prune_to(model, (16, 16, 3), flops=0.5)
    before, after = (dhp.measure_cost(one, (16, 16, 3)) for one in (model, small))
    changes = layer_changes(before, after)
    assert [change.layer for change in changes] == [layer.path for layer in after.layers]
    assert sum(change.flops[1] for change in changes) == after.flops
    assert sum(change.params[0] for change in changes) == before.params
    kernels = {change.layer: change.channels[1] for change in changes}
    assert kernels["stem.conv"] == small.stem.conv.kernel.shape[-1]
