"""Which channels of any network may go, found by tracing it, and why others may not."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flax import nnx
import numpy as np

from dhp_jax.tracing.analysis import Analysis, SizeRule, analyse
from dhp_jax.tracing.families import Family, find_families
from dhp_jax.tracing.programs import Call, default_call
from dhp_jax.tracing.proof import Mismatch
from dhp_jax.tracing.terms import parted, reason

TRIES = 3  # random choices of survivors that are proved
SHARE = 0.4  # of the entries that go in a trial, on average


@dataclass
class Discovery:
    """What may go of a network, proved in several random ways.

    Attributes:
      analysis: the traced network.
      families: what may go, each by itself.
      frozen: families that may not, with the reason.
      ties: names of families of which as many entries have to go.
    """

    analysis: Analysis
    families: list[Family]
    frozen: list[tuple[Family, str]] = field(default_factory=list)
    ties: list[tuple[str, ...]] = field(default_factory=list)

    def gone(self, masks: Mapping[str, np.ndarray]) -> frozenset[int]:
        """The atoms that boolean masks, by family, leave out."""
        root = self.analysis.flow.terms.root
        return frozenset(
            root(family.atoms[entry])
            for family in self.families
            if family.name in masks
            for entry in np.flatnonzero(~np.asarray(masks[family.name], bool))
        )

    def restrict(self, masks: Mapping[str, np.ndarray]) -> nnx.Module:
        """The network of what survives, proved to be that.

        Args:
          masks: by family a boolean an entry; families without one keep everything.

        Raises:
          Mismatch: it cannot be proved.
        """
        gone = self.gone(masks)
        self.analysis.prove(gone)
        return self.analysis.cut(gone)

    def fixed(self) -> dict[str, list[tuple[str, int]]]:
        """By reason the axes, as (array, axis), that stay as a whole."""
        found: dict[str, list[tuple[str, int]]] = {}
        terms = self.analysis.flow.terms
        for name, axes in zip(self.analysis.names, self.analysis.arrays, strict=True):
            for k, axis in enumerate(axes):
                if axis is not None and not self.analysis.flow.atoms_of(axis):
                    why = next(filter(None, (reason(terms, int(term)) for term in axis)), "")
                    found.setdefault(why, []).append((name, k))
        return found


def discover(model: nnx.Module, inputs: Any, call: Call = default_call) -> Discovery:
    """Finds which channels of a network may go; nothing is computed.

    Args:
      model: any network of `flax.nnx`; left as it was.
      inputs: the shape of one example, an array or abstract array, or a tuple, list or dict of
        them.
      call: a function of the model and the inputs, where that is not `model(*inputs)`.

    Raises:
      ValueError: the network does not take such inputs.
    """
    analysis = analyse(model, inputs, call)
    found = Discovery(analysis, find_families(analysis))
    _Trial(found, np.random.default_rng(0)).settle()
    return found


class _Trial:
    """Proofs of random survivors, until all families that are left pass."""

    def __init__(self, found: Discovery, rng: np.random.Generator):
        self.found, self.analysis, self.rng = found, found.analysis, rng
        self.contexts = found.analysis.trials()

    def settle(self) -> None:
        """Freezes families that cannot be proved; the others pass together, in several ways."""
        calm = 0
        while self.found.families and calm < TRIES:
            families = self.found.families
            error, notes = self.attempt(families)
            if error is None:
                calm += 1
                for family in families:
                    roots = set(map(self.analysis.flow.terms.root, family.atoms))
                    family.renormalises |= bool(roots & notes)
                continue
            calm = 0
            self._give_up(self._wrong(families, error))

    def attempt(self, families: Sequence[Family]) -> tuple[Mismatch | None, frozenset[int]]:
        """What the proof says of random survivors of some families."""
        try:
            return None, self.analysis.prove(self._some(families), None, self.contexts)
        except Mismatch as error:
            return error, frozenset()

    def passes(self, families: Sequence[Family], times: int = TRIES) -> bool:
        """Whether random survivors of some families pass several times."""
        return all(self.attempt(families)[0] is None for _ in range(times))

    def _some(self, families: Iterable[Family]) -> frozenset[int]:
        """Random entries, not equally many of each family, for code may count them."""
        gone = set()
        for family in families:
            most = family.size - (2 if family.size > 2 else 1)  # axes of 1 are other programs
            wanted = round(SHARE * self.rng.uniform(0.4, 1.6) * family.size)
            chosen = self.rng.choice(family.size, min(most, max(1, wanted)), replace=False)
            gone |= {self.analysis.flow.terms.root(family.atoms[entry]) for entry in chosen}
        return frozenset(gone)

    def _wrong(self, families: list[Family], error: Mismatch) -> list[Family]:
        """The families that do not pass, found by halves, with the error of each."""
        wrong = self._by_halves(families, error)
        if not wrong:
            wrong = [family for family in families if not self._passes_alone(family)]
        if not wrong:  # they pass alone, but not together
            wrong = [max(families, key=lambda family: family.size)]
            wrong[0].error = str(error)
        return wrong

    def _by_halves(self, families: list[Family], error: Mismatch | None) -> list[Family]:
        error = error or self.attempt(families)[0]
        if error is None:
            return []
        if len(families) == 1:
            families[0].error = str(error)
            return families
        half = len(families) // 2
        parts = (families[:half], families[half:])
        return [family for part in parts for family in self._by_halves(part, None)]

    def _passes_alone(self, family: Family) -> bool:
        for _ in range(TRIES):
            if (error := self.attempt([family])[0]) is not None:
                family.error = str(error)
                return False
        return True

    def _give_up(self, wrong: list[Family]) -> None:
        """Finds sizes or ties with which families pass, and freezes the others."""
        wrong = [family for family in wrong if not self._with_sizes(family)]
        for group in self._tied(wrong):
            first, *others = group
            for other in others:
                for one, same in zip(first.atoms, other.atoms, strict=True):
                    self.analysis.flow.terms.equal(one, same, "as many have to go of each")
            self.found.ties.append(tuple(family.name for family in group))
            wrong = [family for family in wrong if family not in group]
        for family in wrong:
            for atom in family.atoms:
                self.analysis.flow.terms.freeze(atom, family.error)
            self.found.frozen.append((family, family.error))
        self.found.families = find_families(self.analysis)

    def _with_sizes(self, family: Family) -> bool:
        """Whether there are numbers in modules with which a family passes; they are kept."""
        before = list(self.analysis.sizes)
        for guess in _guesses(self.analysis, family):
            self.analysis.sizes = before + guess
            if not self.passes([family]):
                self.analysis.sizes = before
                continue
            for rule in guess:  # none that is not needed
                with_rule = self.analysis.sizes
                self.analysis.sizes = [other for other in with_rule if other is not rule]
                if not self.passes([family], 2):
                    self.analysis.sizes = with_rule
            return True
        return False

    def _tied(self, families: list[Family]) -> list[list[Family]]:
        """Groups of families on common axes that pass if the same entries go of each."""
        groups, left = [], list(families)
        while left:
            group, near = [left.pop(0)], [None]
            while near:
                near = [f for f in left if f.size == group[0].size and _meets(f, group)]
                group += near
                left = [family for family in left if family not in near]
            if len(group) > 1 and self._pass_as_one(group):
                groups.append(group)
        return groups

    def _pass_as_one(self, group: Sequence[Family]) -> bool:
        root = self.analysis.flow.terms.root
        for _ in range(TRIES):
            gone = self._some(group[:1])
            entries = [e for e, atom in enumerate(group[0].atoms) if root(atom) in gone]
            together = frozenset(root(family.atoms[e]) for family in group for e in entries)
            try:
                self.analysis.prove(together, None, self.contexts)
            except Mismatch:
                return False
        return True


def _meets(family: Family, group: Sequence[Family]) -> bool:
    return any(family.places.keys() & other.places.keys() for other in group)


def _guesses(analysis: Analysis, family: Family) -> list[list[SizeRule]]:
    """Numbers in modules around a family's arrays that may be its size: sets to try.

    The modules are those of the user's that hold the arrays, and those in them that hold none.
    """
    parts = [tuple(name.split(".")) for name in analysis.names]
    holding = {path[:depth] for path in parts for depth in range(len(path))}
    entries: dict[tuple, SizeRule] = {}
    widths: dict[tuple, SizeRule] = {}
    multiples: dict[tuple, SizeRule] = {}
    for path, module in nnx.iter_modules(analysis.model):
        at = holder = tuple(map(str, path))
        while holder not in holding:
            holder = holder[:-1]
        if holder == at and type(module).__module__.startswith("flax."):
            continue
        near = [place for place in family.places if parts[place[0]][: len(holder)] == holder]
        for attribute, value in vars(module).items() if near else ():
            key, rule = (at, attribute), SizeRule(tuple(path), attribute, tuple(family.atoms))
            if type(value) is not int:
                continue
            if value == family.size:
                entries[key] = rule
            elif place := next((p for p in near if value == analysis.leaves[p[0]].shape[p[1]]), ()):
                widths[key] = replace(rule, atoms=(), axis=place)
            elif value % family.size == 0:
                multiples[key] = replace(rule, times=value // family.size)
    one, wide = list(entries.values()), list(widths.values())
    beside = [rule for (at, _), rule in multiples.items() if at in {at for at, _ in entries}]
    sets = (one, wide, one + wide, *([*one, rule] for rule in beside))
    return [guess for guess in sets if guess]  # as few as will do


def keep_one_factor(found: Discovery) -> None:
    """Where a position is the product of several entries, freezes all families but that of one.

    An axis of a hypernetwork takes one entry of a latent at each position.
    """
    terms = found.analysis.flow.terms
    while True:
        owner = {terms.root(atom): f for f in found.families for atom in f.atoms}
        clashing: dict[int, tuple[Family, int]] = {}
        for axes in found.analysis.arrays:
            for axis in axes:
                for term in () if axis is None else np.unique(axis).tolist():
                    met = [owner[atom] for atom in terms.atoms(term) if atom in owner]
                    if len(met) > 1:
                        clashing |= {id(family): (family, term) for family in met}
        if not clashing:
            return
        losing, term = min(
            clashing.values(),
            key=lambda one: (not one[0].renormalises, one[0].numbers * one[0].size),
        )
        why = "positions of an axis are products of entries of it and others"
        place = parted(terms, term)
        why += f", because of {place}" if place else ""
        for atom in losing.atoms:
            terms.freeze(atom, why)
        found.frozen.append((losing, why))
        found.families = find_families(found.analysis)
        _Trial(found, np.random.default_rng(0)).settle()
