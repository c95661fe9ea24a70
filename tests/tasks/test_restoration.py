"""Restoration: patches, losses, metrics, whole images in tiles, and tests of networks on them."""

import collections
import functools
import logging
import math
import types

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from networks import arrays, filled
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.data.photos.bicubic import bicubic
from dhp_jax.data.photos.patches import mirror_patches
from dhp_jax.data.photos.photographs import Photograph
from dhp_jax.tasks import Denoising, SuperResolution, evaluate, metrics, patches
from dhp_jax.tasks.tiling import MAX_SHAPES, OVERLAP, logger, restore, tile_for, tiling

SIZES = ((9, 12), (7, 8), (8, 6))  # in cells; a patch is 4 by 4 of them
SIDE = 4
VIEWS = {  # the eight ways to turn and mirror a square
    (turns, flip): lambda image, turns=turns, flip=flip: np.rot90(
        image[:, ::-1] if flip else image, turns
    )
    for turns in range(4)
    for flip in (False, True)
}


def coded(index, height, width, scale):
    """A photograph each pixel of which tells the photograph and its row and column."""
    rows, columns = np.indices((scale * height, scale * width))
    target = np.stack([np.full_like(rows, index), rows, columns], axis=-1).astype(np.uint8)
    low = target[: height if scale > 1 else 0, :width]
    return Photograph(f"photo{index}", target, low if scale > 1 else None)


def photographs(scale=1):
    return [coded(i, *size, scale) for i, size in enumerate(SIZES)]


@functools.cache
def drawing(task):
    """Draws a training batch, compiled."""
    return jax.jit(
        lambda key, data, *chosen: task.augmented(key, task.examples(key, data, *chosen))
    )


def batch_of(task, data, chosen, key=0):
    """A training batch as NumPy arrays."""
    inputs, targets = drawing(task)(jax.random.key(key), jax.device_put(data), jnp.asarray(chosen))
    return np.asarray(inputs), np.asarray(targets)


def places_of(photographs, side):
    """For each turned or mirrored patch, as bytes, all `(photograph, row, column, view)` of it."""
    places = collections.defaultdict(list)
    for index, photo in enumerate(photographs):
        height, width, _ = photo.target.shape
        for row in range(height - side + 1):
            for column in range(width - side + 1):
                patch = photo.target[row : row + side, column : column + side]
                for view, turn in VIEWS.items():
                    places[turn(patch).tobytes()].append((index, row, column, view))
    return places


def found_in(photographs, batch):
    """All places at which each patch of a batch is found."""
    places = places_of(photographs, batch.shape[1])
    assert np.all(batch == batch.astype(np.uint8))
    return [places[patch.astype(np.uint8).tobytes()] for patch in batch]


# Training patches


@pytest.fixture(scope="module", params=[1, 2, 3], ids="scale{}".format)
def drawn(request):
    """A scale, photographs, and a large batch of their patches with the photographs chosen."""
    scale = request.param
    photos, chosen = photographs(scale), np.random.default_rng(scale).permutation(1500)
    if scale == 1:
        task = Denoising(patch=SIDE, sigma=0.0)
    else:
        task = SuperResolution(patch=SIDE * scale, scale=scale)
    return scale, photos, chosen, *batch_of(task, patches(photos, scale), chosen)


@pytest.fixture(scope="module")
def places(drawn):
    """Where each patch of the batch is found."""
    return found_in(drawn[1], drawn[-1])


def test_every_patch_is_a_turned_or_mirrored_part_of_a_photograph(drawn, places):
    scale, _, chosen, inputs, targets = drawn
    assert targets.shape == (len(chosen), SIDE * scale, SIDE * scale, 3)
    assert inputs.shape == (len(chosen), SIDE, SIDE, 3)
    assert inputs.dtype == targets.dtype == np.float32
    assert {len(found) for found in places} == {1}


def test_photographs_are_drawn_evenly_whatever_the_number_of_examples(drawn, places):
    photos = drawn[1]
    counts = np.bincount([found[0][0] for found in places], minlength=len(photos))
    expected = len(places) / len(photos)
    assert np.all(np.abs(counts - expected) < 4 * math.sqrt(expected))


def test_every_place_of_every_photograph_occurs_in_all_eight_views_evenly(drawn, places):
    scale = drawn[0]
    found = [place for (place,) in places]
    assert {view for *_, view in found} == set(VIEWS)
    for view in VIEWS:
        assert 0.08 < np.mean([place[-1] == view for place in found]) < 0.17
    for index, (height, width) in enumerate(SIZES):
        corners = [place[1:3] for place in found if place[0] == index]
        every = [
            (scale * row, scale * column)
            for row in range(height - SIDE + 1)
            for column in range(width - SIDE + 1)
        ]
        assert set(corners) == set(every)  # on cells, first and last rows and columns included
        expected = len(corners) / len(every)
        surprise = sum((corners.count(place) - expected) ** 2 / expected for place in every)
        assert surprise < len(every) + 5 * math.sqrt(2 * len(every))  # chi-squared


def test_low_resolution_patches_lie_where_their_targets_do(drawn):
    scale, photos, _, inputs, targets = drawn
    if scale == 1:
        np.testing.assert_array_equal(inputs, targets)  # no noise was asked for
        return
    enlarged = inputs.repeat(scale, axis=1).repeat(scale, axis=2)
    np.testing.assert_array_equal(enlarged, targets // (1, scale, scale))
    np.testing.assert_array_equal(patches(photos, scale).starts, [0, 9 * 12, 9 * 12 + 7 * 8])


def test_a_photograph_as_small_as_a_patch_is_taken_whole():
    photo = Photograph("small", np.arange(16, dtype=np.uint8).reshape(4, 4, 1), None)
    _, targets = batch_of(Denoising(patch=4), patches([photo]), np.zeros(40, int))
    assert {len(found) for found in found_in([photo], targets)} == {1}
    assert len({target.tobytes() for target in targets}) == 8


def test_a_batch_follows_from_its_key_alone():
    data, chosen = patches(photographs()), np.arange(64)
    task = Denoising(patch=SIDE, sigma=3.0)
    first, again, other = (batch_of(task, data, chosen, key) for key in (1, 1, 2))
    for array, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(array, same)
        assert np.mean(array != different) > 0.4


def test_noise_is_float32_whatever_jax_is_set_to():
    with jax.enable_x64(True):
        noisy = Denoising(patch=2).degrade(jax.random.key(0), None, jnp.ones((1, 2, 2, 1), "f4"))
    assert noisy.dtype == jnp.float32


@pytest.mark.parametrize("sigma", [5.0, 70.0])
def test_noise_is_white_gaussian_of_the_sigma_asked_for_and_not_clipped(sigma):
    data, chosen = patches(photographs()), np.arange(2000)
    task = Denoising(patch=SIDE, sigma=sigma)
    noises = [np.subtract(*batch_of(task, data, chosen, key)) / sigma for key in (0, 1)]
    for noise in noises:
        n = noise.size
        assert abs(noise.mean()) < 4 / math.sqrt(n)
        assert abs(noise.std() - 1) < 4 / math.sqrt(2 * n)
        assert abs(np.mean(noise**4) - 3) < 4 * math.sqrt(96 / n)  # that of a normal distribution
        for axis in range(3):  # of examples, rows, columns: neighbours are independent
            shifted = noise * np.roll(noise, 1, axis)
            assert abs(shifted.mean()) < 4 / math.sqrt(n)
    assert abs(np.mean(noises[0] * noises[1])) < 4 / math.sqrt(noises[0].size)
    inputs, targets = batch_of(task, data, chosen)
    assert inputs.min() < -2 * sigma  # all pixels of these photographs are below 12
    assert targets.min() == 0


def test_the_three_mirrorings_give_the_eight_views():
    image = np.arange(9).reshape(1, 3, 3, 1)
    every = [
        np.asarray(mirror_patches(jnp.asarray(image), jnp.asarray(flags).reshape(3, 1, 1, 1, 1)))
        for flags in np.indices((2, 2, 2)).reshape(3, 8).T.astype(bool)
    ]
    assert {view.tobytes() for view in every} == {
        np.ascontiguousarray(turn(image[0])).astype(every[0].dtype).tobytes()
        for turn in VIEWS.values()
    }


def test_no_photographs_are_refused():
    with pytest.raises(ValueError, match=r"^photographs: expected at least one, got none$"):
        patches([])
    with pytest.raises(ValueError, match=r"^data: expected photographs to test on, got none$"):
        evaluate(nnx.Conv(1, 1, (3, 3), rngs=nnx.Rngs(0)), Denoising(16), [])


def test_more_pixels_than_indices_reach_are_refused():
    large = np.broadcast_to(np.uint8(0), (70_000, 70_000, 1))
    message = r"^photographs: expected fewer than 2\^32 pixels .* got 4,900,000,000;"
    with pytest.raises(ValueError, match=message):
        patches([Photograph("large", large, None)])


# Losses and the score of training


OUTPUTS = np.array([[[[1.0], [2.0]], [[3.0], [4.0]]], [[[0.0], [0.0]], [[0.0], [10.0]]]])
TARGETS = np.array([[[[1.0], [4.0]], [[0.0], [4.0]]], [[[0.0], [0.0]], [[0.0], [0.0]]]])
MEAN_ABSOLUTE, MEAN_SQUARED = [5 / 4, 10 / 4], [13 / 4, 100 / 4]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (SuperResolution(patch=2, scale=2), MEAN_ABSOLUTE),
        (Denoising(patch=2), MEAN_ABSOLUTE),
        (SuperResolution(patch=2, scale=2, loss_name="l2"), MEAN_SQUARED),
        (Denoising(patch=2, loss_name="l2"), MEAN_SQUARED),
    ],
)
def test_the_loss_is_the_mean_over_the_pixels_of_each_example(task, expected, dtype):
    loss = task.loss(jnp.asarray(OUTPUTS, dtype), jnp.asarray(TARGETS, jnp.float32))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "task", [SuperResolution(patch=2, scale=2), Denoising(patch=2, loss_name="l2")]
)
def test_the_loss_of_bfloat16_outputs_is_computed_in_float32(task):
    outputs = jnp.full((1, 2, 2, 1), 255, jnp.bfloat16)  # next to it are 254 and 256
    loss = task.loss(outputs, jnp.full((1, 2, 2, 1), 254.75, jnp.float32))
    assert loss == (0.25 if isinstance(task, SuperResolution) else 0.0625)


@pytest.mark.parametrize("task", [SuperResolution(patch=2, scale=2), Denoising(patch=2)])
def test_the_score_is_the_psnr_of_each_example(task):
    score = task.score(jnp.asarray(OUTPUTS, jnp.bfloat16), jnp.asarray(TARGETS, jnp.float32))
    expected = [10 * math.log10(255**2 / error) for error in MEAN_SQUARED]
    np.testing.assert_allclose(score, expected, rtol=1e-6)
    assert np.isfinite(task.score(jnp.zeros((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1))))
    assert task.metric.name == "psnr"


# Test inputs


def test_the_noise_of_a_test_image_follows_from_the_seed_and_its_index_alone():
    photo = Photograph("gray", np.full((80, 90, 1), 250, np.uint8), None)
    task, other = (Denoising(patch=8, sigma=50.0, seed=seed) for seed in (3, 4))
    first = task.test_input(photo, 5)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(
        Denoising(patch=4, sigma=50.0, seed=3).test_input(photo, 5), first
    )
    for another in (task.test_input(photo, 6), other.test_input(photo, 5)):
        correlation = np.corrcoef(first.ravel(), another.ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(first.size)
    assert abs(first.mean() - 250) < 4 * 50 / math.sqrt(first.size)
    assert abs(first.std() - 50) < 4 * 50 / math.sqrt(2 * first.size)
    assert first.max() > 300  # not clipped


def test_the_test_input_of_super_resolution_is_the_low_resolution_image():
    photo = coded(1, 5, 6, 2)
    found = SuperResolution(patch=4, scale=2).test_input(photo, 0)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, photo.degraded)


# Metrics


def picture(height, width, channels=3, seed=0):
    """A picture with structure: smooth waves and some noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))[..., None]
    waves = np.sin(rows / rng.uniform(2, 5, channels)) + np.cos(columns / rng.uniform(2, 5))
    return np.clip(128 + 50 * waves + rng.normal(0, 9, waves.shape), 0, 255).astype(np.uint8)


def blurred(image, seed=1):
    """Another picture, not far from it."""
    noise = np.random.default_rng(seed).normal(0, 12, image.shape)
    mean = (image + np.roll(image.astype(float), 1, 0)) / 2
    return np.clip(np.round(mean + noise), 0, 255).astype(np.uint8)


def luma(image):
    """Y of BT.601 by its definition: 219 steps above 16."""
    red, green, blue = np.moveaxis(image.astype(float) / 255, -1, 0)
    return (16 + 65.481 * red + 128.553 * green + 24.966 * blue)[..., None]


def psnr(x, y):
    return 10 * math.log10(255**2 / np.mean((x.astype(float) - y.astype(float)) ** 2))


def ssim(x, y):
    """Of Wang et al., 2004: windows of 11 by 11, sigma 1.5, wherever one fits in."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(image):
        views = np.lib.stride_tricks.sliding_window_view(image, (11, 11), (0, 1))
        return np.einsum("hwcij,ij->hwc", views, window)

    x, y = x.astype(float), y.astype(float)
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shave", [0, 2, 8])
@pytest.mark.parametrize("on_luminance", [False, True])
def test_psnr_and_ssim_are_those_of_their_definitions(channels, shave, on_luminance):
    target = picture(40, 33, channels)
    output = blurred(target)
    found = metrics.compare(output, target, shave=shave, on_luminance=on_luminance)
    x, y = (luma(a) if on_luminance and channels == 3 else a for a in (output, target))
    x, y = (image[shave : 40 - shave, shave : 33 - shave] for image in (x, y))
    assert found.keys() == {"psnr", "ssim"}
    assert found["psnr"] == pytest.approx(psnr(x, y), rel=1e-9)
    assert found["ssim"] == pytest.approx(ssim(x, y), rel=1e-6)
    assert 0.1 < found["ssim"] < 0.95


def test_shaved_pixels_do_not_count():
    target = picture(30, 30)
    inside = blurred(target)
    border = inside.copy()
    border[:4], border[-4:], border[:, :4], border[:, -4:] = 0, 0, 0, 0
    whole, shaved = (
        [metrics.compare(output, target, shave=shave) for output in (inside, border)]
        for shave in (0, 4)
    )
    assert shaved[0] == shaved[1]
    assert whole[0]["psnr"] > whole[1]["psnr"] + 3


@pytest.mark.parametrize(("difference", "expected"), [(1, 48.1308), (5, 34.1514), (255, 0.0)])
def test_a_constant_difference_has_the_psnr_of_its_square(difference, expected):
    target = np.zeros((16, 16, 1), np.uint8)
    found = metrics.compare(target + np.uint8(difference), target)
    assert found["psnr"] == pytest.approx(expected, abs=1e-4)


def test_equal_images_have_a_finite_psnr():
    assert metrics.compare(picture(20, 20), picture(20, 20)) == {"psnr": 100.0, "ssim": 1.0}


@pytest.mark.parametrize(
    ("color", "expected"),
    [
        ((255, 255, 255), 235.0),
        ((0, 0, 0), 16.0),
        ((255, 0, 0), 81.481),
        ((0, 255, 0), 144.553),
        ((0, 0, 255), 40.966),
        ((128, 128, 128), 125.92941),
    ],
)
def test_the_luminance_of_a_color_is_that_of_bt_601(color, expected):
    found = metrics.luminance(np.full((2, 3, 3), color, np.uint8))
    assert found.shape == (2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_stored_image_is_rounded_and_clipped():
    image = np.array([[[-3.0], [0.4], [0.6]], [[127.5], [254.7], [300.0]]], np.float32)
    np.testing.assert_array_equal(metrics.pixels(image).ravel(), [0, 0, 1, 128, 255, 255])
    assert metrics.pixels(image).dtype == np.uint8


@pytest.mark.parametrize("shape", [(19, 20, 3), (20, 20, 1), (20, 20, 3, 1)])
def test_images_of_unlike_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"^output: expected shape \(20, 20, 3\), got "):
        metrics.compare(np.zeros(shape, np.uint8), picture(20, 20))


def test_images_smaller_than_a_window_are_refused():
    small = picture(18, 30)
    metrics.compare(small, small, shave=3)
    with pytest.raises(ValueError, match=r"expected at least 19 pixels a side .* \(18, 30, 3\)$"):
        metrics.compare(small, small, shave=4)


# Whole images


def network(name, seed=0, **arguments):
    """A network of drawn values in evaluation mode, and its jitted forward pass."""
    model = filled(lambda rngs: dhp.models.build(name, rngs=rngs, **arguments), seed)
    model.eval()
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda x: nnx.merge(graphdef, state)(x))
    return model, lambda x: forward(jnp.asarray(x))


# Reach is how far a network sees; tiles that overlap by less would show a seam.
NETWORKS = {
    "dncnn": ({"depth": 4, "features": 8, "channels": 1}, 4, 1),
    "srresnet": ({"scale": 2, "blocks": 1, "features": 8, "channels": 1}, 10, 2),
    "unet": ({"depth": 2, "features": 4, "channels": 1}, 12, 1),
}


TILED = [(41, 53), *(pytest.param(size, marks=pytest.mark.slow) for size in [(40, 64), (30, 77)])]


@pytest.mark.parametrize("size", TILED)
@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_give_what_the_whole_image_gives_everywhere(name, size):
    arguments, reach, scale = NETWORKS[name]
    model, forward = network(name, **arguments)
    image = np.random.default_rng(0).normal(size=(*size, 1)).astype(np.float32)
    whole = restore(forward, image)
    overlap, multiple = tiling(model, reach)
    tiled = restore(forward, image, tile=(31, 33), overlap=overlap, multiple=multiple)
    assert tiled.shape == whole.shape == (scale * size[0], scale * size[1], 1)
    assert np.ptp(whole) > 0.1
    np.testing.assert_allclose(tiled, whole, atol=1e-4 * np.abs(whole).max(), rtol=0)
    if name == "dncnn":
        seam = restore(forward, image, tile=(31, 33), overlap=1)
        assert np.abs(seam - whole).max() > 1e-2 * np.abs(whole).max()


@settings(deadline=None, derandomize=True)
@given(
    reach=st.none() | st.integers(0, 200),
    multiple=st.none() | st.integers(1, 32),
    asked=st.none() | st.integers(0, 200),
)
def test_tiles_overlap_by_what_is_asked_for_or_the_reach_rounded_up(reach, multiple, asked):
    told = {"reach": reach, "multiple": multiple}
    model = types.SimpleNamespace(
        **{name: value for name, value in told.items() if value is not None}
    )
    found = tiling(model, asked)
    least = next(value for value in (asked, reach, OVERLAP) if value is not None)
    assert found.multiple == (multiple or 1)
    assert found.overlap % found.multiple == 0
    assert least <= found.overlap < least + found.multiple
    found.check("tile", 2 * found.overlap + 1)
    found.check("tile", None)
    with pytest.raises(ValueError, match=f"^--tile: .* {2 * found.overlap}, .*; got 0$"):
        found.check("--tile", 0)


CUTS = [  # size, tile, overlap, multiple
    ((20, 20), (9, 9), 4, 1),
    ((20, 31), (9, 12), 2, 1),
    ((50, 9), (9, 9), 4, 1),
    ((10, 50), (16, 9), 1, 1),
    ((21, 23), (12, 11), 2, 4),
    ((33, 17), (15, 13), 3, 4),
    ((10, 10), (9, 9), 0, 1),
    ((40, 41), (39, 40), 2, 2),
]


@pytest.mark.parametrize(("size", "tile", "overlap", "multiple"), CUTS)
@pytest.mark.parametrize("scale", [1, 3])
def test_every_pixel_is_taken_from_within_a_tile(size, tile, overlap, multiple, scale):
    full = [-(-side // multiple) * multiple for side in size]  # to which the image is extended
    image = np.stack(np.indices(size), -1).astype(np.float32)  # a pixel tells where it is
    shapes = set()

    def forward(x):
        """Spoils what lies near a side of the piece that is not a side of the image."""
        shapes.add(x.shape[1:3])
        rows, columns = (np.arange(n) for n in x.shape[1:3])
        top, left = x[0, 0, 0]
        bottom, right = top + len(rows), left + len(columns)
        assert top % multiple == left % multiple == 0
        near = np.zeros(x.shape[1:3], bool)
        near |= ((rows < overlap) & (top > 0))[:, None]
        near |= ((rows >= len(rows) - overlap) & (bottom < full[0]))[:, None]
        near |= (columns < overlap) & (left > 0)
        near |= (columns >= len(columns) - overlap) & (right < full[1])
        return np.where(near[..., None], np.nan, x).repeat(scale, 1).repeat(scale, 2)

    found = restore(forward, image, tile=tile, overlap=overlap, multiple=multiple)
    np.testing.assert_array_equal(found, image.repeat(scale, 0).repeat(scale, 1))
    sides = [-(-side // multiple) * multiple for side in tile]
    assert shapes == {(min(sides[0], full[0]), min(sides[1], full[1]))}  # one compilation


@pytest.mark.parametrize("tile", [None, (20, 30), (99, 99)])
def test_an_image_that_is_no_larger_than_a_tile_is_run_whole(tile):
    shapes = []
    image = np.ones((20, 30, 1), np.float32)
    restore(lambda x: shapes.append(x.shape) or x, image, tile=tile, overlap=40)
    assert shapes == [(1, 20, 30, 1)]


@pytest.mark.parametrize(
    ("tile", "overlap", "multiple", "message"),
    [
        ((8, 9), 4, 1, r"^tile: expected sides of more than 8, got \(8, 9\)$"),
        ((20, 4), 2, 1, r"^tile: expected sides of more than 4, got \(20, 4\)$"),
        ((7, 7), 3, 4, r"^tile: expected sides of more than 8, got \(8, 8\)$"),
    ],
)
def test_a_tile_that_its_overlap_uses_up_is_refused(tile, overlap, multiple, message):
    with pytest.raises(ValueError, match=message):
        restore(lambda x: x, np.ones((30, 30, 1)), tile=tile, overlap=overlap, multiple=multiple)


SHAPES = [(200 + i, 300 - i) for i in range(MAX_SHAPES + 1)]


@pytest.mark.parametrize(
    ("shapes", "overlap", "tile", "warned"),
    [
        (SHAPES[:-1], 48, None, False),
        (5 * SHAPES[:-1], 48, None, False),
        (SHAPES, 48, (200, 284), False),
        (SHAPES, 66, (200, 284), False),
        (SHAPES, 67, (202, 284), False),  # 200 and 201 rows are not cut
        ([(40 + i % 2, 300 + i) for i in range(17)], 48, (145, 300), False),  # no rows are
        (SHAPES, 80, None, True),  # to cut columns would leave as many
        (SHAPES, 100, None, True),
        ([(30, 40), *SHAPES], 48, (200, 284), False),
        ([(side, side) for side in range(20, 100)], 48, None, True),
    ],
)
def test_many_shapes_are_cut_into_tiles_of_the_smallest_sides(
    caplog, shapes, overlap, tile, warned
):
    with caplog.at_level(logging.WARNING):
        assert tile_for(shapes, overlap) == tile
    assert len(caplog.messages) == warned


@settings(deadline=None, derandomize=True)
@given(
    shapes=st.sets(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=10, max_size=40),
    overlap=st.integers(0, 12),
    multiple=st.sampled_from([1, 4]),
    side=st.none() | st.integers(33, 50),
)
def test_as_many_shapes_are_run_as_is_told(shapes, overlap, multiple, side):
    overlap, run = multiple * -(-overlap // multiple), set()
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "warning", lambda text, count, *_: told.append(count))
        tile = tile_for(shapes, overlap, multiple, side)
    for shape in shapes:
        image = np.zeros((*shape, 1), np.float32)
        restore(
            lambda x: run.add(x.shape) or x, image, tile=tile, overlap=overlap, multiple=multiple
        )
    assert told == ([len(run)] if len(run) > MAX_SHAPES else [])
    assert side or len(run) <= len(shapes)
    if side is None and len(shapes) <= MAX_SHAPES:
        assert tile is None
    if side is None and min(map(min, shapes)) > 3 * overlap and len(shapes) > MAX_SHAPES:
        assert len(run) <= 2  # a tile of the smallest sides, and an image of just its size


@pytest.mark.parametrize(
    "odd",
    [(20, 70), (24, 24), *(pytest.param(s, marks=pytest.mark.slow) for s in [(70, 20), (20, 21)])],
)
def test_images_of_many_shapes_and_small_ones_among_them_share_compilations(odd):
    sizes = [odd, *((30 + i, 50 - i) for i in range(MAX_SHAPES + 1))]
    data = [Photograph(str(i), picture(*size, 1, i), None) for i, size in enumerate(sizes)]
    model, forward = network("dncnn", depth=3, features=4, channels=1)
    shapes, task = [], Denoising(patch=8, overlap=8, sigma=20.0)
    model = Counted(model, shapes)
    assert 0 < evaluate(model, task, data)["psnr"] < 100
    for i, (_, images) in enumerate(task.pictures(model, data, 2)):
        expected = metrics.pixels(np.asarray(forward(task.test_input(data[i], i)[None])[0]))
        np.testing.assert_allclose(images["output"].astype(int), expected, atol=1)
    assert len(shapes) == 2


# Tests of networks


class Counted(nnx.Module):
    """A network that tells the shapes that it is traced for."""

    def __init__(self, net, shapes):
        self.net, self.note = net, shapes.append

    def __call__(self, x):
        self.note(x.shape)
        return self.net(x)


def state_of(model):
    _, latents, weights, rest = nnx.split(model, dhp.LatentVector, nnx.Param, ...)
    return (latents, weights), rest


def by_hand(forward, inputs, targets, *, shave=0, on_luminance=False):
    """Mean PSNR and SSIM of whole images, run one by one."""
    measured = []
    for image, target in zip(inputs, targets, strict=True):
        output = np.clip(np.round(np.asarray(forward(image[None])[0])), 0, 255)
        if on_luminance:
            output, target = luma(output), luma(target)
        cut = [slice(shave, side - shave) for side in target.shape[:2]]
        output, target = output[*cut], target[*cut]
        measured.append((psnr(output, target), ssim(output, target)))
    return dict(zip(("psnr", "ssim"), np.mean(measured, axis=0), strict=True))


@pytest.mark.parametrize("shave", [0, 1, 3])
def test_a_test_of_denoising_shaves_what_it_is_told(shave):
    data = [Photograph(str(i), picture(*s, 1, i), None) for i, s in enumerate([(24, 30), (21, 26)])]
    noise = [np.random.default_rng((0, i)).normal(size=p.target.shape) for i, p in enumerate(data)]
    pairs = [
        (p.target + 20 * n.astype(np.float64), p.target) for p, n in zip(data, noise, strict=True)
    ]
    inside = (slice(shave, -shave), slice(shave, -shave)) if shave else ()
    expected = np.mean([psnr(x[inside], target[inside]) for x, target in pairs])
    found = Denoising(patch=8, sigma=20.0, shave=shave).without_network(data)["psnr"]
    assert found == pytest.approx(expected, rel=1e-6)
    other = Denoising(patch=8, sigma=20.0, shave=shave + 2).without_network(data)["psnr"]
    assert found != pytest.approx(other, rel=1e-4)


def test_a_test_of_denoising_shaves_one_pixel_as_papers_do():
    assert Denoising(patch=8).shave == 1


def test_a_test_of_denoising_is_the_mean_over_whole_images_and_compiles_once_a_shape():
    sizes = [(24, 30), (21, 26), (24, 30)]
    data = [Photograph(str(i), picture(*s, 1, i), None) for i, s in enumerate(sizes)]
    task = Denoising(patch=8, sigma=20.0, seed=7, shave=0)
    model, forward = network("dncnn", depth=3, features=4, channels=1)
    model.train()
    shapes, before = [], arrays(model)
    run = task.evaluation(Counted(model, shapes), data, batch_size=99)
    found = run(*state_of(Counted(model, shapes)))
    noisy = [
        photo.target + 20 * np.random.default_rng((7, i)).normal(size=photo.target.shape)
        for i, photo in enumerate(data)
    ]
    noisy = [image.astype(np.float32) for image in noisy]
    targets = [photo.target for photo in data]
    assert found == pytest.approx(by_hand(forward, noisy, targets), rel=1e-4)
    other, forward = network("dncnn", depth=3, features=4, channels=1, seed=1)
    again = run(*state_of(Counted(other, shapes)))
    assert again == pytest.approx(by_hand(forward, noisy, targets), rel=1e-4)
    assert again["psnr"] != pytest.approx(found["psnr"], rel=1e-2)
    assert sorted(shapes) == [(1, 21, 26, 1), (1, 24, 30, 1)]
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    pairs = [(x.astype(np.float64), target) for x, target in zip(noisy, targets, strict=True)]
    measured = task.without_network(data)  # of the noise as it is, neither rounded nor clipped
    assert measured["psnr"] == pytest.approx(np.mean([psnr(*pair) for pair in pairs]), rel=1e-6)
    assert measured["ssim"] == pytest.approx(np.mean([ssim(*pair) for pair in pairs]), rel=1e-6)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_test_of_an_output_that_is_not_finite_is_none(number):
    class Faulty(nnx.Module):
        def __call__(self, x):
            return x.at[0, 12, 12].set(number)

    found = evaluate(Faulty(), Denoising(patch=8), [Photograph("a", picture(24, 30, 1), None)])
    assert np.isnan([found["psnr"], found["ssim"]]).all()


@pytest.mark.parametrize(("on_luminance", "shave"), [(True, 2), (False, 8)])
def test_a_test_of_super_resolution_shaves_as_papers_do(on_luminance, shave):
    targets = [picture(32, 40, 3, 0), picture(30, 28, 3, 1)]
    data = [Photograph(str(i), t, bicubic(t, 0.5)) for i, t in enumerate(targets)]
    task = SuperResolution(patch=8, scale=2, on_luminance=on_luminance)
    model, forward = network("srresnet", scale=2, blocks=1, features=4)
    lows = [photo.degraded.astype(np.float32) for photo in data]
    settings = {"shave": shave, "on_luminance": on_luminance}
    expected = by_hand(forward, lows, targets, **settings)
    assert evaluate(model, task, data) == pytest.approx(expected, rel=1e-4)

    def enlarge(x):
        return bicubic(x[0].astype(np.uint8), 2)[None]

    untouched = by_hand(enlarge, lows, targets, **settings)
    assert task.without_network(data) == pytest.approx(untouched, rel=1e-6)
    assert untouched["psnr"] > 15


def test_a_tile_that_is_asked_for_cuts_test_images_without_changing_the_result():
    data = [Photograph("a", picture(40, 52, 1), None)]
    model, _ = network("dncnn", depth=3, features=4, channels=1)
    shapes = []
    whole, tiled = (
        evaluate(Counted(model, shapes), Denoising(patch=8, tile=tile, overlap=4), data)
        for tile in (None, 24)
    )
    assert shapes == [(1, 40, 52, 1), (1, 24, 24, 1)]
    assert tiled == pytest.approx(whole, rel=1e-4)


def test_a_test_image_too_small_to_compare_is_refused_before_any_work():
    data = [Photograph("a", picture(40, 40), None), Photograph("b", picture(40, 26), None)]
    model, _ = network("dncnn", depth=3, features=4, channels=3)
    task = SuperResolution(patch=8, scale=2, on_luminance=False)
    with pytest.raises(ValueError, match=r"at least 27 pixels a side .* \(40, 26, 3\)$"):
        task.evaluation(model, data, batch_size=1)


@pytest.mark.parametrize("count", [3, MAX_SHAPES + 1])
def test_pictures_need_no_compilation_beyond_those_of_the_test(count):
    targets = [picture(30 + i, 40 - i, 1, i) for i in range(count)]
    data = [Photograph(str(i), target, None) for i, target in enumerate(targets)]
    model, _ = network("dncnn", depth=3, features=4, channels=1)
    shapes, task = [], Denoising(patch=8, overlap=6)
    model = Counted(model, shapes)
    model.listed = [1, 2]  # an attribute that has no hash
    evaluate(model, task, data)
    tested = list(shapes)
    graphdef, state = nnx.split(model)
    assert len(task.pictures(nnx.merge(graphdef, state, copy=True), data, 2)) == 2
    assert shapes == tested
    assert len(tested) == (count if count <= MAX_SHAPES else 1)


def test_pictures_are_the_input_the_output_and_the_target_of_the_first_test_images():
    targets = [picture(24, 20 + 2 * i, 3, i) for i in range(3)]
    data = [Photograph(f"p{i}", t, bicubic(t, 0.5)) for i, t in enumerate(targets)]
    model, forward = network("srresnet", scale=2, blocks=1, features=4)
    found = SuperResolution(patch=8, scale=2).pictures(model, data, 2)
    assert [name for name, _ in found] == ["p0", "p1"]
    for photo, (_, images) in zip(data, found, strict=False):
        assert [*images] == ["input", "output", "target"]
        assert all(image.dtype == np.uint8 for image in images.values())
        output = metrics.pixels(np.asarray(forward(photo.degraded[None].astype(np.float32))[0]))
        np.testing.assert_allclose(images["output"].astype(int), output, atol=1)
        np.testing.assert_array_equal(images["input"], bicubic(photo.degraded, 2))
        np.testing.assert_array_equal(images["target"], photo.target)


@pytest.mark.parametrize(("loss", "of"), [("l1", np.abs), ("l2", np.square)])
def test_images_are_compared_with_those_of_a_teacher_by_the_loss_of_the_task(loss, of):
    outputs, taught = np.random.default_rng(0).normal(100, 30, (2, 3, 8, 8, 1)).astype(np.float32)
    task = Denoising(patch=8, loss_name=loss)
    found = task.distillation(jnp.asarray(outputs), jnp.asarray(taught), 4.0)
    np.testing.assert_allclose(found, of(outputs - taught).mean((1, 2, 3)), rtol=1e-5)
