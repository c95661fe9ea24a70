"""Scores of a network that is not trained: the gradient of its latents after a few batches."""

from collections.abc import Callable, Iterable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.budgets.counted import Scores
from dhp_jax.core.latent import LatentVector, latents, latents_to_prune


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

    @jax.jit
    def add(total: nnx.State, batch: Any) -> nnx.State:
        def of(vectors: nnx.State) -> Array:
            return loss(nnx.merge(graphdef, vectors, rest, copy=True), batch)

        return jax.tree.map(jnp.add, total, jax.grad(of)(vectors))

    total, count = jax.tree.map(jnp.zeros_like, vectors), 0
    for batch in batches:
        total, count = add(total, batch), count + 1
    if not count:
        raise ValueError("batches: expected at least one batch, got none")
    found = latents(nnx.merge(graphdef, total, rest))
    return {name: np.abs(np.asarray(z.value())) for name, z in found.items() if z.prunable}
