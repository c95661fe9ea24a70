"""CIFAR-10 and CIFAR-100 as tensorflow-datasets prepares them, without TensorFlow."""

from collections.abc import Iterator
import contextlib
import functools
import logging
import os
from pathlib import PurePosixPath
import sys
import tarfile
import threading

from absl.logging import get_absl_logger
import numpy as np

from dhp_jax.data.source import DataNotFoundError, Source

# Mean and standard deviation of red, green and blue in the training images, pixels 0 .. 255.
STATISTICS = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
}
DEFAULT_CONFIG = "--config=experiments/configs/digits_resnet20.py"


def load(name: str, data_dir: str | os.PathLike | None = None) -> Source:
    """Finds prepared data, or downloads and prepares them; see `dhp_jax.data.load`."""
    with _quiet():
        builder = _builder(name, data_dir)
        prepared = builder.is_prepared()
    if not prepared:
        _prepare(builder, data_dir)
    with _quiet(), _read_errors(builder):
        sizes = {}
        for split in ("train", "test"):
            records = builder.as_data_source(split)
            sizes[split] = len(records)
            records.__getitems__([0, len(records) - 1])  # fails now if a file is missing or cut
    mean, std = STATISTICS[name]
    return Source(
        name=name,
        image_shape=builder.info.features["image"].shape,
        class_names=tuple(builder.info.features["label"].names),
        train_size=sizes["train"],
        test_size=sizes["test"],
        mean=mean,
        std=std,
        crop_padding=4,
        flip=True,
        read=functools.partial(_read, builder),
    )


def _builder(name: str, data_dir: str | os.PathLike | None):
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


def _prepare(builder, data_dir: str | os.PathLike | None) -> None:
    """Downloads and prepares the data; raises in seconds if the download host does not answer.

    A directory that was named and is not there is more likely mistyped than meant to be filled.
    """
    url, obstacle = builder._cifar_info.url, None
    if data_dir is not None and not os.path.isdir(os.path.expanduser(data_dir)):
        obstacle = f"{os.fspath(data_dir)!r} is no directory"
    elif not _reachable(url):  # TFDS itself would try for minutes
        obstacle = f"cannot fetch {url}"
    if obstacle is not None:
        raise DataNotFoundError(
            f"data.dir: found no prepared {builder.name} in {builder.data_dir} and {obstacle}; "
            f"prepare it there with TFDS in the array_record format on a machine with "
            f"network, or run the embedded default, {DEFAULT_CONFIG}"
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
    with _quiet(), _read_errors(builder):
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
