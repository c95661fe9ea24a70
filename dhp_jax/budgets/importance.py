"""Importance of channels without latents: filter norms, random scores, uniform widths.

Scores rank the entries of all latents, as the magnitudes of latents do, and `dhp.prune_to(...,
by=scores)` keeps the largest. `uniform_within` needs none.
"""

from collections.abc import Mapping
from fractions import Fraction

from flax import nnx
import numpy as np

from dhp_jax.budgets.counted import Scores, check_budget, removals, slack
from dhp_jax.budgets.rounding import Multiples, multiples
from dhp_jax.core.cost import Cost
from dhp_jax.core.latent import latents, latents_to_prune, walk
from dhp_jax.core.layers import Hyper


def l1_scores(model: nnx.Module) -> Scores:
    """Scores each entry of a latent by the l1 norm of the filters that belong to it.

    A filter is the part of a kernel that makes one output channel. Convolutions whose outputs are
    added share a latent, so the norms of their filters add up. Layers differ widely in norm, so the
    sums of each latent are divided by their mean: an entry is compared with the others of its
    latent, and no layer is removed for its scale. Latents then agree in scale, but not in spread;
    one with similar filters may keep many more or many fewer of them than others.

    Args:
      model: a network of latents; one that `prune` or a baseline run has made becomes one by
        `dhp.with_latents`.

    Returns:
      For each prunable latent by name an array of its size, of mean 1.

    Raises:
      ValueError: a network without latents; a prunable latent is the output of no convolution on
        latents.

    Example:
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=dhp.l1_scores(model))

    Reference: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (arXiv 1608.08710),
    section 3.1; there within each layer, with ratios chosen by hand. Ranking across layers, and the
    mean as the scale, are ours; Molchanov et al., ICLR 2017 (arXiv 1611.06440), divide by the l2
    norm of a layer's scores.
    """
    sums = {z: np.zeros(z.size) for z in latents_to_prune(model).values()}
    ruled = set()
    for _, _, layer in walk(model):
        if isinstance(layer, Hyper):
            kernel = np.abs(np.asarray(layer.kernel(), np.float64))
            norms = kernel.reshape(-1, kernel.shape[-1]).sum(0)
            for norm, (z, entry) in zip(norms, layer.z_out.entries(), strict=True):
                sums[z][entry] += norm
                ruled.add(z)
    prunable = {name: z for name, z in latents(model).items() if z.prunable}
    for name, z in prunable.items():
        if z not in ruled:
            raise ValueError(
                f"model: expected convolutions whose output prunable latents are; {name!r} is that "
                "of none"
            )
    return {name: _of_mean_one(sums[z]) for name, z in prunable.items()}


def _of_mean_one(values: np.ndarray) -> np.ndarray:
    mean = values.mean()
    return values / mean if mean else values


def random_scores(model: nnx.Module, seed: int) -> Scores:
    """Random scores: each entry of each latent is equally likely to go.

    Entries that still fit the budget come back, as for `prune_to`.

    Args:
      model: a network of latents.
      seed: an integer of at least 0; the same one gives the same scores.

    Returns:
      For each prunable latent by name an array of its size, from U(0, 1).

    Raises:
      ValueError: a network without latents, or a seed that is none.

    Example:
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=dhp.random_scores(model, 0))
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed: expected an integer of at least 0, got {seed!r}")
    rng = np.random.default_rng(seed)
    found = latents_to_prune(model)
    return {name: rng.random(z.size) for name, z in found.items() if z.prunable}


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
      ValueError: as `dhp_jax.prune.survivors_within`.

    Example:
      >>> narrow = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=dhp.uniform_within)
    """
    check_budget(model, cost, multiple_of, **budget)
    steps, sizes = multiples(model, multiple_of), {n: z.size for n, z in latents(model).items()}
    possible = {  # widths of each latent, ascending
        name: [z.size - gone for gone in (0, *removals(z, steps.get(name, 1)))][::-1]
        for name, z in latents(model).items()
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
