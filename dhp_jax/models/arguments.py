"""Checks of the arguments that families share."""

from collections.abc import Iterable
import math
from typing import Any

from jaxtyping import Array

from dhp_jax.errors import ArgumentError, shown

MAX_CHANNELS = 32_768  # of a layer; one with as many on both sides has billions of parameters


def check_positive_integer(argument: str, value: Any, most: int = MAX_CHANNELS) -> None:
    """Raises a `ValueError` that names the argument unless its value is an integer, 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(argument, "a positive integer", shown(value))
    if value > most:
        raise ArgumentError(argument, f"at most {most}", shown(value))


def check_positive(argument: str, value: Any, most: float = math.inf) -> None:
    """Raises a `ValueError` that names the argument unless its value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ArgumentError(argument, "a positive number", shown(value))
    if value > most:
        raise ArgumentError(argument, f"at most {most:g}", shown(value))


def check_width(width: Any, widest: int) -> None:
    """Raises a `ValueError` unless `width` is a number above 0 that `widest` channels can bear."""
    check_positive("width", width)
    if width > MAX_CHANNELS / widest:
        raise ArgumentError(
            "width",
            f"at most {MAX_CHANNELS / widest:g}, for layers of no more than "
            f"{MAX_CHANNELS} channels",
            shown(width),
        )


def check_choice(argument: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises a `ValueError` that names the argument unless its value is one of some."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        expected = ", ".join(map(repr, choices))
        raise ArgumentError(argument, f"one of {expected}", shown(value))


def check_boolean(argument: str, value: Any) -> None:
    """Raises a `ValueError` that names the argument unless its value is True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(argument, "True or False", shown(value))


def check_images(images: Array, channels: int) -> None:
    """Raises a `ValueError` unless `images` has the shape `(batch, height, width, channels)`."""
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ArgumentError("images", f"shape (batch, height, width, {channels})", images.shape)


STAGES = {2: (2,), 3: (3,), 4: (2, 2)}  # the pixel shuffles that make up each scale


MAX_BLOCKS = 256


def check_arguments(
    scale: int,
    blocks: int,
    features: int,
    channels: int,
    width: float,
    prune_upsampler: bool,
    min_channels: int,
) -> None:
    """Raises a `ValueError` that names the first argument of a family that makes no network."""
    check_choice("scale", scale, tuple(STAGES))
    check_positive_integer("blocks", blocks, MAX_BLOCKS)
    check_positive_integer("features", features)
    check_positive_integer("channels", channels)
    check_positive_integer("min_channels", min_channels)
    check_width(width, features)
    check_boolean("prune_upsampler", prune_upsampler)
