"""Classification: its losses, its errors, and what is augmented; metrics for people."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhp_jax.data.augmentation import blend, cut_out
from dhp_jax.tasks import METRICS, Classification, evaluate
from dhp_jax.tasks.classification import Blended

MEAN, STD = (100.0, 50.0, 20.0), (10.0, 5.0, 2.0)
TASK = Classification(MEAN, STD, crop_padding=2, flip=True)
ALL = jnp.arange(16)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (16, 6, 6, 3), np.uint8)  # no zero: only the border is black
    return jnp.asarray(images), jnp.asarray(rng.integers(0, 5, 16))


def batch_of(task, examples, chosen=ALL, key=1):
    key = jax.random.key(key)
    return task.augmented(key, task.examples(key, examples, jnp.asarray(chosen)))


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
    np.testing.assert_array_equal(TASK.score(outputs, jnp.asarray([1, 2, 2])), [0, 1, 0])


class Seen(nnx.Module):
    """Gives back the first five pixels of what it is given, however it is called."""

    def __call__(self, x):
        return x.reshape(len(x), -1)[:, :5]


@pytest.mark.parametrize("batch_size", [3, 16])
def test_a_test_is_of_the_normalised_images_and_their_labels(examples, batch_size):
    found = evaluate(Seen(), TASK, examples, batch_size=batch_size)
    logits, labels = normalised(examples[0]).reshape(16, -1)[:, :5], np.asarray(examples[1])
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(16), labels]
    wrong = np.argmax(logits, -1) != labels
    assert found == pytest.approx({"loss": losses.mean(), "error": wrong.mean()}, rel=1e-5)


@pytest.mark.parametrize(
    ("kept", "labelled", "batch_size", "message"),
    [
        (0, 0, 4, "data: expected images to test on, got none"),
        (16, 15, 4, "data: expected a label for each of 16 images, got 15 labels"),
        (16, 16, 0, "batch_size: expected a positive integer, got 0"),
        (16, 16, -1, "batch_size: expected a positive integer, got -1"),
    ],
)
def test_a_test_of_nothing_is_refused(examples, kept, labelled, batch_size, message):
    images, labels = examples
    with pytest.raises(ValueError, match=f"^{message}$"):
        evaluate(Seen(), TASK, (images[:kept], labels[:labelled]), batch_size=batch_size)


def test_a_training_batch_is_of_shifted_and_mirrored_images(examples):
    inputs, targets = batch_of(TASK, examples)
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


def test_without_padding_and_flip_a_training_batch_is_the_normalised_images(examples):
    inputs, targets = batch_of(Classification(MEAN, STD), examples)
    np.testing.assert_allclose(inputs, normalised(examples[0]), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(targets, examples[1])


def test_a_training_batch_is_of_the_chosen_examples_in_their_order(examples):
    chosen = np.asarray([7, 2, 7, 0])
    task = Classification(MEAN, STD)
    inputs, targets = batch_of(task, examples, chosen)
    expected = normalised(np.asarray(examples[0])[chosen])
    np.testing.assert_allclose(inputs, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(targets, np.asarray(examples[1])[chosen])


def test_augmentation_follows_from_the_key_alone(examples):
    first, again, other = (batch_of(TASK, examples, key=k)[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.asarray(first) != np.asarray(other)) > 0.5


# Metrics


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("error", 0.08464, "8.46 %"),
        ("psnr", 24.927, "24.93 dB"),
        ("ssim", 0.65124, "0.6512"),
        ("loss", 1.5, "1.5000"),
    ],
)
def test_a_metric_is_shown_in_the_unit_that_people_read(name, value, shown):
    assert METRICS[name].name == name
    assert METRICS[name].text(value) == shown


@pytest.mark.parametrize(("name", "higher"), [("error", 0), ("loss", 0), ("psnr", 1), ("ssim", 1)])
def test_a_better_value_is_higher_or_lower_and_better_than_none(name, higher):
    better = METRICS[name].better
    assert better(0.2, 0.1) == bool(higher)
    assert better(0.1, 0.2) != bool(higher)
    assert not better(0.1, 0.1)
    assert better(0.1, None)


def log_probabilities(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_a_smoothed_loss_has_a_share_of_every_class_and_tests_have_none(examples):
    task = Classification(MEAN, STD, label_smoothing=0.3)
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(8, 5)).astype(np.float32), rng.integers(0, 5, 8)
    targets = 0.7 * np.eye(5)[labels] + 0.3 / 5
    expected = -(targets * log_probabilities(logits)).sum(-1)
    np.testing.assert_allclose(task.loss(jnp.asarray(logits), jnp.asarray(labels)), expected, 1e-5)
    assert evaluate(Seen(), task, examples) == evaluate(Seen(), TASK, examples)


def test_blended_images_have_the_blended_loss_and_the_error_of_the_larger_share():
    task = Classification(MEAN, STD, label_smoothing=0.1)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 5)).astype(np.float32)
    first, second = rng.integers(0, 5, (2, 6))
    share = np.asarray([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], np.float32)
    targets = share[:, None] * np.eye(5)[first] + (1 - share[:, None]) * np.eye(5)[second]
    expected = -((0.9 * targets + 0.1 / 5) * log_probabilities(logits)).sum(-1)
    blended = Blended(*map(jnp.asarray, (first, second, share)))
    np.testing.assert_allclose(task.loss(jnp.asarray(logits), blended), expected, rtol=1e-5)
    wrong = logits.argmax(-1) != np.where(share < 0.5, second, first)
    np.testing.assert_array_equal(task.score(jnp.asarray(logits), blended), wrong)


@pytest.mark.parametrize("side", [1, 4, 5, 40])
def test_a_square_of_every_image_is_cut_out(side):
    images = np.asarray(cut_out(jax.random.key(0), jnp.ones((300, 8, 6, 2)), side))
    centres = set()
    for image in images:
        gone = image[..., 0] == 0
        np.testing.assert_array_equal(image[..., 0], image[..., 1])
        rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
        assert gone.sum() == len(rows) * len(columns) > 0
        assert np.all(np.diff(rows) == 1)
        assert np.all(np.diff(columns) == 1)
        assert len(rows) <= side
        inside = rows[0] > 0 and rows[-1] < 7
        assert len(rows) == side or not inside
        centres.add((rows[0], rows[-1], columns[0], columns[-1]))
    assert len(centres) == (1 if side == 40 else 48)  # any pixel may be the centre


def test_images_are_blended_with_others_of_the_batch_in_one_share_of_the_beta_distribution():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, 3, 2)), jnp.float32)
    shares = []
    for seed in range(200):
        blended, share = blend(jax.random.key(seed), images, 0.4)
        assert len(set(share.tolist())) == 1
        shares.append(float(share[0]))
    expected = shares[-1] * images + (1 - shares[-1]) * images[::-1]
    np.testing.assert_allclose(blended, expected, rtol=1e-6)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.1)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.2)  # of Beta(a, a)


def test_training_batches_are_cut_out_and_blended_and_plain_ones_stay(examples):
    inputs, labels = batch_of(TASK, examples)
    strong = Classification(MEAN, STD, crop_padding=2, flip=True, cutout=2, mixup=0.5)
    blended, targets = batch_of(strong, examples)
    np.testing.assert_array_equal(targets.first, labels)
    np.testing.assert_array_equal(targets.second, labels[::-1])
    share = np.asarray(targets.share)[:, None, None, None]
    whole = share * inputs + (1 - share) * inputs[::-1]
    same = np.isclose(blended, whole, rtol=1e-5, atol=1e-5).all(-1)
    cut = 1 - same.mean((1, 2))
    assert np.all(cut > 0)
    assert np.all(cut <= 8 / 36)  # two squares of 4 pixels
