"""Tiny ImageNet, 200 classes of 64x64x3, which TFDS prepares from its zip without TensorFlow."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import io
import os
from pathlib import Path, PurePosixPath
import zipfile
import zlib

from dhp_jax.activity import quiet
from dhp_jax.data.decode import decode
from dhp_jax.data.labelled.dataset import Source
from dhp_jax.data.labelled.tfds import DEFAULT_CONFIG, directory, is_prepared, prepare, source
from dhp_jax.errors import DataNotFoundError, FieldError

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
SHAPE = (64, 64, 3)

# Of red, green and blue in the training images, pixels 0 .. 255.
MEAN = tuple(255 * mean for mean in (0.4802, 0.4481, 0.3975))
STD = tuple(255 * std for std in (0.2302, 0.2265, 0.2262))

# The files of each split, with the WordNet id that is their class.
Listing = dict[str, list[tuple[str, str]]]


def load(
    data_dir: str | os.PathLike | None = None, archive: str | os.PathLike | None = None
) -> Source:
    """Finds prepared data, or prepares them from the archive; see `dhp_jax.data.load`."""
    with quiet("absl"):
        builder = _builder(data_dir)
    if not is_prepared(builder):
        builder.archive = _find(builder, archive)
        builder.classes, builder.listing = _checked_listing(builder.archive)
        prepare(builder)
    return source(
        builder,
        functools.partial(decode, mode="RGB"),
        image_shape=SHAPE,
        test="validation",
        mean=MEAN,
        std=STD,
        crop_padding=0,
        flip=True,
    )


def _builder(data_dir: str | os.PathLike | None):
    """A TFDS builder that stores the images of `builder.archive` as they are."""
    import tensorflow_datasets as tfds  # here, because it is slow and "digits" does without

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Tiny ImageNet; its splits are "train" and "validation"."""

        name = "tiny_imagenet"
        VERSION = tfds.core.Version("1.0.0")
        archive: Path
        classes: list[str]
        listing: Listing

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="200 classes of ImageNet in 64x64 pixels.",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=SHAPE, encoding_format="jpeg"),
                        "label": tfds.features.ClassLabel(),
                    }
                ),
                supervised_keys=("image", "label"),
                homepage=URL,
            )

        def _split_generators(self, _):
            self.info.features["label"].names = self.classes
            return {split: self._generate_examples(self.listing[split]) for split in self.listing}

        def _generate_examples(self, examples):
            with _open_archive(self.archive) as (_, read):
                for file, label in examples:
                    image = read(file)
                    _check_image(image, file)
                    yield PurePosixPath(file).name, {"image": image, "label": label}

    return Builder(data_dir=directory(data_dir))


def _check_image(image: bytes, file: str) -> None:
    shape = decode(io.BytesIO(image), "RGB", argument="data.archive", name=file).shape
    if shape != SHAPE:
        raise FieldError("data.archive", detail=f"{file} has the shape {shape}, expected {SHAPE}")


def _find(builder, archive: str | os.PathLike | None) -> Path:
    """The archive that was named, or else the one in the data directory."""
    path = Path(archive or builder.data_dir_root / PurePosixPath(URL).name).expanduser()
    if not path.exists():
        raise DataNotFoundError(
            "data.archive",
            detail=f"found no prepared {builder.name} in {builder.data_dir}, and no archive "
            f"{path}; fetch it on a machine with network, by curl -O {URL}, and give its path as "
            f"data.archive, or try {DEFAULT_CONFIG}, "
            "whose images come with scikit-learn",
        )
    return path


def _checked_listing(path: Path) -> tuple[list[str], Listing]:
    """What the archive holds; raises if it is damaged or holds something else."""
    with _open_archive(path) as (files, read):
        try:
            return _listing(files, read)
        except ValueError as error:
            raise DataNotFoundError(
                "data.archive", detail=f"{path} is not laid out as {URL}: {error}"
            ) from error


@contextlib.contextmanager
def _open_archive(archive: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """The names of the files in a zip or a folder, and a function that reads one of them."""
    try:
        if archive.is_dir():
            files = [file for file in archive.rglob("*") if file.is_file()]
            names = [file.relative_to(archive).as_posix() for file in files]
            yield names, lambda name: (archive / name).read_bytes()
        else:
            with zipfile.ZipFile(archive) as opened:
                yield opened.namelist(), opened.read
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DataNotFoundError("data.archive", detail=f"cannot read {archive}: {error}") from error


def _listing(files: list[str], read: Callable[[str], bytes]) -> tuple[list[str], Listing]:
    """The WordNet ids of the classes, sorted, and the files of both splits."""
    ids = next((file for file in files if PurePosixPath(file).name == "wnids.txt"), None)
    if ids is None:
        raise ValueError("found no wnids.txt")
    val = ids.removesuffix("wnids.txt") + "val/"
    if f"{val}val_annotations.txt" not in files:
        raise ValueError(f"found no {val}val_annotations.txt")
    classes = sorted(read(ids).decode().split())
    rows = read(f"{val}val_annotations.txt").decode().strip().splitlines()
    listing = {
        "train": [
            (file, file.split("/")[-3])
            for file in sorted(files)
            if PurePosixPath(file).match("train/*/images/*.JPEG")
        ],
        "validation": [(f"{val}images/{name}", label) for name, label, *_ in map(str.split, rows)],
    }
    for split, examples in listing.items():
        if not examples:
            raise ValueError(f"found no images of {split}")
        if unknown := sorted({label for _, label in examples}.difference(classes)):
            raise ValueError(f"{split} has classes that wnids.txt lacks: {', '.join(unknown)}")
    if missing := {file for file, _ in listing["validation"]}.difference(files):
        raise ValueError(f"val_annotations.txt names {min(missing)}, which is not there")
    return classes, listing
