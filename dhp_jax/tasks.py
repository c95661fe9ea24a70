"""Tasks: how examples become inputs and targets, what is lowered, and what is reported."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8
import optax

from dhp_jax.data.augment import augment, normalize

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

    def training_pair(
        self, key: Key[Array, ""], examples: Examples
    ) -> tuple[Float[Array, "n h w c"], Int[Array, " n"]]:
        images, labels = examples
        images = augment(key, images, crop_padding=self.crop_padding, flip=self.flip)
        return normalize(images, self.mean, self.std), labels

    def test_pair(self, examples: Examples) -> tuple[Float[Array, "n h w c"], Int[Array, " n"]]:
        images, labels = examples
        return normalize(images, self.mean, self.std), labels

    def loss(
        self, outputs: Float[Array, "n classes"], targets: Int[Array, " n"]
    ) -> Float[Array, " n"]:
        logits = outputs.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    def error(
        self, outputs: Float[Array, "n classes"], targets: Int[Array, " n"]
    ) -> Float[Array, " n"]:
        return (jnp.argmax(outputs, axis=-1) != targets).astype(jnp.float32)
