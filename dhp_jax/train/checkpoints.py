"""Checkpoints: training states on disk, from which a phase goes on and ends with the same bits."""

from collections.abc import Callable, Mapping
import itertools
import json
import logging
import os
from pathlib import Path
import shutil
from time import monotonic
from typing import TYPE_CHECKING, Any
import zlib

from jaxtyping import PyTree

from dhp_jax import files
from dhp_jax.train.packing import UnlikeError, pack, unpack

if TYPE_CHECKING:  # what uses it imports it: it takes long, and a refusal does not need it
    import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)
ARRAYS, NOTES = "arrays", "notes"
DAMAGED, REMOVED = ".damaged", ".removed"  # endings of folders that are no checkpoints
WRITING_SHARE = 0.05  # of the time of training, at most, that checkpoints are being written

# Words of TensorStore's errors for a file that cannot be read at this moment. Its errors have no
# attribute that says so.
TEMPORARY = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "PERMISSION_DENIED", "ABORTED", "open files")


class CheckpointError(OSError):
    """A checkpoint cannot be written or read; those before it are as they were."""


class Checkpoints:
    """The last training states of a phase, in a folder.

    Orbax writes them while training goes on: the bytes of all arrays as one array, and notes. A
    checkpoint appears when it is complete. All of it has checksums, so that a file that was cut
    short or damaged is noticed when it is read.

    Args:
      folder: made when the first checkpoint is saved.
      source: what the phase started from; checkpoints of another source are none of this phase.
      keep: how many checkpoints are kept.
      seconds: between two of them. It is longer where writing takes long, so that checkpoints are
        being written for a twentieth of the time at most. With 0 each follows the one before.
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
        self.keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._started: float | None = None  # when the save began that is going on
        self._cost = 0.0  # seconds that the last save took
        self._rested = monotonic()  # when the last save ended
        self._step = 0  # of the last save

    def due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        if self._started is not None:
            if self._open().is_saving_in_progress():
                return False
            self._finish()  # an error of writing is raised by the next `save`
        return monotonic() - self._rested >= self.interval

    @property
    def interval(self) -> float:
        """Seconds between two checkpoints, which follow from how long the last one took."""
        return max(self.seconds, self._cost / WRITING_SHARE) if self.seconds else 0.0

    def save(self, step: int, state: PyTree, notes: Mapping[str, Any], *, wait: bool) -> None:
        """Saves a state.

        Args:
          step: number of the checkpoint; nothing is done if there is one of this number.
          state: arrays, which are copied before this returns.
          notes: JSON values.
          wait: whether to return only when the checkpoint is on disk.

        Raises:
          CheckpointError: this checkpoint, or the one before it, cannot be written.
          FloatingPointError: an array has numbers that are not finite; nothing is saved.
        """
        import orbax.checkpoint as ocp

        started = monotonic()
        packed, layout = pack(state)
        sealed = _seal({**notes, "source": self.source}, layout)
        try:
            manager = self._open()
            self.wait()
            if step not in self.steps():
                self._started, self._step = started, step
                if shutil.disk_usage(self.folder).free < packed.size:
                    raise OSError(f"No space left on device for {packed.size:,} bytes")
                arrays = ocp.args.StandardSave({ARRAYS: packed})
                items = {ARRAYS: arrays, NOTES: ocp.args.JsonSave(sealed)}
                if not manager.save(step, args=ocp.args.Composite(**items)):
                    raise OSError("Orbax has left it out")
            if wait:
                self.wait()
        except Exception as error:  # Orbax and TensorStore raise what they like on a full disk
            steps = self.steps()
            last = f"the last whole one is of step {steps[0]}" if steps else "there is none yet"
            raise CheckpointError(
                f"checkpoints: cannot write step {step} to {self.folder}: {_line(error)}; {last}"
            ) from error

    def newest(self, like: Callable[[dict[str, Any]], PyTree]) -> tuple[PyTree, dict] | None:
        """Reads the newest checkpoint that is not damaged: a state of NumPy arrays, and its notes.

        A damaged one is set aside, under a name that ends with `.damaged`, with a warning.
        Checkpoints of another source are removed: what they would go on from is gone. Where there
        is none of this source, it returns `None`.

        Args:
          like: from notes to a state of the shapes, dtypes and structure that are expected.

        Raises:
          CheckpointError: a checkpoint cannot be read at this moment, or all are damaged.
        """
        import orbax.checkpoint as ocp

        damaged = False
        for step in self.steps():
            try:
                notes, layout = self.notes(step)
                if notes["source"] != self.source:
                    _remove(self.folder, step)
                    self._open().reload()
                    continue
                args = ocp.args.Composite(**{ARRAYS: ocp.args.StandardRestore()})
                packed = self._open().restore(step, args=args)[ARRAYS][ARRAYS]
                state = unpack(packed, layout, like(notes))
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
        """Numbers of the checkpoints on disk, the newest first."""
        names = [path.name for path in self.folder.glob("*")]  # unfinished ones have a suffix
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def notes(self, step: int) -> tuple[dict[str, Any], dict[str, list]]:
        """Reads the notes of a checkpoint, and the layout of its arrays; see `packing.pack`."""
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(**{NOTES: ocp.args.JsonRestore()})
        sealed = self._open().restore(step, args=args)[NOTES]
        if zlib.crc32(sealed["text"].encode()) != sealed["checksum"]:
            raise ValueError("the notes have another checksum")
        read = json.loads(sealed["text"])
        return read["notes"], read["layout"]

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk."""
        if self._manager is not None:
            self._manager.wait_until_finished()
        self._finish()

    def _finish(self) -> None:
        """Has the disk keep the last checkpoint, and notes how long it took."""
        if self._started is None:
            return
        for path in [*(self.folder / str(self._step)).rglob("*"), self.folder]:
            files.sync(path)  # Orbax does so for the arrays only
        self._rested = monotonic()
        self._cost, self._started = self._rested - self._started, None

    def close(self) -> None:
        """Waits until all is on disk, or raises a `CheckpointError`, and ends Orbax's threads."""
        if self._manager is None:
            return
        try:
            try:
                self.wait()
            finally:
                manager, self._manager = self._manager, None
                manager.close()  # raises what could not be written, too
        except Exception as error:
            raise CheckpointError(
                f"checkpoints: cannot write to {self.folder}: {_line(error)}"
            ) from error

    def _open(self) -> "ocp.CheckpointManager":
        if self._manager is None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.keep,
                create=False,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                # Of several processes the first alone comes here.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=0, active_processes={0}
                ),
            )
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(f"*{REMOVED}"):
                shutil.rmtree(path)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def _set_aside(self, step: int, reason: str) -> None:
        """Renames a damaged checkpoint."""
        logger.warning("%s: the checkpoint of step %d is damaged: %s", self.folder, step, reason)
        numbers = itertools.count(2)
        aside = self.folder / f"{step}{DAMAGED}"
        while aside.exists():
            aside = self.folder / f"{step}.{next(numbers)}{DAMAGED}"
        (self.folder / str(step)).rename(aside)
        files.sync(self.folder)
        self._open().reload()


def known_notes(checkpoints: Checkpoints, step: int) -> dict[str, Any] | None:
    """The notes of a checkpoint; `None`, with a warning, if they cannot be read."""
    try:
        return checkpoints.notes(step)[0]
    except Exception as error:  # whatever a damaged file may raise
        logger.warning("%s: step %d: %s", checkpoints.folder, step, error)
        return None


def _remove(folder: Path, step: int) -> None:
    """Removes a checkpoint of another source, and those that were set aside with it."""
    removed = folder / f"{step}{REMOVED}"
    (folder / str(step)).rename(removed)  # at once: half of one would pass for damaged
    files.sync(folder)
    for path in [removed, *folder.glob(f"*{DAMAGED}")]:
        shutil.rmtree(path)


def _seal(notes: Mapping[str, Any], layout: Mapping[str, list]) -> dict[str, Any]:
    """Notes and layout as one text, with its checksum."""
    text = json.dumps({"notes": notes, "layout": layout})
    return {"text": text, "checksum": zlib.crc32(text.encode())}


def _is_damage(error: Exception) -> bool:
    """Whether an error means that a file is damaged, and not that it cannot be read now."""
    if isinstance(error, UnlikeError | MemoryError):
        return False
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError)
    return not any(word in str(error) for word in TEMPORARY)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
