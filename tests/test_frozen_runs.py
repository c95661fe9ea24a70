"""Runs that were begun before modules were moved go on, and end as if they had never stopped.

`fixtures/make.py` tells how they were made: one was stopped in the search, one in converge, each in
the second epoch of that phase.
"""

import json
import lzma
import runpy
import sys
import tarfile

from frozen import FIXTURES, RUN_CONFIG, load_main
import numpy as np
from PIL import Image
import pytest
from runs import check_same_end, contents, without_times

import dhp_jax as dhp
from dhp_jax.config import check
from dhp_jax.workdir.identity import stored_config

PHASES = ("search", "converge")
CONFIG = f"--config={RUN_CONFIG}"
DIGIT = (8, 8, 1)
TARGET = 0.6
ADDED = ("test_examples",)  # notes of a saved network that are newer than the fixtures


@pytest.fixture(scope="module")
def main():
    return load_main()


@pytest.fixture(scope="module")
def undisturbed(compiled_as_for_users, main, tmp_path_factory):
    """The directory of the same run, never stopped."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(CONFIG, f"--workdir={workdir}") == 0
    return workdir


def unpack(phase, folder):
    """The directory of the run that was stopped in a phase."""
    workdir = folder / "moved" / "run"
    with lzma.open(FIXTURES / f"run_{phase}.tar.xz") as file, tarfile.open(fileobj=file) as archive:
        archive.extractall(workdir, filter="data")
    return workdir


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def run_module(monkeypatch, name, *arguments):
    """The exit code of `python -m name`."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_module(name, run_name="__main__")
    except SystemExit as ended:
        return ended.code or 0
    return 0


def steps_of(found):
    """The steps of each phase that records are of."""
    return {name: [r["step"] for r in found if r["phase"] == name] for name in PHASES}


def go_on(main, workdir, phase):
    """Ends a half-finished run; checks that it went on. Returns its networks of before."""
    done, before = records(workdir), contents(workdir)
    assert main(CONFIG, f"--workdir={workdir}", "--config.checkpoint.keep=2") == 0
    found = records(workdir)
    steps = [record.pop("total_step") for record in found]  # which the fixture does not have
    assert found[: len(done)] == done
    assert steps == sorted(steps)
    networks = [path for path in before if path.parent in (workdir / "search", workdir / "pruned")]
    assert len(networks) == (4 if phase == "converge" else 0)
    for path in networks:
        assert path.read_bytes() == before[path], path
    return {path.parent.name for path in networks}


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize("phase", [pytest.param("search", marks=pytest.mark.slow), "converge"])
def test_a_half_finished_run_goes_on_and_ends_within_its_budget(main, tmp_path, capfd, phase):
    workdir = unpack(phase, tmp_path)
    go_on(main, workdir, phase)
    assert str(workdir / "report.html") in capfd.readouterr().out
    config = json.loads((workdir / "config.json").read_text())
    last = steps_of(records(workdir))["converge"][-1]
    assert last == config["converge"]["epochs"] * (1297 // config["batch_size"])
    model = dhp.load(workdir / "model")
    whole = dhp.measure_cost(dhp.load(workdir / "search"), DIGIT)
    assert dhp.measure_cost(model, DIGIT).flops <= TARGET * whole.flops


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_half_finished_run_ends_like_one_that_was_never_stopped(
    main, undisturbed, tmp_path, phase
):
    workdir = unpack(phase, tmp_path)
    done = records(workdir)
    networks = go_on(main, workdir, phase)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.keys() == json.loads((undisturbed / "summary.json").read_text()).keys()
    expected = records(undisturbed)
    assert steps_of(records(workdir))["converge"] == steps_of(expected)["converge"]
    if without_times(done) != without_times(expected[: len(done)]):
        pytest.skip("this processor rounds otherwise than that of the fixture")
    assert steps_of(records(workdir)) == steps_of(expected)
    check_same_end(workdir, undisturbed, dict.fromkeys(networks, ADDED))


@pytest.mark.parametrize("phase", PHASES)
def test_a_half_finished_run_is_one_of_its_configuration(main, tmp_path, capfd, phase):
    workdir = unpack(phase, tmp_path)
    before = contents(workdir)
    assert main(CONFIG, f"--workdir={workdir}", "--config.search.strength=0.4") == 2
    told = "config.search.strength is 0.2 there and 0.4 here"
    assert told in capfd.readouterr().err
    assert contents(workdir) == before


def test_the_configuration_of_earlier_code_has_every_field(tmp_path):
    found = stored_config(unpack("search", tmp_path))
    check(found)
    assert found.search.strength == 0.2
    assert found.task.label_smoothing == 0


def test_commands_read_a_half_finished_run(tmp_path, monkeypatch, capfd):
    workdir = unpack("converge", tmp_path)
    assert run_module(monkeypatch, "dhp_jax.report", workdir) == 0
    assert str(workdir / "report.html") in capfd.readouterr().out
    assert "<svg" in (workdir / "report.html").read_text()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "digit.png")
    image = tmp_path / "digit.png"
    assert run_module(monkeypatch, "dhp_jax.predict", workdir, image, "--which=pruned") == 0
    assert capfd.readouterr().out.startswith(f"{image}: ")
    out = tmp_path / "arrays.safetensors"
    options = ("--which=search", "--format=safetensors", f"--out={out}")
    assert run_module(monkeypatch, "dhp_jax.export", workdir, *options) == 0
    assert out.exists()
