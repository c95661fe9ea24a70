"""Least shares of the entries of latents, by name or pattern."""

from collections.abc import Mapping
import fnmatch
import math

from flax import nnx

from dhp_jax.budgets.counted import check_share
from dhp_jax.core.latent import latents_to_prune
from dhp_jax.errors import ArgumentError


def with_least(model: nnx.Module, keep: Mapping[str, float]) -> nnx.Module:
    """A network whose latents keep at least some shares of their entries.

    Args:
      model: a network of latents; left as it was, and shares all arrays.
      keep: shares in (0, 1] by name or pattern, as in file names; the last that fits counts.

    Raises:
      ValueError: a share that is none, or a pattern that fits no prunable latent.
    """
    model = nnx.clone(model)
    prunable = {name: z for name, z in latents_to_prune(model).items() if z.prunable}
    for pattern, share in keep.items():
        check_share(f"keep[{pattern!r}]", share)
        fitting = [z for name, z in prunable.items() if fnmatch.fnmatchcase(name, pattern)]
        if not fitting:
            raise ArgumentError.unknown("keep", pattern, prunable)
        for z in fitting:
            least = max(1, math.ceil(share * z.size - 1e-9))
            z.vector.set_metadata(min_channels=least)
    return model
