"""Training examples that are held out for validation: which they are, in every kind of data."""

import dataclasses

import cloudpickle
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from dhp_jax import data
from dhp_jax.data.held_out import hold_out
from dhp_jax.errors import FieldError


@given(st.integers(2, 500), st.floats(0, 0.99), st.floats(0, 0.99))
def test_examples_are_divided_and_a_larger_share_holds_out_more(count, share, other):
    divided = []
    for part in sorted((share, other)):
        if part and max(1, round(part * count)) >= count:
            with pytest.raises(FieldError, match=r"^data\.validation: expected a share"):
                hold_out(count, part)
            return
        train, held = hold_out(count, part)
        assert sorted([*train, *held]) == list(range(count))
        assert list(train) == sorted(train)
        assert list(held) == sorted(held)
        assert len(held) == (max(1, round(part * count)) if part else 0)
        divided.append(set(held.tolist()))
    assert divided[0] <= divided[1]


def test_examples_that_are_held_out_are_spread_evenly():
    _, held = hold_out(10_000, 0.1)
    counts = np.bincount(held // 1000, minlength=10)
    assert counts.sum() == 1000
    assert counts.min() > 60  # 100 expected, with a standard deviation of 9


def test_images_are_decoded_once_for_both_splits():
    whole, read = data.load("digits"), []

    def counting(split):
        read.append(split)
        return whole.read(split)

    source = dataclasses.replace(whole, read=counting).hold_out(0.1)
    for split in ("train", "validation", "test"):
        assert len(source.read(split)[0]) == source.size(split)
    assert read == ["train", "test"]
    assert len(source.read("train")[0]) == source.train_size  # again, if asked for again
    assert read == ["train", "test", "train"]


def test_images_that_are_held_out_are_those_that_training_lacks():
    whole = data.load("digits")
    source = whole.hold_out(0.1)
    assert (source.splits, whole.splits) == (("train", "validation", "test"), ("train", "test"))
    images, labels = whole.read("train")
    train, held = hold_out(1297, 0.1)
    for split, numbers in (("train", train), ("validation", held)):
        assert source.size(split) == len(numbers)
        assert source.bytes(split) == len(numbers) * 64
        for found, expected in zip(source.read(split), (images, labels), strict=True):
            np.testing.assert_array_equal(found, expected[numbers])
        stream = source.stream(split, workers=0)
        read = cloudpickle.loads(cloudpickle.dumps(stream.read))
        chosen, rows = np.arange(stream.size), np.arange(stream.size)
        for found, expected in zip(
            read(chosen, rows, np.random.default_rng(0)), source.read(split), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
    for found, expected in zip(source.read("test"), whole.read("test"), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert source.checksum("test") == whole.checksum("test")
    checksums = {one.checksum(split) for one in (whole, source) for split in one.splits}
    checksums.add(whole.hold_out(0.2).checksum("train"))
    assert len(checksums) == 5
    assert whole.hold_out(0.0) is whole
