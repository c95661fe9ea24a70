"""What a run leaves for people says what the arrays and the records say."""

import json
import os
from pathlib import Path
import re
import shutil

from flax import nnx
import jax
from matplotlib.image import imread
import numpy as np
import pytest
from runs import description

import dhp_jax as dhp
from dhp_jax import journal, report
from dhp_jax.checkpoint import ArtifactError

PLOTS = ("channels", "ratio", "latents", "error")
UNPRUNED = {
    "test": {"last": {"loss": 0.3, "error": 0.0846}, "best": {"loss": 0.2, "error": 0.08}},
    "phases": {"baseline": {"epochs": 300}},
}


@pytest.fixture(scope="module")
def result(finished):
    return report.read(finished)


def number(text):
    return int(text.replace(",", ""))


def rows(table):
    """The cells of a Markdown table below its header."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def before_and_after(cell):
    parts = [number(part) for part in cell.split(" -> ")]
    return parts[0], parts[-1]


def layers_of(model):
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Conv | nnx.Linear | nnx.BatchNorm)
    }


# The table of layers


def test_the_table_of_layers_tells_the_shapes_of_the_arrays(finished, result):
    layers = layers_of(dhp.load(finished / "model"))
    table = rows(report.layer_table(result.before, result.after))
    assert {row[0] for row in table} == {*layers, "total"}
    for path, inputs, outputs, _, _, params, _ in table[:-1]:
        layer = layers[path]
        main = layer.scale if isinstance(layer, nnx.BatchNorm) else layer.kernel
        assert before_and_after(outputs)[1] == main.shape[-1]
        assert before_and_after(inputs)[1] == main.shape[-1 if main.ndim == 1 else -2]
        sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param))]
        assert before_and_after(params)[1] == sum(sizes)


def test_the_table_of_layers_tells_flops_before_and_after_and_their_share(result):
    table = rows(report.layer_table(result.before, result.after))
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
    lines = report.layer_table(result.before, result.after).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert {tuple(i for i, c in enumerate(line) if c == "|") for line in lines} == {
        tuple(i for i, c in enumerate(lines[0]) if c == "|")
    }


# The summary


def test_the_summary_tells_what_the_run_came_to(finished, result):
    summary = report.summarize(result)
    assert summary["method"] == "dhp"
    assert summary["task"] == {"name": "classification"}
    assert summary["model"] == {"name": "resnet", "depth": 20, "width": 0.25}
    assert (summary["data"], summary["seed"], summary["target"]) == ("digits", 0, 0.5)
    for name in ("flops", "params"):
        before, after = getattr(result.before, name), getattr(result.after, name)
        assert summary[name] == {"before": before, "after": after, "ratio": after / before}
    tests = {}
    for record in journal.read(finished / "metrics.jsonl"):
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
    assert summary["hardware"] == report.hardware()
    assert summary["versions"].keys() == {"jax", "jaxlib", "flax", "optax", "numpy"}
    assert json.loads((finished / "summary.json").read_text()) == summary


def test_the_summary_compares_with_an_unpruned_run_that_is_known(result):
    known, unknown = report.summarize(result, UNPRUNED), report.summarize(result)
    assert known["test"]["unpruned"] == {"loss": 0.3, "error": 0.0846}
    assert known["unpruned_epochs"] == 300
    assert unknown["unpruned_epochs"] is None
    pattern = r"^test error, unpruned +(.*)$"
    found = [
        re.search(pattern, report.summary_text(summary), re.MULTILINE).group(1)
        for summary in (known, unknown)
    ]
    assert found == ["8.46 % (epoch 300)", "unknown"]


def test_the_text_of_a_summary_tells_its_numbers(result):
    summary = report.summarize(result)
    lines = {
        line[:22].strip(): line[22:].strip() for line in report.summary_text(summary).splitlines()
    }
    test = {name: values and values["error"] for name, values in summary["test"].items()}
    assert lines["test error, last epoch"] == f"{100 * test['last']:.2f} % (epoch 1)"
    assert lines["best epoch"] == f"{100 * test['best']:.2f} % (epoch 1, by test error)"
    assert lines["after pruning"] == f"{100 * test['after_pruning']:.2f} %"
    assert lines["after the search"].startswith(f"{100 * test['after_search']:.2f} % (epoch ")
    for name, label in (("flops", "FLOPs"), ("params", "params")):
        change = summary[name]
        assert lines[label] == (
            f"{change['before']:,} -> {change['after']:,} ({100 * change['ratio']:.2f} %)"
        )
    assert report.hardware() in lines["time"]
    assert "note" not in lines
    summary["phases"]["search"]["met_budget"] = False
    assert "ran out of epochs" in report.summary_text(summary).splitlines()[-1]


def test_batches_that_were_skipped_are_told(result):
    summary = report.summarize(result)
    assert "skipped" not in report.summary_text(summary)
    summary["phases"]["converge"]["skipped"] = 7
    last = report.summary_text(summary).splitlines()[-1]
    assert re.search(r"^note +batches skipped .* not finite: 7 in the converge phase$", last)


def test_the_text_of_a_run_names_paths_that_exist(finished):
    summary = json.loads((finished / "summary.json").read_text())
    text = report.text(finished, summary)
    assert (finished / "layers.md").read_text() in text
    assert report.summary_text(summary) in text
    paths = set(re.findall(re.escape(str(finished)) + r"[\w./-]*", text))
    assert all(Path(path).exists() for path in paths)
    names = {str(Path(path).relative_to(finished)) for path in paths}
    assert names == {
        "best",
        "layers.md",
        "metrics.jsonl",
        "model",
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
        ({"task": {"name": "denoising"}}, False),
        ({"method": "dhp"}, False),
    ],
)
def test_a_report_compares_with_an_unpruned_run_of_the_same_network_and_data(
    finished, tmp_path, caplog, changes, compared
):
    run = shutil.copytree(finished, tmp_path / "run")
    of_run = json.loads((run / "summary.json").read_text())
    of_baseline = {**of_run, "method": "baseline", **UNPRUNED, **changes}
    (tmp_path / "summary.json").write_text(json.dumps(of_baseline))
    test = report.write(run, baseline=tmp_path)["test"]
    unpruned = UNPRUNED["test"]["last"] if compared else None
    assert test == of_run["test"] | {"unpruned": unpruned}
    told = [r.getMessage() for r in caplog.records if r.name == "dhp_jax.report"]
    another = not compared and "method" not in changes
    expected = f"baseline: {tmp_path} is of another network or other data; left out"
    assert told == [expected] * another


def test_a_run_without_a_trained_network_has_no_report(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(copy / "model")
    with pytest.raises(ArtifactError, match=f"^path: .*{re.escape(os.sep)}model$"):
        report.write(copy)


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
    figures = report.plots(result, UNPRUNED)
    assert figures.keys() == set(PLOTS)
    axes = {name: figure.axes[0] for name, figure in figures.items()}

    bars = [bar.get_height() for bar in axes["channels"].patches]
    layers = [layer for layer in result.before.layers if "Conv" in layer.kind]
    kept = [layer for layer in result.after.layers if "Conv" in layer.kind]
    assert bars == [layer.outputs.full for layer in (*layers, *kept)]

    curves = {line.get_label(): line for line in axes["ratio"].lines}
    ratios = [r["flops_ratio"] for r in result.records if r["phase"] == "search"]
    np.testing.assert_allclose(curves["FLOPs"].get_ydata(), [100, *(100 * r for r in ratios)])
    assert set(curves["target (50 %)"].get_ydata()) == {50}
    assert set(curves["search ends (52 %)"].get_ydata()) == {52}

    curves = {line.get_label(): line for line in axes["error"].lines}
    searched, converged = (
        [100 * r["test_error"] for r in result.records if r["phase"] == phase and "test_error" in r]
        for phase in ("search", "converge")
    )
    np.testing.assert_allclose(curves["search"].get_ydata(), searched)
    np.testing.assert_allclose(curves["converge"].get_ydata(), converged)
    assert curves["converge"].get_xdata() == [len(searched) + 1]
    np.testing.assert_allclose(curves["unpruned, last epoch (8.46 %)"].get_ydata(), 8.46)

    labels = [text.get_text() for text in axes["latents"].get_legend().get_texts()]
    survivors = dhp.checkpoint.read_description(result.workdir / "model")["survivors"]
    latents = dhp.latents(dhp.load(result.workdir / "search"))
    prunable = [name for name, z in latents.items() if z.prunable]
    kept = sum(len(survivors[name]) for name in prunable)
    removed = sum(latents[name].size for name in prunable) - kept
    assert labels == [f"kept ({kept})", f"removed ({removed})", "threshold 0.005"]
