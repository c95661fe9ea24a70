"""The equations that a traced program states between the axes of its arrays.

`Flow.run` goes through a program once. For every operation a rule (`dhp_jax.tracing.rules`) says
which positions of its inputs and outputs survive together. What no rule understands makes all that
it reads stay, with its name and the line of the user's code.
"""

from collections.abc import Callable, Hashable, Sequence
import functools
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn
import numpy as np

from dhp_jax.tracing.programs import Context, inner_programs, is_literal, shape_of, where
from dhp_jax.tracing.terms import TRUE, Axis, Terms, dead_terms

Axes = tuple[Axis, ...]
Rule = Callable[["Flow", JaxprEqn, list[Axes], Context], list[Axes]]
RULES: dict[str, Rule] = {}
STAYS = " meets an axis that stays"


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers what states the equations of operations, by their names.

    A rule is a function of the flow, the operation, the axes of what it reads, and the context of
    programs within it. It returns the axes of what the operation writes.
    """

    def register(function: Rule) -> Rule:
        for name in primitives:
            RULES[name] = function
        return function

    return register


class Flow:
    """Terms for every axis of every array in programs.

    Attributes:
      terms: the store of terms.
      at: by context and variable the axes of what it holds.
      constant: contexts and variables of what neither arrays nor inputs change.
      unknown: operations without a rule that read positions which could go, with their lines.
      sums, choices, draws: by atom the line of a sum, of a maximum or minimum, or of random numbers
        in evaluation, over it.
    """

    def __init__(self):
        self.terms = Terms()
        self.at: dict[tuple[Context, Any], Axes] = {}
        self.constant: set[tuple[Context, Any]] = set()
        self.unknown: dict[str, str] = {}
        self.sums: dict[int, str] = {}
        self.choices: dict[int, str] = {}
        self.draws: dict[int, str] = {}
        self._fresh: dict[Hashable, np.ndarray] = {}
        self._within: list[JaxprEqn] = []  # the operation at hand, after those that contain it
        self._dead: tuple[Any, np.ndarray] | None = None
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def fresh(self, key: Hashable, number: int) -> np.ndarray:
        """New atoms, the same ones for a key in every pass."""
        if key not in self._fresh:
            self._fresh[key] = self.terms.new(number)
        return self._fresh[key]

    def run(self, jaxpr: Jaxpr, inputs: Sequence[Axes], context: Context = ()) -> list[Axes]:
        """States the equations of a program once; returns the axes of its outputs."""

        def read(atom: Any) -> Axes:
            if is_literal(atom):
                return (None,) * len(shape_of(atom))
            return self.at[context, atom]

        for variable, axes in zip(jaxpr.invars, inputs, strict=True):
            self.at[context, variable] = tuple(axes)
        for variable in jaxpr.constvars:
            self.at[context, variable] = (None,) * len(shape_of(variable))
            self.constant.add((context, variable))
        for number, eqn in enumerate(jaxpr.eqns):
            inputs = [read(atom) for atom in eqn.invars]
            self._follow_constants(eqn, context, number)
            state = RULES.get(eqn.primitive.name, _not_understood)
            self._within.append(eqn)
            outputs = state(self, eqn, inputs, (*context, number))
            self._within.pop()
            for variable, axes in zip(eqn.outvars, outputs, strict=True):
                sizes = shape_of(variable)  # what has one position broadcasts, and has no term
                self.at[context, variable] = tuple(
                    None if size == 1 else axis for axis, size in zip(axes, sizes, strict=True)
                )
        return [read(atom) for atom in jaxpr.outvars]

    def place(self) -> str:
        """File and line of the user's code that the operation at hand comes from."""
        return next(filter(None, map(where, reversed(self._within))), "")

    def is_constant(self, context: Context, atom: Any) -> bool:
        """Whether what an operation reads is the same for all arrays and inputs."""
        return is_literal(atom) or (context, atom) in self.constant

    def _follow_constants(self, eqn: JaxprEqn, context: Context, number: int) -> None:
        """Notes what an operation writes, and the programs within it read, if it is constant."""
        known = [self.is_constant(context, atom) for atom in eqn.invars]
        if all(known):
            self.constant.update((context, variable) for variable in eqn.outvars)
        for inner_context, inner in inner_programs(eqn, (*context, number)):
            # What they read is the last that the operation reads.
            for variable, constant in zip(inner.invars[::-1], known[::-1], strict=False):
                if constant:
                    self.constant.add((inner_context, variable))

    def meet(self, left: Axis, right: Axis, eqn: JaxprEqn) -> Axis:
        """Two axes that meet position by position in an operation."""
        roots = [None if axis is None else self.terms.roots(axis) for axis in (left, right)]
        if np.array_equal(*roots):
            return left  # most often; where the code stands is not looked up for these
        how = "" if all(own is not None and own.all() for own in roots) else STAYS
        return self.terms.equal_axes(left, right, self._told(eqn, how))

    def freeze(self, axis: Axis, eqn: JaxprEqn, why: str) -> None:
        """An axis that must stay because of an operation."""
        self.terms.freeze_axis(axis, self._told(eqn, f" {why}"))

    def note(self, places: dict[int, str], axis: Axis) -> None:
        """Notes the line of the operation at hand, which goes over an axis."""
        if atoms := self.atoms_of(axis):
            place = self.place()
            for atom in atoms:
                places.setdefault(atom, place)

    def _told(self, eqn: JaxprEqn, why: str) -> str:
        """A reason in words: the operation, what it does, and the line of the user's code."""
        place = self.place()
        return f"{eqn.primitive.name}{why}" + (f" at {place}" if place else "")

    def kept(self, axis: Axis, gone: frozenset[int], size: int) -> np.ndarray:
        """Which positions of an axis are left without some atoms, a boolean mask to read."""
        if axis is None or not gone:
            return _all(size)
        key = (gone, self.terms.changes, self.terms.size)
        if self._dead is None or self._dead[0] != key:
            self._dead, self._kept = (key, dead_terms(self.terms, gone)), {}
        if id(axis) not in self._kept:
            mask = ~self._dead[1][self.terms.roots(axis)]
            mask.flags.writeable = False
            self._kept[id(axis)] = axis, mask  # the axis is held, so that no other has its id
        return self._kept[id(axis)][1]

    def atoms_of(self, axis: Axis) -> frozenset[int]:
        """All atoms of an axis."""
        if axis is None:
            return frozenset()
        terms = np.unique(self.terms.roots(axis)).tolist()
        return frozenset().union(*(self.terms.atoms(term) for term in terms if term != TRUE))


@functools.cache
def _all(size: int) -> np.ndarray:
    mask = np.ones(size, bool)
    mask.flags.writeable = False
    return mask


def _not_understood(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    for axes in inputs:
        for axis in axes:
            if flow.atoms_of(axis):
                flow.unknown.setdefault(eqn.primitive.name, flow.place())
            flow.freeze(axis, eqn, "is not understood")
    return [(None,) * len(shape_of(variable)) for variable in eqn.outvars]
