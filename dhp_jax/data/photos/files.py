"""Finds photographs in folders and matches them with their low-resolution images."""

from collections.abc import Iterator
import importlib.util
import os
from pathlib import Path
import re
from typing import NamedTuple

from dhp_jax.data.decode import SUFFIXES, read_header, tell_left_out
from dhp_jax.errors import DataNotFoundError, FieldError, shown

NAMES = ("photographs", "photo_folder")
MARKS = ("HR", "LR")  # of the two images of a pair, in upper or lower case

# Files in skimage/data. The stereo pair motorcycle_left, motorcycle_right is not divided.
SHIPPED = {
    "train": (
        "astronaut.png",
        "ihc.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "rocket.jpg",
    ),
    "test": ("chelsea.png", "coffee.png"),
}

SHIPPED_GRAY = {
    "train": ("brick.png", "coins.png", "grass.png", "gravel.png"),
    "test": ("camera.png",),
}


class PhotoFile(NamedTuple):
    """A photograph that is not decoded yet, and the argument that led to it.

    `size` is height and width once it is turned upright.
    """

    argument: str
    name: str
    path: Path
    size: tuple[int, int]
    gray: bool
    low: Path | None

    @property
    def paths(self) -> list[Path]:
        """Its file, and that of its low-resolution image if there is one."""
        return [self.path] if self.low is None else [self.path, self.low]


def find_shipped(channels: int) -> dict[str, list[PhotoFile]]:
    """The photographs of scikit-image; those that are gray only if that is asked for."""
    package = importlib.util.find_spec("skimage")  # no import: that takes a second
    if package is None:
        raise DataNotFoundError(
            "data.name",
            detail="'photographs' needs scikit-image, which is not installed; "
            'run: pip install "dhp_jax[experiments]"',
        )
    folder = Path(package.origin).parent / "data"
    return {
        split: [
            _photo_file("data.name", Path(name).stem, folder / name)
            for name in SHIPPED[split] + (SHIPPED_GRAY[split] if channels == 1 else ())
        ]
        for split in SHIPPED
    }


def find_in_folder(argument: str, folder: str | os.PathLike | None, scale: int) -> list[PhotoFile]:
    """The photographs in a folder, with their low-resolution images if it holds pairs."""
    if folder is None:
        raise FieldError(argument, detail="'photo_folder' expects a folder of images; got None")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataNotFoundError(argument, "a folder of images", shown(str(folder)))
    try:
        images = list(_images(folder))
    except OSError as error:
        raise DataNotFoundError(argument, detail=f"cannot read {str(folder)!r}: {error}") from error
    targets = [(name, path) for name, mark, path in images if mark != "LR"]
    lows = [(name, path) for name, mark, path in images if mark == "LR"]
    if scale > 1 and any(mark for _, mark, _ in images):
        counterparts = _match(argument, targets, lows, scale)
    else:
        counterparts = [None] * len(targets)
    if not targets:
        raise DataNotFoundError(
            argument,
            detail=f"expected images ({', '.join(SUFFIXES)}); found none in {str(folder)!r}",
        )
    place = "right in the folder, or in its HR and LR"
    tell_left_out(argument, [folder], [path for _, _, path in images], place)
    return [
        _photo_file(argument, name, path, low)
        for (name, path), low in zip(targets, counterparts, strict=True)
    ]


def _images(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """The images of a folder: name without mark, mark ("HR", "LR" or none) and path."""
    marked = [part for part in folder.iterdir() if part.name.upper() in MARKS and part.is_dir()]
    for part in (folder, *sorted(marked, key=lambda part: (part.name.upper(), part.name))):
        part_mark = "" if part is folder else part.name
        for path in sorted(part.iterdir()):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                name, mark = re.fullmatch(r"(.*?)(?:_(HR|LR))?", path.stem, re.IGNORECASE).groups()
                yield name, (mark or part_mark).upper(), path


def _match(
    argument: str, targets: list[tuple[str, Path]], lows: list[tuple[str, Path]], scale: int
) -> list[Path]:
    """The low-resolution image of every target; none may be missing or left."""
    check_names(argument, "photograph", targets)
    check_names(argument, "low-resolution image", lows)
    lows, matched = dict(lows), []
    for name, path in targets:
        low = lows.pop(name, None) or lows.pop(f"{name}x{scale}", None)
        if low is None:
            raise DataNotFoundError(
                argument,
                detail=f"expected a low-resolution image to {str(path)!r}, *_LR beside *_HR or the "
                f"same name (or with x{scale}) in LR/; found none",
            )
        matched.append(low)
    for low in lows.values():
        raise DataNotFoundError(
            argument,
            detail=f"expected a photograph to the low-resolution {str(low)!r}; found none",
        )
    return matched


def _photo_file(argument: str, name: str, path: Path, low: Path | None = None) -> PhotoFile:
    gray, size = read_header(path, argument)
    return PhotoFile(argument, name, path, size, gray, low)


def check_color(files: list[PhotoFile]) -> None:
    """Raises if a photograph is gray."""
    gray, color = ([file for file in files if file.gray is value] for value in (True, False))
    if gray:
        mixed = f", and {str(color[0].path)!r} is in color" if color else ""
        raise FieldError(
            gray[0].argument,
            detail=f"expected color photographs for 3 channels; {str(gray[0].path)!r} is "
            f"gray{mixed}; task.channels=1 makes all of them gray",
        )


def check_sizes(files: list[PhotoFile], scale: int, least: int, what: str) -> None:
    """Raises if a side of a target has fewer than `least` pixels."""
    for file in files:
        if min(target_size(file, scale)) < least:
            raise FieldError(
                file.argument,
                detail=f"expected photographs no smaller than {what}, {least}x{least}; got "
                f"{str(file.path)!r} of {_pixels(file.size)}",
            )


def check_names(argument: str, what: str, files: list[tuple[str, Path]]) -> None:
    """Raises if two files have one name, whatever their marks and suffixes."""
    seen: dict[str, Path] = {}
    for name, path in files:
        if name in seen:
            raise FieldError(
                argument,
                detail=f"expected one {what} of the name {name!r}, got {str(seen[name])!r} and "
                f"{str(path)!r}",
            )
        seen[name] = path


def check_pair(file: PhotoFile, channels: int, scale: int) -> None:
    """Raises unless the two images of a pair suit each other in size and color."""
    if file.low is None:
        return
    gray, size = read_header(file.low, file.argument)
    target = target_size(file, scale)
    expected = (target[0] // scale, target[1] // scale)
    if size != expected:
        raise FieldError(
            file.argument,
            f"{str(file.low)!r} of {_pixels(expected)}, for a scale of {scale} to "
            f"{str(file.path)!r} of {_pixels(file.size)}",
            _pixels(size),
        )
    if channels == 3 and gray != file.gray:
        raise FieldError(
            file.argument,
            detail=f"expected {str(file.low)!r} {_kind(file.gray)}, as {str(file.path)!r} is; "
            f"got it {_kind(gray)}",
        )


def _kind(gray: bool) -> str:
    return "in gray" if gray else "in color"


def target_size(file: PhotoFile, scale: int) -> tuple[int, int]:
    """Height and width, cropped to multiples of the scale."""
    height, width = file.size
    return height - height % scale, width - width % scale


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"
