"""CIFAR-10 and CIFAR-100 as tensorflow-datasets prepares them, or in their binary version."""

import contextlib
import functools
import os
from pathlib import PurePosixPath
import tarfile
import threading

import numpy as np

from dhp_jax.activity import quiet
from dhp_jax.data.decode import decode
from dhp_jax.data.labelled import cifar_binary
from dhp_jax.data.labelled.dataset import Source
from dhp_jax.data.labelled.tfds import DEFAULT_CONFIG, directory, is_prepared, prepare, source
from dhp_jax.errors import DataNotFoundError

# Mean and standard deviation of red, green and blue in the training images, pixels 0 .. 255.
STATISTICS = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
}


def load(name: str, data_dir: str | os.PathLike | None = None) -> Source:
    """Finds prepared data, or downloads and prepares them; see `dhp_jax.data.load`."""
    mean, std = STATISTICS[name]
    folder = cifar_binary.found(name, data_dir)
    if folder is not None:
        return cifar_binary.source(name, folder, mean=mean, std=std)
    with quiet("absl"):
        builder = _builder(name, data_dir)
    if not is_prepared(builder):
        _prepare(builder, data_dir)
    return source(
        builder,
        functools.partial(decode, mode="RGB"),
        image_shape=(32, 32, 3),
        mean=mean,
        std=std,
        crop_padding=4,
        flip=True,
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

    return Builder(data_dir=directory(data_dir))


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
            "data.dir",
            detail=f"found no prepared {builder.name} in {builder.data_dir} and {obstacle}; "
            "prepare it (as array_record) on a machine with network, and copy the folder: "
            'python -c "from dhp_jax.data.labelled import registry; '
            f"registry.load('{builder.name}', '.')\"; "
            f"or try {DEFAULT_CONFIG}, whose images come with scikit-learn",
        )
    prepare(builder)


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
