"""What the axes of a value come from: which arrays, and whether they are in proportion to them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn
import jax.numpy as jnp

from dhp_jax.tracing.programs import DOTS, dot_numbers, shape_of
from dhp_jax.tracing.rules import ELEMENTWISE, reshaped_together

Origins = frozenset[tuple[int, int, bool]]  # array, axis, whether zero where the array is
Places = frozenset[tuple[int, int]]  # array, axis
Parts = frozenset[tuple[int, bool]]  # array, whether it got axes to be repeated along
NONE: Origins = frozenset()
NOWHERE: Places = frozenset()
NO_PARTS: Parts = frozenset()
INPUT, CHOSEN, ALONE = range(3)
"""How a value is `ALONE`: it follows from arrays of the network alone, or they do and the input
chooses which of their entries it has (`CHOSEN`), as the kernels of an expert, or neither."""
SAME = ("rev", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "fft", "copy")
PARTS = ("slice", "dynamic_slice", "pad", "split", "tile", "concatenate", "dynamic_update_slice")

_OF_ONE = """
    neg sign abs floor ceil round expm1 log1p sqrt cbrt square integer_pow tanh sin tan asin atan
    sinh asinh atanh erf real imag conj convert_element_type reduce_precision stop_gradient copy
    copy_p name device_put sharding_constraint optimization_barrier layer_output
"""
OF_ONE = frozenset(_OF_ONE.split())  # elementwise, which make zero of zero
OF_ALL = ("add", "sub", "max", "min", "clamp", "add_any", "select_n")  # of zeros alone
OF_ANY = ("mul", "div", "and")
_SCALING = """
    neg abs real imag conj convert_element_type reduce_precision copy copy_p name device_put
    sharding_constraint mesh_cast reshard pvary optimization_barrier layer_output
    add sub max min add_any select_n complex stack unstack
    rev cumsum cummax cummin fft slice dynamic_slice pad split tile concatenate dynamic_update_slice
    scatter scatter-add reduce_sum reduce_max reduce_min reduce_window_sum reduce_window_max
    reduce_window_min
"""
SCALING = frozenset(_SCALING.split())  # of inputs times a positive number make outputs times it
COMPARING = ("eq", "ne", "lt", "le", "gt", "ge", "sign")


class Source(NamedTuple):
    """What an axis of a value comes from.

    Attributes:
      comes: the axes of arrays that its positions come from.
      linear: axes of arrays; with the positions of all of them times a positive number, the
        positions of this axis are times that number, and nothing else of the value changes.
      scaled: the same, but what is read of the channels in between counts as unchanged: a residual
        branch is in proportion to its last kernel, though it also reads what is added.
      flat: axes of arrays; such a number changes nothing, as of the sign of what is `scaled`.
    """

    comes: Origins = NONE
    linear: Places = NOWHERE
    scaled: Places = NOWHERE
    flat: Places = NOWHERE

    def bent(self) -> "Source":
        """The same, in proportion to nothing."""
        return Source(self.comes)

    def changes_with(self) -> Places:
        return frozenset((array, k) for array, k, _ in self.comes) - self.flat


class Value(NamedTuple):
    """What is known of a value.

    Attributes:
      alone: whether it follows from arrays of the network alone; see `ALONE`.
      axes: what each axis comes from.
      number: what all of its entries are, if that is known.
      depends: the arrays that it depends on.
      parts: of what does not follow from the input, but by choice, the arrays that it is made of.
    """

    alone: int
    axes: tuple[Source, ...]
    number: Any = None
    depends: frozenset[int] = frozenset()
    parts: Parts = NO_PARTS


def is_zero(origins: Origins) -> bool:
    """Whether positions are zero where those of all arrays are that they come from."""
    return bool(origins) and all(zero for *_, zero in origins)


def either(values: Sequence[Value]) -> Value:
    """A value that may be any of several of one shape."""
    numbers = {value.number for value in values}
    number = numbers.pop() if len(numbers) == 1 else None
    depends = frozenset().union(*(value.depends for value in values))
    own = zip(*(value.axes for value in values), strict=True)
    alone = min(value.alone for value in values)
    parts = NO_PARTS.union(*(value.parts for value in values)) if alone != INPUT else NO_PARTS
    return Value(alone, tuple(map(_either, own)), number, depends, parts)


def _either(sources: Sequence[Source]) -> Source:
    comes = NONE.union(*(source.comes for source in sources))
    same = [own.pop() if len(own) == 1 else NOWHERE for own in map(set, _facts(sources))]
    return Source(comes, *same)


def _facts(sources: Sequence[Source]) -> list[list[Places]]:
    """Of each source `linear`, `scaled` and `flat`."""
    return [[getattr(source, fact) for source in sources] for fact in Source._fields[1:]]


def moved(eqn: JaxprEqn, given: Sequence[Value], shape: tuple[int, ...]) -> tuple[Source, ...]:
    """What the axes of what an operation makes come from; nothing where that is not known."""
    name, params = eqn.primitive.name, eqn.params
    first = given[0].axes if given else ()
    if name in ELEMENTWISE:
        return tuple(_one_by_one(eqn, given, k, size) for k, size in enumerate(shape))
    if name == "transpose":
        return tuple(first[k] for k in params["permutation"])
    if name == "broadcast_in_dim":
        source = {k: j for j, k in enumerate(params["broadcast_dimensions"])}
        return tuple(first[source[k]] if k in source else Source() for k in range(len(shape)))
    if name in ("reshape", "squeeze", "expand_dims"):
        made = [Source()] * len(shape)
        permuted = params.get("dimensions") if name == "reshape" else None
        order = permuted or range(len(first))  # of the axes, before they are split and merged
        before = [shape_of(eqn.invars[0])[k] for k in order]
        for sources, targets in reshaped_together(before, shape):
            for k in targets:
                made[k] = _joined([first[order[j]] for j in sources])
        return tuple(made)
    if name == "stack":
        parts, along = _of_parts(eqn, given, len(shape) - 1), params["axis"]
        return (*parts[:along], Source(), *parts[along:])
    if name == "unstack":
        parts, along = _of_parts(eqn, given, len(shape) + 1), params["axis"]
        return (*parts[:along], *parts[along + 1 :])
    if name in SAME or name in PARTS or name.startswith("scatter"):
        return _of_parts(eqn, given, len(shape))
    if name.startswith(("reduce_", "arg")) and "axes" in params:
        left = (own for k, own in enumerate(first) if k not in params["axes"])
        return tuple(left if name in SCALING else map(Source.bent, left))
    if name == "gather":
        numbers = params["dimension_numbers"]
        outside = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        inside = [_beside(own, given[1]) for k, own in enumerate(first) if k not in outside]
        taken = dict(zip(numbers.offset_dims, inside, strict=True))
        return tuple(taken.get(k, Source()) for k in range(len(shape)))
    if name in DOTS:
        return _contracted(eqn, given, len(shape))
    if name == "conv_general_dilated":
        (batch, feature, *_), (out, *_), (to_batch, to_feature, *_) = params["dimension_numbers"]
        kernel = given[1].axes[out]
        made = {to_batch: _beside(first[batch], given[1]), to_feature: _beside(kernel, given[0])}
        groups, channels = params["feature_group_count"], shape_of(eqn.invars[0])[feature]
        if groups == channels == shape[to_feature]:  # depthwise
            made[to_feature] = _product(given, [first[feature], kernel])
        return tuple(made.get(k, Source()) for k in range(len(shape)))
    if name.startswith("reduce_window"):
        windows = params["window_dimensions"]
        kept = first if name in SCALING else [own.bent() for own in first]
        return tuple(own if n == 1 else Source() for own, n in zip(kept, windows, strict=True))
    return (Source(),) * len(shape)


def _joined(sources: Sequence[Source]) -> Source:
    """An axis that several of one value become."""
    if len(sources) == 1:
        return sources[0]
    linear, scaled, _ = (NOWHERE.union(*own) for own in _facts(sources))
    return Source(NONE.union(*(source.comes for source in sources)), linear, scaled)


def _of_parts(eqn: JaxprEqn, given: Sequence[Value], rank: int) -> tuple[Source, ...]:
    """What an operation makes that takes the parts of values as they are, or sums along an axis."""
    whole = [value for value in given if len(value.axes) == rank]
    name, made = eqn.primitive.name, []
    for k in range(rank):
        sources = [value.axes[k] for value in whole]
        comes = NONE.union(*(own.comes for own in sources))
        pairs = list(zip(whole, sources, strict=True))
        if name == "concatenate" and eqn.params["dimension"] == k:
            pairs = [pair for pair in pairs if pair[1].comes]
        made.append(_sum(comes, pairs) if name in SCALING else Source(comes))
    return tuple(made)


def _beside(source: Source, other: Value) -> Source:
    """An axis of a value that is multiplied with another one, which does not have the axis."""
    linear = source.linear if _arrays(source.linear).isdisjoint(other.depends) else NOWHERE
    return Source(source.comes, linear, source.scaled)


def _arrays(places: Places) -> frozenset[int]:
    return frozenset(array for array, _ in places)


def _sum(
    comes: Origins,
    pairs: Sequence[tuple[Value, Source]],
    choice: tuple[Value, Source] | None = None,
) -> Source:
    """An axis of a sum, or of parts of values, which another value may choose."""
    pairs = [pair for pair in pairs if pair[0].number != 0]
    linear, scaled, _ = (NOWHERE.union(*own) for own in _facts([own for _, own in pairs]))
    arrays = _arrays(linear)
    for value, own in pairs:
        if not own.linear or not arrays & value.depends <= _arrays(own.linear):
            linear = NOWHERE
        if not own.scaled or not scaled & own.changes_with() <= own.scaled:
            scaled = NOWHERE
    if choice is not None:
        linear = linear if arrays.isdisjoint(choice[0].depends) else NOWHERE
        scaled = scaled if scaled.isdisjoint(choice[1].changes_with()) else NOWHERE
    return Source(comes, linear, scaled)


def _product(values: Sequence[Value], own: Sequence[Source], only: int | None = None) -> Source:
    """An axis of a product of two values; of a quotient only the first may be in proportion."""
    origins = [source.comes for source in own]
    zero = any(map(is_zero, origins[:only]))
    comes = frozenset((array, axis, zero) for array, axis, _ in NONE.union(*origins))
    linear = scaled = NOWHERE
    both = list(zip(values, own, strict=True))
    for (_, one), (value, other) in list(zip(both, both[::-1], strict=True))[:only]:
        if not linear and _arrays(one.linear).isdisjoint(value.depends):
            linear = one.linear
        if not scaled and one.scaled.isdisjoint(other.changes_with()):
            scaled = one.scaled
    return Source(comes, linear, scaled)


def _one_by_one(eqn: JaxprEqn, given: Sequence[Value], k: int, size: int) -> Source:
    """What an axis comes from that an elementwise operation makes."""
    name, own, alike = eqn.primitive.name, [], []
    values = given[1:] if name == "select_n" else given
    for n, (value, atom) in enumerate(zip(given, eqn.invars, strict=True)):
        sizes = shape_of(atom)
        same = len(sizes) > k and sizes[k] == size
        own.append(value.axes[k] if same else Source())
        if name == "select_n" and n == 0:
            continue
        if not _leaves_zero(("max", name, "min")[n] if name == "clamp" else name, value.number):
            alike.append(is_zero(own[-1].comes))
    if name in ("mul", "div"):
        return _product(given, own, 1 if name == "div" else None)
    choice, sources = ((given[0], own[0]), own[1:]) if name == "select_n" else (None, own)
    origins = NONE.union(*(source.comes for source in sources))
    if not (name in OF_ONE and eqn.params.get("y", 1) > 0):  # the exponent of an integer_pow
        zero = all(alike) if name in OF_ALL else name in OF_ANY and any(alike)
        origins = frozenset((array, axis, zero) for array, axis, _ in origins)
    if name in COMPARING and (name == "sign" or any(value.number == 0 for value in values)):
        return Source(origins, flat=NOWHERE.union(*(source.scaled for source in sources)))
    if name not in SCALING or not _stays_inexact(eqn):
        return Source(origins)
    return _sum(origins, list(zip(values, sources, strict=True)), choice)


def _stays_inexact(eqn: JaxprEqn) -> bool:
    return all(jnp.issubdtype(atom.aval.dtype, jnp.inexact) for atom in eqn.outvars)


def _leaves_zero(name: str, number: Any) -> bool:
    """Whether an operation with a number makes zero of a zero beside it."""
    if number is None or number == 0:
        return number is not None
    return (name == "max" and number < 0) or (name == "min" and number > 0)


def _contracted(eqn: JaxprEqn, given: Sequence[Value], rank: int) -> tuple[Source, ...]:
    """What the axes of a contraction come from."""
    (summed, batch), (_, groups) = dot_numbers(eqn)
    pairs = zip(*batch, strict=True)
    made = [_product(given, [given[0].axes[i], given[1].axes[j]]) for i, j in pairs]
    sides = zip(given[:2], given[1::-1], summed, batch, ((), groups), strict=True)
    for value, other, *gone in sides:
        free = [own for k, own in enumerate(value.axes) if k not in sum(map(tuple, gone), ())]
        made += [_beside(own, other) for own in free]
    return (Source(),) * (rank - len(made)) + tuple(made)
