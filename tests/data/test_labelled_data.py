"""Labelled images: a folder of one's own, Tiny ImageNet from its zip, ImageNet as prepared."""

import collections
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from unittest import mock
import zipfile

import cloudpickle
import numpy as np
from PIL import Image
import pytest

from dhp_jax import data
from dhp_jax.data import decode
from dhp_jax.data.labelled import image_folder, tiny_imagenet

EMBEDDED = "--config=digits_resnet20"


def pixels(seed, *shape):
    """A random image; smooth, so that JPEG keeps it nearly as it is."""
    y, x = np.mgrid[: shape[0], : shape[1]] / max(shape[:2])
    image = 128 + 100 * np.sin(3 * x + 2 * y + seed)
    if len(shape) == 3:
        image = np.stack([np.roll(image, shift, axis=1) for shift in range(shape[2])], axis=-1)
    return image.astype(np.uint8)


def encoded(image, extension="JPEG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, extension, quality=95)
    return file.getvalue()


def decoded(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def one_line_error(*mentioned, load):
    with pytest.raises(ValueError, match=r"^data\.") as raised:
        load()
    message = str(raised.value)
    assert "\n" not in message
    for part in mentioned:
        assert str(part) in message
    return raised.value


# What can be asked for


@pytest.mark.parametrize(
    ("name", "arguments", "mentioned"),
    [
        ("digits", {"image_size": 8}, ("data.image_size", "digits", "image_folder", "8")),
        ("cifar10", {"image_size": 32}, ("data.image_size", "cifar10", "32")),
        ("tiny_imagenet", {"image_size": 64}, ("data.image_size", "imagenet2012")),
        ("cifar10", {"archive": "a.zip"}, ("data.archive", "cifar10", "tiny_imagenet", "'a.zip'")),
        ("imagenet2012", {"archive": "a.zip"}, ("data.archive", "imagenet2012")),
        ("image_folder", {"archive": "a.zip"}, ("data.archive", "image_folder")),
        ("image_folder", {"image_size": 0}, ("data.image_size", "positive integer", "0")),
        ("imagenet2012", {"image_size": -224}, ("data.image_size", "positive integer", "-224")),
        ("imagenet2012", {"image_size": 22.4}, ("data.image_size", "positive integer", "22.4")),
        ("image_folder", {}, ("data.dir", "image_folder", "None")),
    ],
)
def test_a_parameter_that_a_source_cannot_use_is_refused(name, arguments, mentioned):
    one_line_error(*mentioned, load=lambda: data.load(name, **arguments))


# Folders of images


def make_folder(root, images):
    for name, image in images.items():
        save(root / name, image)
    return root


@pytest.fixture
def folder(tmp_path):
    """Two labels of colour images of 6x8, kept by PNG as they are."""
    images = {
        f"{split}/{label}/{i}.png": pixels(10 * ord(label[0]) + i, 6, 8, 3)
        for split, count in {"train": 3, "test": 2}.items()
        for label in ("dog", "cat")
        for i in range(count)
    }
    return make_folder(tmp_path / "pets", images)


def test_a_folder_is_read_in_the_order_of_labels_and_names(folder):
    source = data.load("image_folder", folder)
    images, labels = source.read("train")
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1])
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    expected = [pixels(10 * ord(label) + i, 6, 8, 3) for label in "cd" for i in range(3)]
    np.testing.assert_array_equal(images, expected)
    assert source.read("test")[0].shape == (4, 6, 8, 3)
    assert source.class_names == ("cat", "dog")
    assert (source.name, source.image_shape) == ("image_folder", (6, 8, 3))
    assert (source.train_size, source.test_size) == (6, 4)
    assert (source.crop_padding, source.flip) == (0, True)


def check_one_by_one(source):
    """Streamed images, of another process, are those that are read at once."""
    for split in ("train", "test"):
        stream = source.stream(split, workers=0)
        read = cloudpickle.loads(cloudpickle.dumps(stream.read))
        chosen = np.random.default_rng(0).permutation(np.repeat(np.arange(stream.size), 2))
        rows = np.arange(1, len(chosen), 2)
        images, labels = read(chosen, rows, np.random.default_rng(0))
        expected_images, expected_labels = source.read(split)
        np.testing.assert_array_equal(images, expected_images[chosen[rows]])
        np.testing.assert_array_equal(labels, expected_labels[chosen[rows]])
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("image_size", [None, 4])
def test_images_of_a_folder_are_the_same_one_by_one(folder, image_size):
    check_one_by_one(data.load("image_folder", folder, image_size=image_size))


def test_digits_are_the_same_one_by_one():
    check_one_by_one(data.load("digits"))


def test_streams_of_other_images_have_another_checksum(folder):
    checksums = {data.load("image_folder", folder).stream(s, 0).checksum for s in ("train", "test")}
    checksums.add(data.load("image_folder", folder, image_size=4).stream("train", 0).checksum)
    (folder / "train/cat/0.png").rename(folder / "train/cat/9.png")
    checksums.add(data.load("image_folder", folder).stream("train", 0).checksum)
    save(folder / "train/cat/1.png", pixels(77, 6, 8, 3))
    checksums.add(data.load("image_folder", folder).stream("train", 0).checksum)
    assert len(checksums) == 5


def test_the_statistics_of_a_folder_are_those_of_its_training_images(folder):
    source = data.load("image_folder", folder)
    images = source.read("train")[0].astype(np.float64)
    np.testing.assert_allclose(source.mean, images.mean((0, 1, 2)))
    np.testing.assert_allclose(source.std, images.std((0, 1, 2)))


def test_the_statistics_of_a_large_folder_are_those_of_every_kth_image(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "SAMPLE", 3)
    source = data.load("image_folder", folder)
    sample = source.read("train")[0][::2].astype(np.float64)
    np.testing.assert_allclose(source.mean, sample.mean((0, 1, 2)))
    np.testing.assert_allclose(source.std, sample.std((0, 1, 2)))


def test_a_channel_that_never_varies_is_not_divided_by_zero(tmp_path):
    black = np.zeros((4, 4), np.uint8)
    make_folder(tmp_path, {"train/a/0.png": black, "test/a/0.png": black})
    assert data.load("image_folder", tmp_path).std == (1.0,)


def test_val_stands_in_for_test_only_where_there_is_none(folder):
    shutil.copytree(folder / "test", folder / "val")
    (folder / "val/cat/0.png").unlink()
    assert data.load("image_folder", folder).test_size == 4
    shutil.rmtree(folder / "test")
    assert data.load("image_folder", folder).test_size == 3


def test_every_extension_in_any_case_counts_and_nothing_else_does(folder):
    for name in ("a.PNG", "b.jpg", "c.JPEG", "d.WebP"):
        save(folder / "train/cat" / name, pixels(0, 6, 8, 3))
    for name in ("train/cat/notes.txt", "train/cat/.hidden.png", "train/readme.md"):
        (folder / name).write_text("no image")
    (folder / "train/.cache").mkdir()
    source = data.load("image_folder", folder)
    assert (source.train_size, source.class_names) == (6 + 4, ("cat", "dog"))
    assert source.read("train")[0].shape == (10, 6, 8, 3)


@pytest.mark.parametrize("ending", ["bmp", "gif", "tif", "TIFF"])
def test_other_formats_of_pillow_are_read(folder, ending):
    file = folder / f"train/cat/0.{ending}"
    (folder / "train/cat/0.png").unlink()
    save(file, pixels(7, 6, 8, 3))
    images, _ = data.load("image_folder", folder).read("train")
    np.testing.assert_array_equal(images[0], Image.open(file).convert("RGB"))


def test_one_warning_tells_what_is_left_out(folder, caplog):
    data.load("image_folder", folder)
    assert caplog.text == ""
    (folder / "train/cat/more").mkdir()
    save(folder / "train/cat/more/a.png", pixels(0, 6, 8, 3))
    (folder / "test/dog/notes.txt").write_text("no image")
    (folder / "test/dog/.hidden").write_text("no image")
    save(folder / "train/unlabelled.png", pixels(0, 6, 8, 3))
    data.load("image_folder", folder)
    (record,) = caplog.records
    told = record.getMessage()
    assert told.startswith(f"data.dir: 3 files left out, such as {folder}/train/unlabelled.png;")


@pytest.mark.parametrize("image_size", [None, 6])
@pytest.mark.parametrize("ending", ["tif", "png", "webp"])
def test_images_are_turned_upright(folder, image_size, ending):
    turned, exif = Image.fromarray(pixels(3, 8, 6, 3)), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    (folder / "train/cat/0.png").unlink()
    turned.save(folder / f"train/cat/0.{ending}", exif=exif, lossless=True)
    source = data.load("image_folder", folder, image_size=image_size)
    images, _ = source.read("train")
    upright = np.rot90(pixels(3, 8, 6, 3), -1)
    np.testing.assert_array_equal(images[0], upright if image_size is None else upright[:, 1:7])


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_make_gray_and_colour_images_one_kind(folder, channels):
    save(folder / "train/cat/0.png", pixels(0, 6, 8))
    source = data.load("image_folder", folder, channels=channels)
    images, _ = source.read("train")
    assert images.shape == (6, 6, 8, channels) == (6, *source.image_shape)
    np.testing.assert_array_equal(images[0], pixels(0, 6, 8)[..., None].repeat(channels, -1))
    for wrong in (2, "3"):
        with pytest.raises(ValueError, match=r"^data.channels: expected 1 or 3; got"):
            data.load("image_folder", folder, channels=wrong)
    with pytest.raises(ValueError, match=r"only image_folder can use it"):
        data.load("digits", channels=1)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_gray_images_have_one_channel(tmp_path, mode):
    image = Image.fromarray(pixels(0, 8, 8)).convert(mode)
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        image.save(tmp_path / split / "a/0.png")
    source = data.load("image_folder", tmp_path)
    assert source.image_shape == (8, 8, 1)
    assert len(source.mean) == len(source.std) == 1
    np.testing.assert_array_equal(source.read("test")[0][0, ..., 0], image.convert("L"))


@pytest.mark.parametrize(
    ("mode", "extension"), [("P", "png"), ("RGBA", "png"), ("RGBA", "webp"), ("CMYK", "jpg")]
)
def test_images_with_a_palette_transparency_or_ink_become_rgb(folder, mode, extension):
    file = folder / f"train/cat/0.{extension}"
    Image.fromarray(pixels(0, 6, 8, 3)).convert(mode).save(file)
    if extension != "png":
        (folder / "train/cat/0.png").unlink()
    images, _ = data.load("image_folder", folder).read("train")
    np.testing.assert_array_equal(images[0], Image.open(file).convert("RGB"))


def test_image_size_resizes_the_shorter_side_and_cuts_out_the_centre(tmp_path):
    wide, tall, small = pixels(1, 20, 50, 3), pixels(2, 45, 20, 3), pixels(3, 5, 5, 3)
    images = {f"train/a/{i}.png": image for i, image in enumerate((wide, tall, small))}
    make_folder(tmp_path, images | {"test/a/0.png": pixels(4, 10, 11, 3)})
    source = data.load("image_folder", tmp_path, image_size=10)
    assert (source.image_shape, source.crop_padding) == ((10, 10, 3), 1)

    def resized(image, h, w):
        return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))

    read, _ = source.read("train")
    np.testing.assert_array_equal(read[0], resized(wide, 10, 25)[:, 7:17])
    np.testing.assert_array_equal(read[1], resized(tall, 22, 10)[6:16])
    np.testing.assert_array_equal(read[2], resized(small, 10, 10))
    # The right size already: cut, not resampled.
    np.testing.assert_array_equal(source.read("test")[0][0], pixels(4, 10, 11, 3)[:, :10])


def test_many_images_are_decoded_in_threads_to_the_right_places(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "CHUNK", 2)
    images = {f"train/a/{i:02d}.png": np.full((2, 2), i, np.uint8) for i in range(25)}
    make_folder(tmp_path, images | {"test/a/0.png": np.zeros((2, 2), np.uint8)})
    read, _ = data.load("image_folder", tmp_path).read("train")
    np.testing.assert_array_equal(read[:, 0, 0, 0], np.arange(25))


def remove(name):
    return lambda root: shutil.rmtree(root / name)


def empty(name):
    def change(root):
        shutil.rmtree(root / name)
        (root / name).mkdir()

    return change


def write(name, content):
    return lambda root: (root / name).write_bytes(content)


def replace(name, image):
    return lambda root: save(root / name, image)


DAMAGED = {
    "missing": (lambda root: shutil.rmtree(root), ("data.dir", "pets/train")),
    "no training images": (remove("train"), ("data.dir", "pets/train", "test (or val)")),
    "no test images": (remove("test"), ("data.dir", "pets/test", "test (or val)")),
    "empty split": (empty("train"), ("data.dir", "pets/train", "empty")),
    "empty label": (empty("test/dog"), ("data.dir", "pets/test/dog", ".jpeg, .jpg, .png")),
    "label only in training": (remove("test/dog"), ("pets/test lacks", "pets/train has: dog")),
    "label only in test": (remove("train/cat"), ("pets/train lacks", "pets/test has: cat")),
    "no image": (write("test/dog/1.png", b"text"), ("data.dir", "pets/test/dog/1.png", "no image")),
    "empty file": (write("test/dog/1.png", b""), ("data.dir", "pets/test/dog/1.png")),
    "gray among colour": (
        replace("train/dog/1.png", pixels(0, 6, 8)),
        (
            "data.dir",
            "pets/train/dog/1.png is gray",
            "pets/train/cat/0.png is not",
            "data.channels=3",
        ),
    ),
    "16 bits": (
        replace("train/cat/1.png", pixels(0, 6, 8).astype(np.uint16)),
        ("data.dir", "pets/train/cat/1.png", "I;16", "8 bits"),
    ),
    "another size": (
        replace("test/dog/1.png", pixels(0, 5, 7, 3)),
        ("pets/test/dog/1.png is 7 pixels wide and 5 high", "8 and 6", "data.image_size"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_folder_that_cannot_be_trained_on_is_refused_in_one_line(folder, damage):
    change, mentioned = DAMAGED[damage]
    change(folder)
    one_line_error(*mentioned, load=lambda: data.load("image_folder", folder))


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
@pytest.mark.parametrize("missing", [1, 60])
def test_a_truncated_image_is_named_before_any_is_asked_for(folder, extension, missing):
    (folder / "test/dog/1.png").unlink()
    file = folder / f"test/dog/1.{extension}"
    rng = np.random.default_rng(0)
    save(file, rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    file.write_bytes(file.read_bytes()[:-missing])
    try:
        decode.decode(file, "RGB")
    except data.DataNotFoundError:
        one_line_error("data.dir", file, load=lambda: data.load("image_folder", folder))
    else:  # Pillow needs no end of a JPEG file whose pixels are all there
        assert (extension, missing) != ("png", 60)
        data.load("image_folder", folder).read("test")


def test_an_image_with_damage_inside_is_named_when_it_is_decoded(folder):
    file = folder / "test/dog/1.png"
    content = file.read_bytes()
    middle = content.index(b"IDAT") + 10
    file.write_bytes(content[:middle] + bytes(8) + content[middle + 8 :])
    source = data.load("image_folder", folder)
    one_line_error("data.dir", file, load=lambda: source.read("test"))


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_read(folder, monkeypatch):
    source = data.load("image_folder", folder, image_size=100)
    monkeypatch.setattr(decode, "memory_available", lambda: 179_999)
    mentioned = ("data.image_size", "100x100x3", "180,000 bytes", "179,999 bytes")
    one_line_error(*mentioned, load=lambda: source.read("train"))
    assert source.read("test")[0].nbytes == 120_000


def test_the_memory_available_is_some_of_the_memory_there_is():
    assert 2**20 < decode.memory_available() < 2**50


# Tiny ImageNet

WNIDS = ("n03", "n01", "n02")
ROOT = "tiny-imagenet-200"


def tiny_files():
    """The files of a small archive: three classes of two training images, four for validation."""
    files = {
        "wnids.txt": "\n".join(WNIDS).encode(),
        "words.txt": b"n01\tgoldfish, Carassius auratus\n",
        "test/images/test_0.JPEG": encoded(pixels(99, 64, 64, 3)),
    }
    for i, wnid in enumerate(WNIDS):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"0\t0\t1\t1\n"
        files[f"train/{wnid}/images/{wnid}_0.JPEG"] = encoded(pixels(2 * i, 64, 64, 3))
        files[f"train/{wnid}/images/{wnid}_1.JPEG"] = encoded(pixels(2 * i + 1, 64, 64))
    val = [f"val_{i}.JPEG\t{wnid}\t0\t0\t9\t9\n" for i, wnid in enumerate((*WNIDS, "n01"))]
    files["val/val_annotations.txt"] = "".join(val).encode()
    for i in range(len(val)):
        files[f"val/images/val_{i}.JPEG"] = encoded(pixels(10 + i, 64, 64, 3))
    return files


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{ROOT}/{name}", content)
    return path


def write_folder(path, files):
    for name, content in files.items():
        file = path / ROOT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path / ROOT


def records(images, labels):
    return sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def check_tiny(source):
    files = tiny_files()
    classes = sorted(WNIDS)
    train = [
        (decoded(files[f"train/{wnid}/images/{wnid}_{i}.JPEG"]), classes.index(wnid))
        for wnid in WNIDS
        for i in range(2)
    ]
    val = [
        (decoded(files[f"val/images/val_{i}.JPEG"]), classes.index(wnid))
        for i, wnid in enumerate((*WNIDS, "n01"))
    ]
    assert records(*source.read("train")) == records(*zip(*train, strict=True))
    assert records(*source.read("test")) == records(*zip(*val, strict=True))
    assert source.class_names == tuple(classes)
    assert (source.train_size, source.test_size) == (6, 4)
    assert (source.name, source.image_shape) == ("tiny_imagenet", (64, 64, 3))
    assert (source.crop_padding, source.flip) == (0, True)
    np.testing.assert_allclose(source.mean, [122.451, 114.2655, 101.3625])
    np.testing.assert_allclose(source.std, [58.701, 57.7575, 57.681])


@pytest.mark.parametrize("write_archive", [write_zip, write_folder])
def test_tiny_imagenet_is_prepared_from_its_archive_and_read_back_exactly(tmp_path, write_archive):
    archive = write_archive(tmp_path / "archive", tiny_files())
    check_tiny(data.load("tiny_imagenet", tmp_path / "tfds", archive=archive))
    archive.rename(tmp_path / "gone")
    check_tiny(data.load("tiny_imagenet", tmp_path / "tfds"))


def test_tiny_imagenet_is_stored_as_the_original_bytes(tmp_path):
    import tensorflow_datasets as tfds

    write_zip(tmp_path / f"{ROOT}.zip", tiny_files())
    data.load("tiny_imagenet", tmp_path)
    stored = tfds.builder_from_directory(tmp_path / "tiny_imagenet/1.0.0").as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    expected = (content for name, content in tiny_files().items() if name.startswith("train/"))
    assert {record["image"] for record in stored} == {c for c in expected if len(c) > 100}


def test_the_archive_in_the_data_directory_needs_not_be_named(tmp_path, capsys):
    write_zip(tmp_path / f"{ROOT}.zip", tiny_files())
    check_tiny(data.load("tiny_imagenet", tmp_path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("archive", [None, "elsewhere.zip"])
def test_tiny_imagenet_that_is_not_there_names_the_directory_and_two_ways_out(tmp_path, archive):
    looked_for = tmp_path / (archive or "tfds/tiny-imagenet-200.zip")
    named = None if archive is None else looked_for
    error = one_line_error(
        tmp_path / "tfds/tiny_imagenet",
        looked_for,
        tiny_imagenet.URL,
        "data.archive",
        EMBEDDED,
        load=lambda: data.load("tiny_imagenet", tmp_path / "tfds", archive=named),
    )
    assert isinstance(error, data.DataNotFoundError)
    assert not (tmp_path / "tfds").exists()


def without(*names):
    return {name: content for name, content in tiny_files().items() if not name.startswith(names)}


def changed(name, content):
    return tiny_files() | {name: content}


WRONG_ARCHIVES = {
    "no classes": (without("wnids.txt"), "found no wnids.txt"),
    "no annotations": (without("val/val_annotations.txt"), "val/val_annotations.txt"),
    "no training images": (without("train"), "no images of train"),
    "no validation images": (changed("val/val_annotations.txt", b"\n"), "no images of validation"),
    "missing image": (without("val/images/val_2.JPEG"), "val/images/val_2.JPEG"),
    "unknown class": (changed("wnids.txt", b"n01 n03"), "wnids.txt lacks: n02"),
    "no image": (changed("train/n02/images/n02_0.JPEG", b"text"), "n02_0.JPEG"),
    "truncated image": (
        changed("val/images/val_1.JPEG", encoded(pixels(0, 64, 64, 3))[:-200]),
        "val_1.JPEG",
    ),
    "another size": (
        changed("val/images/val_0.JPEG", encoded(pixels(0, 32, 64, 3))),
        "val_0.JPEG has the shape (32, 64, 3), expected (64, 64, 3)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_ARCHIVES)
def test_a_wrong_archive_is_refused_in_one_line_and_leaves_nothing_prepared(tmp_path, wrong):
    files, mentioned = WRONG_ARCHIVES[wrong]
    archive = write_zip(tmp_path / "tiny.zip", files)
    load = functools.partial(data.load, "tiny_imagenet", tmp_path / "tfds", archive=archive)
    one_line_error("data.archive", mentioned, load=load)
    write_zip(archive, tiny_files())
    assert load().train_size == 6


@pytest.mark.parametrize("kept", [0, 1000, -10_000])
def test_a_zip_that_is_cut_off_is_refused(tmp_path, kept):
    archive = write_zip(tmp_path / "tiny.zip", tiny_files())
    archive.write_bytes(archive.read_bytes()[:kept])
    load = functools.partial(data.load, "tiny_imagenet", tmp_path, archive=archive)
    one_line_error("data.archive", archive, load=load)


def test_a_zip_with_damaged_content_is_refused(tmp_path):
    archive = write_zip(tmp_path / "tiny.zip", tiny_files())
    image = encoded(pixels(0, 64, 64, 3))
    content = archive.read_bytes()
    archive.write_bytes(content.replace(image, image[:-1] + b"x"))
    load = functools.partial(data.load, "tiny_imagenet", tmp_path, archive=archive)
    one_line_error("data.archive", archive, "CRC", load=load)


# ImageNet

ImageNetExample = collections.namedtuple("ImageNetExample", "content label")


def imagenet_examples():
    shapes = {"train": [(80, 120, 3), (120, 80, 3), (64, 64)], "validation": [(90, 70, 3)]}
    return {
        split: [
            ImageNetExample(encoded(pixels(i, *shape)), 7 * i) for i, shape in enumerate(of_split)
        ]
        for split, of_split in shapes.items()
    }


@pytest.fixture(scope="module")
def prepared_imagenet(tmp_path_factory):
    """A directory that TFDS's own builder reads, made without the archives."""
    import tensorflow_datasets as tfds

    registered = tfds.builder_cls("imagenet2012")

    class Builder(registered, skip_registration=True):
        name = registered.name
        __module__ = registered.__module__
        pkg_dir_path = registered.pkg_dir_path

        def _split_generators(self, _):
            return {split: self._generate_examples(split) for split in imagenet_examples()}

        def _generate_examples(self, split):
            for i, (content, label) in enumerate(imagenet_examples()[split]):
                yield i, {"image": content, "label": label, "file_name": f"{i}.JPEG"}

    folder = tmp_path_factory.mktemp("imagenet")
    Builder(data_dir=folder).download_and_prepare(file_format="array_record")
    return folder


@pytest.mark.parametrize(("image_size", "shorter"), [(None, 256), (32, 36)])
def test_imagenet_is_read_as_resized_centres(prepared_imagenet, image_size, shorter):
    source = data.load("imagenet2012", prepared_imagenet, image_size=image_size)
    size = image_size or 224

    def centre(content):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        w, h = (round(shorter * side / min(image.size)) for side in image.size)
        image = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
        top, left = (h - size) // 2, (w - size) // 2
        return image[top : top + size, left : left + size]

    for split, stored in (("train", "train"), ("test", "validation")):
        expected = imagenet_examples()[stored]
        images, labels = source.read(split)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        assert records(images, labels) == records(
            [centre(example.content) for example in expected],
            [example.label for example in expected],
        )
    assert (source.name, source.image_shape) == ("imagenet2012", (size, size, 3))
    assert (source.train_size, source.test_size) == (3, 1)
    assert (source.num_classes, source.class_names[0]) == (1000, "n01440764")
    assert (source.crop_padding, source.flip) == (size // 8, True)
    assert source.mean == (123.675, 116.28, 103.53)
    assert source.std == (58.395, 57.12, 57.375)


def test_prepared_images_are_the_same_one_by_one(prepared_imagenet):
    check_one_by_one(data.load("imagenet2012", prepared_imagenet, image_size=32))


def test_imagenet_that_does_not_fit_into_memory_is_refused(prepared_imagenet, monkeypatch):
    source = data.load("imagenet2012", prepared_imagenet)
    monkeypatch.setattr(decode, "memory_available", lambda: 451_583)
    mentioned = ("data.image_size", "224x224x3", "451,584 bytes", "451,583 bytes")
    one_line_error(*mentioned, load=lambda: source.read("train"))


def edit_info(root, change):
    info = root / "imagenet2012/5.1.0/dataset_info.json"
    info.write_text(json.dumps(change(json.loads(info.read_text()))))


WRONG_PREPARED = {
    "nothing": (lambda root: shutil.rmtree(root / "imagenet2012"), ("ILSVRC2012_img_train.tar",)),
    "tfrecord": (
        lambda root: edit_info(root, lambda info: info | {"fileFormat": "tfrecord"}),
        ("tfrecord, expected array_record",),
    ),
    "no validation": (
        lambda root: edit_info(root, lambda info: info | {"splits": info["splits"][:1]}),
        ("has the splits train, expected validation",),
    ),
    "missing file": (
        lambda root: next((root / "imagenet2012/5.1.0").glob("*train*")).unlink(),
        ("cannot read imagenet2012",),
    ),
}


@pytest.mark.parametrize("wrong", WRONG_PREPARED)
def test_imagenet_that_is_not_prepared_as_needed_is_refused(prepared_imagenet, tmp_path, wrong):
    change, mentioned = WRONG_PREPARED[wrong]
    root = shutil.copytree(prepared_imagenet, tmp_path / "copy")
    change(root)
    load = functools.partial(data.load, "imagenet2012", root)
    one_line_error("data.dir", root / "imagenet2012/5.1.0", "array_record", *mentioned, load=load)


def test_imagenet_that_is_not_there_is_told_how_to_prepare(tmp_path, monkeypatch):
    error = one_line_error(
        "data.dir",
        tmp_path / "imagenet2012/5.1.0",
        "TensorFlow",
        "ILSVRC2012_img_val.tar",
        EMBEDDED,
        load=lambda: data.load("imagenet2012", tmp_path),
    )
    builder = mock.Mock()
    monkeypatch.setattr("tensorflow_datasets.builder", builder)
    exec(re.search(r'python -c "(.*?)"', str(error))[1], {})  # the command that prepares the data
    builder.assert_called_once_with("imagenet2012", data_dir=".")
    prepared = builder.return_value.download_and_prepare
    prepared.assert_called_once_with(file_format="array_record")
    assert not list(tmp_path.iterdir())


def test_nothing_here_imports_tensorflow_and_folders_do_not_import_tfds(folder, prepared_imagenet):
    script = f"""
import sys
from dhp_jax import data
data.load("image_folder", {str(folder)!r}).read("train")
assert "tensorflow_datasets" not in sys.modules
data.load("imagenet2012", {str(prepared_imagenet)!r}, image_size=8).read("train")
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
