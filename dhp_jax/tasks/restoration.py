"""Restoration: super-resolution and denoising of photographs, on pixels from 0 to 255."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
import functools
import math
import os
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped, UInt8
import numpy as np

from dhp_jax.backend.inference import tune
from dhp_jax.backend.platform import compiler_options
from dhp_jax.core.latent import LatentVector
from dhp_jax.data.photos.bicubic import bicubic
from dhp_jax.data.photos.patches import Pairs, Patches, cut_patches, mirror_patches
from dhp_jax.data.photos.photographs import Photograph
from dhp_jax.errors import ArgumentError
from dhp_jax.tasks.metrics import compare, pixels
from dhp_jax.tasks.task import METRICS, Evaluation, Metric, Params
from dhp_jax.tasks.tiling import restore, tile_for, tiling

PEAK = 255.0
LOSSES = {"l1": jnp.abs, "l2": jnp.square}  # of the error of a pixel


class Degradation:
    """What a task does to its images, and how it compares them."""

    def degrade(
        self,
        key: Key[Array, ""],
        degraded: Float[Array, "n h w c"] | None,
        target: Float[Array, "n h2 w2 c"],
    ) -> Float[Array, "n h w c"]:
        """Makes the network's inputs in training."""
        raise NotImplementedError

    def test_input(self, photograph: Photograph, index: int) -> Float[np.ndarray, "h w c"]:
        """Makes the network's input for the `index`-th test photograph, the same in every test."""
        raise NotImplementedError

    def enlarge(self, image: Float[np.ndarray, "h w c"]) -> Float[np.ndarray, "h2 w2 c"]:
        """Brings an input to the size of the target without a network."""
        raise NotImplementedError

    def compare_images(
        self, output: Shaped[np.ndarray, "h w c"], target: UInt8[np.ndarray, "h w c"]
    ) -> dict[str, float]:
        """PSNR and SSIM as papers on the task measure them."""
        raise NotImplementedError


@dataclass(frozen=True)
class Restoration(Degradation):
    """What super-resolution and denoising share: patches in training, whole images in tests, PSNR.

    Attributes:
      patch: side of a training patch of the target, in pixels.
      scale: how many times larger the target is than the input.
      seed: of the noise of test images, which is the same in every test.
      tile: side of the tiles that larger test images are cut into, in pixels of the input. With
        `None` they are cut only if the images have many different shapes.
      overlap: of the tiles, in pixels; with `None` the reach of the network.
      loss_name: of `LOSSES`; its mean over the pixels is lowered.
    """

    patch: int
    scale: int = 1
    seed: int = 0
    tile: int | None = None
    overlap: int | None = None
    loss_name: str = "l1"
    metric: ClassVar[Metric] = METRICS["psnr"]

    def examples(self, key: Key[Array, ""], data: Patches, chosen: Int[Array, " n"]) -> Pairs:
        image_key, place_key, *_ = jax.random.split(key, 4)
        # `chosen` is not used: an epoch is a number of patches, whatever the number of photographs.
        images = jax.random.randint(image_key, chosen.shape, 0, len(data.starts))
        return cut_patches(place_key, data, images, patch=self.patch, scale=self.scale)

    def augmented(
        self, key: Key[Array, ""], examples: Pairs
    ) -> tuple[Float[Array, "n p p c"], Float[Array, "n scale*p scale*p c"]]:
        *_, turn_key, noise_key = jax.random.split(key, 4)
        degraded, target = examples
        turns = jax.random.bernoulli(turn_key, 0.5, (3, len(target), 1, 1, 1))
        target = mirror_patches(target, turns).astype(jnp.float32)
        if degraded is not None:
            degraded = mirror_patches(degraded, turns).astype(jnp.float32)
        return self.degrade(noise_key, degraded, target), target

    def loss(self, outputs: Float[Array, "n h w c"], targets: Float[Array, "n h w c"]):
        return _mean(LOSSES[self.loss_name](outputs.astype(jnp.float32) - targets))

    def distillation(self, outputs, taught, temperature):
        del temperature  # outputs are images, and not logits
        return self.loss(outputs, taught.astype(jnp.float32))

    def score(self, outputs: Float[Array, "n h w c"], targets: Float[Array, "n h w c"]):
        error = _mean(jnp.square(outputs.astype(jnp.float32) - targets))
        return 10 * jnp.log10(PEAK**2 / jnp.maximum(error, 1e-10))

    def evaluation(
        self, model: nnx.Module, data: Sequence[Photograph], *, batch_size: int
    ) -> Evaluation:
        del batch_size  # one image at a time: their sizes differ
        if not data:
            raise ArgumentError("data", "photographs to test on", "none")
        smallest = min((photo.target for photo in data), key=lambda image: min(image.shape[:2]))
        self.compare_images(smallest, smallest)  # refuses too small images before the work
        restored = _prepare_restoring(self, model, data)

        def run(params: Params, rest: nnx.State) -> dict[str, float]:
            # Images are compared on the host, while the device works on the next one.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = [
                    pool.submit(self._measure, restored(params, rest, i), photo.target)
                    for i, photo in enumerate(data)
                ]
            return _means([job.result() for job in jobs])

        return run

    def _measure(self, output: Float[np.ndarray, "h w c"], target: np.ndarray) -> dict[str, float]:
        """Metrics of an output; NaN if one of its numbers is not finite, which no pixel tells."""
        if not np.isfinite(output).all():
            return dict.fromkeys(("psnr", "ssim"), math.nan)
        return self.compare_images(pixels(output), target)

    def check(self, model: nnx.Module) -> None:
        tiling(model, self.overlap).check("tile", self.tile)

    def without_network(self, data: Sequence[Photograph]) -> dict[str, float]:
        return _means(
            [
                self.compare_images(self.enlarge(self.test_input(photo, i)), photo.target)
                for i, photo in enumerate(data)
            ]
        )

    def pictures(
        self, model: nnx.Module, data: Sequence[Photograph], count: int
    ) -> Sequence[tuple[str, Mapping[str, np.ndarray]]]:
        restored = _prepare_restoring(self, model, data)
        _, latents, weights, rest = nnx.split(model, LatentVector, nnx.Param, ...)
        return [
            (
                photo.name,
                {
                    "input": pixels(self.enlarge(self.test_input(photo, i))),
                    "output": pixels(restored((latents, weights), rest, i)),
                    "target": photo.target,
                },
            )
            for i, photo in enumerate(data[:count])
        ]


def _prepare_restoring(
    task: Restoration, model: nnx.Module, data: Sequence[Photograph]
) -> Callable[[Params, nnx.State, int], np.ndarray]:
    """Prepares `(parameters, rest, index) -> output` for whole test photographs."""
    model = nnx.clone(model)
    model.eval()
    forward = _forward(_Structure(nnx.graphdef(model)))
    overlap, multiple = tiling(model, task.overlap)
    sizes = (photo.target.shape[:2] for photo in data)
    shapes = ((height // task.scale, width // task.scale) for height, width in sizes)
    tile = tile_for(shapes, overlap, multiple, task.tile)

    def restored(params: Params, rest: nnx.State, index: int) -> np.ndarray:
        image = task.test_input(data[index], index)
        bound = functools.partial(forward, params, rest)
        return restore(bound, image, tile=tile, overlap=overlap, multiple=multiple)

    return restored


class _Structure:
    """A network's structure as the key of a cache; networks of equal structure compute the same."""

    def __init__(self, graphdef: nnx.GraphDef):
        self.graphdef = graphdef

    def __eq__(self, other: "_Structure") -> bool:
        return self.graphdef == other.graphdef

    def __hash__(self) -> int:
        return 0  # attributes of a network may be lists, which have no hash


@functools.lru_cache(maxsize=1)  # so that pictures of a network use the programs of its test
def _forward(network: _Structure) -> Callable[[Params, nnx.State, Array], Array]:
    @functools.partial(jax.jit, compiler_options=compiler_options())
    def forward(params: Params, rest: nnx.State, x: Array) -> Array:
        return tune(nnx.merge(network.graphdef, *params, rest))(x).astype(jnp.float32)

    return forward


@dataclass(frozen=True)
class SuperResolution(Restoration):
    """Enlarges photographs.

    Attributes:
      on_luminance: whether PSNR and SSIM are those of the Y channel, with `scale` pixels shaved off
        each border, or those of RGB, with `scale + 6` (as on DIV2K).
    """

    on_luminance: bool = True

    def degrade(self, key, degraded, target):
        return degraded

    def test_input(self, photograph, index):
        return photograph.degraded.astype(np.float32)

    def enlarge(self, image):
        return bicubic(pixels(image), self.scale)

    def compare_images(self, output, target):
        return compare(output, target, shave=self.shave, on_luminance=self.on_luminance)

    @property
    def shave(self) -> int:
        """Pixels along each border of a test image that are not compared."""
        return self.scale + (0 if self.on_luminance else 6)


@dataclass(frozen=True)
class Denoising(Restoration):
    """Removes white Gaussian noise from photographs.

    Attributes:
      sigma: standard deviation of the noise, which is not clipped.
      shave: pixels along each border of a test image that are not compared.
    """

    sigma: float = 70.0
    shave: int = 1

    def degrade(self, key, degraded, target):
        return target + self.sigma * jax.random.normal(key, target.shape, target.dtype)

    def test_input(self, photograph, index):
        noise = np.random.default_rng((self.seed, index)).normal(size=photograph.target.shape)
        return (photograph.target + self.sigma * noise).astype(np.float32)

    def enlarge(self, image):
        return image

    def compare_images(self, output, target):
        return compare(output, target, shave=self.shave)


def _mean(values: Float[Array, "n h w c"]) -> Float[Array, " n"]:
    return jnp.mean(values, axis=(1, 2, 3))


def _means(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the images."""
    return {name: float(np.mean([m[name] for m in measured])) for name in measured[0]}
