"""Multiples of which widths are: one for all, by latent, and chosen by what was measured."""

import json
from pathlib import Path
import re

import jax
from networks import MIXED_INPUT, MIXED_LATENTS, Mixed, filled
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.budgets import rounding
from dhp_jax.budgets.rounding import multiples, parse_multiples

RESULTS = Path(__file__).parents[2] / "benchmarks/results/widths.json"
A, B, C = (MIXED_LATENTS[name] for name in "abc")  # of 7, 5, and 6 channels


@pytest.fixture(scope="module")
def mixed():
    return filled(Mixed)


def kept(small):
    """Output channels of the convolutions of a pruned `Mixed`."""
    return {A: small.left.out_features, B: small.right.out_features, C: small.join.out_features}


@pytest.mark.parametrize(
    ("multiple_of", "expected"),
    [
        (3, {A: 3, B: 3, C: 3}),
        ({A: 4}, {A: 4, B: 1, C: 1}),
        ({"*": 2, "join.*": 3}, {A: 2, B: 2, C: 3}),
        ("*:2,join.*:3", {A: 2, B: 2, C: 3}),
        ({}, {A: 1, B: 1, C: 1}),
    ],
)
def test_every_prunable_latent_has_its_multiple(mixed, multiple_of, expected):
    assert multiples(mixed, multiple_of) == expected
    small = dhp.prune_to(mixed, MIXED_INPUT, multiple_of, flops=0.6)
    sizes = {A: 7, B: 5, C: 6}
    for name, width in kept(small).items():
        assert width == sizes[name] or width % expected[name] == 0
    cost = dhp.measure_cost(mixed, MIXED_INPUT)
    assert dhp.measure_cost(small, MIXED_INPUT).flops <= 0.6 * cost.flops


@pytest.mark.parametrize(
    ("multiple_of", "message"),
    [
        ({"nowhere": 2}, "multiple_of: nowhere: expected prunable latents, of "),
        ({"left.z_in": 2}, "multiple_of: left.z_in: expected prunable latents, of "),  # the image
        ({B: 6}, f"multiple_of: {B}: expected at most 5, the size of latent '{B}', got 6"),
        ({A: 0}, f"multiple_of: {A}: expected an integer of at least 1, got 0"),
        ({A: True}, f"multiple_of: {A}: expected an integer of at least 1, got True"),
        ("Auto", "multiple_of: expected 'auto', or latents with a number each, such as "),
        ("a:1.5", "multiple_of: expected 'auto', or latents with a number each, such as "),
        (None, "multiple_of: expected an integer of at least 1, 'auto' or such by latent, got N"),
    ],
)
def test_a_multiple_that_no_latent_can_keep_is_refused(mixed, multiple_of, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        dhp.prune_to(mixed, MIXED_INPUT, multiple_of, flops=0.6)


def test_a_text_gives_multiples_by_pattern():
    assert parse_multiples("stages.*:8, head:4") == {"stages.*": 8, "head": 4}


def test_of_a_pattern_that_comes_twice_the_last_counts(mixed):
    assert list(parse_multiples("a:2,*:4,a:8").items()) == [("*", 4), ("a", 8)]
    assert multiples(mixed, f"{A}:2,*:4,{A}:7")[A] == 7


def test_integers_of_numpy_are_multiples(mixed):
    assert multiples(mixed, np.int64(4)) == multiples(mixed, 4)
    assert multiples(mixed, {A: np.int32(3)}) == multiples(mixed, {A: 3})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_takes_what_was_measured_for_platform_and_dtype(monkeypatch, dtype):
    measured = {("cpu", dtype): 8, ("cpu", "float16"): 2, ("gpu", dtype): 32}
    monkeypatch.setattr(rounding, "MEASURED", measured)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    model = dhp.models.build_abstract("resnet", depth=20, width=0.5, num_classes=10, dtype=dtype)
    sizes = {name: z.size for name, z in dhp.latents(model).items() if z.prunable}
    found = multiples(model, "auto")
    assert found == {name: 8 if size >= 16 else 1 for name, size in sizes.items()}
    assert set(found.values()) == {1, 8}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # which was not measured
    assert set(multiples(model, "auto").values()) == {1}


def test_what_auto_chooses_is_what_the_benchmark_has_found():
    """The multiple of the smallest mean time; widths as they fall have 1."""
    rows = json.loads(RESULTS.read_text())["rows"]
    times: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if "mean" in row:
            kind = row["platform"], row["dtype"]
            times.setdefault(kind, {1: 1.0})[row["multiple_of"]] = row["mean"]
    assert {kind: min(found, key=found.get) for kind, found in times.items()} == rounding.MEASURED
