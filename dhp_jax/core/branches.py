"""Branches of a program, of which one runs: what it costs is what the costliest of them costs."""

from collections.abc import Callable, Collection, Mapping
import functools
from typing import Any, NamedTuple

Branch = tuple[Any, ...]  # where the operation that branches is, then the number of the branch
Place = tuple[Branch, ...]  # the branches that something stands in, from the outermost on


class Part(NamedTuple):
    """A program, or a branch: what runs together, and of each choice the branches."""

    place: Place
    choices: tuple[tuple["Part", ...], ...]

    @classmethod
    def of(cls, places: Collection[Place], place: Place = ()) -> "Part":
        """The part at a place, with the branches that other places name."""
        depth, choices = len(place), dict[Branch, dict[Branch, "Part"]]()
        for inner in places:
            if len(inner) > depth and inner[:depth] == place:
                branch = inner[depth]
                made = choices.setdefault(branch[:-1], {})
                if branch not in made:
                    made[branch] = cls.of(places, (*place, branch))
        return cls(place, tuple(tuple(made.values()) for made in choices.values()))

    def total(self, at: Mapping[Place, Any], of_branches: Callable[[Any, Any], Any]) -> Any:
        """What there is at its place, and in each choice.

        `at` has by place a number or an array, 0 if none; `of_branches` tells of two branches what
        both are, such as `max`.
        """
        total = at.get(self.place, 0)
        for branches in self.choices:
            each = (branch.total(at, of_branches) for branch in branches)
            total = total + functools.reduce(of_branches, each)
        return total

    def costliest(self, at: Mapping[Place, int]) -> set[Place]:
        """Its place, and those in the costliest branch of each choice, the first of equal ones."""
        found = {self.place}
        for branches in self.choices:
            found |= max(branches, key=lambda branch: branch.total(at, max)).costliest(at)
        return found
