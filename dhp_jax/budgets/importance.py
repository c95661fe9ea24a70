"""Importance of channels: norms of weights, random scores, and scores per cost.

Scores rank the entries of all latents, as the magnitudes of latents do, and `dhp.prune_to(...,
by=scores)` keeps the largest.
"""

from collections.abc import Callable, Mapping

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax.budgets.counted import Scores, entry_shares
from dhp_jax.core.cost import MEASURES, Cost
from dhp_jax.core.latent import latents_to_prune
from dhp_jax.errors import ArgumentError, check_at_least_zero, check_integer, in_row, shown
from dhp_jax.tracing.weights import ANY, MADE, SCALED, scored_weights, sum_by_entry


def l1_scores(model: nnx.Module) -> Scores:
    """Scores each entry of a latent by the l1 norm of the filters that belong to it.

    A filter `F` is the part of a kernel that makes one output channel; biases are none. The score
    of entry `i` is

        s_i = sum over the filters F that make the channels of i of  sum abs(F)

    divided by the mean of all `s_i` of the latent. Convolutions whose outputs are added share a
    latent, so there are several filters. Layers differ widely in norm: with the division an entry
    is compared with the others of its latent, and no layer is removed for its scale. Latents then
    agree in scale, but not in spread; one with similar filters may keep many more or many fewer of
    them than others.

    Args:
      model: a network of latents; one that `prune` or a baseline run has made becomes one by
        `dhp.with_latents`.

    Returns:
      For each prunable latent by name an array of its size, of mean 1.

    Raises:
      ValueError: a network without latents; a prunable latent is the output of no layer with a
        generated kernel.

    Example:
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=dhp.l1_scores(model))

    Reference: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (arXiv 1608.08710),
    section 3.1; there within each layer, with ratios chosen by hand. Ranking across layers, and the
    mean as the scale, are ours; Molchanov et al., ICLR 2017 (arXiv 1611.06440), divide by the l2
    norm of a layer's scores.
    """
    return _of_mean_one(_summed(model, lambda filters: np.abs(filters).sum(1)))


def l2_scores(model: nnx.Module) -> Scores:
    """Scores by the Euclidean norm of the filters that each entry of a latent rules.

    As `l1_scores`, with `sqrt(sum F^2)` for the norm of a filter.

    Args:
      model: a network of latents.

    Returns:
      For each prunable latent by name an array of its size, of mean 1.

    Raises:
      ValueError: as `l1_scores`.

    Example:
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=dhp.l2_scores(model))

    Reference: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.
    """
    return _of_mean_one(_summed(model, lambda filters: np.linalg.norm(filters, axis=1)))


def fpgm_scores(model: nnx.Module) -> Scores:
    """Scores by how far a filter is from the others of its layer.

    The score of filter `i` of a convolution is the sum over `j` of `|f_i - f_j|_2`. Where it is
    small, the filter is near the geometric median of the layer, and others can stand in for it.
    Sums over convolutions, and the mean as the scale, are as in `l1_scores`.

    Args:
      model: a network of latents.

    Returns:
      For each prunable latent by name an array of its size, of mean 1.

    Raises:
      ValueError: as `l1_scores`.

    Example:
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=dhp.fpgm_scores(model))

    Reference: He et al., Filter Pruning via Geometric Median, CVPR 2019 (arXiv 1811.00250),
    equations 4 and 6.
    """

    def distances(filters: np.ndarray) -> np.ndarray:
        squares = (np.abs(filters) ** 2).sum(1)
        apart = squares[:, None] + squares - 2 * (filters @ filters.conj().T).real
        np.fill_diagonal(apart, 0)
        return np.sqrt(np.maximum(apart, 0)).sum(1)

    return _of_mean_one(_summed(model, distances))


def group_scores(model: nnx.Module) -> Scores:
    """Scores by the Euclidean norm of all weights that go with an entry of a latent.

    With an entry go the filters that make its channels, the slices of kernels and the rows of
    linear layers that read them, and the scales of normalised channels. The score of entry `i` is

        s_i = sqrt(sum over all weights w that go with i of  abs(w)^2)

    divided by the mean of all `s_i` of the latent. Of a kernel that reads and makes the channels of
    one latent, a weight from a channel to itself counts twice.

    Args:
      model: a network of latents.

    Returns:
      For each prunable latent by name an array of its size, of mean 1.

    Raises:
      ValueError: a network without latents; no layer has a prunable latent.

    Example:
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=dhp.group_scores(model))

    Reference: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023 (arXiv 2301.12900),
    section 3.3, here of a network that was trained without its sparsity term.
    """
    found = scored_weights(model, ANY)
    pairs = [(weights.entries, (np.abs(weights.rows()) ** 2).sum(1)) for weights in found]
    sums = sum_by_entry(model, pairs)
    return _of_mean_one({name: np.sqrt(values) for name, values in sums.items()})


def scale_scores(model: nnx.Module) -> Scores:
    """Scores by the magnitude of the scales of normalised channels that an entry stands for.

    With the scales `gamma` of normalisations the score of entry `i` is

        s_i = sum over the channels c that stand for i of  abs(gamma_c)

    Scores are compared across latents as they are, as in network slimming. There the network is
    trained with an l1 term on its scales before; without one, few are near zero.

    Args:
      model: a network of latents.

    Returns:
      For each prunable latent by name an array of its size: the sum of its scales' magnitudes.

    Raises:
      ValueError: a network without latents; a prunable latent is that of no normalisation with
        scales.

    Example:
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=dhp.scale_scores(model))

    Reference: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV
    2017 (arXiv 1708.06519), section 3.
    """
    found = scored_weights(model, SCALED)
    pairs = [(weights.entries, np.abs(weights.rows()).sum(1)) for weights in found]
    return sum_by_entry(model, pairs)


def random_scores(model: nnx.Module, seed: int) -> Scores:
    """Random scores: each entry of each latent is equally likely to go, for `s_i ~ U(0, 1)`.

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
    check_integer("seed", seed, least=0)
    rng = np.random.default_rng(seed)
    found = latents_to_prune(model)
    return {name: rng.random(z.size) for name, z in found.items() if z.prunable}


def per_cost(scores: Scores, cost: Cost, *, measure: str = "flops", power: float = 1.0) -> Scores:
    """Scores divided by what an entry costs: importance per FLOP.

    The scores of a latent are divided by `c^power`, where `c` is the derivative of the network's
    cost by the width of the latent, all entries being there, as a share of the whole cost; of
    branches it is the largest. With `power=1` and scores that say what the loss loses, the smallest
    are those that cost most for what they are worth. It is for scores in units of the loss; norms
    say nothing of that.

    Args:
      scores: of the entries of latents, by name, a number for each.
      cost: the network's `measure_cost`.
      measure: `flops`, `params` or `activations`.
      power: 0 leaves scores as they are.

    Returns:
      Scores of the same latents.

    Raises:
      ValueError: an unknown measure or latent; scores that are not as many as a latent has entries;
        a cost of another network; a power that is no number of at least 0.

    Example:
      >>> cost = dhp.measure_cost(model, (32, 32, 3))
      >>> scores = dhp.per_cost(dhp.taylor_scores(model, loss, batches), cost, power=0.5)
    """
    if measure not in MEASURES:
        raise ValueError(f"measure: expected one of {', '.join(MEASURES)}; got {measure!r}")
    check_at_least_zero("power", power)
    _check_alike(scores, cost)
    with jax.enable_x64(True):  # whole numbers, exactly
        shares = entry_shares(cost, cost.sizes, measure, jnp.float64)
    return {name: np.asarray(x) / float(shares[name]) ** power for name, x in scores.items()}


def _check_alike(scores: Scores, cost: Cost) -> None:
    """Raises if scores and a cost are not those of the latents of one network."""
    if not isinstance(scores, Mapping):
        raise ArgumentError("scores", "scores by latent, such as l1_scores(model)", shown(scores))
    if not isinstance(cost, Cost):
        raise ArgumentError("cost", "what measure_cost(model, inputs) returns", shown(cost))
    if scores and not set(scores) & set(cost.sizes):
        found = f"one of latents {in_row(sorted(cost.sizes)) or 'of none'}"
        raise ArgumentError("cost", f"that of a network with latent {next(iter(scores))!r}", found)
    for name, numbers in scores.items():
        if name not in cost.sizes:
            raise ArgumentError.unknown("scores", name, cost.sizes)
        shape, size = np.shape(numbers), cost.sizes[name]
        if shape != (size,):
            expected = f"{size} numbers, for as many entries are in cost"
            raise ArgumentError(f"scores[{name!r}]", expected, f"shape {shape}")


def _summed(model: nnx.Module, number_of: Callable[[np.ndarray], np.ndarray]) -> Scores:
    """The numbers of filters, given as the rows of a matrix, summed over what an entry rules."""
    pairs = (
        (weights.entries, number_of(filters))
        for weights in scored_weights(model, MADE)
        for filters in weights.filters()
    )
    return sum_by_entry(model, pairs)


def _of_mean_one(scores: Scores) -> Scores:
    means = {name: values.mean() for name, values in scores.items()}
    return {name: x / means[name] if means[name] else x for name, x in scores.items()}
