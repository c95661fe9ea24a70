"""Several runs on one page."""

import dataclasses
import shutil

from pages import Page
import pytest

from dhp_jax.report import __main__ as report_main
from dhp_jax.report import write as report_write
from dhp_jax.report.comparison import check_same_task, comparison, comparison_charts, labels
from dhp_jax.report.format import interval
from dhp_jax.report.run_report import RunReport
from dhp_jax.workdir import reader


@pytest.fixture(scope="module")
def run(finished):
    there = reader.read(finished)
    return RunReport(there, there.summary)


def at(run, workdir, **changes):
    """The same run elsewhere, with another summary or configuration."""
    return RunReport(
        dataclasses.replace(run.result, workdir=workdir, **changes.pop("result", {})),
        changes.get("summary", run.summary),
    )


def test_runs_are_compared_by_error_cost_latency_and_losses(run, tmp_path):
    test = {"last": {"error": 0.5, "loss": 1.0}, "best": {"error": 0.25, "loss": 1.0}}
    other = {
        **run.summary,
        "test": test,
        "flops": {"before": 4, "after": 3_210_000, "ratio": 0.123},
    }
    runs = [run, at(run, tmp_path / "other", summary=other)]
    charts = comparison_charts(runs)
    content = comparison(runs, charts)
    for expected in ("2 runs compared", "50.00 %", "25.00 %", "3.21 M", "12.30 %"):
        assert expected in content
    everything = Page(content)
    header = everything.row("run")
    assert header[:4] == ["test error, last epoch", "test error, best epoch", "FLOPs", "params"]
    assert everything.row("other")[:3] == [
        f"50.00 % ({interval(0.5, 500)})",
        f"25.00 % ({interval(0.25, 500)})",
        "3.21 M (12.30 %)",
    ]
    assert "of 500 test examples" in everything.text
    assert "The best epoch is chosen on the test data, so its value is" in everything.text
    assert charts["flops"].tips["dot1"] == ["other: 50 at 3.21"]
    for name in ("loss", "test"):
        (axes,) = charts[name].figure.axes
        assert [line.get_label() for line in axes.lines] == [*labels(runs)]


def test_of_which_runs_the_test_data_choose_the_best_epoch_is_told(run, tmp_path):
    held = {**run.summary, "validation": {"examples": 130, "best": {"error": 0.1}}}
    there = [at(run, tmp_path / name, summary=held) for name in ("a", "b")]
    text = Page(comparison(there, {})).text
    assert "Best epochs are those of the validation data." in text
    text = Page(comparison([run, *there], {})).text
    assert f"The best epoch of {run.result.workdir.name} is chosen on the test data" in text


def test_points_have_names_and_the_sizes_of_one_search_are_joined(run, tmp_path):
    places = [tmp_path / "a/0.5", tmp_path / "a/0.25", tmp_path / "b/0.5", tmp_path / "whole"]
    runs = [at(run, place) for place in places]
    charts = comparison_charts(runs)
    for name in ("flops", "params"):
        (axes,) = charts[name].figure.axes
        assert [text.get_text() for text in axes.texts] == labels(runs)
        joined = [line for line in axes.lines if line.get_gid() == "joined"]
        assert [len(line.get_xdata()) for line in joined if len(line.get_xdata()) > 1] == [2]


@pytest.mark.parametrize(
    ("task", "shown"),
    [
        ({"name": "denoising", "sigma": 70}, r"denoising \(sigma=70\)"),
        ({"name": "classification", "more": 1}, r"classification \(more=1\)"),
    ],
)
def test_runs_of_different_tasks_are_refused(run, tmp_path, task, shown):
    config = {**run.result.config, "task": task}
    other = at(run, tmp_path, result={"config": config})
    message = (
        f"^run: expected runs of one task to compare; got classification .*in .* and {shown} in "
    )
    with pytest.raises(ValueError, match=message):
        check_same_task([run, other])
    with pytest.raises(ValueError, match=message):
        comparison([run, other], {})


def test_runs_of_different_data_are_compared_with_a_warning(run, tmp_path):
    config = {**run.result.config, "data": {"name": "cifar10"}}
    other = at(run, tmp_path, result={"config": config})
    assert "different data (cifar10, digits)" in comparison([run, other], {})
    assert "different data" not in comparison([run, run], {})


def test_a_run_that_is_not_finished_stands_beside_one_that_is(finished, run, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "begun")
    for name in ("model", "best"):
        shutil.rmtree(copy / name)
    out = tmp_path / "both.html"
    report_main.main([str(finished), str(copy), f"--out={out}"])
    assert capsys.readouterr().out == f"{out}\n"
    content = out.read_text()
    assert "begun: the trained network: the converge phase has not ended" in content
    test = run.last_tested["test_error"]
    cells = Page(content).row("begun")
    for name, cell in (("flops", cells[2]), ("params", cells[3])):
        assert cell.endswith(f"({100 * run.summary[name]['ratio']:.2f} %)")
    more = f"converge phase, epoch 1; {interval(test, 500)}"
    assert cells[0] == f"{100 * test:.2f} % so far ({more})"
    assert ">begun, so far</text>" in content


def test_one_run_is_no_comparison_and_those_that_have_not_begun_are_told(run):
    content = comparison([run], {}, ["0.25"])
    assert "<h1>1 run</h1>" in content
    assert "<li>0.25: has not begun</li>" in content


def test_a_run_in_its_search_shows_what_would_survive_so_far(run, tmp_path):
    records = [r for r in run.result.records if r["phase"] == "search"]
    there = {"records": records, "notes": {}, "search": None, "before": None, "after": None}
    begun = at(run, tmp_path / "begun", result=there, summary=None)
    last = records[-1]
    cells = Page(comparison([run, begun], {})).row("begun")
    for name, cell in (("flops_ratio", cells[2]), ("params_ratio", cells[3])):
        assert cell == f"{100 * last[name]:.2f} % so far (after step {last['step']})"
    (axes,) = comparison_charts([run, begun])["flops"].figure.axes
    assert [text.get_text() for text in axes.texts] == [labels([run, begun])[0]]
    records.clear()
    assert Page(comparison([run, begun], {})).row("begun")[0] == "not finished"


def test_the_page_is_compare_html_if_no_other_is_named(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report_write, "comparison_charts", lambda runs: {})
    report_main.main([str(finished), str(finished)])
    assert (tmp_path / "compare.html").is_file()


def test_runs_are_called_by_as_much_of_their_path_as_tells_them_apart(run, tmp_path):
    paths = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "a/other"]
    runs = [at(run, path) for path in paths]
    assert labels(runs) == ["a/run", "b/run", "a/other"]
    assert labels(runs[1:]) == ["run", "other"]


def timed(run, hardware="here", **speedups):
    """A summary with the quartiles of the speed-up of batches, each after a "b"."""
    rows = [
        {
            "batch": int(name[1:]),
            "after_ms": {"median": of[1] + 0.25},
            "speedup": dict(zip(("low", "median", "high"), of, strict=True)),
        }
        for name, of in speedups.items()
    ]
    return {**run.summary, "latency": {"batches": rows, "hardware": hardware}}


def test_every_batch_has_columns_of_milliseconds_and_of_the_speed_up_with_its_quartiles(
    run, tmp_path
):
    one = at(run, tmp_path / "one", summary=timed(run, b64=(1.5, 1.6, 1.75)))
    other = at(run, tmp_path / "other", summary=timed(run, b1=(0.9, 1.1, 1.3), b7=(2, 3, 4)))
    content = comparison([one, other], {})
    header = [name for name in Page(content).row("run") if ", batch" in name]
    columns = [(what, batch) for batch in (1, 7, 64) for what in ("latency", "speed-up")]
    assert header == [f"{what}, batch\u00a0{batch}" for what, batch in columns]
    assert Page(content).row("one")[4:10] == ["", "", "", "", "1.85 ms", "1.60 (1.50 to 1.75)"]
    assert Page(content).row("other")[4:10] == [
        "1.35 ms",
        "1.10 (0.90 to 1.30)",
        "3.25 ms",
        "3.00 (2.00 to 4.00)",
        "",
        "",
    ]
    assert "speedup" not in comparison_charts([one, other])  # no batch is of both


def test_an_unpruned_run_is_as_fast_as_itself_and_bars_show_the_quartiles(run, tmp_path):
    config = {**run.result.config, "method": "baseline"}
    whole = at(run, tmp_path / "whole", result={"config": config}, summary=timed(run, b8=(9, 9, 9)))
    small = at(run, tmp_path / "small", summary=timed(run, b8=(1.0, 2.0, 3.0)))
    (axes,) = comparison_charts([whole, small])["speedup"].figure.axes
    spreads = [list(line.get_xdata()) for line in axes.lines if line.get_gid() == "spread"]
    points = [float(line.get_xdata()[0]) for line in axes.lines if line.get_gid()[:3] == "dot"]
    assert spreads == [[1, 1], [1, 3]]
    assert points == [1, 2]


def test_hardware_that_differs_is_told(run, tmp_path):
    one = at(run, tmp_path / "one", summary=timed(run, "a phone", b1=(1, 2, 3)))
    other = at(run, tmp_path / "other", summary=timed(run, "a clock", b1=(1, 2, 3)))
    assert "The hardware differs: one on a phone; other on a clock." in comparison([one, other], {})
    assert "hardware differs" not in comparison([one, at(one, tmp_path / "more")], {})
