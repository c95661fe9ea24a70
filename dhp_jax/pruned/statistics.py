"""The statistics of BatchNorm, measured anew."""

from collections.abc import Callable, Iterable
import functools
from typing import Any

from flax import nnx
import flax.linen as linen
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.backend.platform import compiler_options
from dhp_jax.batches import each_batch
from dhp_jax.core.latent import walk
from dhp_jax.core.surgery import override
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.models.linen import FromLinen
from dhp_jax.tracing.programs import failure


def renew_statistics(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[nnx.Module, Any], Any] | None = None,
) -> None:
    """Measures the mean and variance of every BatchNorm anew; nothing is trained.

    Cutting channels changes what the layers behind them see, so that statistics from before are
    those of another network. Every batch goes through the network once, each BatchNorm normalising
    with the mean `m` and variance `v` of the batch itself. Over calls with `n` numbers a channel
    the statistics become

        mean = sum(n m) / sum(n)
        variance = sum(n (v + m^2)) / sum(n) - mean^2

    the moments of all that a layer saw, and not an average that forgets. A layer that is not called
    keeps its own. Dropout is off.

    Args:
      model: any network with `nnx.BatchNorm` layers, or those of `flax.linen`, pruned or not;
        changed in place, its mode stays.
      batches: what the model takes, such as images of shape `(n, h, w, c)`, augmented as in
        training; some thousand examples in all. Batches of another shape are compiled for again.
        With a `call` trees of arrays, the examples along their first axes.
      call: a function of the model and a batch, where that is not `model(batch)`.

    Raises:
      ValueError: a network without BatchNorm layers; no batches, an empty one, or one that the
        model does not take; a `call` that is no function; a layer that sees NaN or infinity.
        Nothing is changed then.

    Example:
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5)
      >>> dhp.renew_statistics(small, [images[:256], images[256:512]])
      >>> dhp.renew_statistics(two, [(x, y)], call=lambda network, batch: network(*batch))

    Reference: Wu, Johnson, Rethinking "Batch" in BatchNorm, 2021 (arXiv 2105.07576), section 3.
    """
    norms = _norms(model)
    if not norms:
        raise ValueError(
            f"model: expected a network with BatchNorm layers, got {type(model).__name__}"
        )
    if call is not None and not callable(call):
        raise ArgumentError("call", "a function of the model and a batch, or None", shown(call))
    graphdef, state = nnx.split(_measuring(model))

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def of_batch(state: nnx.State, batch: Any) -> dict[str, tuple[Array, Array, Array]]:
        network = nnx.merge(graphdef, state, copy=True)
        network(batch) if call is None else call(network, batch)
        found = _norms(network).items()
        return {path: (norm.seen[...], norm.mean[...], norm.var[...]) for path, norm in found}

    sums = {path: np.zeros((3, *norm.mean.shape)) for path, norm in norms.items()}
    for batch in each_batch(batches):
        if call is None and not hasattr(batch, "shape"):
            other = "or a call that takes others"
            raise ArgumentError("batches", f"arrays, without labels, {other}", shown(batch))
        try:
            found = of_batch(state, batch)
        except (TypeError, ValueError) as error:
            shapes = ", ".join(str(np.shape(x)) for x in jax.tree.leaves(batch))
            detail = f"the model does not take {shapes}: {failure(error)}"
            raise ArgumentError("batches", detail=detail) from error
        for path, moments in found.items():
            n, mean, variance = (np.asarray(moment, np.float64) for moment in moments)
            sums[path] += n, n * mean, n * (variance + mean**2)
    for path, (_, first, second) in sums.items():
        if not np.isfinite(first + second).all():
            raise ValueError(f"batches: expected finite numbers; {path!r} sees NaN or infinity")
    for path, norm in norms.items():
        n, first, second = sums[path]
        if n.all():  # others are not called
            variance = np.maximum(second / n - (first / n) ** 2, 0)
            norm.mean.set_value(jnp.asarray(first / n, norm.mean[...].dtype))
            norm.var.set_value(jnp.asarray(variance, norm.var[...].dtype))


def has_batch_norm(model: nnx.Module) -> bool:
    """Whether a network has BatchNorm layers, of `flax.nnx` or of `flax.linen`."""
    return bool(_norms(model))


def _norms(model: nnx.Module) -> dict[str, Any]:
    """What holds the mean and variance of each BatchNorm, by its path."""
    found = {path: layer for path, _, layer in walk(model) if isinstance(layer, nnx.BatchNorm)}
    for path, _, network in walk(model):
        if isinstance(network, FromLinen):
            for inner, layer in network.batch_norms().items():
                found[".".join([path, *inner] if path else inner)] = layer
    return found


def _measuring(model: nnx.Module) -> nnx.Module:
    """A copy in evaluation mode whose BatchNorms store the statistics of what they have seen."""
    copy = nnx.clone(model)
    copy.eval()
    for norm in _norms(copy).values():
        for name in ("mean", "var", "seen"):
            setattr(norm, name, nnx.BatchStat(jnp.zeros(norm.mean.shape)))
        if isinstance(norm, nnx.BatchNorm):
            norm.momentum, norm.axis_name = 0.0, None  # here is one device, and the whole batch
            norm.use_fast_variance = False  # E[x^2] - E[x]^2 is wrong where the mean is large
            override(norm, __call__=_measure)
    for _, _, network in walk(copy):
        if isinstance(network, FromLinen):
            override(network, __call__=_measure_linen)
    return copy


def _measure(call: Any, norm: nnx.BatchNorm, x: Array, *_: Any, **options: Any) -> Array:
    """Normalises with the statistics of a batch, and adds them to those of the calls before."""
    before = norm.seen[...], norm.mean[...], norm.var[...]
    output = call(norm, x, **options | {"use_running_average": False})
    numbers, _ = _numbers(x, norm.axis, options.get("mask"))
    _add(norm, before, numbers, norm.mean[...], norm.var[...])
    return output


def _measure_linen(call: Any, network: FromLinen, *args: Any, **options: Any) -> Any:
    """The same for the BatchNorms of `flax.linen` in a network."""
    norms = network.batch_norms()

    def measured(method: Any, given: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not isinstance(module, linen.BatchNorm) or module.path not in norms:
            return method(*given, **kwargs)
        x, norm = given[0], norms[module.path]
        mask = kwargs.get("mask")
        numbers, others = _numbers(x, module.axis, mask)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, variance = wide.mean(others, where=mask), wide.var(others, where=mask)
        _add(norm, (norm.seen[...], norm.mean[...], norm.var[...]), numbers, mean, variance)
        variables = {**module.variables, "batch_stats": {"mean": mean, "var": variance}}
        alone = module.clone(parent=None, name=None, use_running_average=None)
        return alone.apply(variables, x, **kwargs | {"use_running_average": True})

    with linen.intercept_methods(measured):
        return call(network, *args, **options)


def _numbers(x: Array, axis: Any, mask: Array | None) -> tuple[Array, tuple[int, ...]]:
    """How many numbers each channel has, without those that are masked; and all other axes."""
    kept = {k % x.ndim for k in np.atleast_1d(axis).tolist()}
    others = tuple(k for k in range(x.ndim) if k not in kept)
    return jnp.broadcast_to(True if mask is None else mask, x.shape).sum(others), others


def _add(norm: Any, before: tuple[Array, ...], n: Array, mean: Array, variance: Array) -> None:
    """Stores the moments of all that was seen: before, and `n` numbers of these moments."""
    share, apart = n / (before[0] + n), mean - before[1]
    norm.seen[...] = before[0] + n
    norm.mean[...] = before[1] + share * apart
    norm.var[...] = before[2] + share * (variance - before[2] + (1 - share) * apart**2)
