"""Training states on disk: from one of them a phase goes on, and ends with the same bits."""

from collections.abc import Callable, Mapping
import json
import logging
import os
from pathlib import Path
import shutil
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

    They are written by Orbax while training goes on: the bytes of all arrays as one, because it
    takes a millisecond for each, and the notes. All have checksums, so that a file that was cut
    short or damaged is noticed when it is read.

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
            max_to_keep=keep,
            create=False,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            # Of several processes the first alone comes here.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}
            ),
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
        packed, layout = _packed(state)
        try:
            manager = self._open()
            manager.wait_until_finished()
            if step not in manager.all_steps():
                self._started = time.monotonic()
                if shutil.disk_usage(self.folder).free < packed.size:
                    raise OSError(f"No space left on device for {packed.size:,} bytes")
                arrays = ocp.args.StandardSave({ARRAYS: packed})
                sealed = ocp.args.JsonSave(_sealed({**notes, "source": self.source}, layout))
                manager.save(step, args=ocp.args.Composite(**{ARRAYS: arrays, NOTES: sealed}))
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
                notes, layout = self._read_notes(step)
                if notes["source"] != self.source:
                    continue
                state = _unpacked(self._read_arrays(step), layout, like(notes))
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

    def _read_notes(self, step: int) -> tuple[dict[str, Any], dict[str, list]]:
        args = ocp.args.Composite(**{NOTES: ocp.args.JsonRestore()})
        sealed = self._open().restore(step, args=args)[NOTES]
        if zlib.crc32(sealed["text"].encode()) != sealed["checksum"]:
            raise ValueError("the notes have another checksum")
        read = json.loads(sealed["text"])
        return read["notes"], read["layout"]

    def _read_arrays(self, step: int) -> np.ndarray:
        args = ocp.args.Composite(**{ARRAYS: ocp.args.StandardRestore()})
        return self._open().restore(step, args=args)[ARRAYS][ARRAYS]

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


def _sealed(notes: Mapping[str, Any], layout: Mapping[str, list]) -> dict[str, Any]:
    text = json.dumps({"notes": notes, "layout": layout})
    return {"text": text, "checksum": zlib.crc32(text.encode())}


def _packed(state: PyTree) -> tuple[np.ndarray, dict[str, list]]:
    """The bytes of all arrays, and of each in turn its dtype, shape and checksum.

    Raises:
      FloatingPointError: an array has numbers that are not finite.
    """
    arrays = {name: np.asarray(_bits(leaf)) for name, leaf in _named(state).items()}
    packed = np.empty(1 + sum(array.nbytes for array in arrays.values()), np.uint8)
    packed[-1], at, layout = 0, 0, {}  # the last because Orbax takes no empty array
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all():
            raise FloatingPointError(f"array {name!r}")
        piece = packed[at : at + array.nbytes]
        piece[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        layout[name] = [str(array.dtype), array.shape, zlib.crc32(piece)]
        at += array.nbytes
    return packed, layout


def _unpacked(packed: np.ndarray, layout: Mapping[str, list], like: PyTree) -> PyTree:
    """The tree of arrays that was packed, if it is of the structure, shapes and dtypes of `like`."""
    expected = _named(like)
    if other := expected.keys() ^ layout.keys():
        raise ValueError(f"array {min(other)!r} is missing or unexpected")
    leaves, at = {}, 0
    for name, (dtype, shape, checksum) in layout.items():
        wanted = jax.eval_shape(_bits, expected[name])
        if (dtype, tuple(shape)) != (str(wanted.dtype), wanted.shape):
            raise ValueError(
                f"array {name!r}: expected {wanted.dtype} of shape {wanted.shape}, "
                f"got {dtype} of shape {tuple(shape)}"
            )
        piece = packed[at : at + wanted.size * wanted.dtype.itemsize]
        if zlib.crc32(piece) != checksum:
            raise ValueError(f"array {name!r} has another checksum")
        array = piece.copy().view(wanted.dtype).reshape(wanted.shape)
        is_key = expected[name].dtype != wanted.dtype
        leaves[name] = jax.random.wrap_key_data(array) if is_key else array
        at += piece.size
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in expected])


def _named(state: PyTree) -> dict[str, Any]:
    """The arrays of a tree by their paths in it."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _bits(array: jax.Array) -> jax.Array:
    """What is on disk of an array: of random keys their numbers, all else as it is."""
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(array) if is_key else array


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
