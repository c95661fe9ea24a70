"""A run of seconds that several test modules share: a small ResNet-20 on digits."""

import contextlib
import json
import logging
import os
from pathlib import Path
import runpy
import subprocess
import sys

from networks import RNGS, drawn_masks, filled, thin_resnet
import pytest

import dhp_jax as dhp
from dhp_jax import cli
from dhp_jax.budgets.selection import choose
from dhp_jax.core.surgery import prune as cut
from dhp_jax.pipeline.execution import execute
from dhp_jax.pipeline.preparation import prepare
from dhp_jax.pipeline.setup import set_up
from dhp_jax.report import text, write
from dhp_jax.workdir import metrics as workdir_metrics

CONFIG = Path(__file__).parents[2] / "experiments/configs/digits_resnet20.py"
FIELDS = {
    "model.depth": 8,
    "model.width": 0.25,
    "multiple_of": 1,
    "log_every": 10,
    "search.epochs": 2,
    "search.strength": 0.3,  # meets the budget within these epochs
    "search.min_channels": 1,
    "converge.epochs": 1,
    "converge.drops": (0.5,),
    "baseline.epochs": 1,
}


NETWORKS = ("search", "pruned", "best", "model")
WARNINGS = "warnings.txt"  # of the run that test modules share, beside its directory
ROOT = Path(__file__).parents[2]


class Stop(Exception):
    """The power goes."""


class Interrupter:
    """Stops a run at a step of a phase; step 0 is its beginning."""

    def __init__(self, phase, step):
        self.phase, self.left = phase, step

    def begin(self, phase, steps, done, records):
        self.here = phase == self.phase
        if self.here and self.left == 0:
            raise Stop

    def step(self, count):
        self.left -= count * self.here
        if self.here and self.left == 0:
            raise Stop

    def record(self, values):
        pass

    def end(self):
        pass


def of_digits(**fields):
    """The configuration of the run, with other values of some fields."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.update_from_flattened_dict(FIELDS | fields)
    return config


def leave_no_pages(monkeypatch):
    """Runs leave a summary without latencies, an empty page, and no plots."""
    monkeypatch.setattr(write, "latency", lambda result: None)
    monkeypatch.setattr(write, "run_charts", lambda run: {})
    monkeypatch.setattr(write, "crops", lambda result, baseline: [])
    monkeypatch.setattr(write, "page", lambda run, charts, pictures: "")


def leave_pages_alone(monkeypatch):
    """Runs leave pages without latencies and drawings, and no plots."""
    monkeypatch.setattr(write, "latency", lambda result: None)
    monkeypatch.setattr(write, "run_charts", lambda run: {})


def carry_out(workdir, observers=(), **fields):
    """Carries the run out in a directory, with other values of some fields."""
    execute(prepare(of_digits(**fields), workdir, observers))


@contextlib.contextmanager
def noted_warnings(path):
    """Writes what the library warns of in the block to a file."""
    handler, library = logging.FileHandler(path), logging.getLogger("dhp_jax")
    handler.setLevel(logging.WARNING)
    library.addHandler(handler)
    yield
    library.removeHandler(handler)
    handler.close()


def summary_text(summary, missing=""):
    """What a run with a summary prints at its end."""
    return text.text("run", summary, missing)


def leave(workdir):
    """Puts a configuration and the networks of a run into a folder; they have learnt nothing."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    (workdir / "config.json").write_text(config.to_json())
    model = thin_resnet(channels=1)
    noted = set_up(config)
    for name in ("best", "model"):
        small = cut(model, drawn_masks(model, len(name)))
        dhp.save(workdir / name, small, input_shape=noted.input_shape, **noted.notes)


def leave_source(workdir, method):
    """What another run needs of a finished one of a method; its networks have learnt nothing."""
    run = prepare(of_digits(method=method), workdir)
    arguments = {**run.config.model, "min_channels": 1, **run.setup.arguments}
    family, shape = arguments.pop("name"), run.setup.input_shape
    model = filled(lambda _: dhp.models.build(family, rngs=RNGS, **arguments))
    noted = {"phase": {"epochs": 1, "steps": 20, "met_budget": False}, "made_from": ""}
    if method == "baseline":
        dhp.save(workdir / "model", dhp.prune(model), input_shape=shape, **noted)
        return
    chosen = choose(model, run.cost, flops=0.5)
    dhp.save(workdir / "search", model, input_shape=shape, **noted)
    for name in ("pruned", "model"):
        small = cut(model, chosen.masks)
        dhp.save(workdir / name, small, input_shape=shape, budget=chosen.notes(), **noted)


def contents(folder):
    """Every file under a folder with its bytes."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def description(path):
    """What a saved network says of itself."""
    return json.loads((path / "model.json").read_text())


def without_times(value):
    """JSON values without the clock's."""
    if isinstance(value, dict):
        timed = ("seconds", "examples_per_second", "latency")
        return {k: without_times(v) for k, v in value.items() if k not in timed}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def check_same_end(workdir, expected, added=None):
    """Two finished runs have left the same, bit for bit, but for what the clock says.

    `added` has, for each network of `workdir` that earlier code saved, the notes that this code
    adds: they are in the description of the expected network only.
    """
    names = sorted(path.parent.name for path in expected.glob("*/model.json"))
    assert names == sorted(path.parent.name for path in workdir.glob("*/model.json"))
    for name in names:
        of_both = (folder / name / "arrays.safetensors" for folder in (workdir, expected))
        again, once = (path.read_bytes() for path in of_both)
        assert again == once, name
        of_both = (without_times(description(folder / name)) for folder in (workdir, expected))
        again, once = of_both
        for note in (added or {}).get(name, ()):
            assert note not in again["notes"], (name, note)
            del once["notes"][note]
        assert again == once, name
    of_both = (
        workdir_metrics.read(folder / workdir_metrics.RECORDS) for folder in (workdir, expected)
    )
    again, once = (without_times(records) for records in of_both)
    assert again == once
    of_both = (json.loads((folder / "summary.json").read_text()) for folder in (workdir, expected))
    again, once = (without_times(summary) for summary in of_both)
    assert again == once


def begin(workdir, *options, **fields):
    """The same run, begun as a process of its own."""
    fields = {**FIELDS, "checkpoint.seconds": 0, **fields}
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    return subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "experiments/main.py"), f"--config={CONFIG}"),
            *(f"--workdir={workdir}", *arguments, *options),
        ],
        env=os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def commanded(capsys, main, name, *arguments):
    """The exit code of a command of the library, and what it printed to each stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            code = cli.run(main)
        except SystemExit as left:
            code = left.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# What a summary says of the unpruned network.
UNPRUNED = {
    "test": {"last": {"loss": 0.3, "error": 0.0846}, "best": {"loss": 0.2, "error": 0.08}},
    "phases": {
        "baseline": {
            "epochs": 300,
            "steps": 9000,
            "seconds": 7.0,
            "met_budget": False,
            "best_epoch": 9,
        }
    },
}
