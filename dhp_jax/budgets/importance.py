"""Importance of channels: norms of weights, derivatives, random scores.

Scores rank the entries of all latents, as the magnitudes of latents do, and `dhp.prune_to(...,
by=scores)` keeps the largest.
"""

from collections.abc import Callable, Iterable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.backend.platform import compiler_options
from dhp_jax.budgets.counted import TINY, Scores
from dhp_jax.core.cost import MEASURES, Cost
from dhp_jax.core.latent import LatentVector, latents, latents_to_prune, walk
from dhp_jax.core.state import variables_of
from dhp_jax.core.surgery import prune
from dhp_jax.errors import ArgumentError, check_at_least_zero, check_integer
from dhp_jax.tracing.gating import gated_places
from dhp_jax.tracing.weights import (
    MADE,
    READ,
    SCALED,
    sum_by_entry,
    weights_in_role,
    weights_of,
)


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

    divided by the mean of all `s_i` of the latent.

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
    pairs = [
        (weights.entries, (np.abs(weights.rows()) ** 2).sum(1)) for weights in weights_of(model)
    ]
    sums = sum_by_entry(model, pairs, "layers whose axes")
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
    scaled = [weights for weights in weights_of(model) if weights.role == SCALED]
    pairs = [(weights.entries, np.abs(weights.rows()).sum(1)) for weights in scaled]
    return sum_by_entry(model, pairs, "normalisations whose axes")


def taylor_scores(
    model: nnx.Module,
    loss: Callable[[nnx.Module, Any], Array],
    batches: Iterable[Any],
    *,
    squared: bool = True,
) -> Scores:
    """Scores by how much the loss would change without an entry, to first order.

    Let every layer that reads the channels of entry `i` read them times `g_i`, which is 1. The
    derivative of the loss by `g_i` is

        t_i = sum over these layers of  sum(K[.., i, :] * dL/dK[.., i, :])

    with their kernels `K`: `-t_i` is what the first-order Taylor polynomial says of `g_i = 0`,
    which is the network pruned by `i`. Where no kernel reads the channels, as of queries that are
    multiplied with keys, `g_i` is a factor of what makes them; of traced arrays that make them one
    after another, as a kernel and a scale behind it, each counts. A traced array that both makes
    and reads channels, as one that is tied, counts twice. Over batches the squares are averaged, or
    magnitudes. Scores of all latents are compared as they are, for they are changes of one loss.

    Args:
      model: a network of latents; left as it was.
      loss: takes the ordinary network (of `dhp.prune(model)`), in the mode of `model`, and a
        batch; returns a number.
      batches: what `loss` takes, arrays of one shape or trees of them; some hundred examples in
        all are enough to rank most channels.
      squared: whether `t_i` is squared, or its magnitude taken, before the average.

    Returns:
      For each prunable latent by name an array of its size.

    Raises:
      ValueError: a network without latents; no batches; a prunable latent that no convolution on
        latents and no `Linear` reads.

    Example:
      >>> def loss(network, batch):
      ...     images, labels = batch
      ...     return optax.softmax_cross_entropy_with_integer_labels(network(images), labels).mean()
      >>> scores = dhp.taylor_scores(model, loss, batches)
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=scores)

    Reference: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019 (arXiv
    1906.10771), equations 5 and 8, there with the scales of BatchNorm for `g`.
    """
    places = gated_places(model)
    graphdef, state = nnx.split(prune(model))

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def derivatives(state: nnx.State, batch: Any) -> list[Array]:
        def gated_loss(gates: list[Array]) -> Array:
            network = nnx.merge(graphdef, state, copy=True)
            arrays = _variables(network)
            for (array, axis), gate in zip(places, gates, strict=True):
                value = arrays[array].get_value()
                others = [k for k in range(value.ndim) if k != axis % value.ndim]
                arrays[array].set_value(value * jnp.expand_dims(gate, others).astype(value.dtype))
            return _number(loss(network, batch))

        return jax.grad(gated_loss)([jnp.ones(len(entries)) for entries, _ in places.values()])

    totals: list[Scores] = []
    for batch in batches:
        found = zip(places.values(), derivatives(state, batch), strict=True)
        pairs = [(entries, shares * np.asarray(x, np.float64)) for (entries, shares), x in found]
        terms = sum_by_entry(model, pairs, "layers that read")
        totals.append({name: x**2 if squared else np.abs(x) for name, x in terms.items()})
    if not totals:
        raise ValueError("batches: expected at least one batch, got none")
    return {name: np.mean([terms[name] for terms in totals], axis=0) for name in totals[0]}


def gradient_scores(
    model: nnx.Module, loss: Callable[[nnx.Module, Any], Array], batches: Iterable[Any]
) -> Scores:
    """Scores by the gradient of the latents: `|sum over batches of dL/dz|`, entry by entry.

    Nothing is trained, so that survivors are known after a few batches and no search.

    Args:
      model: a network of latents; left as it was.
      loss: takes the network, in the mode of `model`, and a batch; returns a number.
      batches: what `loss` takes, arrays of one shape or trees of them.

    Returns:
      For each prunable latent by name an array of its size.

    Raises:
      ValueError: a network without latents; no batches.

    Example:
      >>> def loss(network, batch):
      ...     images, labels = batch
      ...     return optax.softmax_cross_entropy_with_integer_labels(network(images), labels).mean()
      >>> scores = dhp.gradient_scores(model, loss, batches)
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=scores)
    """
    latents_to_prune(model)
    graphdef, vectors, rest = nnx.split(model, LatentVector, ...)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def add(total: nnx.State, batch: Any) -> nnx.State:
        def of(vectors: nnx.State) -> Array:
            return _number(loss(nnx.merge(graphdef, vectors, rest, copy=True), batch))

        return jax.tree.map(jnp.add, total, jax.grad(of)(vectors))

    total, count = jax.tree.map(jnp.zeros_like, vectors), 0
    for batch in batches:
        total, count = add(total, batch), count + 1
    if not count:
        raise ValueError("batches: expected at least one batch, got none")
    found = latents(nnx.merge(graphdef, total, rest))
    return {name: np.abs(np.asarray(z.value())) for name, z in found.items() if z.prunable}


def per_cost(scores: Scores, cost: Cost, *, measure: str = "flops", power: float = 1.0) -> Scores:
    """Scores divided by what an entry costs: importance per FLOP.

    The scores of a latent are divided by `c^power`, where `c` is the share of the whole network's
    cost that goes with one of its entries, all others being there. With `power=1` and scores that
    say what the loss loses, the smallest are those that cost most for what they are worth.

    Args:
      scores: of the entries of latents, by name.
      cost: the network's `measure_cost`.
      measure: `flops`, `params` or `activations`.
      power: 0 leaves scores as they are.

    Returns:
      Scores of the same latents.

    Raises:
      ValueError: an unknown measure or latent; a power that is no number of at least 0.

    Example:
      >>> scores = dhp.per_cost(dhp.l1_scores(model), dhp.measure_cost(model, (32, 32, 3)))
    """
    if measure not in MEASURES:
        raise ValueError(f"measure: expected one of {', '.join(MEASURES)}; got {measure!r}")
    check_at_least_zero("power", power)
    for name in scores:
        if name not in cost.sizes:
            raise ArgumentError.unknown("scores", name, cost.sizes)
    shares = {
        name: 1 - cost.shares({**cost.sizes, name: cost.sizes[name] - 1})[measure]
        for name in scores
    }
    return {name: np.asarray(x) / max(shares[name], TINY) ** power for name, x in scores.items()}


def _number(value: Any) -> Array:
    shape = getattr(value, "shape", None)
    if shape != ():
        found = f"a {type(value).__name__}" if shape is None else f"shape {shape}"
        raise ArgumentError("loss", "a function that returns a number", found)
    return value


def _summed(model: nnx.Module, number_of: Callable[[np.ndarray], np.ndarray]) -> Scores:
    """The numbers of filters, given as the rows of a matrix, summed over what an entry rules."""
    pairs = (
        (weights.entries, number_of(filters))
        for weights in weights_in_role(model, MADE, READ)
        for filters in weights.filters()
    )
    return sum_by_entry(model, pairs, "layers whose outputs")


def _variables(network: nnx.Module) -> dict[str, nnx.Variable]:
    """The variables of a network by all paths that lead to them."""
    own = {
        f"{path}.{name}" if path else name: value
        for path, _, layer in walk(network)
        for name, value in vars(layer).items()
        if isinstance(value, nnx.Variable)
    }
    return variables_of(network) | own


def _of_mean_one(scores: Scores) -> Scores:
    means = {name: values.mean() for name, values in scores.items()}
    return {name: x / means[name] if means[name] else x for name, x in scores.items()}


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
