"""The data sets that a run can name."""

from collections.abc import Callable
import os

from dhp_jax.data.labelled import cifar, digits, image_folder, imagenet, tiny_imagenet
from dhp_jax.data.labelled.dataset import Source
from dhp_jax.errors import FieldError, in_row, shown

NAMES = ("digits", "cifar10", "cifar100", "tiny_imagenet", "imagenet2012", "image_folder")
OWN: dict[str, Callable[[], Source]] = {}  # of a program's own, by name; see docs/extending.md
USERS = {
    "dir": ("cifar10", "cifar100", "tiny_imagenet", "imagenet2012", "image_folder"),
    "image_size": ("imagenet2012", "image_folder"),
    "archive": ("tiny_imagenet",),
    "channels": ("image_folder",),
}


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    archive: str | os.PathLike | None = None,
    channels: int | None = None,
) -> Source:
    """Finds a data set; downloads CIFAR first if it is not there and a network is.

    Args:
      name: one of `NAMES`, or of `OWN`. "digits" (1,797 images of 8x8x1, pixels 0 .. 16) ships with
        scikit-learn and needs no network. "cifar10" and "cifar100" are downloaded.
        "tiny_imagenet" (64x64x3, 200 classes) is prepared from its zip, "imagenet2012" has to be
        prepared by TFDS beforehand; the validation images of both serve as test images.
        "image_folder" is `data_dir/split/label/*.png` (or another format that Pillow reads), for
        the splits "train" and "test" (or "val"); images are turned upright, as EXIF says.
      data_dir: the folder of "image_folder"; for others the TFDS directory that holds the data,
        `data_dir/cifar10/3.0.2/...`; TFDS's own default, `~/tensorflow_datasets`, if `None`.
        The binary version of CIFAR as its authors give it out, `data_dir/cifar-10-batches-bin` or
        `data_dir/cifar-100-binary`, comes first where it is.
      image_size: height and width in pixels; larger and smaller images are resized so that their
        centre fills it. "imagenet2012": 224 if `None`. "image_folder": if `None`, the images keep
        their size, which must be the same for all. Other data sets have the size they have.
      archive: `tiny-imagenet-200.zip`, or the folder extracted from it, from which
        "tiny_imagenet" is prepared if it is not yet; `data_dir/tiny-imagenet-200.zip` if `None`.
      channels: 1 makes all images of "image_folder" gray, 3 colour; `None` takes them as they are,
        all of one kind.

    Returns:
      The data set, whose images are read when asked for. The split of "digits" into 1,297
      training and 500 test images is always the same one.

    Raises:
      ValueError: `name` is none of `NAMES`; an argument is given to a data set that does not use
        it; the images of a folder differ in size or colour.
      DataNotFoundError: the data are neither in `data_dir` in a form that can be read nor can be
        downloaded (found out in seconds), an image is damaged, or scikit-learn is missing.

    Example:
      >>> images, labels = load("digits").read("train")
      >>> images.shape
      (1297, 8, 8, 1)
    """
    if name not in (*NAMES, *OWN):
        raise FieldError.unknown("data.name", name, (*NAMES, *OWN))
    given = {"dir": data_dir, "image_size": image_size, "archive": archive, "channels": channels}
    for argument, value in given.items():
        if value is not None and name not in USERS[argument]:
            raise FieldError(
                f"data.{argument}",
                detail=f"only {in_row(USERS[argument])} can use it, expected None for "
                f"{name}; got {shown(value)}",
            )
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise FieldError("data.image_size", "a positive integer", shown(image_size))
    if channels not in (None, 1, 3):
        raise FieldError("data.channels", "1 or 3", shown(channels))
    if name in OWN:
        return OWN[name]()
    match name:
        case "digits":
            return digits.load()
        case "tiny_imagenet":
            return tiny_imagenet.load(data_dir, archive)
        case "imagenet2012":
            return imagenet.load(data_dir, image_size)
        case "image_folder":
            return image_folder.load(data_dir, image_size, channels)
        case _:
            return cifar.load(name, data_dir)
