"""Runs as processes that are killed, told to end, or find the disk full: nothing is lost."""

import re
import resource
import signal
import subprocess
import time

import pytest
from runs import Interrupter, Stop, begin, carry_out, check_same_end

from dhp_jax.distributed.preemption import EXIT_CODE
from dhp_jax.train.checkpoints import Checkpoints


def wait_for(process, ready):
    """Waits until something is there that a running process makes."""
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def end(process):
    """The exit code of a process that ends by itself, and its lines on standard error."""
    _, told = process.communicate(timeout=300)
    return process.returncode, told.splitlines()


def checkpoints(workdir, phase="*"):
    return set((workdir / "checkpoints").glob(f"{phase}/*"))


def kill_in(phase, workdir, meanwhile=lambda: None):
    """Kills a run as soon as it has a checkpoint of a phase, half written or whole."""
    process = begin(workdir)
    wait_for(process, lambda: checkpoints(workdir, phase))
    process.send_signal(signal.SIGSTOP)
    meanwhile()
    process.send_signal(signal.SIGKILL)
    assert end(process)[0] == -signal.SIGKILL


def tell_to_end(workdir):
    """Tells a run to end while it searches, or just after on a machine that kept us waiting."""
    process = begin(workdir)
    seen = checkpoints(workdir)
    wait_for(process, lambda: checkpoints(workdir) - seen)
    process.send_signal(signal.SIGTERM)
    code, told = end(process)
    assert code == EXIT_CODE
    stopped = r"(search|converge): stopped after step \d+; the same command goes on from there"
    assert re.fullmatch(stopped, told[-1])


@pytest.mark.slow
@pytest.mark.usefixtures("without_pages")
def test_a_run_that_is_killed_ends_with_the_same_bits(finished, tmp_path):
    workdir = tmp_path / "run"
    kill_in("search", workdir)
    carry_out(workdir)
    check_same_end(workdir, finished)


@pytest.mark.slow
def test_a_run_that_met_every_misfortune_ends_with_the_bits_of_one_that_met_none(
    finished, tmp_path
):
    workdir = tmp_path / "run"

    def second():  # is refused while the first lives
        code, told = end(begin(workdir))
        assert code == 2
        assert told[-1] == (  # before it stands what took longer than a second
            f"error: workdir: another process is at work in {workdir}; wait until it ends, or "
            "give another --workdir"
        )

    kill_in("search", workdir, second)
    tell_to_end(workdir)
    kill_in("converge", workdir)
    code, _ = end(begin(workdir))
    assert code == 0
    check_same_end(workdir, finished)


def limited_files():
    """No file of this process may become larger than 100 kB, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.slow
def test_a_disk_that_is_full_is_told_and_the_run_goes_on_when_there_is_room(
    finished, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        popen = subprocess.Popen
        patch.setattr(subprocess, "Popen", lambda *a, **k: popen(*a, preexec_fn=limited_files, **k))
        process = begin(workdir)
    code, told = end(process)
    assert code == 1
    error = next(line for line in told if line.startswith("error: "))
    assert error.startswith("error: checkpoints: cannot write ")
    assert error.endswith("; the same command goes on once that is mended")
    code, _ = end(begin(workdir))
    assert code == 0
    check_same_end(workdir, finished)


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
def test_a_last_state_that_was_saved_before_its_test_takes_no_record_away(
    finished, tmp_path, monkeypatch
):
    def due(checkpoints):  # the one before is always done
        checkpoints.wait()
        return True

    monkeypatch.setattr(Checkpoints, "due", due)
    with pytest.raises(Stop):
        carry_out(tmp_path / "run", [Interrupter("converge", 1)], **{"checkpoint.seconds": 0.0})
    carry_out(tmp_path / "run", **{"checkpoint.seconds": 0.0})
    check_same_end(tmp_path / "run", finished)
