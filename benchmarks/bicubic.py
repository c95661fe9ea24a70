"""Is our bicubic down-sampling that of MATLAB's imresize?

Compares it, and Pillow's, with the low-resolution images of folders of pairs that MATLAB made.

    python benchmarks/bicubic.py data/set5_x4 data/set14_x4 --scale=4
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from record import publish, table_of

from dhp_jax.data.photos.bicubic import bicubic

NOTE = (
    "Mean absolute difference from the low-resolution images of the pairs, in gray levels: mean "
    "over the images, smallest and largest in parentheses. What is left of ours lies within 3 "
    "pixels of the border, where versions of MATLAB differ; `inside` leaves those pixels out."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders of pairs, *_HR and *_LR")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--out", type=Path, help="folder for bicubic.json and bicubic.md")
    options = parser.parse_args()
    rows = [measure(folder, options.scale) for folder in options.folders]
    publish(options.out, "bicubic", "Bicubic down-sampling", NOTE, rows, as_table(rows))


def measure(folder: Path, scale: int) -> dict:
    """Differences of each image, by method."""
    differences = {"ours": [], "inside": [], "pillow": []}
    paths = sorted(folder.glob("*_HR.*"))
    for path in paths:
        target = Image.open(path)
        degraded = Image.open(path.with_name(path.name.replace("_HR.", "_LR.")))
        target = target.crop((0, 0, *(scale * side for side in degraded.size)))
        pillow = target.resize(degraded.size, Image.Resampling.BICUBIC)
        shape = (*degraded.size[::-1], -1)
        expected = np.asarray(degraded, float).reshape(shape)
        pixels = np.asarray(target).reshape(*target.size[::-1], -1)
        ours = np.abs(bicubic(pixels, 1 / scale) - expected)
        differences["ours"].append(ours.mean())
        differences["inside"].append(ours[3:-3, 3:-3].mean())
        differences["pillow"].append(np.abs(np.asarray(pillow).reshape(shape) - expected).mean())
    return {"folder": folder.name, "images": len(paths), **differences}


def as_table(rows: list[dict]) -> str:
    cells = [
        [
            row["folder"],
            row["images"],
            *(
                f"{np.mean(row[name]):.3f} ({min(row[name]):.3f} to {max(row[name]):.3f})"
                for name in ("ours", "inside", "pillow")
            ),
        ]
        for row in rows
    ]
    return table_of(["pairs", ">images", ">ours", ">ours, inside", ">Pillow"], cells)


if __name__ == "__main__":
    main()
