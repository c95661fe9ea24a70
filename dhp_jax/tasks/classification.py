"""Classification: labelled images, cross-entropy, the share of wrong labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import functools
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8
import numpy as np
import optax

from dhp_jax.backend import compiler_options, tune
from dhp_jax.data.augment import augment, normalize
from dhp_jax.tasks.task import METRICS, Evaluation, Metric, Params

Examples = tuple[UInt8[Array, "n h w c"], Int[Array, " n"]]


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of labelled images; the error is the share of wrong labels.

    Attributes:
      mean, std: of each channel of the raw images.
      crop_padding: pixels of zero padding around an image before a random crop of its size.
      flip: whether images are flipped left to right at random.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    metric: ClassVar[Metric] = METRICS["error"]
    initial_gain: ClassVar[float] = 2.0

    def training_batch(
        self, key: Key[Array, ""], data: Examples, chosen: Int[Array, " n"]
    ) -> tuple[Float[Array, "n h w c"], Int[Array, " n"]]:
        images, labels = (array[chosen] for array in data)
        images = augment(key, images, crop_padding=self.crop_padding, flip=self.flip)
        return normalize(images, self.mean, self.std), labels

    def loss(
        self, outputs: Float[Array, "n classes"], targets: Int[Array, " n"]
    ) -> Float[Array, " n"]:
        logits = outputs.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    def score(
        self, outputs: Float[Array, "n classes"], targets: Int[Array, " n"]
    ) -> Float[Array, " n"]:
        return (jnp.argmax(outputs, axis=-1) != targets).astype(jnp.float32)

    def check(self, model: nnx.Module) -> None:
        pass

    def evaluation(self, model: nnx.Module, data: Examples, *, batch_size: int) -> Evaluation:
        model = nnx.clone(model)
        model.eval()
        graphdef = nnx.graphdef(model)
        examples = len(data[0])
        batch_size = min(batch_size, examples)

        @functools.partial(jax.jit, compiler_options=compiler_options())
        def add(sums: Array, params: Params, rest: nnx.State, data: Examples, start) -> Array:
            chosen = start + jnp.arange(batch_size)
            counted = chosen < examples
            images, labels = (array[jnp.minimum(chosen, examples - 1)] for array in data)
            model = tune(nnx.merge(graphdef, *params, rest))
            outputs = model(normalize(images, self.mean, self.std))
            measured = self.loss(outputs, labels), self.score(outputs, labels)
            return sums + jnp.stack([jnp.sum(values, where=counted) for values in measured])

        def run(params: Params, rest: nnx.State) -> dict[str, float]:
            sums = jnp.zeros(2)
            for start in range(0, examples, batch_size):
                sums = add(sums, params, rest, data, start)
            loss, error = (float(total) / examples for total in jax.device_get(sums))
            return {"loss": loss, "error": error}

        return run

    def without_network(self, data: Examples) -> dict[str, float]:
        return {}

    def pictures(
        self, model: nnx.Module, data: Examples, count: int
    ) -> Sequence[tuple[str, Mapping[str, np.ndarray]]]:
        return []
