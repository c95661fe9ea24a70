"""Details of the test pictures that a run has restored, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dhp_jax.budgets.layer_table import percent
from dhp_jax.tasks.metrics import compare
from dhp_jax.workdir.reader import PICTURES, Result

if TYPE_CHECKING:  # it is slow to import, and commands that draw nothing do without
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Crop:
    """The same square of one picture: the input, what networks make of it, and the original.

    Images are by what they are, `(h, w)` or `(h, w, 3)`, 0 to 255. `psnr` is of the whole pictures
    but the original, in dB, over all pixels and channels.
    """

    name: str
    images: Mapping[str, np.ndarray]
    psnr: Mapping[str, float] = field(default_factory=dict)


def crops(result: Result, baseline: Path | None = None) -> list[Crop]:
    """One square of every picture that a run has left, and of the baseline's if it has the same."""
    if not (result.workdir / PICTURES).is_dir():
        return []
    names = sorted(
        folder.name
        for folder in (result.workdir / PICTURES).iterdir()
        if all((folder / f"{what}.png").is_file() for what in ("input", "output", "target"))
    )
    columns = [("input", result.workdir, "input")]
    if result.pruned and baseline is not None and _has_pictures(baseline, names):
        columns.append(("unpruned", baseline, "output"))
    title = "unpruned"
    if result.pruned:
        title = f"pruned, {percent(result.after.flops / result.before.flops)} FLOPs"
    columns.append((title, result.workdir, "output"))
    columns.append(("original", result.workdir, "target"))
    found = []
    for name in names:
        images = {
            title: np.asarray(Image.open(workdir / PICTURES / name / f"{what}.png"))
            for title, workdir, what in columns
        }
        rows, across = _detail(images["original"])
        shown = {title: image[rows, across] for title, image in images.items()}
        found.append(Crop(name, shown, _psnr(images)))
    return found


def _psnr(images: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How near pictures are to their original, in dB."""
    *others, (_, original) = ((title, np.atleast_3d(image)) for title, image in images.items())
    return {title: compare(image, original)["psnr"] for title, image in others}


def grid(pictures: Sequence[Crop]) -> "Figure":
    """The crops as a figure, one picture a row."""
    from matplotlib.figure import Figure

    columns = len(pictures[0].images)
    figure = Figure((2.2 * columns, 2.2 * len(pictures) + 0.3), layout="constrained")
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for crop, row in zip(pictures, axes, strict=True):
        for ax, (title, image) in zip(row, crop.images.items(), strict=True):
            ax.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="none")
            ax.set_axis_off()
            shown = [title] if crop is pictures[0] else []
            shown += [f"{crop.psnr[title]:.2f} dB"] if title in crop.psnr else []
            ax.set_title("\n".join(shown), fontsize=9)
    return figure


def _has_pictures(workdir: Path, names: Sequence[str]) -> bool:
    """Whether a run has left pictures of these test examples; it may have been tested on others."""
    return all((workdir / PICTURES / name / "output.png").is_file() for name in names)


def _detail(image: np.ndarray, side: int = 96) -> tuple[slice, slice]:
    """The square of a picture in which neighbouring pixels differ most."""
    gray = image.reshape(*image.shape[:2], -1).mean(-1)
    contrast = np.abs(np.diff(gray, axis=0))[:, 1:] + np.abs(np.diff(gray, axis=1))[1:]
    side = min(side, *contrast.shape)
    total = np.pad(contrast, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    top, left = np.unravel_index(np.argmax(sums), sums.shape)
    return slice(top, top + side), slice(left, left + side)
