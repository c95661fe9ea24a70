"""The fields of a configuration that depend on its task: of the task itself, and of its data."""

from collections.abc import Mapping

from dhp_jax.config.rules import BOOLEAN, PATH, Field, Fields, integer, number, one_of, or_none
from dhp_jax.data.labelled import registry
from dhp_jax.data.photos import files as photos_files
from dhp_jax.tasks.restoration import LOSSES

MAX_SIDE = 10_000  # of images, in pixels
MAX_WORKERS = 1024
_NAMED = one_of(*registry.NAMES)
_NAMED_OR_OWN = _NAMED._replace(
    possible=lambda value: (
        _NAMED.possible(value) or (isinstance(value, str) and value in registry.OWN)
    )
)

_READING: Fields = {
    "validation": Field(
        0.0,
        number(0, 1, below=True),
        "share of the training examples that is held out, to choose the best epoch on; "
        "without one the test data choose it",
        absent=0.0,
    ),
    "streamed": Field(
        None,
        or_none(BOOLEAN, "for whether they do not fit on the device"),
        "whether data are read while they are used",
        bool,
    ),
    "workers": Field(
        None,
        or_none(integer(0, MAX_WORKERS), "for all cores but one"),
        "processes that read what is streamed",
        int,
    ),
}

_LABELLED: Fields = {
    "name": Field("cifar10", _NAMED_OR_OWN, "name of the data set, or one in registry.OWN"),
    "dir": Field(
        None,
        or_none(PATH, "for the default of tensorflow-datasets"),
        "folder of the data; that of image_folder has train/ and test/ or val/",
        str,
    ),
    "image_size": Field(
        None,
        or_none(integer(1, MAX_SIDE), "for the size of the data"),
        "height and width of images of folders and ImageNet",
        int,
    ),
    "channels": Field(
        None,
        or_none(one_of(1, 3), "for what the images have"),
        "of image_folder: 1 makes all images gray, 3 colour",
        int,
        absent=None,
    ),
    "archive": Field(
        None, or_none(PATH, "if there is none"), "zip or folder of Tiny-ImageNet", str
    ),
    "crop_padding": Field(
        None,
        or_none(integer(0, MAX_SIDE), "for what suits the data"),
        "pixels by which a random crop may lie outside",
        int,
    ),
    "flip": Field(
        None,
        or_none(BOOLEAN, "for what suits the data"),
        "whether images are mirrored at random",
        bool,
    ),
    "cutout": Field(
        0,
        integer(0, MAX_SIDE),
        "side of a square of each training image that is set to the mean colour; 0 for none",
        absent=0,
    ),
    "mixup": Field(
        0.0,
        number(0),
        "blends training images in shares from Beta(mixup, mixup); 0 for none",
        absent=0.0,
    ),
    **_READING,
}

_PHOTOGRAPHS: Fields = {
    "name": Field(
        "photographs", one_of(*photos_files.NAMES), "photographs of scikit-image, or of a folder"
    ),
    "dir": Field(
        None, or_none(PATH, "for embedded photographs"), "folder of the training data", str
    ),
    "test_dir": Field(
        None, or_none(PATH, "for embedded photographs"), "folder of the test data", str
    ),
    "cache": Field(
        None,
        or_none(PATH, "for the user's cache folder"),
        "folder for photographs that are streamed",
        str,
    ),
    **_READING,
}


def _patches(side: int, channels: int, steps: int, absent_loss: str) -> dict[str, Field]:
    """The fields of a task on patches of photographs."""
    return {
        "loss": Field(
            "l1",
            one_of(*LOSSES),
            "mean absolute (l1) or squared (l2) error of pixels, which training lowers",
            absent=absent_loss,
        ),
        "patch": Field(side, integer(1, MAX_SIDE), "side of the square of a training example"),
        "channels": Field(channels, one_of(1, 3), "1 for gray, 3 for color"),
        "steps_per_epoch": Field(steps, integer(1), "steps that count as an epoch"),
        "tile": Field(
            None,
            or_none(integer(1, MAX_SIDE), "to run test images whole"),
            "side of the tiles that larger test images are cut into",
            int,
        ),
        "overlap": Field(
            None,
            or_none(integer(0, MAX_SIDE), "for as far as the network sees"),
            "pixels of a tile's border that are not used",
            int,
        ),
    }


TASK_FIELDS: Mapping[str, Fields] = {
    "classification": {
        "task": {
            "label_smoothing": Field(
                0.0,
                number(0, 1, below=True),
                "share of the training targets that is spread evenly over all classes",
                absent=0.0,
            )
        },
        "data": _LABELLED,
    },
    "super_resolution": {
        "task": {
            **_patches(96, 3, 2013, "l1"),  # 32,208 patches in batches of 16
            "scale": Field(4, one_of(2, 3, 4), "how many times as large the output is"),
            "psnr": Field("y", one_of("y", "rgb"), "channels on which PSNR and SSIM are measured"),
        },
        "data": _PHOTOGRAPHS,
    },
    "denoising": {
        "task": {
            **_patches(64, 1, 10_000, "l2"),
            "sigma": Field(70.0, number(0), "standard deviation of the noise, of 255"),
            "shave": Field(
                1,
                integer(0, MAX_SIDE),
                "pixels of each border that PSNR and SSIM leave out",
                absent=0,
            ),
        },
        "data": _PHOTOGRAPHS,
    },
}
