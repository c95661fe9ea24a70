"""The images a run trains on, and how they are augmented and normalised."""

from dhp_jax.data.augmentation import augment, normalize
from dhp_jax.data.labelled.dataset import Source
from dhp_jax.data.labelled.registry import NAMES, load
from dhp_jax.data.stream import Stream, StreamError
from dhp_jax.errors import DataNotFoundError

__all__ = [
    "NAMES",
    "DataNotFoundError",
    "Source",
    "Stream",
    "StreamError",
    "augment",
    "load",
    "normalize",
]
