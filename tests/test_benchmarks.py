"""The benchmarks run, and write what a reader needs to judge and repeat them."""

import importlib
import importlib.metadata
import json
from pathlib import Path
import subprocess
import sys

from flax import nnx
import jax
import pytest

import dhp_jax as dhp
from dhp_jax.report import hardware

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from zoo import NETWORKS  # noqa: E402

PARTS = ("construct_s", "trace_s", "compile_s", "first_step_s")
NAMES = ("step", "compile", "latency", "checkpoint")


def begin(name, *arguments):
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of the benchmarks' results, and what each has printed."""
    folder = tmp_path_factory.mktemp("results") / "inner"
    running = {name: begin(name, "--quick", "--out", folder) for name in NAMES}
    printed = {}
    for name, process in running.items():
        printed[name], errors = process.communicate()
        assert process.returncode == 0, errors
    return folder, printed


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_tells_on_what_it_ran_and_how_to_repeat_it(results, name):
    folder, printed = results
    about = json.loads((folder / f"{name}.json").read_text())["about"]
    assert about["hardware"] == hardware()
    assert about["versions"]["jax"] == importlib.metadata.version("jax")
    assert about["command"] == f"python benchmarks/{name}.py --quick --out {folder}"
    text = (folder / f"{name}.md").read_text()
    assert text.startswith("# ")
    assert printed[name].strip() in text
    for part in (about["hardware"], f"jax {about['versions']['jax']}", about["date"]):
        assert part in text
    assert text.endswith(f"\n    {about['command']}\n")


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_a_benchmark_has_a_row_for_each_network(results, name):
    folder, printed = results
    header, ruler, *rows = printed[name].strip().splitlines()
    assert len(rows) == len(json.loads((folder / f"{name}.json").read_text())["rows"])
    assert len(rows) == (2 if name == "latency" else 1)
    assert all(row.startswith("| ResNet-20 | ") for row in rows)
    assert len({line.count("|") for line in (header, ruler, *rows)}) == 1


def test_the_step_benchmark_gives_medians_and_quartiles(results):
    (row,) = json.loads((results[0] / "step.json").read_text())["rows"]
    assert (row["batch"], row["rounds"]) == (4, 3)
    for name in ("search_ms", "plain_ms", "search_to_plain"):
        assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]


def test_the_checkpoint_benchmark_relates_what_is_lost_to_the_time_between_two(results):
    (row,) = json.loads((results[0] / "checkpoint.json").read_text())["rows"]
    assert row["share"] == row["lost_s"] / row["apart_s"]
    assert row["apart_s"] >= 60
    assert min(row["waited_s"], row["written_s"]) > 0


def test_the_compile_benchmark_gives_seconds_of_each_part(results):
    (row,) = json.loads((results[0] / "compile.json").read_text())["rows"]
    assert (row["network"], row["batch"]) == ("ResNet-20", 4)
    assert all(row[name] > 0 for name in PARTS)
    assert row["total_s"] >= sum(row[name] for name in PARTS)
    network = NETWORKS["resnet20"].build(width=0.25)
    floats = sum(array.size for array in jax.tree.leaves(nnx.state(network, nnx.Param)))
    assert row["state_bytes"] > 2 * 4 * floats  # the momentum is as large


def test_the_latency_benchmark_gives_the_speed_up_of_each_batch(results):
    rows = json.loads((results[0] / "latency.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 4]
    for row in rows:
        assert 0.48 < row["flops_ratio"] <= 0.5
        for name in ("whole_ms", "small_ms", "speedup"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]


def test_the_onnx_benchmark_gives_the_speed_up_of_each_batch_and_rounding(tmp_path):
    for package in ("jax2onnx", "onnxruntime"):
        pytest.importorskip(package)
    process = begin("latency_onnx", "--quick", "--out", tmp_path)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    rows = json.loads((tmp_path / "latency_onnx.json").read_text())["rows"]
    assert [(row["batch"], row["multiple_of"]) for row in rows] == [(1, 1), (1, 8), (4, 1), (4, 8)]
    for row in rows:
        assert 0.48 < row["flops_ratio"] <= 0.5
        for name in ("whole_ms", "small_ms", "speedup"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
    assert printed.strip() in (tmp_path / "latency_onnx.md").read_text()


@pytest.mark.parametrize(
    ("task", "model", "network", "last", "best", "metric", "shown"),
    [
        (
            "classification",
            {"name": "resnet", "depth": 20},
            "resnet 20",
            {"loss": 0.31, "error": 0.0846},
            {"loss": 0.33, "error": 0.0821},
            "error",
            "8.46 % | 8.21 %",
        ),
        (
            "super_resolution",
            {"name": "srresnet", "blocks": 16},
            "srresnet",
            {"psnr": 27.516, "ssim": 0.75412},
            {"psnr": 27.544, "ssim": 0.7551},
            "PSNR",
            "27.52 dB, SSIM 0.7541 | 27.54 dB, SSIM 0.7551",
        ),
    ],
)
def test_finished_runs_are_put_side_by_side(
    tmp_path, task, model, network, last, best, metric, shown
):
    run = tmp_path / "resnet20"
    run.mkdir()
    summary = {
        "method": "dhp",
        "task": {"name": task},
        "model": model,
        "seed": 3,
        "test": {"last": last, "best": best},
        "flops": {"ratio": 0.4987},
        "params": {"ratio": 0.5613},
        "phases": {"search": {"epochs": 41}, "converge": {"epochs": 300}},
        "seconds": 1234.5,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.json").write_text(json.dumps({"batch_size": 64}))
    out = tmp_path / "out"
    process = begin("runs", run, "--name=cifar", "--title=Two runs", "--out", out)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    row = f"| {network} | dhp | 3 | 41 + 300 | 49.87 % | 56.13 % | {shown} | 1234 |"
    header, _, found = printed.splitlines()
    assert f"| test {metric}, last | best |" in header
    assert found == row
    (written,) = json.loads((out / "cifar.json").read_text())["rows"]
    assert written == {"run": "resnet20", "config": {"batch_size": 64}, **summary}
    text = (out / "cifar.md").read_text()
    assert text.startswith("# Two runs\n")
    assert row in text


@pytest.mark.parametrize("name", ["resnet20", "resnet110", "dncnn"])
def test_the_networks_of_the_pytorch_comparison_have_as_many_numbers_as_ours(name):
    pytest.importorskip("torch")
    torch_search = importlib.import_module("torch_search")
    network = NETWORKS[name]
    assert torch_search.can_build(network)
    theirs = sum(p.numel() for p in torch_search.build(network).parameters())
    model = dhp.models.build_abstract(network.family, **network.arguments)
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(p.size for p in params) == theirs
