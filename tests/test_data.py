"""Data sets, CIFAR prepared without TensorFlow or network, and augmentation on the device."""

from collections import namedtuple
import functools
import http.server
import io
import json
import shutil
import sys
import tarfile
import threading

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhp_jax import data
from dhp_jax.data import sources

CLASSES = {"cifar10": 10, "cifar100": 100}
Synthetic = namedtuple("Synthetic", "images labels")


# Digits


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_are_1297_training_and_500_test_images_of_8x8(digits):
    assert digits.train_images.shape == (1297, 8, 8, 1)
    assert digits.test_images.shape == (500, 8, 8, 1)
    assert digits.train_labels.shape == (1297,) and digits.test_labels.shape == (500,)
    assert digits.train_images.dtype == np.uint8 and digits.train_labels.dtype == np.int32
    assert digits.train_images.max() == 16
    assert digits.image_shape == (8, 8, 1) and digits.num_classes == 10
    assert (digits.crop_padding, digits.flip) == (1, False)


def test_digits_split_is_disjoint_and_complete(digits):
    from sklearn.datasets import load_digits

    def images_with_labels(images, labels):
        pixels = images.reshape(len(images), -1).astype(np.uint8)
        return sorted(zip(map(bytes, pixels), map(int, labels), strict=True))

    original = load_digits()
    together = images_with_labels(
        np.concatenate([digits.train_images, digits.test_images]),
        np.concatenate([digits.train_labels, digits.test_labels]),
    )
    # As multisets: an image in both parts would be there once too often.
    assert together == images_with_labels(original.images, original.target)


def test_digits_split_is_stratified_to_within_one_image(digits):
    test, train = np.bincount(digits.test_labels), np.bincount(digits.train_labels)
    assert np.all(np.abs(test - 500 / 1797 * (test + train)) < 1)


def test_digits_split_ignores_every_seed(digits):
    np.random.seed(3)
    again = data.load("digits", data_dir="/nowhere")
    np.testing.assert_array_equal(again.test_images, digits.test_images)
    np.testing.assert_array_equal(again.train_labels, digits.train_labels)
    assert digits.test_labels[:12].tolist() == DIGITS_FIRST_TEST_LABELS


def test_digits_statistics_are_those_of_the_training_images(digits):
    normal = np.asarray(data.normalize(digits.train_images, digits.mean, digits.std))
    np.testing.assert_allclose([normal.mean(), normal.std()], [0, 1], atol=1e-5)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(data.DataNotFoundError, match=r'pip install "dhp_jax\[demo\]"$'):
        data.load("digits")


@pytest.mark.parametrize(
    "name, near", [("cifar", "cifar10"), ("CIFAR-100", "cifar100"), ("digit", "digits"), (7, "")]
)
def test_an_unknown_name_is_refused_with_the_possible_ones(name, near):
    with pytest.raises(ValueError, match="data.name: expected one of") as raised:
        data.load(name)
    message = str(raised.value)
    assert repr(name) in message and all(known in message for known in data.NAMES)
    assert f"did you mean '{near}" in message


# CIFAR


def synthetic_cifar(name, seed=0):
    """Splits of random images, labels `(n, 1)` or for CIFAR-100 `(n, 2)`: coarse, then fine."""
    rng = np.random.default_rng(seed)
    limits = [10] if name == "cifar10" else [20, 100]
    sizes = {"train": 10, "test": 4}
    return {
        split: Synthetic(
            rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8), rng.integers(0, limits, (n, len(limits)))
        )
        for split, n in sizes.items()
    }


def write_archive(path, name, synthetic):
    """The layout of the archives that the CIFAR page offers."""

    def binary(split, part=slice(None)):
        images, labels = synthetic[split]
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        return np.concatenate([labels.astype(np.uint8), planes], axis=1)[part].tobytes()

    def names(word, count):
        return "".join(f"{word}_{i}\n" for i in range(count)).encode() + b"\n"

    if name == "cifar10":
        folder, files = "cifar-10-batches-bin", {"batches.meta.txt": names("class", 10)}
        files |= {
            f"data_batch_{i + 1}.bin": binary("train", slice(2 * i, 2 * i + 2)) for i in range(5)
        }
        files["test_batch.bin"] = binary("test")
    else:
        folder = "cifar-100-binary"
        files = {"train.bin": binary("train"), "test.bin": binary("test")}
        files["coarse_label_names.txt"] = names("coarse", 20)
        files["fine_label_names.txt"] = names("class", 100)
    with tarfile.open(path, "w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """A download host on this machine, with a small CIFAR-10 and CIFAR-100: folder and address."""
    folder = tmp_path_factory.mktemp("mirror")
    for name in CLASSES:
        write_archive(folder / f"{name}.tar.gz", name, synthetic_cifar(name))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def download_from(monkeypatch):
    """Call it with an address to make TFDS download CIFAR from there."""
    cifar = pytest.importorskip("tensorflow_datasets.image_classification.cifar")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def redirect(address):
        for builder in (cifar.Cifar10, cifar.Cifar100):
            original = builder._cifar_info.fget

            def redirected(self, original=original):
                return original(self)._replace(url=f"{address}/{self.name}.tar.gz")

            monkeypatch.setattr(builder, "_cifar_info", property(redirected))

    return redirect


@pytest.fixture(scope="module")
def prepared(mirror, tmp_path_factory):
    """A data directory with both data sets, downloaded and prepared once for this file."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as monkeypatch:
        download_from.__wrapped__(monkeypatch)(mirror)
        for name in CLASSES:
            data.load(name, folder)
    return folder
