"""Checks of the arguments that families share."""

from collections.abc import Callable, Iterable, Mapping
import functools
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


def check_fraction(argument: str, value: Any) -> None:
    """Raises a `ValueError` that names the argument unless its value is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ArgumentError(argument, "a share in [0, 1]", shown(value))


def check_dropout(argument: str, value: Any) -> None:
    """Raises a `ValueError` that names the argument unless its value is a share below 1."""
    check_fraction(argument, value)
    if value == 1:
        raise ArgumentError(argument, "a share below 1", shown(value))


STAGES = {2: (2,), 3: (3,), 4: (2, 2)}  # the pixel shuffles that make up each scale

CHECKS: Mapping[str, Callable[[str, Any], None]] = {  # of arguments that several families take
    "num_classes": check_positive_integer,
    "channels": check_positive_integer,
    "features": check_positive_integer,
    "embedding": functools.partial(check_positive_integer, most=64),
    "min_channels": check_positive_integer,
    "blocks": functools.partial(check_positive_integer, most=256),
    "scale": functools.partial(check_choice, choices=tuple(STAGES)),
    "initial_scale": functools.partial(check_positive, most=1000),
    "stem_stride": functools.partial(check_choice, choices=(1, 2)),
    "batch_norm": check_boolean,
    "head_activation": check_boolean,
    "relu6": check_boolean,
    "prune_upsampler": check_boolean,
    "prune_classifier": check_boolean,
    "classifier_keep": check_fraction,
    "dropout": check_dropout,
}


def check_arguments(arguments: Mapping[str, Any], *, widest: int) -> None:
    """Checks the arguments that a family has in common with others; names the first wrong one.

    Args:
      arguments: `locals()` of the family's constructor: its arguments by name. Those in `CHECKS`
        are checked, and `width`.
      widest: channels of the widest layer at width 1.
    """
    for argument, check in CHECKS.items():
        if argument in arguments:
            check(argument, arguments[argument])
    check_width(arguments["width"], widest)


def check_images(images: Array, channels: int) -> None:
    """Raises a `ValueError` unless `images` has the shape `(batch, height, width, channels)`."""
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ArgumentError("images", f"shape (batch, height, width, {channels})", images.shape)
