"""Which channels of any network may go, found by tracing it, and why others may not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
import re
from typing import Any

from flax import nnx
import numpy as np

from dhp_jax.tracing.analysis import Analysis, SizeRule, analyse
from dhp_jax.tracing.families import Family, find_families
from dhp_jax.tracing.layer_sizes import numbers_in
from dhp_jax.tracing.programs import Call, default_call
from dhp_jax.tracing.proof import Mismatch
from dhp_jax.tracing.terms import parted, reason
from dhp_jax.tracing.trials import TRIES, Gone, Trials

MOST_KINDS = 4  # of numbers that are tried by themselves
Rules = list[tuple[SizeRule, ...]]  # each of several families that are alike


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
    _Settling(found, np.random.default_rng(0)).settle()
    return found


class _Settling:
    """Trials of families, until all that are left pass."""

    def __init__(self, found: Discovery, rng: np.random.Generator):
        self.found, self.analysis = found, found.analysis
        self.trials = Trials(found.analysis, rng)
        self.modules = list(nnx.iter_modules(found.analysis.model))

    def settle(self) -> None:
        """Freezes families that cannot be proved; the others pass together, in several ways."""
        calm = 0
        while self.found.families and calm < TRIES:
            families = self.found.families
            gone = self.trials.draw(families)
            error, notes = self.trials.attempt(families, gone)
            if error is None:
                calm += 1
                for family in families:
                    roots = set(map(self.analysis.flow.terms.root, family.atoms))
                    family.renormalises |= bool(roots & notes)
                continue
            calm = 0
            self._give_up(self._wrong(families, gone, error))

    def _wrong(self, families: list[Family], gone: Gone, error: Mismatch | None) -> list[Family]:
        """The families without which the others pass, with the error of each."""
        left, wrong = list(families), []
        while error is not None and left:  # else it is no other program for fewer entries
            core, error = self.trials.conflict(left, gone, error)
            if len(core) > 1 and self._tied(core) != [core]:  # they pass alone, but not together
                core = [max(core, key=lambda family: family.size)]
            found = core + (self._alike(core[0], left, gone) if len(core) == 1 else [])
            for family in found:
                family.error = str(error)
            wrong += found
            left = [family for family in left if family not in found]
            error, _ = self.trials.attempt(left, gone)
        return wrong

    def _alike(self, wrong: Family, families: list[Family], gone: Gone) -> list[Family]:
        """The families that are wrong as one is, in the same place of other blocks.

        Three are tried at most: the others would take an attempt each, and a network has many
        blocks.
        """
        kind = _kind(self.analysis, wrong)
        alike = [f for f in families if f is not wrong and _kind(self.analysis, f) == kind]
        tried = {len(alike) - 1, len(alike) // 2, 0} if alike else set()
        fail = all(self.trials.attempt([alike[number]], gone)[0] is not None for number in tried)
        return alike if fail else []

    def _give_up(self, wrong: list[Family]) -> None:
        """Finds sizes or ties with which families pass, and freezes the others."""
        alike: dict[tuple, list[Family]] = {}
        for family in wrong:
            alike.setdefault(_kind(self.analysis, family), []).append(family)
        wrong = [family for group in alike.values() for family in self._without_sizes(group)]
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

    def _without_sizes(self, alike: list[Family]) -> list[Family]:
        """Those of some families alike for which no numbers in modules are found."""
        if self._with_sizes(alike):
            return []
        first, *others = alike
        if not others or not self._with_sizes([first]):
            return alike
        return [family for family in others if not self._with_sizes([family])]

    def _with_sizes(self, alike: list[Family]) -> bool:
        """Whether there are numbers in modules with which families pass; they are kept."""
        before = list(self.analysis.sizes)
        guesses = [_guesses(self.analysis, self.modules, family) for family in alike]
        for guess in zip(*guesses, strict=False):  # the same of each family
            rules = [tuple(same) for same in zip(*guess, strict=False)]
            self.analysis.sizes = _sizes(before, rules)
            if not self.trials.passes(alike):
                continue
            kinds: dict[tuple[str, str], Rules] = {}
            for rule in rules:
                kinds.setdefault(_kind_of_size(rule[0]), []).append(rule)
            rules = self._needed(alike, before, list(kinds.values()), [], fails=True)
            self.analysis.sizes = _sizes(before, rules)
            if rules:
                return True
        self.analysis.sizes = before
        return False

    def _needed(
        self,
        alike: list[Family],
        before: list[SizeRule],
        kinds: list[Rules],
        sure: Rules,
        *,
        fails: bool,
    ) -> Rules:
        """Of kinds of numbers those that families need beside sure ones, which may fail alone."""
        self.analysis.sizes = _sizes(before, sure)
        if not fails and self.trials.passes(alike, 2):
            return []
        if len(kinds) == 1:
            return kinds[0]
        half = len(kinds) // 2
        first = [rule for kind in kinds[:half] for rule in kind]
        last = self._needed(alike, before, kinds[half:], [*sure, *first], fails=False)
        others = [*sure, *last]
        return last + self._needed(alike, before, kinds[:half], others, fails=not last)

    def _tied(self, families: list[Family]) -> list[list[Family]]:
        """Groups of families on common axes or arrays that pass if the same entries go of each."""
        tied: list[list[Family]] = []
        for parts in (2, 1):  # of a place: array and axis, or the array
            left = [f for f in families if not any(f in group for group in tied)]
            tied += self._that_pass_as_one(left, parts)
        return tied

    def _that_pass_as_one(self, families: list[Family], parts: int) -> list[list[Family]]:
        """Such groups of families with common places, of which so many parts count."""
        groups: dict[tuple, list[list[Family]]] = {}
        left = list(families)
        while left:
            group, near = [left.pop(0)], [None]
            while near:
                near = [f for f in left if f.size == group[0].size and _meets(f, group, parts)]
                group += near
                left = [family for family in left if family not in near]
            if len(group) > 1:
                kinds = tuple(_kind(self.analysis, family) for family in group)
                groups.setdefault(kinds, []).append(group)
        tied = []
        for alike in groups.values():
            if self.trials.pass_as_one(alike):
                tied += alike
            elif len(alike) > 1 and self.trials.pass_as_one(alike[:1]):
                tied += [group for group in alike if self.trials.pass_as_one([group])]
        return tied


def _kind(analysis: Analysis, family: Family) -> tuple[Any, ...]:
    """What families have in common that are in the same place of blocks that are alike."""
    names, leaves = analysis.names, analysis.leaves
    places = (
        (re.sub(r"\d+", "#", names[number]), k, leaves[number].shape, int((entries >= 0).sum()))
        for (number, k), entries in family.places.items()
    )
    return family.size, *sorted(places)


def _kind_of_size(rule: SizeRule) -> tuple[str, str]:
    """What numbers have in common that are in the same place of modules that are alike."""
    path = ("#" if str(name).isdecimal() else str(name) for name in rule.path)
    return ".".join(path), rule.attribute


def _sizes(before: list[SizeRule], rules: Rules) -> list[SizeRule]:
    return before + [rule for same in rules for rule in same]


def _meets(family: Family, group: Sequence[Family], parts: int) -> bool:
    ours, *theirs = ({place[:parts] for place in f.places} for f in (family, *group))
    return any(ours & own for own in theirs)


def _guesses(
    analysis: Analysis, modules: Iterable[tuple[tuple, nnx.Module]], family: Family
) -> list[list[SizeRule]]:
    """Numbers in modules around a family's arrays that may be its size: sets to try.

    Of all modules with their paths, they are in those of the user's that hold the arrays, and those
    in them that hold none.
    """
    parts = [tuple(name.split(".")) for name in analysis.names]
    holding = {path[:depth] for path in parts for depth in range(len(path))}
    entries: dict[tuple, SizeRule] = {}
    within: dict[tuple, SizeRule] = {}
    widths: dict[tuple, SizeRule] = {}
    multiples: dict[tuple, SizeRule] = {}
    depths: dict[tuple, int] = {}
    for path, module in modules:
        at = holder = tuple(map(str, path))
        while holder not in holding:
            holder = holder[:-1]
        is_layer = type(module).__module__.startswith("flax.") and not isinstance(module, nnx.Dict)
        if holder == at and is_layer:
            continue
        near = [place for place in family.places if parts[place[0]][: len(holder)] == holder]
        for attribute, value in numbers_in(module) if near else ():
            key, rule = (at, attribute), SizeRule(tuple(path), attribute, tuple(family.atoms))
            depths[key] = len(holder)
            in_tuple = attribute.rpartition(".")[2].isdecimal()
            if value == family.size:
                (within if in_tuple else entries)[key] = rule
            elif in_tuple:
                continue
            elif place := next((p for p in near if value == analysis.leaves[p[0]].shape[p[1]]), ()):
                widths[key] = replace(rule, atoms=(), axis=place)
            elif value % family.size == 0:
                multiples[key] = replace(rule, times=value // family.size)
    one, wide, several = (list(found.values()) for found in (entries, widths, within))
    beside = [rule for (at, _), rule in multiples.items() if at in {at for at, _ in entries}]
    sets = [one, wide, one + wide, *([*one, rule] for rule in beside)]
    sets += [[*one, *several], [*one, *wide, *several]] if several else []
    deepest = max((depths[key] for key in (entries | widths)), default=0)
    inner, inner_wide = (
        [rule for key, rule in found.items() if depths[key] == deepest]
        for found in (entries, widths)
    )
    if len(inner) + len(inner_wide) < len(one) + len(wide):  # around all of it code may count more
        sets += [inner, [*inner, *inner_wide]]
    kinds: dict[tuple[str, str], list[SizeRule]] = {}
    for rule in (*one, *several):
        kinds.setdefault(_kind_of_size(rule), []).append(rule)
    if 1 < len(kinds) <= MOST_KINDS:  # of which one alone may count
        sets += kinds.values()
    return [guess for guess in sets if guess]  # as few as will do


def keep_one_factor(found: Discovery) -> None:
    """Where a position is the product of several entries, freezes all families but that of one.

    An axis of a hypernetwork takes one entry of a latent at each position.
    """
    terms = found.analysis.flow.terms
    while clashing := _clashing(found):
        losing, term = min(
            clashing, key=lambda one: (not one[0].renormalises, one[0].numbers * one[0].size)
        )
        why = "positions of an axis are products of entries of it and others"
        place = parted(terms, term)
        why += f", because of {place}" if place else ""
        for atom in losing.atoms:
            terms.freeze(atom, why)
        found.frozen.append((losing, why))
        found.families = find_families(found.analysis)
        _Settling(found, np.random.default_rng(0)).settle()


def _clashing(found: Discovery) -> list[tuple[Family, int]]:
    """The families with an entry that is multiplied by one of another, and the product's term."""
    terms = found.analysis.flow.terms
    owner = {terms.root(atom): f for f in found.families for atom in f.atoms}
    clashing: dict[int, tuple[Family, int]] = {}
    products = list(terms.parts)
    for axis in (axis for axes in found.analysis.arrays for axis in axes if axis is not None):
        for term in np.unique(axis[np.isin(terms.roots(axis), products)]).tolist():
            met = [owner[atom] for atom in terms.atoms(term) if atom in owner]
            if len(met) > 1:
                clashing |= {id(family): (family, term) for family in met}
    return list(clashing.values())
