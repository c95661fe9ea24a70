"""Patches of streamed photographs: where they are cut, and the file that they are cut from."""

from fractions import Fraction
import os
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import numpy as np
from PIL import Image
import pytest

from dhp_jax.data import DataNotFoundError
from dhp_jax.data.photos import photographs
from dhp_jax.data.photos.bicubic import bicubic
from dhp_jax.data.photos.pixel_cache import shutil

SIZES = ((21, 30), (16, 16), (40, 19))  # height, width


@pytest.fixture
def folder(tmp_path):
    """Photographs whose pixels tell what and where they are."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (height, width) in enumerate(SIZES):
        rows, columns = np.indices((height, width))
        pixels = np.stack([np.full_like(rows, 80 * i), 6 * rows, 8 * columns], axis=-1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def loaded(folder, scale=1, patch=8):
    return photographs.load("photo_folder", folder, folder, scale=scale, patch=patch)


def read(stream, n=200, rows=None, seed=0):
    function = cloudpickle.loads(cloudpickle.dumps(stream.read))  # as in another process
    rows = np.arange(n) if rows is None else rows
    return function(np.arange(n), rows, np.random.default_rng(seed))


@pytest.mark.parametrize("scale", [1, 2])
def test_patches_are_cut_from_all_places_of_all_photographs(folder, tmp_path, scale):
    source = loaded(folder, scale)
    degraded, targets = read(source.stream(8, 0, tmp_path / "cache"), n=4000)
    assert targets.shape == (4000, 8, 8, 3)
    photos, places = source.read("train"), set()
    for i, target in enumerate(targets):
        image, row, column = target[0, 0, 0] // 80, target[0, 0, 1] // 6, target[0, 0, 2] // 8
        photo = photos[image]
        np.testing.assert_array_equal(target, photo.target[row:, column:][:8, :8])
        if scale > 1:
            low = photo.degraded[row // scale :, column // scale :][: 8 // scale, : 8 // scale]
            np.testing.assert_array_equal(degraded[i], low)
            np.testing.assert_array_equal(photo.degraded, bicubic(photo.target, Fraction(1, scale)))
        places.add((image, row, column))
    if scale == 1:
        assert degraded is None
    possible = {
        (i, row, column)
        for i, (height, width) in enumerate(SIZES)
        for row in range(0, height - height % scale - 7, scale)
        for column in range(0, width - width % scale - 7, scale)
    }
    assert places <= possible
    assert len(places) > 0.95 * len(possible)


def test_rows_are_parts_of_the_same_batch(folder, tmp_path):
    stream = loaded(folder, 2).stream(8, 0, tmp_path / "cache")
    whole = read(stream, n=10)
    for rows in np.array([0, 1, 6, 7]), np.array([2, 3, 4, 5, 8, 9]):
        for part, array in zip(read(stream, n=10, rows=rows), whole, strict=True):
            np.testing.assert_array_equal(part, array[rows])


def test_photographs_are_decoded_once_until_one_changes(folder, tmp_path, monkeypatch):
    cache, decoded = tmp_path / "cache", []
    original = photographs.Photographs._photograph
    monkeypatch.setattr(
        photographs.Photographs,
        "_photograph",
        lambda data, file: decoded.append(file.name) or original(data, file),
    )
    loaded(folder).stream(8, 0, cache)
    assert sorted(decoded) == ["0", "1", "2"]
    loaded(folder).stream(8, 0, cache)
    assert len(decoded) == 3
    os.utime(folder / "1.png", (1, 1))
    loaded(folder).stream(8, 0, cache)
    loaded(folder, scale=2).stream(8, 0, cache)
    assert len(decoded) == 9
    assert len(list(cache.glob("*.pixels"))) == 3


def test_the_file_is_as_large_as_is_told_beforehand(folder, tmp_path):
    for scale in (1, 2):
        source = loaded(folder, scale)
        path = source.stream(8, 0, tmp_path / "cache").read.path
        assert os.path.getsize(path) == source.bytes
        photos = source.read("train")
        arrays = [a for photo in photos for a in (photo.target, photo.degraded) if a is not None]
        assert source.bytes == sum(array.nbytes for array in arrays)


def test_a_photograph_that_cannot_be_decoded_leaves_no_file(folder, tmp_path):
    source, path = loaded(folder), folder / "2.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataNotFoundError, match=r"^data\.dir: cannot read .*2\.png"):
        source.stream(8, 0, tmp_path / "cache")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_a_disk_without_room_is_told_before_anything_is_decoded(folder, tmp_path, monkeypatch):
    source = loaded(folder)
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=rf"data\.cache: .* needs {source.bytes:,} bytes.*1,000"):
        source.stream(8, 0, tmp_path / "cache")


def test_streams_of_other_photographs_have_another_checksum(folder, tmp_path):
    cache = tmp_path / "cache"
    checksums = [loaded(folder).stream(8, 0, cache).checksum]
    checksums.append(loaded(folder, scale=2).stream(8, 0, cache).checksum)
    (folder / "0.png").rename(folder / "9.png")
    checksums.append(loaded(folder).stream(8, 0, cache).checksum)
    assert len(set(checksums)) == 3


def test_a_file_that_was_cut_short_is_made_again(folder, tmp_path, caplog):
    cache = tmp_path / "cache"
    stream = loaded(folder, 2).stream(8, 0, cache)
    expected = read(stream)
    path = Path(stream.read.path)
    os.truncate(path, 100)
    (cache / f".{path.name}.unfinished").write_bytes(b"of a process that was killed")
    for array, once in zip(read(loaded(folder, 2).stream(8, 0, cache)), expected, strict=True):
        np.testing.assert_array_equal(array, once)
    assert "has been cut short; it is made again" in caplog.text
    assert not list(cache.glob("*.unfinished"))
