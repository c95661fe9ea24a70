"""Augmentation and normalisation of a batch of images, as pure functions that run on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped, UInt8


def normalize(
    images: UInt8[Array, "n h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "n h w c"]:
    """Subtracts the mean of each channel and divides by its standard deviation.

    Args:
      images: stored pixels `(n, h, w, c)`.
      mean: `c` numbers, in units of the stored pixels.
      std: `c` numbers, in units of the stored pixels.

    Returns:
      float32 `(n, h, w, c)`.

    Example:
      >>> normalize(jnp.full((1, 2, 2, 1), 7, jnp.uint8), (5.0,), (2.0,))[0, 0, 0]
      Array([1.], dtype=float32)
    """
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) - mean) / std


def augment(
    key: PRNGKeyArray, images: Shaped[Array, "n h w c"], *, crop_padding: int, flip: bool
) -> Shaped[Array, "n h w c"]:
    """Random crop out of a zero border, then random horizontal flip; each image draws its own.

    It takes stored pixels, before `normalize`: the border is black, not the mean colour.

    Args:
      key: a JAX random key; the same key and images give the same result.
      images: pixels `(n, h, w, c)` of any dtype.
      crop_padding: width of the border in pixels; both offsets of the crop are uniform in
        `0 .. 2 * crop_padding`. 0 leaves the images where they are.
      flip: whether to mirror left and right with probability one half.

    Returns:
      Images of the same shape and dtype.

    Example:
      >>> images = jnp.zeros((64, 32, 32, 3), jnp.uint8)
      >>> augment(jax.random.key(0), images, crop_padding=4, flip=True).shape
      (64, 32, 32, 3)
    """
    crop_key, flip_key = jax.random.split(key)
    n, h, w, c = images.shape
    if crop_padding:
        border = (crop_padding, crop_padding)
        padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))
        offsets = jax.random.randint(crop_key, (n, 2), 0, 2 * crop_padding + 1)
        # One gather for the batch: the fastest of five formulations measured on CPU.
        images = jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, (*at, 0), (h, w, c)))(
            padded, offsets
        )
    if flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (n, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


def cut_out(
    key: PRNGKeyArray, images: Float[Array, "n h w c"], side: int
) -> Float[Array, "n h w c"]:
    """Sets a square of each image to zero; each image draws its own.

    Its centre is any pixel, and it may lie partly outside. Images are normalised, so that zero is
    the mean colour; `side` is in pixels.

    Reference: DeVries and Taylor, Cutout (arXiv 1708.04552), section 3.
    """
    n, h, w, _ = images.shape
    firsts = jax.random.randint(key, (2, n, 1), 0, jnp.array([h, w])[:, None, None]) - side // 2
    rows, columns = (
        (jnp.arange(size) >= first) & (jnp.arange(size) < first + side)
        for size, first in zip((h, w), firsts, strict=True)
    )
    inside = rows[:, :, None] & columns[:, None]
    return jnp.where(inside[..., None], 0, images)


def blend(
    key: PRNGKeyArray, images: Float[Array, "n h w c"], alpha: float
) -> tuple[Float[Array, "n h w c"], Float[Array, " n"]]:
    """Blends each image with another of the batch: mixup.

    The other of image `i` is image `n - 1 - i`; the order of a batch is random. One share for the
    batch is drawn from the Beta distribution with both parameters `alpha`: near 0 images are hardly
    blended, 1 draws it uniformly.

    Returns:
      `share * images + (1 - share) * others`, and the share of each, which is the same.

    Reference: Zhang et al., mixup, ICLR 2018 (arXiv 1710.09412), equation 2.
    """
    share = jax.random.beta(key, alpha, alpha, dtype=images.dtype)
    return share * images + (1 - share) * images[::-1], jnp.full(len(images), share)
