"""Terms: under which condition a position of an axis survives, and equations between terms.

A term is `TRUE` (the position must stay), an *atom* (a unit that pruning may remove), or a product
of atoms (it survives if all of them do, as position `h * d + i` of an axis that a reshape makes of
heads and features). Equations are solved as they come: atoms by union-find, and an atom may become
a product of others. Every step is sufficient for its equation. So the solution may tie more
positions together than necessary, but never less.
"""

from collections.abc import Callable, Iterable, Sequence
import math

import numpy as np

TRUE = 0
Axis = np.ndarray | None  # the term of each position; None where all are TRUE and no cause is known


class Terms:
    """A store of terms, numbered from 0, and what is known of them.

    Attributes:
      changes: how many equations have changed anything, so that a fixed point can be seen.
      size: how many terms there are.
    """

    def __init__(self):
        self.parent = np.zeros(1024, np.int64)
        self.size = 1
        self.parts: dict[int, tuple[int, ...]] = {}  # of a root that is a product
        self.products: dict[frozenset[int], int] = {}
        self.frozen: dict[int, str] = {}  # why an atom must stay
        self.joined: dict[int, tuple[int, str]] = {}  # to what an atom was joined, and where
        self.parted: dict[int, str] = {}  # where an atom became a product
        self.changes = 0

    def new(self, number: int) -> np.ndarray:
        """New atoms."""
        while self.size + number > len(self.parent):
            self.parent = np.concatenate([self.parent, np.zeros_like(self.parent)])
        atoms = np.arange(self.size, self.size + number)
        self.parent[atoms] = atoms
        self.size += number
        return atoms

    def roots(self, axis: np.ndarray) -> np.ndarray:
        """The terms that stand for those of an axis; equal ones are the same number."""
        up = self.parent[axis]
        while not np.array_equal(above := self.parent[up], up):
            up = above
        self.parent[axis] = up
        return up

    def root(self, term: int) -> int:
        """The term that stands for a term."""
        parent = self.parent
        while parent[term] != term:
            parent[term] = parent[parent[term]]
            term = int(parent[term])
        return int(term)

    def atoms(self, term: int) -> frozenset[int]:
        """The atoms that a term is the product of; none of `TRUE`."""
        root = self.root(term)
        if root == TRUE:
            return frozenset()
        if root not in self.parts:
            return frozenset((root,))
        return frozenset().union(*map(self.atoms, self.parts[root]))

    def product(self, terms: Iterable[int]) -> int:
        """The term that survives if all of these do."""
        atoms = frozenset().union(*map(self.atoms, terms))
        if not atoms:
            return TRUE
        if len(atoms) == 1:
            return next(iter(atoms))
        if atoms not in self.products:
            term = self.products[atoms] = int(self.new(1)[0])
            self.parts[term] = tuple(atoms)
        return self.root(self.products[atoms])

    def freeze(self, term: int, why: str) -> None:
        """Makes a term, so all of its atoms, `TRUE`."""
        for atom in self.atoms(term):
            self.frozen.setdefault(atom, why)
            self._join(atom, TRUE, why)

    def equal(self, left: int, right: int, why: str) -> None:
        """Makes two terms equal; what that freezes knows the first cause, if there is one."""
        raw = (left, right)
        left, right = self.root(left), self.root(right)
        if left == right:
            return
        ours, theirs = self.atoms(left), self.atoms(right)
        if ours == theirs:  # one product twice, or one of which a single factor is left
            first = TRUE if not ours else next(iter(ours)) if len(ours) == 1 else min(left, right)
            for term in {left, right} - {first}:
                self.parent[term] = first
            return
        if TRUE in (left, right):
            cause = reason(self, raw[left != TRUE]).rpartition(": ")[2]
            why += f": {cause}" if cause else ""
        ours, theirs = ours - theirs, theirs - ours
        if not ours or not theirs:
            for atom in ours | theirs:
                self.freeze(atom, why)
        elif len(ours) == len(theirs):  # in order: atoms of outer axes are older
            for one, other in zip(sorted(ours), sorted(theirs), strict=True):
                self._join(self.root(one), self.root(other), why)
        elif min(len(ours), len(theirs)) == 1:
            (single,), several = sorted((ours, theirs), key=len)
            self.parts[single], self.parted[single] = tuple(several), why
            self.changes += 1
        else:
            first = min(ours | theirs)
            for atom in ours | theirs:
                self._join(self.root(atom), self.root(first), why)

    def equal_axes(self, left: Axis, right: Axis, why: str) -> Axis:
        """Makes two axes equal, position by position; returns one for both."""
        if left is None or right is None:
            left = right if left is None else left
            self.freeze_axis(left, why)
            return left
        ours, theirs = self.roots(left), self.roots(right)
        places = np.flatnonzero(ours != theirs)
        low, high = np.sort([ours[places], theirs[places]], 0)
        roots = np.concatenate([low, high]).tolist()
        if (
            TRUE not in roots
            and len(set(roots)) == len(roots)
            and self.parts.keys().isdisjoint(roots)
        ):
            self.parent[high] = low  # atoms, each of one equation
            self.joined |= {
                one: (other, why) for one, other in zip(high.tolist(), low.tolist(), strict=True)
            }
            self.changes += len(high)
            return left
        for place in places:
            self.equal(int(left[place]), int(right[place]), why)
        return left

    def freeze_axis(self, axis: Axis, why: str) -> None:
        """Makes all positions of an axis stay."""
        if axis is not None:
            for term in np.unique(self.roots(axis)):
                if term != TRUE:
                    self.freeze(int(term), why)

    def _join(self, one: int, other: int, why: str) -> None:
        """Makes two roots one; `TRUE`, the smallest, wins."""
        if one == other:
            return
        low, high = sorted((one, other))
        if high in self.parts and low not in self.parts and low != TRUE:
            low, high = high, low
        self.parent[high] = low
        self.joined[high] = (low, why)
        self.changes += 1


def reason(terms: Terms, term: int) -> str:
    """Why a term must stay; empty if it need not."""
    for _ in range(terms.size):
        if term in terms.frozen:
            return terms.frozen[term]
        if term not in terms.joined:
            break
        term = terms.joined[term][0]
    return next(filter(None, (reason(terms, part) for part in terms.parts.get(term, ()))), "")


def parted(terms: Terms, term: int) -> str:
    """Where a term became a product; empty if it is none, or was one from the beginning."""
    while term not in terms.parted and term in terms.joined:
        term = terms.joined[term][0]
    return terms.parted.get(term, "")


def tie(terms: Terms, one: int, other: int) -> str:
    """Where two atoms became one: the last equation on the shorter way between them."""

    def way(term: int) -> dict[int, str]:
        found = {term: ""}
        while term in terms.joined:
            term, why = terms.joined[term]
            found[term] = why
        return found

    ours, theirs = way(one), way(other)
    meeting = next((term for term in ours if term in theirs), None)
    return "" if meeting is None else ours[meeting] or theirs[meeting]


def dead_terms(terms: Terms, gone: frozenset[int]) -> np.ndarray:
    """For each root whether it does not survive without some atoms."""
    dead = np.zeros(terms.size, bool)
    dead[list(gone)] = True
    for term in terms.parts:
        dead[term] = not terms.atoms(term).isdisjoint(gone)
    return dead


def merge_axes(terms: Terms, axes: Sequence[Axis], shape: Sequence[int]) -> Axis:
    """The axis that a reshape makes of several, the last one fastest."""
    known = [(k, axis) for k, axis in enumerate(axes) if axis is not None]
    live = [(k, axis) for k, axis in known if terms.roots(axis).any()]
    if not live:
        return np.full(math.prod(shape), known[0][1][0]) if known else None
    views = [axis.reshape([-1 if j == k else 1 for j in range(len(shape))]) for k, axis in live]
    if len(live) == 1:
        return np.broadcast_to(views[0], shape).ravel().copy()
    grid = np.stack([np.broadcast_to(terms.roots(view), shape).ravel() for view in views])
    cells, back = np.unique(grid, axis=1, return_inverse=True)
    made = np.array([terms.product(map(int, cell)) for cell in cells.T])
    return made[back.ravel()]


def split_axis(
    terms: Terms,
    axis: Axis,
    shape: Sequence[int],
    fresh: Callable[[int, int], np.ndarray],
    why: str,
) -> list[Axis]:
    """The axes that a reshape takes one axis apart into.

    Args:
      terms: the store.
      axis: the axis that is taken apart.
      shape: of the axes that it becomes.
      fresh: a function of an axis and its size, that returns the same new atoms in every pass.
      why: the reason for what becomes frozen.
    """
    if axis is None:
        return [None] * len(shape)
    if not (grid := terms.roots(axis).reshape(shape)).any():
        return [np.full(size, axis[0]) for size in shape]
    lines = [np.moveaxis(grid, k, 0).reshape(size, -1) for k, size in enumerate(shape)]
    for k, line in enumerate(lines):  # often all depends on one of them
        if line.shape[1] == 1 or (line == line[:, :1]).all():
            return [line[:, 0].copy() if j == k else None for j in range(len(shape))]
    atoms = {int(term): terms.atoms(int(term)) for term in np.unique(grid)}
    everywhere = frozenset.intersection(*atoms.values())
    for atom in everywhere:
        terms.freeze(atom, why)
    axes: list[Axis] = []
    for line in lines:
        common = [frozenset.intersection(*(atoms[t] for t in set(row.tolist()))) for row in line]
        common = [shared - everywhere for shared in common]
        axes.append(np.array([terms.product(c) for c in common]) if any(common) else None)
    if _same_conditions(terms, merge_axes(terms, axes, shape), axis):
        return axes
    # Each position becomes the product of one new atom of each axis.
    made: list[Axis] = []
    for k, (found, size) in enumerate(zip(axes, shape, strict=True)):
        new = fresh(k, size) if size > 1 else None
        if found is not None and new is not None:
            both = zip(found.tolist(), new.tolist(), strict=True)
            new = np.array([terms.product(pair) for pair in both])
        made.append(found if new is None else new)
    terms.equal_axes(merge_axes(terms, made, shape), axis, why)
    return made


def _same_conditions(terms: Terms, left: Axis, right: np.ndarray) -> bool:
    if left is None:
        return not terms.roots(right).any()
    both = zip(left.tolist(), right.tolist(), strict=True)
    return all(terms.atoms(one) == terms.atoms(other) for one, other in set(both))
