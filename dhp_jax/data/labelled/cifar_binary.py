"""CIFAR-10 and CIFAR-100 in the binary version in which their authors give them out."""

from dataclasses import dataclass
import functools
import os
from pathlib import Path
import zlib

import numpy as np

from dhp_jax.data.labelled.dataset import Loaded, Source
from dhp_jax.errors import DataNotFoundError

SIDE = 32


@dataclass(frozen=True)
class Layout:
    """Where the binary version of a data set has what.

    `files` of a split are in order. A record begins with some bytes of `labels`, the last of which
    is the class.
    """

    folder: str
    files: dict[str, tuple[str, ...]]
    names: str
    labels: int

    @property
    def record(self) -> int:
        """Bytes of a record: its labels, then the red, green and blue plane."""
        return self.labels + 3 * SIDE * SIDE


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-batches-bin",
        {
            "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            "test": ("test_batch.bin",),
        },
        "batches.meta.txt",
        1,
    ),
    "cifar100": Layout(
        "cifar-100-binary",
        {"train": ("train.bin",), "test": ("test.bin",)},
        "fine_label_names.txt",
        2,
    ),
}


def found(name: str, data_dir: str | os.PathLike | None) -> Path | None:
    """The folder of the binary version in a directory, if it is there."""
    if data_dir is None:
        return None
    folder = Path(data_dir).expanduser() / LAYOUTS[name].folder
    return folder if folder.is_dir() else None


def source(name: str, folder: Path, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Source:
    """The images of a folder that `found` has found, with mean and deviation of each channel."""
    layout = LAYOUTS[name]
    sizes = {
        split: sum(_records(folder / file, layout) for file in files)
        for split, files in layout.files.items()
    }
    class_names = _names(folder / layout.names)
    read = functools.partial(_read, layout, folder, len(class_names))  # by other processes, too

    def one_by_one(split: str) -> tuple[Loaded, str]:
        checksum = 0
        for file in layout.files[split]:
            checksum = zlib.crc32((folder / file).read_bytes(), checksum)
        return Loaded(read, split, sizes[split]), f"{name} {checksum}"

    return Source(
        name=name,
        image_shape=(SIDE, SIDE, 3),
        class_names=class_names,
        train_size=sizes["train"],
        test_size=sizes["test"],
        mean=mean,
        std=std,
        crop_padding=4,
        flip=True,
        read=read,
        one_by_one=one_by_one,
    )


def _names(path: Path) -> tuple[str, ...]:
    """The names of classes, a line each."""
    try:
        names = tuple(path.read_text().split())
    except (OSError, UnicodeDecodeError) as error:
        raise DataNotFoundError("data.dir", detail=f"cannot read {str(path)!r}: {error}") from error
    if not names:
        raise DataNotFoundError(
            "data.dir", detail=f"expected names of classes in {str(path)!r}, got none"
        )
    return names


def _records(path: Path, layout: Layout) -> int:
    """How many records a file has."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataNotFoundError("data.dir", detail=f"cannot read {str(path)!r}: {error}") from error
    if not size or size % layout.record:
        raise DataNotFoundError(
            "data.dir",
            detail=f"expected records of {layout.record:,} bytes in {str(path)!r}, "
            f"got {size:,} bytes",
        )
    return size // layout.record


def _read(layout: Layout, folder: Path, classes: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a split, in order."""
    parts = []
    for file in layout.files[split]:
        try:
            data = np.fromfile(folder / file, np.uint8)
        except OSError as error:
            raise DataNotFoundError("data.dir", detail=f"cannot read {file!r}: {error}") from error
        if len(data) % layout.record:
            raise DataNotFoundError("data.dir", detail=f"{str(folder / file)!r} is cut off")
        parts.append(data.reshape(-1, layout.record))
    records = np.concatenate(parts)
    labels = records[:, layout.labels - 1].astype(np.int32)
    if labels.size and labels.max() >= classes:
        raise DataNotFoundError(
            "data.dir",
            detail=f"expected labels below {classes} in {str(folder)!r}, got {labels.max()}",
        )
    planes = records[:, layout.labels :].reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels
