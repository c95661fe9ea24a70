"""The command line: wrong input is told in one line before any work, a run its results."""

import functools
import html
import importlib.util
import json
import os
from pathlib import Path
import re
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

from flax import nnx
import pytest
from runs import CONFIG, FIELDS, contents, of_digits

import dhp_jax as dhp
from dhp_jax import activity
from dhp_jax.artifact.description import ArtifactError
from dhp_jax.backend import cache as backend_cache
from dhp_jax.config.checks import check
from dhp_jax.config.documentation import describe
from dhp_jax.data.labelled import cifar
from dhp_jax.pipeline import command, networks, preparation
from dhp_jax.pipeline.command import baseline_command, tell_target
from dhp_jax.pipeline.flags import define

ROOT = Path(__file__).parents[2]
MAIN = ROOT / "experiments/main.py"
DIGITS = f"--config={CONFIG}"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("experiments_main", MAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(MAIN), *map(str, arguments)])


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(cifar, "_reachable", lambda url: False)


# Each of these is an argument, then what its one line must contain: the field, the value, and what
# is possible. tests/config has the rules of all fields.
WRONG = [
    ("--config.model.name=resnot", "config.model.name", "'resnot'", "resnet,", "mean 'resnet'?"),
    ("--config.model.depth=21", "config.model", "depth", "got 21", "(8, 14, 20, 32, 44, 56)"),
    ("--config.model.width=0", "config.model", "width", "got 0", "a positive number"),
    ("--config.model.wdith=1", "config.model.wdith", "did you mean 'width'?"),
    ("--config.data.name=mnist", "config.data.name", "'mnist'", "digits, cifar10, cifar100"),
    ("--config.batchsize=1", "config.batchsize", "'batchsize'", "did you mean 'batch_size'?"),
    ("--config.search.epoch=1", "config.search.epoch", "'epoch'", "did you mean 'epochs'?"),
    ("--config.serch.epochs=1", "config.serch", "'serch'", "did you mean 'search'?"),
    ("--config.target=0", "config.target", "got 0", "> 0 and <= 1"),
    ("--config.target=half", "config.target", "'half'", "a number > 0 and <= 1"),
    (
        "--config.target=0.01",
        "config.target",
        "0.01 cannot be",
        "smallest possible share is 0.1527",
    ),
    ("--config.batch_size=1298", "config.batch_size", "got 1298", "at most 1297"),
    ("--config.search.drops=soon", "config.search.drops", "'soon'", "such as (150, 225)"),
    ("--config.converge.drops=(3,'a')", "config.converge.drops", "(3, 'a')", "such as (150, 225)"),
    ("--config.search=3", "config.search", "'3'"),
    ("--config.multiple_of=99", "config.multiple_of: expected at most", "got 99"),
    ("--config.target", "config.target", "expected --config.target=<value>"),
    ("--baseline=nowhere", "baseline", "'nowhere'", "a finished run with config.method=baseline"),
    ("--target=0.5", "--target: expected --config.target=<value>"),
    ("--search.epochs=5", "--search.epochs: expected --config.search.epochs=<value>"),
    ("--workdri=out", "'workdri'", "Did you mean: workdir"),
    (
        "--noconfig.optimizer.nesterov",
        "--noconfig.optimizer.nesterov: expected --config.optimizer.nesterov=False",
    ),
    ("--config.seed=None", "config.seed", "'None'", "an integer >= 0"),
    ("surplus", "'surplus'", "flags only"),
]


def refused(main, capsys, *arguments):
    """Runs the program and returns the one line that it prints; checks that it is one."""
    assert main(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", printed.err)
    return printed.err


@pytest.mark.parametrize(("argument", "parts"), [(case[0], case[1:]) for case in WRONG])
def test_wrong_input_is_refused_in_one_line_before_any_work(
    main, capsys, tmp_path, argument, parts
):
    message = refused(main, capsys, DIGITS, f"--workdir={tmp_path / 'run'}", argument)
    for part in parts:
        assert part in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ([], "None"),
        (["--config="], "'', which is no file"),
        (["--config=missing.py"], "'missing.py', which is no file"),
        (["--config.target=0.4"], "None"),
    ],
)
def test_a_configuration_that_is_not_there_is_refused(main, capsys, tmp_path, arguments, got):
    message = refused(main, capsys, f"--workdir={tmp_path / 'run'}", *arguments)
    assert "--config: expected --config=FILE, such as experiments/configs/" in message
    assert message.endswith(f"got {got}\n")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_configuration_is_refused(main, capsys, tmp_path):
    (tmp_path / "empty.py").touch()
    message = refused(main, capsys, f"--config={tmp_path / 'empty.py'}")
    assert "--config: expected a file with a function get_config()" in message
    assert str(tmp_path / "empty.py") in message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('depth')", r"--config: \S*/wrong.py:2: KeyError: depth$"),
        ("return {'seed': 0}", r"expected get_config\(\) to return a ConfigDict; got {'seed': 0}"),
    ],
)
def test_a_function_that_gives_no_configuration_is_refused(main, capsys, tmp_path, body, message):
    path = tmp_path / "wrong.py"
    path.write_text(f"def get_config():\n    {body}\n")
    assert re.search(message, refused(main, capsys, f"--config={path}"))


def test_a_path_may_begin_with_the_home_folder(main, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"got '{tmp_path}/none'" in refused(main, capsys, DIGITS, "--baseline=~/none")


class Left(BaseException):
    """In the place of the end of this process."""


def test_ctrl_c_before_a_run_begins_is_one_line(main, capsys, monkeypatch):
    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(command, "prepare", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Left) as left:
        main(DIGITS)
    assert left.value.args == (130,)
    assert capsys.readouterr().err == "interrupted; the run has not begun\n"


def test_a_configuration_is_meant_by_a_name_alone_or_one_that_is_near(main, capsys):
    message = refused(main, capsys, "resnet20", "--workdir=out")
    assert message == "error: expected --config=resnet20; got 'resnet20'\n"
    message = refused(main, capsys, "--config=resnt20")
    assert message.endswith("; got 'resnt20', which is no file; did you mean 'resnet20'?\n")


def test_the_directory_of_a_run_is_looked_at_before_its_data(
    main, capsys, tmp_path, finished, monkeypatch
):
    monkeypatch.setattr(preparation, "set_up", None)
    (tmp_path / "file").touch()
    message = refused(main, capsys, DIGITS, f"--workdir={tmp_path / 'file/run'}")
    assert message.endswith(f"that can be written; got '{tmp_path}/file/run' (Not a directory)\n")
    message = refused(main, capsys, DIGITS, f"--workdir={finished}", "--config.seed=7")
    assert "holds a run with another configuration: config.seed is 0 there and 7 here" in message


def test_data_that_cannot_be_had_are_refused(main, capsys, tmp_path, offline):
    message = refused(
        main,
        capsys,
        DIGITS,
        f"--workdir={tmp_path / 'run'}",
        "--config.data.name=cifar10",
        f"--config.data.dir={tmp_path / 'data'}",
    )
    for part in ("data.dir", str(tmp_path / "data"), "cifar10", "--config=digits_resnet20"):
        assert part in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inside", [pytest.param("", marks=pytest.mark.slow), "run"])
def test_a_directory_that_cannot_be_written_is_refused(main, capsys, tmp_path, inside):
    file = tmp_path / "file"
    file.write_text("a thesis")
    message = refused(main, capsys, DIGITS, f"--workdir={file / inside}")
    assert f"workdir: expected a directory that can be written; got '{file / inside}'" in message
    assert file.read_text() == "a thesis"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("--config.target=0.01", "config.target"),
        ("--config.search.strength=1", "config.search.strength is 0.3 there and 1.0 here"),
    ],
)
def test_a_finished_run_is_left_as_it_is(main, capsys, finished, argument, part):
    before = contents(finished)
    message = refused(main, capsys, DIGITS, *overrides(), f"--workdir={finished}", argument)
    assert part in message
    assert contents(finished) == before


def test_a_field_that_may_be_none_can_be_made_none(tmp_path):
    (tmp_path / "c.py").write_text(
        "from runs import of_digits\n"
        "def get_config():\n"
        "    return of_digits(source='there', targets=(0.7, 0.5), **{'data.dir': 'x'})"
    )
    fields = ("source", "targets", "data.dir", "optimizer.clip", "data.streamed", "budget.batch")
    given = [f"--config.{name}=None" for name in fields]
    line = ["main.py", f"--config={tmp_path / 'c.py'}", "--config.optimizer.clip=2.0", *given]
    config = command.parse(line, define).config
    assert dict(flat_values(config, fields)) == dict.fromkeys(fields)
    check(config)


def flat_values(config, names):
    """The values of fields by their full names."""
    for name in names:
        yield name, functools.reduce(getattr, name.split("."), config)


def overrides():
    return [f"--config.{name}={value}" for name, value in FIELDS.items()]


# The program itself


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            [], "error: --config: expected --config=FILE, such as ", marks=pytest.mark.slow
        ),
        ([DIGITS, "--config.target=1.5"], "error: config.target: expected a number > 0 and <= 1"),
    ],
)
def test_the_program_exits_with_2_for_wrong_input(tmp_path, arguments, message):
    command = [sys.executable, str(MAIN), *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(message)
    assert len(ended.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_help_tells_the_flags(main, capsys):
    assert main("--help") == 0
    printed = capsys.readouterr()
    for part in ("Example: dhp-train", "--config:", "--workdir:", "--baseline:"):
        assert part in printed.out
    assert describe() in printed.out
    assert printed.err == ""
    assert main("-h") == 0
    assert capsys.readouterr().out == printed.out


def check_what_is_told_while_it_goes_on(lines):
    """Of a run with a training of the pruned network, where all is told that takes 20 ms."""
    compiled = {re.sub(r" in \d+\.\d s$", "", line) for line in lines if "compiled" in line}
    assert compiled == {
        "compiled the training step of the pruned network",
        "compiled the test of the pruned network",
        "compiled the forward pass of the pruned network, batch 1",
        "compiled the forward pass of the pruned network, batch 64",
        "compiled the forward pass of the unpruned network, batch 1",
        "compiled the forward pass of the unpruned network, batch 64",
    }
    long = {
        "converge: compiling the step",
        "converge: testing",
        "timing the networks",
        "writing the report",
    }
    assert long <= set(lines)


def test_a_run_prints_its_layers_its_errors_and_where_everything_is(
    main, capfd, finished, tmp_path, monkeypatch
):
    workdir = shutil.copytree(finished, tmp_path / "runs" / CONFIG.stem)
    for name in ("model", "best", "checkpoints/converge"):
        shutil.rmtree(workdir / name)
    (workdir / "summary.json").unlink()  # which has the times of these networks
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(activity, "SILENT", 0.02)
    monkeypatch.setattr(backend_cache, "LONG", 0.0)
    assert main(DIGITS, *overrides()) == 0  # the directory that is meant if none is given
    printed = capfd.readouterr()
    flops = dhp.measure_cost(dhp.load(workdir / "model"), (8, 8, 1)).flops
    assert re.search(rf"^FLOPs +[\d,]+ -> {flops:,} \(", printed.out, re.M)
    assert re.search(
        r"^test error, unpruned +unknown; .*\n  python .*main.py --config=.* "
        rf"--config.method=baseline --workdir=runs/{CONFIG.stem}-baseline\n",
        printed.out,
        re.M,
    )
    assert re.search(r"^test error, pruned +\d+\.\d\d % \(.*\), epoch 1$", printed.out, re.M)
    whole = [line for line in printed.out.splitlines() if "--config" not in line]
    assert max(map(len, whole)) <= 80
    paths = re.findall(r"runs/[\w./-]+", printed.out)
    paths = [path for path in paths if not path.endswith("-baseline")]
    assert {Path(path).name for path in paths} == {
        *("report.html", "model", "best", "summary.json", "layers.md", "plots"),
        *("metrics.jsonl", "tensorboard"),
    }
    assert printed.out.endswith(f" {paths[-1]}\n")
    assert Path(paths[-1]).name == "report.html"
    assert all(Path(path).exists() for path in paths)
    assert re.search(
        r"^converge: epoch 1, step 20 of 20: test error \d+\.\d\d%, loss \d", printed.err, re.M
    )
    assert "search" not in printed.err  # it is done
    check_what_is_told_while_it_goes_on(printed.err.splitlines())
    assert re.search(r"^next +training of the pruned network, 1 epoch$", printed.err, re.M)
    (command,) = (workdir / "command.txt").read_text().splitlines()
    given = shlex.split(command.removeprefix(f"cd {shlex.quote(str(tmp_path))} && "))
    assert given == ["python", str(MAIN), DIGITS, *overrides()]
    assert command in html.unescape((workdir / "report.html").read_text())


STEEP = (
    "--config.model.depth=8",
    "--config.model.width=0.5",
    "--config.multiple_of=1",
    "--config.search.learning_rate=1e30",
    "--config.search.epochs=1",
)


@pytest.mark.slow
def test_a_training_that_diverges_ends_with_one_line_and_exit_code_1(main, tmp_path, capsys):
    wide = "--config.search.strength=0"  # with latents that vanish, the first step ends the search
    assert main(DIGITS, *STEEP, wide, f"--workdir={tmp_path / 'run'}") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: search: the (loss is|latent .* is not finite)", last)
    assert ", at a learning rate of 1e+30; " in last
    assert last.endswith("; --config.nonfinite=skip leaves such batches out")


@pytest.mark.slow
def test_weights_that_overflow_where_the_budget_is_met_end_a_run_with_one_line(
    main, tmp_path, capsys
):
    run = tmp_path / "run"
    assert main(DIGITS, *STEEP, f"--workdir={run}") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(
        r"error: search: the array 'blocks\..*' of the pruned network is not finite; "
        r"try a smaller --config\.search\.learning_rate",
        last,
    )
    assert not (run / "pruned").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(28, "No space left on device", "there/metrics.jsonl"),
            "there/metrics.jsonl: No space left on device; the same command goes on once that is "
            "mended",
        ),
        (OSError("full"), "run: full; the same command goes on once that is mended"),
        (ArtifactError("path: there is cut short"), "there is cut short; the same command goes on"),
    ],
)
def test_a_file_that_ends_a_run_is_named_in_one_line(error, told):
    options = SimpleNamespace(workdir="run", config=of_digits())
    assert command.explain(error, options) == (1, f"error: {told}")


def test_a_directory_that_is_deleted_while_its_run_goes_on_is_told_and_not_made_anew(tmp_path):
    run = preparation.prepare(of_digits(), tmp_path / "run")
    shutil.rmtree(run.workdir)
    with pytest.raises(OSError, match="deleted") as caught:
        networks.save(run, "pruned", nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    assert not run.workdir.exists()
    options = SimpleNamespace(workdir=str(run.workdir), config=run.config)
    for error in (caught.value, ValueError("no run")):
        told = f"error: {run.workdir}: deleted while the run was at work in it"
        assert command.explain(error, options, [run]) == (1, told)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"target": 0.5, "budget.latency": 0.6},
            "config.target=0.5 of the FLOPs holds besides latency; --config.target=1 leaves it out",
        ),
        ({"target": 0.5}, ""),
        ({"target": 1.0, "budget.params": 0.6}, ""),
        ({"targets": (0.75, 0.5), "budget.params": 0.6}, ""),
        ({"method": "baseline", "budget.params": 0.6}, ""),
    ],
)
def test_a_target_that_holds_besides_other_budgets_is_told(capsys, fields, told):
    tell_target(of_digits(**fields))
    assert capsys.readouterr().err.strip() == told


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["main.py", "--config=a.py", "--config.model.depth=8"],
            "python main.py --config=a.py --config.model.depth=8 "
            "--config.method=baseline --workdir=out/run-baseline",
        ),
        (
            [
                *("/usr/bin/dhp-train", "--config=a", "--workdir", "out/run"),
                *("--config.targets=0.7,0.5", "--config.seed=1"),
            ],
            "dhp-train --config=a --config.seed=1 "
            "--config.method=baseline --workdir=out/run-baseline",
        ),
    ],
)
def test_the_command_that_trains_the_unpruned_network_is_that_of_the_run(arguments, expected):
    assert baseline_command(arguments, "out/run", of_digits()) == expected


def test_the_command_that_trains_the_unpruned_network_leaves_out_what_that_refuses():
    config = of_digits(method="gradient", per_flop=0.5)
    told = baseline_command(["main.py", "--config=a", "--config.per_flop=0.5"], "run", config)
    fields = dict(field.removeprefix("--config.").split("=") for field in told.split()[3:-1])
    assert fields == {"per_flop": "0", "method": "baseline"}
    check(of_digits(method="baseline", per_flop=float(fields["per_flop"])))
    told = baseline_command(
        ["main.py", "--config=a"], "run", of_digits(method="scratch", source="x")
    )
    assert " --config.source=None " in told


def test_several_targets_end_with_one_comparison(main, capfd, finished, tmp_path, monkeypatch):
    summary = json.loads((finished / "summary.json").read_text())
    monkeypatch.setattr(command.targets, "execute", lambda runs, *_, **__: [summary] * len(runs))
    targets = "--config.targets=0.75,0.5"
    assert main(DIGITS, *overrides(), targets, f"--workdir={tmp_path / 'run'}") == 0
    printed = capfd.readouterr().out
    rows = [line.split()[0] for line in printed.splitlines() if line and line[0] != " "]
    assert rows == ["size", "0.75", "0.5", "networks", "tested", "timed", "test", "report"]
    assert f"--config.method=baseline --workdir={tmp_path / 'run'}-baseline\n" in printed
    assert printed.endswith(f" {tmp_path / 'run' / 'compare.html'}\n")
