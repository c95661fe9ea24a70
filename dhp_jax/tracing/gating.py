"""Which axes of arrays the latents of a traced network gate, and which gates count."""

from typing import NamedTuple

from flax import nnx
import numpy as np

from dhp_jax.core.latent import latents
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.state import variables_of
from dhp_jax.tracing.generated import ordinary
from dhp_jax.tracing.reads import open_axes
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


class Gating(NamedTuple):
    """The gates that close the channels of each latent.

    Attributes:
      shares: by array the axes whose positions latents multiply, and of each, for each latent
        there, how much the derivative of its gate counts:
        what makes its channels or what reads them, and half of each of two things that are
        multiplied. With them the derivative by a latent is that by a factor of its channels. Of
        arrays that make channels one after another, as a kernel and a scale behind it, each counts.
      stay: the latents that gates do not close.
    """

    shares: Shares
    stay: list[str]


def gating(model: nnx.Module) -> Gating:
    """The gates of a network of traced latents.

    A latent gates the kernels that read its channels. Where they do not close them, it gates every
    array that it is in; then what makes the channels counts, and not what reads them.
    """
    table, plain = architecture_of(model).axes, ordinary(model)
    named, variables = latents(model), variables_of(plain)
    found = [weights for weights in weights_of(model) if weights.role == READ]
    axes: dict[str, list[int]] = {}
    for weights in found:
        axes.setdefault(weights.array, []).append(weights.axis)
    readers = {(weights.array, weights.axis) for weights in found}
    ruled = {latent for weights in found for latent, _ in filter(None, weights.entries)}
    analysis = table.analysis(plain)
    others, never, products = (table.owners(each) for each in open_axes(analysis))
    by_makers = others | unread(table, analysis)
    by_makers |= {name for name in table.sizes if named[name] not in ruled}
    whole = by_makers | never
    names, made = list(table.sizes), set()
    for array, places in table.places.items():
        if not isinstance(variables[array], nnx.Param):
            continue
        for k, positions in places.items():
            closed = {names[n] for n in np.unique(positions.owner).tolist() if n >= 0} & whole
            if closed and k not in axes.get(array, []):
                axes.setdefault(array, []).append(k)
                made |= closed & by_makers
    shares: Shares = {}
    for array, each in axes.items():
        for k in each:
            reads, own = (array, k) in readers, shares.setdefault(array, {}).setdefault(k, {})
            for n in np.unique(table.places[array][k].owner).tolist():
                if n >= 0:
                    name = names[n]
                    counts = reads != (name in made)
                    own[name] = counts * (0.5 if name in made & products else 1.0)
    return Gating(shares, sorted(never))


def gated_places(model: nnx.Module) -> dict[tuple[str, int], tuple[Entries, np.ndarray]]:
    """By array and axis the entries that gate it, each with how much its derivative counts.

    Raises:
      ValueError: a network without latents; nothing gates the channels of a prunable latent.
    """
    table = architecture_of(model).axes
    if table is None:
        readers = scored_weights(model, READ)
        return {(w.array, w.axis): (w.entries, np.ones(len(w.entries))) for w in readers}
    owners, gates = [latents(model)[name] for name in table.sizes], gating(model)
    places = {}
    for array, axes in gates.shares.items():
        for k, shares in axes.items():
            positions = table.places[array][k]
            counts = [shares.get(name, 0.0) for name in table.sizes]
            each = np.array([*counts, 0.0])[positions.owner]  # the last is of what stays
            places[array, k] = entries_of(owners, positions), each
    check_scored(model, (entries for entries, _ in places.values()), READ)
    return places
