"""Where the batches of a phase come from: data on the device, or processes that read them."""

import collections
from collections.abc import Iterator
import contextlib
import itertools
from typing import Any
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key
import numpy as np

from dhp_jax.backend import platform
from dhp_jax.data.stream import Stream, epoch_order
from dhp_jax.distributed.mesh import local_rows, place, put_batch
from dhp_jax.tasks.task import Data, Task
from dhp_jax.train.step import Step, many, on_resident_data, on_streamed_data, stop_at_budget

BATCHES_AHEAD = 2  # of a stream, that are on the device before it needs them


def make_inputs(
    data: Data,
    key: Key[Array, ""],
    *,
    examples: int,
    batch_size: int,
    mesh: Mesh | None = None,
) -> "Resident | Streamed":
    """The batches of a phase, `examples` of which make an epoch.

    The order of examples and every step's key follow from the phase's `key`.
    """
    order_key, step_key = jax.random.split(key)
    seed = np.ravel(jax.random.key_data(order_key)).tolist()
    kind = Streamed if isinstance(data, Stream) else Resident
    return kind(data, seed, place(mesh, step_key), examples, batch_size, mesh)


class Resident:
    """Data that are on the device as a whole, and the order in which an epoch takes them.

    One call of the compiled step takes up to `steps_per_call` training steps. `checksum` is of the
    training data.
    """

    def __init__(self, data, seed, key, examples, batch_size, mesh):
        self.data = jax.device_put(data) if mesh is None else place(mesh, data)
        self.seed, self.key, self.mesh = seed, key, mesh
        self.examples, self.batch_size = examples, batch_size
        self.steps_per_call = platform.steps_per_dispatch()
        self.checksum = _checksum(data)

    def feed(self, step: Step, task: Task, *, stops: bool) -> Step:
        """The step of `make_step` as one that takes a state and what `take` returns.

        With `stops`, calls after the one that meets the budget change nothing.
        """
        step = on_resident_data(step, task, self.batch_size, self.mesh)
        if self.steps_per_call > 1:
            return many(step)
        return stop_at_budget(step) if stops else step

    def reading(self, first: int, last: int) -> contextlib.AbstractContextManager[None]:
        """While this context is open, the steps from `first` to before `last` can be taken."""
        return contextlib.nullcontext()

    def begin_epoch(self, epoch: int) -> None:
        """Puts the order of an epoch's examples on the device."""
        self.order = place(self.mesh, jnp.asarray(epoch_order(self.seed, epoch, self.examples)))

    def take(self, first: int, last: int) -> tuple[Any, ...]:
        """What the compiled step takes after its arrays, for steps `first` to before `last`."""
        inputs = self.data, self.order, first % (self.examples // self.batch_size)
        return (*inputs, *[last - first] * (self.steps_per_call > 1), self.key)

    def fetch_next(self) -> None:
        """Gets the inputs of a later step ready while the device works; resident data are ready."""


class Streamed:
    """Data that other processes read, each batch in time for its step; see `Resident`."""

    steps_per_call = 1

    def __init__(self, data: Stream, seed, key, examples, batch_size, mesh):
        self.data, self.seed, self.key, self.mesh = data, seed, key, mesh
        self.examples, self.batch_size = examples, batch_size
        self.checksum = data.checksum

    def feed(self, step: Step, task: Task, *, stops: bool) -> Step:
        step = on_streamed_data(step)
        return stop_at_budget(step) if stops else step

    @contextlib.contextmanager
    def reading(self, first: int, last: int) -> Iterator[None]:
        with self.data.training(
            self.seed,
            examples=self.examples,
            batch_size=self.batch_size,
            first=first,
            last=last,
            rows=local_rows(self.mesh, self.batch_size),
        ) as batches:
            self.batches = (put_batch(self.mesh, batch, self.batch_size) for batch in batches)
            self.waiting = collections.deque(itertools.islice(self.batches, BATCHES_AHEAD))
            try:
                yield
            finally:
                del self.batches, self.waiting

    def begin_epoch(self, epoch: int) -> None:
        pass  # the stream goes on

    def take(self, first: int, last: int) -> tuple[Any, ...]:
        return self.waiting.popleft(), self.key

    def fetch_next(self) -> None:
        self.waiting.extend(itertools.islice(self.batches, 1))


def _checksum(data: Data) -> int:
    """Tells training data from others."""
    checksum = 0
    for leaf in jax.tree.leaves(data):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), checksum)
    return checksum
