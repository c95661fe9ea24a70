"""PSNR and SSIM of restored images, as papers report them."""

from jaxtyping import Float, Shaped, UInt8
import numpy as np

from dhp_jax.errors import FieldError

WINDOW = 11  # pixels on each side of SSIM's Gaussian windows
MAX_PSNR = 100.0  # dB, of equal images, in place of infinity, which has no mean


def luminance(image: Shaped[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w 1"]:
    """The Y channel of YCbCr, 16 .. 235, of an RGB image of 0 .. 255; a gray image as it is.

    Reference: ITU-R BT.601, as MATLAB's rgb2ycbcr computes it, without rounding.
    """
    image = np.asarray(image, np.float64)
    if image.shape[-1] == 1:
        return image
    return 16 + image @ np.array([[65.481], [128.553], [24.966]]) / 255


def pixels(image: Float[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    """Rounds and clips an image to the whole numbers from 0 to 255, as files store it."""
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def compare(
    output: Shaped[np.ndarray, "h w c"],
    target: Shaped[np.ndarray, "h w c"],
    *,
    shave: int = 0,
    on_luminance: bool = False,
) -> dict[str, float]:
    """PSNR in dB, 100 at most, and SSIM of an image of 0 .. 255.

    SSIM has Gaussian windows of 11 pixels, and is averaged over channels.

    Args:
      output, target: the two images.
      shave: pixels left out along each border.
      on_luminance: whether the Y channel alone is compared.

    Raises:
      ValueError: images of unlike shapes, or smaller than a window.

    Reference: Wang et al., Image quality assessment, 2004.
    """
    # Imported here because it takes long, and classification does not need it.
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    if output.shape != target.shape:
        raise FieldError("output", detail=f"expected shape {target.shape}, got {output.shape}")
    if min(output.shape[:2]) < WINDOW + 2 * shave:
        raise FieldError(
            "output",
            detail=f"expected at least {WINDOW + 2 * shave} pixels a side for SSIM, got shape "
            f"{output.shape}",
        )
    images = [luminance(image) if on_luminance else image for image in (output, target)]
    if shave:
        images = [image[shave:-shave, shave:-shave] for image in images]
    output, target = (np.asarray(image, np.float64) for image in images)
    ssim = structural_similarity(
        target,
        output,
        data_range=255,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    with np.errstate(divide="ignore"):
        psnr = peak_signal_noise_ratio(target, output, data_range=255)
    return {"psnr": min(float(psnr), MAX_PSNR), "ssim": float(ssim)}
