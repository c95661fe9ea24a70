"""Survivors within a latency budget, found by timing candidates of several sizes.

FLOPs, params and activations are counted before anything is pruned; time is not. So candidates are
pruned, compiled and timed against the whole network, the two in turn, and the largest one that is
fast enough is found by bisection over its FLOPs.
"""

from collections.abc import Callable
from dataclasses import replace
import functools
from typing import Any

from flax import nnx

from dhp_jax.budgets.chosen import Chosen, Time, describe_choice
from dhp_jax.budgets.counted import BudgetError, check_share, smallest_ratio, survivors_within
from dhp_jax.budgets.other_widths import time_other_widths
from dhp_jax.budgets.rounding import Multiples
from dhp_jax.budgets.timing import hardware, passes_of, quartiles, time_in_turn, timed_inputs
from dhp_jax.core.cost import Cost
from dhp_jax.core.surgery import prune
from dhp_jax.tracing.programs import Call

RESOLUTION = 0.01  # of the FLOPs, at which the bisection ends
ROUNDS, SECONDS = 101, 2.0  # of a measurement, at most
Clock = Callable[[nnx.Module], Time]


def clock(model: nnx.Module, input_shape: Any, batch: int = 1, call: Call | None = None) -> Clock:
    """A function that times pruned networks against a model with nothing pruned.

    Args:
      model: a network of latents; left as it was.
      input_shape: of one example, `(h, w, c)`, or other inputs, as for `measure_latency`.
      batch: how many examples a pass takes.
      call: a function of the model and the inputs, where that is not `model(*inputs)`.

    Raises:
      ValueError: the network does not take so many examples.
    """
    ordinary = prune(model)
    inputs = timed_inputs(ordinary, input_shape, batch, call)
    whole = passes_of(ordinary, inputs, call=call)

    @functools.lru_cache(maxsize=1)  # most networks are timed several times
    def compiled(small: nnx.Module) -> Callable[[], None]:
        return passes_of(small, inputs, call=call)

    def timed(small: nnx.Module) -> Time:
        passes = {"unpruned": whole, "pruned": compiled(small)}
        seconds = time_in_turn(passes, ROUNDS, SECONDS, what=f", batch {batch}")
        pairs = list(zip(seconds["unpruned"], seconds["pruned"], strict=True))
        return Time(
            ratio=quartiles([small / whole for whole, small in pairs]),
            whole_ms=quartiles([1e3 * s for s in seconds["unpruned"]]),
            ms=quartiles([1e3 * s for s in seconds["pruned"]]),
            rounds=len(pairs),
        )

    return timed


class LatencySearch:
    """Finds the largest pruned network that is fast enough, by bisection over its FLOPs.

    Candidates are pruned and timed two or three times each; `result` runs the search.
    """

    def __init__(self, model, cost, multiple_of, select, budget, latency, timed):
        self.model, self.cost, self.multiple_of, self.select = model, cost, multiple_of, select
        self.budget, self.latency, self.timed = budget, latency, timed
        self.known: dict[tuple[int, ...], Chosen | None] = {}
        self.tried: list[dict[str, Any]] = []

    def result(self) -> Chosen:
        """Runs the search.

        Raises:
          BudgetError: the smallest network is not fast enough.
        """
        low = smallest_ratio(self.model, self.cost, self.multiple_of)["flops"]
        high = self.budget["flops"]
        best = self.fast_enough(low)
        if best is None:
            raise self.unreachable(self.last)
        if (largest := self.fast_enough(high)) is not None:
            return self._with_measurements(largest)
        while high - low > RESOLUTION:
            middle = (low + high) / 2
            if (found := self.fast_enough(middle)) is None:
                high = middle
            else:
                best, low = found, middle
        return self._with_measurements(best)

    def fast_enough(self, flops: float) -> Chosen | None:
        """The candidate with a share of the FLOPs, if it is fast enough; each is timed once."""
        masks = self.select(
            self.model, self.cost, self.multiple_of, **self.budget | {"flops": flops}
        )
        widths = tuple(int(mask.sum()) for mask in masks.values())
        if widths not in self.known:
            chosen = describe_choice(self.cost, masks)
            time = self.two_of_three(prune(self.model, masks), chosen.shares["flops"])
            self.known[widths] = time and replace(chosen, time=time)
        return self.known[widths]

    def two_of_three(self, small: nnx.Module, flops: float) -> Time | None:
        """The slower of two measurements within the budget, if two of three are."""
        within, beyond = [], []
        while max(len(within), len(beyond)) < 2:
            self.last = time = self.timed(small)
            self.tried.append({"flops": flops, **time.ratio})
            (within if time.within(self.latency) else beyond).append(time)
        return max(within, key=lambda time: time.ratio["high"]) if len(within) == 2 else None

    def _with_measurements(self, chosen: Chosen) -> Chosen:
        return replace(chosen, tried=tuple(self.tried))

    def unreachable(self, time: Time) -> BudgetError:
        """The error for a smallest network that is too slow; tells which widths would do."""
        tried = time_other_widths(
            self.model,
            self.cost,
            self.timed,
            self.multiple_of,
            lambda number: smallest_ratio(self.model, self.cost, number),
            share=self.latency,
        )
        hint = "".join(
            f"; multiple_of={number} would do, of which it takes {found}"
            for number, found in tried.items()
            if found.within(self.latency)
        )
        return BudgetError(
            "latency",
            f"at least {time}",
            self.latency,
            f"{self.latency!r} cannot be reached: the smallest possible network takes {time} of "
            f"the whole one's time, on {hardware()}{hint}",
        )


def check_latency(
    model: nnx.Module, cost: Cost, latency: float, timed: Clock, multiple_of: Multiples = 1
) -> None:
    """Raises a `BudgetError` if the smallest network is clearly slower than a budget.

    Clearly: three of four passes are, in two measurements. What is closer is left to `choose`.
    """
    check_share("latency", latency)
    smallest = smallest_ratio(model, cost, multiple_of)
    small = prune(model, survivors_within(model, cost, multiple_of, **smallest))
    if all((time := timed(small)).ratio["low"] > latency for _ in range(2)):
        search = LatencySearch(model, cost, multiple_of, survivors_within, {}, latency, timed)
        raise search.unreachable(time)
