"""Training states on disk: from one of them a phase goes on, and ends with the same bits."""

from collections.abc import Callable, Mapping
import json
import logging
import os
from pathlib import Path
import shutil
from time import monotonic
from typing import Any
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np
import orbax.checkpoint as ocp

from dhp_jax import files

logger = logging.getLogger(__name__)


ARRAYS, NOTES = "arrays", "notes"


DAMAGED, REMOVED = ".damaged", ".removed"  # endings of folders that are no checkpoints


SHARE = 0.05  # of the time, at most, checkpoints made at intervals are written beside training


# What TensorStore says where a file could not be opened or read, but need not be damaged.
PASSING = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "PERMISSION_DENIED", "ABORTED", "open files")


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read; those before it are as they were."""


class UnlikeError(ValueError):
    """A checkpoint that is whole, but of another state than the one that is expected."""


class Checkpoints:
    """The last training states of a phase, in a folder; each is there whole or not at all.

    They are written by Orbax while training goes on: the bytes of all arrays as one, because it
    takes a millisecond for each, and the notes. All have checksums, so that a file that was cut
    short or damaged is noticed when it is read.

    Args:
      folder: made when the first one is saved.
      source: what the phase started from; states of another source are none of this phase.
      keep: how many are kept.
      seconds: between two of them, or more where writing one takes long: it takes a twentieth of
        the time at most, and training goes on meanwhile. With 0 each follows the one before.
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
        self._rested = monotonic()  # when the last one was whole
        self._step = 0  # of the last one

    def due(self) -> bool:
        """Whether it is time for the next one."""
        if self._started is not None:
            if self._open().is_saving_in_progress():
                return False
            self._finished()
        return monotonic() - self._rested >= self.interval

    @property
    def interval(self) -> float:
        """Seconds between two of them, by what the last one took."""
        return max(self.seconds, self._cost / SHARE) if self.seconds else 0.0

    def save(self, step: int, state: PyTree, notes: Mapping[str, Any], *, wait: bool) -> None:
        """Saves a state; returns when it is copied, or with `wait` when it is on disk.

        Args:
          step: its number; nothing is done if there is one of this number.
          state: of arrays; what happens to them afterwards is of no concern.
          notes: JSON values.
          wait: whether to return only when it is on disk.

        Raises:
          CheckpointError: this one, or the one before it, cannot be written.
          FloatingPointError: an array has numbers that are not finite; nothing is saved.
        """
        started = monotonic()
        packed, layout = _packed(state)
        sealed = _sealed({**notes, "source": self.source}, layout)
        try:
            manager = self._open()
            manager.wait_until_finished()
            self._finished()
            if step not in self.steps():
                self._started, self._step = started, step
                if shutil.disk_usage(self.folder).free < packed.size:
                    raise OSError(f"No space left on device for {packed.size:,} bytes")
                arrays = ocp.args.StandardSave({ARRAYS: packed})
                items = {ARRAYS: arrays, NOTES: ocp.args.JsonSave(sealed)}
                if not manager.save(step, args=ocp.args.Composite(**items)):
                    raise OSError("Orbax has left it out")
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

        One that is damaged is told of and set aside, under a name that ends with `.damaged`. Those
        of another source are removed: what they would go on from is no longer there.

        Args:
          like: from notes to a state of the shapes, dtypes and structure that are expected.

        Returns:
          A state of NumPy arrays and its notes; `None` if there is no checkpoint of this source.

        Raises:
          CheckpointError: none can be read, or none of several is whole; nothing is lost by trying
            again.
        """
        damaged = False
        for step in self.steps():
            try:
                notes, layout = self.notes(step)
                if notes["source"] != self.source:
                    self._remove(step)
                    continue
                state = _unpacked(self._read_arrays(step), layout, like(notes))
            except Exception as error:  # whatever a damaged file may raise
                if not _is_damage(error):
                    raise CheckpointError(
                        f"checkpoints: cannot go on from step {step} in {self.folder}: "
                        f"{_line(error)}"
                    ) from error
                damaged = True
                self._set_aside(step, _line(error))
            else:
                if damaged:
                    logger.warning("%s: going on from step %d", self.folder, step)
                return state, notes
        if any(self.folder.glob(f"*{DAMAGED}")):
            raise CheckpointError(
                f"checkpoints: none in {self.folder} is whole; delete the folder to start its "
                "phase anew"
            )
        return None

    def steps(self) -> list[int]:
        """Numbers of those on disk, the newest first."""
        names = [path.name for path in self.folder.glob("*")]  # unfinished ones have a suffix
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def notes(self, step: int) -> tuple[dict[str, Any], dict[str, list]]:
        """The notes of one, and of each array its dtype, shape and checksum."""
        args = ocp.args.Composite(**{NOTES: ocp.args.JsonRestore()})
        sealed = self._open().restore(step, args=args)[NOTES]
        if zlib.crc32(sealed["text"].encode()) != sealed["checksum"]:
            raise ValueError("the notes have another checksum")
        read = json.loads(sealed["text"])
        return read["notes"], read["layout"]

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
            self._finished()
        except Exception as error:
            raise CheckpointError(
                f"checkpoints: cannot write to {self.folder}: {_line(error)}"
            ) from error
        finally:
            manager.close()

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(f"*{REMOVED}"):
                shutil.rmtree(path)
            self._manager = ocp.CheckpointManager(self.folder, options=self.options)
        return self._manager

    def _finished(self) -> None:
        """Notes that the last one is whole, and waits until the disk has all of it."""
        if self._started is None:
            return
        for path in [*(self.folder / str(self._step)).rglob("*"), self.folder]:
            files.sync(path)  # Orbax does so for the arrays only
        self._rested = monotonic()
        self._cost, self._started = self._rested - self._started, None

    def _last(self) -> str:
        steps = self.steps()
        return f"the last whole one is of step {steps[0]}" if steps else "there is none yet"

    def _read_arrays(self, step: int) -> np.ndarray:
        args = ocp.args.Composite(**{ARRAYS: ocp.args.StandardRestore()})
        return self._open().restore(step, args=args)[ARRAYS][ARRAYS]

    def _remove(self, step: int) -> None:
        """Removes one of another source, and what was set aside with it."""
        removed = self.folder / f"{step}{REMOVED}"
        (self.folder / str(step)).rename(removed)  # at once: half of one would pass for damaged
        files.sync(self.folder)
        for path in [removed, *self.folder.glob(f"*{DAMAGED}")]:
            shutil.rmtree(path)
        self._open().reload()

    def _set_aside(self, step: int, reason: str) -> None:
        logger.warning("%s: the checkpoint of step %d is damaged: %s", self.folder, step, reason)
        path = self.folder / str(step)
        aside = self.folder / f"{step}{DAMAGED}"
        number = 1
        while aside.exists():
            number += 1
            aside = self.folder / f"{step}.{number}{DAMAGED}"
        path.rename(aside)
        files.sync(self.folder)
        self._open().reload()


def _sealed(notes: Mapping[str, Any], layout: Mapping[str, list]) -> dict[str, Any]:
    text = json.dumps({"notes": notes, "layout": layout})
    return {"text": text, "checksum": zlib.crc32(text.encode())}


def _packed(state: PyTree) -> tuple[np.ndarray, dict[str, list]]:
    """The bytes of all arrays, and of each in turn its dtype, shape and checksum.

    Raises:
      FloatingPointError: an array has numbers that are not finite.
    """
    arrays = jax.device_get({name: _bits(leaf) for name, leaf in _named(state).items()})
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
    """The tree that was packed, if its structure, shapes and dtypes are those of `like`."""
    expected = _named(like)
    if other := expected.keys() ^ layout.keys():
        raise UnlikeError(f"array {min(other)!r} is missing or unexpected")
    leaves, at = {}, 0
    for name, (dtype, shape, checksum) in layout.items():
        wanted = jax.eval_shape(_bits, expected[name])
        if (dtype, tuple(shape)) != (str(wanted.dtype), wanted.shape):
            raise UnlikeError(
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


def _is_damage(error: Exception) -> bool:
    """Whether an error means that a file is not whole, and not that it cannot be read now."""
    if isinstance(error, UnlikeError | MemoryError):
        return False
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError)
    return not any(word in str(error) for word in PASSING)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
