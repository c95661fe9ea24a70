"""What a field is, and rules: which values it may have, and how an error says so."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
import os
from pathlib import Path
from typing import Any, NamedTuple

from dhp_jax.budgets.rounding import AUTO, parse_multiples
from dhp_jax.models.arguments import MAX_CHANNELS

MAX_COUNT = 1_000_000  # of what is counted, if the field has no limit of its own
MAX_NUMBER = 1e30  # of other numbers; float32 ends at 3e38
MAX_TARGETS = 20
MAX_DROPS = 100  # each makes the compiled step larger
NEVER: Any = object()  # of `Field.absent`


class Rule(NamedTuple):
    """Which values a field may have.

    Attributes:
      possible: whether a value may be one.
      expected: what an error says was expected.
      or_none: what `None` stands for where a field need not be given, such as "for all cores".
    """

    possible: Callable[[Any], bool]
    expected: str
    or_none: str = ""

    def allows(self, value: Any) -> bool:
        """Whether the field may have this value."""
        return (bool(self.or_none) and value is None) or self.possible(value)

    def __str__(self) -> str:
        return self.expected + (f", or None {self.or_none}" if self.or_none else "")


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
      default: its value if nothing else is said; some tasks have another one, see `RECIPES`.
      rule: which values it may have.
      text: what it is, in one line.
      kind: the type that values of the command line become, where the default does not tell.
      absent: what a stored configuration means that lacks the field, because its run was begun
        earlier; `NEVER` if none lacks it.
    """

    default: Any
    rule: Rule
    text: str
    kind: type | None = None
    absent: Any = NEVER


Fields = Mapping[str, "Field | Fields"]  # by name; groups hold fields of their own


def number(
    low: float, high: float = MAX_NUMBER, *, above: bool = False, below: bool = False
) -> Rule:
    """A number from `low` to `high`; `above` and `below` leave out the ends."""
    interval = f"a number {'>' if above else '>='} {low:g} and {'<' if below else '<='} {high:g}"

    def possible(value: Any) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (value > low if above else value >= low)
            and (value < high if below else value <= high)
        )

    return Rule(possible, interval)


def integer(low: int, high: int = MAX_COUNT) -> Rule:
    """An integer from `low` to `high`."""

    def possible(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return Rule(possible, f"an integer >= {low} and <= {high}")


def one_of(*values: str | int) -> Rule:
    """One of some values, of the same type."""

    def possible(value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in values)

    return Rule(possible, f"one of {', '.join(map(str, values))}")


def or_none(rule: Rule, meaning: str) -> Rule:
    """The same rule of a field that may be `None` too, with what that stands for."""
    return rule._replace(or_none=meaning)


def _is_path(value: Any) -> bool:
    """Whether a value is a path that a file system can be asked for."""
    try:
        os.stat(Path(value).expanduser())
    except (FileNotFoundError, NotADirectoryError):
        return True
    except Exception:  # of a type or form that is none, too long, the home of nobody, forbidden
        return False
    return True


def _are_shares(value: Any) -> bool:
    """Whether a value is shares, each smaller than the one before."""
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_TARGETS:
        return False
    return all(map(SHARE.allows, value)) and list(value) == sorted(set(value), reverse=True)


def _is_multiple(value: Any) -> bool:
    if not isinstance(value, str):
        return integer(1, MAX_CHANNELS).allows(value)
    try:
        multiples = {} if value == AUTO else parse_multiples(value)
        return all(number <= MAX_CHANNELS for number in multiples.values())
    except ValueError:
        return False


def _are_epochs(value: Any) -> bool:
    few = isinstance(value, list | tuple) and len(value) <= MAX_DROPS
    epoch = number(0, MAX_COUNT)
    return few and all(map(epoch.allows, value)) and list(value) == sorted(set(value))


PATH = Rule(_is_path, "a path")
WHOLE_EPOCHS = integer(1)._replace(expected=f"{integer(1)} (max_steps is for a part of one)")
BOOLEAN = Rule(lambda value: isinstance(value, bool), "True or False")
SHARE = number(0, 1, above=True)

SHARES = Rule(
    _are_shares,
    f"up to {MAX_TARGETS} shares > 0 and <= 1 in descending order, such as (0.75, 0.5)",
)

MULTIPLE = Rule(
    _is_multiple,
    f"{integer(1, MAX_CHANNELS)}, auto, or numbers by latent, such as stages.*:8,head:4",
)

EPOCHS = Rule(_are_epochs, f"up to {MAX_DROPS} epochs in ascending order, such as (150, 225)")
DEVICES = Rule(
    lambda value: (type(value) is int and value == -1) or integer(1).allows(value),
    f"an integer >= 1 and <= {MAX_COUNT}, or -1 for all devices",
)
