"""Families: atoms that occur in the same arrays and axes in the same way. Each may be a latent."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.programs import EVALUATION, all_programs, is_literal
from dhp_jax.tracing.terms import TRUE

Place = tuple[int, int]  # array and axis
Unit = tuple[int, dict[Place, list[int]]]  # an atom, and the positions that go with it


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
    contracted = _contracted(analysis)
    groups: dict[tuple, list[Unit]] = defaultdict(list)
    for atom, places in _positions(analysis).items():
        if atom in contracted:
            alike = tuple(sorted((*place, len(p)) for place, p in places.items()))
            groups[alike].append((atom, places))
        else:
            analysis.flow.terms.freeze(atom, "nothing is summed over it")
    families = []
    products = _products(analysis)
    for units in groups.values():
        for part in _factors(products, units):
            if len(part) < 2:
                for atom, _ in part:
                    analysis.flow.terms.freeze(atom, "it is one unit alone")
            else:
                families.append(_family(analysis, part))
    return _named(analysis, families)


def _positions(analysis: Analysis) -> dict[int, dict[Place, list[int]]]:
    """By atom and place the positions that go with it."""
    terms, found = analysis.flow.terms, defaultdict(lambda: defaultdict(list))
    for number, axes in enumerate(analysis.arrays):
        for k, axis in enumerate(axes):
            for position, term in enumerate(() if axis is None else terms.roots(axis).tolist()):
                if term != TRUE:
                    for atom in terms.atoms(term):
                        found[atom][number, k].append(position)
    return found


def _contracted(analysis: Analysis) -> frozenset[int]:
    """Atoms over which something is contracted, so that a network without them is cheaper."""
    flow, found = analysis.flow, frozenset()
    for context, program in analysis.programs.items():
        for inner, jaxpr in all_programs(program.closed.jaxpr, context):
            for eqn in jaxpr.eqns:
                if is_literal(x := eqn.invars[0] if eqn.invars else None):
                    continue
                if eqn.primitive.name == "dot_general":
                    for k in eqn.params["dimension_numbers"][0][0]:
                        found |= flow.atoms_of(flow.at[inner, x][k])
                elif eqn.primitive.name == "conv_general_dilated":
                    feature = eqn.params["dimension_numbers"][0][1]
                    found |= flow.atoms_of(flow.at[inner, x][feature])
    return found


def _products(analysis: Analysis) -> list[frozenset[int]]:
    """The atoms of every position of an array that is a product."""
    terms, found = analysis.flow.terms, set()
    for axes in analysis.arrays:
        for axis in axes:
            if axis is not None:
                found |= {t for t in np.unique(terms.roots(axis)).tolist() if t in terms.parts}
    return [atoms for term in found if len(atoms := terms.atoms(term)) > 1]


def _factors(products: list[frozenset[int]], units: list[Unit]) -> list[list[Unit]]:
    """Units that are alike but meet in products, such as groups and places in them, apart."""
    ours = {atom for atom, _ in units}
    neighbours: dict[int, set[int]] = {atom: set() for atom in ours}
    for product in products:
        both = product & ours
        for atom in both:
            neighbours[atom] |= both - {atom}
    if not any(neighbours.values()):
        return [units]
    side: dict[int, int] = {}
    for first, _ in units:
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
    parts = [[unit for unit in units if side[unit[0]] == one] for one in (0, 1)]
    return [part for part in parts if part]


def _family(analysis: Analysis, units: list[Unit]) -> Family:
    units.sort(key=lambda unit: min((*place, p[0]) for place, p in unit[1].items()))
    shapes, places, numbers = [x.shape for x in analysis.leaves], {}, 0
    for number, k in sorted(units[0][1]):
        entries = np.full(shapes[number][k], -1)
        for entry, (_, positions) in enumerate(units):
            entries[positions[number, k]] = entry
        places[number, k] = entries
        size = int(np.prod(shapes[number]))
        numbers += size // shapes[number][k] * len(units[0][1][number, k])
    atoms = [atom for atom, _ in units]
    flow, told = analysis.flow, {}
    for name, found in (("summed", flow.sums), ("chosen", flow.choices), ("drawn", flow.draws)):
        told[name] = next((found[atom] for atom in atoms if atom in found), "")
    return Family("", atoms, places, numbers, **told)


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
