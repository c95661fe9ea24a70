"""CIFAR-10 as arrays in memory, from each form of files that may be at hand."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import io
from pathlib import Path

import numpy as np
from PIL import Image

PARTS = "train", "test"
BINARY = "data_batch_*.bin", "test_batch.bin"  # files of CIFAR-10's binary version
SHAPE = (32, 32, 3)


def read(path: Path, rehearse: bool) -> tuple[tuple, tuple]:
    """Images (uint8) and labels, of training and test; a few random ones in a rehearsal.

    Args:
      path: a folder with the binary version of CIFAR-10, a file that `cifar10_pack.py` has made, or
        an .npz file with `train_images`, `train_labels`, `test_images`, `test_labels`.
      rehearse: whether a few random ones do.
    """
    if rehearse:
        rng = np.random.default_rng(0)
        return tuple(
            (rng.integers(0, 256, (n, *SHAPE), np.uint8), rng.integers(0, 10, n)) for n in (32, 16)
        )
    if path.is_dir():
        return tuple(of_binary(sorted(path.rglob(pattern))) for pattern in BINARY)
    if path.suffix == ".npz":
        with np.load(path) as stored:
            return tuple((stored[f"{part}_images"], stored[f"{part}_labels"]) for part in PARTS)
    from cifar10_pack import unpacked  # needs the library's data

    splits, _ = unpacked(path.read_bytes())
    return tuple((decoded(images), np.asarray(labels)) for images, labels in map(splits.get, PARTS))


def of_binary(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of files of the binary version: a label, then the channels one by one."""
    if not paths:
        raise ValueError("--data: expected data_batch_1.bin to data_batch_5.bin and test_batch.bin")
    records = np.concatenate([np.fromfile(path, np.uint8) for path in paths]).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0]


def decoded(images: Sequence[bytes]) -> np.ndarray:
    """The pixels of encoded images, by several threads."""

    def some(images):
        return [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]

    parts = [images[at : at + 1000] for at in range(0, len(images), 1000)]
    with ThreadPoolExecutor() as pool:
        return np.concatenate([np.stack(part) for part in pool.map(some, parts)])
