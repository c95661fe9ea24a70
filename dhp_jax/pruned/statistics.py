"""The statistics of BatchNorm, measured anew."""

from collections.abc import Iterable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.core.latent import walk
from dhp_jax.errors import shown


def renew_statistics(model: nnx.Module, batches: Iterable[Any]) -> None:
    """Measures the mean and variance of every BatchNorm anew; nothing is trained.

    Cutting channels changes what the layers behind them see, so that statistics from before are
    those of another network. Every batch goes through the network once, each BatchNorm normalising
    with the mean `m` and variance `v` of the batch itself. Over batches of `n` examples, the
    statistics become

        mean = sum(n m) / sum(n)
        variance = sum(n (v + m^2)) / sum(n) - mean^2

    the moments of all that a layer saw, and not an average that forgets. Dropout is off.

    Args:
      model: any network with `nnx.BatchNorm` layers, pruned or not; changed in place, its mode
        stays.
      batches: what the model takes, such as images of shape `(n, h, w, c)`, augmented as in
        training; some thousand examples in all. Batches of another shape are compiled for again.

    Raises:
      ValueError: a network without `nnx.BatchNorm` layers, or no batches.

    Example:
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5)
      >>> dhp.renew_statistics(small, [images[:256], images[256:512]])

    Reference: Wu, Johnson, Rethinking "Batch" in BatchNorm, 2021 (arXiv 2105.07576), section 3.
    """
    norms = _norms(model)
    if not norms:
        raise ValueError(
            f"model: expected a network with nnx.BatchNorm layers, got {type(model).__name__}"
        )
    graphdef, state = nnx.split(_measuring(model))

    @jax.jit
    def of_batch(state: nnx.State, batch: Array) -> dict[str, tuple[Array, Array]]:
        network = nnx.merge(graphdef, state, copy=True)
        network(batch)
        return {path: (norm.mean[...], norm.var[...]) for path, norm in _norms(network).items()}

    count = 0
    first = {path: np.zeros(norm.num_features) for path, norm in norms.items()}
    second = {path: np.zeros(norm.num_features) for path, norm in norms.items()}
    for batch in batches:
        if not hasattr(batch, "shape"):
            raise ValueError(f"batches: expected arrays, without labels; got {shown(batch)}")
        size = len(batch)
        count += size
        for path, moments in of_batch(state, batch).items():
            mean, variance = (np.asarray(moment, np.float64) for moment in moments)
            first[path] += size * mean
            second[path] += size * (variance + mean**2)
    if not count:
        raise ValueError("batches: expected at least one batch, got none")
    for path, norm in norms.items():
        mean = first[path] / count
        variance = np.maximum(second[path] / count - mean**2, 0)
        norm.mean.set_value(jnp.asarray(mean, norm.mean[...].dtype))
        norm.var.set_value(jnp.asarray(variance, norm.var[...].dtype))


def _norms(model: nnx.Module) -> dict[str, nnx.BatchNorm]:
    return {path: layer for path, _, layer in walk(model) if isinstance(layer, nnx.BatchNorm)}


def _measuring(model: nnx.Module) -> nnx.Module:
    """A copy in evaluation mode whose BatchNorms store the statistics of a batch as they are."""
    copy = nnx.clone(model)
    copy.eval()
    for norm in _norms(copy).values():
        norm.use_running_average = False
        norm.momentum = 0.0
    return copy
