"""Importance of channels by derivatives of a loss."""

from collections.abc import Callable, Iterable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.backend.platform import compiler_options
from dhp_jax.batches import each_batch
from dhp_jax.budgets.counted import Scores
from dhp_jax.core.latent import LatentVector, latents, latents_to_prune, walk
from dhp_jax.core.state import variables_of
from dhp_jax.core.surgery import prune
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.tracing.gating import gated_places
from dhp_jax.tracing.weights import sum_by_entry


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
    multiplied with keys, or one that is not in proportion to its array, as a rounded one, `g_i` is
    a factor of what makes them; of traced arrays that make them one after another, as a kernel and
    a scale behind it, the last, or all where a tanh or the like is behind. A traced array that both
    makes and reads channels, as one that is tied, counts twice. Over batches the squares are
    averaged, or magnitudes. Scores of all latents are compared as they are, for they are changes of
    one loss.

    Args:
      model: a network of latents; left as it was.
      loss: takes the ordinary network (of `dhp.prune(model)`), in the mode of `model`, and a
        batch; returns a number. Where `renew_statistics` follows the cut, call `model.train()`
        before, so that BatchNorm takes the statistics of the batch.
      batches: what `loss` takes, arrays of one shape or trees of them. Runs of the library take
        2,048 examples in all.
      squared: whether `t_i` is squared, or its magnitude taken, before the average.

    Returns:
      For each prunable latent by name an array of its size.

    Raises:
      ValueError: a network without latents; no batches, or one that is in no list; a loss that is
        no function, returns no number, or whose derivatives are all 0 or not finite; a prunable
        latent that no convolution on latents and no `Linear` reads, or, of traced ones, that no
        gates close (`dhp.with_gates`).

    Example:
      >>> def loss(network, batch):
      ...     images, labels = batch
      ...     return optax.softmax_cross_entropy_with_integer_labels(network(images), labels).mean()
      >>> scores = dhp.taylor_scores(model, loss, batches)
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=scores)

    Reference: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019 (arXiv
    1906.10771), equations 5 and 8, there with the scales of BatchNorm for `g`.
    """
    _check_order(model, loss)
    places = gated_places(model)
    graphdef, random, rest = nnx.split(prune(model), nnx.RngState, ...)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def derivatives(random: nnx.State, rest: nnx.State, batch: Any) -> tuple[list[Array], Any]:
        def gated_loss(gates: list[Array]) -> tuple[Array, Any]:
            network = nnx.merge(graphdef, random, rest, copy=True)
            arrays = _variables(network)
            for (array, axis), gate in zip(places, gates, strict=True):
                value = arrays[array].get_value()
                others = [k for k in range(value.ndim) if k != axis % value.ndim]
                arrays[array].set_value(value * jnp.expand_dims(gate, others).astype(value.dtype))
            return _number(loss(network, batch)), nnx.state(network, nnx.RngState)

        ones = [jnp.ones(len(entries)) for entries, _ in places.values()]
        return jax.grad(gated_loss, has_aux=True)(ones)

    totals: list[Scores] = []
    for batch in each_batch(batches):
        by_gates, random = derivatives(random, rest, batch)  # each batch has dropout of its own
        found = zip(places.values(), by_gates, strict=True)
        pairs = [(entries, shares * np.asarray(x, np.float64)) for (entries, shares), x in found]
        terms = sum_by_entry(model, pairs)
        totals.append({name: x**2 if squared else np.abs(x) for name, x in terms.items()})
    return _of_a_loss(
        {name: np.mean([terms[name] for terms in totals], axis=0) for name in totals[0]}
    )


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
      ValueError: a network without latents; no batches, or one that is in no list; a loss that is
        no function, returns no number, or whose derivatives are all 0 or not finite.

    Example:
      >>> def loss(network, batch):
      ...     images, labels = batch
      ...     return optax.softmax_cross_entropy_with_integer_labels(network(images), labels).mean()
      >>> scores = dhp.gradient_scores(model, loss, batches)
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5, by=scores)
    """
    _check_order(model, loss)
    latents_to_prune(model)
    graphdef, vectors, random, rest = nnx.split(model, LatentVector, nnx.RngState, ...)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def derivatives(
        vectors: nnx.State, random: nnx.State, rest: nnx.State, batch: Any
    ) -> tuple[nnx.State, Any]:
        def of(vectors: nnx.State) -> tuple[Array, Any]:
            network = nnx.merge(graphdef, vectors, random, rest, copy=True)
            return _number(loss(network, batch)), nnx.state(network, nnx.RngState)

        return jax.grad(of, has_aux=True)(vectors)

    total = jax.tree.map(jnp.zeros_like, vectors)
    for batch in each_batch(batches):
        found, random = derivatives(vectors, random, rest, batch)
        total = jax.tree.map(jnp.add, total, found)
    found = latents(nnx.merge(graphdef, total, random, rest))
    return _of_a_loss(
        {name: np.abs(np.asarray(z.value())) for name, z in found.items() if z.prunable}
    )


def _check_order(model: nnx.Module, loss: Callable[[nnx.Module, Any], Array]) -> None:
    if not isinstance(model, nnx.Module):
        raise ArgumentError("model", "a network of latents", shown(model))
    if not callable(loss):
        raise ArgumentError("loss", "a function of the network and a batch", shown(loss))


def _of_a_loss(scores: Scores) -> Scores:
    """The scores, if they can rank entries."""
    for name, numbers in scores.items():
        if not np.isfinite(numbers).all():
            detail = f"expected finite derivatives; those by latent {name!r} are NaN or infinite"
            raise ArgumentError("loss", detail=detail)
    if not any(numbers.any() for numbers in scores.values()):
        detail = "expected a number that changes with the network; all derivatives are 0"
        raise ArgumentError("loss", detail=detail)
    return scores


def _number(value: Any) -> Array:
    shape = getattr(value, "shape", None)
    if shape != ():
        found = f"a {type(value).__name__}" if shape is None else f"shape {shape}"
        raise ArgumentError("loss", "a function that returns a number", found)
    return value


def _variables(network: nnx.Module) -> dict[str, nnx.Variable]:
    """The variables of a network by all paths that lead to them."""
    own = {
        f"{path}.{name}" if path else name: value
        for path, _, layer in walk(network)
        for name, value in vars(layer).items()
        if isinstance(value, nnx.Variable)
    }
    return variables_of(network) | own
