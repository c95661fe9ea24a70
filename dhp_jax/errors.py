"""Errors that say which argument or field is wrong, and values as messages show them."""

from collections.abc import Iterable, Mapping, Sequence
import difflib
import math
from numbers import Real
from typing import Any, Self

import jax
import numpy as np


class FieldError(ValueError):
    """A value that is refused; its text is one line, `field: expected ...; got ...`.

    Args:
      field: the argument, or the field of a configuration, such as "config.target".
      expected: what is possible, in words.
      got: what was given, as the line shows it; see `shown`.
      detail: all words after the name of the field, where the line reads otherwise.
    """

    JOIN = "; got "

    def __init__(self, field: str, expected: str = "", got: object = "", detail: str = ""):
        super().__init__(field, expected, got, detail)  # so that processes can hand it on
        self.field, self.expected, self.got = field, expected, got
        self.detail = detail or f"expected {expected}{self.JOIN}{got}"

    def __str__(self) -> str:
        return f"{self.field}: {self.detail}"

    @classmethod
    def unknown(
        cls, field: str, value: object, known: Iterable[str], lead: str = "", hint: str = ""
    ) -> Self:
        """An error of a name that does not exist, with all known names and the nearest of them.

        `lead` are words before "expected", and `hint` words at the end.
        """
        known = sorted(map(str, known))
        expected = f"one of {', '.join(known)}"
        line = f"{lead}expected {expected}; got {shown(value)}{nearest(value, known)}{hint}"
        return cls(_one_line(field), expected, shown(value), _one_line(line))

    @classmethod
    def of(cls, field: str, error: "FieldError", hint: str = "") -> Self:
        """What another error says, of a field that has another name here."""
        return cls(field, error.expected, error.got, error.detail + hint)


class ArgumentError(FieldError):
    """An argument of a function that has an impossible value."""

    JOIN = ", got "


class ConfigError(FieldError):
    """A field of a configuration that is unknown, missing, or has an impossible value."""


class DataNotFoundError(FieldError):
    """The data are not on this machine in a form that can be read, and cannot be fetched."""


class NonFiniteError(FloatingPointError):
    """A loss, a latent or a metric that is not finite ended training.

    `detail` tells what is not finite, and when; `tested` whether a test found it, after steps that
    were finite.
    """

    def __init__(self, phase: str, detail: str, tested: bool = False):
        super().__init__(phase, detail, tested)
        self.phase, self.detail, self.tested = phase, detail, tested

    def __str__(self) -> str:
        return f"{self.phase}: {self.detail}"


def check_integer(argument: str, value: Any, least: int = 1) -> None:
    """Raises an `ArgumentError` unless a value is an integer, or one of NumPy, of at least that."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ArgumentError(argument, expected, shown(value))


def check_at_least_zero(argument: str, value: Any) -> None:
    """Raises an `ArgumentError` unless a value is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ArgumentError(argument, "a number >= 0", shown(value))


def check_counts(argument: str, counts: Any, most: Mapping[str, int]) -> None:
    """Raises an `ArgumentError` unless each name has a whole number from 0 to its most.

    Arrays of such numbers are fine too; of those that JAX traces only the dtype is known.
    """
    if not isinstance(counts, Mapping) or counts.keys() != most.keys():
        got = shown(counts)
        if isinstance(counts, Mapping):
            name = min(counts.keys() ^ most.keys(), key=str)
            got = f"none for {name!r}" if name in most else f"one for {shown(name)}"
        raise ArgumentError(argument, f"one for each of {shown(sorted(most))}", got)
    for name, count in counts.items():
        if type(count) is int and 0 <= count <= most[name]:
            continue
        known = not isinstance(count, jax.core.Tracer)
        array = np.asarray(count) if known else count
        fits = np.issubdtype(array.dtype, np.integer)
        if known and fits:
            fits = ((array >= 0) & (array <= most[name])).all()
        if not fits:
            expected = f"whole numbers from 0 to {most[name]}"
            raise ArgumentError(f"{argument}[{name!r}]", expected, shown(count))


MAX_SHOWN = 200  # characters of a value in a message


def shown(value: Any) -> str:
    """A value in one line that is not too long to read."""
    try:
        text = repr(value.to_dict() if hasattr(value, "to_dict") else value)
    except Exception:  # an integer of thousands of digits, lists too deep, a class of one's own
        return f"<{type(value).__name__} that cannot be shown>"
    text = _one_line(text)
    if len(text) <= MAX_SHOWN:
        return text
    return f"{text[: MAX_SHOWN // 2]}...{text[-MAX_SHOWN // 4 :]}"


def nearest(value: object, known: Iterable[str]) -> str:
    """Asks, at the end of a message, whether the known name most like a value was meant."""
    near = difflib.get_close_matches(shown(value).strip("'").lower(), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def in_row(names: Sequence[str]) -> str:
    """Names one after the other: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def some_of(names: Sequence[object], most: int = 3) -> str:
    """The first of some names, and how many there are more: "a, b, c and 4 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def first_line(error: BaseException) -> str:
    """What an error says in its first line; its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines())
