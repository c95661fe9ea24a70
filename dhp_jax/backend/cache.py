"""A cache of compiled programs on disk, and reports of long compilations."""

from collections.abc import Callable, Iterator
import contextlib
import logging
import os
from pathlib import Path

from filelock import FileLock
import jax

from dhp_jax.files import user_cache, why_unwritable

logger = logging.getLogger(__name__)
COMPILED = "/jax/core/compile/backend_compile_duration"
LONG = 1.0  # seconds of a compilation that is worth telling
MAX_BYTES = 2**31  # of the cache


def keep_compiled(folder: str | os.PathLike | None = None) -> Path | None:
    """Has JAX keep programs that take long to compile in a folder, and read them from there.

    These are settings of the process. What JAX was told by its own, as by
    `JAX_COMPILATION_CACHE_DIR` or `JAX_ENABLE_COMPILATION_CACHE`, stays unless a folder is given.

    Args:
      folder: made if it is not there; the least used programs go once there are 2 GiB. `None` is
        `user_cache("xla")`, "off" keeps nothing.

    Returns:
      The folder; `None` if nothing is kept.

    Raises:
      ValueError: a folder that cannot be written; for `None` that is a warning.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder is not None:
        jax.config.update("jax_enable_compilation_cache", True)
    if not jax.config.jax_enable_compilation_cache:
        return None
    if folder is None and jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    asked, folder = folder, user_cache("xla") if folder is None else Path(folder).expanduser()
    if why := why_unwritable(folder):
        told = f"compilation_cache: expected a folder that can be written, or off; got {folder}"
        if asked is not None:
            raise ValueError(f"{told} ({why})")
        logger.warning("%s (%s); compiled programs are not kept", told, why)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.config.jax_compilation_cache_max_size < 0:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    _remove_unfinished(folder)
    return folder


def _remove_unfinished(folder: Path) -> None:
    """Removes files of processes that died while writing; JAX would write nothing beside them.

    A program's time of last use is written after it, and both with the lock held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lockfile"):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("cache") + "atime").exists():
                program.unlink()


@contextlib.contextmanager
def long_compilations(tell: Callable[[float], None]) -> Iterator[None]:
    """Calls `tell(seconds)` after each compilation that took more than a second."""

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == COMPILED and seconds > LONG:
            tell(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
