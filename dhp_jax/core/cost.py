"""FLOPs, params and activations of a network, whole or pruned.

FLOPs are multiply-accumulates: convolutions (transposed ones as if every tap met every output) and
contractions, plus 2 for every normalised element and 1 for every element of the last call of a
`ReLU` or PReLU layer; biases and `nnx.relu` are not counted. Params are the arrays of `nnx.Param`
that are read. Activations are the bytes of the outputs of all other layers that have FLOPs, each in
the dtype that it computes in, for one example: a sum, and not the peak. What ReLU, pools and
additions return is not counted. Of branches, as of `lax.cond`, those of most FLOPs count, and those
of most activations; params are those of all. `dhp_jax.tracing.counts` measures them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.core.branches import Part, Place
from dhp_jax.errors import check_counts

Counts = Mapping[str, "int | Array"]
MEASURES = ("flops", "params", "activations")


@dataclass(frozen=True)
class Width:
    """A number of channels: `fixed + sum of times * survivors of a latent`."""

    full: int
    fixed: int
    latents: tuple[tuple[str, int], ...] = ()

    def channels(self, counts: Counts) -> "int | Array":
        """The number of channels when `counts[name]` entries of each latent survive."""
        return self.fixed + sum(times * counts[name] for name, times in self.latents)


class Product(NamedTuple):
    """A number of operations, of numbers or of bytes: a factor times some widths."""

    factor: int
    widths: tuple[Width, ...] = ()

    def amount(self, counts: Counts) -> "int | Array":
        """The product when `counts[name]` entries of each latent survive."""
        return math.prod((width.channels(counts) for width in self.widths), start=self.factor)

    @property
    def full(self) -> int:
        """The product when everything survives."""
        return math.prod((width.full for width in self.widths), start=self.factor)


@dataclass(frozen=True)
class LayerCost:
    """The cost of one call of a layer, in the branches of `place`.

    FLOPs, params and activations are sums of products of widths. A layer that is called again costs
    FLOPs and activations again, but no params.
    """

    path: str
    kind: str
    inputs: Width
    outputs: Width
    flops_terms: tuple[Product, ...]
    params_terms: tuple[Product, ...]
    activations_terms: tuple[Product, ...]
    place: Place = ()

    @property
    def terms(self) -> tuple[tuple[Product, ...], ...]:
        """Those of each measure."""
        return self.flops_terms, self.params_terms, self.activations_terms

    def amounts(self, counts: Counts) -> "tuple[int | Array, ...]":
        """FLOPs, params and activations when `counts[name]` entries of each latent survive."""
        return tuple(sum(term.amount(counts) for term in terms) for terms in self.terms)

    @property
    def flops(self) -> int:
        return sum(term.full for term in self.flops_terms)

    @property
    def params(self) -> int:
        return sum(term.full for term in self.params_terms)

    @property
    def activations(self) -> int:
        return sum(term.full for term in self.activations_terms)


@dataclass(frozen=True)
class Cost:
    """The cost of a network for its inputs, layer by layer in the order of execution.

    Attributes:
      layers: the cost of each call of a layer; FLOPs and activations where its branch counts.
      sizes: entries of each latent by name.
      recount: counts what boolean masks of the latents leave, where `amounts` may differ from it:
        an einsum of several arrays is run in the order that is cheapest for its sizes, and
        `amounts` has that of the whole network. `None` where they agree.
      calls: the layers with what each costs where it runs; `layers` if there are no branches.

    Example:
      >>> cost = dhp.measure_cost(model, (32, 32, 3))
      >>> counts = {name: mask.sum() for name, mask in dhp.survivors(model).items()}
      >>> cost.flops, cost.shares(counts)["flops"]
    """

    layers: tuple[LayerCost, ...]
    sizes: Mapping[str, int]
    recount: "Callable[[Mapping[str, np.ndarray]], Cost] | None" = field(
        default=None, compare=False, repr=False
    )
    calls: tuple[LayerCost, ...] = ()

    @classmethod
    def of_calls(cls, calls: Sequence[LayerCost], sizes: Mapping[str, int]) -> "Cost":
        """The cost of calls of layers, of which some stand in branches."""
        cost = cls(tuple(calls), sizes)
        whole = cost.at_places(lambda call: (call.flops, call.activations))
        flops, activations = (
            cost._whole.costliest({place: numbers[i] for place, numbers in whole.items()})
            for i in range(2)
        )
        counted = (
            replace(
                call,
                flops_terms=call.flops_terms if call.place in flops else (),
                activations_terms=call.activations_terms if call.place in activations else (),
            )
            for call in calls
        )
        return replace(cost, layers=tuple(counted))

    def __post_init__(self):
        object.__setattr__(self, "calls", self.calls or self.layers)

    def __repr__(self) -> str:
        """The totals in one line; `layers` holds the details."""
        totals = ", ".join(f"{name}={getattr(self, name):_}" for name in MEASURES)
        return f"Cost({totals}, layers={len(self.layers)})"

    @functools.cached_property
    def _whole(self) -> Part:
        return Part.of({call.place for call in self.calls})

    def at_places(
        self, numbers: "Callable[[LayerCost], Iterable[int | Array]]"
    ) -> "dict[Place, tuple[int | Array, ...]]":
        """Numbers of each call, summed over those at each place."""
        found: dict[Place, list[Any]] = {}
        for call in self.calls:
            found.setdefault(call.place, []).append(numbers(call))
        return {p: tuple(map(sum, zip(*each, strict=True))) for p, each in found.items()}

    def total(self, measure: str, at: "Mapping[Place, int | Array]") -> "int | Array":
        """What the network has of a measure, by what the calls at each place have of it."""
        return self._whole.total(at, operator.add if measure == "params" else _most)

    @functools.cached_property
    def flops(self) -> int:
        """Multiply-accumulates of one forward pass; exact."""
        return sum(layer.flops for layer in self.layers)

    @functools.cached_property
    def params(self) -> int:
        """Trainable parameters of the network (not of its hypernetworks); exact."""
        return sum(layer.params for layer in self.layers)

    @functools.cached_property
    def activations(self) -> int:
        """Bytes of the outputs of all layers that have FLOPs; exact."""
        return sum(layer.activations for layer in self.layers)

    def amounts(self, counts: Counts) -> "dict[str, int | Array]":
        """FLOPs, params and activations by name when `counts[name]` entries of each latent survive.

        They are exact: Python ints give Python ints, and integer arrays (in a jitted function) give
        int64 arrays. Counts that no pruning leaves are refused.
        """
        check_counts("counts", counts, self.sizes)
        if all(isinstance(count, int | np.integer) for count in counts.values()):
            whole = {name: int(count) for name, count in counts.items()}
            return _totals(self, self.at_places(lambda call: call.amounts(whole)))
        with jax.enable_x64(True):  # FLOPs of large images do not fit 32 bits
            present = self.polynomials.present(counts, jnp.int64)
            return _totals(self, self.polynomials.at_places(present))

    def shares(self, counts: Counts) -> "dict[str, float | Array]":
        """`amounts(counts)` as shares of the whole model's (float32 in jit)."""
        amounts = self.amounts(counts)
        with jax.enable_x64(True):
            shares = {
                name: amount / whole if (whole := getattr(self, name)) else 1.0
                for name, amount in amounts.items()
            }
            known = all(isinstance(amount, int) for amount in amounts.values())
            return shares if known else {name: jnp.float32(n) for name, n in shares.items()}

    @functools.cached_property
    def polynomials(self) -> "Polynomials":
        """The same as few arrays, for programs that count."""
        return Polynomials.of(self.calls)


def _totals(cost: Cost, found: "Mapping[Place, Sequence[int | Array]]") -> "dict[str, int | Array]":
    """Each measure of a network, by those of the calls at each place."""
    return {
        name: cost.total(name, {place: amounts[i] for place, amounts in found.items()})
        for i, name in enumerate(MEASURES)
    }


def _most(one: "int | Array", other: "int | Array") -> "int | Array":
    """The larger of two numbers, or those of two arrays."""
    known = all(isinstance(amount, int | float) for amount in (one, other))
    return max(one, other) if known else jnp.maximum(one, other)


class Polynomials(NamedTuple):
    """All products of a network as a few arrays, so that a step counts them in a few operations.

    Of `L` latents `times`, `(W, 1 + L)`, has what is fixed in each width and how often it has
    entries of each; `widths`, `(P, D)`, the widths of each product; and `factors`, `(N, 3, P)`, how
    often each measure has each product at each of the `places`.
    """

    names: tuple[str, ...]
    times: np.ndarray
    widths: np.ndarray
    places: tuple[Place, ...]
    factors: np.ndarray

    @classmethod
    def of(cls, calls: tuple[LayerCost, ...]) -> "Polynomials":
        """Those of the calls of layers; like products are one."""
        places = dict.fromkeys([(), *(call.place for call in calls)])
        at = {place: i for i, place in enumerate(places)}
        found: dict[tuple[Width, ...], np.ndarray] = {}
        for call in calls:
            for measure, terms in enumerate(call.terms):
                for term in terms:
                    none = np.zeros((len(at), len(MEASURES)), np.int64)
                    found.setdefault(term.widths, none)[at[call.place], measure] += term.factor
        one, degree = Width(1, 1), max(map(len, found), default=0)
        products = [(*widths, *[one] * (degree - len(widths))) for widths in found]
        numbers = {width: i for i, width in enumerate(dict.fromkeys(sum(products, (one,))))}
        names = tuple(dict.fromkeys(name for width in numbers for name, _ in width.latents))
        times = [[w.fixed, *(dict(w.latents).get(name, 0) for name in names)] for w in numbers]
        widths = [[numbers[width] for width in product] for product in products]
        widths = np.array(widths, np.int32).reshape(len(products), degree)
        factors = np.array(list(found.values()), np.int64).reshape(-1, len(at), len(MEASURES))
        return cls(names, np.array(times), widths, tuple(places), np.moveaxis(factors, 0, -1))

    def present(self, counts: Counts, dtype: Any) -> Array:
        """A 1 and the counts in the order of `names`, along the last axis."""
        each = [jnp.asarray(n, dtype) for n in (1, *(counts[name] for name in self.names))]
        return jnp.stack(jnp.broadcast_arrays(*each), axis=-1)

    def at_places(self, present: Array) -> dict[Place, tuple[Array, ...]]:
        """Each measure by place, in the dtype of the numbers that are `present`."""
        times, factors = self.times.astype(present.dtype), self.factors.astype(present.dtype)
        widths = jnp.sum(times * present[..., None, :], axis=-1)
        products = jnp.prod(jnp.take(widths, self.widths, axis=-1, mode="clip"), axis=-1)
        return {
            place: tuple(jnp.unstack(jnp.sum(each * products[..., None, :], axis=-1), axis=-1))
            for place, each in zip(self.places, factors, strict=True)
        }
