"""Batches that a caller gives to a function of the library."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from dhp_jax.errors import ArgumentError, shown


def each_batch(batches: Iterable[Any]) -> Iterator[Any]:
    """Several batches, one after another.

    Raises:
      ValueError: one batch in place of several, none, or one without examples.
    """
    if hasattr(batches, "shape"):
        raise ArgumentError("batches", "several, such as [x]", f"shape {batches.shape}")
    if isinstance(batches, Mapping | str) or not hasattr(type(batches), "__iter__"):
        raise ArgumentError("batches", "several, such as [batch]", f"a {type(batches).__name__}")
    if isinstance(batches, tuple | list) and all(hasattr(x, "shape") for x in batches):
        shapes = [tuple(x.shape) for x in batches]
        if len(set(map(len, shapes))) > 1:  # images and labels
            found = f"arrays of shapes {', '.join(map(str, shapes))}"
            raise ArgumentError("batches", "several alike, such as [(x, y)]", found)
    batch = None
    for batch in batches:
        if not all(getattr(x, "size", 1) for x in jax.tree.leaves(batch)):
            raise ArgumentError("batches", "at least one example in each", shown(batch))
        yield batch
    if batch is None:
        raise ValueError("batches: expected at least one batch, got none")
