"""Classification: labelled images, cross-entropy, and the share of wrong labels."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
from dataclasses import dataclass
import functools
from typing import ClassVar, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8
import numpy as np
import optax

from dhp_jax.backend.inference import tune
from dhp_jax.backend.platform import compiler_options
from dhp_jax.data.augmentation import augment, blend, cut_out, normalize
from dhp_jax.data.device_images import Rows
from dhp_jax.data.stream import Stream
from dhp_jax.errors import ArgumentError
from dhp_jax.tasks.task import METRICS, Evaluation, Metric, Params

CUTOUT, MIXUP = 0x637574, 0x6D6978  # tell their keys from those of crops and flips
Images = tuple[UInt8[Array, "n h w c"] | Rows, Int[Array, " n"]]  # with their labels


class Blended(NamedTuple):
    """Labels of images that are blends of two, `share` of the first and the rest of the second."""

    first: Int[Array, " n"]
    second: Int[Array, " n"]
    share: Float[Array, " n"]


Labels = Int[Array, " n"] | Blended


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of labelled images; the error is the share of wrong labels.

    Attributes:
      mean, std: of each channel of the raw images.
      crop_padding: pixels of zero padding around an image before a random crop of its size.
      flip: whether images are flipped left to right at random.
      cutout: side of a square of each image that is set to the mean colour; 0 for none.
      mixup: parameter of the Beta distribution of shares in which images are blended; 0 for none.
      label_smoothing: share of the training targets that is spread evenly over all classes.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0
    mixup: float = 0.0
    label_smoothing: float = 0.0
    metric: ClassVar[Metric] = METRICS["error"]

    def examples(self, key: Key[Array, ""], data: Images, chosen: Int[Array, " n"]) -> Images:
        del key
        images, labels = (array[chosen] for array in data)
        return images, labels

    def augmented(
        self, key: Key[Array, ""], examples: Images
    ) -> tuple[Float[Array, "n h w c"], Labels]:
        images, labels = examples
        images = augment(key, images, crop_padding=self.crop_padding, flip=self.flip)
        images = normalize(images, self.mean, self.std)
        if self.cutout:
            images = cut_out(jax.random.fold_in(key, CUTOUT), images, self.cutout)
        if self.mixup:
            images, share = blend(jax.random.fold_in(key, MIXUP), images, self.mixup)
            labels = Blended(labels, labels[::-1], share)
        return images, labels

    def loss(self, outputs: Float[Array, "n classes"], targets: Labels) -> Float[Array, " n"]:
        def of(labels: Int[Array, " n"]) -> Float[Array, " n"]:
            return _cross_entropy(outputs, labels, self.label_smoothing)

        if not isinstance(targets, Blended):
            return of(targets)
        return targets.share * of(targets.first) + (1 - targets.share) * of(targets.second)

    def distillation(
        self, outputs: Float[Array, "n classes"], taught: Float[Array, "n classes"], temperature
    ) -> Float[Array, " n"]:
        return distillation_loss(outputs, taught, temperature)

    def score(self, outputs: Float[Array, "n classes"], targets: Labels) -> Float[Array, " n"]:
        if isinstance(targets, Blended):
            targets = jnp.where(targets.share < 0.5, targets.second, targets.first)
        return (jnp.argmax(outputs, axis=-1) != targets).astype(jnp.float32)

    def check(self, model: nnx.Module) -> None:
        pass

    def evaluation(
        self, model: nnx.Module, data: Images | Stream, *, batch_size: int
    ) -> Evaluation:
        model = nnx.clone(model)
        model.eval()
        graphdef = nnx.graphdef(model)
        size, labels = (data.size,) * 2 if isinstance(data, Stream) else map(len, data)
        if not size:
            raise ArgumentError("data", "images to test on", "none")
        if labels != size:
            raise ArgumentError("data", f"a label for each of {size} images", f"{labels} labels")
        data = data if isinstance(data, Stream) else jax.device_put(data)
        batch_size = min(batch_size, size)

        @functools.partial(jax.jit, compiler_options=compiler_options())
        def add(sums: Array, params: Params, rest: nnx.State, data: Images, start, end) -> Array:
            chosen = start + jnp.arange(batch_size)
            images, labels = (array[jnp.minimum(chosen, end - 1)] for array in data)
            model = tune(nnx.merge(graphdef, *params, rest))
            outputs = model(normalize(images, self.mean, self.std))
            measured = _cross_entropy(outputs, labels), self.score(outputs, labels)
            return sums + jnp.stack([jnp.sum(values, where=chosen < end) for values in measured])

        def run(params: Params, rest: nnx.State) -> dict[str, float]:
            sums = jnp.zeros(2)
            with _batches(data, batch_size) as batches:
                for images, start, end in batches:
                    sums = add(sums, params, rest, images, start, end)
            loss, error = (float(total) / size for total in jax.device_get(sums))
            return {"loss": loss, "error": error}

        return run

    def without_network(self, data: Images) -> dict[str, float]:
        return {}

    def pictures(
        self, model: nnx.Module, data: Images, count: int
    ) -> Sequence[tuple[str, Mapping[str, np.ndarray]]]:
        return []


def distillation_loss(
    outputs: Float[Array, "n classes"], taught: Float[Array, "n classes"], temperature: float
) -> Float[Array, " n"]:
    """`T^2 KL(softmax(taught / T) | softmax(outputs / T))` of each example, of logits.

    The larger `T`, the temperature, the more the unlikely classes count.

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network (arXiv
    1503.02531), section 2.
    """
    learnt, target = (x.astype(jnp.float32) / temperature for x in (outputs, taught))
    apart = optax.kl_divergence(jax.nn.log_softmax(learnt), jax.nn.softmax(target))
    return temperature**2 * apart


def _cross_entropy(
    outputs: Float[Array, "n classes"], labels: Int[Array, " n"], smoothing: float = 0.0
) -> Float[Array, " n"]:
    """The cross-entropy of labels of which a share is spread evenly over all classes."""
    logits = outputs.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return loss
    of_all = jax.nn.logsumexp(logits, -1) - jnp.mean(logits, -1)
    return (1 - smoothing) * loss + smoothing * of_all


@contextlib.contextmanager
def _batches(data: Images | Stream, batch_size: int) -> Iterator[Iterator[tuple[Images, int, int]]]:
    """Arrays of images, and where in them each batch begins and ends; the last may be smaller."""
    if isinstance(data, Stream):
        with data.in_order(batch_size) as batches:
            yield ((images, 0, count) for images, count in batches)
    else:
        size = len(data[0])
        starts = range(0, size, batch_size)
        yield ((data, start, size) for start in starts)
