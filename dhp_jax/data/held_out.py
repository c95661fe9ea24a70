"""Training examples that are held out for validation."""

from jaxtyping import Int
import numpy as np

from dhp_jax.errors import FieldError

SEED = 0x76616C69  # of the choice, which is the same in all runs


def hold_out(
    count: int, share: float
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " validation"]]:
    """Numbers of the examples to train on, and of those to validate on, each in order.

    They are drawn without the seed of a run, so that runs compare. A larger share holds out what a
    smaller one does, and more. At least one is held out, unless the share is 0.

    Example:
      >>> train, validation = hold_out(10, 0.2)
      >>> len(train), len(validation)
      (8, 2)
    """
    held = max(1, round(share * count)) if share else 0
    if held >= count:
        raise FieldError(
            "data.validation",
            f"a share that leaves some of the {count} training examples to train on",
            share,
        )
    order = np.random.default_rng(SEED).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])
