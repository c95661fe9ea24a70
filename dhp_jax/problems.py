"""What a configuration asks for: a task on its data, and what of the network follows from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dhp_jax import durable
from dhp_jax.config import ConfigError
from dhp_jax.data import photographs, sources
from dhp_jax.data.decode import memory_available
from dhp_jax.tasks import Classification, Denoising, Restoration, SuperResolution, Task, patches
from dhp_jax.tasks.metrics import WINDOW
from dhp_jax.tasks.task import Data

SHARE = 0.5  # of the memory that is free, for data on the device
COST_SIZE = 128  # side of the photographs for which costs of restoration networks are published


@dataclass(frozen=True)
class Problem:
    """A task on its data.

    Attributes:
      task: the task.
      input_shape: of one example, for FLOPs.
      epoch: how many training examples make an epoch.
      arguments: of the network.
      notes: JSON values that `dhp_jax.predict` needs of a network, see `dhp_jax.save`.
      read: `read("train")` and `read("test")` give the data that the task reads examples from.
    """

    task: Task
    input_shape: tuple[int, int, int]
    epoch: int
    arguments: Mapping[str, Any]
    notes: Mapping[str, Any]
    read: Callable[[str], Data]


def origins(config: ConfigDict) -> dict[str, str]:
    """The field that each argument of the network follows from that is not given itself."""
    shared = {"min_channels": "search.min_channels", "dtype": "dtype"}
    return shared | ORIGINS[config.task.name]


def known_arguments(config: ConfigDict) -> dict[str, Any]:
    """The network's arguments that follow from the configuration without a look at the data."""
    arguments = {"min_channels": config.search.min_channels, "dtype": config.dtype}
    for argument, field in ORIGINS[config.task.name].items():
        if field.startswith("task."):
            arguments[argument] = config.task[field.removeprefix("task.")]
    return arguments


def problem(config: ConfigDict) -> Problem:
    """Finds the data of a configuration, and sets up its task.

    Args:
      config: one that `dhp_jax.config.check` has found good.

    Raises:
      ValueError: data that are not there, cannot be read, or do not suit the task.
    """
    return PROBLEMS[config.task.name](config)


def _classification(config: ConfigDict) -> Problem:
    source = sources.load(
        config.data.name,
        config.data.dir,
        image_size=config.data.image_size,
        archive=config.data.archive,
    )
    if config.batch_size > source.train_size:
        raise ConfigError(
            f"config.batch_size: expected at most {source.train_size}, the number of training "
            f"examples of {source.name!r}; got {config.batch_size}"
        )
    streamed = {
        split: _is_streamed(config, source.bytes(split), f"the {split} images of {source.name!r}")
        for split in ("train", "test")
    }

    def read(split: str) -> Data:
        if streamed[split]:
            return source.stream(split, _workers(config))
        return jax.device_put(source.read(split))

    return Problem(
        task=Classification(
            source.mean,
            source.std,
            _given(config.data.crop_padding, source.crop_padding),
            _given(config.data.flip, source.flip),
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
        },
        read=read,
    )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _is_streamed(config: ConfigDict, needed: int, what: str) -> bool:
    """Whether data are read while they are used, or are on the device as a whole.

    Args:
      config: says which, or leaves it to their size.
      needed: bytes that they would take.
      what: an error calls them.
    """
    room = int(SHARE * free_memory())
    if config.data.streamed is False and needed > room:
        raise ConfigError(
            f"config.data.streamed: expected True for {what}, which take {needed:,} bytes; at most "
            f"{room:,} are for data on the device; got False"
        )
    return needed > room if config.data.streamed is None else config.data.streamed


def free_memory() -> int:
    """Bytes that the device has left; those of the host where that is the device."""
    found = jax.local_devices()[0].memory_stats()
    if not found or "bytes_limit" not in found:
        return memory_available()
    return found["bytes_limit"] - found["bytes_in_use"]


def _workers(config: ConfigDict) -> int:
    return _given(config.data.workers, max(1, (os.cpu_count() or 1) - 1))


def _super_resolution(config: ConfigDict) -> Problem:
    settings = config.task
    if settings.patch % settings.scale:
        raise ConfigError(
            f"config.task.patch: expected a multiple of the scale, {settings.scale}; "
            f"got {settings.patch}"
        )
    task = SuperResolution(
        patch=settings.patch,
        scale=settings.scale,
        tile=settings.tile,
        overlap=settings.overlap,
        on_luminance=settings.psnr == "y",
    )
    return _restoration(config, task, {"scale": settings.scale, "channels": settings.channels})


def _denoising(config: ConfigDict) -> Problem:
    settings = config.task
    task = Denoising(
        patch=settings.patch,
        sigma=settings.sigma,
        tile=settings.tile,
        overlap=settings.overlap,
    )
    return _restoration(config, task, {"channels": settings.channels})


def _restoration(config: ConfigDict, task: Restoration, arguments: Mapping[str, Any]) -> Problem:
    settings = config.task
    source = photographs.load(
        config.data.name,
        config.data.dir,
        config.data.test_dir,
        channels=settings.channels,
        scale=task.scale,
        patch=task.patch,
        smallest_test=WINDOW + 2 * task.shave,
    )

    streamed = _is_streamed(config, source.bytes, "the training photographs")

    def read(split: str) -> Data:
        if split == "train" and streamed:
            cache = Path(config.data.cache).expanduser() if config.data.cache else None
            return source.stream(
                task.patch, _workers(config), cache or durable.user_cache("photographs")
            )
        images = source.read(split)
        return jax.device_put(patches(images, task.scale)) if split == "train" else images

    return Problem(
        task=task,
        input_shape=(COST_SIZE, COST_SIZE, settings.channels),
        epoch=settings.steps_per_epoch * config.batch_size,
        arguments=arguments,
        notes={"task": settings.name},
        read=read,
    )


PROBLEMS: Mapping[str, Callable[[ConfigDict], Problem]] = {
    "classification": _classification,
    "super_resolution": _super_resolution,
    "denoising": _denoising,
}
ORIGINS: Mapping[str, Mapping[str, str]] = {
    "classification": {"num_classes": "data.name", "channels": "data.name"},
    "super_resolution": {"scale": "task.scale", "channels": "task.channels"},
    "denoising": {"channels": "task.channels"},
}
