"""What `make demo` promises, run in full: a few minutes."""

from pathlib import Path
import runpy

import pytest

from dhp_jax import pipeline

CONFIG = Path(__file__).parents[1] / "experiments/configs/digits_resnet20.py"


@pytest.mark.slow
def test_half_the_flops_cost_at_most_one_and_a_half_points_of_error(tmp_path):
    def run(method):
        config = runpy.run_path(str(CONFIG))["get_config"]()
        config.method = method
        prepared = pipeline.prepare(config, tmp_path / method)
        return pipeline.execute(prepared, baseline=tmp_path / "baseline")

    run("baseline")
    summary = run("dhp")
    epochs = sum(phase["epochs"] for phase in summary["phases"].values())
    assert 0.49 <= summary["flops"]["ratio"] <= 0.5
    assert summary["phases"]["search"]["met_budget"]
    assert epochs <= summary["unpruned_epochs"]
    test = summary["test"]
    assert test["last"]["error"] <= test["unpruned"]["error"] + 0.015
