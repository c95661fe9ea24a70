"""What a run leaves for people says what the arrays and the records say."""

import dataclasses
import json
from pathlib import Path
import re
import shutil

from flax import nnx
import jax
from matplotlib.image import imread
import numpy as np
import pytest
from runs import UNPRUNED, description, summary_text

import dhp_jax as dhp
from dhp_jax import cli
from dhp_jax.artifact import reading as artifact_reading
from dhp_jax.budgets.chosen import Time
from dhp_jax.budgets.layer_table import compact, layer_table, percent
from dhp_jax.budgets.timing import hardware
from dhp_jax.report import __main__ as report_main
from dhp_jax.report import text as report_text
from dhp_jax.report import write as report_write
from dhp_jax.report.format import interval
from dhp_jax.report.run_charts import run_charts
from dhp_jax.report.run_report import RunReport
from dhp_jax.workdir import metrics as workdir_metrics
from dhp_jax.workdir import reader
from dhp_jax.workdir import summary as workdir_summary
from dhp_jax.workdir.reader import read_summary
from dhp_jax.workdir.summary import summarize

PLOTS = ("channels", "ratio", "latents", "error", "loss", "magnitudes", "survivors")


@pytest.fixture(scope="module")
def result(finished):
    return reader.read(finished)


def number(text):
    return int(text.replace(",", ""))


def rows(table):
    """The cells of a Markdown table below its header."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def before_and_after(cell):
    parts = [number(part) for part in cell.split(" -> ")]
    return parts[0], parts[-1]


def told(text):
    """The texts of lines by their labels; lines without a label go on with the one before."""
    found = {}
    for line in filter(None, text.splitlines()):
        label, _, rest = line.partition("  ")
        label = label or next(reversed(found))
        found[label] = f"{found.get(label, '')} {rest.strip()}".strip()
    return found


def layers_of(model):
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Conv | nnx.Linear | nnx.BatchNorm)
    }


# The table of layers


def test_the_table_of_layers_tells_the_shapes_of_the_arrays(finished, result):
    layers = layers_of(dhp.load(finished / "model"))
    table = rows(layer_table(result.before, result.after))
    assert {row[0] for row in table} == {*layers, "total"}
    for path, inputs, outputs, _, _, params, _ in table[:-1]:
        layer = layers[path]
        main = layer.scale if isinstance(layer, nnx.BatchNorm) else layer.kernel
        assert before_and_after(outputs)[1] == main.shape[-1]
        assert before_and_after(inputs)[1] == main.shape[-1 if main.ndim == 1 else -2]
        sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param))]
        assert before_and_after(params)[1] == sum(sizes)


def test_the_table_of_layers_tells_flops_before_and_after_and_their_share(result):
    table = rows(layer_table(result.before, result.after))
    for row, before, after in zip(table, result.before.layers, result.after.layers, strict=False):
        assert row[0] == before.path
        assert before_and_after(row[3]) == (before.flops, after.flops)
        assert row[4] == f"{100 * after.flops / before.flops:.2f} %"
        assert before_and_after(row[5]) == (before.params, after.params)
        assert row[6] == f"{100 * after.params / before.params:.2f} %"
    total = table[-1]
    assert len(table) == len(result.before.layers) + 1
    assert before_and_after(total[3]) == (result.before.flops, result.after.flops)
    assert before_and_after(total[5]) == (result.before.params, result.after.params)
    columns = [[before_and_after(row[i]) for row in table] for i in (3, 5)]
    for *parts, whole in columns:
        assert tuple(map(sum, zip(*parts, strict=True))) == whole


def test_the_table_of_layers_is_aligned(result):
    lines = layer_table(result.before, result.after).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert {tuple(i for i, c in enumerate(line) if c == "|") for line in lines} == {
        tuple(i for i, c in enumerate(lines[0]) if c == "|")
    }


# The summary


def test_the_summary_tells_what_the_run_came_to(finished, result):
    summary = summarize(result, times=result.summary["latency"])
    assert summary["method"] == "dhp"
    assert summary["task"] == result.config["task"]
    assert summary["model"] == {"name": "resnet", "depth": 8, "width": 0.25}
    assert (summary["data"], summary["seed"], summary["target"]) == ("digits", 0, 0.5)
    for name in ("flops", "params"):
        before, after = getattr(result.before, name), getattr(result.after, name)
        assert summary[name] == {"before": before, "after": after, "ratio": after / before}
    tests = {}
    for record in workdir_metrics.read(finished / "metrics.jsonl"):
        if "test_error" in record:
            test = {name: record[f"test_{name}"] for name in ("loss", "error")}
            tests.setdefault(record["phase"], []).append(test)
    assert summary["test"] == {
        "last": tests["converge"][-1],
        "best": min(tests["converge"], key=lambda test: test["error"]),
        "after_search": tests["search"][-1],
        "after_pruning": description(finished / "pruned")["notes"]["test"],
        "unpruned": None,
    }
    assert summary["test"]["after_pruning"].keys() == {"loss", "error"}
    assert {name: phase["epochs"] for name, phase in summary["phases"].items()} == {
        name: len(errors) for name, errors in tests.items()
    }
    phases = summary["phases"].values()
    assert summary["seconds"] == sum(phase["seconds"] for phase in phases) > 0
    assert summary["hardware"] == hardware()
    assert summary["versions"].keys() == {
        "dhp_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "numpy",
    }
    assert json.loads((finished / "summary.json").read_text()) == summary


def test_the_summary_tells_where_the_network_was_trained_and_not_where_it_is_told(
    finished, result, monkeypatch
):
    noted = description(finished / "model")["notes"]
    for what, elsewhere in (("hardware", "another machine"), ("versions", {"jax": "0.1"})):
        monkeypatch.setattr(workdir_summary, what, lambda elsewhere=elsewhere: elsewhere)
        assert summarize(result)[what] == noted[what] != elsewhere
        del result.notes["model"][what]  # as of an earlier run
        assert summarize(result)[what] == elsewhere
        result.notes["model"][what] = noted[what]


def test_the_summary_compares_with_an_unpruned_run_that_is_known(result):
    known, unknown = summarize(result, UNPRUNED), summarize(result)
    assert known["test"]["unpruned"] == {"loss": 0.3, "error": 0.0846}
    assert known["unpruned_epochs"] == 300
    assert unknown["unpruned_epochs"] is None
    pattern = r"^test error, unpruned +(.*)$"
    found = [
        re.search(pattern, summary_text(summary, missing="train it"), re.MULTILINE).group(1)
        for summary in (known, unknown)
    ]
    assert found == [
        f"8.46 % ({interval(0.0846, 500)}), epoch 300",
        "unknown; this trains it, then give the same command again:",
    ]
    assert "\n  train it\n" in summary_text(unknown, missing="train it")


def test_the_text_of_a_summary_tells_its_numbers(result):
    summary = summarize(result)
    lines = told(summary_text(summary))
    test = {
        name: values and f"{100 * values['error']:.2f} % ({interval(values['error'], 500)})"
        for name, values in summary["test"].items()
    }
    assert lines["test error, pruned"].startswith(f"{test['last']}, epoch 1 on 500 test examples;")
    assert lines["best epoch"].startswith(f"{test['best']}, epoch 1: chosen on these same data")
    assert lines["right after pruning"].startswith(f"{test['after_pruning']}: channels are cut off")
    assert lines["after the search"].startswith(f"{test['after_search']}, epoch ")
    for name, label in (("flops", "FLOPs"), ("params", "params")):
        change = summary[name]
        assert lines[label] == (
            f"{change['before']:,} -> {change['after']:,} ({100 * change['ratio']:.2f} %)"
        )
    assert hardware() in lines["time"]
    assert "note" not in lines
    summary["phases"]["search"]["met_budget"] = False
    assert "ended above its budget" in told(summary_text(summary))["note"]


def test_batches_that_were_skipped_are_told(result):
    summary = summarize(result)
    assert "skipped" not in summary_text(summary)
    summary["phases"]["converge"]["skipped"] = 7
    note = told(summary_text(summary))["note"]
    assert note.endswith("7 batches of the converge phase were skipped: not finite")


def test_the_answer_is_at_the_bottom_and_all_lines_fit_a_terminal(finished):
    text = report_text.text(finished, json.loads((finished / "summary.json").read_text()))
    last = text.split("\n\n")[-1]
    labels = list(told(last))
    assert labels == [
        *("test error, unpruned", "test error, pruned", "FLOPs", "params"),
        *("latency, batch 1", "latency, batch 64", "report"),
    ]
    assert all(len(line) <= 80 for line in text.splitlines() if str(finished) not in line)


def test_several_sizes_end_with_one_table(result, tmp_path):
    sizes = {"0.75": summarize(result, UNPRUNED), "0.5": summarize(result, UNPRUNED)}
    sizes["0.5"]["test"]["last"] = {"error": 0.125}
    sizes["0.5"]["latency"] = {
        "batches": [
            {"batch": 1, "after_ms": {"median": 1.0}},
            {"batch": 64, "speedup": {"low": 1.5, "median": 1.6, "high": 1.75}},
        ]
    }
    text = report_text.sizes_text(tmp_path, sizes)
    table, notes = text.strip().split("\n\n")
    header, *lines = (re.split(r" {2,}", line.strip()) for line in table.splitlines())
    assert header == ["size", "test error", "FLOPs", "params", "times as fast"]
    cost = {name: sizes["0.5"][name] for name in ("flops", "params")}
    left = [percent(change["ratio"]) for change in cost.values()]
    whole = [compact(c["before"]) for c in cost.values()]
    assert lines[0] == ["unpruned", f"8.46 % ({interval(0.0846, 500)})", *whole]
    assert [line[0] for line in lines] == ["unpruned", "0.75", "0.5"]
    assert lines[2] == ["0.5", f"12.50 % ({interval(0.125, 500)})", *left, "1.60 (1.50 to 1.75)"]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert notes.splitlines()[-1].split() == ["report", f"{tmp_path}/compare.html"]


def test_the_text_of_a_run_names_paths_that_exist(finished):
    summary = json.loads((finished / "summary.json").read_text())
    text = report_text.text(finished, summary)
    assert re.fullmatch(f"report +{re.escape(str(finished))}/report.html", text.splitlines()[-1])
    paths = set(re.findall(re.escape(str(finished)) + r"[\w./-]*", text))
    assert all(Path(path).exists() for path in paths)
    names = {str(Path(path).relative_to(finished)) for path in paths}
    assert names == {
        "best",
        "layers.md",
        "metrics.jsonl",
        "model",
        "report.html",
        "summary.json",
        "tensorboard",
        "plots",
    }


@pytest.mark.parametrize(
    ("changes", "compared"),
    [
        ({}, True),
        ({"model": {"name": "resnet", "depth": 56, "width": 0.25}}, False),
        ({"data": "cifar10"}, False),
        ({"validation": {"examples": 130}}, False),
        ({"task": {"name": "classification", "label_smoothing": 0.1}}, True),
        ({"checksums": {"train": 1, "test": 2}}, False),
        ({"task": {"name": "denoising"}}, False),
        ({"method": "dhp"}, False),
    ],
)
def test_a_report_compares_with_an_unpruned_run_of_the_same_network_and_data(
    finished, tmp_path, caplog, monkeypatch, changes, compared
):
    run = shutil.copytree(finished, tmp_path / "run")
    of_run = json.loads((run / "summary.json").read_text())
    of_baseline = {**of_run, "method": "baseline", **UNPRUNED, **changes}
    if "method" in changes:
        of_baseline["phases"] = of_run["phases"]
    (tmp_path / "summary.json").write_text(json.dumps(of_baseline))
    monkeypatch.setattr(report_write, "run_charts", lambda run: {})
    test = report_write.write(run, baseline=tmp_path)["test"]
    unpruned = UNPRUNED["test"]["last"] if compared else None
    assert test == of_run["test"] | {"unpruned": unpruned}
    told = [r.getMessage() for r in caplog.records if r.name == "dhp_jax.report.write"]
    expected = f"baseline: {tmp_path} is of another network or other data; left out"
    if "method" in changes:
        expected = (
            "baseline: expected the directory of a finished run with config.method=baseline; "
            f"got '{tmp_path}'; left out"
        )
    elif not compared and "task" in changes:
        lacks = "is no summary of a run: it has no 'test.last.psnr'"
        expected = f"run: {tmp_path}/summary.json {lacks}; left out"
    assert told == ([] if compared else [expected])


def test_a_page_made_again_compares_with_a_baseline_that_was_trained_later(copy, tmp_path):
    before = json.loads((copy / "summary.json").read_text())
    assert before["test"]["unpruned"] is None
    base = tmp_path / "base"
    base.mkdir()
    (base / "summary.json").write_text(json.dumps({**before, "method": "baseline", **UNPRUNED}))
    drawn = (copy / "plots/error.png").read_bytes()
    report_main.main([str(copy), f"--baseline={base}"])
    content = (copy / "report.html").read_text()
    assert "unpruned, 8.46 %" in content
    assert "not known" not in content
    after = json.loads((copy / "summary.json").read_text())
    test = before["test"] | {"unpruned": UNPRUNED["test"]["last"]}
    assert after == before | {"test": test, "unpruned_epochs": 300}
    assert (copy / "plots/error.png").read_bytes() != drawn


def test_a_run_without_a_trained_network_has_no_summary(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(copy / "model")
    with pytest.raises(ValueError, match=f"^run: expected a run that is finished; got '{copy}'$"):
        report_write.write(copy)


# Latency


def test_the_latency_of_a_run_is_of_both_networks_for_one_input_and_a_batch(finished):
    latency = json.loads((finished / "summary.json").read_text())["latency"]
    assert [row["batch"] for row in latency["batches"]] == [1, 64]
    assert latency["input_shape"] == [8, 8, 1]
    assert latency["hardware"] == hardware()
    for row in latency["batches"]:
        assert row["rounds"] >= 3
        for name in ("before_ms", "after_ms", "speedup"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]


def test_latency_is_measured_again_only_for_other_networks_or_when_asked(result, monkeypatch):
    calls = []

    def measure(networks, shape, batch):
        calls.append((list(networks), shape, batch))
        return {name: [2.0, 4.0, 6.0] for name in networks}

    monkeypatch.setattr(workdir_summary, "measure_latency", measure)
    known = result.summary["latency"]
    assert workdir_summary.latency(result) == known
    assert not calls
    again = workdir_summary.latency(result, again=True)
    assert again["batches"][1] == {
        "batch": 64,
        "rounds": 3,
        "before_ms": {"median": 4.0, "low": 2.0, "high": 6.0},
        "after_ms": {"median": 4.0, "low": 2.0, "high": 6.0},
        "speedup": {"median": 1.0, "low": 1.0, "high": 1.0},
    }
    assert calls == [(["unpruned", "pruned"], (8, 8, 1), batch) for batch in (1, 64)]
    other = {**result.summary, "latency": {**known, "of": ["of", "others"]}}
    assert workdir_summary.latency(dataclasses.replace(result, summary=other)) == again


def test_the_text_of_a_summary_tells_the_latency(result):
    row = {
        "batch": 64,
        "before_ms": {"median": 20.0},
        "after_ms": {"median": 12.5},
        "speedup": {"median": 1.6, "low": 1.5, "high": 1.75},
    }
    text = summary_text(summarize(result, times={"batches": [row]}))
    shown = "20.0 ms -> 12.5 ms; 1.60 times as fast (1.50 to 1.75)"
    assert told(text)["latency, batch 64"] == shown


def test_a_network_that_is_slower_is_told_with_the_widths_that_would_help(result, monkeypatch):
    def measure(networks, shape, batch):
        slower = 2.0 if batch == 64 else 0.5
        return {"unpruned": [1.0] * 4, "pruned": [slower] * 4}

    def clock(model, shape, batch):
        assert batch == 64  # of one input it is faster
        return lambda small: timed.append(small) or Time(ratio, ratio, ratio, rounds=9)

    timed, ratio = [], {"median": 0.5, "low": 0.45, "high": 0.55}
    monkeypatch.setattr(workdir_summary, "measure_latency", measure)
    monkeypatch.setattr(workdir_summary, "clock", clock)
    one, many = workdir_summary.latency(result, again=True)["batches"]
    assert "other_widths" not in one
    assert many["other_widths"] == {"auto": ratio}
    (small,) = timed
    assert dhp.measure_cost(small, (8, 8, 1)).flops <= result.after.flops
    summary = summarize(result, times={"batches": [one, many]})
    told_of_both = told(summary_text(summary))
    assert told_of_both["latency, batch 1"].endswith("; 2.00 times as fast (2.00 to 2.00)")
    assert told_of_both["latency, batch 64"].endswith(
        "slower: takes 2.00 times as long (2.00 to 2.00); multiple_of=auto would take 0.50 of that "
        "time (0.45 to 0.55), for no more FLOPs"
    )


# The command


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_the_page_is_made_again_without_measuring(copy, capsys, monkeypatch):
    monkeypatch.setattr(workdir_summary, "measure_latency", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr(report_write, "run_charts", lambda run: {})
    (copy / "report.html").unlink()
    summary = (copy / "summary.json").read_bytes()
    report_main.main([str(copy)])
    assert capsys.readouterr().out == f"{copy / 'report.html'}\n"
    assert (copy / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (copy / "summary.json").read_bytes() == summary


def test_a_summary_that_was_cut_short_is_made_again(copy, monkeypatch):
    monkeypatch.setattr(report_write, "run_charts", lambda run: {})
    before = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text('{"method": "dh')
    report_main.main([str(copy)])
    after = json.loads((copy / "summary.json").read_text())
    assert after == before | {"latency": None}
    assert "Latency was not measured" in (copy / "report.html").read_text()


def test_what_was_made_of_another_network_than_is_there_is_not_told(copy, monkeypatch):
    monkeypatch.setattr(report_write, "run_charts", lambda run: {})
    path = copy / "model/model.json"
    model = json.loads(path.read_text())
    model["notes"]["phase"] |= {"epochs": 7, "last": {"loss": 0.5, "error": 0.125}}
    path.write_text(json.dumps(model))  # as of a run that has gone on, and has died at its end
    report_main.main([str(copy)])
    summary = json.loads((copy / "summary.json").read_text())
    assert summary["test"]["last"]["error"] == 0.125
    assert "12.50 %" in (copy / "report.html").read_text()
    path = copy / "pruned/model.json"
    cut = json.loads(path.read_text())
    cut["notes"]["made_from"] = "of a shorter search"
    path.write_text(json.dumps(cut))
    assert list(reader.read(copy).notes) == ["search"]  # the others are going to be made again


def test_latency_that_is_asked_for_is_noted(copy, monkeypatch):
    monkeypatch.setattr(
        workdir_summary,
        "measure_latency",
        lambda networks, *rest: {name: [7.0, 7.0] for name in networks},
    )
    monkeypatch.setattr(report_write, "run_charts", lambda run: {})
    report_main.main([str(copy), "--latency", f"--out={copy / 'other.html'}"])
    rows = json.loads((copy / "summary.json").read_text())["latency"]["batches"]
    assert [row["after_ms"]["median"] for row in rows] == [7.0, 7.0]
    assert "7.00 ms" in (copy / "other.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "run: expected the directory of a run, which has a config.json; got '"),
        (["{tmp}"], "run: expected the directory of a run, which has a config.json; got '{tmp}'"),
        (["{tmp}/text"], "run: {tmp}/text/config.json: expected a JSON object; "),
        (["{tmp}/list"], "run: {tmp}/list/config.json: expected a JSON object; "),
        (
            ["{tmp}/other"],
            "run: {tmp}/other/config.json is no configuration of a run: it has no 'm",
        ),
        (["{run}", "{run}", "--latency"], "--latency: expected one run with it; got 2"),
        (["{run}", "{run}", "--baseline={run}"], "--baseline: expected one run with it; got 2"),
        (["{run}", "--baseline={run}"], "baseline: expected the directory of a finished run with "),
        (
            ["{run}", "--out={tmp}/none/page.html"],
            "--out: expected a file in a folder that is there; got '{tmp}",
        ),
        (["{run}", "--out={tmp}"], "--out: expected a file; got the folder '{tmp}'"),
        (["{run}", "--out=/proc/a.html"], "--out: expected a folder that can be written; got '/p"),
    ],
)
def test_wrong_input_is_one_line(finished, tmp_path, capsys, monkeypatch, arguments, message):
    for name, content in (("text", "{"), ("list", "[1]"), ("other", '{"method": 3}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    places = {"tmp": tmp_path, "run": finished}
    arguments = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr("sys.argv", ["dhp_jax.report.write", *arguments])
    assert cli.run(report_main.main) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("error: " + message.format(**places))


def test_a_command_without_arguments_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        report_main.main([])
    assert end.value.code == 2
    told = "error: the following arguments are required: RUN\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    "place", ["flops", "params.ratio", "test.last.error", "phases.converge.epochs", "hardware"]
)
def test_a_summary_that_lacks_something_names_it(finished, tmp_path, place):
    summary = json.loads((finished / "summary.json").read_text())
    *parts, last = place.split(".")
    inner = summary
    for part in parts:
        inner = inner[part]
    del inner[last]
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({**summary, "method": "dhp"}))
    message = rf"^run: {path} is no summary of a run: it has no '{place}[\w.]*'$"
    with pytest.raises(ValueError, match=message):
        read_summary(path)


def test_a_configuration_of_before_budgets_is_read(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["budget"]
    (copy / "config.json").write_text(json.dumps(config))
    assert reader.read(copy).budgets.keys() == {"flops"}


# Plots


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_a_picture_with_something_in_it(finished, name):
    path = finished / "plots" / f"{name}.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 300
    inside = pixels[100:-200, 200:-100, :3]
    assert np.mean(np.any(inside < 0.8, axis=-1)) > 0.001


def test_the_plots_show_what_was_recorded(result):
    summary = result.summary
    test = summary["test"] | {"unpruned": UNPRUNED["test"]["last"]}
    charts = run_charts(RunReport(result, {**summary, "test": test}))
    assert charts.keys() == set(PLOTS)
    axes = {name: chart.figure.axes[0] for name, chart in charts.items()}

    curves = {line.get_label(): line for line in axes["ratio"].lines}
    ratios = [r["flops_ratio"] for r in result.records if r["phase"] == "search"]
    np.testing.assert_allclose(curves["FLOPs"].get_ydata(), [100, *(100 * r for r in ratios)])
    assert set(curves["search ends at 52 %"].get_ydata()) == {52}
    assert charts["ratio"].note == "The network is then pruned to 50 % of the FLOPs."

    curves = {line.get_label(): line for line in axes["error"].lines}
    of_search, of_converge = (
        [r for r in result.records if r["phase"] == phase and "test_error" in r]
        for phase in ("search", "converge")
    )
    start = max(r["step"] for r in result.records if r["phase"] == "search")
    steps = [r["step"] for r in of_search] + [np.nan] + [start + r["step"] for r in of_converge]
    errors = [100 * r["test_error"] for r in of_search] + [np.nan]
    errors += [100 * r["test_error"] for r in of_converge]
    np.testing.assert_allclose(curves["test"].get_xdata(), steps)
    np.testing.assert_allclose(curves["test"].get_ydata(), errors)
    np.testing.assert_allclose(curves["unpruned 8.46 %"].get_ydata(), 8.46)

    (legend,) = charts["latents"].figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    survivors = artifact_reading.read_description(result.workdir / "model")["survivors"]
    latents = dhp.latents(dhp.load(result.workdir / "search"))
    prunable = [name for name, z in latents.items() if z.prunable]
    kept = sum(len(survivors[name]) for name in prunable)
    removed = sum(latents[name].size for name in prunable) - kept
    assert labels == [f"kept ({kept})", f"removed ({removed})", "threshold 0.005"]
