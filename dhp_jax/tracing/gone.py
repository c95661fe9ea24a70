"""Which atoms are gone, by what is left of arrays; refused where parts of one are kept."""

from collections.abc import Mapping, Sequence

import numpy as np

from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.proof import Mismatch
from dhp_jax.tracing.terms import TRUE, parted, reason, tie

KeptArrays = Mapping[str, Sequence[np.ndarray]]


def gone_atoms(analysis: Analysis, kept: KeptArrays) -> frozenset[int]:
    """The atoms without which just these positions are left.

    Args:
      analysis: of the whole network.
      kept: by array what is left of each axis, boolean masks.

    Raises:
      Mismatch: there are none; it tells two positions that go together, and where that comes from.
    """
    terms = analysis.flow.terms
    left: dict[int, tuple[str, int, int]] = {}  # term -> a place where it is kept
    lost: dict[int, tuple[str, int, int]] = {}
    for name, axes in zip(analysis.names, analysis.arrays, strict=True):
        for k, (axis, mask) in enumerate(zip(axes, kept[name], strict=True)):
            if axis is None:
                if not mask.all():
                    raise Mismatch(f"{name!r}: axis {k} must stay as it is")
                continue
            roots = terms.roots(axis)
            for found, where in ((left, mask), (lost, ~mask)):
                values, first = np.unique(roots[where], return_index=True)
                positions = np.flatnonzero(where)[first]
                for term, position in zip(values.tolist(), positions.tolist(), strict=True):
                    found.setdefault(term, (name, k, position))
    if TRUE in lost:
        name, k, position = lost[TRUE]
        raw = int(analysis.arrays[analysis.names.index(name)][k][position])
        raise Mismatch(f"{_place(lost[TRUE])} must stay: {reason(terms, raw)}")
    for term in lost.keys() & left.keys():
        raise Mismatch(_torn(analysis, lost[term], left[term]))
    alive = frozenset().union(*map(terms.atoms, left)) if left else frozenset()
    gone = frozenset().union(*map(terms.atoms, lost)) - alive if lost else frozenset()
    for term, place in lost.items():
        if gone.isdisjoint(terms.atoms(term)):
            name, k, position = place
            raw = int(analysis.arrays[analysis.names.index(name)][k][position])
            why = parted(terms, raw) or "how the code reshapes or reorders its axis"
            raise Mismatch(
                f"{_place(place)} goes, but it goes together with positions that stay, because of "
                f"{why}"
            )
    return gone


def _place(place: tuple[str, int, int]) -> str:
    name, k, position = place
    return f"position {position} of axis {k} of {name!r}"


def _torn(analysis: Analysis, lost: tuple[str, int, int], left: tuple[str, int, int]) -> str:
    """What is wrong if of two positions that go together one is kept."""
    axes = []
    for name, k, _ in (lost, left):
        axes.append(analysis.arrays[analysis.names.index(name)][k])
    terms = analysis.flow.terms
    why = tie(terms, int(axes[0][lost[2]]), int(axes[1][left[2]]))
    text = f"{_place(lost)} goes, {_place(left)} stays, but they are one"
    text += f" because of {why}" if why else ""
    for (name, k, _), base, wanted in ((left, axes[1], axes[0]), (lost, axes[0], axes[1])):
        form = _form(terms.roots(wanted), terms.roots(base))
        if form:
            return f"{text}; with z the axis {k} of {name!r}, the other is {form}"
    return text


def _form(wanted: np.ndarray, base: np.ndarray) -> str:
    """How one axis is made of another, if it is a form that can be declared."""
    index = {term: position for position, term in enumerate(base.tolist())}
    if len(index) < len(base) or not all(term in index for term in wanted.tolist()):
        return ""
    places, size = np.array([index[term] for term in wanted.tolist()]), len(base)
    times = len(wanted) // size
    if times * size != len(wanted):
        return ""
    if times == 1 and np.array_equal(places, np.arange(size)):
        return "z itself"
    if times > 1 and np.array_equal(places, np.tile(np.arange(size), times)):
        return f"concat(*[z] * {times})"
    if times > 1 and np.array_equal(places, np.repeat(np.arange(size), times)):
        return f"repeat(z, {times})"
    return ""
