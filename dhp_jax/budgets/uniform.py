"""One share of the channels for all latents."""

from collections.abc import Mapping
from fractions import Fraction

from flax import nnx
import numpy as np

from dhp_jax.budgets.counted import check_budget, slack, widths_of
from dhp_jax.budgets.rounding import Multiples, multiples
from dhp_jax.core.cost import Cost
from dhp_jax.core.latent import latents


def uniform_within(
    model: nnx.Module, cost: Cost, multiple_of: Multiples = 1, **budget: float
) -> dict[str, np.ndarray]:
    """The survivors when every prunable latent keeps the same share of its entries.

    The share is the largest that fits, rounded down in each latent to a width that it may have.
    What is left of the budget goes to single latents, one width more each, costly ones first. So a
    width is off the common share by at most one step (but for `min_channels`), which is much of a
    narrow latent with a large `multiple_of`, and no latent below the share has room for its step.

    Args:
      model: a network of latents; their values do not matter.
      cost: its `measure_cost`.
      multiple_of: latents that lose entries keep a multiple of so many; see `dhp.prune_to`.
      **budget: some of `flops`, `params`, `activations`, shares in (0, 1]; all of them hold.

    Returns:
      A boolean mask for each latent by name; the first entries survive.

    Raises:
      ValueError: as `dhp_jax.budgets.counted.survivors_within`.

    Example:
      >>> narrow = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=dhp.uniform_within)
    """
    check_budget(model, cost, multiple_of, **budget)
    steps, sizes = multiples(model, multiple_of), {n: z.size for n, z in latents(model).items()}
    possible = {  # widths of each latent, ascending
        name: widths_of(z, steps.get(name, 1)) for name, z in latents(model).items()
    }

    def at(share: Fraction) -> dict[str, int]:
        return {
            name: max((w for w in widths if w <= share * sizes[name]), default=widths[0])
            for name, widths in possible.items()
        }

    shares = sorted({Fraction(w, sizes[name]) for name, ws in possible.items() for w in ws})
    low, high = 0, len(shares) - 1  # of the smallest share the widths are the smallest possible
    while low < high:
        middle = (low + high + 1) // 2
        fits = slack(cost, at(shares[middle]), budget) >= 0
        low, high = (middle, high) if fits else (low, middle - 1)
    counts = at(shares[low])
    below = [name for name, count in counts.items() if count <= shares[low] * sizes[name]]
    wider = {name: [w for w in possible[name] if w > counts[name]][:1] for name in below}
    counts = _widen(counts, {name: w[0] for name, w in wider.items() if w}, cost, budget)
    return {name: np.arange(size) < counts[name] for name, size in sizes.items()}


def _widen(
    counts: dict[str, int], wider: Mapping[str, int], cost: Cost, budget: Mapping[str, float]
) -> dict[str, int]:
    """Widens latents as far as the budget allows, the most expensive first."""

    def left(name: str) -> float:
        return slack(cost, counts | {name: wider[name]}, budget)

    for name in sorted(wider, key=left):
        if left(name) >= 0:
            counts = counts | {name: wider[name]}
    return counts
