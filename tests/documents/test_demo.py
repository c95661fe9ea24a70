"""What the demos promise, run in full: a few minutes each."""

from pathlib import Path
import runpy

import pytest

from dhp_jax.pipeline.execution import execute
from dhp_jax.pipeline.preparation import prepare

CONFIGS = Path(__file__).parents[2] / "experiments/configs"
pytestmark = pytest.mark.slow


def demo(name, workdir):
    """The summary of a demo: the baseline, then the pruned network."""

    def run(method):
        config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
        config.method = method
        prepared = prepare(config, workdir / method)
        return execute(prepared, baseline=workdir / "baseline")

    run("baseline")
    return run("dhp")


def test_half_the_flops_cost_at_most_one_and_a_half_points_of_error(tmp_path):
    summary = demo("digits_resnet20", tmp_path)
    epochs = sum(phase["epochs"] for phase in summary["phases"].values())
    assert 0.49 <= summary["flops"]["ratio"] <= 0.5
    assert summary["phases"]["search"]["met_budget"]
    assert epochs <= summary["unpruned_epochs"]
    test = summary["test"]
    assert test["last"]["error"] <= test["unpruned"]["error"] + 0.015


@pytest.mark.parametrize(("name", "gain"), [("photographs_dncnn", 10.0), ("photographs_edsr", 0.8)])
def test_restoration_beats_its_input_and_pruning_costs_little(name, gain, tmp_path):
    summary = demo(name, tmp_path)
    test = {what: metrics["psnr"] for what, metrics in summary["test"].items()}
    assert test["unpruned"] > test["without_network"] + gain
    assert test["last"] > test["unpruned"] - 0.3
    assert 0.59 <= summary["flops"]["ratio"] <= 0.6
    assert (tmp_path / "dhp/plots/crops.png").is_file()
