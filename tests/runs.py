"""A run of seconds that several test modules share: a small ResNet-20 on digits."""

import json
import os
from pathlib import Path
import runpy
import subprocess
import sys

from dhp_jax import journal, pipeline

CONFIG = Path(__file__).parents[1] / "experiments/configs/digits_resnet20.py"
FIELDS = {
    "model.width": 0.25,
    "log_every": 10,
    "search.epochs": 2,
    "search.strength": 0.3,  # meets the budget within these epochs
    "search.min_channels": 1,
    "converge.epochs": 1,
    "baseline.epochs": 1,
}


NETWORKS = ("search", "pruned", "best", "model")
ROOT = Path(__file__).parents[1]


def carry_out(workdir):
    """Carries the run out in a directory."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.update_from_flattened_dict(FIELDS)
    pipeline.execute(pipeline.prepare(config, workdir))


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


def check_same_end(workdir, expected):
    """Two finished runs have left the same, bit for bit, but for what the clock says."""
    for name in NETWORKS:
        of_both = (folder / name / "arrays.safetensors" for folder in (workdir, expected))
        again, once = (path.read_bytes() for path in of_both)
        assert again == once, name
        of_both = (without_times(description(folder / name)) for folder in (workdir, expected))
        again, once = of_both
        assert again == once, name
    of_both = (journal.read(folder / journal.RECORDS) for folder in (workdir, expected))
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
