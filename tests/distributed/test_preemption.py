"""Signals that ask a process to end become a question; the process ends in time all the same."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time

import pytest

from dhp_jax.distributed import preemption
from dhp_jax.distributed.preemption import EXIT_CODE, SIGNALS, watch_for_stop


def until(condition):
    """Waits for something that happens soon."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_and_does_not_end_the_process(number):
    with watch_for_stop(grace=60) as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        until(asked)


def test_another_signal_asks_nothing():
    taken = []
    before = signal.signal(signal.SIGUSR1, lambda *_: taken.append(1))
    try:
        with watch_for_stop(grace=60) as asked:
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: taken)
            time.sleep(0.05)
            assert not asked()
            os.kill(os.getpid(), signal.SIGTERM)
            until(asked)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def interruptible():
    """SIGINT as a terminal has it; in the background it may be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_afterwards_signals_do_what_they_did_before(interruptible):
    before = [signal.getsignal(number) for number in SIGNALS]
    threads = threading.active_count()
    with watch_for_stop(grace=60):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert threading.active_count() == threads
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)  # handlers run between two lines


def interrupt_twice():
    with watch_for_stop(grace=60) as asked:
        interrupt()
        until(asked)
        interrupt()


def test_control_c_given_twice_interrupts():
    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()


def test_sigterm_given_twice_still_asks_only():
    with watch_for_stop(grace=60) as asked:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        until(asked)


def test_in_a_thread_nothing_is_asked():
    found = []

    def work():
        with watch_for_stop(grace=60) as asked:
            found.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


FOLDER = str(Path(preemption.__file__).parent)
STUCK = """
import ctypes, os, signal, sys
sys.path.insert(0, sys.argv[1])
from preemption import watch_for_stop  # alone, for the library takes seconds to import
with watch_for_stop(grace=0.2):
    os.kill(os.getpid(), signal.SIGTERM)
    ctypes.CDLL(None).sleep(60)  # like a compiler: no Python runs, and no handler
"""


def test_a_process_that_is_stuck_ends_when_its_time_is_up():
    started = time.monotonic()
    command = [sys.executable, "-c", STUCK, FOLDER]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == EXIT_CODE
    assert ended.stderr.splitlines() == [
        "told to end: saving first",
        "error: not done 0.2 s after being told to end",
    ]
    assert time.monotonic() - started < 50


def test_where_there_is_nothing_to_save_sigterm_ends_the_process_at_once():
    code = (
        "import os, signal, sys, time\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from preemption import exit_at_once\n"
        "with exit_at_once():\n"
        "    pass\n"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
        "with exit_at_once():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, FOLDER], check=False)
    assert ended.returncode == EXIT_CODE
