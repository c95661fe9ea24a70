"""Where the batches of a phase come from: the device, or other processes."""

import collections
from collections.abc import Iterator
import contextlib
import itertools
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax.backend.platform import steps_per_dispatch
from dhp_jax.data.stream import Stream, epoch_order
from dhp_jax.distributed.mesh import place, rows_here, spread
from dhp_jax.tasks.task import Data

AHEAD = 2  # dispatches, and batches of a stream, that the device is given before it needs them


class _Resident:
    """Examples that are on the device as a whole, and the order in which an epoch takes them."""

    def __init__(self, data, seed, examples, batch_size, mesh):
        self.data = jax.device_put(data) if mesh is None else place(mesh, data)
        self.seed, self.examples, self.mesh = seed, examples, mesh
        self.steps_per_epoch = examples // batch_size
        self.steps_at_once = steps_per_dispatch()
        self.checksum = _checksum(data)

    def reading(self, first: int, last: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def begin_epoch(self, epoch: int) -> None:
        self.order = place(self.mesh, jnp.asarray(epoch_order(self.seed, epoch, self.examples)))

    def of(self, first: int, last: int) -> tuple[Any, ...]:
        """What the compiled steps from `first` to before `last` are given."""
        inputs = self.data, self.order, first % self.steps_per_epoch
        return inputs if self.steps_at_once == 1 else (*inputs, last - first)

    def look_ahead(self) -> None:
        """Gets ready what later steps are given, while the device is at those before."""


class _Streamed:
    """Examples that other processes read, each batch in time for its step."""

    steps_at_once = 1

    def __init__(self, data: Stream, seed, examples, batch_size, mesh):
        self.data, self.seed, self.examples, self.mesh = data, seed, examples, mesh
        self.batch_size = batch_size
        self.checksum = data.checksum

    @contextlib.contextmanager
    def reading(self, first: int, last: int) -> Iterator[None]:
        rows = rows_here(self.mesh, self.batch_size)
        with self.data.training(
            self.seed,
            examples=self.examples,
            batch_size=self.batch_size,
            first=first,
            last=last,
            rows=rows,
        ) as batches:
            self.batches = (spread(self.mesh, batch, self.batch_size) for batch in batches)
            self.waiting = collections.deque(itertools.islice(self.batches, AHEAD))
            try:
                yield
            finally:
                del self.batches, self.waiting

    def begin_epoch(self, epoch: int) -> None:
        pass  # the stream goes on

    def of(self, first: int, last: int) -> tuple[Any, ...]:
        return (self.waiting.popleft(),)

    def look_ahead(self) -> None:
        self.waiting.extend(itertools.islice(self.batches, 1))


def _checksum(data: Data) -> int:
    """Tells training data from others."""
    checksum = 0
    for leaf in jax.tree.leaves(data):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), checksum)
    return checksum
