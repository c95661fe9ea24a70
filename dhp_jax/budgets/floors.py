"""A least share of each latent, which pruning keeps."""

import math

from flax import nnx

from dhp_jax.budgets.counted import check_share
from dhp_jax.core.latent import latents


def keep_share(model: nnx.Module, share: float) -> nnx.Module:
    """Has every latent keep at least a share of its entries.

    Args:
      model: a network of latents, changed in place; may be abstract. `min_channels` of a latent
        becomes `share` times its size, rounded up, where that is larger.
      share: in [0, 1]; 0 changes nothing.

    Returns:
      The same object.

    Raises:
      ValueError: a share outside [0, 1].
    """
    if share != 0:
        check_share("share", share)
    for z in latents(model).values():
        least = math.ceil(share * z.size - 1e-9)  # 0.1 * 30 is a little above 3
        z.vector.set_metadata(min_channels=max(z.min_channels, least))
    return model
