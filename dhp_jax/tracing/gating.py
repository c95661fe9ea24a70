"""Which axes of arrays the latents of a traced network gate, and which gates count."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from flax import nnx
import jax.numpy as jnp
import numpy as np

from dhp_jax.core.latent import latents
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.state import value_of, variables_of
from dhp_jax.errors import ArgumentError
from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.generated import ordinary
from dhp_jax.tracing.origins import Places
from dhp_jax.tracing.reads import all_reads, by_array
from dhp_jax.tracing.table import ADDED, LatentTable
from dhp_jax.tracing.weights import (
    READ,
    Entries,
    check_scored,
    entries_of,
    scored_weights,
    unread,
    weights_of,
)

Shares = dict[str, dict[int, dict[str, float]]]
CLOSED = "zero where their arrays are, and in proportion to these"  # what channels with gates are


class Gating(NamedTuple):
    """The gates that close the channels of each latent.

    Attributes:
      shares: by array the axes whose positions latents multiply, and of each, for each latent
        there, how much the derivative of its gate counts:
        what makes its channels or what reads them, and half of each of two things that are
        multiplied. With them the derivative by a latent is that by a factor of its channels. Of
        arrays that make channels one after another, the last ones count to which the channels are
        in proportion; each counts where they are in proportion to none, as behind a tanh.
      stay: the latents that gates do not close.
      unknown: those of them for which the derivative is not that by a factor of channels.
    """

    shares: Shares
    stay: list[str]
    unknown: list[str]


def gating(model: nnx.Module) -> Gating:
    """The gates of a network of traced latents.

    A latent gates the kernels that read its channels. Where they do not close them, or are not in
    proportion to their arrays, it gates every array that it is in; then what makes the channels
    counts, and not what reads them.

    Raises:
      ValueError: the channels of a latent are closed by no array that has gates, and one of its
        arrays has none, for it is of integers.
    """
    table, plain = architecture_of(model).axes, ordinary(model)
    named, variables = latents(model), variables_of(plain)
    found = [weights for weights in weights_of(model) if weights.role == READ]
    found = [weights for weights in found if _is_inexact(variables[weights.array])]
    axes: dict[str, list[int]] = {}
    for weights in found:
        axes.setdefault(weights.array, []).append(weights.axis)
    readers = {(weights.array, weights.axis) for weights in found}
    ruled = {latent for weights in found for latent, _ in filter(None, weights.entries)}
    analysis = table.analysis(plain)
    read = all_reads(analysis)
    others, never, products, bent, closed, bent_makers, sums, open_sums = (
        table.owners(by_array(analysis, each))
        for each in (
            read.others,
            read.never,
            read.products,
            read.bent,
            read.bent_and_closed,
            read.bent_makers,
            read.sums,
            read.open_sums,
        )
    )
    added = set(table.notes.get(ADDED, ()))
    others, never = others | (added & sums), never | (added & open_sums)
    by_makers = others | closed | unread(table, analysis)
    by_makers |= {name for name in table.sizes if named[name] not in ruled}
    counted = {name: _counted(table, analysis, read.channels, name) for name in by_makers}
    never |= {name for name in by_makers & (closed | bent_makers) if not counted[name]}
    unknown = {name for name in never & (by_makers | bent) if not counted.get(name)}
    _check_numbers(table, variables, never)
    whole = by_makers | never
    names, made = list(table.sizes), set()
    for array, places in table.places.items():
        if not _may_have_gates(variables[array]):
            continue
        for k, positions in places.items():
            within = {names[n] for n in np.unique(positions.owner).tolist() if n >= 0} & whole
            if within and k not in axes.get(array, []):
                axes.setdefault(array, []).append(k)
                made |= within & by_makers
    shares: Shares = {}
    for array, each in axes.items():
        for k in each:
            reads, own = (array, k) in readers, shares.setdefault(array, {}).setdefault(k, {})
            for n in np.unique(table.places[array][k].owner).tolist():
                if n >= 0:
                    name = names[n]
                    last = counted.get(name)
                    counts = (array, k) in last if last else reads != (name in made)
                    own[name] = counts * (0.5 if name in made & products else 1.0)
    return Gating(shares, sorted(never), sorted(unknown))


def _may_have_gates(variable: nnx.Variable) -> bool:
    return isinstance(variable, nnx.Param) and _is_inexact(variable)


def _is_inexact(variable: nnx.Variable) -> bool:
    return jnp.issubdtype(value_of(variable).dtype, jnp.inexact)


def _counted(
    table: LatentTable,
    analysis: Analysis,
    channels: Iterable[tuple[Places, Places]],
    name: str,
) -> set[tuple[str, int]]:
    """The arrays' axes to which all channels of a latent are in proportion that something reads.

    With all of them times a number, whatever is read is times that number. Empty if there are none.
    """
    own = list(table.sizes).index(name)
    owned = {
        (array, k)
        for array, places in table.places.items()
        for k, positions in places.items()
        if (positions.owner == own).any()
    }
    numbers = {array: n for n, array in enumerate(analysis.names)}
    places = frozenset((numbers[array], k) for array, k in owned)
    read = [(comes & places, scaled & places) for comes, scaled in channels if comes & places]
    counted = frozenset().union(*(scaled for _, scaled in read))
    if not all(scaled and comes & counted == scaled for comes, scaled in read):
        return set()
    return {(array, k) for array, k in owned if (numbers[array], k) in counted}


def _check_numbers(
    table: LatentTable, variables: Mapping[str, nnx.Variable], never: set[str]
) -> None:
    """Raises if gates do not close a latent, and arrays of integers are on it."""
    for array, places in table.places.items():
        if isinstance(variables[array], nnx.Param) and not _may_have_gates(variables[array]):
            for name in sorted(table.owners({array: places}) & never):
                detail = (
                    f"expected floating-point numbers where latent {name!r} is to have gates; "
                    f"{array!r} is of {value_of(variables[array]).dtype}"
                )
                raise ArgumentError("model", detail=detail)


def gated_places(model: nnx.Module) -> dict[tuple[str, int], tuple[Entries, np.ndarray]]:
    """By array and axis the entries that gate it, each with how much its derivative counts.

    Raises:
      ValueError: a network without latents; gates do not close the channels of a prunable latent,
        or as `gating`.
    """
    table = architecture_of(model).axes
    if table is None:
        readers = scored_weights(model, READ)
        return {(w.array, w.axis): (w.entries, np.ones(len(w.entries))) for w in readers}
    owners, gates = [latents(model)[name] for name in table.sizes], gating(model)
    for name in gates.unknown:
        if latents(model)[name].prunable:
            detail = f"expected channels that are {CLOSED}; those of latent {name!r} are not"
            raise ArgumentError("model", detail=detail)
    places = {}
    for array, axes in gates.shares.items():
        for k, shares in axes.items():
            positions = table.places[array][k]
            counts = [shares.get(name, 0.0) for name in table.sizes]
            each = np.array([*counts, 0.0])[positions.owner]  # the last is of what stays
            places[array, k] = entries_of(owners, positions), each
    check_scored(model, (entries for entries, _ in places.values()), READ)
    return places
