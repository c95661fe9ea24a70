"""Least and most shares of the entries of latents, by name or pattern."""

from collections.abc import Mapping
import fnmatch
import math
from numbers import Real

from flax import nnx
import numpy as np

from dhp_jax.budgets.counted import check_share, most_channels
from dhp_jax.core.latent import latents, latents_to_prune
from dhp_jax.core.plain import Model
from dhp_jax.errors import ArgumentError, shown

Limits = Mapping[str, float | tuple[float, float]]  # a least share, or a least and a most one
ROUNDING = 1e-9  # 0.1 * 30 is a little above 3


def with_limits(model: Model, keep: Limits) -> Model:
    """A network whose latents keep at least, or at most, some shares of their entries.

    Args:
      model: a network of latents; left as it was, and shares all arrays.
      keep: least shares in (0, 1], or pairs of a least share, which may be 0, and a most share, by
        name or pattern, as in file names; the last that fits counts. A least share above 0 takes
        the place of `min_channels`, even where it is smaller.
    """
    if not isinstance(keep, Mapping):
        raise ArgumentError("keep", "shares by latent, such as {'stem*': 0.5}", shown(keep))
    model = nnx.clone(model)
    prunable = {name: z for name, z in latents_to_prune(model).items() if z.prunable}
    for pattern, limit in keep.items():
        least, most = _shares(f"keep[{pattern!r}]", limit)
        fitting = [z for name, z in prunable.items() if fnmatch.fnmatchcase(name, pattern)]
        if not fitting:
            raise ArgumentError.unknown("keep", pattern, prunable)
        for z in fitting:
            highest = max(1, math.floor(most * z.size + ROUNDING))
            lowest = math.ceil(least * z.size - ROUNDING) or z.min_channels
            z.vector.set_metadata(min_channels=min(lowest, highest), max_channels=highest)
    return model


def keep_share(model: nnx.Module, share: float, entries: int = 1) -> nnx.Module:
    """Has every latent keep at least a share of its entries, in [0, 1], and so many; in place.

    `min_channels` of a latent becomes `share` times its size, rounded up, or `entries`, where that
    is larger. The model may be abstract; it is returned.
    """
    if share != 0:
        check_share("share", share)
    for z in latents(model).values():
        least = max(math.ceil(share * z.size - ROUNDING), min(entries, z.size))
        z.vector.set_metadata(min_channels=max(z.min_channels, least))
    return model


def check_limits(model: nnx.Module, masks: Mapping[str, np.ndarray]) -> None:
    """Raises unless survivors are as many as the latents of `with_limits` may keep."""
    for name, z in latents(model).items():
        left = int(masks[name].sum())
        if z.prunable and not z.min_channels <= left <= most_channels(z):
            raise ValueError(
                f"keep: expected {z.min_channels} to {most_channels(z)} entries of {name!r}, "
                f"got {left} from what by chooses"
            )


def _shares(name: str, limit: object) -> tuple[float, float]:
    """The least and the most share that a limit stands for."""
    if not isinstance(limit, tuple | list):
        check_share(name, limit)
        return limit, 1.0
    both = len(limit) == 2 and all(isinstance(x, Real) and type(x) is not bool for x in limit)
    if not both or not 0 <= limit[0] <= limit[1] <= 1 or limit[1] == 0:
        raise ArgumentError(name, "a least and a most share, 0 <= least <= most <= 1", shown(limit))
    return limit[0], limit[1]
