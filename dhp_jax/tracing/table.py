"""Which entry of which latent each position of a network's arrays belongs to; how it is cut."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flax import nnx
import jax
import numpy as np

from dhp_jax.core.provenance import architecture_of, set_architecture
from dhp_jax.core.state import path_name
from dhp_jax.tracing.analysis import Analysis, analyse, cut_model
from dhp_jax.tracing.cuts import NO_CUTS, set_numbers
from dhp_jax.tracing.discovery import Discovery
from dhp_jax.tracing.generated import Positions, ordinary
from dhp_jax.tracing.gone import gone_atoms
from dhp_jax.tracing.programs import Call, default_call
from dhp_jax.tracing.proof import Mismatch
from dhp_jax.tracing.terms import Terms

ORDINARY_CALLS = "ordinary_calls"  # a note: whether arrays are ordinary ones in calls
ADDED = "added"  # a note: the latents whose entries are added up as they are


@dataclass(frozen=True)
class SizeEntry:
    """A number in a module of the user's that is cut with an axis.

    Attributes:
      path: of the module.
      attribute: of the number.
      latent, times: it is so many times the number of survivors of this; or
      array, axis: it is the size of this axis.
    """

    path: str
    attribute: str
    latent: str | None = None
    array: str | None = None
    axis: int = 0
    times: int = 1


@dataclass(frozen=True, eq=False)
class LatentTable:
    """What a network of traced latents is.

    Attributes:
      sizes: of the latents, by name.
      places: by array and axis the entry of which latent (by its number in `sizes`) each position
        belongs to; axes of which all positions stay are left out.
      numbers: that are cut with the axes.
      inputs: abstract arguments that it was traced with.
      call: how it is called; `None` for a function that is not known, of a network from a file.
      notes: what `dhp.explain` tells.
    """

    sizes: Mapping[str, int]
    places: Mapping[str, Mapping[int, Positions]]
    numbers: tuple[SizeEntry, ...] = ()
    inputs: tuple[Any, ...] | None = None
    call: Call | None = default_call
    notes: Mapping[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    def kept(self, name: str, shape: Sequence[int], masks: Mapping[str, np.ndarray]):
        """What is left of each axis of an array, boolean masks."""
        ordered, places = [masks[latent] for latent in self.sizes], self.places.get(name, {})
        return [
            places[k].kept(ordered) if k in places else np.ones(size, bool)
            for k, size in enumerate(shape)
        ]

    def owners(self, axes: Mapping[str, Iterable[int]]) -> set[str]:
        """The latents of the positions of some axes of arrays."""
        names, places = [*self.sizes, ""], self.places
        found = [places[a][k] for a, own in axes.items() for k in own if k in places.get(a, {})]
        return {names[n] for positions in found for n in positions.owner.tolist()} - {""}

    def numbers_of(
        self, kept: Mapping[str, list[np.ndarray]], masks: Mapping[str, np.ndarray]
    ) -> list[tuple[str, str, int]]:
        """The numbers in modules after cutting: path, attribute and value."""
        found = []
        for entry in self.numbers:
            if entry.latent is not None:
                left = entry.times * int(np.sum(masks[entry.latent]))
            else:
                left = int(kept[entry.array][entry.axis].sum())
            found.append((entry.path, entry.attribute, left))
        return found

    def cut(
        self, plain: nnx.Module, masks: Mapping[str, np.ndarray]
    ) -> tuple[nnx.Module, dict[str, list[np.ndarray]], list[tuple[str, str, int]]]:
        """What survives of the ordinary network, not proved; what is kept, and its numbers."""
        graphdef, state = nnx.split(plain)
        names = [path_name(path) for path, _ in nnx.to_flat_state(state)]
        arrays = zip(names, jax.tree.leaves(state), strict=True)
        kept = {name: self.kept(name, x.shape, masks) for name, x in arrays}
        small = cut_model(graphdef, state, list(kept.values()))
        numbers = self.numbers_of(kept, masks)
        set_numbers(small, numbers)
        return small, kept, numbers

    def prune(self, net: nnx.Module, masks: Mapping[str, np.ndarray]) -> nnx.Module:
        """The network of what survives, proved to be that; `net` is left as it was.

        Raises:
          ValueError: it cannot be proved.
        """
        made = architecture_of(net)
        plain = ordinary(net)
        if all(np.all(mask) for mask in masks.values()):
            return plain
        small, kept, numbers = self.cut(plain, masks)
        try:
            analysis = self.analysis(plain)
            analysis.prove(gone_atoms(analysis, kept), small)
        except Mismatch as error:
            raise ValueError(f"keep: these survivors are not proved to be right: {error}") from None
        cuts = (made.cuts or NO_CUTS).then(kept, numbers)
        left = {name: tuple(np.flatnonzero(mask).tolist()) for name, mask in masks.items()}
        set_architecture(
            small, replace(made, axes=None, cuts=cuts, survivors=made.survivors or left)
        )
        return small

    def analysis(self, model: nnx.Module) -> Analysis:
        """The equations of the ordinary network; solved once."""
        if "analysis" not in self.cache:
            if self.call is None or self.inputs is None:
                raise ValueError(
                    "model: expected a network whose inputs and call are known; "
                    "give load the call that with_latents had"
                )
            self.cache["analysis"] = analyse(model, self.inputs, self.call)
        return self.cache["analysis"]


def table_of(found: Discovery, notes: Mapping[str, Any]) -> LatentTable:
    """The table of what was discovered."""
    analysis = found.analysis
    terms = analysis.flow.terms
    owner, entry = np.full(terms.size, -1), np.zeros(terms.size, np.int64)
    for number, family in enumerate(found.families):
        atoms = terms.roots(np.array(family.atoms))
        owner[atoms], entry[atoms] = number, np.arange(family.size)
    places: dict[str, dict[int, Positions]] = {}
    for name, axes in zip(analysis.names, analysis.arrays, strict=True):
        for k, axis in enumerate(axes):
            if axis is None:
                continue
            roots = terms.roots(axis)
            for term in terms.parts.keys() & set(roots.tolist()):
                owner[term], entry[term] = _owner(terms, term, owner, entry)
            if (owner[roots] >= 0).any():
                places.setdefault(name, {})[k] = Positions(owner[roots], entry[roots])
    family_of = {atom: family.name for family in found.families for atom in family.atoms}
    numbers = []
    for rule in analysis.sizes:
        path = path_name(rule.path)
        if rule.axis is not None:
            array, k = rule.axis
            numbers.append(SizeEntry(path, rule.attribute, None, analysis.names[array], k))
        elif rule.atoms[0] in family_of:
            latent = family_of[rule.atoms[0]]
            numbers.append(SizeEntry(path, rule.attribute, latent, times=rule.times))
    return LatentTable(
        {family.name: family.size for family in found.families},
        places,
        tuple(numbers),
        analysis.inputs,
        analysis.call,
        notes,
        {"analysis": analysis},
    )


def _owner(terms: Terms, term: int, owner: np.ndarray, entry: np.ndarray) -> tuple[int, int]:
    """The latent and entry of a product; several only if one alone would not do."""
    found = [atom for atom in terms.atoms(term) if owner[atom] >= 0]
    if len(found) > 1:
        raise RuntimeError("a position belongs to several latents")
    return (int(owner[found[0]]), int(entry[found[0]])) if found else (-1, 0)
