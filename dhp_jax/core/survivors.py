"""Which entries of latents survive a threshold; counts that work inside jit."""

from collections import defaultdict
from collections.abc import Mapping
from numbers import Real
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from dhp_jax.core.latent import has_gates, latents

Masks = Mapping[str, np.ndarray]


def survivor_mask(
    vector: Float[Array, " size"], threshold: float, min_channels: int
) -> Bool[Array, " size"]:
    """The entries with `|z| >= threshold`, and the `min_channels` largest; usable in jit.

    Of equal ones, as those that the proximal step has made zero, the first are the larger.
    """
    magnitude = jnp.abs(vector)
    _, largest = jax.lax.top_k(magnitude, min(min_channels, vector.size))
    return (magnitude >= threshold).at[largest].set(True)


def survivors(model: nnx.Module, threshold: float = 5e-3) -> dict[str, np.ndarray]:
    """The channels that survive a threshold.

    Args:
      model: a network of latents.
      threshold: entries of smaller magnitude go, except that every latent keeps its
        `min_channels` largest (the first of those that are equal); latents that are not prunable
        keep everything.

    Returns:
      A boolean mask for each latent by name (see `dhp.latents`). Warns of gates on their way from 1
      to 0, as of a `fade_to_budget` that has not ended: what survives may exceed the budget.

    Raises:
      ValueError: a threshold that is no number of at least 0; a latent that is not finite.

    Example:
      >>> {name: int(mask.sum()) for name, mask in dhp.survivors(model, threshold=5e-3).items()}

    Reference: DHP (arXiv 2003.13683), section 3.3.
    """
    if not isinstance(threshold, Real | np.ndarray | jax.Array) or not threshold >= 0:
        raise ValueError(f"threshold: expected a number >= 0, got {threshold!r}")
    for name, z in latents(model).items():
        if not np.isfinite(z.value()).all():
            raise ValueError(f"model: expected finite latents, got NaN or infinity in {name!r}")
    if has_gates(model):
        _warn_of_unfinished(model, threshold)
    return {
        name: np.asarray(survivor_mask(z.value(), threshold, z.min_channels))
        if z.prunable
        else np.ones(z.size, bool)
        for name, z in latents(model).items()
    }


def _warn_of_unfinished(model: nnx.Module, threshold: float) -> None:
    """Warns of gates that survive below others that are alike, as on their way to zero."""
    gates = np.concatenate([[], *(z.value() for z in latents(model).values() if z.prunable)])
    stay = np.isclose(gates, most := gates.max(initial=0))
    between = int(np.sum(~stay & (gates >= threshold)))
    is_fade = np.isclose(most, 1) or stay.sum() > between  # and no gates that are trained
    if between and is_fade and (gates >= 0).all():
        warnings.warn(
            f"survivors: {between} of {gates.size} gates are neither 1 nor below the threshold: a "
            "search that has not ended, or means of parameters; what survives may exceed a budget",
            stacklevel=3,
        )


def survivor_counts(model: nnx.Module, threshold: float) -> dict[str, Array]:
    """The number of entries of each latent that survive a threshold; usable in jit.

    Latents that are alike are counted together, which is one small piece of work for an accelerator
    and not one for each.
    """
    named = latents(model)
    counts: dict[str, Array | int] = {name: z.size for name, z in named.items()}
    alike = defaultdict(dict)
    for name, z in named.items():
        if z.prunable:
            alike[z.size, z.min_channels][name] = z.value()
    for (size, min_channels), vectors in alike.items():
        reach_it = jnp.abs(jnp.stack(list(vectors.values()))) >= threshold
        kept = jnp.maximum(jnp.sum(reach_it, axis=1), min(min_channels, size))
        counts |= dict(zip(vectors, kept, strict=True))
    return counts
