"""ImageNet (ILSVRC 2012) as tensorflow-datasets prepares it, without TensorFlow."""

import functools
import os

from dhp_jax.activity import quiet
from dhp_jax.data.decode import decode
from dhp_jax.data.labelled.dataset import Source
from dhp_jax.data.labelled.tfds import DEFAULT_CONFIG, directory, is_prepared, source
from dhp_jax.errors import DataNotFoundError

# Of red, green and blue in the training images, pixels 0 .. 255.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
DEFAULT_IMAGE_SIZE = 224


def load(data_dir: str | os.PathLike | None = None, image_size: int | None = None) -> Source:
    """Finds prepared data; see `dhp_jax.data.load`.

    As is usual, the shorter side is resized to 8/7 of `image_size`, 256 for 224, before the
    centre is cut out. The test images are TFDS's split "validation": ImageNet's own test images
    have no public labels.
    """
    import tensorflow_datasets as tfds  # here, because it is slow and "digits" does without

    size = DEFAULT_IMAGE_SIZE if image_size is None else image_size
    with quiet("absl"):
        builder = tfds.builder("imagenet2012", data_dir=directory(data_dir))
    if not is_prepared(builder):
        raise DataNotFoundError(
            "data.dir",
            detail=f"found no prepared {builder.name} in {builder.data_dir}; prepare it "
            "on a machine with TensorFlow, from ILSVRC2012_img_train.tar and "
            "ILSVRC2012_img_val.tar (downloaded by hand from "
            "https://image-net.org/download-images) in downloads/manual, and copy the folder: "
            'python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{builder.name}', data_dir='.')"
            ".download_and_prepare(file_format='array_record')\"; "
            f"or try {DEFAULT_CONFIG}, whose images come with scikit-learn",
        )
    resize = size * 256 // 224
    return source(
        builder,
        functools.partial(decode, mode="RGB", resize=resize, crop=size),
        resize=resize,
        image_shape=(size, size, 3),
        test="validation",
        threads=None,
        mean=MEAN,
        std=STD,
        crop_padding=size // 8,
        flip=True,
    )
