"""A data set of the user's own images: a folder for each split, in it one for each label."""

from dataclasses import dataclass
from itertools import chain
import os
from pathlib import Path
from typing import Any

import numpy as np

from dhp_jax.data.decode import (
    SUFFIXES,
    decode,
    empty_images,
    for_each_chunk,
    read_header,
    tell_left_out,
)
from dhp_jax.data.labelled.dataset import Source
from dhp_jax.errors import DataNotFoundError, FieldError

# Images from which the mean and standard deviation are taken, if there are more.
SAMPLE = 2000


def load(
    data_dir: str | os.PathLike | None,
    image_size: int | None = None,
    channels: int | None = None,
) -> Source:
    """Finds the images `data_dir/split/label/*` that Pillow reads; see `dhp_jax.data.load`.

    All are turned upright, as their EXIF orientation says, in training, in tests and in
    `dhp_jax.predict`. One warning tells how many files are left out.

    The splits are "train" and "test" or, where there is no "test", "val"; labels are numbered in
    the order of their names. If there are more than `SAMPLE` training images, the mean and the
    standard deviation are those of `SAMPLE` of them, at equal distances in the order of labels
    and names.
    """
    folders = _split_folders(data_dir)
    try:
        files = {split: _files_by_label(folder) for split, folder in folders.items()}
    except OSError as error:
        raise DataNotFoundError("data.dir", detail=f"cannot read {data_dir}: {error}") from error
    _check_labels(folders, files)
    images = {split: list(chain(*by_label.values())) for split, by_label in files.items()}
    tell_left_out(
        "data.dir",
        folders.values(),
        images["train"] + images["test"],
        "right in the folder of their label",
    )
    mode, (h, w) = _check_headers(images["train"] + images["test"], image_size, channels)
    decoding = {"mode": mode, "resize": image_size, "crop": image_size, "upright": True}
    mean, std = _statistics(images["train"], decoding)

    def one_by_one(split: str) -> tuple["_Files", str]:
        counts = [len(of_label) for of_label in files[split].values()]
        labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        names = [str(file.relative_to(folders[split])) for file in images[split]]
        identity = [f"{n} {f.stat().st_size}" for n, f in zip(names, images[split], strict=True)]
        return _Files(str(folders[split]), names, labels, decoding), "\n".join(identity)

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        found, _ = one_by_one(split)
        pixels = empty_images((len(found), h, w, len(mean)), f"the {split} images in {data_dir}")

        def decode_rows(rows: range) -> None:
            for i in rows:
                pixels[i], _ = found[i]

        for_each_chunk(decode_rows, len(found))
        return pixels, found.labels

    return Source(
        name="image_folder",
        image_shape=(h, w, len(mean)),
        class_names=tuple(files["train"]),
        train_size=len(images["train"]),
        test_size=len(images["test"]),
        mean=mean,
        std=std,
        crop_padding=min(h, w) // 8,
        flip=True,
        read=read,
        one_by_one=one_by_one,
    )


@dataclass(frozen=True, eq=False)
class _Files:
    """Labelled images that are decoded one by one."""

    folder: str
    names: list[str]
    labels: np.ndarray
    decoding: dict[str, Any]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        file = os.path.join(self.folder, self.names[number])
        return decode(file, **self.decoding), int(self.labels[number])


def _split_folders(data_dir: str | os.PathLike | None) -> dict[str, Path]:
    """The folders of the training and the test images."""
    if data_dir is None:
        raise DataNotFoundError("data.dir", detail="image_folder needs a folder; got None")
    root = Path(data_dir).expanduser()
    test = "val" if (root / "val").is_dir() and not (root / "test").is_dir() else "test"
    folders = {"train": root / "train", "test": root / test}
    for folder in folders.values():
        if not folder.is_dir():
            raise DataNotFoundError(
                "data.dir",
                detail=f"expected {root} to hold the folders train and test (or val); {folder} is "
                "no folder",
            )
    return folders


def _files_by_label(folder: Path) -> dict[str, list[Path]]:
    """The image files of each label of a split; hidden files and folders are none."""
    labels = sorted(path for path in _visible(folder) if path.is_dir())
    if not labels:
        raise DataNotFoundError(
            "data.dir", detail=f"{folder} is empty, expected a folder for each label"
        )
    files = {
        label.name: sorted(file for file in _visible(label) if file.suffix.lower() in SUFFIXES)
        for label in labels
    }
    for label, of_label in files.items():
        if not of_label:
            raise DataNotFoundError(
                "data.dir",
                detail=f"{folder / label} holds no image, expected {', '.join(SUFFIXES)}",
            )
    return files


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _check_labels(folders: dict[str, Path], files: dict[str, dict[str, list[Path]]]) -> None:
    for split, other in (("train", "test"), ("test", "train")):
        if missing := sorted(set(files[other]).difference(files[split])):
            raise DataNotFoundError(
                "data.dir",
                detail=f"{folders[split]} lacks labels that {folders[other]} has: "
                f"{', '.join(missing)}",
            )


def _check_headers(
    files: list[Path], image_size: int | None, channels: int | None
) -> tuple[str, tuple[int, int]]:
    """The mode, "L" or "RGB", and the height and width that all images are decoded to."""
    examples: dict[str, Path] = {}  # an image of each mode
    expected = None if image_size is None else (image_size, image_size)
    for file in files:
        gray, size = read_header(file)
        mode = "L" if gray else "RGB"
        examples.setdefault(mode, file)
        if channels is None and len(examples) == 2:
            raise FieldError(
                "data.dir",
                detail=f"expected all images in gray or all in colour; {examples['L']} is gray, "
                f"{examples['RGB']} is not; data.channels=3 makes all of them colour, 1 gray",
            )
        expected = expected or size
        if image_size is None and size != expected:
            raise FieldError(
                "data.dir",
                detail=f"{file} is {size[1]} pixels wide and {size[0]} high, expected "
                f"{expected[1]} and {expected[0]} as in {files[0]}; data.image_size brings "
                "all to one size",
            )
    return {None: mode, 1: "L", 3: "RGB"}[channels], expected


def _statistics(
    files: list[Path], decoding: dict[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel; see `load` for which images count."""
    count = min(len(files), SAMPLE)
    sample = [files[i * len(files) // count] for i in range(count)]
    moments = np.empty((count, 2, 1 if decoding["mode"] == "L" else 3))

    def measure(rows: range) -> None:
        for i in rows:
            pixels = decode(sample[i], **decoding).astype(np.float64)
            moments[i] = pixels.mean((0, 1)), (pixels**2).mean((0, 1))

    for_each_chunk(measure, count)
    mean, square = moments.mean(0)
    variance = square - mean**2
    std = np.sqrt(np.where(variance > 0, variance, 1))  # 1: a channel that never varies
    return tuple(mean.tolist()), tuple(std.tolist())
