"""What commands on saved networks share: finding a network, its notes, one line for an error."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
import math
import os
from pathlib import Path
import re
import sys
import textwrap
from typing import Any, NoReturn

from flax import nnx
from jaxtyping import Array, Float, UInt8
import numpy as np

from dhp_jax.activity import doing, told_when_silent
from dhp_jax.artifact import arrays, reading
from dhp_jax.artifact.description import ArtifactError, check_notes
from dhp_jax.core.latent import latents
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.surgery import prune
from dhp_jax.data.augmentation import normalize
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.models.own import imported
from dhp_jax.models.registry import task_of
from dhp_jax.train.progress_bar import ProgressBar
from dhp_jax.workdir import target_dirs

WHICH = ("model", "best", "pruned", "search")  # the networks of a run


class Parser(argparse.ArgumentParser):
    """A parser of arguments that prints an error as one line, and its description as written."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


def parser(command: str, description: str) -> Parser:
    """A parser of the arguments that say which network is meant."""
    made = Parser(prog=command, description=description)
    made.add_argument("model", type=Path, help="a run's folder, or one that dhp.save wrote")
    made.add_argument("--which", choices=WHICH, help="of a run's networks; model by default")
    made.add_argument("--build", help="module:function that builds a network of your own class")
    return made


def shape_of(text: str) -> tuple[int, ...]:
    """The type of a flag that gives a shape: "32,32,3"."""
    return _listed(text, int, "positive whole numbers, such as 32,32,3", lambda size: size > 0)


def numbers_of(text: str) -> tuple[float, ...]:
    """The type of a flag that gives a number for each channel: "125.3,123.0,113.9"."""
    return _listed(text, float, "numbers, such as 125.3,123.0,113.9", math.isfinite)


def _listed(
    text: str, kind: Callable[[str], Any], expected: str, fits: Callable[[Any], bool]
) -> tuple[Any, ...]:
    try:
        values = tuple(map(kind, text.split(",")))
    except ValueError:
        values = ()
    if not (values and all(map(fits, values))):
        raise argparse.ArgumentTypeError(f"expected {expected}; got {shown(text)}")
    return values


def tell(text: str) -> None:
    """Prints a sentence, in lines of 80 columns on a terminal and in one line elsewhere."""
    print(textwrap.fill(text, 80, subsequent_indent="  ") if sys.stdout.isatty() else text)


def expanded(arguments: Sequence[str]) -> list[str]:
    """Arguments with the home folder for `~`, which shells leave as it is in `--out=~/images`."""
    parts = [re.fullmatch(r"(-[^=]*=)?(.*)", argument, re.DOTALL) for argument in arguments]
    return [(part[1] or "") + os.path.expanduser(part[2]) for part in parts]


def run(main: Callable[[Sequence[str]], None]) -> int:
    """Runs a command on the arguments given to the process; returns its exit code.

    It is 2 for wrong input, 1 where the work failed (`RuntimeError`), and 130 for Ctrl-C.
    """
    try:
        with told_when_silent(ProgressBar().wait):
            main(expanded(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    return 0


@dataclass(frozen=True)
class Saved:
    """A saved network, ordinary and in evaluation mode, with its folder and its notes."""

    path: Path
    model: nnx.Module
    notes: dict[str, Any]

    @property
    def task(self) -> str | None:
        """Its task; without a note, the task of its family."""
        family = architecture_of(self.model).family
        return self.notes.get("task", family and task_of(family))

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of one example, `(h, w, c)`."""
        shape = self.notes.get("input_shape")
        return None if shape is None else tuple(shape)

    def inputs(self, images: UInt8[np.ndarray, "n h w c"]) -> Float[Array, "n h w c"]:
        """The network's inputs for images of 0 .. 255.

        Raises:
          ValueError: it classifies, and mean and standard deviation of its data are not noted.
        """
        pixels = np.asarray(images, np.float32)
        if self.task != "classification":
            return pixels
        missing = [name for name in ("mean", "std") if name not in self.notes]
        if missing:
            raise ValueError(
                f"{self.path}: expected notes {' and '.join(missing)} of the pixels it was trained "
                "on; dhp.save(path, model, mean=[...], std=[...]) keeps them"
            )
        scale = self.notes.get("peak", 255) / 255
        return normalize(scale * pixels, self.notes["mean"], self.notes["std"])


@doing("reading the network")
def opened(path: str | os.PathLike, which: str | None = None, build: str | None = None) -> Saved:
    """Loads a network from a run's folder, or one that `dhp.save` wrote.

    Args:
      path: the folder.
      which: one of a run's networks, its `model` if `None`.
      build: "module:function" that makes a network of the user's own class.
    """
    folder = find(path, which)
    notes = reading.read_description(folder)["notes"]
    try:
        check_notes(notes)
    except ArgumentError as error:
        raise ArtifactError(f"path: {folder / arrays.DESCRIPTION}: notes.{error}") from None
    model = reading.load(folder, build=None if build is None else imported(build))
    if latents(model):
        model = prune(model)
        model.eval()
    return Saved(folder, model, notes)


def find(path: str | os.PathLike, which: str | None = None) -> Path:
    """The folder of a network: `path` itself, or the one in a run's folder."""
    path = Path(path)
    if reading.exists(path):
        if which is not None:
            raise ValueError(f"--which: expected none, for {path} is one network; got {which}")
        return path
    which = which or "model"
    if reading.exists(path / which):
        return path / which
    others = [name for name in WHICH if reading.exists(path / name)]
    hint = f"; it has {', '.join(others)}, see --which" if others else target_dirs.hint(path)
    raise ValueError(
        f"model: expected a folder that dhp.save wrote or a run's with {which}/, got {path}{hint}"
    )
