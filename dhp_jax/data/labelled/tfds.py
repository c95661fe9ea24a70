"""Data that tensorflow-datasets has prepared, found and read without TensorFlow."""

from collections.abc import Callable, Iterator
import contextlib
from dataclasses import dataclass
import functools
import io
import os
import sys
from typing import Any

import numpy as np

from dhp_jax.activity import quiet
from dhp_jax.data.decode import empty_images, for_each_chunk
from dhp_jax.data.labelled.dataset import Labelled, Source
from dhp_jax.errors import DataNotFoundError

DEFAULT_CONFIG = "--config=digits_resnet20"
AGAIN = 'give another directory, or prepare it again with file_format="array_record"'


def directory(data_dir: str | os.PathLike | None) -> str | None:
    """What TFDS expects as `data_dir`: `~` spelt out, `None` for its own default."""
    return None if data_dir is None else os.path.expanduser(data_dir)


def is_prepared(builder) -> bool:
    """Whether the data are there, in whatever file format."""
    with quiet("absl"):
        return builder.is_prepared()


def prepare(builder) -> None:
    """Lets TFDS prepare the data in the one file format that is read without TensorFlow."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        raise DataNotFoundError(
            "data.dir", detail=f"cannot prepare {builder.name} in {builder.data_dir}: {error}"
        ) from error


def source(
    builder,
    decode: Callable[..., np.ndarray],
    *,
    image_shape: tuple[int, int, int],
    test: str = "test",
    threads: int | None = 1,
    **fields: Any,
) -> Source:
    """The source, of the same name, whose images a TFDS builder has prepared.

    Args:
      builder: of a data set with the features "image" and "label".
      decode: gives the pixels of a stored image, `decode(file, name=...)`.
      image_shape: `(h, w, c)` of what `decode` gives.
      test: the split of the builder that serves as the test images.
      threads: how many images to decode at a time; one a core if `None`.
      **fields: the other fields of `Source`.
    """
    splits = {"train": "train", "test": test}
    with quiet("absl"), _read_errors(builder):
        sizes = {split: _checked_size(builder, stored) for split, stored in splits.items()}

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        return _read(builder, splits[split], decode, image_shape, threads)

    def one_by_one(split: str) -> tuple[Labelled, str]:
        stored = builder.info.splits[splits[split]]
        identity = f"{builder.info.full_name} {stored.num_examples} {stored.num_bytes}"
        return _Records(str(builder.data_path), splits[split], decode, sizes[split]), identity

    return Source(
        name=builder.name,
        image_shape=image_shape,
        class_names=tuple(builder.info.features["label"].names),
        train_size=sizes["train"],
        test_size=sizes["test"],
        read=read,
        one_by_one=one_by_one,
        **fields,
    )


@dataclass
class _Records:
    """Labelled images that are read one by one from a directory that TFDS has prepared."""

    directory: str
    split: str
    decode: Callable[..., np.ndarray]
    size: int

    @functools.cached_property
    def records(self):
        import tensorflow_datasets as tfds

        with quiet("absl"):
            return _records(tfds.builder_from_directory(self.directory), self.split)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        try:
            record = self.records[number]
        except RuntimeError as error:  # a file that is missing or cut off
            raise DataNotFoundError(
                "data.dir", detail=f"cannot read {self.directory}: {error}; {AGAIN}"
            ) from error
        return _decode(record, self.decode, f"image {number} of {self.split} in {self.directory}")


def _decode(
    record: dict[str, Any], decode: Callable[..., np.ndarray], name: str
) -> tuple[np.ndarray, int]:
    """The pixels and the label of a record."""
    return decode(io.BytesIO(record["image"]), name=name), record["label"]


def _checked_size(builder, split: str) -> int:
    """How many records a split has; fails if a file of it is missing or cut off."""
    if split not in builder.info.splits:
        raise DataNotFoundError(
            "data.dir",
            detail=f"{builder.name} in {builder.data_dir} has the splits "
            f"{', '.join(builder.info.splits)}, expected {split}, too; {AGAIN}",
        )
    records = _records(builder, split)
    records.__getitems__([0, len(records) - 1])
    return len(records)


def _records(builder, split: str):
    """Random access to the records of a split, the images still encoded."""
    from tensorflow_datasets import decode

    return builder.as_data_source(split, decoders={"image": decode.SkipDecoding()})


def _read(
    builder,
    split: str,
    decode: Callable[..., np.ndarray],
    image_shape: tuple[int, int, int],
    threads: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a split, in the order in which they are stored."""
    with quiet("absl"), _read_errors(builder):
        records = _records(builder, split)
        images = empty_images((len(records), *image_shape), f"the {split} images of {builder.name}")
        labels = np.empty(len(records), np.int32)

        def read_rows(rows: range) -> None:
            for i, record in zip(rows, records.__getitems__(list(rows)), strict=True):
                name = f"image {i} of {split} in {builder.data_dir}"
                images[i], labels[i] = _decode(record, decode, name)

        for_each_chunk(read_rows, len(records), threads)
    return images, labels


@contextlib.contextmanager
def _read_errors(builder) -> Iterator[None]:
    """Turns the ways in which reading prepared data fails into one line that says what to do."""
    try:
        yield
    except NotImplementedError as error:
        raise DataNotFoundError(
            "data.dir",
            detail=f"{builder.name} in {builder.data_dir} has the file format "
            f"{builder.info.file_format.value}, expected array_record; {AGAIN}",
        ) from error
    except RuntimeError as error:  # what array_record raises for a file that is missing or cut off
        raise DataNotFoundError(
            "data.dir", detail=f"cannot read {builder.name} in {builder.data_dir}: {error}; {AGAIN}"
        ) from error
