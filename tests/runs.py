"""A run of seconds that several test modules share: a small ResNet-20 on digits."""

import json
from pathlib import Path
import runpy

from dhp_jax import pipeline

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
