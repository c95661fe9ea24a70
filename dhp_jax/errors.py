"""Error messages for names that do not exist, and values as messages show them."""

from collections.abc import Iterable
import difflib
from typing import Any


class ConfigError(ValueError):
    """A field of a configuration that is unknown, missing, or has an impossible value."""


class DataNotFoundError(ValueError):
    """The data are not on this machine in a form that can be read, and cannot be fetched."""


LONGEST = 200  # characters of a value in a message


def unknown(argument: str, value: object, known: Iterable[str]) -> str:
    """One line that names the argument, the value, the nearest known name and all known ones."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(shown(value).strip("'").lower(), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return _one_line(f"{argument}: expected one of {', '.join(known)}; got {shown(value)}{hint}")


def shown(value: Any) -> str:
    """A value in one line that is not too long to read."""
    try:
        text = repr(value.to_dict() if hasattr(value, "to_dict") else value)
    except Exception:  # an integer of thousands of digits, lists too deep, a class of one's own
        return f"<{type(value).__name__} that cannot be shown>"
    text = _one_line(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 4 :]}"


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines())
