"""Data sets, CIFAR prepared without TensorFlow or network, and augmentation on the device."""

import collections
import dataclasses
import functools
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhp_jax import data
from dhp_jax.data.labelled import cifar, registry

CIFAR = ("cifar10", "cifar100")
Split = collections.namedtuple("Split", "images labels")


# Digits


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_are_1297_training_and_500_test_images_of_8x8(digits):
    assert digits.read("train")[0].shape == (1297, 8, 8, 1)
    assert digits.read("test")[0].shape == (500, 8, 8, 1)
    assert digits.read("train")[1].shape == (1297,)
    assert digits.read("test")[1].shape == (500,)
    assert digits.read("train")[0].dtype == np.uint8
    assert digits.read("train")[1].dtype == np.int32
    assert digits.read("train")[0].max() == 16
    assert digits.image_shape == (8, 8, 1)
    assert digits.num_classes == 10
    assert (digits.crop_padding, digits.flip) == (1, False)


def test_digits_split_is_disjoint_and_complete(digits):
    from sklearn.datasets import load_digits

    def images_with_labels(images, labels):
        pixels = images.reshape(len(images), -1).astype(np.uint8)
        return sorted(zip(map(bytes, pixels), map(int, labels), strict=True))

    original = load_digits()
    together = images_with_labels(
        np.concatenate([digits.read("train")[0], digits.read("test")[0]]),
        np.concatenate([digits.read("train")[1], digits.read("test")[1]]),
    )
    # As multisets: an image in both parts would be there once too often.
    assert together == images_with_labels(original.images, original.target)


def test_digits_split_is_stratified_to_within_one_image(digits):
    test, train = np.bincount(digits.read("test")[1]), np.bincount(digits.read("train")[1])
    assert np.all(np.abs(test - 500 / 1797 * (test + train)) < 1)


def test_digits_split_ignores_every_seed(digits):
    np.random.seed(3)
    again = data.load("digits")
    np.testing.assert_array_equal(again.read("test")[0], digits.read("test")[0])
    np.testing.assert_array_equal(again.read("train")[1], digits.read("train")[1])
    assert digits.read("test")[1][:12].tolist() == [0, 9, 1, 5, 7, 8, 2, 3, 4, 6, 0, 9]


def test_digits_statistics_are_those_of_the_training_images(digits):
    normal = np.asarray(data.normalize(digits.read("train")[0], digits.mean, digits.std))
    np.testing.assert_allclose([normal.mean(), normal.std()], [0, 1], atol=1e-5)


def test_images_and_labels_that_are_not_as_a_data_set_says_are_refused(digits):
    images, labels = digits.read("test")
    wrong = {
        "test images of 'digits'; got none": (images[:0], labels[:0]),
        "test images .*, uint8 of .*; got float64 of .*": (images / 16, labels),
        "test images .*; got uint8 of shape \\(499, 8, 8, 1\\)": (images[1:], labels),
        "500 labels from 0 to 9 of .*; got 499, .*": (images, labels[1:]),
        "500 labels from 0 to 9 .* \\[1, .* 9, 10\\]": (images, labels + 1),
        "500 labels from 0 to 9 .*; got 500, which are \\[0\\.0, .*": (images, labels / 1),
    }
    for message, arrays in wrong.items():
        size = len(images) * ("none" not in message)
        source = dataclasses.replace(digits, read=lambda _, a=arrays: a, test_size=size)
        with pytest.raises(data.DataNotFoundError, match=f"^data.name: expected {message}$"):
            source.loaded("test")
        if size:
            with pytest.raises(data.DataNotFoundError, match=f"^data.name: expected {message}$"):
                source.stream("test", 0).read.images[0]
    for found, stored in zip(digits.loaded("test"), (images, labels), strict=True):
        np.testing.assert_array_equal(found, stored)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(data.DataNotFoundError, match=r'pip install "dhp_jax\[demo\]"$'):
        data.load("digits")


@pytest.mark.parametrize(
    ("name", "near"),
    [("cifar", "cifar10"), ("CIFAR-100", "cifar100"), ("digit", "digits")],
)
def test_an_unknown_name_is_refused_with_the_possible_ones(name, near):
    with pytest.raises(ValueError, match=r"data\.name: expected one of") as raised:
        data.load(name)
    message = str(raised.value)
    assert repr(name) in message
    assert all(known in message for known in data.NAMES)
    assert f"did you mean '{near}" in message


# CIFAR


def synthetic_cifar(name):
    """Splits of random images; labels `(n, 1)`, or for CIFAR-100 `(n, 2)`: coarse, then fine."""
    rng = np.random.default_rng(0)
    classes = [10] if name == "cifar10" else [20, 100]
    return {
        split: Split(
            rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8),
            rng.integers(0, classes, (n, len(classes))),
        )
        for split, n in {"train": 10, "test": 4}.items()
    }


def write_archive(path, name, synthetic):
    """The layout of the archives that the CIFAR page offers."""

    def binary(split, part=slice(None)):
        images, labels = synthetic[split]
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        return np.concatenate([labels.astype(np.uint8), planes], axis=1)[part].tobytes()

    def class_names(word, count):
        return "".join(f"{word}_{i}\n" for i in range(count)).encode() + b"\n"

    if name == "cifar10":
        folder, files = "cifar-10-batches-bin", {"batches.meta.txt": class_names("class", 10)}
        files |= {
            f"data_batch_{i + 1}.bin": binary("train", slice(2 * i, 2 * i + 2)) for i in range(5)
        }
        files["test_batch.bin"] = binary("test")
    else:
        folder = "cifar-100-binary"
        files = {"train.bin": binary("train"), "test.bin": binary("test")}
        files["coarse_label_names.txt"] = class_names("coarse", 20)
        files["fine_label_names.txt"] = class_names("class", 100)
    with tarfile.open(path, "w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """The address of a download host on this machine, with a small CIFAR-10 and CIFAR-100."""
    folder = tmp_path_factory.mktemp("mirror")
    for name in CIFAR:
        write_archive(folder / f"{name}.tar.gz", name, synthetic_cifar(name))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def download_from(address, monkeypatch):
    """Makes TFDS download CIFAR from another host."""
    from tensorflow_datasets.image_classification import cifar as builders

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for builder in (builders.Cifar10, builders.Cifar100):

        def redirected(self, original=builder._cifar_info.fget):
            return original(self)._replace(url=f"{address}/{self.name}.tar.gz")

        monkeypatch.setattr(builder, "_cifar_info", property(redirected))


@pytest.fixture(scope="module")
def prepared(mirror, tmp_path_factory):
    """A directory with both data sets, downloaded and prepared once for this file."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as monkeypatch:
        download_from(mirror, monkeypatch)
        for name in CIFAR:
            data.load(name, folder)
    return folder


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_downloaded_and_prepared_here_is_read_back_exactly(name, prepared, monkeypatch):
    monkeypatch.setattr(cifar, "_reachable", lambda url: pytest.fail("asked the network"))
    source = data.load(name, prepared)

    def records(images, labels):
        return sorted(
            (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
        )

    expected = synthetic_cifar(name)
    # TFDS stores the records shuffled. The last label is the only one or the fine one.
    for split, images, labels in (
        ("train", source.read("train")[0], source.read("train")[1]),
        ("test", source.read("test")[0], source.read("test")[1]),
    ):
        assert images.dtype == np.uint8
        assert labels.dtype == np.int32
        assert records(images, labels) == records(
            expected[split].images, expected[split].labels[:, -1]
        )
    assert source.class_names == tuple(f"class_{i}" for i in range(source.num_classes))
    assert source.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    assert source.image_shape == (32, 32, 3)
    assert (source.crop_padding, source.flip) == (4, True)
    assert source.mean[0] == {"cifar10": 125.3, "cifar100": 129.3}[name]
    assert source.std[2] == {"cifar10": 66.7, "cifar100": 70.4}[name]


@pytest.mark.parametrize("name", CIFAR)
def test_the_binary_version_of_cifar_is_read_as_it_lies(name, tmp_path):
    synthetic = synthetic_cifar(name)
    write_archive(tmp_path / "archive.tar.gz", name, synthetic)
    with tarfile.open(tmp_path / "archive.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    source = data.load(name, tmp_path)
    assert source.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    assert (source.train_size, source.test_size) == (10, 4)
    for split, (images, labels) in synthetic.items():
        found, classes = source.read(split)
        np.testing.assert_array_equal(found, images)
        np.testing.assert_array_equal(classes, labels[:, -1])


def test_cifar_is_looked_for_in_the_default_directory_of_tfds(prepared, monkeypatch):
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(prepared))
    assert len(data.load("cifar10").read("train")[0]) == 10


def test_a_tilde_in_the_data_directory_is_the_home_directory(prepared, monkeypatch):
    monkeypatch.setenv("HOME", str(prepared.parent))
    assert len(data.load("cifar10", f"~/{prepared.name}").read("test")[0]) == 4


def test_loading_prints_nothing_and_digits_do_not_import_tfds(prepared):
    script = f"""
import sys
from dhp_jax import data
data.load("digits")
assert "tensorflow_datasets" not in sys.modules
data.load("cifar10", {str(prepared)!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def one_line_error(name, folder):
    with pytest.raises(data.DataNotFoundError) as raised:
        data.load(name, folder)
    message = str(raised.value)
    assert message.startswith("data.dir: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", CIFAR)
def test_missing_data_without_network_name_the_directory_and_two_ways_out(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(cifar, "_reachable", lambda url: False)
    message = one_line_error(name, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / name) in message
    assert "array_record" in message
    code = re.search(r'python -c "(.*?)"', message)[1]
    loaded = mock.Mock()
    monkeypatch.setattr(registry, "load", loaded)
    exec(code, {})  # the command that prepares the data
    loaded.assert_called_once_with(name, ".")
    assert "--config=digits_resnet20" in message
    assert not (tmp_path / "nowhere").exists()


def test_data_prepared_as_tfrecord_are_refused(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    info = folder / "cifar10/3.0.2/dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    message = one_line_error("cifar10", folder)
    assert str(info.parent) in message
    assert "tfrecord, expected array_record" in message


def test_prepared_data_with_a_file_missing_are_refused(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    (folder / "cifar10/3.0.2/cifar10-test.array_record-00000-of-00001").unlink()
    assert f"cannot read cifar10 in {folder}" in one_line_error("cifar10", folder)


def test_a_data_directory_that_is_a_file_is_refused(mirror, tmp_path, monkeypatch):
    download_from(mirror, monkeypatch)
    (tmp_path / "file").write_text("")
    file = tmp_path / "file"
    assert f"{str(file)!r} is no directory" in one_line_error("cifar10", file)


def test_a_host_is_reachable_only_if_it_has_the_file(mirror, monkeypatch):
    download_from(mirror, monkeypatch)
    assert cifar._reachable(f"{mirror}/cifar10.tar.gz")
    assert not cifar._reachable(f"{mirror}/nothing.tar.gz")


def test_a_host_that_refuses_or_never_answers_is_not_reachable(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert not cifar._reachable(address, seconds=0.2)
    assert not cifar._reachable(address)


def test_a_name_lookup_that_hangs_does_not_hold_up_the_answer(monkeypatch):
    over = threading.Event()

    def hang(*_, **__):
        over.wait()
        raise OSError("too late")

    monkeypatch.setattr("requests.head", hang)
    assert not cifar._reachable("http://somewhere", seconds=0.05)
    over.set()


# Augmentation and normalisation


def crops(image, crop_padding, flip):
    """Every image that augmenting `image` may give, as bytes, and its offsets and flip."""
    h, w, _ = image.shape
    border = (crop_padding, crop_padding)
    padded = np.pad(image, (border, border, (0, 0)))
    return {
        np.ascontiguousarray(padded[y : y + h, x : x + w][:, ::step]).tobytes(): (y, x, step)
        for y in range(2 * crop_padding + 1)
        for x in range(2 * crop_padding + 1)
        for step in ((1, -1) if flip else (1,))
    }


jitted = jax.jit(data.augment, static_argnames=("crop_padding", "flip"))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(5, 8, 8, 1), (3, 6, 7, 3)]),
    crop_padding=st.sampled_from([0, 1, 4]),
    flip=st.booleans(),
)
def test_every_augmented_image_is_a_crop_or_a_mirrored_crop_of_its_original(
    seed, shape, crop_padding, flip
):
    images = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    out = np.asarray(jitted(jax.random.key(seed), images, crop_padding=crop_padding, flip=flip))
    assert out.shape == images.shape
    assert out.dtype == np.uint8
    for original, augmented in zip(images, out, strict=True):
        assert augmented.tobytes() in crops(original, crop_padding, flip)


def test_all_offsets_and_both_flips_occur_equally_often_and_independently_per_image():
    image = np.arange(1, 82, dtype=np.uint8).reshape(9, 9, 1)
    out = np.asarray(jitted(jax.random.key(0), np.stack([image] * 8100), crop_padding=4, flip=True))
    possible = crops(image, 4, True)
    drawn = collections.Counter(possible[augmented.tobytes()] for augmented in out)
    assert len(possible) == len(drawn) == 9 * 9 * 2
    # 50 of each are expected, with a standard deviation of 7.
    assert min(drawn.values()) > 20
    assert max(drawn.values()) < 80
    for factor, size in enumerate((9, 9, 2)):
        counts = collections.Counter(draw[factor] for draw in drawn.elements())
        np.testing.assert_allclose(list(counts.values()), 8100 / size, rtol=0.15)


def test_the_key_alone_decides_the_augmentation():
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    once = jitted(jax.random.key(1), images, crop_padding=4, flip=True)
    again = data.augment(jax.random.key(1), jnp.asarray(images), crop_padding=4, flip=True)
    other = jitted(jax.random.key(2), images, crop_padding=4, flip=True)
    np.testing.assert_array_equal(once, again)
    assert np.any(np.asarray(once) != np.asarray(other))


def test_without_padding_and_flip_images_stay_as_they_are():
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    out = jitted(jax.random.key(0), images, crop_padding=0, flip=False)
    np.testing.assert_array_equal(out, images)
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel(channels):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, channels)).astype(np.uint8)
    mean, std = (125.3, 123.0, 113.9)[:channels], (63.0, 62.1, 66.7)[:channels]
    out = jax.jit(data.normalize)(images, mean, std)
    assert out.dtype == jnp.float32
    expected = (images.astype(np.float64) - mean) / std
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
