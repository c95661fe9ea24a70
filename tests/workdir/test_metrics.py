"""Records on disk, as JSON lines and as TensorBoard events, and progress on standard error."""

import errno
import io
import json
import logging
import math
import os
from pathlib import Path
import re
import struct
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event

from dhp_jax import files
from dhp_jax.train.progress_bar import ProgressBar
from dhp_jax.workdir import metrics
from dhp_jax.workdir.log import logged
from dhp_jax.workdir.metrics import RECORDS, Journal

SEARCH = [
    {"phase": "search", "step": 100, "epoch": 1, "loss": 2.25, "flops_ratio": 0.1 + 0.2},
    {"phase": "search", "step": 150, "epoch": 1, "loss": 1e-30, "test_error": 0.75},
]
CONVERGE = [
    {"phase": "converge", "step": step, "epoch": step, "loss": 1 / step} for step in (1, 2, 3)
]


SEARCHED = 150  # steps of the search


def read(path):
    """The records of a file, without the steps over all phases."""
    return [
        {name: value for name, value in record.items() if name != "total_step"}
        for record in metrics.read(path)
    ]


def write(workdir, phase, records, before=()):
    journal = Journal(workdir, ["search", "converge"])
    journal.begin(phase, 1000, len(before), before)
    for record in records:
        journal.step(1)
        journal.record(record)
    journal.end()


def scalars(directory):
    """`(name, step) -> value` of the TensorBoard event files of a directory."""
    found = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            # A TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4).
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
    return found


# JSON lines


def test_records_are_read_as_they_were_written_one_a_line(tmp_path):
    write(tmp_path, "search", SEARCH)
    write(tmp_path, "converge", CONVERGE)
    assert read(tmp_path / RECORDS) == [*SEARCH, *CONVERGE]
    lines = (tmp_path / RECORDS).read_text().splitlines()
    steps = [record["step"] for record in SEARCH]
    steps += [SEARCHED + record["step"] for record in CONVERGE]
    assert [json.loads(line) for line in lines] == [
        record | {"total_step": step}
        for record, step in zip([*SEARCH, *CONVERGE], steps, strict=True)
    ]


def test_a_record_can_be_read_while_the_phase_goes_on(tmp_path):
    journal = Journal(tmp_path)
    journal.begin("search", 1000, 0, [])
    assert read(tmp_path / RECORDS) == []
    journal.record(SEARCH[0])
    assert read(tmp_path / RECORDS) == SEARCH[:1]
    journal.record(SEARCH[1])
    assert read(tmp_path / RECORDS) == SEARCH
    journal.end()


@pytest.mark.parametrize("name", [RECORDS, "tensorboard"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, name):
    journal = Journal(tmp_path)
    journal.begin("search", 1000, 0, [])
    full = open("/dev/full", "ab" if name == "tensorboard" else "a")  # noqa: SIM115
    if name == RECORDS:
        journal.file = full
    else:
        journal.events.writer.flush = lambda: os.write(full.fileno(), b"0")
        journal.events.writer.close = journal.events.writer.flush
    for write in (lambda: journal.record(SEARCH[0]), journal.end):
        with pytest.raises(OSError, match="No space left on device") as caught:
            write()
        assert caught.value.filename == str(tmp_path / name)


def test_a_file_that_cannot_be_replaced_is_named_and_stays(tmp_path, monkeypatch):
    files.write(tmp_path / "summary.json", "1")

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.write(tmp_path / "summary.json", "2")
    assert caught.value.filename == str(tmp_path / "summary.json")
    assert (tmp_path / "summary.json").read_text() == "1"


def test_numbers_that_are_not_finite_are_read_as_they_were(tmp_path):
    write(tmp_path, "search", [{"phase": "search", "step": 1, "loss": math.inf}])
    write(tmp_path, "baseline", [{"phase": "baseline", "step": 1, "loss": math.nan}])
    infinite, unknown = read(tmp_path / RECORDS)
    assert infinite["loss"] == math.inf
    assert math.isnan(unknown["loss"])


@pytest.mark.parametrize("phase", ["search", "converge"])
def test_a_phase_that_begins_anew_drops_its_own_records_only(tmp_path, phase):
    write(tmp_path, "search", SEARCH)
    write(tmp_path, "converge", CONVERGE)
    again = [{"phase": phase, "step": 7, "loss": 0.5}]
    write(tmp_path, phase, again)
    expected = [*again, *CONVERGE] if phase == "search" else [*SEARCH, *again]
    assert read(tmp_path / RECORDS) == expected
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [RECORDS]


def test_a_phase_that_goes_on_keeps_the_records_it_goes_on_from(tmp_path):
    write(tmp_path, "search", SEARCH)
    write(tmp_path, "converge", CONVERGE)
    again = {"phase": "converge", "step": 3, "loss": 0.5}
    write(tmp_path, "converge", [again], before=CONVERGE[:2])
    assert read(tmp_path / RECORDS) == [*SEARCH, *CONVERGE[:2], again]
    assert scalars(tmp_path / "tensorboard" / "converge") == pytest.approx(
        {
            **{("epoch", SEARCHED + r["step"]): r["epoch"] for r in CONVERGE[:2]},
            **{("loss", SEARCHED + r["step"]): r["loss"] for r in [*CONVERGE[:2], again]},
        }
    )


def test_no_records_are_read_where_there_is_no_file(tmp_path):
    assert read(tmp_path / RECORDS) == []


def test_a_line_that_was_cut_off_is_left_out_and_gone_when_the_phase_begins_anew(tmp_path):
    write(tmp_path, "search", SEARCH)
    write(tmp_path, "converge", CONVERGE)
    path = tmp_path / RECORDS
    path.write_text(path.read_text()[:-5])
    assert read(path) == [*SEARCH, *CONVERGE[:2]]
    write(tmp_path, "baseline", CONVERGE[:1])
    assert read(path) == [*SEARCH, *CONVERGE[:2], CONVERGE[0]]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("damage", [b"\x00" * 9 + b"\n", b"{]\n", b"7\n", b"{}\n", b"\xff\xfe\n"])
def test_a_line_that_is_no_record_is_left_out(tmp_path, damage):
    write(tmp_path, "search", SEARCH)
    path = tmp_path / RECORDS
    path.write_bytes(damage + path.read_bytes() + damage)
    assert read(path) == SEARCH


# TensorBoard


def test_tensorboard_has_each_number_at_its_step_and_phases_follow_each_other(tmp_path):
    write(tmp_path, "search", SEARCH)
    write(tmp_path, "converge", CONVERGE)
    for phase, records, before in (("search", SEARCH, 0), ("converge", CONVERGE, SEARCHED)):
        expected = {
            (name, before + record["step"]): value
            for record in records
            for name, value in record.items()
            if name not in ("phase", "step")
        }
        assert scalars(tmp_path / "tensorboard" / phase) == pytest.approx(expected, rel=1e-6)


def test_vectors_are_in_the_records_and_not_in_tensorboard(tmp_path):
    record = {"phase": "search", "step": 7, "loss": 2.0, "survivors": [4, 16]}
    write(tmp_path, "search", [record])
    assert read(tmp_path / RECORDS) == [record]
    assert scalars(tmp_path / "tensorboard" / "search") == {("loss", 7): 2.0}


def test_a_phase_that_begins_anew_drops_its_own_events_only(tmp_path):
    write(tmp_path, "search", SEARCH)
    write(tmp_path, "converge", CONVERGE)
    before = scalars(tmp_path / "tensorboard" / "search")
    (events,) = (tmp_path / "tensorboard" / "converge").iterdir()
    events.rename(events.with_name("events.out.tfevents.1.earlier"))  # files are named by second
    write(tmp_path, "converge", [{"phase": "converge", "step": 7, "loss": 0.5}])
    assert scalars(tmp_path / "tensorboard" / "converge") == {("loss", SEARCHED + 7): 0.5}
    assert scalars(tmp_path / "tensorboard" / "search") == before


# Progress


RECORDED = [
    {"phase": "search", "step": 100, "epoch": 1, "loss": 2.3456, "error": 0.9, "flops_ratio": 0.8},
    {"phase": "search", "step": 150, "epoch": 1, "loss": 2.0, "error": 0.85, "test_error": 0.7777},
    {"phase": "search", "step": 250, "epoch": 2, "loss": 1.5, "examples_per_second": 1234.5},
    {"phase": "search", "step": 300, "epoch": 2, "params_ratio": 0.5, "test_error": 0.6},
]


def shown(stderr, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr)
    bar = ProgressBar()
    bar.begin("search", 450, 0, [])
    records = {record["step"]: record for record in RECORDED}
    for again in (False, True):  # for two seconds
        bar.wait("compiling the step", again)
    for step in range(1, 301):
        bar.step(1)
        if step in records:
            if "test_error" in records[step]:
                bar.wait("testing", False)
            bar.record(records[step])
    bar.end()
    return stderr.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_log_of_a_run_has_every_epoch_with_its_time_and_how_it_ended(
    tmp_path, monkeypatch, terminal
):
    def interrupted():
        shown(Narrow() if terminal else io.StringIO(), monkeypatch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), logged(tmp_path):
        interrupted()
    with logged(tmp_path):
        logging.getLogger("dhp_jax.anything").warning("a warning")
    logging.getLogger("dhp_jax.anything").warning("of another run")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", line) for line in lines)
    told = [line[24:] for line in lines]
    assert [line.split(": test")[0] for line in told[:2]] == [
        "search: epoch 1, step 150 of 450",
        "search: epoch 2, step 300 of 450",
    ]
    assert told[2:] == ["ended by KeyboardInterrupt: ", "a warning", "finished"]
    assert logging.getLogger("dhp_jax").handlers == []


def test_where_standard_error_is_no_terminal_each_epoch_is_a_line(monkeypatch):
    assert shown(io.StringIO(), monkeypatch) == (
        "search: compiling the step\n"
        "search: testing\n"
        "search: epoch 1, step 150 of 450: "
        "test error 77.77%, FLOPs 80.0%, loss 2.000, train error 85.0%\n"
        "search: epoch 2, step 300 of 450: "
        "test error 60.00%, FLOPs 80.0%, loss 1.500, images/s 1234, params 50.0%, "
        "train error 85.0%\n"
    )


def test_a_phase_that_goes_on_says_from_where(capsys):
    bar = ProgressBar()
    bar.begin("search", 450, 300, RECORDED)
    bar.end()
    assert capsys.readouterr().err.startswith("search: going on from step 300\n")


def test_on_a_terminal_there_is_one_bar_that_is_full_when_the_phase_ends(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "200")
    text = shown(Terminal(), monkeypatch)
    assert "epoch 1" not in text
    assert text.count("\n") == 1
    last = text.rstrip("\n").split("\r")[-1]
    assert last.startswith("search: 100%")
    assert "300/300" in last
    for part in ("loss=1.500", "test error=60.00%", "FLOPs=80.0%", "params=50.0%"):
        assert part in last


class Narrow(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2  # of which `os.get_terminal_size` is asked


@pytest.mark.parametrize("columns", [60, 80, 100, 120])
def test_a_bar_shows_whole_numbers_on_a_terminal_of_any_width(columns, monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((columns, 24)))
    whole = {"test error=77.77%", "test error=60.00%", "FLOPs=80.0%", "images/s=1234"}
    whole |= {"loss=2.346", "loss=2.000", "loss=1.500", "params=50.0%"}
    whole |= {"train error=90.0%", "train error=85.0%"}
    compiling = "compiling the step" if columns >= 80 else "compiling"
    lines = shown(Narrow(), monkeypatch).rstrip("\n").split("\r")
    for line in lines:
        assert len(line) <= columns
        if line.strip():
            assert line.rstrip().endswith("]")
            assert set(line.rstrip("] ").split(", ")[1:]) <= whole | {compiling, "testing"}
    assert compiling in lines[2]
    assert sum("compiling" in line for line in lines) == 2
    assert sum("testing" in line for line in lines) == 2
    assert not {"compiling", "testing"} & set(re.findall(r"\w+", lines[-1]))
    if columns >= 80:
        assert "test error=60.00%, FLOPs=80.0%" in lines[-1]


def test_the_time_that_is_left_is_counted_from_the_first_step(monkeypatch):
    stderr, now = Narrow(), 1000.0
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((100, 24)))
    bar = ProgressBar()
    bar.begin("search", 200, 0, [])
    bar.bar._time = lambda: now
    bar.bar.start_t = bar.bar.last_print_t = now
    now += 100  # what is compiled
    for _ in range(20):
        bar.step(1)
        now += 1
    last = stderr.getvalue().split("\r")[-1]
    assert re.search(r"20/200 \[00:19<0[23]:\d\d", last), last
    bar.end()


def test_a_bar_that_is_interrupted_is_not_full(monkeypatch):
    stderr = Narrow()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("COLUMNS", "100")
    bar = ProgressBar()
    bar.begin("search", 200, 0, [])

    def stop():
        try:
            bar.step(41)
            raise KeyboardInterrupt
        finally:
            bar.end()

    with pytest.raises(KeyboardInterrupt):
        stop()
    last = stderr.getvalue().rstrip("\n").split("\r")[-1]
    assert "41/200" in last
    assert "100%" not in last
