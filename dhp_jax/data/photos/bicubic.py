"""Bicubic resizing with the results of MATLAB's `imresize`, the field's way to low resolution."""

from fractions import Fraction
import functools
import math

from jaxtyping import Float, Int, UInt8
import numpy as np

from dhp_jax.errors import FieldError

KERNEL_WIDTH = 4


def bicubic(image: UInt8[np.ndarray, "h w c"], scale: float | Fraction) -> UInt8[np.ndarray, "..."]:
    """Resizes an image by the factor `scale`, antialiased when it shrinks.

    Rows are resized before columns and rounded to whole pixel values in between, as in MATLAB.
    Beyond its border the image goes on as its mirror image; older versions of MATLAB repeated the
    outermost pixels, so that what they made differs in two rows and columns along the border.

    Args:
      image: the image.
      scale: output size over input size, from 1/1000 to 1000; a float stands for the fraction
        next to it.

    Returns:
      The image of `ceil(scale * h)` by `ceil(scale * w)` pixels.

    Raises:
      ValueError: `image` is no uint8 `(h, w, c)` array with pixels, or `scale` is out of range.

    Example:
      >>> bicubic(np.full((8, 6, 3), 200, np.uint8), 1 / 4).shape
      (2, 2, 3)
    """
    if image.ndim != 3 or image.dtype != np.uint8 or not image.size:
        raise FieldError(
            "image",
            detail=f"expected a uint8 array (h, w, c); got {image.dtype} of shape {image.shape}",
        )
    if not 1e-3 <= scale <= 1e3:
        raise FieldError("scale", "a number from 1/1000 to 1000", scale)
    scale = Fraction(scale).limit_denominator()  # 0.1 is 1/10, so that 0.1 * 30 is 3
    rows = _resize_rows(image, scale)
    return np.ascontiguousarray(_resize_rows(rows.swapaxes(0, 1), scale).swapaxes(0, 1))


def _resize_rows(image: UInt8[np.ndarray, "h w c"], scale: Fraction) -> UInt8[np.ndarray, "h2 w c"]:
    """Resizes the first axis; rounds halves up, also those that float64 misses by its error."""
    weights, pixels = _taps(len(image), scale)
    lines = image.reshape(len(image), -1)[pixels]
    # By einsum, not by a product with a full matrix: most of that would be zeros.
    resized = np.einsum("ot,otx->ox", weights, lines).clip(0, 255)
    return (resized + (0.5 + 1e-9)).astype(np.uint8).reshape(-1, *image.shape[1:])


@functools.lru_cache(maxsize=256)
def _taps(
    size: int, scale: Fraction
) -> tuple[Float[np.ndarray, "out taps"], Int[np.ndarray, "out taps"]]:
    """For each pixel of a resized line, which of `size` pixels count in it and how much."""
    stretch = float(max(1, 1 / scale))  # of the kernel: the antialiasing
    centres = (np.arange(math.ceil(scale * size)) + 0.5) / float(scale) - 0.5
    pixels = np.floor(centres - KERNEL_WIDTH / 2 * stretch).astype(int)[:, np.newaxis]
    pixels = pixels + np.arange(math.ceil(KERNEL_WIDTH * stretch) + 2)
    weights = _cubic((centres[:, np.newaxis] - pixels) / stretch)
    weights /= weights.sum(axis=1, keepdims=True)
    pixels %= 2 * size  # the line and its mirror image, over and over
    return weights, np.minimum(pixels, 2 * size - 1 - pixels)


def _cubic(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Keys' cubic convolution kernel with a = -1/2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0))
