"""Photographs from scikit-image and from folders: pairs, gray and color, every wrong input."""

import contextlib
from fractions import Fraction
from pathlib import Path
import re
import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from dhp_jax.data import decode
from dhp_jax.data.photos.bicubic import bicubic
from dhp_jax.data.photos.photographs import load
from dhp_jax.errors import DataNotFoundError


def pixels(height=24, width=32, channels=3, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, *args, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels(*args, **kwargs)
    Image.fromarray(image).save(path)
    return image


@pytest.fixture
def folders(tmp_path):
    """A training and a test folder of one color image each, and how to load them."""
    save(tmp_path / "train" / "a.png")
    save(tmp_path / "test" / "b.png")

    def load_folders(**kwargs):
        kwargs = {"patch": 8, **kwargs}
        return load("photo_folder", tmp_path / "train", tmp_path / "test", **kwargs)

    return tmp_path, load_folders


def refused(error, *parts):
    """Expects one line that holds every part."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{re.escape(p)})" for p in parts))


# The photographs of scikit-image


@pytest.mark.parametrize(("channels", "sizes"), [(1, (9, 3)), (3, (5, 2))])
def test_shipped_photographs_are_gray_only_if_that_is_asked_for(channels, sizes):
    data = load("photographs", channels=channels, patch=64)
    train, test = data.read("train"), data.read("test")
    assert tuple(data.sizes.values()) == (len(train), len(test)) == sizes
    assert (data.channels, data.scale) == (channels, 1)
    for photograph in train + test:
        assert photograph.target.dtype == np.uint8
        assert photograph.target.shape[2] == channels
        assert photograph.degraded is None
        assert photograph.target.std() > 10
    if channels == 3:  # none is a gray image in disguise
        assert all((p.target[..., 0] != p.target[..., 2]).mean() > 0.3 for p in train + test)


def test_photographs_without_scikit_image_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused(DataNotFoundError, "data.name: 'photographs' needs", 'pip install "dhp_jax['):
        load("photographs", patch=64)


def test_no_scene_is_in_both_splits_of_the_shipped_photographs():
    data = load("photographs", channels=1, patch=64)
    scenes = [
        {re.sub("_(left|right)$", "", photograph.name) for photograph in data.read(split)}
        for split in ("train", "test")
    ]
    assert not scenes[0] & scenes[1]


def test_shipped_photographs_are_degraded_by_bicubic_downscaling():
    chelsea = load("photographs", scale=4, patch=64).read("test")[0]
    assert chelsea.target.shape == (300, 448, 3)
    np.testing.assert_array_equal(chelsea.degraded, bicubic(chelsea.target, Fraction(1, 4)))


# Folders


def test_images_of_a_folder_are_read_in_sorted_order_whatever_their_format(tmp_path):
    names = ["f.PNG", "b.bmp", "e.jpeg", "a.JPG", "c.tif", "d.tiff", "g.webp", "h.gif"]
    for name in names:
        save(tmp_path / "train" / name)
    for other in ("notes.txt", ".hidden.png", "mask.npy"):
        (tmp_path / "train" / other).write_bytes(b"no image")
    image = save(tmp_path / "test" / "x.png", seed=1)
    data = load("photo_folder", str(tmp_path / "train"), tmp_path / "test", patch=8)
    assert [p.name for p in data.read("train")] == list("abcdefgh")
    (photograph,) = data.read("test")
    np.testing.assert_array_equal(photograph.target, image)


def test_photographs_that_are_held_out_are_those_that_training_lacks(folders):
    root, load_folders = folders
    for number in range(9):
        save(root / f"train/{number}.png", seed=number)
    whole, data = load_folders(scale=4), load_folders(scale=4, validation=0.3)
    assert dict(data.sizes) == {"train": 7, "test": 1, "validation": 3}
    found = {split: {p.name for p in data.read(split)} for split in data.sizes}
    assert found["train"] | found["validation"] == {p.name for p in whole.read("train")}
    assert all(photo.degraded is not None for photo in data.read("validation"))
    checksums = {whole.checksum("train"), *map(data.checksum, ("train", "validation"))}
    assert len(checksums) == 3
    assert whole.checksum("test") == data.checksum("test")
    with refused(ValueError, "data.validation: expected a share that leaves", "got 0.99"):
        load_folders(validation=0.99)
    with refused(ValueError, "no smaller than metrics need, 25x25"):
        load_folders(validation=0.3, smallest_test=25)


def save_turned(path, image):
    """Stores an image as a camera that was held sideways does: turned, and EXIF tells how."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rot90(image)).save(path, exif=exif)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_photographs_are_turned_upright(folders, suffix):
    root, load_folders = folders
    (root / "train/a.png").unlink()
    image = pixels(24, 33, seed=2)
    save_turned(root / f"train/a.{suffix}", image)
    data = load_folders(scale=4)
    (photograph,) = data.read("train")
    np.testing.assert_array_equal(photograph.target, image[:, :32])
    with data.stream(8, 0, root / "cache").training(
        (0,), examples=64, batch_size=64, first=0, last=1
    ) as batches:
        _, targets = next(iter(batches))
    patches = {image[y : y + 8, x : x + 8].tobytes() for y in range(17) for x in range(25)}
    assert {target.tobytes() for target in targets} <= patches


def test_both_images_of_a_pair_are_turned_upright(folders):
    root, load_folders = folders
    high, low = pixels(24, 32, seed=1), pixels(6, 8, seed=2)
    save_turned(root / "test/c_HR.png", high)
    save_turned(root / "test/c_LR.png", low)
    (root / "test/b.png").unlink()
    (photograph,) = load_folders(scale=4).read("test")
    np.testing.assert_array_equal(photograph.target, high)
    np.testing.assert_array_equal(photograph.degraded, low)


def test_one_warning_a_folder_tells_what_is_left_out(folders, caplog):
    root, load_folders = folders
    save(root / "train/HR/c.png")
    save(root / "train/LR/c.png", 6, 8)
    load_folders()
    assert caplog.text == ""
    save(root / "train/holidays/d.png")
    for name in ("notes.txt", ".hidden", ".cache/e.txt"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).write_text("no image")
    load_folders()
    (record,) = caplog.records
    told = record.getMessage()
    assert told.startswith(f"data.dir: 2 files left out, such as {root}/train/notes.txt; images")


def test_gray_is_the_luma_of_color(folders):
    (photograph,) = folders[1](channels=1).read("train")
    luma = pixels() @ np.array([0.299, 0.587, 0.114])
    assert photograph.target.shape == (24, 32, 1)
    assert np.abs(photograph.target[..., 0] - luma).max() <= 1


def test_gray_test_photographs_get_three_equal_channels(folders):
    root, load_folders = folders
    gray = save(root / "test" / "a.png", channels=1)
    target = load_folders().read("test")[0].target
    np.testing.assert_array_equal(target, np.repeat(gray[..., np.newaxis], 3, axis=2))


def test_targets_are_cropped_at_the_bottom_and_on_the_right(folders):
    root, load_folders = folders
    image = save(root / "train" / "a.png", 27, 33)
    data = load_folders(scale=4)
    (photograph,) = data.read("train")
    np.testing.assert_array_equal(photograph.target, image[:24, :32])
    np.testing.assert_array_equal(photograph.degraded, bicubic(image[:24, :32], 0.25))


PAIRS = {
    "beside": ("img_1_SRF_4_HR.png", "img_1_SRF_4_LR.png", "img_1_SRF_4"),
    "folders": ("HR/0801.png", "LR/0801.png", "0801"),
    "div2k": ("HR/0801.png", "LR/0801x4.png", "0801"),
    "other format": ("HR/0801.png", "LR/0801x4.bmp", "0801"),
}


@pytest.mark.parametrize(("high", "low", "name"), PAIRS.values(), ids=PAIRS)
def test_pairs_are_found(tmp_path, high, low, name):
    target = save(tmp_path / high, 26, 32)
    degraded = save(tmp_path / low, 6, 8, seed=1)
    data = load("photo_folder", tmp_path, tmp_path, scale=4, patch=8)
    (photograph,) = data.read("train")
    assert photograph.name == name
    np.testing.assert_array_equal(photograph.target, target[:24])
    np.testing.assert_array_equal(photograph.degraded, degraded)


CASES = [f"{h}{r}" for h in "Hh" for r in "Rr"]


@settings(deadline=None, derandomize=True, max_examples=32)
@given(
    high=st.sampled_from(CASES),
    low=st.sampled_from([case.replace("H", "L").replace("h", "l") for case in CASES]),
    in_folders=st.booleans(),
)
def test_pairs_are_found_whatever_the_case_of_their_marks(high, low, in_folders):
    places = (f"{high}/a.png", f"{low}/a.png") if in_folders else (f"a_{high}.png", f"a_{low}.png")
    with tempfile.TemporaryDirectory() as folder:
        for place, size in zip(places, ((24, 32), (6, 8)), strict=True):
            save(Path(folder) / place, *size)
        for scale, low_shape in ((4, (6, 8, 3)), (1, None)):
            data = load("photo_folder", folder, folder, scale=scale, patch=8)
            (photograph,) = data.read("test")
            assert (photograph.name, photograph.target.shape) == ("a", (24, 32, 3))
            assert getattr(photograph.degraded, "shape", None) == low_shape


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("photograph", "a_HR.png", "a_hr.png"),
        ("photograph", "a.png", "hr/a.png"),
        ("low-resolution image", "a_LR.png", "a_lr.png"),
        ("low-resolution image", "a_LR.png", "a_LR.bmp"),
        ("low-resolution image", "LR/a.png", "lr/a.png"),
    ],
)
def test_two_files_for_one_image_of_a_pair_are_refused(tmp_path, what, first, second):
    for name in {first, second, "a_HR.png" if "LR" in first else "a_LR.png"}:
        save(tmp_path / name)
    if (tmp_path / first).samefile(tmp_path / second):
        pytest.skip("this file system does not tell upper from lower case")
    names = sorted([str(tmp_path / first), str(tmp_path / second)])
    expected = f"data.dir: expected one {what} of the name 'a', got {names[0]!r} and {names[1]!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        load("photo_folder", tmp_path, tmp_path, scale=4, patch=8)


@pytest.mark.parametrize(("high", "low", "name"), PAIRS.values(), ids=PAIRS)
def test_low_resolution_images_are_ignored_at_scale_1(tmp_path, high, low, name):
    save(tmp_path / high)
    (tmp_path / low).parent.mkdir(exist_ok=True)
    (tmp_path / low).write_bytes(b"not even an image")
    data = load("photo_folder", tmp_path, tmp_path, patch=8)
    assert [(p.name, p.degraded) for p in data.read("train")] == [(name, None)]


# What is refused


def deep(path):
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(path)


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


# What is done to the folders, how they are loaded, the error and what its message holds. The
# training folder starts with a color a.png of 24 x 32 pixels, the test folder with such a b.png.
WRONG = {
    "no training images": (
        lambda root: empty(root / "train"), {}, DataNotFoundError,
        ["data.dir: ", "found none in", "train'"],
    ),
    "no test folder": (
        lambda root: (root / "test").rename(root / "gone"), {}, DataNotFoundError,
        ["data.test_dir: expected a folder of images; got", "test'"],
    ),
    "no image": (
        lambda root: (root / "train" / "c.png").write_bytes(b"text"), {}, DataNotFoundError,
        ["data.dir: cannot read", "c.png'"],
    ),
    "no test image": (
        lambda root: (root / "test" / "c.jpg").write_bytes(b""), {}, DataNotFoundError,
        ["data.test_dir: cannot read", "c.jpg'"],
    ),
    "a folder that looks like an image": (
        lambda root: (root / "train" / "c.png").mkdir(), {}, DataNotFoundError,
        ["data.dir: cannot read", "c.png'"],
    ),
    "sixteen bits": (
        lambda root: deep(root / "train" / "c.png"), {}, DataNotFoundError,
        ["data.dir: expected images of 8 bits a channel", "c.png'", "I;16"],
    ),
    "smaller than a patch": (
        lambda root: save(root / "train" / "c.png", 40, 7), {}, ValueError,
        ["data.dir: ", "a patch, 8x8", "c.png' of 40x7 (height x width)"],
    ),
    "smaller than the scale": (
        lambda root: save(root / "test" / "c.png", 3, 40), {"scale": 4}, ValueError,
        ["data.test_dir: ", "metrics need, 4x4", "c.png' of 3x40"],
    ),
    "two test images of a name": (
        lambda root: save(root / "test" / "b_hr.png"), {}, ValueError,
        ["data.test_dir: expected one photograph of the name 'b'", "test/b.png'", "b_hr.png'"],
    ),
    "gray among color": (
        lambda root: save(root / "train" / "c.png", channels=1), {}, ValueError,
        ["data.dir: expected color", "c.png' is gray, and", "a.png' is in color"],
    ),
    "gray for color": (
        lambda root: save(root / "train" / "a.png", channels=1), {}, ValueError,
        ["data.dir: expected color photographs for 3 channels", "a.png' is gray"],
    ),
    "HR without LR": (
        lambda root: (root / "test" / "b.png").rename(root / "test" / "c_HR.png"), {"scale": 4},
        DataNotFoundError, ["data.test_dir: expected a low-resolution image to", "c_HR.png'"],
    ),
    "LR without HR": (
        lambda root: [save(root / "train" / f) for f in ("LR/a.png", "LR/d.png")], {"scale": 4},
        DataNotFoundError, ["data.dir: expected a photograph to the low-resolution", "d.png'"],
    ),
    "only LR": (
        lambda root: (root / "train" / "a.png").rename(root / "train" / "a_LR.png"), {"scale": 4},
        DataNotFoundError, ["data.dir: expected a photograph to the low-resolution", "a_LR.png'"],
    ),
    "LR of another scale": (
        lambda root: save(root / "train" / "LR" / "a.png", 12, 16), {"scale": 4}, ValueError,
        ["data.dir: ", "LR/a.png' of 6x8", "train/a.png' of 24x32", "got 12x16"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "arguments", "error", "parts"), WRONG.values(), ids=WRONG)
def test_wrong_folders_are_refused_before_anything_is_decoded(
    folders, monkeypatch, change, arguments, error, parts
):
    root, load_folders = folders
    change(root)
    monkeypatch.setattr(decode, "decode", None)
    with refused(error, *parts) as caught:
        load_folders(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("high", "low", "what"),
    [
        (1, 3, ["test/LR/b.png' in gray, as", "test/b.png' is; got it in color"]),
        (3, 1, ["test/LR/b.png' in color, as", "test/b.png' is; got it in gray"]),
        (1, 1, None),
        (3, 3, None),
    ],
)
def test_the_images_of_a_pair_are_both_gray_or_both_in_color(folders, high, low, what):
    root, load_folders = folders
    save(root / "test" / "b.png", channels=high)
    save(root / "test" / "LR" / "b.png", 6, 8, channels=low)
    expected = refused(ValueError, "data.test_dir: ", *what) if what else contextlib.nullcontext()
    with expected:
        assert load_folders(scale=4).read("test")[0].degraded.shape == (6, 8, 3)
    assert load_folders(scale=4, channels=1).read("test")[0].degraded.shape == (6, 8, 1)


@pytest.mark.parametrize("missing", ["data.dir", "data.test_dir"])
def test_folders_have_to_be_given(folders, missing):
    root = folders[0]
    train, test = (None, root / "test") if missing == "data.dir" else (root / "train", None)
    with refused(ValueError, f"{missing}: ", "got None"):
        load("photo_folder", train, test, patch=8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
def test_a_file_that_is_cut_off_is_named_when_it_is_read(folders, suffix):
    root, load_folders = folders
    path = root / "test" / f"c.{suffix}"
    save(path, 64, 64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with refused(DataNotFoundError, "data.test_dir: cannot read", path.name):
        load_folders().read("test")


def test_a_file_that_is_gone_when_it_is_read_is_named(folders):
    root, load_folders = folders
    data = load_folders()
    (root / "train" / "a.png").unlink()
    with refused(DataNotFoundError, "data.dir: cannot read", "a.png"):
        data.read("train")
