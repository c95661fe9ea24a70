"""What the program is doing, told to whoever waits, without what others tell of themselves."""

from collections.abc import Callable, Iterator
import contextlib
from dataclasses import dataclass
import logging
import threading
import time

SILENT = 1.0  # seconds, after which it is told
GAP = 0.2  # seconds without any activity, after which the next one has a second of its own


@dataclass(eq=False)
class _Activity:
    what: str
    program: str


class _UnderWay:
    """The activities of the main thread, the innermost last, and since when none was told."""

    def __init__(self) -> None:
        self.stack: list[_Activity] = []
        self.since = self.ended = 0.0


_under_way = _UnderWay()


@contextlib.contextmanager
def doing(what: str = "", program: str = "") -> Iterator[None]:
    """Marks a block that may take longer than people like to wait without a word.

    Blocks of other threads than the main one are not marked: people do not wait for them alone.

    Args:
      what: is done in it, such as "reading the training data"; "" if the block around it says so.
      program: what is compiled in it, such as "the search step"; "" if nothing is that takes long.

    Example:
      >>> with doing("testing the pruned network", "the test of the pruned network"):
      ...     metrics = evaluate(model, task, data)
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.monotonic()
    if not _under_way.stack and began - _under_way.ended > GAP:
        _under_way.since = began
    _under_way.stack.append(_Activity(what, program))
    try:
        yield
    finally:
        _under_way.stack.pop()
        _under_way.ended = time.monotonic()


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Within the block, loggers of these names say nothing below an error."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def program() -> str:
    """What is compiled in the innermost block that says so, as `doing` was given it."""
    programs = (activity.program for activity in reversed(_under_way.stack))
    return next(filter(None, programs), "")


@contextlib.contextmanager
def told_when_silent(tell: Callable[[str, bool], None]) -> Iterator[None]:
    """Calls `tell(what, again)` from a thread for each second in which a block goes on.

    The innermost one is told; again if it was the last one that was. Short blocks that follow each
    other count as one.
    """
    over = threading.Event()

    def watch() -> None:
        told = None
        while not over.wait(SILENT / 10):
            innermost, now = [a for a in _under_way.stack if a.what][-1:], time.monotonic()
            if innermost and now - _under_way.since >= SILENT:
                _under_way.since = now
                tell(innermost[0].what, innermost[0] is told)
                told = innermost[0]

    watching = threading.Thread(target=watch, name="told_when_silent", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
