"""Which `multiple_of` would make a pruned network faster, found by timing such networks."""

from collections.abc import Callable, Mapping

from flax import nnx
import numpy as np

from dhp_jax.activity import doing
from dhp_jax.budgets.chosen import Time
from dhp_jax.budgets.counted import check_budget, survivors_within
from dhp_jax.budgets.rounding import AUTO, Multiples
from dhp_jax.core.cost import Cost
from dhp_jax.core.surgery import prune
from dhp_jax.errors import ArgumentError

TRIED = (4, 8, 16, 32, AUTO)  # of `multiple_of`; the last leaves narrow latents as they are


@doing("timing networks of other widths")
def time_other_widths(
    model: nnx.Module,
    cost: Cost,
    timed: Callable[[nnx.Module], Time],
    multiple_of: Multiples,
    budget_of: Callable[[int | str], Mapping[str, float]],
    select: Callable[..., dict[str, np.ndarray]] = survivors_within,
    share: float = 1.0,
) -> dict[int | str, Time]:
    """Times pruned networks of other `multiple_of`, larger numbers and "auto"; by value.

    Those that the latents or the budget do not allow are left out.

    Args:
      model, cost: a network of latents, left as it was, and its `measure_cost`.
      timed: times a pruned network against the whole one, as from `latency.clock`.
      multiple_of: of the network that is too slow.
      budget_of: shares of FLOPs, params and activations for a value.
      select: chooses survivors, as `survivors_within`.
      share: of the whole network's time; the first network within it is the last to be timed.
    """
    found = {}
    for other in TRIED:
        if other == multiple_of:
            continue
        if isinstance(multiple_of, int) and isinstance(other, int) and other < multiple_of:
            continue
        try:
            budget = budget_of(other)
            check_budget(model, cost, other, **budget)
        except ArgumentError:  # a latent is smaller than that, or the budget is out of reach
            continue
        masks = select(model, cost, other, **budget)
        found[other] = timed(prune(model, masks))
        if found[other].within(share):
            break
    return found


def advice(ratios: Mapping[int | str, Mapping[str, float]]) -> str:
    """What the times of other widths, as shares of the whole network's, come to in words."""
    if not ratios:
        return "no other multiple_of is possible"
    value, ratio = min(ratios.items(), key=lambda item: item[1]["high"])
    if ratio["high"] < 1:
        shown = "{median:.2f} of that time ({low:.2f} to {high:.2f})".format(**ratio)
        return f"multiple_of={value} would take {shown}, for no more FLOPs"
    return f"multiple_of={' or '.join(map(str, ratios))} is not faster either"
