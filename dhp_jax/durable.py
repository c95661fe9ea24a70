"""Files that are whole or not there, whatever happens to the process or to the power."""

import os
from pathlib import Path


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file's content; a reader finds what was there before, or all of this.

    Raises:
      OSError: it cannot be written; what was there before is still there.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(data)
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def sync(path: str | os.PathLike) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
