"""What a run tells before it begins."""

from pathlib import Path
import re
import runpy
import shutil

from runs import of_digits

from dhp_jax.budgets.timing import hardware
from dhp_jax.pipeline import targets
from dhp_jax.pipeline.header import header

CONFIG = Path(__file__).parents[2] / "experiments/configs/digits_resnet20.py"


def unwrapped(text):
    """Without the ends of lines that continue below their label."""
    return re.sub(r"\n {11}", " ", text)


def test_the_header_tells_network_data_budget_device_directory_and_what_comes(tmp_path):
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.targets = (0.7, 0.5)
    config.budget.params = 0.6
    runs = targets.prepare(config, tmp_path / "run")
    lines = dict(line.split(maxsplit=1) for line in unwrapped(header(runs)).splitlines())
    cost = runs[0].cost
    assert lines["network"] == (f"ResNet-20: {cost.flops:,} FLOPs, {cost.params:,} params")
    assert lines["data"] == "digits: 1,297 examples of 8x8x1 in an epoch; 500 for test"
    assert lines["budget"] == (
        "70 % of the FLOPs and 60 % of the params; 50 % of the FLOPs and 60 % of the params"
    )
    assert lines["directory"] == f"{tmp_path}/run/0.7, {tmp_path}/run/0.5"
    assert lines["next"] == (
        f"0.7: a search of at most {config.search.epochs} epochs, "
        f"then training of the pruned network, {config.converge.epochs} epochs"
    )
    config.targets = None
    config.search.max_steps = config.converge.max_steps = 50
    config.data.validation = 0.1
    config.budget.batch = 64
    assert "batch" not in lines
    told = header(targets.prepare(config, tmp_path / "quick"))
    assert all(len(line) <= 80 or str(tmp_path) in line for line in told.splitlines())
    told = unwrapped(told)
    assert "digits: 1,167 examples of 8x8x1 in an epoch; 130 for validation; 500 for test" in told
    assert "\nbatch      config.budget.batch=64 times nothing without config.budget.latency" in told
    assert told.endswith(
        "a search of at most 50 steps, then training of the pruned network, 50 steps"
    )
    assert lines["device"] == hardware()


def test_the_header_tells_drops_that_come_after_the_end_of_their_phase(tmp_path):
    fields = {"converge.epochs": 3, "search.drops": (1.5,), "baseline.drops": (9,)}
    fields["converge.drops"] = (2.5, 3, 225.0)
    told = unwrapped(header(targets.prepare(of_digits(**fields), tmp_path / "run")))
    assert re.findall("^drops +(.*)$", told, re.MULTILINE) == [
        "converge.drops 3, 225 come after converge.epochs=3 and do nothing; "
        "converge.schedule=cosine suits any length"
    ]
    fields["converge.schedule"] = "cosine"
    assert "converge.drops" not in header(targets.prepare(of_digits(**fields), tmp_path / "run2"))


def next_of(runs):
    return unwrapped(header(runs)).splitlines()[-1].removeprefix("next").strip()


def test_the_header_names_only_phases_that_are_left(finished, tmp_path):
    there = shutil.copytree(finished, tmp_path / "run")
    runs = targets.prepare(of_digits(), there)
    assert next_of(runs) == "nothing is left to be trained; the report is written again"
    runs[0].config.converge.epochs = 3
    assert next_of(runs) == "training of the pruned network, 3 epochs"
    runs[0].config.converge.epochs = 1
    path = there / "model/model.json"
    path.write_bytes(path.read_bytes()[:-100])
    assert next_of(runs) == "training of the pruned network, 1 epoch"
    shutil.rmtree(there / "search")
    assert next_of(runs).startswith("a search of at most ")
    runs[0].config.method = "fade"  # whose search takes all of its steps
    assert re.match(r"a search of \d+ epochs, then training of ", next_of(runs))
