"""Labels images, or denoises or enlarges them, with a saved network.

Examples:
    dhp-predict runs/digits_resnet20 digit.png
    dhp-predict runs/dncnn_s70 noisy.png --out=clean/
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
import sys

import jax
import jax.numpy as jnp
from jaxtyping import Float, UInt8
import numpy as np
from PIL import Image

from dhp_jax import cli
from dhp_jax.activity import doing
from dhp_jax.artifact.arrays import DESCRIPTION
from dhp_jax.backend.inference import inference
from dhp_jax.backend.memory import keep_memory
from dhp_jax.core.provenance import architecture_of
from dhp_jax.data.decode import COLOUR, GRAY, decode, open_image
from dhp_jax.errors import FieldError, check_integer
from dhp_jax.files import why_unwritable
from dhp_jax.models.registry import task_of
from dhp_jax.tasks.metrics import pixels
from dhp_jax.tasks.tiling import restore, tiling
from dhp_jax.tracing.inputs import outputs_of

LABELS = "classification"
TASKS = (LABELS, "super_resolution", "denoising")


def main(arguments: Sequence[str]) -> None:
    """Parses the arguments, and prints a line for each image."""
    parser = cli.parser("dhp-predict", __doc__)
    parser.add_argument("images", nargs="+", type=Path, help="image files")
    parser.add_argument("--top", type=int, help="how many classes are shown; 3 by default")
    parser.add_argument("--resize", action="store_true", help="to the size the network takes")
    parser.add_argument("--out", type=Path, help="folder for restored images")
    parser.add_argument("--tile", type=int, help="side of the tiles of images that do not fit")
    options = parser.parse_args(arguments)
    for file in options.images:
        if file.is_dir():
            raise ValueError(f"images: expected files, such as {file}/*; got the folder {file}")
    if options.top is not None:
        check_integer("--top", options.top)
    keep_memory()
    saved = cli.opened(options.model, options.which, options.build)
    _check_task(saved)
    if saved.task == LABELS:
        _check_unused(options, ("out", "tile"), f"{saved.path} labels images")
        top = 3 if options.top is None else options.top
        ranked = label(saved, options.images, top=top, resize=options.resize)
        for file, ranking in zip(options.images, ranked, strict=True):
            print(f"{file}: {', '.join(f'{name} {share:.1%}' for name, share in ranking)}")
        return
    _check_unused(options, ("top", "resize"), f"{saved.path} restores images")
    if options.out is None:
        raise ValueError(f"--out: expected a folder, for {saved.path} restores images; got none")
    for file in restore_images(saved, options.images, options.out, tile=options.tile):
        print(file)


def _check_task(saved: cli.Saved) -> None:
    """Raises unless a network is for one of the tasks, and may be."""
    if saved.task is None:
        raise ValueError(
            f"{saved.path}: expected a note task, {', '.join(TASKS[:-1])} or {TASKS[-1]}; "
            "dhp.save(path, model, task=...) keeps it"
        )
    where = f"{saved.path / DESCRIPTION}: notes.task"
    if saved.task not in TASKS:
        raise FieldError.unknown(where, saved.task, TASKS)
    family = architecture_of(saved.model).family
    expected = (family and task_of(family)) or saved.task
    if (expected == LABELS) != (saved.task == LABELS):
        raise ValueError(
            f"{where}: expected {expected!r}, as of family {family!r}; got {saved.task!r}"
        )


def _check_unused(options: Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise ValueError(f"--{name}: expected none, for {why}; got {value}")


@doing("labelling the images")
def label(
    saved: cli.Saved, files: Sequence[Path], *, top: int = 3, resize: bool = False
) -> list[list[tuple[str, float]]]:
    """The likeliest classes of each image, with their probabilities.

    Args:
      saved: a network that classifies.
      files: image files, of 8 bits a channel or less.
      top: how many classes.
      resize: whether images of another size are resized and their centre cut out, as the test
        images of the data were; where those were not, so that the centre is as large as can be.

    Returns:
      For each file names of classes (numbers, where the data have no names) and probabilities, the
      likeliest first.

    Raises:
      ValueError: an image that cannot be read, or of another size or number of channels than the
        network takes; a network whose notes do not tell how its data were normalised, or do not
        suit it.

    Example:
      >>> label(cli.opened("runs/digits_resnet20"), [Path("digit.png")])
    """
    check_integer("--top", top)
    shape = _input_shape(saved)
    if resize and shape[0] != shape[1]:
        raise ValueError(
            f"--resize: expected a network of square images, got {shape[0]}x{shape[1]}"
        )
    names = _class_names(saved, shape)
    mixed = saved.notes.get("channels") is not None  # of data that were gray and in colour
    size = saved.notes.get("resize", shape[0]) if resize else None
    images = np.stack([_of_shape(file, shape, size, mixed) for file in files])
    logits = inference(saved.model)(saved.inputs(images))
    shares = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    best = np.argsort(-shares, axis=-1, kind="stable")[:, :top]
    return [[(names[i], float(row[i])) for i in of] for row, of in zip(shares, best, strict=True)]


def _input_shape(saved: cli.Saved) -> tuple[int, ...]:
    if saved.input_shape is None or len(saved.input_shape) != 3:
        raise ValueError(
            f"{saved.path}: expected a note input_shape; "
            "dhp.save(path, model, input_shape=(height, width, channels)) keeps it"
        )
    return saved.input_shape


def _class_names(saved: cli.Saved, shape: tuple[int, ...]) -> list[str]:
    """A name for each output of the network: those noted, or numbers."""
    try:
        made = outputs_of(saved.model, shape)
    except ValueError as error:
        raise ValueError(f"{saved.path / DESCRIPTION}: notes.{error}") from error
    if not isinstance(made, jax.ShapeDtypeStruct) or made.ndim != 2:
        raise ValueError(
            f"{saved.path}: expected a network that gives each class a number; got {made}"
        )
    names = saved.notes.get("class_names") or [str(number) for number in range(made.shape[-1])]
    if len(names) != made.shape[-1]:
        raise ValueError(
            f"{saved.path / DESCRIPTION}: notes.class_names: expected {made.shape[-1]} names, as "
            f"many as the network has outputs, got {len(names)}"
        )
    return names


def _of_shape(
    file: Path, shape: tuple[int, ...], resize: int | None, mixed: bool
) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of an image file, of the height and width that the network takes."""
    height, width, channels = shape
    image = _read(file, channels, resize, resize and height, mixed)
    if image.shape[:2] != (height, width):
        raise ValueError(
            f"{file}: expected {width} pixels wide and {height} high, got {image.shape[1]} "
            f"and {image.shape[0]}; --resize brings images to that size"
        )
    return image


def restore_images(
    saved: cli.Saved, files: Sequence[Path], folder: Path, *, tile: int | None = None
) -> list[Path]:
    """Writes what a restoration network makes of images, as PNG files of the same names.

    Args:
      saved: a network that denoises or enlarges.
      files: image files, of 8 bits a channel or less.
      folder: made if it is not there, once all images have been decoded.
      tile: side of the tiles that larger images are cut into; `None` runs them whole.

    Returns:
      The files written.

    Raises:
      ValueError: an image that cannot be read or has another number of channels than the network
        takes; two images of one name; a tile that is too small for what the network sees.

    Example:
      >>> restore_images(cli.opened("runs/dncnn_s70"), [Path("noisy.png")], Path("clean"))
    """
    targets = [folder / f"{file.stem}.png" for file in files]
    for file, target in zip(files, targets, strict=True):
        if targets.count(target) > 1:
            raise ValueError(f"{file}: expected images of different names, got two of {file.stem}")
        if target.resolve() == file.resolve():
            raise ValueError(f"--out: expected a folder other than the images', got {folder}")
    channels = getattr(saved.model, "channels", None) or _input_shape(saved)[-1]
    tiling(saved.model).check("--tile", tile)
    if why := why_unwritable(folder):
        raise ValueError(f"--out: expected a folder that can be written, got {folder} ({why})")
    for file in files:  # before the first is run
        _read(file, channels)
    folder.mkdir(parents=True, exist_ok=True)
    network = inference(saved.model)
    for file, target in zip(files, targets, strict=True):
        image = pixels(restore_image(saved, network, _read(file, channels), tile=tile))
        Image.fromarray(image.squeeze(-1) if channels == 1 else image).save(target)
    return targets


@doing("restoring an image")
def restore_image(
    saved: cli.Saved, network, image: UInt8[np.ndarray, "h w c"], *, tile: int | None = None
) -> Float[np.ndarray, "h2 w2 c"]:
    """What a restoration network makes of an image, whole or in tiles without a seam."""
    overlap, multiple = tiling(saved.model)
    return restore(
        lambda x: np.asarray(network(x), np.float32),
        saved.inputs(image),
        tile=None if tile is None else (tile, tile),
        overlap=overlap,
        multiple=multiple,
    )


def _read(
    file: Path,
    channels: int,
    resize: int | None = None,
    crop: int | None = None,
    mixed: bool = False,
) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of an image file, upright, if it has as many channels as the network.

    With `mixed`, gray and colour images are both made what the network takes.
    """
    mode = _check_mode(file, channels, mixed)
    return decode(file, mode, argument="images", upright=True, resize=resize, crop=crop)


def _check_mode(file: Path, channels: int, mixed: bool) -> str:
    """The mode to decode an image to, if the network takes what is in the file."""
    expected = GRAY + COLOUR if mixed else {1: GRAY, 3: COLOUR}.get(channels, ())
    with open_image(file, argument="images") as image:
        mode = image.mode
    if mode not in expected:
        kind = {1: "a gray image", 3: "a colour image"}.get(channels, f"{channels} channels")
        raise ValueError(
            f"{file}: expected {kind} of at most 8 bits a channel, as the network takes; "
            f"got Pillow's mode {mode}"
        )
    return "L" if channels == 1 else "RGB"


if __name__ == "__main__":
    sys.exit(cli.run(main))
