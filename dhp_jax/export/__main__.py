"""Writes a saved network in a format that runs without this library, and tries it.

Examples:
    dhp-export runs/resnet56 --format=onnx
    dhp-export runs/resnet56 --format=stablehlo --out=net.stablehlo
"""

from collections.abc import Sequence
from pathlib import Path
import sys

from jaxtyping import Float, Shaped, UInt8
import numpy as np

from dhp_jax import cli
from dhp_jax.activity import doing, quiet
from dhp_jax.data.augmentation import normalize
from dhp_jax.data.photos import photographs
from dhp_jax.data.stream import Stream
from dhp_jax.export import check_format, check_path, export
from dhp_jax.export.writers import NEEDS
from dhp_jax.models.own import imported
from dhp_jax.pipeline.setup import set_up
from dhp_jax.tasks import Classification
from dhp_jax.tasks.task import Data
from dhp_jax.workdir.identity import CONFIG, stored_config

ENDINGS = {"stablehlo": ".stablehlo", "onnx": ".onnx", "safetensors": "-folded"}
REAL = 8  # test images that an export is tried on, at most


def main(arguments: Sequence[str]) -> None:
    """Parses the arguments, writes the file and prints what became of it."""
    parser = cli.parser("dhp-export", __doc__)
    parser.add_argument(
        "--format",
        choices=NEEDS,
        required=True,
        help="stablehlo and onnx are programs; safetensors has arrays alone, BatchNorm folded",
    )
    parser.add_argument("--out", type=Path, help="file or folder; beside the network by default")
    parser.add_argument("--input-shape", type=cli.shape_of, help="32,32,3, if none is noted")
    options = parser.parse_args(arguments)
    check_format(options.format)
    if options.out is not None:
        check_path(options.out, options.format, "--out")
    saved = cli.opened(options.model, options.which, options.build)
    if options.out is not None and options.out.resolve() == saved.path.resolve():
        raise ValueError(f"--out: expected another folder than the network's, got {options.out}")
    shape = options.input_shape or saved.input_shape
    if shape is None:
        raise ValueError(f"--input-shape: expected one, for {saved.path} notes none; got none")
    folder = options.format == "safetensors"
    path = options.out or saved.path.with_name(saved.path.resolve().name + ENDINGS[options.format])
    with quiet("dhp_jax.export"):  # what it warns of is printed below
        made = export(
            saved.model,
            path,
            shape,
            format=options.format,
            inputs=_inputs(saved, shape, options.model),
            notes={**saved.notes, "input_shape": list(shape)},
            build=imported(options.build) if options.build and folder else None,
        )
    sizes = ", ".join(map(str, made.shape))
    cli.tell(f"{made.path}: takes ({sizes}) in float32; {made.folded} layers folded into others")
    if made.fixed is not None:
        batch, images = made.shape[0] != "batch", len(shape) == 3
        what = "all sizes" if batch else "height and width" if images else "sizes"
        cli.tell(f"{what} are fixed, because with free ones: {made.fixed}")
    told = ", ".join(f"{value:.2g} on {name}" for name, value in made.differences.items())
    cli.tell(f"largest difference to the network: {told}; its outputs are up to {made.largest:.4g}")


@doing("reading images to try it on")
def _inputs(
    saved: cli.Saved, shape: tuple[int, ...], folder: Path
) -> dict[str, Float[np.ndarray, "n h w c"]] | None:
    """Random and real inputs; `None` for a network that does not take images."""
    if len(shape) != 3 or shape[-1] not in (1, 3):
        return None
    random = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    inputs = {"random pixels": _prepare(saved, random)}
    if (folder / CONFIG).is_file():
        try:
            tested = _of_run(folder, shape)
        except ValueError as error:  # data that are no longer there
            print(f"test images cannot be read: {error}", file=sys.stderr)
        else:
            return inputs | {f"{len(tested)} test images": tested}
    images = _photographs(shape)
    return inputs | {f"{len(images)} photographs": _prepare(saved, images)}


def _prepare(
    saved: cli.Saved, images: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n h w c"]:
    """Normalises images for the network; by a guess where the file does not say how."""
    if saved.task == "classification" and not {"mean", "std"} <= saved.notes.keys():
        return (images.astype(np.float32) - 127) / 64
    return np.asarray(saved.inputs(images))


def _of_run(folder: Path, shape: tuple[int, ...]) -> Float[np.ndarray, "n h w c"]:
    """Inputs from a run's test data."""
    asked = set_up(stored_config(folder))
    data = asked.read("test")
    if isinstance(asked.task, Classification):
        return np.asarray(normalize(_first_images(data), asked.task.mean, asked.task.std))
    inputs = (asked.task.test_input(photo, i) for i, photo in enumerate(data[:REAL]))
    return np.stack([_crop(image, shape) for image in inputs])


def _first_images(data: Data) -> UInt8[np.ndarray, "n h w c"]:
    if isinstance(data, Stream):
        chosen = np.arange(min(REAL, data.size))
        images, _ = data.read(chosen, chosen, np.random.default_rng(0))
        return images
    images, _ = data
    return images[np.arange(min(REAL, len(images)))]


def _photographs(shape: tuple[int, ...]) -> UInt8[np.ndarray, "n h w c"]:
    """Photographs that scikit-image ships, cut to a size."""
    shipped = photographs.load("photographs", channels=shape[-1], patch=1)
    return np.stack([_crop(photo.target, shape) for photo in shipped.read("test")])


def _crop(image: Shaped[np.ndarray, "h w c"], shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
    """An image from its top left corner, which goes on periodically if it is too small."""
    height, width, _ = shape
    missing = (max(0, height - image.shape[0]), max(0, width - image.shape[1]))
    padded = np.pad(image, (*((0, n) for n in missing), (0, 0)), mode="wrap")
    return padded[:height, :width]


if __name__ == "__main__":
    sys.exit(cli.run(main))
