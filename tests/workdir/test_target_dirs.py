"""The directory of a run of several targets."""

import json
import shutil

from pages import Page
import pytest
from runs import UNPRUNED, commanded

from dhp_jax import predict
from dhp_jax.budgets import timing
from dhp_jax.export import __main__ as export_main
from dhp_jax.report import __main__ as report_main
from dhp_jax.report import write as report_write
from dhp_jax.report.format import interval
from dhp_jax.workdir import reader, target_dirs
from dhp_jax.workdir.target_dirs import absent, folder_name, is_size


def leave_runs(workdir, *names):
    for name in names:
        (workdir / name).mkdir(parents=True)
        (workdir / name / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("target", "name"), [(0.75, "0.75"), (0.7500001, "0.7500001"), (1, "1"), (1.0, "1")]
)
def test_a_folder_is_called_as_its_target(tmp_path, target, name):
    assert folder_name(target) == name
    assert is_size(tmp_path / name)


def test_sizes_are_the_runs_in_folders_of_targets(tmp_path):
    leave_runs(tmp_path, "0.25", "0.5", "1", "0.75-baseline", "2", "nan", "0.50")
    (tmp_path / "0.1").mkdir()
    assert [path.name for path in target_dirs.begun(tmp_path)] == ["1", "0.5", "0.25"]
    (tmp_path / "config.json").write_text("{}")
    assert target_dirs.begun(tmp_path) == target_dirs.begun(tmp_path / "none") == []


def test_targets_that_have_not_begun_are_absent(tmp_path):
    assert absent(tmp_path) == []
    target_dirs.note(tmp_path / "run", [0.75, 0.5, 0.25])
    leave_runs(tmp_path / "run", "0.5")
    assert absent(tmp_path / "run") == ["0.75", "0.25"]
    (tmp_path / "run/targets.json").write_text("7")
    with pytest.raises(ValueError, match=r"^run: .*/targets.json: expected a list of targets; "):
        absent(tmp_path / "run")


@pytest.fixture(scope="module")
def begun(finished, tmp_path_factory):
    """A run of three targets that was interrupted in the second, and the unpruned network's."""
    run = tmp_path_factory.mktemp("sizes") / "run"
    target_dirs.note(run, [0.75, 0.5, 0.25])
    for name, gone in (("0.75", []), ("0.5", ["model", "best", "summary.json"])):
        shutil.copytree(finished, run / name)
        for part in [*gone, "report.html"]:
            path = run / name / part
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    whole = run.with_name("run-baseline")
    shutil.copytree(finished, whole, ignore=shutil.ignore_patterns("search", "pruned"))
    for name, changes in (("config.json", {}), ("summary.json", UNPRUNED)):
        content = json.loads((whole / name).read_text())
        (whole / name).write_text(json.dumps({**content, "method": "baseline", **changes}))
    model = json.loads((whole / "model/model.json").read_text())
    model["notes"]["phase"] = UNPRUNED["phases"]["baseline"]
    (whole / "model/model.json").write_text(json.dumps(model))
    return run


def test_a_report_of_all_sizes_tells_what_there_is_and_what_is_missing(begun, capsys, monkeypatch):
    monkeypatch.setattr(report_write, "_save_plots", lambda *_: None)
    assert commanded(capsys, report_main.main, "report", begun)[:2] == (
        0,
        f"{begun}/compare.html\n",
    )
    content = (begun / "compare.html").read_text()
    for expected in (
        "3 runs compared",
        "0.5: the trained network: the converge phase has not ended",
        "0.25: has not begun",
        "</i>run-baseline</td>",
        "<title>run-baseline: 8.46 at ",
        "<title>0.75: ",
        "<title>0.5, so far: ",
        "unpruned</text>",
    ):
        assert expected in content
    page = Page(content)
    error = UNPRUNED["test"]["last"]["error"]
    assert page.row("run-baseline")[0] == f"8.46 % ({interval(error, 500)})"
    assert " % so far (" in page.row("0.5")[0]
    assert "unpruned 8.46 %" in (begun / "0.75/report.html").read_text()
    assert "This run is not finished" in (begun / "0.5/report.html").read_text()


@pytest.mark.slow
def test_latency_is_measured_of_sizes_that_are_finished(begun, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(begun, tmp_path / "run")
    monkeypatch.setattr(
        timing, "measure_latency", lambda networks, *rest: {name: [7.0, 7.0] for name in networks}
    )
    assert commanded(capsys, report_main.main, "report", run, "--latency")[0] == 0
    assert "<td>7.00 ms</td>" in (run / "compare.html").read_text()
    shutil.rmtree(run / "0.75")
    told = f"error: latency: expected a size that is finished; got '{run}'\n"
    assert commanded(capsys, report_main.main, "report", run, "--latency") == (2, "", told)


@pytest.mark.slow
def test_sizes_are_compared_with_other_runs(begun, tmp_path, capsys):
    out = tmp_path / "all.html"
    arguments = (begun, begun.with_name("run-baseline"), f"--out={out}")
    assert commanded(capsys, report_main.main, "report", *arguments)[0] == 0
    content = out.read_text()
    assert all(f"</i>{name}</td>" in content for name in ("0.75", "0.5", "run-baseline"))


@pytest.mark.parametrize(
    ("main", "arguments"), [(export_main.main, ["--format=safetensors"]), (predict.main, ["x.png"])]
)
def test_commands_on_one_network_name_the_sizes_to_choose_from(begun, capsys, main, arguments):
    code, printed, told = commanded(capsys, main, "command", begun, *arguments)
    assert (code, printed, told.count("\n")) == (2, "", 1)
    assert told.startswith("error: model: expected a folder that dhp.save wrote or a run's with ")
    assert told.endswith(f"; it holds sizes, give one of them: {begun}/0.75, {begun}/0.5\n")


def test_a_source_of_several_sizes_is_told_which(begun):
    with pytest.raises(ValueError, match=r"^run: expected the directory of a run, .*; it holds "):
        reader.read(begun)
