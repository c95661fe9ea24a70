"""Streamed examples: every batch is what it should be, whoever reads it and wherever it begins."""

from dataclasses import dataclass
import itertools
import os
import shutil
import signal
import subprocess
import time

from absl import flags
import jax
import numpy as np
from PIL import Image
import pytest
from runs import Interrupter, Stop, begin, carry_out, check_same_end

from dhp_jax import config as dhp_config
from dhp_jax import data
from dhp_jax.data.device_images import Rows
from dhp_jax.data.stream import Stream, StreamError, epoch_order
from dhp_jax.distributed.mesh import local_rows, put_batch
from dhp_jax.errors import ConfigError
from dhp_jax.pipeline import memory, setup
from dhp_jax.tasks import Classification, evaluate
from dhp_jax.workdir.identity import settle_data

EXAMPLES, BATCH = 11, 3
STEPS = EXAMPLES // BATCH


@dataclass
class Read:
    """Gives the numbers of the examples, and one drawn for each."""

    fails_at: int | None = None
    dies: bool = False
    raises: Exception | None = None

    def __call__(self, chosen, rows, random):
        drawn = random.random(len(chosen))
        if self.fails_at in chosen:
            raise data.DataNotFoundError("data.dir", detail="cannot read 'x.png'")
        if self.raises is not None:
            raise self.raises
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return chosen[rows], drawn[rows]


def read_all(workers=0, first=0, last=3 * STEPS, rows=None, seed=(1, 2), read=None):
    stream = Stream(EXAMPLES, read or Read(), 0, workers)
    with stream.training(
        seed, examples=EXAMPLES, batch_size=BATCH, first=first, last=last, rows=rows
    ) as batches:
        return [tuple(np.array(part) for part in batch) for batch in batches]


def check_equal(found, expected):
    assert len(found) == len(expected)
    for batches in zip(found, expected, strict=True):
        for parts in zip(*batches, strict=True):
            np.testing.assert_array_equal(*parts)


# Orders and batches


def test_the_order_of_an_epoch_is_a_permutation_of_its_own():
    orders = [epoch_order(seed, epoch, 50) for seed in ((0,), (1, 2)) for epoch in (1, 2, 3)]
    for order in orders:
        assert order.dtype == np.int32
        np.testing.assert_array_equal(np.sort(order), np.arange(50))
    assert len({tuple(order) for order in orders}) == 6
    np.testing.assert_array_equal(epoch_order((1, 2), 3, 50), orders[-1])


def test_an_epoch_goes_through_its_order_and_each_step_draws_afresh():
    batches = read_all()
    for epoch in range(3):
        chosen = np.concatenate([batch[0] for batch in batches[STEPS * epoch :][:STEPS]])
        np.testing.assert_array_equal(
            chosen, epoch_order((1, 2), epoch + 1, EXAMPLES)[: STEPS * BATCH]
        )
    drawn = np.concatenate([batch[1] for batch in batches])
    assert len(set(drawn.tolist())) == 3 * STEPS * BATCH


@pytest.mark.parametrize("first", [1, STEPS, STEPS + 2])
def test_a_stream_that_begins_later_gives_the_same(first):
    check_equal(read_all(first=first), read_all()[first:])


def test_rows_are_parts_of_the_same_batches():
    for rows in np.array([0, 2]), np.array([1]):
        expected = [tuple(part[rows] for part in batch) for batch in read_all()]
        check_equal(read_all(rows=rows), expected)


def test_processes_read_what_threads_read_and_a_failure_of_theirs_is_told():
    check_equal(read_all(workers=2), read_all())
    with pytest.raises(data.DataNotFoundError, match=r"^data\.dir: cannot read 'x\.png'$"):
        read_all(workers=1, read=Read(fails_at=3))
    with pytest.raises(StreamError, match=r"^data: cannot read examples: KeyError\('odd'\)$"):
        read_all(read=Read(raises=KeyError("odd")))
    assert not flags.FLAGS.is_parsed()


def test_a_reading_process_that_dies_is_told():
    with pytest.raises(StreamError, match=r"one of 1 processes.*config\.data\.workers"):
        read_all(workers=1, read=Read(dies=True))


def test_another_seed_gives_other_batches():
    first, other = (np.concatenate([b[0] for b in read_all(seed=(1, k))]) for k in (2, 3))
    assert np.any(first != other)


@pytest.mark.parametrize("batch_size", [1, 4, EXAMPLES, 20])
def test_tests_read_every_example_once_and_count_no_other(batch_size):
    with Stream(EXAMPLES, Read(), 0, 0).in_order(batch_size) as batches:
        found = [(batch[0], count) for batch, count in batches]
    assert all(len(chosen) == batch_size for chosen, _ in found)
    counted = np.concatenate([chosen[:count] for chosen, count in found])
    np.testing.assert_array_equal(counted, np.arange(EXAMPLES))


def test_without_a_mesh_a_process_reads_whole_batches():
    np.testing.assert_array_equal(local_rows(None, 8), np.arange(8))
    batch = (None, np.arange(6, dtype=np.uint8))
    degraded, targets = put_batch(None, batch, 6)
    assert degraded is None
    np.testing.assert_array_equal(targets, np.arange(6))


class Linear:
    """Scores of ten classes: a fixed combination of the pixels."""

    def __call__(self, x):
        flat = x.reshape(len(x), -1)
        return flat @ np.linspace(-1, 1, flat.shape[1] * 10).reshape(-1, 10).astype(np.float32)


def test_a_test_of_streamed_images_is_that_of_the_same_ones_on_the_device():
    from flax import nnx

    class Model(nnx.Module):
        __call__ = Linear.__call__

    source = data.load("digits")
    task = Classification(source.mean, source.std)
    once = evaluate(Model(), task, jax.device_put(source.read("test")), batch_size=300)
    again = evaluate(Model(), task, source.stream("test", 0), batch_size=300)
    assert again == once


# Runs


STREAMED = {"data.streamed": True, "data.workers": 0}
OFTEN = {"checkpoint.seconds": 0.0}


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
def test_a_streamed_run_that_is_stopped_ends_with_the_bits_of_a_resident_one(tmp_path, finished):
    for stop in (("search", 6), ("converge", 8)):
        with pytest.raises(Stop):
            carry_out(tmp_path / "run", [Interrupter(*stop)], **STREAMED, **OFTEN)
    carry_out(tmp_path / "run", **STREAMED)
    check_same_end(tmp_path / "run", finished)


def test_a_phase_goes_on_with_data_as_it_began(tmp_path, finished):
    workdir = shutil.copytree(finished, tmp_path / "run")
    for name in ("model", "best"):  # as if it had been stopped before these were saved
        shutil.rmtree(workdir / name)
    with pytest.raises(ConfigError, match=r"config\.data\.streamed: expected False.*got True"):
        carry_out(workdir, **STREAMED)


@pytest.mark.slow
def test_a_run_goes_on_as_it_began_even_if_memory_has_become_less(tmp_path, monkeypatch, finished):
    with pytest.raises(Stop):
        carry_out(tmp_path / "run", [Interrupter("search", 3)], **OFTEN)
    monkeypatch.setattr(memory, "free_memory", lambda: 1)
    carry_out(tmp_path / "run")
    check_same_end(tmp_path / "run", finished)


@pytest.mark.slow
def test_a_damaged_image_may_be_mended_as_long_as_nothing_has_been_learnt(tmp_path):
    rng = np.random.default_rng(0)
    for split, label, i in itertools.product(("train", "test"), "ab", range(8)):
        path = tmp_path / f"pictures/{split}/{label}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    file = tmp_path / "pictures/test/b/3.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:60] + bytes(20) + whole[80:])
    fields = {"data.name": "image_folder", "data.dir": str(tmp_path / "pictures")}
    fields |= {"batch_size": 4, **OFTEN}
    with pytest.raises(data.DataNotFoundError, match=r"^config\.data\.dir: .*b/3\.png"):
        carry_out(tmp_path / "run", **fields)
    Image.new("RGB", (8, 8)).save(file)
    assert file.stat().st_size != len(whole)
    with pytest.raises(Stop):
        carry_out(tmp_path / "run", [Interrupter("search", 2)], **fields)
    file.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"expected the test images .* delete .*data\.json"):
        carry_out(tmp_path / "run", **fields)


@pytest.mark.parametrize("left", ["checkpoints/search/5", "search", "best", "model"])
def test_data_are_those_of_the_run_once_something_has_been_learnt_from_them(tmp_path, left):
    settle_data(tmp_path, False, {"train": 1, "test": 2})
    settle_data(tmp_path, False, {"train": 1, "test": 3})
    (tmp_path / left).mkdir(parents=True)
    settle_data(tmp_path, False, {"train": 1, "test": 3})
    with pytest.raises(ConfigError, match=r"^config\.data: expected the test images"):
        settle_data(tmp_path, False, {"train": 1, "test": 4})


def readers(process):
    """Not all of its children: one of them keeps account of shared memory."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)],
        capture_output=True,
        text=True,
    )
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "spawn_main" in line]


def readers_of_what_goes_on(run, workdir, count):
    """So many readers of a run that has saved a state; those of a phase may have read all of it."""
    while True:
        assert run.poll() is None, run.communicate()[1]
        saved, reading = list(workdir.glob("checkpoints/search/[0-9]*")), readers(run)
        if saved and len(reading) >= count:
            return reading
        time.sleep(0.02)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_killed_run_leaves_no_reading_process_and_goes_on_with_the_same_bits(tmp_path, finished):
    streamed = {"data.streamed": True, "data.workers": 2}
    run = begin(tmp_path / "run", **streamed)
    reading = readers_of_what_goes_on(run, tmp_path / "run", 2)
    run.kill()
    run.communicate()
    end = time.monotonic() + 60
    while any(map(alive, reading)):
        assert time.monotonic() < end
        time.sleep(0.1)
    again = begin(tmp_path / "run", **streamed)
    _, told = again.communicate(timeout=600)
    assert again.returncode == 0, told
    assert "leaked" not in told
    check_same_end(tmp_path / "run", finished)


@pytest.mark.slow
def test_a_reading_process_that_dies_ends_the_run_in_one_line(tmp_path):
    run = begin(tmp_path / "run", **{"data.streamed": True, "data.workers": 1})
    reading = readers_of_what_goes_on(run, tmp_path / "run", 1)
    for pid in reading:
        os.kill(pid, signal.SIGKILL)
    _, told = run.communicate(timeout=120)
    assert run.returncode == 1, told
    assert "Traceback" not in told
    (error,) = (line for line in told.splitlines() if line.startswith("error"))
    assert "goes on" in error


# What is streamed


def set_up(**fields):
    config = dhp_config.default()
    config.data.name = "digits"
    config.update_from_flattened_dict(fields)
    dhp_config.check(config)
    return setup.set_up(config)


NEEDED = 1797 * 64


@pytest.mark.parametrize(
    ("room", "asked", "streamed"),
    [
        (2 * NEEDED, None, False),
        (2 * NEEDED - 2, None, True),
        (2 * NEEDED, True, True),
        (2 * NEEDED, False, False),
    ],
)
def test_what_does_not_fit_is_streamed(monkeypatch, room, asked, streamed):
    monkeypatch.setattr(memory, "free_memory", lambda: room)
    found = set_up(**({} if asked is None else {"data.streamed": asked})).read("train")
    assert isinstance(found, Stream) == streamed
    if not streamed:
        assert isinstance(found[0], Rows)


def test_what_does_not_fit_is_not_put_on_the_device(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * NEEDED - 2)
    with pytest.raises(ConfigError) as raised:
        set_up(**{"data.streamed": False})
    message = str(raised.value)
    assert message.startswith("config.data.streamed: expected True for the images of 'digits'")
    assert f"{NEEDED:,} bytes" in message
    assert f"{NEEDED - 1:,}" in message
    monkeypatch.setattr(memory, "free_memory", lambda: 2**40)
    monkeypatch.setattr(memory, "memory_available", lambda: 2 * NEEDED - 2)
    with pytest.raises(ConfigError, match="bytes of the host; at most"):
        set_up(**{"data.streamed": False})


def test_reading_processes_are_as_many_as_shared_memory_has_room_for(monkeypatch):
    batch = 64 * 64  # bytes
    monkeypatch.setattr(memory, "shared_memory", lambda: 2 * memory.BATCHES_PER_WORKER * 3 * batch)
    asked = {"data.streamed": True, "batch_size": 64}
    monkeypatch.setattr(memory, "usable_cores", lambda: 12)
    assert set_up(**asked).read("train").workers == 3
    assert set_up(**asked, **{"data.workers": 2}).read("train").workers == 2
    with pytest.raises(ConfigError, match=r"^config\.data\.workers: expected at most 3, .* got 4$"):
        set_up(**asked, **{"data.workers": 4})


@pytest.mark.parametrize("workers", [-1, 1.5, True, 10_000])
def test_a_wrong_number_of_processes_is_refused(workers):
    config = dhp_config.default()
    with config.ignore_type():
        config.data.workers = workers
    with pytest.raises(ConfigError, match=r"^config\.data\.workers: expected an integer >= 0"):
        dhp_config.check(config)


def test_the_memory_of_the_device_is_some():
    assert 2**20 < memory.free_memory() < 2**50
