"""Runs of super-resolution and denoising on made folders: what they leave, and what they refuse."""

import json
import re
import shutil

import numpy as np
from PIL import Image
import pytest
from runs import Interrupter, Stop, check_same_end, contents, summary_text

import dhp_jax as dhp
from dhp_jax import config as dhp_config
from dhp_jax.data.photos.photographs import Photograph
from dhp_jax.pipeline.execution import execute
from dhp_jax.pipeline.preparation import prepare
from dhp_jax.report import write as report_write
from dhp_jax.report.crops import crops
from dhp_jax.report.format import main_metric
from dhp_jax.tasks import metrics
from dhp_jax.workdir import metrics as workdir_metrics
from dhp_jax.workdir import reader

SIZES = ((24, 40), (32, 32), (25, 33))
TASKS = ("denoising", "super_resolution")
RUN = ("best", "model", "config.json", "metrics.jsonl", "tensorboard", "summary.json")
RUN += ("checkpoints", "data.json", "log.txt", ".lock")
REPORT = ("report.html", "layers.md", "plots", "pictures")


def draw(path, height, width, seed):
    """Saves a picture of coloured waves."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))[..., None]
    waves = np.sin(rows / rng.uniform(2, 6, 3)) + np.cos(columns / rng.uniform(2, 6, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(128 + 50 * waves, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders `train` and `test` of photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for i, size in enumerate(SIZES):
        draw(folder / "train" / f"{i}.png", *size, i)
    for i, size in enumerate(SIZES[:2]):
        draw(folder / "test" / f"t{i}.png", *size, 10 + i)
    return folder


def tiny(task, folder, **changes):
    """A configuration of seconds."""
    config = dhp_config.default(task)
    config.update(batch_size=2, log_every=2)
    config.data.update(name="photo_folder", dir=str(folder / "train"))
    config.data.test_dir = str(folder / "test")
    config.task.update(patch=8, steps_per_epoch=4)
    if task == "denoising":
        config.task.sigma = 30.0
        config.model.update(depth=3, width=0.125)
    else:
        config.task.update(patch=16, scale=2)
        config.model.update(blocks=1, width=0.125)
    config.search.update(epochs=2, drops=(), learning_rate=1e-2, strength=10.0, min_channels=1)
    config.converge.update(epochs=2, drops=(1.0,))
    config.baseline.update(epochs=1, drops=())
    config.update_from_flattened_dict(changes)
    return config


RUNS = [pytest.param(t, marks=[pytest.mark.slow] * (t == "super_resolution")) for t in TASKS]


@pytest.fixture(scope="module", params=RUNS)
def finished(request, folder, tmp_path_factory):
    """A task, and the summaries and directories of its baseline and of its pruned network."""
    task, workdir = request.param, tmp_path_factory.mktemp("runs")
    summaries = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_write, "latency", lambda result: None)
        for method in ("baseline", "dhp"):
            run = prepare(tiny(task, folder, method=method), workdir / method)
            summaries[method] = execute(run, baseline=workdir / "baseline")
    return task, summaries, workdir


def measured(task, workdir, what):
    """Mean PSNR and SSIM of the pictures that a run has left."""
    values = []
    for pictures in sorted((workdir / "pictures").iterdir()):
        images = [np.array(Image.open(pictures / f"{name}.png")) for name in (what, "target")]
        images = [image.reshape(*image.shape[:2], -1) for image in images]
        shaved = {"shave": 1} if task == "denoising" else {"shave": 2, "on_luminance": True}
        values.append(metrics.compare(*images, **shaved))
    return {name: np.mean([value[name] for value in values]) for name in ("psnr", "ssim")}


# What a run leaves


def test_a_run_leaves_pictures_and_plots_beside_what_every_run_leaves(finished):
    _, _, workdir = finished
    found = {
        method: {path.name for path in (workdir / method).iterdir()}
        for method in ("baseline", "dhp")
    }
    assert found == {
        "baseline": {*RUN, *REPORT},
        "dhp": {*RUN, *REPORT, "search", "pruned"},
    }
    searched = {"channels", "ratio", "latents", "magnitudes", "survivors"}
    for method, more in (("baseline", set()), ("dhp", searched)):
        plots = {path.stem for path in (workdir / method / "plots").iterdir()}
        assert plots == {"psnr", "crops", "loss"} | more
        pictures = {
            str(p.relative_to(workdir / method)) for p in workdir.glob(f"{method}/pic*/*/*")
        }
        assert pictures == {
            f"pictures/t{i}/{what}.png" for i in (0, 1) for what in ("input", "output", "target")
        }


def test_pictures_have_the_size_and_the_target_the_pixels_of_the_photograph(finished, folder):
    task, _, workdir = finished
    for i, (height, width) in enumerate(SIZES[:2]):
        original = Image.open(folder / "test" / f"t{i}.png")
        expected = np.array(original.convert("L") if task == "denoising" else original)
        for what in ("input", "output", "target"):
            image = Image.open(workdir / "dhp" / "pictures" / f"t{i}" / f"{what}.png")
            assert image.size == (width, height)
        np.testing.assert_array_equal(np.array(image), expected)


def test_the_summary_has_the_psnr_and_ssim_of_the_pictures(finished):
    task, summaries, workdir = finished
    for method, summary in summaries.items():
        test = summary["test"]
        assert json.loads((workdir / method / "summary.json").read_text()) == summary
        assert summary["task"]["name"] == task
        assert test["last"] == pytest.approx(measured(task, workdir / method, "output"), rel=1e-9)
        untouched = measured(task, workdir / method, "input")
        if task == "super_resolution":
            assert test["without_network"] == pytest.approx(untouched, rel=1e-9)
        else:  # a picture of the noise is clipped, which brings it nearer to the original
            assert test["without_network"]["psnr"] < untouched["psnr"]
        assert test["best"]["psnr"] >= test["last"]["psnr"] > 0
    test = summaries["dhp"]["test"]
    assert test["unpruned"] == summaries["baseline"]["test"]["last"]
    for name in ("after_search", "after_pruning"):
        assert test[name].keys() == {"psnr", "ssim"}
    assert 0.3 < summaries["dhp"]["flops"]["ratio"] <= 0.6


def test_the_records_have_the_metrics_of_every_epoch(finished):
    _, summaries, workdir = finished
    records = workdir_metrics.read(workdir / "dhp" / workdir_metrics.RECORDS)
    converge = [record for record in records if record["phase"] == "converge"]
    assert [record["step"] for record in converge] == [2, 4, 6, 8]  # 4 steps an epoch
    assert all(0 < record["psnr"] < 60 and record["loss"] > 0 for record in converge)
    tests = [{n: r[f"test_{n}"] for n in ("psnr", "ssim")} for r in converge if "test_psnr" in r]
    phase = summaries["dhp"]["phases"]["converge"]
    assert (phase["epochs"], len(tests)) == (2, 2)
    assert phase["last"] == tests[-1]
    assert phase["best"] == max(tests, key=lambda test: test["psnr"])


def test_the_text_of_a_summary_is_of_psnr_and_ssim(finished):
    _, summaries, _ = finished
    test, text = summaries["dhp"]["test"], summary_text(summaries["dhp"])
    lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    starts = [[line[0], line[1].split(":")[0]] for line in lines if len(line) == 2]

    def shown(name):
        return f"{test[name]['psnr']:.2f} dB, SSIM {test[name]['ssim']:.4f}"

    assert ["test PSNR, input", shown("without_network")] in lines
    assert ["right after pruning", shown("after_pruning")] in starts
    assert ["test PSNR, unpruned", f"{shown('unpruned')}, epoch 1"] in lines
    assert ["test PSNR, pruned", f"{shown('last')}, epoch 2"] in lines
    assert main_metric(test["last"]) == "psnr"


def test_the_networks_are_of_the_channels_and_the_scale_of_the_task(finished):
    task, _, workdir = finished
    model = dhp.load(workdir / "dhp" / "model")
    channels, scale = (1, 1) if task == "denoising" else (3, 2)
    assert not dhp.latents(model)
    output = model(np.zeros((1, 10, 12, channels), np.float32))
    assert output.shape == (1, 10 * scale, 12 * scale, channels)


@pytest.mark.usefixtures("without_pages")
def test_a_run_that_goes_on_after_its_search_ends_with_the_same_bits(finished, folder, tmp_path):
    task, _, workdir = finished
    again = shutil.copytree(workdir / "dhp", tmp_path / "run")
    for name in ("model", "best", "pruned", "pictures", "plots"):
        shutil.rmtree(again / name)
    execute(prepare(tiny(task, folder), again), baseline=workdir / "baseline")
    before, after = contents(workdir / "dhp"), contents(again)
    before = {path.relative_to(workdir / "dhp"): data for path, data in before.items()}
    after = {path.relative_to(again): data for path, data in after.items()}
    for path, data in before.items():
        if path.suffix == ".safetensors" or path.parts[0] == "pictures":
            assert after[path] == data, path


def test_the_folders_of_the_photographs_may_move(finished, folder, tmp_path):
    task, _, workdir = finished
    moved = shutil.copytree(folder, tmp_path / "moved")
    again = shutil.copytree(workdir / "dhp", tmp_path / "run")
    prepare(tiny(task, moved), again)
    stored = json.loads((again / "config.json").read_text())["data"]
    assert (stored["dir"], stored["test_dir"]) == (str(moved / "train"), str(moved / "test"))


def test_a_run_is_not_continued_on_other_test_photographs(finished, folder, tmp_path):
    task, _, workdir = finished
    again = shutil.copytree(workdir / "dhp", tmp_path / "run")
    config = tiny(task, folder)
    config.data.test_dir = str(folder / "train")
    with pytest.raises(ValueError, match=r"workdir: .* config\.data\.test_dir is "):
        prepare(config, again)


@pytest.mark.usefixtures("without_pages")
def test_a_baseline_on_other_test_photographs_is_left_out(finished, tmp_path):
    _, _, workdir = finished
    baseline = shutil.copytree(workdir / "baseline", tmp_path / "baseline")
    summary = json.loads((baseline / "summary.json").read_text())
    assert report_write.write(workdir / "dhp", baseline=baseline)["test"]["unpruned"] is not None
    summary["test"]["without_network"]["psnr"] += 0.5
    (baseline / "summary.json").write_text(json.dumps(summary))
    assert report_write.write(workdir / "dhp", baseline=baseline)["test"]["unpruned"] is None


def test_the_noise_of_test_images_does_not_depend_on_the_seed_of_a_run(folder, tmp_path):
    config = tiny("denoising", folder)
    inputs = []
    for config.seed in (0, 1):
        task = prepare(config, tmp_path / str(config.seed)).setup.task
        inputs.append(task.test_input(Photograph("", np.zeros((4, 4, 1), np.uint8), None), 3))
    np.testing.assert_array_equal(*inputs)


def test_crops_leave_a_baseline_out_that_was_tested_on_other_photographs(finished, tmp_path):
    _, _, workdir = finished
    baseline = shutil.copytree(workdir / "baseline", tmp_path / "baseline")

    def columns():
        result = reader.read(workdir / "dhp")
        return list(crops(result, baseline)[0].images)

    with_baseline = columns()
    (baseline / "pictures" / "t1").rename(baseline / "pictures" / "t9")
    assert [title for title in with_baseline if title != "unpruned"] == columns()
    assert with_baseline[:2] == ["input", "unpruned"]
    assert with_baseline[2].startswith("pruned, ")
    assert with_baseline[3] == "original"


# What is refused before anything is written


def add(kind):
    """Makes a folder of something wrong in the place of the training photographs."""

    def change(folder):
        shutil.rmtree(folder / "train")
        (folder / "train").mkdir()
        if kind == "gray":
            Image.fromarray(np.zeros((32, 32), np.uint8)).save(folder / "train" / "g.png")
        if kind == "small":
            draw(folder / "train" / "s.png", 15, 40, 0)
        if kind == "broken":
            (folder / "train" / "b.png").write_text("no picture")

    return change


REFUSED = [  # task, changed fields, a change of the folders, parts of the message
    ("super_resolution", {"model.scale": 2}, None, ["config.model.scale", "config.task.scale"]),
    ("super_resolution", {"model.channels": 3}, None, ["config.model.channels", "task.channels"]),
    ("denoising", {"model.channels": 1}, None, ["config.model.channels", "config.task.channels"]),
    ("denoising", {"model.dtype": "x"}, None, ["config.model.dtype", "config.dtype, not given"]),
    ("super_resolution", {"task.patch": 15}, None, ["config.task.patch", "multiple", "2", "15"]),
    ("super_resolution", {"task.patch": 34}, None, ["data.dir", "34x34", "24x40"]),
    ("denoising", {"task.patch": 33}, None, ["data.dir", "33x33", "24x40"]),
    ("denoising", {"model.depth": 2}, None, ["config.model", "depth", "at least 3"]),
    ("denoising", {"model.name": "srresnet"}, None, ["config.model.name", "dncnn, unet"]),
    ("super_resolution", {"model.name": "edrs"}, None, ["config.model.name", "mean 'edsr'?"]),
    ("denoising", {"task.tile": 6}, None, ["config.task.tile", "more than 6", "got 6"]),
    ("denoising", {"task.tile": 8, "task.overlap": 4}, None, ["config.task.tile", "than 8"]),
    ("denoising", {"model.name": "unet", "model.depth": 17}, None, ["depth", "at most 8", "17"]),
    ("denoising", {"data.name": "photographs"}, None, ["data.dir", "photo_folder"]),
    ("denoising", {"target": 0.001}, None, ["config.target", "0.001"]),
    ("denoising", {"data.dir": None}, None, ["data.dir", "None"]),
    ("denoising", {"data.test_dir": None}, None, ["data.test_dir", "None"]),
    ("denoising", {"data.dir": "nowhere"}, None, ["data.dir", "'nowhere'"]),
    ("denoising", {}, add("nothing"), ["data.dir", "found none"]),
    ("denoising", {}, add("broken"), ["data.dir", "cannot read", "b.png"]),
    ("super_resolution", {}, add("gray"), ["data.dir", "expected color", "g.png"]),
    ("super_resolution", {}, add("small"), ["data.dir", "16x16", "15x40"]),
]


@pytest.mark.parametrize(("task", "changes", "folders", "parts"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(
    folder, tmp_path, task, changes, folders, parts
):
    if folders is not None:
        folder = shutil.copytree(folder, tmp_path / "data")
        folders(folder)
    config = tiny(task, folder)
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=".*".join(map(re.escape, parts))):
        prepare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_streamed_run_that_is_stopped_goes_on_with_the_same_bits(folder, tmp_path):
    """With photographs held out, and phases that end within an epoch."""
    streamed = {"data.streamed": True, "data.workers": 0, "data.cache": str(tmp_path / "cache")}
    fields = {"data.validation": 0.4, "search.max_steps": 3, "converge.max_steps": 6}
    config = tiny("denoising", folder, **streamed, **fields, **{"checkpoint.seconds": 0.0})
    summary = execute(prepare(config, tmp_path / "once"))
    assert {name: phase["steps"] for name, phase in summary["phases"].items()} == {
        "search": 3,
        "converge": 6,
    }
    validation = summary["validation"]
    assert validation["examples"] == round(0.4 * len(SIZES))
    assert validation["best"]["psnr"] >= validation["last"]["psnr"] > 0
    for stop in (("search", 1), ("converge", 5)):
        run = prepare(config, tmp_path / "again", [Interrupter(*stop)])
        with pytest.raises(Stop):
            execute(run)
    execute(prepare(config, tmp_path / "again"))
    check_same_end(tmp_path / "again", tmp_path / "once")
