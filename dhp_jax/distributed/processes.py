"""Several processes that train one network together; the first one writes and decides.

Each process has some of the devices, and all run the same program. Where there is one process,
functions of this module call what they are given and do nothing else.
"""

from collections.abc import Callable
import json
from pathlib import Path
import tempfile
import time
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
from jaxtyping import PyTree
import numpy as np

from dhp_jax.core.state import numbers_of

Result = TypeVar("Result")
JOIN_TIMEOUT_S = 300  # that processes wait for each other at the beginning
HEARTBEAT_TIMEOUT_S = 30  # after which a silent process counts as dead, and all others end
SECONDS_BETWEEN_TURNS = 1.0  # in which all processes ask each other whether to stop or to save
BROADCAST_BYTES = 2**24  # that the first process sends at once


class ProcessError(RuntimeError):
    """Another process has failed."""


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Makes this process one of several; to be called before JAX is asked for its devices.

    Without arguments JAX reads them from its environment: Cloud TPU, GKE, SLURM, Open MPI.

    Args:
      coordinator: `host:port` of the first process.
      processes: how many there are.
      process: the number of this one, from 0.

    Raises:
      ValueError: arguments that cannot be, or processes that do not find each other.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"--{missing[0]}: expected together with --coordinator, --processes and --process; "
            "got none"
        )
    if not missing:
        _check(coordinator, processes, process)
    # It would take the signal that asks a run to stop.
    jax.config.update("jax_enable_preemption_service", False)
    # CPUs mix up the communication of programs that run at the same time.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        how = "--distributed" if missing else f"--coordinator={coordinator}"
        raise ValueError(f"{how}: cannot join the other processes: {_line(error)}") from error


def _check(coordinator: str, processes: int, process: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"--coordinator: expected host:port, such as 10.0.0.1:8476; got {coordinator!r}"
        )
    if processes < 1:
        raise ValueError(f"--processes: expected at least 1; got {processes}")
    if not 0 <= process < processes:
        raise ValueError(f"--process: expected 0 to {processes - 1}; got {process}")


def are_several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def describe_loss(error: Exception) -> str:
    """One line that says that work with the other processes has failed."""
    return (
        f"process {jax.process_index()} of {jax.process_count()}: work with the other processes "
        f"has failed, one of them may have died: {_line(error)}"
    )


def from_first(work: Callable[[], Any]) -> Any:
    """Has the first process alone do work that returns a JSON value, and gives it to all processes.

    Raises:
      Exception: what `work` raises, in the first process.
      ProcessError: in the other processes, if `work` raises something.
    """
    if not are_several():
        return work()
    sent, failure = {}, None
    if is_first():
        try:
            sent = {"result": work()}
        except Exception as error:
            sent, failure = {"error": _line(error)}, error
    received = json.loads(_bytes_from_first(json.dumps(sent).encode()))
    if failure is not None:
        raise failure
    if "error" in received:
        raise ProcessError(f"the first process has ended: {received['error']}")
    return received["result"]


def folder_from_first(folder: Path, read: Callable[[Path], Result]) -> Result:
    """Reads a folder of files, or a copy of it, in all processes; the first alone need see it."""
    if not are_several():
        return read(folder)
    names = from_first(lambda: sorted(path.name for path in folder.iterdir() if path.is_file()))
    with tempfile.TemporaryDirectory() as copy:
        for name in names:
            content = _bytes_from_first((folder / name).read_bytes() if is_first() else b"")
            (Path(copy) / name).write_bytes(content)
        return read(Path(copy))


def arrays_from_first(tree: PyTree | None, like: PyTree) -> PyTree:
    """Gives the first process's tree of NumPy arrays and random keys to all processes.

    Those of others are not looked at; `like` tells structure, shapes and dtypes.
    """
    if not are_several():
        return tree
    leaves, structure = jax.tree.flatten(like)
    shapes = [jax.eval_shape(numbers_of, leaf) for leaf in leaves]
    sizes = [shape.size * shape.dtype.itemsize for shape in shapes]
    content = b"".join(np.asarray(numbers_of(leaf)).tobytes() for leaf in jax.tree.leaves(tree))
    content, arrays = _bytes_from_first(content), []
    for leaf, shape, end, size in zip(leaves, shapes, np.cumsum(sizes), sizes, strict=True):
        numbers = np.frombuffer(content[end - size : end], shape.dtype).reshape(shape.shape)
        arrays.append(numbers if leaf.dtype == shape.dtype else jax.random.wrap_key_data(numbers))
    return jax.tree.unflatten(structure, arrays)


def _bytes_from_first(content: bytes) -> bytes:
    """Sends bytes in pieces of few different sizes, as JAX compiles a program for each size."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content) // 2**16)))
    rest = int(multihost_utils.broadcast_one_to_all(np.int32(len(content) % 2**16)))
    left, pieces = size * 2**16 + rest, []
    while left:
        room = min(BROADCAST_BYTES, max(2**10, 1 << (left - 1).bit_length()))
        at = sum(map(len, pieces))
        piece = np.zeros(room, np.uint8)
        mine = np.frombuffer(content[at : at + room], np.uint8)
        piece[: mine.size] = mine if is_first() else 0
        received = multihost_utils.broadcast_one_to_all(piece)
        pieces.append(received[: min(left, room)].tobytes())
        left -= len(pieces[-1])
    return b"".join(pieces)


class Turns:
    """Decides whether to stop or to save, after the same step in all processes.

    A single process asks after every step. Several processes ask each other about once a second,
    because they wait for each other then.
    """

    def __init__(self):
        self.left = self.length = 1  # steps to the next turn, and between the last two
        self.looked = time.monotonic()

    def look(self, stopping: Callable[[], bool], due: Callable[[], bool]) -> tuple[bool, bool]:
        """Asks whether any process was asked to stop, and whether it is time to save.

        To be called after every step. The first process alone calls `due`.
        """
        if not are_several():
            stop = stopping()
            return stop, not stop and due()
        self.left -= 1
        if self.left:
            return False, False
        now = time.monotonic()
        wanted = int(self.length * SECONDS_BETWEEN_TURNS / max(now - self.looked, 1e-3))
        next_length = max(1, min(wanted, 2 * self.length))
        mine = np.array([stopping(), is_first() and due(), next_length], np.int32)
        all_of_them = multihost_utils.process_allgather(mine)
        self.left = self.length = int(all_of_them[0, 2])
        self.looked = time.monotonic()
        return bool(all_of_them[:, 0].any()), bool(all_of_them[0, 1])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
