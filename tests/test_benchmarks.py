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
from run import BENCHMARKS, run  # noqa: E402
from zoo import NETWORKS  # noqa: E402

PARTS = ("construct_s", "trace_s", "compile_s", "first_step_s")


def begin(name, *arguments):
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of the benchmarks' results, and what each has printed."""
    folder = tmp_path_factory.mktemp("results") / "inner"
    running = {name: begin(name, "--quick", "--out", folder) for name in BENCHMARKS}
    printed = {}
    for name, process in running.items():
        printed[name], errors = process.communicate()
        assert process.returncode == 0, errors
    return folder, printed


@pytest.mark.parametrize("name", BENCHMARKS)
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


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_table_of_a_benchmark_has_a_row_for_each_network(results, name):
    folder, printed = results
    header, ruler, *rows = printed[name].strip().splitlines()
    assert len(rows) == len(json.loads((folder / f"{name}.json").read_text())["rows"])
    assert len(rows) == {"pruned": 4, "widths": 3}.get(name, 1)
    assert all(row.startswith(("| ResNet-20 | ", "| geometric mean | ")) for row in rows)
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


def test_the_benchmark_of_pruned_networks_relates_speed_to_the_ideal(results):
    rows = json.loads((results[0] / "pruned.json").read_text())["rows"]
    assert [(row["batch"], row["multiple_of"]) for row in rows] == [(1, 1), (1, 2), (4, 1), (4, 2)]
    for row in rows:
        assert 0.4 < row["flops_ratio"] <= 0.5
        assert row["share_of_ideal"] == row["speedup"]["median"] * row["flops_ratio"]
        for name in ("whole_ms", "pruned_ms", "images_per_second", "speedup"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]


def test_the_benchmark_of_widths_relates_rounded_networks_to_any_width(results):
    *rows, mean = json.loads((results[0] / "widths.json").read_text())["rows"]
    assert [(row["batch"], row["multiple_of"]) for row in rows] == [(1, 2), (4, 2)]
    for row in rows:
        assert 0.4 < row["flops_ratio"] <= 0.5
        assert 0 < row["time"]["low"] <= row["time"]["median"] <= row["time"]["high"]
    times = [row["time"]["median"] for row in rows]
    assert mean["mean"] == pytest.approx((times[0] * times[1]) ** 0.5)
    assert (mean["multiple_of"], mean["dtype"], mean["of"]) == (2, "float32", 2)


@pytest.mark.slow
def test_pruned_networks_are_timed_in_onnxruntime(tmp_path):
    for package in ("jax2onnx", "onnxruntime"):
        pytest.importorskip(package)
    process = begin("pruned", "--quick", "--runtime=onnxruntime", "--out", tmp_path)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    rows = json.loads((tmp_path / "pruned_onnxruntime.json").read_text())["rows"]
    assert [(row["batch"], row["multiple_of"]) for row in rows] == [(1, 1), (1, 2), (4, 1), (4, 2)]
    text = (tmp_path / "pruned_onnxruntime.md").read_text()
    assert printed.strip() in text
    assert "in onnxruntime" in text.splitlines()[0]


def test_the_input_benchmark_relates_what_is_given_to_what_is_taken(results):
    (row,) = json.loads((results[0] / "input.json").read_text())["rows"]
    assert row["consumed_per_second"] == pytest.approx(4e3 / row["step_ms"]["median"])
    assert all(name in row for name in ("share", "input_ms"))
    for streamed in row["streamed"].values():
        assert streamed["images_per_second"] > 0
        assert 0 <= streamed["waiting"] <= 1


def test_a_search_step_needs_little_more_memory_than_training_cannot_do_without(results):
    (row,) = json.loads((results[0] / "memory.json").read_text())["rows"]
    parts = ("parameters", "optimizer", "gradients", "activations")
    assert row["ratio"] == row["peak_bytes"] / sum(row[f"{part}_bytes"] for part in parts)
    assert row["peak_bytes"] > row["parameters_bytes"] + row["optimizer_bytes"]
    assert row["ratio"] <= 1.25


def test_four_devices_exchange_the_gradients_and_the_batchnorm_statistics_once(results):
    (row,) = json.loads((results[0] / "scaling.json").read_text())["rows"]
    assert row["devices"] == 4
    assert list(row["operations"]) == ["all-reduce"]
    assert 0 <= row["exchanged_bytes"] - row["needed_bytes"] <= 16  # the loss, the errors
    assert row["host_transfers"] == 0
    assert all(0 < share < 1 for share in row["efficiency"].values())


def test_a_benchmark_that_fails_is_told_and_stops_no_other(tmp_path, capfd):
    fails, works = tmp_path / "fails.py", tmp_path / "works.py"
    fails.write_text("raise SystemExit(3)")
    works.write_text("import sys; print(*sys.argv[1:])")
    assert run([fails, works], ["--quick"]) == ["fails"]
    assert capfd.readouterr().out.split() == ["fails", "works", "--quick"]


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("step", ["--rounds=0"], "--rounds: expected a positive integer, got '0'"),
        ("pruned", ["--flops", "1.5"], "--flops: expected a number between 0 and 1, got '1.5'"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(name, arguments, told):
    process = begin(name, *arguments)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.splitlines()[-1] == f"{name}.py: error: argument {told}"


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


@pytest.mark.parametrize("name", ["resnet20", "resnet110", "mobilenet_v2", "srresnet_x4", "dncnn"])
def test_the_networks_of_the_pytorch_comparison_have_as_many_numbers_as_ours(name):
    pytest.importorskip("torch")
    torch_search = importlib.import_module("torch_search")
    network = NETWORKS[name]
    assert torch_search.can_build(network)
    theirs = sum(p.numel() for p in torch_search.build(network).parameters())
    model = dhp.models.build_abstract(network.family, **network.arguments)
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(p.size for p in params) == theirs
