"""Files in a folder of images that are read as none, told in one warning."""

from collections.abc import Collection, Iterator
import logging
import os
from pathlib import Path

from dhp_jax.data.decode import SUFFIXES

logger = logging.getLogger(__name__)


def tell_left_out(
    argument: str, folders: Collection[Path], read: Collection[Path], place: str
) -> None:
    """Warns if there are files that are not read: other endings, and folders too deep.

    Args:
      argument: what led to the folders, such as "data.dir".
      folders: where files are looked for, at any depth; hidden ones are not meant.
      read: the files that are read.
      place: where images are expected, in words.
    """
    known = set(read)
    left = [path for folder in folders for path in _visible_files(folder) if path not in known]
    if left:
        logger.warning(
            "%s: %d file%s left out, such as %s; images lie %s and end in %s",
            argument,
            len(left),
            "" if len(left) == 1 else "s",
            left[0],
            place,
            ", ".join(SUFFIXES),
        )


def _visible_files(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where, name) for name in sorted(files) if not name.startswith("."))
