"""What pruning has made of a network: its table, and which widths would make it faster."""

import math
import re
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.budgets import before_and_after, latency, selection, timing
from dhp_jax.budgets.chosen import Time
from dhp_jax.budgets.counted import smallest_ratio
from dhp_jax.budgets.other_widths import advice, time_other_widths
from dhp_jax.budgets.timing import measure_latency

SHAPE = (8, 8, 3)


class Plain(nnx.Module):
    """An ordinary network."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.head = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return self.head(nnx.relu(self.second(x)).mean((1, 2)))


@pytest.fixture(scope="module")
def traced():
    model = Plain(nnx.Rngs(0))
    return model, dhp.with_latents(model, jnp.zeros((1, *SHAPE)), rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def small(traced):
    return dhp.prune_to(traced[1], flops=0.5)


def flops_by_hand(model):
    """Of the convolutions, the norm (2 for each element) and the classifier."""
    first, second = (conv.kernel.size * 64 for conv in (model.first, model.second))
    return first + second + 2 * 64 * model.norm.scale.size + model.head.kernel.size


@pytest.mark.parametrize("which", ["plain", "traced"])
def test_a_network_of_ones_own_is_shown_before_and_after(traced, small, which):
    model, net = traced
    told = str(dhp.summary(net if which == "traced" else model, small, SHAPE))
    lines = {line.split()[0]: line for line in told.splitlines() if line}
    before, after = flops_by_hand(model), flops_by_hand(small)
    assert lines["FLOPs"].split()[1:] == [
        *(f"{before:,}", "->", f"{after:,}", f"({100 * after / before:.2f}", "%)")
    ]
    widths = small.first.kernel.shape[-1], small.second.kernel.shape[-1]
    for name, old, new in (("first", 16, widths[0]), ("second", 32, widths[1])):
        shown = re.split(r" {2,}", lines[name])[1]
        assert shown == (f"{old} -> {new}" if old != new else str(old))
    assert max(map(len, told.splitlines())) <= 80
    assert "time" not in lines


def test_the_inputs_of_a_traced_network_are_known(traced, small):
    assert str(dhp.summary(traced[1], small)) == str(dhp.summary(traced[1], small, SHAPE))


def test_inputs_that_nobody_told_are_asked_for(traced, small):
    with pytest.raises(
        ValueError, match=r"^inputs: expected the shape of one example, .*; got None"
    ):
        dhp.summary(traced[0], small)


def test_networks_of_other_layers_are_compared_in_all(traced, small):
    other = dhp.prune(dhp.models.build("resnet", depth=8, width=0.25, rngs=nnx.Rngs(0)))
    told = str(dhp.summary(traced[0], other, SHAPE)).splitlines()
    assert [line.split()[0] for line in told] == ["FLOPs", "params", "activations"]


class Mean(nnx.Module):
    def __call__(self, x):
        return x.mean((1, 2))


def test_a_network_without_layers_that_are_counted_has_no_table():
    told = str(dhp.summary(Mean(), Mean(), SHAPE)).splitlines()
    assert [line.split()[:2] for line in told] == [
        ["FLOPs", "0"],
        ["params", "0"],
        ["activations", "0"],
    ]


@pytest.mark.parametrize("batch", [0, -1, True, 1.5, "8"])
def test_a_batch_that_is_none_is_refused(traced, small, batch):
    with pytest.raises(ValueError, match=r"^batch: expected a positive integer, got "):
        dhp.summary(traced[0], small, SHAPE, batch=batch)


def seen_when_timed(monkeypatch, make, **options):
    """The inputs with which networks are run while they are timed."""
    seen = []

    def run(model, call=None):
        return lambda *inputs: seen.append((call, *inputs)) or jnp.zeros(())

    monkeypatch.setattr(timing, "inference", run)
    monkeypatch.setattr(latency, "ROUNDS", 3)
    make(**options)
    return seen


def test_arrays_are_timed_as_they_were_given_as_often_as_asked(traced, small, monkeypatch):
    x = jnp.arange(2 * math.prod(SHAPE), dtype=jnp.float32).reshape(2, *SHAPE)
    monkeypatch.setattr(before_and_after, "time_other_widths", lambda *_: {})
    seen = seen_when_timed(
        monkeypatch, lambda batch: dhp.summary(traced[0], small, x, batch=batch), batch=5
    )
    assert seen
    for _, given in seen:
        np.testing.assert_array_equal(given, np.concatenate([x, x, x[:1]]))


class Counted(nnx.Module):
    """Scores of texts, of which some tokens count."""

    def __init__(self, rngs):
        self.embed, self.head = nnx.Embed(9, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, tokens, places, counts):
        return self.head((self.embed(tokens) * places[:, None] * counts[..., None]).sum(1))


def by_name(network, batch):
    return network(**batch)


def test_networks_with_several_inputs_and_a_call_of_their_own_are_timed(monkeypatch):
    shapes = {"tokens": ((3, 4), int), "places": ((4,), float), "counts": ((3, 4), bool)}
    batch = {name: jax.ShapeDtypeStruct(*each) for name, each in shapes.items()}
    net = dhp.with_latents(Counted(nnx.Rngs(0)), (batch,), call=by_name)

    def make():
        with warnings.catch_warnings():  # of which is faster
            warnings.simplefilter("ignore")
            return dhp.prune_to(net, flops=0.5, latency=1.0, batch=7)

    monkeypatch.setattr(Time, "within", lambda time, share: True)
    seen = seen_when_timed(monkeypatch, make)
    assert seen
    for call, given in seen:
        assert call is by_name
        found = {name: (x.shape, x.dtype.kind, x.max()) for name, x in given.items()}
        assert found == {
            "tokens": ((7, 4), "i", 0),
            "places": ((4,), "f", 0.5),
            "counts": ((7, 4), "b", False),
        }
    monkeypatch.undo()
    monkeypatch.setattr(Time, "within", lambda time, share: True)
    assert make().head.kernel.shape[0] < 8  # and they run


def test_a_batch_that_a_network_does_not_take_is_told(traced, small):
    net = dhp.with_latents(traced[0], SHAPE, call=lambda model, x: model(x.reshape(1, *SHAPE)))
    with pytest.raises(ValueError, match=r"^batch: expected a number of .*; got 2: the model does"):
        dhp.prune_to(net, flops=0.5, batch=2)


def test_the_batch_is_the_axis_that_the_network_takes_as_one():
    """The first array is none of a batch; numbers that are given stay."""

    class Scaled(nnx.Module):
        def __call__(self, options, x):
            return x * options["places"] + options["scale"]

    options = {"places": np.arange(5.0), "scale": 3}
    places, x = timing.timed_inputs(Scaled(), (options, jnp.ones((2, 5))), 4)
    assert (places["places"].tolist(), int(places["scale"])) == ([0, 1, 2, 3, 4], 3)
    np.testing.assert_array_equal(x, np.ones((4, 5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: expected a positive integer"),
        ({"batch": "8"}, "batch: expected a positive integer"),
        ({"batch": 2, "call": 3}, "call: expected a function of the model and the inputs, or None"),
    ],
)
def test_what_cannot_be_timed_is_told(traced, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        measure_latency({"only": traced[0]}, SHAPE, **options)


@pytest.mark.parametrize("which", ["plain", "traced"])
def test_both_networks_are_timed_here_and_now(traced, small, which, monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 3)
    monkeypatch.setattr(before_and_after, "time_other_widths", lambda *_: {})
    known = which == "traced"  # are the inputs
    found = dhp.summary(traced[known], small, None if known else SHAPE, batch=2)
    assert 0 < found.ratio["low"] <= found.ratio["median"] <= found.ratio["high"]
    assert re.search(r"^time +\d+\.\d\d of the time before \(.*\), batch 2, ", str(found), re.M)


def took(share):
    """A time that is a share of the whole network's."""
    ratio = {"median": share, "low": 0.9 * share, "high": 1.1 * share}
    return Time(ratio, ratio, ratio, rounds=9)


def by_width(found):
    """A clock for which only widths of multiples of 8 are fast."""
    widths = found.first.kernel.shape[-1], found.second.kernel.shape[-1]
    return took(0.5 if all(width % 8 == 0 for width in widths) else 1.5)


def test_where_it_is_slower_the_summary_says_which_multiple_would_help(traced, small, monkeypatch):
    monkeypatch.setattr(before_and_after, "clock", lambda *_: by_width)
    if all(width % 8 == 0 for width in (small.first.kernel.shape[-1], small.second.out_features)):
        pytest.skip("the widths happen to be multiples of 8")
    found = dhp.summary(traced[1], small, SHAPE, batch=2)
    assert list(found.other_widths) == [4, 8] or list(found.other_widths) == [8]
    told = "multiple_of=8 would take 0.50 of that time (0.45 to 0.55), for no more FLOPs"
    assert told in str(found)
    share = found.after.flops / found.before.flops
    quick = dhp.prune_to(traced[1], multiple_of=8, flops=share)
    assert by_width(quick).within(1)


@pytest.mark.parametrize("slow", [True, False])
def test_where_it_is_slower_prune_to_warns_which_multiple_would_help(traced, monkeypatch, slow):
    """With a batch it times; without one it does not."""
    asked = []

    def clock(model, inputs, batch, call):
        (x,) = inputs
        asked.append((x.shape, batch))
        return by_width if slow else lambda found: took(0.5)

    monkeypatch.setattr(selection, "clock", clock)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        small = dhp.prune_to(traced[1], SHAPE, flops=0.45)
        assert not asked
        again = dhp.prune_to(traced[1], flops=0.45, batch=2)  # of the shape that it knows
    assert asked == [((1, *SHAPE), 2)]
    assert {width % 8 for width in survivors_of(small)} != {0}
    assert survivors_of(again) == survivors_of(small)
    assert len(told) == slow
    for warning in told:
        assert warning.filename == __file__
        assert re.fullmatch(
            r"prune_to: the pruned network takes 1\.50 \(1\.35 to 1\.65\) of the unpruned one's "
            r"time, batch 2, on .*; multiple_of=8 would take 0\.50 of that time \(0\.45 to 0\.55\)"
            r", for no more FLOPs",
            str(warning.message),
        )


@pytest.mark.parametrize(("backend", "rounds"), [("cpu", True), ("gpu", False)])
def test_widths_that_auto_would_round_are_told_where_that_was_measured(
    traced, monkeypatch, backend, rounds
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    small = dhp.prune_to(traced[1], multiple_of={"*": 1}, flops=0.45)
    uneven = sum(width % 8 > 0 for width in survivors_of(small))
    assert uneven
    found = dhp.summary(traced[1], small)
    assert list(found.uneven.values()) == [8] * uneven * rounds
    advised = [line for line in str(found).splitlines() if line.startswith("widths ")]
    assert len(advised) == rounds
    assert max(map(len, str(found).splitlines())) <= 80
    even = dhp.summary(traced[1], dhp.prune_to(traced[1], multiple_of="auto", flops=0.45))
    assert "\nwidths " not in str(even) or not rounds
    assert not rounds or not even.uneven


def survivors_of(small):
    """How many channels its convolutions put out."""
    return [conv.kernel.shape[-1] for conv in (small.first, small.second)]


def test_widths_that_are_not_possible_are_not_tried(traced):
    cost, tried = dhp.measure_cost(traced[1], SHAPE), []

    def timed(network):
        tried.append((network.first.kernel.shape[-1], network.second.kernel.shape[-1]))
        return took(1.5)

    def times(multiple_of, flops):
        tried.clear()
        budget = {"flops": flops}
        return time_other_widths(traced[1], cost, timed, multiple_of, lambda _: budget)

    assert list(times(1, 0.9)) == [4, 8, 16, "auto"]  # a latent has 16 entries
    for number, widths in zip([4, 8, 16, 8], tried, strict=True):
        assert all(width % number == 0 for width in widths)
    assert list(times(8, 0.9)) == [16, "auto"]
    four, eight = (smallest_ratio(traced[1], cost, number)["flops"] for number in (4, 8))
    assert list(times(1, (four + eight) / 2)) == [4]  # 8 and 16 are beyond the budget


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ({}, "no other multiple_of is possible"),
        ({"4": 1.2, "8": 1.5}, "multiple_of=4 or 8 is not faster either"),
        ({4: 0.99, 8: 1.5}, "multiple_of=4 or 8 is not faster either"),  # not beyond the noise
        ({4: 1.2, 8: 0.5}, "multiple_of=8 would take 0.50 of that time (0.45 to 0.55)"),
    ],
)
def test_advice_is_what_the_times_say(times, told):
    assert advice({number: took(share).ratio for number, share in times.items()}).startswith(told)


def test_a_latency_out_of_reach_names_the_multiple_that_would_do(traced):
    cost = dhp.measure_cost(traced[1], SHAPE)
    message = r"^latency: 0.8 cannot be reached: .*; multiple_of=8 would do, of which it takes 0.50"
    with pytest.raises(dhp.BudgetError, match=message):
        latency.check_latency(traced[1], cost, 0.8, by_width)
