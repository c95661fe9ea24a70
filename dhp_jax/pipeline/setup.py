"""The task and the data of a configuration, and the network's arguments that follow from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dhp_jax.data.device_images import Rows
from dhp_jax.data.labelled import registry
from dhp_jax.data.photos import photographs
from dhp_jax.errors import ConfigError
from dhp_jax.files import user_cache
from dhp_jax.pipeline.memory import HOST_COPIES, count_workers, is_streamed
from dhp_jax.tasks import Classification, Denoising, Restoration, SuperResolution, Task, patches
from dhp_jax.tasks.metrics import WINDOW
from dhp_jax.tasks.task import Data

COST_SIZE = 128  # side of the photographs for which papers publish the cost of restoration


@dataclass(frozen=True)
class TaskSetup:
    """A task and its data.

    Attributes:
      task: the task.
      input_shape: of one example, for FLOPs.
      epoch: the number of training examples in an epoch.
      arguments: of the network, those that follow from the task and the data.
      notes: JSON values saved with a network, which `dhp_jax.predict` needs; see `dhp.save`.
      streamed: whether the data are read while they are used.
      checksums: of the data by split: "train", "test" and, if some are held out, "validation".
      read: `read("train")` gives the data of a split that the task takes examples from: a stream,
        or trees of NumPy arrays (`Rows` of images and their labels; `Patches`).
    """

    task: Task
    input_shape: tuple[int, int, int]
    epoch: int
    arguments: Mapping[str, Any]
    notes: Mapping[str, Any]
    streamed: bool
    checksums: Mapping[str, int]
    read: Callable[[str], Data]


def argument_fields(config: ConfigDict) -> dict[str, str]:
    """The field of the configuration that each derived argument of the network follows from."""
    shared = {"min_channels": "search.min_channels", "dtype": "dtype"}
    return shared | ARGUMENT_FIELDS[config.task.name]


def known_arguments(config: ConfigDict) -> dict[str, Any]:
    """The network's arguments that follow from the configuration without reading the data."""
    arguments = {"min_channels": config.search.min_channels, "dtype": config.dtype}
    for argument, field in ARGUMENT_FIELDS[config.task.name].items():
        if field.startswith("task."):
            arguments[argument] = config.task[field.removeprefix("task.")]
    return arguments


def set_up(config: ConfigDict, streamed: bool | None = None) -> TaskSetup:
    """Finds the data of a configuration that was checked, and sets up its task.

    Without `config.data.streamed`, `streamed` decides; if that is `None` too, the size of the data.

    Raises:
      ValueError: data that are not there, cannot be read, or do not suit the task.
    """
    return SETUPS[config.task.name](config, streamed)


def _classification(config: ConfigDict, streamed: bool | None) -> TaskSetup:
    channels = config.data.channels
    source = registry.load(
        config.data.name,
        config.data.dir,
        image_size=config.data.image_size,
        archive=config.data.archive,
        channels=channels,
    ).hold_out(config.data.validation)
    if config.batch_size > source.train_size:
        raise ConfigError(
            "config.batch_size",
            f"at most {source.train_size}, the number of training examples of {source.name!r}",
            config.batch_size,
        )
    side = min(source.image_shape[:2])
    for name in ("cutout", "crop_padding"):
        if (config.data[name] or 0) > side:
            expected = f"at most {side}, the side of the images of {source.name!r}"
            raise ConfigError(f"config.data.{name}", expected, config.data[name])
    needed = sum(map(source.bytes, source.splits))
    what = f"the images of {source.name!r}"
    streamed = is_streamed(config, streamed, needed, needed, what)
    batch_bytes = config.batch_size * source.bytes("train") // source.train_size
    workers = count_workers(config, batch_bytes) if streamed else 0

    def read(split: str) -> Data:
        if streamed:
            return source.stream(split, workers)
        images, labels = source.loaded(split)
        return Rows.of(images), labels

    return TaskSetup(
        task=Classification(
            source.mean,
            source.std,
            _or_default(config.data.crop_padding, source.crop_padding),
            _or_default(config.data.flip, source.flip),
            config.data.cutout,
            config.data.mixup,
            config.task.label_smoothing,
        ),
        input_shape=source.image_shape,
        epoch=source.train_size,
        arguments={"num_classes": source.num_classes, "channels": source.image_shape[-1]},
        notes={
            "task": config.task.name,
            "class_names": list(source.class_names),
            "mean": list(source.mean),
            "std": list(source.std),
            "peak": source.peak,
            **({} if source.resize is None else {"resize": source.resize}),
            **_counts({split: source.size(split) for split in source.splits}),
            **({} if channels is None else {"channels": channels}),
        },
        streamed=streamed,
        checksums={split: source.checksum(split) for split in source.splits},
        read=read,
    )


def _counts(sizes: Mapping[str, int]) -> dict[str, int]:
    """How many examples metrics are measured on, as notes of a network."""
    return {f"{split}_examples": size for split, size in sizes.items() if split != "train"}


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _super_resolution(config: ConfigDict, streamed: bool | None) -> TaskSetup:
    settings = config.task
    if settings.patch % settings.scale:
        raise ConfigError(
            "config.task.patch", f"a multiple of the scale, {settings.scale}", settings.patch
        )
    own = {"scale": settings.scale, "on_luminance": settings.psnr == "y"}
    task = SuperResolution(**_of_patches(settings), **own)
    arguments = {"scale": settings.scale, "channels": settings.channels}
    return _restoration(config, streamed, task, arguments)


def _denoising(config: ConfigDict, streamed: bool | None) -> TaskSetup:
    settings = config.task
    task = Denoising(**_of_patches(settings), sigma=settings.sigma, shave=settings.shave)
    return _restoration(config, streamed, task, {"channels": settings.channels})


def _of_patches(settings: ConfigDict) -> dict[str, Any]:
    """What both tasks of restoration are made of."""
    names = {name: settings[name] for name in ("patch", "tile", "overlap")}
    return names | {"loss_name": settings.loss}


def _restoration(
    config: ConfigDict, streamed: bool | None, task: Restoration, arguments: Mapping[str, Any]
) -> TaskSetup:
    settings = config.task
    source = photographs.load(
        config.data.name,
        config.data.dir,
        config.data.test_dir,
        channels=settings.channels,
        scale=task.scale,
        patch=task.patch,
        smallest_test=WINDOW + 2 * task.shave,
        validation=config.data.validation,
    )

    needed, what = source.bytes, "the training photographs"
    streamed = is_streamed(config, streamed, needed, HOST_COPIES * needed, what)
    patch_bytes = settings.channels * task.patch**2 * (2 if task.scale > 1 else 1)
    workers = count_workers(config, config.batch_size * patch_bytes) if streamed else 0

    def read(split: str) -> Data:
        if split == "train" and streamed:
            folder = config.data.cache or user_cache("photographs")
            return source.stream(task.patch, workers, Path(folder).expanduser())
        images = source.read(split)
        return patches(images, task.scale) if split == "train" else images

    return TaskSetup(
        task=task,
        input_shape=(COST_SIZE, COST_SIZE, settings.channels),
        epoch=settings.steps_per_epoch * config.batch_size,
        arguments=arguments,
        notes={"task": settings.name, **_counts(source.sizes)},
        streamed=streamed,
        checksums={split: source.checksum(split) for split in source.sizes},
        read=read,
    )


SETUPS: Mapping[str, Callable[[ConfigDict, bool | None], TaskSetup]] = {
    "classification": _classification,
    "super_resolution": _super_resolution,
    "denoising": _denoising,
}

ARGUMENT_FIELDS: Mapping[str, Mapping[str, str]] = {
    "classification": {"num_classes": "data.name", "channels": "data.name"},
    "super_resolution": {"scale": "task.scale", "channels": "task.channels"},
    "denoising": {"channels": "task.channels"},
}
