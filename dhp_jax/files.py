"""Files that are whole or absent, even if the process or the machine dies while writing."""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import shutil
import tempfile


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """An `OSError` in the block names a file, as that of a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file's content; a reader finds the old content or all of the new.

    Raises:
      OSError: it cannot be written, and names it; the old content is still there.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    part = unfinished(path)
    try:
        with naming(path):
            part.write_bytes(data)
            sync(part)
        put(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def why_unwritable(folder: str | os.PathLike) -> str:
    """Why no file can be put in a folder, which need not be there yet; empty if one can."""
    there = os.path.abspath(folder)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    try:
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return os.strerror(error.errno)


def user_cache(name: str) -> Path:
    """A folder for what can be made again: `dhp_jax/NAME` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dhp_jax" / name


def unfinished(path: Path) -> Path:
    """The path of a file while it is being written; a crash may leave such a file behind."""
    return path.with_name(f".{path.name}.unfinished")


def earlier(path: Path) -> Path:
    """Where a folder is while another one takes its place; a crash in between leaves it there."""
    return path.parent / f".{path.name}.replaced"  # paths may have no name, as "."


def put(part: Path, path: Path) -> None:
    """Renames a finished file or folder to its final path, and removes what was there.

    Raises:
      OSError: it cannot be renamed; what was there before is still there.
    """
    if not part.is_dir():
        part.replace(path)
        sync(path.parent)
        return
    replaced = earlier(path)
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
