"""CIFAR-10 as one file that is small enough to travel with the source code.

It holds the images as the JPEG files that tensorflow-datasets has prepared, losslessly: what all of
them begin with (tables, sizes) once, and what is left of each one after another. An error measured
on them is one on CIFAR-10 (JPEG), not quite on CIFAR-10.

    python benchmarks/cifar10_pack.py pack ~/tensorflow_datasets cifar10.pack
    python benchmarks/cifar10_pack.py unpack cifar10.pack data
    python experiments/main.py --config=experiments/configs/resnet20.py --config.data.dir=data
"""

import argparse
from collections.abc import Sequence
import io
import json
from pathlib import Path
import sys
import zlib

import numpy as np
from PIL import Image

from dhp_jax.data.labelled.cifar_binary import LAYOUTS

MAGIC = b"CIFAR-10 (JPEG) 1\n"
SPLITS = ("train", "test")


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = arguments.add_subparsers(dest="command", required=True)
    for name, given in {"pack": ("folder", "file"), "unpack": ("file", "folder")}.items():
        command = commands.add_parser(name)
        for argument in given:
            command.add_argument(argument, type=Path)
    options = arguments.parse_args()
    try:
        if options.command == "pack":
            splits, names = prepared(options.folder)
            options.file.write_bytes(packed(splits, names))
            print(f"{options.file}: {options.file.stat().st_size:,} bytes")
        else:
            unpack(options.file, options.folder)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def prepared(folder: Path) -> tuple[dict[str, tuple[list[bytes], list[int]]], list[str]]:
    """The encoded images and labels of each split as tensorflow-datasets has them, and names."""
    import tensorflow_datasets as tfds

    builder = tfds.builder("cifar10", data_dir=folder)
    splits = {}
    for split in SPLITS:
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        records = [source[i] for i in range(len(source))]
        splits[split] = [bytes(r["image"]) for r in records], [int(r["label"]) for r in records]
    return splits, list(builder.info.features["label"].names)


def packed(splits: dict[str, tuple[list[bytes], list[int]]], names: Sequence[str]) -> bytes:
    """All images as one file.

    Args:
      splits: encoded images, which begin alike, and labels, of "train" and "test".
      names: of the classes.
    """
    images = [image for encoded, _ in splits.values() for image in encoded]
    for image in images:
        if not image.startswith(b"\xff\xd8"):
            raise ValueError(f"folder: expected JPEG images, got one that begins with {image[:4]}")
    begin = _begin(images)
    body = b"".join(
        np.array([len(image) - len(begin) for image in encoded], "<u2").tobytes()
        + np.array(labels, np.uint8).tobytes()
        + b"".join(image[len(begin) :] for image in encoded)
        for encoded, labels in splits.values()
    )
    about = {
        "names": list(names),
        "counts": {split: len(labels) for split, (_, labels) in splits.items()},
        "begin": begin.hex(),
        "crc32": zlib.crc32(body),
    }
    return MAGIC + json.dumps(about).encode() + b"\n" + body


def _begin(images: Sequence[bytes]) -> bytes:
    """What all of some byte strings begin with."""
    low, high = min(images), max(images)
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:length]


def unpacked(data: bytes) -> tuple[dict[str, tuple[list[bytes], np.ndarray]], list[str]]:
    """What `packed` was given.

    Raises:
      ValueError: the file is not one that `packed` has made, or damaged.
    """
    if not data.startswith(MAGIC):
        raise ValueError(f"file: expected one that `pack` has made, got {data[: len(MAGIC)]!r}")
    head, body = data[len(MAGIC) :].split(b"\n", 1)
    about = json.loads(head)
    if zlib.crc32(body) != about["crc32"]:
        raise ValueError("file: it is damaged: its checksum is another one")
    begin, at, splits = bytes.fromhex(about["begin"]), 0, {}
    for split, count in about["counts"].items():
        lengths = np.frombuffer(body, "<u2", count, at)
        labels = np.frombuffer(body, np.uint8, count, at + 2 * count)
        ends = at + 3 * count + np.cumsum(lengths, dtype=np.int64)
        images = [
            begin + body[end - length : end]
            for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
        ]
        splits[split] = images, labels
        at = int(ends[-1]) if count else at + 3 * count
    return splits, about["names"]


def unpack(file: Path, folder: Path) -> None:
    """Makes a directory for `--config.data.dir` from a packed file: the binary version.

    Raises:
      ValueError: the file is not one that `packed` has made, or damaged.
    """
    splits, names = unpacked(Path(file).read_bytes())
    layout = LAYOUTS["cifar10"]
    inner = Path(folder, layout.folder)
    inner.mkdir(parents=True, exist_ok=True)
    (inner / layout.names).write_text("".join(f"{name}\n" for name in names))
    for split, (images, labels) in splits.items():
        files = layout.files[split]
        parts = zip(files, np.array_split(np.arange(len(images)), len(files)), strict=True)
        for name, chosen in parts:
            records = (record(images[i], labels[i]) for i in chosen)
            (inner / name).write_bytes(b"".join(records))


def record(image: bytes, label: int) -> bytes:
    """A record of the binary version from an encoded image."""
    with Image.open(io.BytesIO(image)) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    return bytes([label]) + pixels.transpose(2, 0, 1).tobytes()


if __name__ == "__main__":
    main()
