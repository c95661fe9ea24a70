"""The images a run trains on, and how they are augmented and normalised."""

from dhp_jax.data.augment import augment, normalize
from dhp_jax.data.source import DataNotFoundError, Source
from dhp_jax.data.sources import NAMES, load
from dhp_jax.data.stream import Stream, StreamError

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
