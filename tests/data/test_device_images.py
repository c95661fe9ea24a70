"""Images as rows: taken like the images themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhp_jax.data.device_images import Rows
from dhp_jax.tasks import Classification

SHAPES = [(8, 8, 1), (5, 3, 3), (4,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_images_are_taken_from_rows_as_they_were(shape):
    images = np.random.default_rng(0).integers(0, 256, (7, *shape), np.uint8)
    rows, chosen = Rows.of(images), np.array([3, 0, 3])
    assert len(rows) == 7
    assert np.shares_memory(rows.pixels, images)
    np.testing.assert_array_equal(rows[chosen], images[chosen])
    taken = jax.jit(lambda rows, chosen: rows[chosen])(jax.device_put(rows), jnp.asarray(chosen))
    assert taken.dtype == jnp.uint8
    np.testing.assert_array_equal(taken, images[chosen])
    assert jax.tree.map(jnp.copy, rows).image_shape == shape


def test_a_step_sees_the_same_examples_of_rows_and_of_images():
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (9, 6, 6, 3), np.uint8)
    labels = random.integers(0, 4, 9, np.int32)
    task = Classification((125.0,) * 3, (63.0,) * 3, crop_padding=2, flip=True)

    @jax.jit
    def augmented(images, labels):
        key, chosen = jax.random.key(0), jnp.array([8, 1, 1, 5])
        return task.augmented(key, task.examples(key, (images, labels), chosen))

    for a, b in zip(augmented(Rows.of(images), labels), augmented(images, labels), strict=True):
        np.testing.assert_array_equal(a, b)
