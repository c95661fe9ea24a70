"""Streams of examples that processes read through Grain while training runs.

Which examples make a batch, and what is drawn for them, follows from the seed and the number of the
step alone: not from how many processes read, and not from where a run was stopped.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
from dataclasses import dataclass
import functools
import gc
import multiprocessing
import os
import signal
import threading
from typing import Any, Protocol

from absl import flags
from jaxtyping import Int
import numpy as np

from dhp_jax.errors import DataNotFoundError


def epoch_order(seed: Sequence[int], epoch: int, examples: int) -> Int[np.ndarray, " examples"]:
    """The order of the examples in an epoch, counted from 1.

    NumPy draws it, so that a process that only reads images need not start JAX. The seed is of
    numbers from 0 to 2^32 - 1.

    Example:
      >>> sorted(epoch_order((0,), 1, 5))
      [0, 1, 2, 3, 4]
    """
    return np.random.default_rng((*seed, epoch)).permutation(examples).astype(np.int32)


BATCHES_AHEAD = 1  # batches that wait at each stage between a process and its reader
DRAWS = 2**32 - 1  # tells the numbers drawn for a batch from those for the order of an epoch
Batch = tuple[Any, ...]  # of NumPy arrays


class StreamError(RuntimeError):
    """Raised when examples can no longer be read, as when a reading process has died."""


class Read(Protocol):
    """A function that reads part of a batch; it must be picklable, for other processes call it.

    Args:
      chosen: numbers of the examples of the whole batch.
      rows: which of them to read, and in which order: positions in `chosen`.
      random: draws for the whole batch, whatever the rows.
    """

    def __call__(
        self,
        chosen: Int[np.ndarray, " n"],
        rows: Int[np.ndarray, " rows"],
        random: np.random.Generator,
    ) -> Batch: ...


@dataclass(frozen=True, eq=False)
class Stream:
    """Examples that are read when they are needed.

    Attributes:
      size: how many there are.
      read: reads some.
      checksum: tells them from others.
      workers: how many processes read; 0 for threads of this one.
    """

    size: int
    read: Read
    checksum: int
    workers: int

    def training(
        self,
        seed: Sequence[int],
        *,
        examples: int,
        batch_size: int,
        first: int,
        last: int,
        rows: Int[np.ndarray, " rows"] | None = None,
    ) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """The batches of some steps of training, each epoch in an order of its own.

        Args:
          seed: of orders and draws.
          examples, batch_size: in an epoch, and in a step.
          first, last: numbers of the steps, from 0; `last` is not read any more.
          rows: positions in each batch of the examples that are wanted; all if not given.
        """
        rows = np.arange(batch_size) if rows is None else rows
        batches = _Training(self.read, tuple(seed), examples, batch_size, rows)
        return _reading(batches, range(first, last), self.workers)

    def in_order(
        self, batch_size: int
    ) -> contextlib.AbstractContextManager[Iterator[tuple[Batch, int]]]:
        """All examples as they are stored, and how many of each batch count.

        The last batch is filled up with its last example.
        """
        batches = _InOrder(self.read, self.size, batch_size)
        return _reading(batches, range(-(-self.size // batch_size)), self.workers)


@dataclass(frozen=True, eq=False)
class _Training:
    """The batch of a step."""

    read: Read
    seed: tuple[int, ...]
    examples: int
    batch_size: int
    rows: Int[np.ndarray, " rows"]

    def __call__(self, step: int) -> Batch:
        epoch, position = divmod(step, self.examples // self.batch_size)
        order = _order(self.seed, epoch + 1, self.examples)
        chosen = order[position * self.batch_size :][: self.batch_size]
        return self.read(chosen, self.rows, np.random.default_rng((*self.seed, DRAWS, step)))


@dataclass(frozen=True)
class _InOrder:
    """A batch of the examples as they are stored, and how many of it count."""

    read: Read
    size: int
    batch_size: int

    def __call__(self, number: int) -> tuple[Batch, int]:
        start = number * self.batch_size
        chosen = np.minimum(np.arange(start, start + self.batch_size), self.size - 1)
        batch = self.read(chosen, np.arange(self.batch_size), np.random.default_rng(0))
        return batch, min(self.batch_size, self.size - start)


_order = functools.lru_cache(maxsize=2)(epoch_order)


@contextlib.contextmanager
def _reading(make: Callable[[int], Any], numbers: range, workers: int) -> Iterator[Iterator[Any]]:
    """Iterates over `make(number)` in order; the results are computed ahead of their use."""
    import grain  # here, because it is slow and what fits on the device does without

    grain.config.update("py_traceback_filtering", "off")  # it adds lines to what errors say
    # An element is a whole batch, so that batches do not depend on the number of processes.
    batches = grain.MapDataset.range(numbers.start, numbers.stop).map(make)
    threads = 1 if workers else max(2, os.cpu_count() or 1)
    buffer = BATCHES_AHEAD if workers else threads
    batches = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    )
    if workers:
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=BATCHES_AHEAD)
        batches = batches.mp_prefetch(options, worker_init_fn=_attach)
    with _parsed_flags():
        iterator = iter(batches)
        try:
            yield _told(iterator, workers)
        finally:
            iterator.close()
            del iterator
            gc.collect()  # Grain leaves its last batch, which is shared memory, in a cycle


@contextlib.contextmanager
def _parsed_flags() -> Iterator[None]:
    """Lets Grain read its flags in a program that has not parsed any."""
    parsed = flags.FLAGS.is_parsed()
    if not parsed:
        flags.FLAGS.mark_as_parsed()
    try:
        yield
    finally:
        if not parsed:
            flags.FLAGS.unparse_flags()


def _told(batches: Iterator[Any], workers: int) -> Iterator[Any]:
    """Yields batches; an error of reading becomes a `StreamError` of one line."""
    try:
        yield from batches
    except DataNotFoundError:
        raise
    except Exception as error:  # whatever reading may raise
        if "terminated unexpectedly" in str(error):
            raise StreamError(
                f"data: one of {workers} processes that read examples has died, perhaps for lack "
                f"of memory ({error}); config.data.workers takes fewer"
            ) from error
        raise StreamError(f"data: cannot read examples: {error!r}") from error


def _attach(worker: int, workers: int) -> None:
    """Makes a reading process ignore signals and end with the process that started it."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
