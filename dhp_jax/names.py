"""Error messages for names that do not exist."""

from collections.abc import Iterable
import difflib


def unknown(argument: str, value: object, known: Iterable[str]) -> str:
    """One line that names the argument, the value, the nearest known name and all known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(str(value).lower(), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{argument}: expected one of {', '.join(known)}; got {value!r}{hint}"
