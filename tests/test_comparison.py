"""Several runs on one page."""

import dataclasses
import re
import shutil

import pytest

from dhp_jax import report, result
from dhp_jax.report.comparison import comparison, labels
from dhp_jax.report.page import Told


@pytest.fixture(scope="module")
def run(finished):
    there = result.read(finished)
    return Told(there, there.summary)


def at(run, workdir, **changes):
    """The same run elsewhere, with another summary or configuration."""
    return Told(
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
    content = comparison([run, at(run, tmp_path / "other", summary=other)])
    for expected in ("2 runs compared", "50.00 %", "25.00 %", "3.21 M", "12.30 %"):
        assert expected in content
    titles = re.findall(r"<title>(other: [^<]*)</title>", content)
    assert "other: 50 at 3.21" in titles
    assert len(re.findall('<g class="c1"><path', content)) == 2


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
        f"^run: expected runs of one task to compare; got classification in .* and {shown} in "
    )
    with pytest.raises(ValueError, match=message):
        comparison([run, other])


def test_runs_of_different_data_are_compared_with_a_warning(run, tmp_path):
    config = {**run.result.config, "data": {"name": "cifar10"}}
    other = at(run, tmp_path, result={"config": config})
    assert "different data (cifar10, digits)" in comparison([run, other])
    assert "different data" not in comparison([run, run])


def test_a_run_that_is_not_finished_stands_beside_one_that_is(finished, run, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "begun")
    for name in ("model", "best"):
        shutil.rmtree(copy / name)
    out = tmp_path / "both.html"
    assert report.main([str(finished), str(copy), f"--out={out}"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    content = out.read_text()
    assert "begun: the trained network: the converge phase has not ended" in content
    assert "not finished" in content


def test_the_page_is_compare_html_if_no_other_is_named(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.main([str(finished), str(finished)]) == 0
    assert (tmp_path / "compare.html").is_file()


def test_runs_are_called_by_as_much_of_their_path_as_tells_them_apart(run, tmp_path):
    paths = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "a/other"]
    runs = [at(run, path) for path in paths]
    assert labels(runs) == ["a/run", "b/run", "a/other"]
    assert labels(runs[1:]) == ["run", "other"]


def test_the_latency_of_every_batch_has_a_column(run, tmp_path):
    rows = [{"batch": batch, "after_ms": {"median": 2.5 * batch}} for batch in (1, 7)]
    other = at(run, tmp_path, summary={**run.summary, "latency": {"batches": rows}})
    content = comparison([run, other])
    header = re.findall("<th>(latency, batch [^<]*)</th>", content)
    assert header == [f"latency, batch {batch}" for batch in (1, 7, 64)]
    assert "17.5 ms" in content
