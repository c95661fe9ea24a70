"""What model.json says of traced networks comes back, and of other content nothing is believed."""

import contextlib
import copy
import json

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.artifact import traced
from dhp_jax.artifact.description import ArtifactError
from dhp_jax.artifact.traced import cuts_as_json, cuts_from_json, table_as_json, table_from_json
from dhp_jax.core.provenance import architecture_of
from dhp_jax.tracing.cuts import ArrayCuts


class Net(nnx.Module):
    """Two latents, one of them in an axis of groups."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
        self.c = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.a(x))
        return self.c(nnx.relu(self.b(jnp.concatenate([y, y * y], -1))))


@pytest.fixture(scope="module")
def table():
    return architecture_of(dhp.with_latents(Net(nnx.Rngs(0)), (3,), embedding=2)).axes


@pytest.fixture(scope="module")
def written(table):
    return json.loads(json.dumps(table_as_json(table, dict.fromkeys(table.sizes, 1))))


CUTS = ArrayCuts({"a.kernel": {0: (0, 2, 4, 7), 1: (3,)}, "b": {0: (0, 2, 4, 7)}}, (("a", "n", 4),))


def test_tables_come_back(table, written):
    found, least = table_from_json(written, "here")
    assert (found.sizes, least) == (table.sizes, dict.fromkeys(table.sizes, 1))
    assert (found.numbers, found.inputs) == (table.numbers, table.inputs)
    assert found.notes["embedding"] == 2
    for name, axes in table.places.items():
        for k, positions in axes.items():
            np.testing.assert_array_equal(found.places[name][k].owner, positions.owner)
            np.testing.assert_array_equal(found.places[name][k].entry, positions.entry)


def test_cuts_come_back():
    found = cuts_from_json(json.loads(json.dumps(cuts_as_json(CUTS))), "here")
    assert (found.kept, found.numbers) == (CUTS.kept, CUTS.numbers)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("embedding", 0, "embedding: got 0"),
        ("embedding", True, "embedding: got True"),
        ("embedding", 2**40, "embedding: got"),
        ("generated", ["no such array"], "generated: got"),
        ("sizes", {"a": 4}, "sizes or least lack"),
        ("positions", {}, "expected a list"),
        ("positions", [[]], "expected runs of at most 1048576 positions, got []"),
        ("positions", [[[4, 1, 9, 0]]], "positions of an unknown latent"),
        ("positions", [[[4, 1, 0, 3]]], "positions of an unknown entry"),
        ("positions", [[[-4, 1, 0, 0]]], "expected runs of"),
        ("positions", [[[2**20, 0, -1, 0]]] * 9, "expected runs of at most 0 positions"),
        ("places", {"a.kernel": {"0": 99}}, "no list 99"),
        ("numbers", [["a", "n", "no such latent", None, 1]], "numbers: got"),
        ("inputs", [{"shape": [3], "dtype": "object"}], "inputs: got"),
    ],
)
def test_what_no_table_says_is_refused(written, field, value, message):
    with pytest.raises(ArtifactError) as caught:
        table_from_json(written | {field: value}, "here")
    assert str(caught.value).startswith("path: here: latents: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "places",
            {"a.kernel": {"0": 0}},
            "expected an axis 0 of 4 in array 'a.kernel', got (3, 4)",
        ),
        (
            "places",
            {"a.kernel": {"2": 0}},
            "expected an axis 2 of 4 in array 'a.kernel', got (3, 4)",
        ),
        ("places", {"d": {"0": 0}, "a.kernel": {"1": 0}}, "of 4 in array 'd', got none"),
        ("numbers", [["a", "in_features", None, "a.kernel", 0]], None),
        ("numbers", [["a", "in_features", None, "a.kernel", 2]], "no number 'in_features' in 'a'"),
        ("numbers", [["a", "in_features", None, "d", 0]], "no number 'in_features' in 'a'"),
        ("numbers", [["a", "use_bias", "a", None, 1]], "no number 'use_bias' in 'a'"),
        ("numbers", [["d", "in_features", "a", None, 1]], "no number 'in_features' in 'd'"),
    ],
)
def test_a_table_of_another_network_is_refused(tmp_path, field, value, message):
    net = dhp.with_latents(Net(nnx.Rngs(0)), (3,))
    dhp.save(tmp_path / "net", net)
    path = tmp_path / "net" / "model.json"
    told = json.loads(path.read_text())
    places = value if field == "places" else {}
    told["latents"] |= {field: told["latents"][field] | places if places else value}
    path.write_text(json.dumps(told))
    if message is None:
        dhp.load(tmp_path / "net", build=Net)
        return
    with pytest.raises(ArtifactError) as caught:
        dhp.load(tmp_path / "net", build=Net)
    assert str(caught.value).startswith(f"path: {path}: latents: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[[2, 0, 5]]], "expected rising positions"),
        ([[[2, 1, -1]]], "expected rising positions"),
        ([[[1, 0, 3]], [[2**20, 1, 0]]] * 8, "expected runs of at most"),
        ([None], "expected runs of at most"),
    ],
)
def test_what_no_cuts_say_is_refused(positions, message):
    with pytest.raises(ArtifactError, match=f"^path: here: cuts: {message}"):
        cuts_from_json(cuts_as_json(CUTS) | {"positions": positions}, "here")


def test_more_positions_than_are_read_are_not_written(table, monkeypatch):
    monkeypatch.setattr(traced, "MOST_POSITIONS", 10)
    with pytest.raises(
        ValueError, match=r"^model: expected at most 10 positions to tell, got more"
    ):
        table_as_json(table, {})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**41), 2**41) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", ["latents", "cuts"])
@settings(derandomize=True, deadline=None, max_examples=200)
@given(data=st.data())
def test_any_other_content_is_understood_or_refused(written, kind, data):
    changed = copy.deepcopy(written if kind == "latents" else cuts_as_json(CUTS))
    place = changed
    while isinstance(place, dict | list) and place:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            place[key] = data.draw(VALUES)
            break
        place = place[key]
    read = table_from_json if kind == "latents" else cuts_from_json
    with contextlib.suppress(ArtifactError):
        read(changed, "here")


@pytest.mark.parametrize("value", [0, -1, 9, 10**15])
def test_a_file_makes_no_number_of_a_network_larger(value):
    cuts = ArrayCuts({}, (("b", "in_features", value),))
    with pytest.raises(ValueError, match=f"expected a number of 1 .. 8, got {value}$"):
        cuts.apply(Net(nnx.Rngs(0)))
