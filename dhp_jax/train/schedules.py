"""Learning rates of the steps of a phase."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array
import optax

NAMES = ("drops", "cosine", "linear")


def drop_schedule(
    learning_rate: float, drops: Sequence[float], steps_per_epoch: int
) -> optax.Schedule:
    """A learning rate that is divided by 10 at given epochs.

    Args:
      learning_rate: before the first of them.
      drops: epochs, not necessarily whole ones; one that is given twice divides by 100.
      steps_per_epoch: training steps.
    """
    steps = [round(epoch * steps_per_epoch) for epoch in drops]
    boundaries = {step: 0.1 ** steps.count(step) for step in steps}
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def decay_schedule(
    name: str, learning_rate: float, epochs: int, steps_per_epoch: int, *, warmup: float = 0.0
) -> optax.Schedule:
    """A learning rate that falls to zero in `T` steps, after `W` steps of warm-up.

    Step `s = W .. T - 1` has the share `p = (s - W) / (T - W)` of the fall behind it:

        cosine:  learning_rate (1 + cos(pi p)) / 2
        linear:  learning_rate (1 - p)

    Args:
      name: "cosine" or "linear".
      learning_rate: the largest.
      epochs: of the phase, warm-up included.
      steps_per_epoch: training steps.
      warmup: epochs, less than `epochs`; see `warmed_up`.

    Raises:
      ValueError: another name.

    Reference: Loshchilov and Hutter, SGDR, ICLR 2017 (arXiv 1608.03983), equation 5.
    """
    if name not in ("cosine", "linear"):
        raise ValueError(f"schedule: expected cosine or linear; got {name!r}")
    begin = round(warmup * steps_per_epoch)
    steps = max(1, epochs * steps_per_epoch - begin)
    if name == "cosine":
        fall = optax.cosine_decay_schedule(learning_rate, steps)
    else:
        fall = optax.linear_schedule(learning_rate, 0.0, steps)
    return warmed_up(lambda step: fall(step - begin), learning_rate, begin)


def warmed_up(schedule: optax.Schedule, learning_rate: float, steps: int) -> optax.Schedule:
    """A schedule whose first steps rise in a straight line: step `s` has `(s + 1) / steps`.

    Args:
      schedule: of all steps after them.
      learning_rate: the largest.
      steps: of the rise; with 0 the schedule is left as it is.
    """
    if not steps:
        return schedule

    def risen(step: Array) -> Array:
        return jnp.where(step < steps, learning_rate * (step + 1) / steps, schedule(step))

    return risen


def make_schedule(
    name: str,
    learning_rate: float,
    *,
    epochs: int,
    drops: Sequence[float],
    warmup: float,
    steps_per_epoch: int,
) -> optax.Schedule:
    """The learning rates of a phase, by its fields in the configuration.

    Args:
      name: one of `NAMES`.
      learning_rate, epochs, drops, warmup: of the phase; `drops` are of the schedule "drops", and
        those that come after its end do nothing.
      steps_per_epoch: training steps.
    """
    if name != "drops":
        return decay_schedule(name, learning_rate, epochs, steps_per_epoch, warmup=warmup)
    reached = [drop for drop in drops if drop < epochs]  # the steps of others may exceed int32
    dropped = drop_schedule(learning_rate, reached, steps_per_epoch)
    return warmed_up(dropped, learning_rate, round(warmup * steps_per_epoch))
