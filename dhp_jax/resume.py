"""Training states on disk: from one of them a phase goes on, and ends with the same bits."""

from collections.abc import Callable, Mapping
import json
import logging
import os
from pathlib import Path
import time
from typing import Any
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np
import orbax.checkpoint as ocp

from dhp_jax import durable

logger = logging.getLogger(__name__)

ARRAYS, NOTES = "arrays", "notes"
SHARE = 0.01  # of the time that training takes, at most, goes into checkpoints made at intervals


class CheckpointError(OSError):
    """A checkpoint that cannot be written; those before it are as they were."""


class Checkpoints:
    """The last training states of a phase, in a folder; each is there whole or not at all.

    They are written by Orbax while training goes on. Every array and the notes are kept with a
    checksum, so that a file that was cut short or damaged is noticed when it is read.

    Args:
      folder: made when the first one is saved.
      source: what the phase started from; states of another source are none of this phase.
      keep: how many are kept.
      seconds: between two of them, or more where writing one takes long: never more than a
        hundredth of the time goes into them. With 0 each follows the one before at once.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        source: str = "",
        keep: int = 3,
        seconds: float = 60.0,
    ):
        self.folder, self.source, self.seconds = Path(folder).absolute(), source, seconds
        self.options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager: ocp.CheckpointManager | None = None
        self._started: float | None = None  # when the save began that goes on
        self._cost = 0.0  # seconds that the last one took
        self._rested = time.monotonic()  # when the last one was whole

    def due(self) -> bool:
        """Whether it is time for the next one."""
        if self._started is not None:
            if self._open().is_saving_in_progress():
                return False
            self._finished()
        if not self.seconds:
            return True
        return time.monotonic() - self._rested >= max(self.seconds, self._cost / SHARE)

    def save(self, step: int, state: PyTree, notes: Mapping[str, Any], *, wait: bool) -> None:
        """Saves a state; returns when it is copied, or with `wait` when it is on disk.

        Args:
          step: its number; nothing is done if there is one of this number.
          state: of arrays; what happens to them afterwards is of no concern.
          notes: JSON values.
          wait: whether to return only when it is on disk.

        Raises:
          CheckpointError: this one, or the one before it, cannot be written.
          FloatingPointError: an array of the state has numbers that are not finite; nothing is saved.
        """
        arrays = {name: np.array(_bits(leaf)) for name, leaf in _named(state).items()}
        for name, array in arrays.items():
            if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all():
                raise FloatingPointError(f"array {name!r}")
        try:
            manager = self._open()
            manager.wait_until_finished()
            if step not in manager.all_steps():
                self._started = time.monotonic()
                manager.save(
                    step,
                    args=ocp.args.Composite(
                        **{
                            ARRAYS: ocp.args.StandardSave(_written(arrays)),
                            NOTES: ocp.args.JsonSave(self._sealed(notes, arrays)),
                        }
                    ),
                )
            if wait:
                manager.wait_until_finished()
                self._finished()
        except Exception as error:  # Orbax and TensorStore raise what they like on a full disk
            raise CheckpointError(
                f"checkpoints: cannot write step {step} to {self.folder}: {_line(error)}; "
                f"{self._last()}"
            ) from error

    def newest(self, like: Callable[[dict[str, Any]], PyTree]) -> tuple[PyTree, dict] | None:
        """The newest state that is whole, with its notes.

        One that is damaged is told of and set aside, under a name that ends with `.damaged`.

        Args:
          like: from notes to a state of the shapes, dtypes and structure that are expected.

        Returns:
          A state of NumPy arrays and its notes; `None` if there is no checkpoint of this source.
        """
        if not self.folder.is_dir():
            return None
        damaged = 0
        for step in self.steps():
            try:
                notes, sums = self._read_notes(step)
                if notes["source"] != self.source:
                    continue
                state = self._read_arrays(step, like(notes), sums)
            except Exception as error:  # whatever a damaged file may raise
                damaged += 1
                self._set_aside(step, _line(error))
            else:
                if damaged:
                    logger.warning("%s: going on from step %d", self.folder, step)
                return state, notes
        if damaged:
            logger.warning("%s: no checkpoint is whole; the phase starts anew", self.folder)
        return None

    def steps(self) -> list[int]:
        """Numbers of those on disk, the newest first."""
        manager = self._open()
        manager.reload()
        return sorted(manager.all_steps(), reverse=True)

    def close(self) -> None:
        """Waits until all is on disk.

        Raises:
          CheckpointError: the last one cannot be written.
        """
        if self._manager is None:
            return
        manager, self._manager = self._manager, None
        try:
            manager.wait_until_finished()
        except Exception as error:
            raise CheckpointError(
                f"checkpoints: cannot write to {self.folder}: {_line(error)}"
            ) from error
        finally:
            manager.close()

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=self.options)
        return self._manager

    def _finished(self) -> None:
        now = time.monotonic()
        if self._started is not None:
            self._cost = now - self._started
        self._started, self._rested = None, now

    def _last(self) -> str:
        try:
            steps = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())
        except OSError:
            steps = []
        return f"the last whole one is of step {steps[-1]}" if steps else "there is none yet"

    def _sealed(self, notes: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict:
        sums = {name: _sum(array) for name, array in arrays.items()}
        text = json.dumps({**notes, "source": self.source})
        return {"text": text, "sum": zlib.crc32(text.encode()), "sums": sums}

    def _read_notes(self, step: int) -> tuple[dict[str, Any], dict[str, int]]:
        args = ocp.args.Composite(**{NOTES: ocp.args.JsonRestore()})
        sealed = self._open().restore(step, args=args)[NOTES]
        if zlib.crc32(sealed["text"].encode()) != sealed["sum"]:
            raise ValueError("the notes have another checksum")
        return json.loads(sealed["text"]), sealed["sums"]

    def _read_arrays(self, step: int, like: PyTree, sums: Mapping[str, int]) -> PyTree:
        args = ocp.args.Composite(**{ARRAYS: ocp.args.StandardRestore()})
        arrays = self._open().restore(step, args=args)[ARRAYS]
        expected = _named(like)
        other = (_written(expected).keys() ^ arrays.keys()) | (expected.keys() ^ sums.keys())
        if other:
            raise ValueError(f"array {min(other)!r} is missing or unexpected")
        leaves = []
        for name, leaf in expected.items():
            wanted = jax.eval_shape(_bits, leaf)
            found = np.asarray(arrays.get(name, np.zeros(wanted.shape, wanted.dtype)))
            if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"array {name!r}: expected {wanted.dtype} of shape {wanted.shape}, "
                    f"got {found.dtype} of shape {found.shape}"
                )
            if _sum(found) != sums[name]:
                raise ValueError(f"array {name!r} has another checksum")
            leaves.append(jax.random.wrap_key_data(found) if found.dtype != leaf.dtype else found)
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _set_aside(self, step: int, reason: str) -> None:
        logger.warning("%s: the checkpoint of step %d is damaged: %s", self.folder, step, reason)
        path = self.folder / str(step)
        aside = self.folder / f"{step}.damaged"
        number = 1
        while aside.exists():
            number += 1
            aside = self.folder / f"{step}.{number}.damaged"
        path.rename(aside)
        durable.sync(self.folder)


def _named(state: PyTree) -> dict[str, Any]:
    """The arrays of a tree by their paths in it."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _written(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that Orbax takes: those that hold a number."""
    return {name: array for name, array in arrays.items() if array.size}


def _bits(array: jax.Array) -> jax.Array:
    """What is on disk of an array: of random keys their numbers, all else as it is."""
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(array) if is_key else array


def _sum(array: np.ndarray) -> int:
    """The checksum of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
