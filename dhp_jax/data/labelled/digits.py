"""Scikit-learn's handwritten digits: 1,797 gray images of 8x8, pixels 0 to 16; no download."""

import numpy as np

from dhp_jax.data.labelled.dataset import Source
from dhp_jax.errors import DataNotFoundError

TEST_SIZE = 500


def load() -> Source:
    """The digits; the split is always the same one."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataNotFoundError(
            "data.name",
            detail="'digits' needs scikit-learn, which is not installed; "
            'run: pip install "dhp_jax[demo]"',
        ) from error

    digits = load_digits()
    images = digits.images[..., np.newaxis].astype(np.uint8)
    labels = digits.target.astype(np.int32)
    # Every k-th image in the order of the labels: the same for every run, and each class gets its
    # share to within one image.
    by_label = np.argsort(labels, kind="stable")
    test = np.sort(by_label[np.arange(TEST_SIZE) * len(labels) // TEST_SIZE])
    train = np.setdiff1d(np.arange(len(labels)), test)
    splits = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    return Source(
        name="digits",
        image_shape=images.shape[1:],
        class_names=tuple(str(digit) for digit in digits.target_names),
        train_size=len(train),
        test_size=len(test),
        mean=(float(images[train].mean()),),
        std=(float(images[train].std()),),
        crop_padding=1,
        flip=False,
        read=splits.__getitem__,
        peak=16,
    )
