"""The proof that a pruned network is the whole one restricted to what survives.

Both programs are gone through in step. Every operation of the pruned one must be that of the whole
one, on the same values, with the parameters that its fewer positions explain. Numbers and constants
must be the same: so `1 / sqrt(width)`, `if width > 8`, `x[..., :8]` and a mask that is made from
the width are found. The one exception is a division of a sum by how many numbers were added, as in
LayerNorm or a mean over channels: it renormalises, which is noted. What nothing reads, as the code
drops it, is the same operation too, but of any shape.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
import jax.numpy as jnp
import numpy as np

from dhp_jax.core.state import is_key, numbers_of
from dhp_jax.tracing.flow import Axes, Flow
from dhp_jax.tracing.parameters import ParameterMismatch, check_parameters
from dhp_jax.tracing.programs import (
    CALLS,
    Context,
    inner_program,
    is_literal,
    shape_of,
    where,
)
from dhp_jax.tracing.rules import ELEMENTWISE, PRINTS

PASSING_COUNTS = ("broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "expand_dims")


class Mismatch(Exception):
    """The pruned program is not the whole one restricted to what survives.

    Attributes:
      why: what differs.
      place: file and line of the user's code; empty if it is not known.
      axes: the axes in question, of the whole program.
    """

    def __init__(self, why: str, place: str = "", axes: Axes = ()):
        super().__init__(f"{why} at {place}" if place else why)
        self.why, self.place, self.axes = why, place, axes


class _Number(NamedTuple):
    """A number that both programs contain."""

    whole: np.ndarray
    pruned: np.ndarray


class _Sum(NamedTuple):
    """A sum, and how many numbers each program adds up."""

    whole: int
    pruned: int
    axes: Axes


Known = _Number | _Sum | None


def check_restricted(
    flow: Flow, whole: ClosedJaxpr, pruned: ClosedJaxpr, gone: frozenset[int], context: Context
) -> frozenset[int]:
    """Raises unless one program is another one without some atoms.

    Args:
      flow: the solved equations of the whole program.
      whole: that program.
      pruned: the one that should be it without what is gone.
      gone: atoms.
      context: of the whole program in the flow.

    Returns:
      The atoms over which the programs renormalise.

    Raises:
      Mismatch: it is not.
    """
    notes: set[int] = set()
    inputs: list[Known] = [None] * len(whole.jaxpr.invars)
    walk = _Walk(flow, gone, context, notes)
    for known in walk.compare(whole.jaxpr, pruned.jaxpr, inputs, whole.consts, pruned.consts):
        if isinstance(known, _Number) and not _same_numbers(*known):
            raise Mismatch("returns a number that depends on the width")
    return frozenset(notes)


class _Walk:
    """One pair of programs, gone through in step.

    Attributes:
      partner: by variable of the whole program that of the pruned one.
      known: what is known of the values of variables of the whole program.
    """

    def __init__(self, flow: Flow, gone: frozenset[int], context: Context, notes: set[int]):
        self.flow, self.gone, self.context, self.notes = flow, gone, context, notes
        self.partner: dict[Any, Any] = {}
        self.known: dict[Any, Known] = {}

    def compare(
        self,
        whole: Jaxpr,
        pruned: Jaxpr,
        inputs: Sequence[Known],
        whole_consts: Sequence[Any] = (),
        pruned_consts: Sequence[Any] = (),
    ) -> list[Known]:
        """Raises unless the programs agree; returns what is known of the outputs."""
        if len(whole.invars) != len(pruned.invars) or len(whole.constvars) != len(pruned.constvars):
            raise Mismatch("other arrays are read after pruning")
        for ours, theirs, known in zip(whole.invars, pruned.invars, inputs, strict=True):
            self.pair(ours, theirs, None)
            self.known[ours] = known
        for ours, theirs in zip(whole.constvars, pruned.constvars, strict=True):
            self.pair(ours, theirs, None)
        for ours, *constants in zip(whole.constvars, whole_consts, pruned_consts, strict=False):
            if shape_of(ours) == () and not is_key(constants[0]):
                self.known[ours] = _Number(*map(np.asarray, constants))
            elif not _same_numbers(*constants):
                raise Mismatch("a constant of the code depends on the width")
        both = zip(whole.eqns, self._counterparts(whole, pruned), _are_read(whole), strict=True)
        for number, (ours, theirs, is_read) in enumerate(both):
            if is_read and theirs is None:
                self.pair(ours.outvars[0], self.partner[ours.invars[0]], ours)
                self.known[ours.outvars[0]] = self.known.get(ours.invars[0])
            elif is_read:
                self.step(ours, theirs, number)
        return [self.output(a, b) for a, b in zip(whole.outvars, pruned.outvars, strict=True)]

    def _counterparts(self, whole: Jaxpr, pruned: Jaxpr) -> list[JaxprEqn | None]:
        """By operation of the whole program that of the pruned one.

        There is none of a broadcast along axes of which one position is left: libraries do without.
        """
        found: list[JaxprEqn | None] = []
        left = list(pruned.eqns[::-1])
        same = dict(zip(whole.invars, pruned.invars, strict=True))
        same |= dict(zip(whole.constvars, pruned.constvars, strict=True))
        for ours in whole.eqns:
            theirs = left[-1] if left else None
            if _repeats_nothing(ours, self.masks):
                source = same[ours.invars[0]]
                if not theirs or not _is_alike(ours, theirs) or theirs.invars[0] is not source:
                    same[ours.outvars[0]] = source
                    found.append(None)
                    continue
            if not theirs:
                raise Mismatch("the code does more or less after pruning", where(ours))
            if not _is_alike(ours, theirs):
                names = f"{ours.primitive.name} becomes {theirs.primitive.name}"
                if ours.primitive is theirs.primitive:
                    names = f"{ours.primitive.name} is of more or fewer arrays"
                raise Mismatch(f"the code does something else after pruning ({names})", where(ours))
            same |= dict(zip(ours.outvars, theirs.outvars, strict=True))
            found.append(left.pop())
        if left:
            raise Mismatch("the code does more or less after pruning", where(left[-1]))
        return found

    def masks(self, variable: Any) -> list[np.ndarray]:
        """What is left of each axis of a value of the whole program."""
        axes, sizes = self.flow.at[self.context, variable], shape_of(variable)
        kept = zip(axes, sizes, strict=True)
        return [self.flow.kept(axis, self.gone, size) for axis, size in kept]

    def pair(self, ours: Any, theirs: Any, eqn: JaxprEqn | None) -> None:
        """Notes which variable is which, if the shape of the pruned one is what it should be."""
        expected = tuple(int(np.count_nonzero(mask)) for mask in self.masks(ours))
        got = shape_of(theirs)
        same_dtype = getattr(ours.aval, "dtype", None) == getattr(theirs.aval, "dtype", None)
        if expected != got or not same_dtype:
            axes = self.flow.at[self.context, ours]
            raise Mismatch(f"expected shape {expected} after pruning, got {got}", where(eqn), axes)
        self.partner[ours] = theirs

    def value(self, ours: Any, theirs: Any, eqn: JaxprEqn) -> Known:
        """What is known of what an operation reads, if both programs read the same."""
        if is_literal(ours) != is_literal(theirs):
            raise Mismatch("reads something else after pruning", where(eqn))
        if is_literal(ours):
            return _Number(np.asarray(ours.val), np.asarray(theirs.val))
        if self.partner[ours] is not theirs:
            raise Mismatch("reads something else after pruning", where(eqn))
        return self.known.get(ours)

    def step(self, ours: JaxprEqn, theirs: JaxprEqn, number: int) -> None:
        """Raises unless one operation is the other one restricted."""
        if ours.primitive.name in PRINTS:
            return
        read = zip(ours.invars, theirs.invars, strict=True)
        values = [self.value(a, b, ours) for a, b in read]
        for a, b in zip(ours.outvars, theirs.outvars, strict=True):
            self.pair(a, b, ours)
        name = ours.primitive.name
        numbers = [value for value in values if isinstance(value, _Number)]
        scalars = all(shape_of(v) == () for v in ours.outvars)
        if name in ELEMENTWISE and scalars and len(numbers) == len(values):
            self.known[ours.outvars[0]] = _computed(ours, theirs, numbers)
            return
        if name not in CALLS:
            self._same_values(ours, values)
        try:
            check_parameters(
                ours,
                theirs,
                lambda: [None if is_literal(v) else self.masks(v) for v in ours.invars],
                lambda: [self.masks(v) for v in ours.outvars],
            )
        except ParameterMismatch as error:
            axes = self.flow.at[self.context, ours.outvars[0]]
            raise Mismatch(str(error), where(ours), axes) from None
        self._inner(ours, theirs, values, (*self.context, number))
        self._follow(ours, theirs, values)

    def _same_values(self, eqn: JaxprEqn, values: Sequence[Known]) -> None:
        """Raises unless all numbers that an operation reads are the same in both programs."""
        for place, value in enumerate(values):
            if not isinstance(value, _Number) or _same_numbers(*value):
                continue
            total = values[0]
            division = eqn.primitive.name == "div" and place == 1 and isinstance(total, _Sum)
            if division and (total.whole, total.pruned) == (value.whole, value.pruned):
                for axis in total.axes:  # a mean over what is left
                    self.notes |= self.flow.atoms_of(axis)
                continue
            raise Mismatch(
                f"a number depends on the width: {value.whole:g}, after pruning {value.pruned:g}",
                where(eqn),
                self.flow.at[self.context, eqn.outvars[0]],
            )

    def _inner(
        self, ours: JaxprEqn, theirs: JaxprEqn, values: list[Known], context: Context
    ) -> None:
        """Compares the programs within an operation."""
        name = ours.primitive.name
        if name in CALLS:
            (whole, consts), (pruned, pruned_consts) = inner_program(ours), inner_program(theirs)
            outputs = self._within(ours, context, whole, pruned, values, consts, pruned_consts)
            self.known.update(zip(ours.outvars, outputs, strict=True))
            return
        pairs: list[tuple[Context, ClosedJaxpr, ClosedJaxpr]] = []
        if name == "scan":
            pairs = [(context, ours.params["jaxpr"], theirs.params["jaxpr"])]
        elif name == "while":
            for key, inner in (("cond_jaxpr", (*context, "cond")), ("body_jaxpr", context)):
                pairs.append((inner, ours.params[key], theirs.params[key]))
        elif name == "cond":
            branches = zip(ours.params["branches"], theirs.params["branches"], strict=True)
            pairs = [((*context, n), a, b) for n, (a, b) in enumerate(branches)]
        for inner, whole, pruned in pairs:
            nothing: list[Known] = [None] * len(whole.jaxpr.invars)
            outputs = self._within(
                ours, inner, whole.jaxpr, pruned.jaxpr, nothing, whole.consts, pruned.consts
            )
            self._same_values(ours, outputs)

    def _within(self, eqn, context, whole, pruned, values, consts, pruned_consts) -> list[Known]:
        inner = _Walk(self.flow, self.gone, context, self.notes)
        try:
            return inner.compare(whole, pruned, values, consts, pruned_consts)
        except Mismatch as error:
            if error.place:
                raise
            raise Mismatch(error.why, where(eqn), error.axes) from None

    def _follow(self, ours: JaxprEqn, theirs: JaxprEqn, values: Sequence[Known]) -> None:
        """Notes sums, and what only brings them into another shape."""
        name = ours.primitive.name
        if name == "reduce_sum":
            axes, variable = ours.params["axes"], ours.invars[0]
            counts = [math.prod(shape_of(eqn.invars[0])[k] for k in axes) for eqn in (ours, theirs)]
            over = self.flow.at[self.context, variable] if not is_literal(variable) else ()
            self.known[ours.outvars[0]] = _Sum(*counts, tuple(over[k] for k in axes if over))
        elif name in PASSING_COUNTS and isinstance(values[0], _Sum):
            self.known[ours.outvars[0]] = values[0]

    def output(self, ours: Any, theirs: Any) -> Known:
        """What is known of an output, if both programs return the same."""
        if is_literal(ours):
            if not is_literal(theirs) or not _same_numbers(ours.val, theirs.val):
                raise Mismatch("returns another number after pruning")
            return _Number(np.asarray(ours.val), np.asarray(theirs.val))
        if is_literal(theirs) or self.partner[ours] is not theirs:
            raise Mismatch("returns something else after pruning")
        return self.known.get(ours)


def _repeats_nothing(eqn: JaxprEqn, masks: Callable[[Any], list[np.ndarray]]) -> bool:
    """Whether an operation broadcasts axes of which one position is left, and does no more.

    `masks` tells what is left of each axis of a value.
    """
    if eqn.primitive.name != "broadcast_in_dim" or len(eqn.invars) > 1:
        return False
    (source,), (made,) = eqn.invars, eqn.outvars
    axes = tuple(range(len(shape_of(made))))
    if is_literal(source) or tuple(eqn.params["broadcast_dimensions"]) != axes:
        return False
    left = zip(masks(source), masks(made), strict=True)
    return all(np.count_nonzero(ours) == np.count_nonzero(theirs) for ours, theirs in left)


def _is_alike(ours: JaxprEqn, theirs: JaxprEqn) -> bool:
    """Whether two operations are of one kind, on as many arrays."""
    many, left = ((len(eqn.invars), len(eqn.outvars)) for eqn in (ours, theirs))
    return ours.primitive is theirs.primitive and many == left


def _are_read(jaxpr: Jaxpr) -> list[bool]:
    """Whether outputs of a program follow from what each of its operations computes."""
    read, found = {v for v in jaxpr.outvars if not is_literal(v)}, []
    for eqn in reversed(jaxpr.eqns):
        found.append(bool(eqn.effects) or not read.isdisjoint(eqn.outvars))
        if found[-1]:
            read.update(v for v in eqn.invars if not is_literal(v))
    return found[::-1]


def _computed(ours: JaxprEqn, theirs: JaxprEqn, numbers: Sequence[_Number]) -> _Number:
    """What an operation makes of numbers, in both programs."""
    made = []
    with jax.ensure_compile_time_eval():
        for side, eqn in enumerate((ours, theirs)):
            given = [jnp.asarray(number[side]) for number in numbers]
            made.append(np.asarray(eqn.primitive.bind(*given, **eqn.params)))
    return _Number(*made)


def _same_numbers(left: Any, right: Any) -> bool:
    left, right = (np.asarray(numbers_of(x)) for x in (left, right))
    same_nan = np.issubdtype(left.dtype, np.inexact)
    return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=same_nan)
