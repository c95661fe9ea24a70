"""The log of a run: what is told while it goes on, each line with its time."""

from collections.abc import Iterator
import contextlib
import logging
import os
from pathlib import Path

LOG = "log.txt"
logger = logging.getLogger("dhp_jax")


@contextlib.contextmanager
def logged(workdir: str | os.PathLike) -> Iterator[None]:
    """Adds what the library logs in the block, and how it ends, to `log.txt` in a directory.

    What the terminal shows in other ways is logged for debugging. A log that can no longer be
    written, as on a full disk, ends nothing.
    """
    handler, level = logging.FileHandler(Path(workdir) / LOG), logger.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handler.handleError = lambda record: None
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
        logger.debug("finished")
    except BaseException as error:
        logger.debug("ended by %s: %s", type(error).__name__, error)
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        with contextlib.suppress(OSError):
            handler.close()
