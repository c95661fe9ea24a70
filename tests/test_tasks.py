"""Classification: its losses, its errors, and what is augmented."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhp_jax.tasks import Classification

MEAN, STD = (100.0, 50.0, 20.0), (10.0, 5.0, 2.0)
TASK = Classification(MEAN, STD, crop_padding=2, flip=True)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (16, 6, 6, 3), np.uint8)  # no zero: only the border is black
    return jnp.asarray(images), jnp.asarray(rng.integers(0, 5, 16))


def normalised(images):
    return (np.asarray(images, np.float64) - MEAN) / STD


def test_the_loss_is_the_cross_entropy_of_each_example():
    rng = np.random.default_rng(0)
    logits, labels = 5 * rng.normal(size=(8, 5)), rng.integers(0, 5, 8)
    found = TASK.loss(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, -np.log(probabilities[np.arange(8), labels]), rtol=1e-5)


def test_the_loss_of_bfloat16_outputs_is_computed_in_float32():
    logits = jnp.asarray([[8.0, 4.0, -1.0]], jnp.bfloat16)
    found = TASK.loss(logits, jnp.asarray([0]))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.log1p(np.exp(-4.0) + np.exp(-9.0)), rtol=1e-4)


def test_the_error_is_one_where_the_largest_output_is_of_another_label():
    outputs = jnp.asarray([[0.1, 0.9, 0.0], [3.0, -1.0, 2.0], [-3.0, -2.0, -1.0]])
    np.testing.assert_array_equal(TASK.error(outputs, jnp.asarray([1, 2, 2])), [0, 1, 0])


def test_a_test_pair_is_the_normalised_images_and_their_labels(examples):
    inputs, targets = TASK.test_pair(examples)
    np.testing.assert_allclose(inputs, normalised(examples[0]), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(targets, examples[1])


def test_a_training_pair_is_of_shifted_and_mirrored_images(examples):
    inputs, targets = TASK.training_pair(jax.random.key(1), examples)
    np.testing.assert_array_equal(targets, examples[1])
    pixels = np.asarray(inputs, np.float64) * STD + MEAN
    padded = np.pad(np.asarray(examples[0]), ((0, 0), (2, 2), (2, 2), (0, 0)))
    views = set()
    for image, border in zip(pixels, padded, strict=True):
        candidates = {
            (row, column, flip): border[row : row + 6, column : column + 6][:, :: -1 if flip else 1]
            for row in range(5)
            for column in range(5)
            for flip in (False, True)
        }
        matches = [at for at, view in candidates.items() if np.allclose(view, image, atol=1e-2)]
        assert len(matches) == 1
        views.update(matches)
    assert len(views) > 8
    assert {flip for *_, flip in views} == {False, True}


def test_without_padding_and_flip_a_training_pair_is_a_test_pair(examples):
    task = Classification(MEAN, STD)
    found = task.training_pair(jax.random.key(1), examples)
    for array, expected in zip(found, task.test_pair(examples), strict=True):
        np.testing.assert_array_equal(array, expected)


def test_augmentation_follows_from_the_key_alone(examples):
    first, again, other = (TASK.training_pair(jax.random.key(k), examples)[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.asarray(first) != np.asarray(other)) > 0.5
