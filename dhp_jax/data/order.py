"""The order in which training goes through its examples."""

from collections.abc import Sequence

from jaxtyping import Int
import numpy as np


def epoch_order(seed: Sequence[int], epoch: int, examples: int) -> Int[np.ndarray, " examples"]:
    """The permutation of the examples that an epoch goes through.

    NumPy draws it, so that a process that only reads images need not start JAX.

    Args:
      seed: numbers from 0 to 2^32 - 1.
      epoch: its number, from 1.
      examples: how many there are.

    Example:
      >>> sorted(epoch_order((0,), 1, 5))
      [0, 1, 2, 3, 4]
    """
    return np.random.default_rng((*seed, epoch)).permutation(examples).astype(np.int32)
