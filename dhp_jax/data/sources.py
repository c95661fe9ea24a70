"""The data sets that a run can name: whole in memory, as integer pixels with their labels."""

from collections.abc import Iterator
import contextlib
from dataclasses import dataclass
import difflib
import logging
import os
from pathlib import PurePosixPath
import sys
import tarfile
import threading

from absl.logging import get_absl_logger
import numpy as np

NAMES = ("digits", "cifar10", "cifar100")

# Mean and standard deviation of red, green and blue in the training images, pixels 0 .. 255.
_CIFAR_STATISTICS = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
}
_DIGITS_TEST_SIZE = 500
_DEFAULT_CONFIG = "--config=experiments/configs/digits_resnet20.py"


class DataNotFoundError(ValueError):
    """The data are not on this machine in a form that can be read, and cannot be fetched."""


@dataclass(frozen=True, eq=False)
class Source:
    """A data set of labelled images, and the training augmentation that suits it.

    Attributes:
      name: what `load` was asked for.
      train_images: uint8 `(n, h, w, c)`.
      train_labels: int32 `(n,)`, `0 .. num_classes - 1`.
      test_images: uint8 `(m, h, w, c)`.
      test_labels: int32 `(m,)`.
      class_names: one name a class.
      mean: mean of each channel of the training images, in units of the stored pixels.
      std: standard deviation of each channel, in the same units.
      crop_padding: width in pixels of the border that a random crop may move into.
      flip: whether a mirrored image is still an image of its class.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def train_size(self) -> int:
        """How many training images there are."""
        return len(self.train_labels)

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of "train" or "test"."""
        if split == "train":
            return self.train_images, self.train_labels
        return self.test_images, self.test_labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(h, w, c)` of every image."""
        return self.train_images.shape[1:]


def load(name: str, data_dir: str | os.PathLike | None = None) -> Source:
    """Reads a data set into memory; downloads CIFAR first if it is not there and a network is.

    Args:
      name: one of `NAMES`. "digits" (1,797 images of 8x8x1, pixels 0 .. 16) ships with
        scikit-learn and needs no network.
      data_dir: the TFDS directory that holds CIFAR, `data_dir/cifar10/3.0.2/...`; TFDS's own
        default, `~/tensorflow_datasets`, if `None`. "digits" does not look at it.

    Returns:
      The data set. The split of "digits" into 1,297 training and 500 test images is always the
      same one.

    Raises:
      ValueError: `name` is none of `NAMES`.
      DataNotFoundError: the data are neither in `data_dir` in the array_record format nor can be
        downloaded (found out in seconds), or scikit-learn is missing.

    Example:
      >>> load("digits").train_images.shape
      (1297, 8, 8, 1)
    """
    if name not in NAMES:
        near = difflib.get_close_matches(str(name), NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"data.name: expected one of {', '.join(NAMES)}, got {name!r}; did you mean {near!r}?"
        )
    return _load_digits() if name == "digits" else _load_cifar(name, data_dir)


def _load_digits() -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataNotFoundError(
            "data.name: 'digits' needs scikit-learn, which is not installed; "
            'run: pip install "dhp_jax[demo]"'
        ) from error

    digits = load_digits()
    images = digits.images[..., np.newaxis].astype(np.uint8)
    labels = digits.target.astype(np.int32)
    # Every k-th image in the order of the labels: the same for every run, and each class gets its
    # share to within one image.
    by_label = np.argsort(labels, kind="stable")
    test = np.sort(by_label[np.arange(_DIGITS_TEST_SIZE) * len(labels) // _DIGITS_TEST_SIZE])
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Source(
        name="digits",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        class_names=tuple(str(digit) for digit in digits.target_names),
        mean=(float(images[train].mean()),),
        std=(float(images[train].std()),),
        crop_padding=1,
        flip=False,
    )


def _load_cifar(name: str, data_dir: str | os.PathLike | None) -> Source:
    with _quiet():
        builder = _cifar_builder(name, data_dir)
        prepared = builder.is_prepared()
    if not prepared:
        _prepare(builder)
    with _quiet(), _read_errors(builder):
        train_images, train_labels = _read(builder, "train")
        test_images, test_labels = _read(builder, "test")
    mean, std = _CIFAR_STATISTICS[name]
    return Source(
        name=name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=tuple(builder.info.features["label"].names),
        mean=mean,
        std=std,
        crop_padding=4,
        flip=True,
    )


def _cifar_builder(name: str, data_dir: str | os.PathLike | None):
    """TFDS's own builder, except that it unpacks and encodes the images without TensorFlow."""
    from PIL import Image
    import tensorflow_datasets as tfds  # here, because it is slow and "digits" does without

    registered = tfds.builder_cls(name)

    class Builder(registered, skip_registration=True):
        name = registered.name
        # TFDS looks for the checksums of the download next to the module of the class.
        __module__ = registered.__module__

        def _split_generators(self, downloads):
            cifar = self._cifar_info
            with tarfile.open(downloads.download(cifar.url)) as archive:
                files = {
                    PurePosixPath(member.name).name: archive.extractfile(member).read()
                    for member in archive
                    if member.isfile()
                }
            for key, file in zip(cifar.label_keys, cifar.label_files, strict=True):
                self.info.features[key].names = files[file].decode().split()
            return {
                "train": self._generate_examples("train_", [files[f] for f in cifar.train_files]),
                "test": self._generate_examples("test_", [files[f] for f in cifar.test_files]),
            }

        def _generate_examples(self, prefix, files):
            # A record is its labels, a byte each, and the red, green and blue planes.
            keys = self._cifar_info.label_keys
            records = np.frombuffer(b"".join(files), np.uint8).reshape(-1, len(keys) + 3 * 32 * 32)
            for index, record in enumerate(records):
                pixels = record[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
                example = dict(zip(keys, record[: len(keys)], strict=True))
                example["id"] = f"{prefix}{index:05d}"
                example["image"] = Image.fromarray(np.ascontiguousarray(pixels))
                yield index, example

    return Builder(data_dir=None if data_dir is None else os.path.expanduser(data_dir))


def _prepare(builder) -> None:
    """Downloads and prepares the data; raises in seconds if the download host does not answer."""
    url = builder._cifar_info.url
    if not _reachable(url):  # TFDS itself would try for minutes
        raise DataNotFoundError(
            f"data.dir: found no prepared {builder.name} in {builder.data_dir} and cannot fetch "
            f"{url}; prepare it there with TFDS in the array_record format on a machine with "
            f"network, or run the embedded default, {_DEFAULT_CONFIG}"
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        raise DataNotFoundError(
            f"data.dir: cannot prepare {builder.name} in {builder.data_dir}: {error}"
        ) from error


def _reachable(url: str, seconds: float = 5.0) -> bool:
    """Whether `url` answers in time, asked as TFDS will ask: same proxies, same certificates."""
    import requests

    answers = []

    def ask():
        with contextlib.suppress(OSError):
            answers.append(requests.head(url, timeout=seconds, allow_redirects=True).ok)

    # A name look-up ignores the timeout of the request, hence a thread that can be left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers == [True]


def _read(builder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a split, in the order in which they are stored."""
    records = builder.as_data_source(split)
    images = np.empty((len(records), *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    # Batches are a fifth faster than single records; threads make it slower.
    for start in range(0, len(records), 1000):
        batch = range(start, min(start + 1000, len(records)))
        for i, record in zip(batch, records.__getitems__(list(batch)), strict=True):
            images[i], labels[i] = record["image"], record["label"]
    return images, labels


@contextlib.contextmanager
def _read_errors(builder) -> Iterator[None]:
    """Turns the ways in which reading prepared data fails into one line that says what to do."""
    again = 'give another directory, or prepare it again with file_format="array_record"'
    try:
        yield
    except NotImplementedError as error:
        raise DataNotFoundError(
            f"data.dir: {builder.name} in {builder.data_dir} has the file format "
            f"{builder.info.file_format.value}, expected array_record; {again}"
        ) from error
    except RuntimeError as error:  # what array_record raises for a file that is missing or cut off
        raise DataNotFoundError(
            f"data.dir: cannot read {builder.name} in {builder.data_dir}: {error}; {again}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what TFDS logs about itself out of the log of a run."""
    logger = get_absl_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
