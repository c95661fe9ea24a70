"""Images from files are labelled and restored, or refused in one line."""

import json
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
from networks import MIXED_INPUT, RNGS, Mixed, filled, run
import numpy as np
from PIL import ExifTags, Image
import pytest
from runs import commanded

import dhp_jax as dhp
from dhp_jax import config as dhp_config
from dhp_jax import predict
from dhp_jax.cli import opened
from dhp_jax.data.labelled import digits
from dhp_jax.pipeline.setup import set_up


def told(capsys, *arguments):
    """The exit code, and what was printed to each stream."""
    return commanded(capsys, predict.main, "predict", *arguments)


def write(path, *shape, seed=0):
    """A random image file; returns its pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture(scope="module")
def restorers(tmp_path_factory):
    """Folders of two gray networks that denoise, and one that doubles colour images."""
    folder = tmp_path_factory.mktemp("restorers")
    networks = {
        "dncnn": {"depth": 3, "features": 4},
        "unet": {"depth": 2, "features": 4},
        "edsr": {"scale": 2, "blocks": 1, "features": 4},
    }
    for family, arguments in networks.items():
        model = filled(lambda rngs, f=family, a=arguments: dhp.models.build(f, rngs=rngs, **a))
        dhp.save(folder / family, dhp.prune(model))
    return folder


# Labels


def test_digits_are_labelled_as_the_network_labels_its_test_data(digits_run, tmp_path, capsys):
    source = digits.load()
    raw = source.read("test")[0][:3]
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, raw, strict=True):
        Image.fromarray(np.round(image[..., 0] * (255 / 16)).astype(np.uint8)).save(file)
    code, out, _ = told(capsys, digits_run, *files, "--top=2")
    model = dhp.load(digits_run / "model")
    x = (jnp.asarray(raw, jnp.float32) - source.mean[0]) / source.std[0]
    shares = np.asarray(jax.nn.softmax(run(model, x)[0]))
    assert code == 0
    for line, file, row in zip(out.splitlines(), files, shares, strict=True):
        name, found = line.split(": ")
        assert name == str(file)
        best = np.argsort(-row)[:2]
        for text, i in zip(found.split(", "), best, strict=True):
            label, share = text.split(" ")
            assert label == source.class_names[i]
            assert abs(float(share.rstrip("%")) / 100 - row[i]) < 0.01


def test_classes_without_names_are_numbers_and_probabilities_sum_to_one(tmp_path):
    model = filled(Mixed)
    dhp.save(
        tmp_path / "own", dhp.prune(model), input_shape=MIXED_INPUT,
        task="classification", mean=[100.0] * 3, std=[50.0] * 3,
    )  # fmt: skip
    write(tmp_path / "a.png", 4, 4, 3)
    saved = opened(tmp_path / "own", build="networks:Mixed")
    (ranking,) = predict.label(saved, [tmp_path / "a.png"], top=9)
    assert sorted(name for name, _ in ranking) == ["0", "1", "2", "3", "4"]
    assert abs(sum(share for _, share in ranking) - 1) < 1e-5
    assert [share for _, share in ranking] == sorted((s for _, s in ranking), reverse=True)


def test_images_of_another_size_are_resized_if_told_so(digits_run, tmp_path, capsys):
    write(tmp_path / "large.png", 20, 30)
    code, _, err = told(capsys, digits_run, tmp_path / "large.png")
    assert code == 2
    assert "expected 8 pixels wide and 8 high, got 30 and 20; --resize brings" in err
    code, out, _ = told(capsys, digits_run, tmp_path / "large.png", "--resize")
    assert (code, out.count("%")) == (0, 3)


def test_images_are_resized_as_those_that_the_network_was_tested_on(tmp_path):
    write(tmp_path / "large.png", 40, 60, 3)
    noted = {"task": "classification", "mean": [0.0] * 3, "std": [1.0] * 3, "resize": 6}
    dhp.save(tmp_path / "own", filled(Mixed), input_shape=MIXED_INPUT, **noted)
    with Image.open(tmp_path / "large.png") as image:
        pixels = np.asarray(image.resize((9, 6), Image.Resampling.BICUBIC))[1:5, 2:6]
    saved = opened(tmp_path / "own", build="networks:Mixed")
    logits = np.asarray(saved.model(jnp.asarray(pixels[None], jnp.float32)))
    ((best, _), *_) = predict.label(saved, [tmp_path / "large.png"], resize=True)[0]
    assert int(best) == int(logits.argmax())
    ((_, share),) = predict.label(saved, [tmp_path / "large.png"], top=1, resize=True)[0]
    np.testing.assert_allclose(share, jax.nn.softmax(logits).max(), rtol=1e-5)


def turned(path):
    """A colour image file that lies on its side; returns its pixels as they are to be seen."""
    lying = write(path, 4, 6, 3)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # its top is on the right
    Image.fromarray(lying).save(path, exif=exif)
    return np.rot90(lying, -1)


def test_a_photograph_that_lies_on_its_side_is_labelled_upright(tmp_path):
    dhp.save(
        tmp_path / "own", Averaging(), input_shape=(6, 4, 3),
        task="classification", mean=[0.0] * 3, std=[64.0] * 3,
    )  # fmt: skip
    upright = turned(tmp_path / "a.png")
    saved = opened(tmp_path / "own", build="test_predict:Averaging")
    (ranking,) = predict.label(saved, [tmp_path / "a.png"])
    expected = np.asarray(jax.nn.softmax(upright[0].mean(0) / 64))  # of its first row
    found = {int(name): share for name, share in ranking}
    np.testing.assert_allclose([found[i] for i in range(3)], expected, rtol=1e-5)


def test_a_network_of_gray_and_colour_data_labels_both(tmp_path):
    """As it was trained: `data.channels=3` is noted with it."""
    for folder in (f"{split}/{label}" for split in ("train", "test") for label in "abc"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder / "colour.png", 6, 4, 3)
        gray = write(tmp_path / folder / "gray.png", 6, 4)
    config = dhp_config.default()
    config.batch_size = 2
    config.data.update(name="image_folder", dir=str(tmp_path), channels=3)
    notes = set_up(config).notes
    dhp.save(tmp_path / "own", Averaging(), input_shape=(6, 4, 3), **notes)
    saved = opened(tmp_path / "own", build="test_predict:Averaging")
    files = [tmp_path / "test/a/colour.png", tmp_path / "test/a/gray.png"]
    (_, ranking) = predict.label(saved, files)
    means = (gray[0].mean() - np.array(notes["mean"])) / notes["std"]
    expected = np.asarray(jax.nn.softmax(means))
    np.testing.assert_allclose([dict(ranking)[c] for c in "abc"], expected, rtol=1e-5)


class Averaging(nnx.Module):
    """Scores are the means of the first row, by channel."""

    def __init__(self, rngs=None):
        self.factor = nnx.Param(jnp.ones(1))

    def __call__(self, x):
        return self.factor[...] * x[:, 0].mean(1)


# Restored images


def test_a_photograph_that_lies_on_its_side_is_restored_upright(restorers, tmp_path):
    upright = turned(tmp_path / "a.png")
    Image.fromarray(upright).save(tmp_path / "b.png")
    saved = opened(restorers / "edsr")
    files = predict.restore_images(
        saved, [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out"
    )
    one, other = (Image.open(file) for file in files)
    assert one.size == (8, 12)
    np.testing.assert_array_equal(one, other)
    assert not one.getexif()


def test_no_image_is_written_unless_all_can_be_decoded(restorers, tmp_path, capsys):
    write(tmp_path / "whole.png", 9, 9)
    write(tmp_path / "cut.png", 90, 90)
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    code, out, err = told(
        capsys, restorers / "dncnn", tmp_path / "whole.png", tmp_path / "cut.png",
        f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: images: cannot read '{tmp_path / 'cut.png'}': ")
    assert not (tmp_path / "out").exists()


def test_an_image_is_denoised_whole_and_in_tiles_without_a_seam(restorers, tmp_path, capsys):
    pixels = write(tmp_path / "noisy.png", 30, 41)
    model = dhp.load(restorers / "dncnn")
    expected = np.asarray(model(jnp.asarray(pixels, jnp.float32)[None, :, :, None]))[0, :, :, 0]
    for i, options in enumerate(([], ["--tile=16"])):
        out = tmp_path / f"out{i}"
        code, printed, _ = told(
            capsys, restorers / "dncnn", tmp_path / "noisy.png", f"--out={out}", *options
        )
        assert (code, printed) == (0, f"{out / 'noisy.png'}\n")
        found = np.asarray(Image.open(out / "noisy.png"), np.float32)
        assert np.abs(found - expected.clip(0, 255)).max() <= 0.51  # rounded to whole numbers


def test_an_image_is_enlarged(restorers, tmp_path):
    pixels = write(tmp_path / "small.webp", 9, 7, 3)
    pixels = np.asarray(Image.open(tmp_path / "small.webp").convert("RGB"))
    saved = opened(restorers / "edsr")
    (file,) = predict.restore_images(saved, [tmp_path / "small.webp"], tmp_path / "out")
    found = np.asarray(Image.open(file))
    assert (file.name, found.shape) == ("small.png", (18, 14, 3))
    expected = np.asarray(saved.model(jnp.asarray(pixels, jnp.float32)[None]))[0].clip(0, 255)
    assert np.abs(found - expected).max() <= 0.51


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{digits}"], "error: the following arguments are required: images"),
        (["{tmp}", "{tmp}/gray.png"], "error: model: expected a folder that dhp.save wrote or a"),
        (
            ["{digits}", "{tmp}/gray.png", "--which=search"],
            "error: model: expected a folder that dhp.save wrote or a run's with search/, got "
            "{digits}; it has model, best, see --which",
        ),
        (["{digits}", "{tmp}/none.png"], "error: images: cannot read '{tmp}/none.png': [Errno 2]"),
        (
            ["{tmp}", "{tmp}"],
            "error: images: expected files, such as {tmp}/*; got the folder {tmp}",
        ),
        (["{digits}", "{tmp}/text.png"], "error: images: cannot read '{tmp}/text.png': it is no"),
        (["{digits}", "{tmp}/cut.png"], "error: images: cannot read '{tmp}/cut.png': "),
        (
            ["{digits}", "{tmp}/colour.png"],
            "error: {tmp}/colour.png: expected a gray image of at most 8 bits a channel, as the "
            "network takes; got Pillow's mode RGB",
        ),
        (["{digits}", "{tmp}/deep.png"], "error: {tmp}/deep.png: expected a gray image of at most"),
        (["{digits}", "{tmp}/gray.png", "--top=0"], "error: --top: expected a positive integer"),
        (["{digits}", "{tmp}/gray.png", "--out=x"], "error: --out: expected none, for {digits}"),
        (
            ["{digits}", "{tmp}/gray.png", "--tile=64"],
            "error: --tile: expected none, for {digits}/model labels images; got 64",
        ),
        (["{restorers}/dncnn", "{tmp}/gray.png"], "error: --out: expected a folder, for "),
        (
            ["{restorers}/dncnn", "{tmp}/gray.png", "--out={tmp}/text.png"],
            "error: --out: expected a folder that can be written, got {tmp}/text.png (Not a dir",
        ),
        (
            ["{restorers}/dncnn", "{tmp}/gray.png", "--out={tmp}/out", "--top=3"],
            "error: --top: expected none, for {restorers}/dncnn restores images; got 3",
        ),
        (
            ["{restorers}/dncnn", "{tmp}/gray.png", "--out={tmp}/out", "--resize"],
            "error: --resize: expected none, for {restorers}/dncnn restores images; got True",
        ),
        (
            ["{restorers}/dncnn", "{tmp}/gray.png", "--out={tmp}/out", "--which=best"],
            "error: --which: expected none, for {restorers}/dncnn is one network; got best",
        ),
        (
            ["{restorers}/dncnn", "{tmp}/gray.png", "--build=os:sep"],
            "error: build: expected module:function, such as networks:Net; got 'os:sep': it is '",
        ),
        (
            ["{restorers}/dncnn", "{tmp}/gray.png", "--build=os:getcwd"],
            "error: build: expected a function build(rngs) that makes the unpruned network, an "
            "nnx.Module; got <built-in function getcwd>: ",
        ),
        (
            ["{restorers}/edsr", "{tmp}/gray.png", "--out={tmp}/out"],
            "error: {tmp}/gray.png: expected a colour image",
        ),
        (
            ["{restorers}/dncnn", "{tmp}/gray.png", "{tmp}/a/gray.png", "--out={tmp}/out"],
            "error: {tmp}/gray.png: expected images of different names, got two of gray",
        ),
        (
            ["{restorers}/dncnn", "{tmp}/gray.png", "--out={tmp}"],
            "error: --out: expected a folder other than the images', got {tmp}",
        ),
        (
            ["{restorers}/unet", "{tmp}/gray.png", "--out={tmp}/out", "--tile=32"],
            "error: --tile: expected more than 32, twice the overlap; got 32",
        ),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    digits_run, restorers, tmp_path, capsys, arguments, message
):
    write(tmp_path / "gray.png", 8, 8)
    write(tmp_path / "colour.png", 8, 8, 3)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "gray.png").read_bytes()[:60])
    names = {"digits": digits_run, "restorers": restorers, "tmp": tmp_path}
    code, out, err = told(capsys, *(argument.format(**names) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith(message.format(**names))
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_path_may_begin_with_the_home_folder(restorers, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    dhp.save("~/net", dhp.load(restorers / "dncnn"))
    assert dhp.load("~/net").channels == 1
    code, _, err = told(capsys, "~/net", "~/none.png", "--out=~/a b")
    assert (code, err[: err.index(": [")]) == (
        2,
        f"error: images: cannot read '{tmp_path}/none.png'",
    )


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    assert commanded(capsys, interrupted, "predict") == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({}, "expected a note task, classification, super_resolution or denoising; dhp.save"),
        ({"task": "classification"}, "expected a note input_shape; dhp.save"),
        (
            {"task": "classification", "input_shape": MIXED_INPUT, "mean": [1.0] * 3},
            "expected notes std of the pixels it was trained on; dhp.save",
        ),
    ],
)
def test_what_is_not_noted_is_asked_for(tmp_path, capsys, notes, message):
    dhp.save(tmp_path / "own", dhp.prune(filled(Mixed)), **notes)
    write(tmp_path / "a.png", 4, 4, 3)
    code, _, err = told(capsys, tmp_path / "own", tmp_path / "a.png", "--build=networks:Mixed")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


DIGITS = {
    "task": "classification",
    "input_shape": [8, 8, 1],
    "mean": [5],
    "std": [6.0],
    "peak": 16,
    "class_names": list("0123456789"),
}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("task", 5, "a text, got 5"),
        ("task", "nonsense", "one of classification, denoising, super_resolution; got 'nonsense'"),
        ("task", "denoising", "'classification', as of family 'resnet'; got 'denoising'"),
        (
            "input_shape",
            5,
            "a list of positive integers, of at most 268435456 as their product, got",
        ),
        (
            "input_shape",
            [8, 0, 1],
            "a list of positive integers, of at most 268435456 as their product, got",
        ),
        (
            "input_shape",
            [8, True, 1],
            "a list of positive integers, of at most 268435456 as their product, got",
        ),
        ("input_shape", [2**16, 2**16, 1], "a list of positive integers, of at most 268435456 as"),
        (
            "input_shape",
            [],
            "a list of positive integers, of at most 268435456 as their product, got",
        ),
        (
            "input_shape",
            None,
            "a list of positive integers, of at most 268435456 as their product, got",
        ),
        ("mean", "abc", "a list of 1 numbers of at most 1048576, one for each channel, got 'abc'"),
        ("mean", [1, 2], "a list of 1 numbers of at most 1048576, one for each channel, got [1, 2"),
        ("mean", [1e300], "a list of 1 numbers of at most 1048576, one for each channel, got [1e"),
        ("mean", [True], "a list of 1 numbers of at most 1048576, one for each channel, got [True"),
        ("std", [0], "a list of 1 numbers in 1e-06 .. 1048576, one for each channel, got [0]"),
        ("std", [-1.0], "a list of 1 numbers in 1e-06 .. 1048576, one for each channel, got [-1.0"),
        ("std", [], "a list of 1 numbers in 1e-06 .. 1048576, one for each channel, got []"),
        ("peak", "x", "a number in 1e-06 .. 1048576, got 'x'"),
        ("peak", 0, "a number in 1e-06 .. 1048576, got 0"),
        ("class_names", 5, "a list of texts of at most 1024 characters, none of them a control"),
        ("class_names", [5] * 10, "a list of texts of at most 1024 characters, none of them a con"),
        ("class_names", ["\x1b[2J"], "a list of texts of at most 1024 characters, none of them a"),
        ("class_names", ["a"], "10 names, as many as the network has outputs, got 1"),
    ],
)
def test_notes_from_elsewhere_are_checked(classifier, tmp_path, capsys, field, value, expected):
    path = noting(classifier, tmp_path / "net", {field: value})
    write(tmp_path / "a.png", 8, 8)
    code, out, err = told(capsys, tmp_path / "net", tmp_path / "a.png")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{path}: notes.{field}: expected {expected}" in err


def test_an_input_that_the_network_does_not_take_is_told(classifier, tmp_path, capsys):
    notes = {"input_shape": [8, 8, 3], "mean": [5] * 3, "std": [6] * 3}
    path = noting(classifier, tmp_path / "net", notes)
    code, _, err = told(capsys, tmp_path / "net", tmp_path / "none.png")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{path}: notes.input_shape: the model does not take (8, 8, 3): " in err


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The folder of a network that labels gray images of 8 x 8."""
    arguments = {"depth": 8, "width": 0.25, "channels": 1}
    model = filled(lambda _: dhp.models.build("resnet", rngs=RNGS, **arguments))
    folder = tmp_path_factory.mktemp("classifier")
    dhp.save(folder, dhp.prune(model), **DIGITS)
    return folder


def noting(network, folder, notes):
    """Copies a network, and edits its notes; returns the file that holds them."""
    shutil.copytree(network, folder)
    path = folder / "model.json"
    description = json.loads(path.read_text())
    description["notes"] |= notes
    path.write_text(json.dumps(description))
    return path


def test_a_network_of_latents_is_used_as_an_ordinary_one(tmp_path):
    model = filled(lambda _: dhp.models.build("dncnn", depth=3, features=4, rngs=RNGS))
    dhp.save(tmp_path, model)
    saved = opened(tmp_path)
    assert not dhp.latents(saved.model)
    assert saved.task == "denoising"
    assert isinstance(saved.model.tail, nnx.Conv)
