"""Which `multiple_of` would make a pruned network faster, found by timing such networks."""

from collections.abc import Callable, Mapping

from flax import nnx

from dhp_jax.budgets.chosen import Time
from dhp_jax.budgets.counted import check_budget, survivors_within
from dhp_jax.budgets.rounding import Multiples
from dhp_jax.core.cost import Cost
from dhp_jax.core.surgery import prune
from dhp_jax.errors import ArgumentError

NUMBERS = (4, 8, 16, 32)  # that widths may be multiples of


def time_other_widths(
    model: nnx.Module,
    cost: Cost,
    timed: Callable[[nnx.Module], Time],
    multiple_of: Multiples,
    budget_of: Callable[[int], Mapping[str, float]],
    share: float = 1.0,
) -> dict[int, Time]:
    """Times pruned networks whose widths are multiples of larger numbers.

    Args:
      model: a network of latents; left as it was.
      cost: its `measure_cost`.
      timed: times a pruned network against the whole one, as from `latency.clock`.
      multiple_of: of the network that is too slow.
      budget_of: shares of FLOPs, params and activations for a number.
      share: of the whole network's time; the first network within it is the last to be timed.

    Returns:
      The times by number, of those numbers that the latents and the budget allow.
    """
    found = {}
    for number in NUMBERS:
        if isinstance(multiple_of, int) and number <= multiple_of:
            continue
        try:
            budget = budget_of(number)
            check_budget(model, cost, number, **budget)
        except ArgumentError:  # a latent is smaller than that, or the budget is out of reach
            continue
        masks = survivors_within(model, cost, number, **budget)
        found[number] = timed(prune(model, masks))
        if found[number].within(share):
            break
    return found


def advice(ratios: Mapping[int | str, Mapping[str, float]]) -> str:
    """What the times of other widths, as shares of the whole network's, come to in words."""
    if not ratios:
        return "no larger multiple_of is possible"
    number, ratio = min(ratios.items(), key=lambda item: item[1]["high"])
    if ratio["high"] < 1:
        shown = "{median:.2f} of that time ({low:.2f} to {high:.2f})".format(**ratio)
        return f"multiple_of={number} would take {shown}, for no more FLOPs"
    return f"multiple_of={' or '.join(map(str, ratios))} is not faster either"
