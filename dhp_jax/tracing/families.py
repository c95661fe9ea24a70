"""Families: atoms that occur in the same arrays and axes in the same way. Each may be a latent."""

from collections import defaultdict
from dataclasses import dataclass, field
import math

import numpy as np

from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.programs import DOTS, EVALUATION, all_programs, dot_numbers, is_literal
from dhp_jax.tracing.terms import TRUE

Place = tuple[int, int]  # array and axis
Placed = dict[Place, tuple[np.ndarray, np.ndarray]]  # atoms, and a position of each


@dataclass
class Family:
    """Units that are alike, each an entry.

    Attributes:
      name: the path of the first layer whose outputs it is, unique in a network.
      atoms: one an entry.
      places: by (array, axis) the entry that each position belongs to, -1 for none.
      numbers: of all arrays, that go with one entry.
      renormalises: whether a normalisation goes over it, so that the others' numbers change.
      summed: where numbers are added up over it otherwise; empty if nowhere.
      chosen: where a maximum or softmax goes over it, so that the others' numbers may change.
      drawn: where evaluation draws random numbers over it, so that they are others.
    """

    name: str
    atoms: list[int]
    places: dict[Place, np.ndarray]
    numbers: int
    renormalises: bool = False
    summed: str = ""
    chosen: str = ""
    drawn: str = ""
    error: str = field(default="", repr=False)

    @property
    def size(self) -> int:
        """How many entries it has."""
        return len(self.atoms)


def find_families(analysis: Analysis) -> list[Family]:
    """The families of what may go and makes a network cheaper; all else is frozen."""
    terms, placed = analysis.flow.terms, _placed(analysis)
    contracted, products = _contracted(analysis), _products(analysis)
    parts: list[list[int]] = []
    for atoms in _alike(terms.size, placed):
        for atom in (atom for atom in atoms if atom not in contracted):
            terms.freeze(atom, "nothing is summed over it")
        for part in _factors(products, [atom for atom in atoms if atom in contracted]):
            if len(part) > 1:
                parts.append(part)
                continue
            for atom in part:
                terms.freeze(atom, "it is one unit alone")
    return _named(analysis, _families(analysis, parts, placed))


def _placed(analysis: Analysis) -> Placed:
    """By place the atoms of its positions, and the position of each."""
    terms, found = analysis.flow.terms, {}
    for number, axes in enumerate(analysis.arrays):
        for k, axis in enumerate(axes):
            if axis is None or not (roots := terms.roots(axis)).any():
                continue
            positions = np.flatnonzero(roots != TRUE)
            atoms = roots[positions]
            if products := terms.parts.keys() & set(atoms.tolist()):
                parts = {term: tuple(terms.atoms(term)) for term in products}
                each = [parts.get(term, (term,)) for term in atoms.tolist()]
                positions = np.repeat(positions, list(map(len, each)))
                atoms = np.array([atom for own in each for atom in own], np.int64)
            if len(atoms):  # else they are products of atoms that stay
                found[number, k] = atoms, positions
    return found


def _alike(size: int, placed: Placed) -> list[list[int]]:
    """Atoms that have as many positions in the same places, in the order of their first ones."""
    if not placed:
        return []
    kinds, made = np.zeros(size, np.int64), 1
    for atoms, _ in placed.values():
        atoms, counts = np.unique(atoms, return_counts=True)
        both = kinds[atoms] * (counts.max() + 1) + counts
        different, kind = np.unique(both, return_inverse=True)
        kinds[atoms], made = made + kind, made + len(different)
    every, first = np.unique(np.concatenate([a for a, _ in placed.values()]), return_index=True)
    groups: dict[int, list[int]] = defaultdict(list)
    for atom in every[np.argsort(first)].tolist():
        groups[kinds[atom]].append(atom)
    return list(groups.values())


def _contracted(analysis: Analysis) -> frozenset[int]:
    """Atoms over which something is contracted, so that a network without them is cheaper."""
    flow, found = analysis.flow, [np.array([TRUE])]
    for context, program in analysis.programs.items():
        for inner, jaxpr in all_programs(program.closed.jaxpr, context):
            for eqn in jaxpr.eqns:
                if is_literal(x := eqn.invars[0] if eqn.invars else None):
                    continue
                over = ()
                if eqn.primitive.name in DOTS:
                    over = dot_numbers(eqn)[0][0][0]
                elif eqn.primitive.name == "conv_general_dilated":
                    over = eqn.params["dimension_numbers"][0][1:2]
                axes = (flow.at[inner, x][k] for k in over)
                found += [axis for axis in axes if axis is not None]
    return flow.atoms_of(np.concatenate(found))


def _products(analysis: Analysis) -> list[frozenset[int]]:
    """The atoms of every position of an array that is a product."""
    terms, found = analysis.flow.terms, set()
    for axes in analysis.arrays:
        for axis in axes:
            if axis is not None and terms.parts:
                found |= terms.parts.keys() & set(terms.roots(axis).tolist())
    return [atoms for term in found if len(atoms := terms.atoms(term)) > 1]


def _factors(products: list[frozenset[int]], units: list[int]) -> list[list[int]]:
    """Atoms that are alike but meet in products, such as groups and places in them, apart."""
    ours = set(units)
    neighbours: dict[int, set[int]] = {atom: set() for atom in units}
    for product in products:
        both = product & ours
        for atom in both:
            neighbours[atom] |= both - {atom}
    if not any(neighbours.values()):
        return [units]
    side: dict[int, int] = {}
    for first in units:
        if first in side:
            continue
        side[first], queue = 0, [first]
        while queue:
            atom = queue.pop()
            for other in neighbours[atom]:
                if other not in side:
                    side[other] = 1 - side[atom]
                    queue.append(other)
                elif side[other] == side[atom]:
                    return [units]
    parts = [[atom for atom in units if side[atom] == one] for one in (0, 1)]
    return [part for part in parts if part]


def _families(analysis: Analysis, parts: list[list[int]], placed: Placed) -> list[Family]:
    """Families of some atoms each, in the order of their first positions."""
    flow, size = analysis.flow, analysis.flow.terms.size
    owner, entry = np.full(size, -1), np.zeros(size, np.int64)
    for number, part in enumerate(parts):
        owner[part] = number
    families = [Family("", part, {}, 0) for part in parts]
    for (number, k), (atoms, positions) in placed.items():
        shape = analysis.leaves[number].shape
        for own in np.unique(owner[atoms[owner[atoms] >= 0]]).tolist():
            family, ours = families[own], owner[atoms] == own
            if not family.places:
                different, first = np.unique(atoms[ours], return_index=True)
                entry[different] = first
                family.atoms.sort(key=entry.__getitem__)
                entry[family.atoms] = np.arange(family.size)
            entries = family.places[number, k] = np.full(shape[k], -1)
            np.maximum.at(entries, positions[ours], entry[atoms[ours]])
            each = int(np.count_nonzero(ours)) // family.size
            family.numbers += math.prod(shape) // shape[k] * each
    for family in families:
        for name, found in (("summed", flow.sums), ("chosen", flow.choices), ("drawn", flow.draws)):
            setattr(family, name, next((found[a] for a in family.atoms if a in found), ""))
    return families


def _named(analysis: Analysis, families: list[Family]) -> list[Family]:
    """The families in the order in which they are made, each named after what makes it first."""
    order, makers = _first_reads(analysis), []
    for family in families:
        candidates = []
        for number, k in family.places:
            rank = len(analysis.leaves[number].shape)
            candidates.append((rank < 2, k != rank - 1, order[number], number, k))
        makers.append((*min(candidates)[2:], family))
    makers.sort(key=lambda maker: maker[:3])
    taken: set[str] = set()
    for _, number, k, family in makers:
        path = analysis.names[number]
        layer = path.rpartition(".")[0] or path
        name = layer if layer not in taken else f"{layer}.axis{k}"
        times = 2
        while name in taken:
            name, times = f"{layer}.{times}", times + 1
        taken.add(name)
        family.name = name
    return [family for *_, family in makers]


def _first_reads(analysis: Analysis) -> list[int]:
    """For each array the number of the operation that reads it first."""
    jaxpr = analysis.programs[EVALUATION].closed.jaxpr
    first: dict[int, int] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            first.setdefault(id(atom), number)
    arrays = jaxpr.invars[: len(analysis.arrays)]
    return [first.get(id(variable), len(jaxpr.eqns)) for variable in arrays]
