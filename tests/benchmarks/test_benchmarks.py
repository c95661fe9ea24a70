"""The benchmarks run, and write what a reader needs to judge and repeat them."""

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
import runpy
import subprocess
import sys

from flax import nnx
import jax
import pytest

import dhp_jax as dhp
from dhp_jax.budgets.timing import hardware
from dhp_jax.export import export

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import large  # noqa: E402
import methods  # noqa: E402
from record import publish_each  # noqa: E402
from run import BENCHMARKS, run  # noqa: E402
from zoo import NETWORKS, QUICK  # noqa: E402

PARTS = ("construct_s", "trace_s", "compile_s", "first_step_s")


OF_PROGRAMS = (
    "memory",
    "scaling",
    "compiled",
)  # what they tell is of programs as they are optimized


def begin(name, *arguments):
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, arguments)]
    fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(name not in OF_PROGRAMS)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | fast, text=True, **pipes)


def output_of(name, *arguments):
    """What a benchmark has printed that came to its end."""
    process = begin(name, *arguments)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return printed


def called(capsys, name, *arguments):
    """The exit code of a benchmark that is run in this process, and what it printed."""
    arguments = [f"{name}.py", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        try:
            runpy.run_path(str(ROOT / f"benchmarks/{name}.py"), run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("name", ["methods", "hypernetworks", "beside_torch_pruning", "runs"])
def test_the_help_of_a_benchmark_fits_in_80_columns(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = called(capsys, name, "--help")
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 80


# What they call is called by others too.
SLOW = ("compile", "widths", "checkpoint", "pruned", "input", "scaling", "memory")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in BENCHMARKS]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function of a benchmark's name: the folder of its results, and what it has printed."""
    folder = tmp_path_factory.mktemp("results") / "inner"

    @functools.cache
    def of(name):
        printed = output_of(name, "--quick", "--out", folder)
        return folder, printed

    return of


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_tells_on_what_it_ran_and_how_to_repeat_it(results, name):
    folder, printed = results(name)
    about = json.loads((folder / f"{name}.json").read_text())["about"]
    assert about["hardware"] == hardware()
    assert about["versions"]["jax"] == importlib.metadata.version("jax")
    assert about["command"] == f"python benchmarks/{name}.py --quick --out {folder}"
    text = (folder / f"{name}.md").read_text()
    assert text.startswith("# ")
    assert printed.strip() in text
    for part in (about["hardware"], f"jax {about['versions']['jax']}", about["date"]):
        assert part in text
    assert text.endswith(f"\n    {about['command']}\n")


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_a_benchmark_has_a_row_for_each_network(results, name):
    folder, printed = results(name)
    header, ruler, *rows = printed.strip().splitlines()
    assert len(rows) == len(json.loads((folder / f"{name}.json").read_text())["rows"])
    assert len(rows) == {"pruned": 4, "widths": 3}.get(name, 1)
    assert all(row.startswith(("| ResNet-8 | ", "| geometric mean | ")) for row in rows)
    assert len({line.count("|") for line in (header, ruler, *rows)}) == 1


def test_the_step_benchmark_gives_medians_and_quartiles(results):
    (row,) = json.loads((results("step")[0] / "step.json").read_text())["rows"]
    assert (row["batch"], row["rounds"]) == (4, 3)
    for name in ("search_ms", "plain_ms", "search_to_plain"):
        assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]


@pytest.mark.slow
def test_the_step_of_a_search_from_trained_weights_is_compared_with_a_plain_one(tmp_path):
    printed = output_of("step", "--quick", "--trained", "--out", tmp_path)
    (row,) = json.loads((tmp_path / "step_trained.json").read_text())["rows"]
    ratio = row["trained_to_plain"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert f"{ratio['median']:.3f} (" in printed.splitlines()[-1].split("|")[-2]


@pytest.mark.slow
def test_the_checkpoint_benchmark_relates_what_is_lost_to_the_time_between_two(results):
    (row,) = json.loads((results("checkpoint")[0] / "checkpoint.json").read_text())["rows"]
    assert row["share"] == row["lost_s"] / row["apart_s"]
    assert row["apart_s"] >= 60
    assert min(row["waited_s"], row["written_s"]) > 0


@pytest.mark.slow
def test_the_compile_benchmark_gives_seconds_of_each_part(results):
    (row,) = json.loads((results("compile")[0] / "compile.json").read_text())["rows"]
    assert (row["network"], row["batch"]) == ("ResNet-8", 4)
    assert all(row[name] > 0 for name in PARTS)
    assert row["total_s"] >= sum(row[name] for name in PARTS)
    network = NETWORKS[QUICK].build(width=0.25)
    floats = sum(array.size for array in jax.tree.leaves(nnx.state(network, nnx.Param)))
    assert row["state_bytes"] > 2 * 4 * floats  # the momentum is as large


@pytest.mark.slow
def test_the_benchmark_of_pruned_networks_relates_speed_to_the_ideal(results):
    rows = json.loads((results("pruned")[0] / "pruned.json").read_text())["rows"]
    assert [(row["batch"], row["multiple_of"]) for row in rows] == [(1, 1), (1, 2), (4, 1), (4, 2)]
    for row in rows:
        assert 0.4 < row["flops_ratio"] <= 0.5
        assert row["share_of_ideal"] == row["speedup"]["median"] * row["flops_ratio"]
        for name in ("whole_ms", "pruned_ms", "images_per_second", "speedup"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]


@pytest.mark.slow
def test_a_step_is_compared_with_that_of_another_commit(tmp_path):
    printed = output_of("paired", "--before=HEAD", "--quick", "--out", tmp_path)
    (row,) = json.loads((tmp_path / "paired.json").read_text())["rows"]
    assert row["after_peak_bytes"] > 0
    for name in ("after_step_ms", "step_ms_ratio", "before_compile_s", "compile_s_ratio"):
        assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
    assert printed.startswith("| network | step, ms | ratio | ")


def test_a_commit_that_is_not_there_is_told(capsys):
    code, _, errors = called(capsys, "paired", "--before=nowhere")
    assert code == 2
    assert errors.endswith("--before: expected a commit of this repository, got 'nowhere'\n")


@pytest.mark.slow
def test_the_benchmark_of_widths_relates_rounded_networks_to_any_width(results):
    *rows, mean = json.loads((results("widths")[0] / "widths.json").read_text())["rows"]
    assert [(row["batch"], row["multiple_of"]) for row in rows] == [(1, 2), (4, 2)]
    for row in rows:
        assert 0.4 < row["flops_ratio"] <= 0.5
        assert 0 < row["time"]["low"] <= row["time"]["median"] <= row["time"]["high"]
    times = [row["time"]["median"] for row in rows]
    assert mean["mean"] == pytest.approx((times[0] * times[1]) ** 0.5)
    assert (mean["multiple_of"], mean["dtype"], mean["of"]) == (2, "float32", 2)


@pytest.mark.onnx
@pytest.mark.slow
def test_pruned_networks_are_timed_in_onnxruntime(tmp_path):
    printed = output_of("pruned", "--quick", "--runtime=onnxruntime", "--out", tmp_path)
    rows = json.loads((tmp_path / "pruned_onnxruntime.json").read_text())["rows"]
    assert [(row["batch"], row["multiple_of"]) for row in rows] == [(1, 1), (1, 2), (4, 1), (4, 2)]
    text = (tmp_path / "pruned_onnxruntime.md").read_text()
    assert printed.strip() in text
    assert "in onnxruntime" in text.splitlines()[0]


@pytest.mark.onnx
@pytest.mark.slow
def test_exported_files_are_timed_in_turn(tmp_path):
    model = NETWORKS[QUICK].build(width=0.5, min_channels=1)
    networks = {"full": dhp.prune(model), "small": dhp.prune_to(model, (32, 32, 3), flops=0.5)}
    for name, network in networks.items():
        notes = {"input_shape": [32, 32, 3]}
        export(network, tmp_path / f"{name}.onnx", (32, 32, 3), format="onnx", notes=notes)
    files = [tmp_path / f"{name}.onnx" for name in networks]
    printed = output_of("onnx_files", *files, "--batches", 2, "--rounds", 5, "--out", tmp_path)
    full, small = json.loads((tmp_path / "onnx_files.json").read_text())["rows"]
    assert set(full["speedup"].values()) == {1}
    assert (full["file"], small["file"]) == tuple(map(str, files))
    assert printed.strip() in (tmp_path / "onnx_files.md").read_text()


@pytest.mark.slow
def test_the_input_benchmark_relates_what_is_given_to_what_is_taken(results):
    (row,) = json.loads((results("input")[0] / "input.json").read_text())["rows"]
    assert row["consumed_per_second"] == pytest.approx(4e3 / row["step_ms"]["median"])
    assert all(name in row for name in ("share", "input_ms"))
    for streamed in row["streamed"].values():
        assert streamed["images_per_second"] > 0
        assert 0 <= streamed["waiting"] <= 1


@pytest.mark.slow
def test_a_search_step_needs_little_more_memory_than_training_cannot_do_without(results):
    (row,) = json.loads((results("memory")[0] / "memory.json").read_text())["rows"]
    parts = ("parameters", "optimizer", "gradients", "activations")
    assert row["ratio"] == row["peak_bytes"] / sum(row[f"{part}_bytes"] for part in parts)
    assert row["peak_bytes"] > row["parameters_bytes"] + row["optimizer_bytes"]
    assert row["ratio"] <= 1.25


@pytest.mark.slow
def test_pruning_a_network_of_ones_own_is_told_in_seconds_and_memory(results):
    (row,) = json.loads((results("large")[0] / "large.json").read_text())["rows"]
    peaks = [row["built_gb"], *(row[f"{part}_gb"] for part in large.PARTS)]
    assert peaks == sorted(peaks)
    assert all(row[f"{part}_s"] > 0 for part in large.PARTS)
    assert 0 < row["params_left"] < row["params"]


@pytest.mark.slow
def test_four_devices_exchange_the_gradients_and_the_batchnorm_statistics_once(results):
    (row,) = json.loads((results("scaling")[0] / "scaling.json").read_text())["rows"]
    assert row["devices"] == 4
    assert list(row["operations"]) == ["all-reduce"]
    assert 0 <= row["exchanged_bytes"] - row["needed_bytes"] <= 16  # the loss, the errors
    assert row["host_transfers"] == 0
    assert all(0 < share < 1 for share in row["efficiency"].values())


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("compiled", "h200"),
        *(
            pytest.param(name, target, marks=pytest.mark.slow)
            for name, target in (("compiled", "v5e"), ("scaling", "h200"), ("scaling", "v5e"))
        ),
    ],
)
def test_programs_for_accelerators_need_their_plugin_or_are_made_without_them(
    name, target, tmp_path
):
    process = begin(name, "--quick", "--target", target, "--out", tmp_path)
    _, errors = process.communicate()
    if process.returncode == 0:  # it is installed
        (row,) = json.loads((tmp_path / f"{name}_{target}.json").read_text())["rows"]
        if name == "compiled":
            assert row["search_operations"] > row["plain_operations"] > 0
            assert row["search_host_transfers"] == 0
        else:
            assert row["exchanged_bytes"] == pytest.approx(row["needed_bytes"], rel=0.02)
    else:
        assert process.returncode == 2
        assert f"{name}.py: error: --target: expected a target whose plug-in" in errors
        if target == "h200":  # any number of processes may use it
            plugins = [f"jax_cuda{version}_plugin" for version in (12, 13)]
            assert not any(importlib.util.find_spec(plugin) for plugin in plugins)


def test_communication_is_told_of_devices_that_can_share_the_work_only(capsys):
    for arguments, told in {
        ("--devices", 512): "--devices: expected at most 256, got 512",
        ("--devices", 4, "--model", 3): "--model: expected a divisor of 4, which is one of "
        "--devices; got 3",
        ("--model", 3): "--model: expected a divisor of 4 to 256 devices, or --devices; got 3",
    }.items():
        code, _, errors = called(capsys, "scaling", *arguments)
        assert code == 2
        assert errors.endswith(f"scaling.py: error: {told}\n")


def test_a_benchmark_that_fails_is_told_and_stops_no_other(tmp_path, capfd):
    fails, works = tmp_path / "fails.py", tmp_path / "works.py"
    fails.write_text("raise SystemExit(3)")
    works.write_text("import sys; print(*sys.argv[1:])")
    assert run([fails, works], ["--quick"]) == ["fails"]
    assert capfd.readouterr().out.split() == ["fails", "works", "--quick"]


def test_a_benchmark_that_is_ended_keeps_the_rows_that_it_has_measured(tmp_path, capsys):
    def rows():
        yield {"network": "first", "ms": 1.5}
        raise KeyboardInterrupt

    def as_table(rows):
        lines = [f"| {row['network']} | {row['ms']} |" for row in rows]
        return "\n".join(["| network | ms |", "|---|---|", *lines])

    with pytest.raises(KeyboardInterrupt):
        publish_each(tmp_path, "ended", "Ended", "A note.", rows(), as_table)
    written = json.loads((tmp_path / "ended.json").read_text())
    assert written["rows"] == [{"network": "first", "ms": 1.5}]
    assert written["about"]["hardware"] == hardware()
    table = as_table(written["rows"])
    assert table in (tmp_path / "ended.md").read_text()
    assert table in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("step", ["--rounds=0"], "--rounds: expected a positive integer, got '0'"),
        ("pruned", ["--flops", "1.5"], "--flops: expected a number between 0 and 1, got '1.5'"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(capsys, name, arguments, told):
    code, _, errors = called(capsys, name, *arguments)
    assert code == 2
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
    tmp_path, capsys, task, model, network, last, best, metric, shown
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
    arguments = (run, "--name=cifar", "--title=Two runs", "--out", out)
    code, printed, errors = called(capsys, "runs", *arguments)
    assert code == 0, errors
    row = f"| {network} | dhp | 3 | 41 + 300 | 49.87 % | 56.13 % | {shown} | 1234 |"
    header, _, found = printed.splitlines()
    assert f"| test {metric}, last | best |" in header
    assert found == row
    (written,) = json.loads((out / "cifar.json").read_text())["rows"]
    assert written == {"run": "resnet20", "config": {"batch_size": 64}, **summary}
    text = (out / "cifar.md").read_text()
    assert text.startswith("# Two runs\n")
    assert row in text


EPOCHS = {"search": {"epochs": 2}, "converge": {"epochs": 3}, "baseline": {"epochs": 4}}


def leave_run(folder, method, seed, error, images=2, **fields):
    """What a finished run leaves of numbers."""
    run = folder / f"seed{seed}" / method
    run.mkdir(parents=True)
    config = {"method": method, "seed": seed, "target": 0.5, **EPOCHS, **fields}
    (run / "config.json").write_text(json.dumps(config))
    checksums = {"streamed": False, "checksums": {"train": 1, "test": images}}
    (run / "data.json").write_text(json.dumps(checksums))
    steps = {"search": 150, "converge": 400, "baseline": 600}
    phases = {
        phase: {"epochs": config[phase]["epochs"], "steps": steps[phase], "met_budget": False}
        for phase in methods.METHODS[method].phases
    }
    summary = {
        "method": method,
        "seed": seed,
        "test": {"last": {"loss": 0.5, "error": error}},
        "flops": {"ratio": 1.0 if method == "baseline" else 0.499},
        "params": {"ratio": 1.0 if method == "baseline" else 0.55},
        "origin": {"steps": 600} if method == "l1_norm" else None,
        "phases": phases,
        "latency": {"batches": [{"batch": 64, "after_ms": {"median": 10.0 + seed}}]},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_methods_are_compared_over_their_seeds(tmp_path, capsys):
    for seed, errors in enumerate([(0.10, 0.20, 0.21), (0.12, 0.22, 0.19)]):
        for method, error in zip(("baseline", "dhp", "l1_norm"), errors, strict=True):
            leave_run(tmp_path / "runs", method, seed, error)
    arguments = (tmp_path / "runs", "--out", tmp_path / "out")
    code, printed, errors = called(capsys, "methods", *arguments)
    assert code == 0, errors
    header, _, *rows = printed.splitlines()
    assert "| test error | beyond DHP, points | latency |" in header
    both = "2 | 49.90 % | 55.00 %"
    assert rows == [
        "| unpruned | 2 | 100.00 % | 100.00 % | 0 | 600 | 11.00 % (10.00 % to 12.00 %) | "
        "-10.00 (-10.00 to -10.00) | 10.5 ms (batch 64) |",
        f"| DHP | {both} | 150 | 400 | 21.00 % (20.00 % to 22.00 %) |  | 10.5 ms (batch 64) |",
        f"| \u21131 norm of filters | {both} | 600 | 400 | 20.00 % (19.00 % to 21.00 %) | "
        "-1.00 (-3.00 to +1.00) | 10.5 ms (batch 64) |",
    ]
    (_, _, row) = json.loads((tmp_path / "out/methods.json").read_text())["rows"]
    assert row["seeds"] == [0, 1]
    assert row["beyond_dhp"]["low"] == pytest.approx(-0.03)
    assert (tmp_path / "out/methods.md").read_text().startswith("# Methods at equal cost\n")


@pytest.mark.parametrize(
    ("arguments", "fields", "told"),
    [
        (
            ["--config=x.py"],
            None,
            "expected arguments of experiments/main.py such as --config=FILE",
        ),
        (["--train"], None, "and only then; got none"),
        (["--train", "--confg=x"], None, "; got --confg=x"),
        (["--train", "--config=x.py"], None, "expected --config=FILE, such as "),
        ([], None, "folder: expected runs in "),
        ([], {"converge": {"epochs": 4}}, "config.converge.epochs is 3 in "),
    ],
)
def test_methods_that_cannot_be_compared_are_told_in_one_line(
    tmp_path, monkeypatch, capsys, arguments, fields, told
):
    if fields is not None:
        leave_run(tmp_path, "dhp", 0, 0.2)
        leave_run(tmp_path, "uniform", 0, 0.2, **fields)
    monkeypatch.setattr(sys, "argv", ["methods.py", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        methods.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_has_yet_to_train_for_longer_is_not_finished(tmp_path, capsys):
    run = leave_run(tmp_path, "dhp", 0, 0.2)
    assert methods.finished(run)["seed"] == 0
    assert methods.finished(run, EPOCHS)
    assert methods.finished(run, EPOCHS | {"baseline": {"epochs": 9}})
    assert methods.finished(run, EPOCHS | {"converge": {"epochs": 5}}) is None
    leave_run(tmp_path, "uniform", 0, 0.2)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"converge": {"epochs": 5}}))
    assert list(methods.runs_in(tmp_path)) == ["uniform"]
    assert capsys.readouterr().err == f"{run}: not finished, left out\n"


def test_a_run_that_was_to_end_after_some_steps_is_finished_then(tmp_path):
    ended = {"epochs": 9, "max_steps": 400}
    run = leave_run(tmp_path, "uniform", 0, 0.2, converge=ended)
    summary = json.loads((run / "summary.json").read_text())
    summary["phases"]["converge"]["epochs"] = 3
    (run / "summary.json").write_text(json.dumps(summary))
    assert methods.finished(run)
    assert methods.finished(run, EPOCHS | {"converge": ended})
    assert methods.finished(run, EPOCHS | {"converge": {**ended, "max_steps": 401}}) is None


def test_a_search_that_met_its_budget_early_is_finished(tmp_path):
    run = leave_run(tmp_path, "dhp", 0, 0.2)
    asked = EPOCHS | {"search": {"epochs": 50}}
    assert methods.finished(run, asked) is None
    summary = json.loads((run / "summary.json").read_text())
    summary["phases"]["search"]["met_budget"] = True
    (run / "summary.json").write_text(json.dumps(summary))
    assert methods.finished(run, asked)


def test_epochs_are_compared_between_runs_that_train_the_phase(tmp_path):
    leave_run(tmp_path, "baseline", 0, 0.1)
    leave_run(tmp_path, "dhp", 0, 0.2, converge={"epochs": 5})
    leave_run(tmp_path, "uniform", 0, 0.2, converge={"epochs": 5})
    assert list(methods.runs_in(tmp_path)) == ["baseline", "dhp", "uniform"]
    leave_run(tmp_path, "random", 0, 0.2)
    with pytest.raises(ValueError, match=r"config\.converge\.epochs is 5 in .* and 3 in "):
        methods.runs_in(tmp_path)


def test_runs_on_other_images_are_not_compared(tmp_path):
    leave_run(tmp_path, "dhp", 0, 0.2)
    leave_run(tmp_path, "uniform", 0, 0.2, images=3)
    with pytest.raises(ValueError, match=r"expected runs on the same images; those of .* differ"):
        methods.runs_in(tmp_path)


def test_all_methods_are_carried_out_after_those_that_they_need():
    assert set(methods.ORDER) == set(methods.METHODS)
    assert methods.ORDER[0] == "baseline"
    for name, method in methods.METHODS.items():
        if method.source is not None:
            assert methods.ORDER.index(method.source) < methods.ORDER.index(name)
    assert methods.with_needs(["scratch"]) == ["baseline", "dhp", "scratch"]
    assert set(methods.with_needs(["fade", "uniform"])) == {"baseline", "fade", "uniform"}


@pytest.mark.slow
def test_all_methods_are_trained_for_a_seed_and_what_is_finished_is_left_alone(tmp_path):
    fields = ["--config.model.width=0.25", "--config.search.min_channels=1"]
    fields += ["--config.search.strength=0.3", "--config.search.epochs=2"]
    fields += ["--config.converge.epochs=1", "--config.baseline.epochs=1"]
    fields += ["--config.multiple_of=1"]
    given = [tmp_path / "runs", "--train", "--seeds", 3]
    given += [f"--config={ROOT / 'experiments/configs/digits_resnet20.py'}", *fields]
    printed = output_of("methods", *given)
    runs = sorted(path.parent.name for path in (tmp_path / "runs/seed3").glob("*/summary.json"))
    assert runs == sorted(methods.METHODS)
    flops = {
        name: json.loads((tmp_path / "runs/seed3" / name / "summary.json").read_text())["flops"]
        for name in runs
    }
    least = {name: 0.4 if name == "fade" else 0.49 for name in runs if name != "baseline"}
    assert all(low < flops[name]["ratio"] <= 0.5 for name, low in least.items())
    again = begin("methods", *given)
    repeated, errors = again.communicate()
    assert errors.count(": finished") == len(runs)
    last = slice(-len(runs), None)
    assert repeated.strip().splitlines()[last] == printed.strip().splitlines()[last]


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
