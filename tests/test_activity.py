"""What is done is told to whoever waits: the innermost block, every second, while it goes on."""

import threading
import time

import pytest

from dhp_jax import activity
from dhp_jax.activity import doing, program, told_when_silent

SILENT = 0.2


@pytest.fixture
def told(monkeypatch):
    """What is told while the test runs."""
    monkeypatch.setattr(activity, "SILENT", SILENT)
    lines = []
    with told_when_silent(lambda what, again: lines.append((what, again))):
        yield lines


def first_told(told):
    """Without what was told a second before, too."""
    return [what for what, again in told if not again]


def test_what_is_done_is_told_again_and_again_while_it_goes_on(told):
    began = time.monotonic()
    with doing("waiting"):
        time.sleep(4 * SILENT)
    assert 2 <= len(told) <= (time.monotonic() - began) / SILENT
    assert {what for what, _ in told} == {"waiting"}
    assert first_told(told) == ["waiting"]


def test_nothing_is_told_while_nothing_is_done(told):
    with doing("a short work"):
        pass
    time.sleep(2 * SILENT)
    assert told == []


def test_the_innermost_block_is_told_and_then_the_outer_one_again(told):
    with doing("the whole"):
        with doing("a part"):
            time.sleep(1.5 * SILENT)
        assert first_told(told) == ["a part"]
        time.sleep(1.5 * SILENT)
    assert first_told(told) == ["a part", "the whole"]


def test_another_block_of_the_same_kind_is_not_told_again(told):
    for _ in range(2):
        with doing("a part"):
            time.sleep(1.5 * SILENT)
    assert first_told(told) == ["a part"] * 2


def test_short_blocks_that_follow_each_other_are_not_silent_together(told):
    for count in range(8):
        with doing(f"part {count}"):
            time.sleep(SILENT / 2)
    assert told
    assert all(what.startswith("part ") and not again for what, again in told)


def test_a_block_that_says_nothing_is_told_as_the_one_around_it(told):
    with doing("timing"), doing(program="the forward pass"):
        time.sleep(1.5 * SILENT)
    assert first_told(told) == ["timing"]


def test_an_error_ends_a_block(told):
    with pytest.raises(ZeroDivisionError), doing("dividing"):
        raise ZeroDivisionError
    time.sleep(2 * SILENT)
    assert told == []


def test_nothing_is_told_once_nobody_listens(monkeypatch):
    monkeypatch.setattr(activity, "SILENT", SILENT)
    lines = []
    with told_when_silent(lambda *what: lines.append(what)):
        pass
    with doing("waiting"):
        time.sleep(2 * SILENT)
    assert lines == []


def test_what_is_compiled_is_that_of_the_innermost_block_that_says_so():
    assert program() == ""
    with doing("timing", "the forward pass"):
        assert program() == "the forward pass"
        with doing("testing", "the test"), doing("saving"):
            assert program() == "the test"
        assert program() == "the forward pass"
    assert program() == ""


def test_blocks_of_other_threads_leave_those_of_the_main_one_alone():
    with doing("searching", "the search step"):
        inside, over = threading.Event(), threading.Event()

        def other():
            with doing("reading", "something else"):
                inside.set()
                over.wait(10)

        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        assert program() == "the search step"
    assert program() == ""
    over.set()
    thread.join()
    assert program() == ""
