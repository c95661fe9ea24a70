"""Functions are timed in turn, after they are warm, for no longer than is asked."""

from flax import nnx
import jax
import jax.numpy as jnp
from networks import thin_resnet
import pytest

import dhp_jax as dhp
from dhp_jax.budgets import timing
from dhp_jax.budgets.timing import measure_latency, quartiles, time_in_turn


class Clock:
    """A clock that goes on only when a function takes time."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def taking(self, name, seconds):
        def run():
            self.order.append(name)
            self.now += seconds

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    return clock


def test_functions_run_to_and_fro_after_two_runs_that_do_not_count(clock):
    passes = {name: clock.taking(name, ord(name) - 96.0) for name in "abc"}
    assert time_in_turn(passes, 2) == {"a": [1.0, 1.0], "b": [2.0, 2.0], "c": [3.0, 3.0]}
    assert "".join(clock.order) == "aabbcc" + "abc" + "cba"


def test_functions_that_do_the_same_several_times_are_timed_for_one(clock):
    assert time_in_turn({"a": clock.taking("a", 6.0)}, 2, each=3) == {"a": [2.0, 2.0]}


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_clock_that_does_not_go_on_is_told(clock, seconds):
    line = rf"^a pass of the b network, batch 8 took {seconds:g} s by the clock"
    passes = {"a": clock.taking("a", 1.0), "b": clock.taking("b", seconds)}
    with pytest.raises(RuntimeError, match=line):
        time_in_turn(passes, 3, what=", batch 8")


@pytest.mark.parametrize(("each", "rounds"), [(0.01, 25), (0.1, 11), (10.0, 3)])
def test_slow_functions_run_less_often_but_three_times_at_least(clock, each, rounds):
    times = time_in_turn({"a": clock.taking("a", each)}, 25, seconds=1.0)
    assert times["a"] == pytest.approx([each] * rounds)


def test_the_latency_of_networks_is_that_of_their_compiled_forward_passes():
    model = thin_resnet()
    times = measure_latency({"only": dhp.prune(model)}, (8, 8, 3), 2, rounds=4, seconds=60.0)
    assert [len(times["only"]), min(times["only"]) > 0] == [4, True]


def test_inputs_are_float32_whatever_jax_is_set_to():
    seen = []

    class Seeing(nnx.Module):
        def __call__(self, x):
            seen.append(x.dtype)
            return x

    with jax.enable_x64(True):
        timing.forward_pass(Seeing(), (4,), 1)()
    assert set(seen) == {jnp.dtype("float32")}


def test_quartiles():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "low": 1.5, "high": 4.5}
