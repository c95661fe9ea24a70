"""Bicubic resizing with the results of MATLAB's `imresize`, the field's way to low resolution."""

from fractions import Fraction
import functools
import math

from jaxtyping import Float, UInt8
import numpy as np

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
      ValueError: `image` is no uint8 `(h, w, c)` array with pixels, or `scale` is out of
        range.

    Example:
      >>> bicubic(np.full((8, 6, 3), 200, np.uint8), 1 / 4).shape
      (2, 2, 3)
    """
    if image.ndim != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            f"image: expected a uint8 array (h, w, c); got {image.dtype} of shape {image.shape}"
        )
    if not 1e-3 <= scale <= 1e3:
        raise ValueError(f"scale: expected a number from 1/1000 to 1000; got {scale}")
    scale = Fraction(scale).limit_denominator()  # 0.1 is 1/10, so that 0.1 * 30 is 3
    rows = _resize_rows(image, scale)
    return np.ascontiguousarray(_resize_rows(rows.swapaxes(0, 1), scale).swapaxes(0, 1))


def _resize_rows(image: UInt8[np.ndarray, "h w c"], scale: Fraction) -> UInt8[np.ndarray, "h2 w c"]:
    """Resizes the first axis; rounds halves up, also those that float64 misses by its error."""
    resized = _weights(len(image), scale) @ image.reshape(len(image), -1)
    return (resized.clip(0, 255) + (0.5 + 1e-9)).astype(np.uint8).reshape(-1, *image.shape[1:])


@functools.lru_cache(maxsize=16)  # few: one for pictures of 2040 pixels takes 8 MB
def _weights(size: int, scale: Fraction) -> Float[np.ndarray, "out in"]:
    """What each of `size` pixels in a line contributes to each pixel of the resized line."""
    stretch = float(max(1, 1 / scale))  # of the kernel: the antialiasing
    centres = (np.arange(math.ceil(scale * size)) + 0.5) / float(scale) - 0.5
    taps = np.arange(math.ceil(KERNEL_WIDTH * stretch) + 2)
    pixels = np.floor(centres - KERNEL_WIDTH / 2 * stretch).astype(int)[:, np.newaxis] + taps
    kernel = _cubic((centres[:, np.newaxis] - pixels) / stretch)
    kernel /= kernel.sum(axis=1, keepdims=True)

    pixels %= 2 * size  # the line and its mirror image, over and over
    pixels = np.minimum(pixels, 2 * size - 1 - pixels)
    weights = np.zeros((len(centres), size))
    np.add.at(weights, (np.arange(len(centres))[:, np.newaxis], pixels), kernel)
    weights.flags.writeable = False
    return weights


def _cubic(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Keys' cubic convolution kernel with a = -1/2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0))
