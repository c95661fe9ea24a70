"""Several budgets at once, and that of measured time."""

from collections import Counter
import dataclasses
import re

from networks import MIXED_INPUT, Mixed, arrays, filled
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.budgets import latency as budgets_latency
from dhp_jax.budgets.chosen import Time
from dhp_jax.budgets.counted import search_limits, survivors_within
from dhp_jax.budgets.latency import check_latency, clock
from dhp_jax.budgets.selection import choose
from dhp_jax.budgets.timing import hardware
from dhp_jax.core.surgery import prune as cut


@pytest.fixture(scope="module")
def mixed():
    model = filled(Mixed)
    return model, dhp.measure_cost(model, MIXED_INPUT)


def took(ratio, spread=0.01):
    """A measurement with a median and its quartiles."""
    values = {"median": ratio, "low": ratio - spread, "high": ratio + spread}
    return Time(ratio=values, whole_ms=values, ms=values, rounds=101)


def timed_by(cost, curve, calls=None):
    """A clock whose time follows from the share of the FLOPs."""

    def timed(small):
        flops = dhp.measure_cost(small, MIXED_INPUT).flops / cost.flops
        if calls is not None:
            calls.append(flops)
        return took(curve(flops))

    return timed


def test_a_latency_is_used_up_and_not_exceeded(mixed):
    model, cost = mixed
    calls = []
    timed = timed_by(cost, lambda flops: 0.3 + 0.7 * flops, calls)
    chosen = choose(model, cost, latency=0.7, timed=timed)
    assert chosen.time.ratio["high"] <= 0.7
    assert chosen.shares["flops"] == calls[-1]
    within = [flops for flops in calls if 0.3 + 0.7 * flops + 0.01 <= 0.7]
    assert chosen.shares["flops"] == max(within)
    # The largest network of these FLOPs by magnitude, to the resolution of the bisection.
    limit = (0.7 - 0.01 - 0.3) / 0.7
    best = survivors_within(model, cost, flops=limit - budgets_latency.RESOLUTION)
    counts = {name: int(mask.sum()) for name, mask in best.items()}
    assert chosen.shares["flops"] >= cost.shares(counts)["flops"]


def test_candidates_of_the_same_widths_are_timed_twice_and_no_more(mixed):
    model, cost = mixed
    calls = []
    timed = timed_by(cost, lambda flops: flops, calls)
    chosen = choose(model, cost, latency=0.6, timed=timed)
    assert set(Counter(calls).values()) == {2}
    assert len(calls) <= 20
    assert [row["flops"] for row in chosen.tried] == calls
    assert chosen.notes()["time"]["tried"] == list(chosen.tried)


@pytest.mark.parametrize("flops", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("strange", [pytest.param(0.01, marks=pytest.mark.slow), 5.0])
def test_one_strange_reading_changes_nothing(mixed, flops, strange):
    """Whichever it is: another program may have had the machine meanwhile."""
    model, cost = mixed
    known = {}

    def share(small):
        shapes = tuple(array.shape for array in arrays(small).values())
        if shapes not in known:
            known[shapes] = dhp.measure_cost(small, MIXED_INPUT).flops / cost.flops
        return known[shapes]

    def chosen(wrong=None):
        calls = []

        def timed(small):
            calls.append(share(small))
            return took(strange if len(calls) - 1 == wrong else calls[-1])

        return choose(model, cost, latency=0.7, flops=flops, timed=timed), len(calls)

    expected, count = chosen()
    for wrong in range(count + 1):
        found, _ = chosen(wrong)
        assert found.shares == expected.shares
        assert found.time == expected.time


def test_all_budgets_hold_together(mixed):
    model, cost = mixed
    asked = {"flops": 0.8, "params": 0.6, "activations": 0.9}
    timed = timed_by(cost, lambda flops: flops)
    chosen = choose(model, cost, latency=0.7, timed=timed, **asked)
    small = dhp.measure_cost(cut(model, chosen.masks), MIXED_INPUT)
    for name, share in asked.items():
        assert chosen.shares[name] == getattr(small, name) / getattr(cost, name) <= share
    assert chosen.time.ratio["high"] <= 0.7
    # One that is met with all the others is no reason to make the network smaller.
    slack = choose(model, cost, latency=1.0, timed=timed, **asked)
    alone = survivors_within(model, cost, **asked)
    assert all(np.array_equal(slack.masks[name], alone[name]) for name in alone)


def test_widths_are_rounded_within_a_latency_too(mixed):
    model, cost = mixed
    timed = timed_by(cost, lambda flops: flops)
    chosen = choose(model, cost, 2, latency=0.6, timed=timed)
    sizes = {name: z.size for name, z in dhp.latents(model).items()}
    kept = {name: int(mask.sum()) for name, mask in chosen.masks.items()}
    assert all(kept[name] % 2 == 0 for name in kept if kept[name] < sizes[name])


def test_a_latency_out_of_reach_tells_the_smallest_one(mixed):
    model, cost = mixed
    timed = timed_by(cost, lambda flops: 0.5 + flops)
    smallest = 0.5 + cost.shares(dict.fromkeys(cost.sizes, 2) | {"left.z_in": 3})["flops"]
    told = f"latency: 0.3 cannot be reached: the smallest possible network takes {smallest:.2f} ("
    with pytest.raises(dhp.BudgetError, match="^" + re.escape(told)):
        choose(model, cost, latency=0.3, timed=timed)
    with pytest.raises(dhp.BudgetError, match="^" + re.escape(told)):
        check_latency(model, cost, 0.3, timed)
    check_latency(model, cost, smallest, timed)  # not clearly out of reach


def test_one_slow_reading_of_the_smallest_network_does_not_refuse_a_run(mixed):
    model, cost = mixed
    times = iter([took(0.9), took(0.4)])
    check_latency(model, cost, 0.5, lambda small: next(times))
    assert next(times, None) is None


@pytest.mark.parametrize("latency", [0, -0.5, 1.5, True, "half", float("nan")])
def test_a_latency_that_is_no_share_is_refused_before_anything_is_timed(mixed, latency):
    with pytest.raises(ValueError, match=r"^latency: expected a share in \(0, 1\], got "):
        dhp.prune_to(mixed[0], MIXED_INPUT, latency=latency)


@pytest.mark.parametrize("batch", [0, -1, 1.0, True, "1"])
def test_a_batch_that_is_none_is_refused(mixed, batch):
    with pytest.raises(ValueError, match=r"^batch: expected a positive integer, got "):
        dhp.prune_to(mixed[0], MIXED_INPUT, latency=0.5, batch=batch)


def test_prune_to_times_the_networks_here_and_now(mixed, monkeypatch):
    """A clock that runs, but whose times are not asserted: every share is within 1e9."""
    model, _ = mixed
    monkeypatch.setattr(budgets_latency, "ROUNDS", 3)
    monkeypatch.setattr(Time, "within", lambda time, share: time.ratio["high"] <= 1e9)
    small = dhp.prune_to(model, MIXED_INPUT, latency=0.9, flops=0.5, batch=2)
    alone = dhp.prune_to(model, MIXED_INPUT, flops=0.5)
    expected = arrays(alone)
    assert arrays(small).keys() == expected.keys()
    assert all(np.array_equal(array, expected[name]) for name, array in arrays(small).items())


def test_a_clock_pairs_the_passes_of_both_networks(mixed, monkeypatch):
    model, _ = mixed
    monkeypatch.setattr(budgets_latency, "ROUNDS", 5)
    time = clock(model, MIXED_INPUT, 2)(dhp.prune(model))
    assert time.rounds == 5
    for values in (time.ratio, time.whole_ms, time.ms):
        assert 0 < values["low"] <= values["median"] <= values["high"]


def test_time_is_within_a_share_if_three_of_four_pairs_are():
    assert took(0.5, 0.1).within(0.6)
    assert not took(0.5, 0.1).within(0.59)
    assert str(took(0.5, 0.1)) == "0.50 (0.40 to 0.60)"


NONE = dict.fromkeys(("flops", "params", "activations", "latency", "batch"))


@pytest.mark.parametrize(
    ("budget", "target", "expected"),
    [
        ({}, 0.5, {"flops": 0.5}),
        ({"flops": 0.4}, 0.5, {"flops": 0.4}),
        ({"flops": 0.7}, 0.5, {"flops": 0.5}),
        ({"latency": 0.6}, 1, {"flops": 0.6}),
        ({"latency": 0.6}, 0.5, {"flops": 0.5}),
        ({"params": 0.3, "activations": 0.8}, 1, {"flops": 1, "params": 0.3, "activations": 0.8}),
    ],
)
def test_a_search_comes_down_to_all_budgets(budget, target, expected):
    assert search_limits(NONE | budget, target) == expected
    assert search_limits(budget, target) == expected


def test_what_is_noted_of_a_choice_is_json(mixed):
    model, cost = mixed
    assert choose(model, cost, flops=0.5).notes().keys() == {"predicted"}
    chosen = choose(model, cost, latency=0.9, timed=timed_by(cost, lambda flops: flops))
    noted = chosen.notes()["time"]
    assert noted | dataclasses.asdict(chosen.time) == noted
    assert noted["hardware"] == hardware()
    assert all(row.keys() == {"flops", "low", "median", "high"} for row in noted["tried"])
