"""Signals that end a process: it ends at once, or saves its state first."""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
import threading
from types import FrameType

EXIT_CODE = 75  # "try again later" in sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def exit_at_once() -> Iterator[None]:
    """While the block runs, a signal ends the process; for work without a state.

    The exit code is `EXIT_CODE` for SIGTERM, and 130 for Ctrl-C, as of shells. A
    `KeyboardInterrupt` may get lost: Python drops what is raised while it collects garbage.

    Python takes signals in the main thread only. In another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            print("interrupted; the run has not begun", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE if number == signal.SIGTERM else 130)

    handlers = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watch_for_stop(grace: float) -> Iterator[Callable[[], bool]]:
    """While the block runs, SIGTERM and Ctrl-C are noted and do not end the process.

    The block is given a function that tells whether such a signal has come, and ends when it has.
    If it has not ended `grace` seconds after the signal, as within a long compilation, the process
    ends with `EXIT_CODE`. Ctrl-C given twice raises `KeyboardInterrupt`. Python takes signals in
    the main thread only. In another thread the function always returns false.
    """
    asked, ended = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and handle.interrupted:
            raise KeyboardInterrupt
        handle.interrupted = number == signal.SIGINT

    def watch() -> None:
        # Python's handlers wait for the compiler to return; this thread does not.
        while number := os.read(reader, 1):
            if number[0] in SIGNALS:
                asked.set()
                again = "; Ctrl-C again interrupts it" if number[0] == signal.SIGINT else ""
                print(f"told to end: saving first{again}", file=sys.stderr, flush=True)
                break
        if asked.is_set() and not ended.wait(grace):
            print(f"error: not done {grace:g} s after being told to end", file=sys.stderr)
            sys.stderr.flush()
            os._exit(EXIT_CODE)

    handle.interrupted = False
    handlers = {number: signal.signal(number, handle) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield asked.is_set
    finally:
        ended.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)  # what ends the watcher
        watcher.join()
        os.close(reader)
