"""Learning rates of every step are those of the formulas, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhp_jax.train.schedules import decay_schedule, drop_schedule, make_schedule


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 0.4), (1.9, 0.4), (2, 0.04), (2.1, 0.04), (4.4, 0.04), (4.5, 0.004), (100, 0.004)],
)
def test_the_learning_rate_is_divided_by_10_at_each_drop(epoch, rate):
    schedule = drop_schedule(0.4, (2, 4.5), steps_per_epoch=10)
    assert float(schedule(round(10 * epoch))) == pytest.approx(rate, rel=1e-6)


def test_drops_between_steps_come_at_the_nearest_step():
    schedule = drop_schedule(1.0, (1.25,), steps_per_epoch=3)  # 3.75 steps
    assert [float(schedule(step)) for step in (3, 4)] == pytest.approx([1, 0.1])


def test_drops_at_the_same_step_count_each():
    schedule = drop_schedule(1.0, (1.0, 1.01), steps_per_epoch=3)
    assert [float(schedule(step)) for step in (2, 3)] == pytest.approx([1, 0.01])


def test_without_drops_the_learning_rate_stays():
    schedule = drop_schedule(0.1, (), steps_per_epoch=3)
    assert {float(schedule(step)) for step in (0, 3, 10**6)} == {0.1}


def rates(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)))


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 0.5, 2])
def test_a_learning_rate_rises_and_falls_to_zero(name, warmup):
    schedule = decay_schedule(name, 0.4, 6, 10, warmup=warmup)
    begin = int(10 * warmup)
    gone = (np.arange(begin, 60) - begin) / (60 - begin)
    falls = 0.4 * (0.5 * (1 + np.cos(np.pi * gone)) if name == "cosine" else 1 - gone)
    rises = 0.4 * np.arange(1, begin + 1) / max(begin, 1)
    np.testing.assert_allclose(rates(schedule, 60), [*rises, *falls], rtol=1e-4, atol=1e-7)
    assert float(schedule(60)) == pytest.approx(0, abs=1e-7)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"^schedule: expected cosine or linear; got 'cosin'$"):
        decay_schedule("cosin", 0.4, 6, 10)


def test_drops_are_counted_from_the_first_step_of_the_warm_up():
    given = {"epochs": 4, "drops": (2,), "warmup": 1, "steps_per_epoch": 5}
    found = rates(make_schedule("drops", 1.0, **given), 20)
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, *[1.0] * 5, *[0.1] * 10]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_without_warm_up_drops_are_the_plain_schedule():
    given = {"epochs": 4, "drops": (2,), "warmup": 0.0, "steps_per_epoch": 5}
    found = jax.make_jaxpr(make_schedule("drops", 1.0, **given))(jnp.int32(3))
    assert str(found) == str(jax.make_jaxpr(drop_schedule(1.0, (2,), 5))(jnp.int32(3)))


def test_drops_after_the_end_of_a_phase_do_nothing_however_late_they_come():
    given = {"epochs": 4, "warmup": 0, "steps_per_epoch": 10**4}
    late, none = (make_schedule("drops", 1.0, drops=d, **given) for d in ((2, 4, 3e5), (2,)))
    steps = jnp.asarray([0, 19_999, 20_000, 39_999])
    found, expected = (np.asarray(jax.jit(jax.vmap(schedule))(steps)) for schedule in (late, none))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, [1, 1, 0.1, 0.1], rtol=1e-6)
