"""The page of a run tells what the run has left, and asks nobody for anything."""

import dataclasses
import json
import re
import shutil
import xml.etree.ElementTree as ET

import numpy as np
from pages import Page
from PIL import Image
import pytest
from scipy.stats import binomtest

from dhp_jax.budgets.layer_table import compact
from dhp_jax.cli import opened
from dhp_jax.core.latent import latents
from dhp_jax.report.crops import Crop, crops, grid
from dhp_jax.report.format import (
    duration,
    in_words,
    interval,
    loss_text,
    milliseconds,
    wilson,
)
from dhp_jax.report.page import page
from dhp_jax.report.run_charts import most_pruned, run_charts
from dhp_jax.report.run_report import RunReport, network_name
from dhp_jax.workdir import metrics as workdir_metrics
from dhp_jax.workdir import reader


@pytest.fixture(scope="module")
def run(finished):
    there = reader.read(finished)
    return RunReport(there, there.summary)


@pytest.fixture(scope="module")
def charts(run):
    return run_charts(run)


@pytest.fixture(scope="module")
def content(run, charts):
    return page(run, charts)


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def drawings(content):
    """The drawings of a page, by what they show."""
    found = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", content, re.DOTALL)]
    return {svg.get("aria-label"): svg for svg in found}


def test_a_run_leaves_its_page(finished, content):
    assert (finished / "report.html").read_text() == content


def test_a_page_is_one_file_that_loads_nothing(content):
    everything = Page(content)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in everything.tags}
    for _, attributes in everything.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert re.match("data:image/png;base64,|#|$", attributes.get(name, ""))
    assert not re.search(r"https?:|url\([^#]|@import", content)
    policy = everything.of("meta")[2]["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_the_answer_comes_first(run, content):
    text, summary = Page(content).text, run.summary
    last = 100 * summary["test"]["last"]["error"]
    top = text[: text.index("Channels kept")]
    for expected in (
        "ResNet-8 (width 0.25) on digits",
        f"Pruned to {100 * summary['flops']['ratio']:.2f} % of the FLOPs",
        f"{last:.2f} %",
        "unpruned: not known",
        f"95 %: {interval(last / 100, 500)}",
        "500 test examples",
        f"{summary['flops']['after']:,}",
        f"{summary['params']['after']:,}",
        milliseconds(summary["latency"]["batches"][0]["before_ms"]["median"]),
        milliseconds(summary["latency"]["batches"][1]["after_ms"]["median"]),
        summary["latency"]["hardware"],
    ):
        assert expected in top
    assert Page(content).sections == ["channels", "training", "latents", "layers", "load", "made"]
    links = [attributes["href"] for attributes in Page(content).of("a")]
    assert links == [f"#{name}" for name in Page(content).sections]


def test_every_test_error_has_its_interval_and_the_one_after_pruning_is_explained(run, content):
    text = Page(content).text
    for name in ("last", "best", "after_search", "after_pruning"):
        error = run.summary["test"][name]["error"]
        assert f"{100 * error:.2f} %" in text
        assert interval(error, 500) in text
    below = text[text.index("right after pruning") :]
    assert below.index("nothing is trained since") < below.index("last epoch")
    assert "On 500 test examples." in text
    few = RunReport(run.result, {**run.summary, "test_examples": 20})
    assert interval(run.summary["test"]["last"]["error"], 20) in Page(page(few, {})).text


def test_the_silhouette_is_as_wide_as_the_layers(run, charts):
    (axes,) = charts["channels"].figure.axes
    bars = [bar.get_height() for bar in axes.patches]
    middles = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    costs = (run.result.before, run.result.after)
    layers = [layer for cost in costs for layer in cost.layers if "Conv" in layer.kind]
    assert bars == [layer.outputs.full for layer in layers]
    np.testing.assert_allclose(middles, 0, atol=1e-9)


def test_the_drawings_show_what_was_recorded(run, content):
    shown = {
        name: [title.text for title in svg.iter("title")] for name, svg in drawings(content).items()
    }
    search = [r for r in run.result.records if r["phase"] == "search"]
    first = f"FLOPs: {100 * search[0]['flops_ratio']:.2f} % at {search[0]['step']}"
    assert shown["What would survive, while searching"][1] == first
    tests = [r for r in run.result.records if "test_loss" in r]
    marks = shown["Loss"]
    assert sum(mark.startswith("training") for mark in marks) == len(run.result.records)
    assert f"test: {tests[0]['test_loss']:.4g} at {tests[0]['step']}" in marks
    bands = shown["Magnitudes of all prunable entries"]
    assert bands == [f"{10 * k} to {10 * k + 10} %" for k in range(10)]
    strips = shown["Entries left of every latent"][::2]
    names = [
        f"{name}: {left} of"
        for name, left in zip(latent_names(run), search[-1]["survivors"], strict=True)
    ]
    assert all(strip.startswith(name) for strip, name in zip(strips, names, strict=True))
    told = shown["Output channels of every convolution, in order of execution"]
    assert told[0].startswith("stem.conv: 4 to ")


def test_budgets_that_end_the_search_at_one_share_have_one_line(run):
    def rules(method="dhp", **budget):
        changed = {"budget": budget, "method": method}
        there = dataclasses.replace(run.result, config={**run.result.config, **changed})
        chart = run_charts(RunReport(there, run.summary))["ratio"]
        return [line.get_label() for line in chart.figure.axes[0].lines if line.get_gid() == "rule"]

    assert rules() == ["search ends at 52 %"]
    assert rules(params=0.5) == ["search ends at 52 %"]
    assert rules(params=0.9, activations=0.9) == ["FLOPs 52 %", "params and activations 92 %"]
    assert rules(method="fade") == ["search ends at 50 %"]


@pytest.mark.parametrize(
    ("budget", "told"),
    [({}, "50 % of the FLOPs"), ({"latency": 0.4}, "its budgets, the time as it is measured")],
)
def test_what_the_network_is_pruned_to_after_the_search_is_told(run, budget, told):
    there = dataclasses.replace(run.result, config={**run.result.config, "budget": budget})
    note = run_charts(RunReport(there, run.summary))["ratio"].note
    assert note == f"The network is then pruned to {told}."


def test_a_threshold_of_zero_is_drawn_on_a_linear_scale(run):
    config = {**run.result.config, "search": {**run.result.config["search"], "threshold": 0.0}}
    charts = run_charts(RunReport(dataclasses.replace(run.result, config=config), run.summary))
    for name in ("magnitudes", "latents"):
        (axes,) = charts[name].figure.axes
        assert axes.get_yscale() == "linear"
        assert axes.get_ylim()[0] == 0
        assert "logarithmic" not in charts[name].note


def latent_names(run):
    return [name for name, z in latents(run.result.search).items() if z.prunable]


def test_how_to_load_it_and_how_it_was_made(finished, run, content):
    text = Page(content).text
    assert f'dhp.load("{finished / "model"}")' in text
    assert f"dhp-predict {finished} image.png" in text
    assert f"dhp-export {finished} --format=onnx" in text
    assert json.dumps(run.result.config, indent=1) in text
    for name, version in run.summary["versions"].items():
        assert re.search(f"^{name}\n{re.escape(version)}$", text, re.MULTILINE)
    assert "No command was noted" in text
    given = "cd '/a b' && python main.py --config=x.py"
    with_command = dataclasses.replace(run.result, commands=[given])
    assert given in Page(page(RunReport(with_command, run.summary), {})).text


def test_the_code_to_load_it_runs_and_feeds_what_training_fed(finished, content):
    (shown,) = [text for text in Page(content).texts if text.startswith("import numpy")]
    assert "images = np.zeros((1, 8, 8, 1), np.uint8)  # yours: gray pixels" in shown
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    known = {}
    given = re.sub(r"np\.zeros\(.*\)", f"np.uint8({images.tolist()})", shown)
    exec(given, known)
    np.testing.assert_allclose(known["x"], opened(finished).inputs(images), atol=1e-6)
    assert known["labels"].shape == (5,)


def test_a_network_that_restores_is_fed_pixels(run):
    task = {"name": "super_resolution", "scale": 4}
    there = dataclasses.replace(run.result, config={**run.result.config, "task": task})
    text = Page(page(RunReport(there, None), {})).text
    assert "y = run(np.float32(images))  # 0 to 255, 4 times as large" in text
    assert "image.png --out=restored" in text


def test_of_many_latents_those_are_shown_that_lost_most():
    rows = [(f"z{i}", 100, [100, i]) for i in range(60)]
    shown = most_pruned(rows[::-1])
    assert [name for name, _, _ in shown] == [f"z{i}" for i in range(31, -1, -1)]


def test_pictures_are_in_the_page(run):
    gray, colours = np.arange(64, dtype=np.uint8).reshape(8, 8), np.zeros((8, 8, 3), np.uint8)
    pictures = [
        Crop("cat", {"input": gray, "original": gray}),
        Crop("dog", {"input": colours, "original": gray}),
    ]
    images = Page(page(run, {}, pictures)).of("img")
    assert [image["alt"] for image in images] == [
        "cat: input",
        "cat: original",
        "dog: input",
        "dog: original",
    ]
    assert all(image["src"].startswith("data:image/png;base64,iVBORw0KGgo") for image in images)


@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 3)])
def test_pictures_tell_the_psnr_of_the_whole_picture(run, tmp_path, shape):
    rng, folder = np.random.default_rng(0), tmp_path / "pictures/cat"
    folder.mkdir(parents=True)
    target = rng.integers(0, 200, shape, np.uint8)
    shown = {"target": target, "input": target + 20, "output": target.copy()}
    shown["output"][0, 0] += 9  # one pixel, which the square may not show
    for name, image in shown.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    (crop,) = crops(dataclasses.replace(run.result, workdir=tmp_path))
    title = f"pruned, {100 * run.summary['flops']['ratio']:.2f} % FLOPs"
    expected = {
        "input": 10 * np.log10(255**2 / 20**2),
        title: 10 * np.log10(255**2 / (9**2 / (40 * 50))),
    }
    assert crop.psnr == pytest.approx(expected, rel=1e-6)
    told = Page(page(run, {}, [crop])).text
    titles = [ax.get_title() for ax in grid([crop]).axes]
    assert titles[-1] == "original"
    for (name, psnr), shown_title in zip(expected.items(), titles, strict=False):
        assert f"{psnr:.2f} dB" in told
        assert shown_title == f"{name}\n{psnr:.2f} dB"


def test_names_that_look_like_markup_stay_names(run):
    evil = "<script>alert('x')</script>&\""
    config = {**run.result.config, "model": {"name": evil, evil: 1}, "data": {"name": evil}}
    there = dataclasses.replace(run.result, config=config, commands=[evil])
    everything = Page(
        page(
            RunReport(there, {**run.summary, "hardware": evil}),
            {},
            [Crop(evil, {evil: np.zeros((4, 4), np.uint8)})],
        )
    )
    assert "script" not in {tag for tag, _ in everything.tags}
    assert everything.text.count(evil) >= 4


# Runs that are not finished


@pytest.mark.parametrize(
    ("gone", "phases", "told", "sections"),
    [
        (
            ["model", "best", "pruned", "search", "metrics.jsonl"],
            [],
            ["no step has been recorded", "the end of the search", "converge phase has not begun"],
            ["latents", "made"],
        ),
        (
            ["model", "best", "pruned", "search"],
            ["search"],
            ["the end of the search", "converge phase has not begun"],
            ["training", "latents", "made"],
        ),
        (
            ["model", "best", "pruned"],
            ["search"],
            ["the pruned network", "converge phase has not begun"],
            ["training", "latents", "made"],
        ),
        (
            ["model", "best"],
            ["search", "converge"],
            ["converge phase has not ended"],
            ["channels", "training", "latents", "layers", "load", "made"],
        ),
    ],
)
def test_the_page_of_an_unfinished_run_tells_what_is_missing(copy, gone, phases, told, sections):
    for name in gone:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if (copy / "metrics.jsonl").exists():
        records = workdir_metrics.read(copy / "metrics.jsonl")
        lines = [json.dumps(r) + "\n" for r in records if r["phase"] in phases]
        (copy / "metrics.jsonl").write_text("".join(lines))
    there = reader.read(copy)
    begun = RunReport(there, None)
    everything = Page(page(begun, run_charts(begun)))
    assert "This run is not finished. Missing are:" in everything.text
    absent = begun.missing()
    assert len(absent) == len(told)
    assert all(part in text for part, text in zip(told, absent, strict=True))
    assert everything.sections == sections
    assert ("Test error so far" in everything.text) == bool(phases)


def test_a_finished_run_that_was_given_more_epochs_says_so(run):
    assert run.missing() == []
    config = {**run.result.config, "converge": {"epochs": 5}}
    longer = dataclasses.replace(run.result, config=config)
    told = "epochs 2 to 5 of converge: the run has since been given more of them"
    assert RunReport(longer, run.summary).missing() == [told]


def test_records_of_earlier_versions_lack_the_latents_and_the_page_says_so(run):
    records = [
        {k: v for k, v in r.items() if k not in ("magnitudes", "survivors")}
        for r in run.result.records
    ]
    old = dataclasses.replace(run.result, records=records)
    run = RunReport(old, {**run.summary, "latency": None})
    text = Page(page(run, run_charts(run))).text
    assert "How the latents died is not shown" in text
    assert "Latency was not measured" in text


def test_losses_that_are_not_finite_are_left_out_of_the_drawings(run):
    records = [*run.result.records, {"phase": "converge", "step": 10**6, "loss": float("nan")}]
    there = RunReport(dataclasses.replace(run.result, records=records), run.summary)
    (axes,) = run_charts(there)["loss"].figure.axes
    drawn = axes.lines[0].get_xdata()
    assert np.nanmax(drawn) < 10**6
    assert np.isnan(drawn).sum() == 1  # where one phase follows another


# Words


@pytest.mark.parametrize(
    ("low", "median", "high", "told"),
    [
        (1.25, 1.5, 1.75, "1.50 times as fast (1.25 to 1.75)"),
        (0.9, 1.1, 1.3, "no difference beyond the noise (0.90 to 1.30 times as fast)"),
        (0.5, 0.8, 0.9, "slower: takes 1.25 times as long (1.11 to 2.00)"),
    ],
)
def test_a_speed_up_within_the_noise_is_none(run, low, median, high, told):
    row = {"batch": 1, "rounds": 5, "before_ms": {"median": 2.0}, "after_ms": {"median": 1.0}}
    row["speedup"] = {"low": low, "median": median, "high": high}
    latency = {"batches": [row], "input_shape": [8, 8, 1], "hardware": "here"}
    assert told in Page(page(RunReport(run.result, {**run.summary, "latency": latency}), {})).text


@pytest.mark.parametrize(("count", "of"), [(0, 1), (1, 1), (6, 500), (263, 500), (499, 500)])
def test_intervals_are_those_of_another_package(count, of):
    expected = binomtest(count, of).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(count / of, of), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"name": "resnet", "depth": 20, "width": 1.0}, "ResNet-20"),
        ({"name": "resnet", "depth": 56, "width": 0.5}, "ResNet-56 (width 0.5)"),
        ({"name": "mobilenet_v2", "weights": "runs/theirs/model"}, "MobileNetV2"),
        ({"name": "theirs", "depth": 3}, "theirs (depth 3)"),
        ({}, "network"),
    ],
)
def test_a_network_is_called_as_papers_call_it(model, name):
    assert network_name(model) == name


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (compact(0), "0"),
        (compact(999), "999"),
        (compact(1000), "1.00 k"),
        (compact(100_000), "100 k"),
        (compact(999_600), "1.00 M"),
        (compact(20_439_552), "20.4 M"),
        (compact(4_100_000_000), "4.10 G"),
        (in_words({"flops": 1.02, "params": 0.22}), "0.22 of the params"),
        (in_words({"flops": 1.0}), "1 of the FLOPs"),
        (duration(85.4), "85 s"),
        (duration(1200), "20 min"),
        (duration(12_000), "3 h 20 min"),
        (milliseconds(0.51849), "0.518 ms"),
        (milliseconds(1.0023), "1.00 ms"),
        (milliseconds(99.97), "100 ms"),
        (milliseconds(1234.5), "1,234 ms"),
        (loss_text(0.047781), "0.04778"),
        (loss_text(0.0), "0"),
        (loss_text(2838.6), "2,839"),
        (loss_text(1_103_192.32), "1.10e+06"),
    ],
)
def test_numbers_for_people(shown, expected):
    assert shown == expected
