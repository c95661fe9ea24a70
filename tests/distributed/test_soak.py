"""Many misfortunes at random instants and places; `make test-slow` runs these."""

import collections
import random
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import pytest
from runs import begin, check_same_end

from dhp_jax.artifact.reading import read_description
from dhp_jax.train.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

CUTS = 100
STREAMED = {"data.streamed": True, "data.workers": 1}
LONG = {
    "search.epochs": 20,
    "search.strength": 0.02,
    "converge.epochs": 150,
    "converge.drops": (100.0,),
}
SHORT = {**LONG, "search.epochs": 4, "converge.epochs": 8}  # every epoch starts reading processes


def finish(process):
    """Waits for a process to end by itself, and well."""
    _, told = process.communicate(timeout=1200)
    assert process.returncode == 0, told


def place(workdir):
    """How far a run has come, in words, by what is on disk."""
    if not (workdir / "config.json").exists():
        return "starting"
    for phase in ("converge", "search"):
        folder = workdir / "checkpoints" / phase
        if folder.is_dir():
            half_written = any("tmp" in path.name for path in folder.iterdir())
            return f"{phase}, a checkpoint half written" if half_written else phase
    return "before the search"


@pytest.mark.parametrize(
    ("number", "longest", "length", "fields"), [(50, 12, LONG, {}), (20, 30, SHORT, STREAMED)]
)
def test_a_run_killed_many_times_ends_with_the_bits_of_one_that_was_not(
    tmp_path, number, longest, length, fields
):
    undisturbed = tmp_path / "undisturbed"
    finish(begin(undisturbed, **length))
    instants, kills, runs = random.Random(0), collections.Counter(), 0
    while sum(kills.values()) < number:  # a fast machine ends a run before
        runs += 1
        workdir = tmp_path / f"run{runs}"
        while sum(kills.values()) < number:
            process = begin(workdir, **length, **fields)
            try:
                process.communicate(timeout=instants.uniform(1, longest))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills[place(workdir)] += 1
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL
        finish(begin(workdir, **length, **fields))
        check_same_end(workdir, undisturbed)
    print(f"\n{sum(kills.values())} kills of {runs} runs: {dict(kills)}")


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """A run that was killed while it converged."""
    workdir = tmp_path_factory.mktemp("half_done") / "run"
    process = begin(workdir)
    while len(whole_steps(workdir / "checkpoints/converge")) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return workdir


def whole_steps(folder):
    """Numbers of the checkpoints that are not being written, the newest first."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())[::-1]


def cut(folder, chance):
    """Cuts a file under a folder short; returns its name and how much is left."""
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = path.read_bytes()
    left = chance.randrange(len(content)) if content else 0
    path.write_bytes(content[:left])
    return path.relative_to(folder), left


def test_files_of_checkpoints_cut_short_at_random_places_lose_nothing(half_done, tmp_path):
    chance, outcomes = random.Random(0), collections.Counter()
    source = read_description(half_done / "pruned")["sha256"]
    states = states_of(half_done / "checkpoints/converge", source)
    for number in range(CUTS):
        folder = tmp_path / str(number) / "converge"
        shutil.copytree(half_done / "checkpoints/converge", folder)
        steps = whole_steps(folder)
        cut(folder / str(steps[0]), chance)
        checkpoints = Checkpoints(folder, source=source)
        found = checkpoints.newest(states)
        checkpoints.close()
        step = found[1]["progress"]["steps"]
        outcomes["the newest" if step == steps[0] else "the one before"] += 1
        assert step in steps[:2]
        shutil.rmtree(folder.parent)
    print(f"\n{CUTS} cuts; then read was {dict(outcomes)}")


def states_of(folder, source):
    """From notes to the shapes of the state that was saved with them."""
    checkpoints, states = Checkpoints(folder, source=source), {}
    for step in checkpoints.steps():
        notes, layout = checkpoints.notes(step)
        states[notes["has_best"]] = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            for name, (dtype, shape, _) in layout.items()
        }
    checkpoints.close()
    return lambda notes: states[notes["has_best"]]


@pytest.mark.parametrize("seed", range(5))
def test_a_run_whose_files_were_cut_short_at_random_ends_with_the_same_bits(
    finished, half_done, tmp_path, seed
):
    workdir, chance = shutil.copytree(half_done, tmp_path / "run"), random.Random(seed)
    for phase in ("search", "converge"):
        folder = workdir / "checkpoints" / phase
        for _ in range(3):
            cut(folder / str(whole_steps(folder)[0]), chance)
    cut(workdir / chance.choice(["search", "pruned"]), chance)
    finish(begin(workdir))
    check_same_end(workdir, finished)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_on_a_disk_that_gets_full_goes_on_when_there_is_room(finished, small_disk):
    workdir = small_disk / "run"
    process = begin(workdir)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 1
    error = next(line for line in told.splitlines() if line.startswith("error: "))
    assert "No space left on device" in error
    assert error.endswith("; the same command goes on once that is mended")
    print(f"\n{error}")
    subprocess.run(["mount", "-o", "remount,size=300m", str(small_disk)], check=True)
    finish(begin(workdir))
    check_same_end(workdir, finished)
