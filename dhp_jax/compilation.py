"""Compiled programs that outlive the process, and how long compiling takes."""

from collections.abc import Callable, Iterator
import contextlib
import os
from pathlib import Path

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
LONG = 1.0  # seconds of a compilation that is worth telling


def default_cache() -> Path:
    """Where compiled programs are kept: `dhp_jax/xla` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dhp_jax" / "xla"


def keep_compiled(folder: str | os.PathLike | None = None) -> Path | None:
    """Lets JAX read compiled programs from a folder, and write there what takes it long to compile.

    Where JAX has been told a folder already, as by `JAX_COMPILATION_CACHE_DIR`, that stays.

    Args:
      folder: made if it is not there; `None` is `default_cache()`, "off" keeps nothing.

    Returns:
      The folder; `None` if nothing is kept.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    jax.config.update("jax_enable_compilation_cache", True)
    if folder is None and jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    folder = Path(folder or default_cache())
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


@contextlib.contextmanager
def long_compilations(tell: Callable[[str, float], None]) -> Iterator[None]:
    """Calls `tell(function, seconds)` after each compilation that took more than a second."""

    def listen(event: str, seconds: float, *, fun_name: str = "?", **_: object) -> None:
        if event == COMPILED and seconds > LONG:
            tell(fun_name, seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
