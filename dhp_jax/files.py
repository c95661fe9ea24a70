"""Files that are whole or not there, whatever happens to the process or to the power."""

import os
from pathlib import Path
import shutil


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file's content; a reader finds what was there before, or all of this.

    Raises:
      OSError: it cannot be written; what was there before is still there.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    part = unfinished(path)
    try:
        part.write_bytes(data)
        sync(part)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def user_cache(name: str) -> Path:
    """Where what can be made again is kept: `dhp_jax/NAME` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dhp_jax" / name


def unfinished(path: Path) -> Path:
    """Where a file is while it is written; what is left of it after a death means nothing."""
    return path.with_name(f".{path.name}.unfinished")


def put(part: Path, path: Path) -> None:
    """Gives a finished file or folder its name; what had it goes.

    Raises:
      OSError: it cannot have it; what was there before is still there.
    """
    if not part.is_dir():
        part.replace(path)
        sync(path.parent)
        return
    replaced = path.with_name(f".{path.name}.replaced")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    try:
        part.rename(path)
    except OSError:
        if replaced.exists():
            replaced.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: str | os.PathLike) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
