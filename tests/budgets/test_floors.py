"""The least share of each latent."""

from flax import nnx
import pytest

import dhp_jax as dhp
from dhp_jax.budgets.floors import keep_share


@pytest.mark.parametrize(
    ("share", "sizes", "floors"),
    [
        (0.0, (30, 8, 3), (4, 4, 3)),
        (0.1, (30, 80, 3), (4, 8, 3)),
        (0.1, (50, 30, 41), (5, 4, 5)),
        (0.5, (7, 8, 9), (4, 4, 5)),
        (1.0, (7, 8, 9), (7, 8, 9)),
    ],
)
def test_a_latent_keeps_its_share_rounded_up_and_no_less_than_before(share, sizes, floors):
    model = nnx.List([dhp.Latent(size, rngs=nnx.Rngs(0)) for size in sizes])
    assert keep_share(model, share) is model
    assert tuple(z.min_channels for z in model) == floors


@pytest.mark.parametrize("share", [-0.1, 1.1, "0.5", True])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match=r"^share: expected a share in"):
        keep_share(nnx.List([dhp.Latent(8, rngs=nnx.Rngs(0))]), share)
