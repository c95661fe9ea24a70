"""Do the training data fit on the device and in memory, and how many processes read them?"""

import os
from pathlib import Path
import shutil

import jax
from ml_collections import ConfigDict

from dhp_jax.data.decode import memory_available
from dhp_jax.errors import ConfigError

SHARE_FOR_DATA = 0.5  # of the memory that is free
HOST_COPIES = 4  # of photographs in the host's memory, while they are laid out
BATCHES_PER_WORKER = 4  # of a stream, in shared memory
MAX_WORKERS = 16  # unless more are asked for


def is_streamed(
    config: ConfigDict, known: bool | None, needed: int, on_host: int, what: str
) -> bool:
    """Whether data are read while they are used; otherwise all of them are on the device.

    Args:
      config: `data.streamed` decides, if it is given.
      known: whether they were streamed when the run began; `None` leaves it to their size.
      needed, on_host: bytes that they would take on the device, and in the host's memory.
      what: what an error calls the data.
    """
    if config.data.streamed is None and known is not None:
        return known
    fits = True
    for bytes_needed, where, free in (
        (needed, "the device", free_memory()),
        (on_host, "the host", memory_available()),
    ):
        room = int(SHARE_FOR_DATA * free)
        fits &= bytes_needed <= room
        if config.data.streamed is False and bytes_needed > room:
            raise ConfigError(
                "config.data.streamed",
                detail=f"expected True for {what}, which take {bytes_needed:,} bytes of {where}; "
                f"at most {room:,} are for data there; got False",
            )
    return not fits if config.data.streamed is None else config.data.streamed


def free_memory() -> int:
    """Bytes that the device has left; those of the host where that is the device."""
    found = jax.local_devices()[0].memory_stats()
    if not found or "bytes_limit" not in found:
        return memory_available()
    return found["bytes_limit"] - found["bytes_in_use"]


def count_workers(config: ConfigDict, batch_bytes: int) -> int:
    """How many processes read a stream: `data.workers`, or all usable cores but one.

    Their batches pass through shared memory, which may be small in a container.
    """
    room = shared_memory()
    most = int(SHARE_FOR_DATA * room // (BATCHES_PER_WORKER * batch_bytes))
    if config.data.workers is None:
        return min(MAX_WORKERS, max(1, usable_cores() - 1), most)
    if config.data.workers > most:
        raise ConfigError(
            "config.data.workers",
            detail=f"expected at most {most}, for {BATCHES_PER_WORKER} batches of each in shared "
            f"memory ({room:,} bytes are free there; 0 needs none); got {config.data.workers}",
        )
    return config.data.workers


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def shared_memory() -> int:
    """Bytes that are free in memory that processes share."""
    folder = Path("/dev/shm")
    return shutil.disk_usage(folder).free if folder.is_dir() else memory_available()
