"""Bicubic resizing: against a pixel-by-pixel computation, and what holds for every image."""

from fractions import Fraction
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from dhp_jax.data.photos.bicubic import bicubic

SCALES = (Fraction(1, 4), Fraction(1, 3), Fraction(2, 3), Fraction(3, 2), 4)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def kernel(x):
    x = abs(x)
    if x < 1:
        return (3 * x**3 - 5 * x**2 + 2) / 2
    return (-(x**3) + 5 * x**2 - 8 * x + 4) / 2 if x < 2 else 0


def resize_line(line, scale):
    """One line of pixels, an output and an input pixel at a time, without rounding errors."""
    stretch = max(1, 1 / scale)
    mirrored = [*line[::-1], *line, *line[::-1]]
    resized = []
    for out in range(math.ceil(scale * len(line))):
        centre = (out + Fraction(1, 2)) / scale - Fraction(1, 2)
        weights = [kernel((centre - i) / stretch) for i in range(-len(line), 2 * len(line))]
        value = sum(w * int(p) for w, p in zip(weights, mirrored, strict=True) if w) / sum(weights)
        resized.append(math.floor(min(max(value, 0), 255) + Fraction(1, 2)))
    return resized


def resize_plane(plane, scale):
    rows = np.array([resize_line(column, scale) for column in plane.T]).T
    return np.array([resize_line(row, scale) for row in rows])


@pytest.mark.parametrize("scale", SCALES)
def test_bicubic_equals_a_computation_pixel_by_pixel(scale):
    image = noise(15, 10, 2)
    resized = bicubic(image, scale)
    assert resized.dtype == np.uint8
    for channel in range(2):
        expected = resize_plane(image[..., channel], Fraction(scale))
        np.testing.assert_array_equal(resized[..., channel], expected)


def test_an_impulse_is_halved_with_the_weights_of_the_antialiased_kernel():
    image = np.full((16, 2, 1), 128, np.uint8)
    image[7] = 255
    expected = 128 + 127 * np.array([-9, 111, 29, -3]) / 256
    np.testing.assert_array_equal(bicubic(image, 0.5)[2:6, 0, 0], np.rint(expected))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_a_constant_image_stays_constant(scale, value):
    assert (bicubic(np.full((9, 14, 3), value, np.uint8), scale) == value).all()


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_scale_1_changes_nothing(height, width, seed):
    image = noise(height, width, 3, seed=seed)
    np.testing.assert_array_equal(bicubic(image, 1.0), image)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [0.25, 0.5, 4])
def test_a_mirrored_image_gives_the_mirrored_result(scale, axis):
    image = noise(24, 16, 3)
    np.testing.assert_array_equal(
        bicubic(np.flip(image, axis), scale), np.flip(bicubic(image, scale), axis)
    )


def test_a_transposed_image_gives_the_transposed_result_up_to_rounding_in_between():
    image = noise(24, 16, 3)
    transposed = bicubic(image.swapaxes(0, 1), 0.25).swapaxes(0, 1)
    assert np.abs(transposed.astype(int) - bicubic(image, 0.25)).max() <= 1


@pytest.mark.parametrize(("scale", "border"), [(Fraction(1, 4), 2), (Fraction(1, 2), 2), (4, 8)])
def test_a_linear_ramp_stays_linear_away_from_the_border(scale, border):
    ramp = np.tile(np.arange(40, 104, dtype=np.uint8)[:, np.newaxis, np.newaxis], (1, 8, 1))
    resized = bicubic(ramp, scale)[:, 0, 0]
    expected = 40 + (np.arange(len(resized)) + 0.5) / float(scale) - 0.5
    np.testing.assert_array_equal(resized[border:-border], np.floor(expected[border:-border] + 0.5))


@pytest.mark.parametrize(
    ("scale", "size", "expected"),
    [(0.25, 9, 3), (1 / 3, 9, 3), (0.1, 30, 3), (4, 5, 20), (0.3, 1, 1)],
)
def test_output_size_is_the_ceiling_of_scale_times_size(scale, size, expected):
    assert bicubic(noise(size, 2, 1), scale).shape[0] == expected


def test_overshoot_is_clipped_and_does_not_wrap_around():
    step = np.zeros((16, 16, 1), np.uint8)
    step[8:] = 255
    resized = bicubic(step, 4)[:, 0, 0].astype(int)
    assert (resized[:24] == 0).all()
    assert (resized[40:] == 255).all()
    assert (np.diff(resized) >= 0).all()


@pytest.mark.parametrize(
    ("image", "scale", "message"),
    [
        (noise(8, 8), 0.5, r"image: expected a uint8 array \(h, w, c\); got uint8 .*\(8, 8\)"),
        (np.ones((8, 8, 3)), 0.5, "image: .* got float64"),
        (noise(0, 8, 3), 0.5, "image: .* got uint8 of shape"),
        (noise(8, 8, 3), 0, "scale: expected .* got 0"),
        (noise(8, 8, 3), -1, "scale: expected .* got -1"),
        (noise(8, 8, 3), math.inf, "scale: expected .* got inf"),
        (noise(8, 8, 3), math.nan, "scale: expected .* got nan"),
    ],
)
def test_bad_arguments_are_refused(image, scale, message):
    with pytest.raises(ValueError, match=message):
        bicubic(image, scale)
