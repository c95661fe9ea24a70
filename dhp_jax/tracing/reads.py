"""Which axes of a network's arrays contractions sum over, as the inputs of a kernel."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn
import numpy as np

from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.marks import SUMMING
from dhp_jax.tracing.programs import (
    CALLS,
    Program,
    inner_program,
    is_literal,
    shape_of,
    used_alone,
)
from dhp_jax.tracing.rules import ELEMENTWISE, reshaped_together

Origins = frozenset[tuple[int, int, bool]]  # array, axis, whether zero where the array is
Parts = frozenset[tuple[int, bool]]  # array, whether it got axes to be repeated along
NONE: Origins = frozenset()
NO_PARTS: Parts = frozenset()
SAME = ("rev", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "fft", "copy")
PARTS = ("slice", "dynamic_slice", "pad", "split", "tile", "concatenate", "dynamic_update_slice")
FILLED = ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "expand_dims", "copy")

_OF_ONE = """
    neg sign abs floor ceil round expm1 log1p sqrt cbrt square integer_pow tanh sin tan asin atan
    sinh asinh atanh erf real imag conj convert_element_type reduce_precision stop_gradient copy
    copy_p name device_put sharding_constraint optimization_barrier layer_output
"""
OF_ONE = frozenset(_OF_ONE.split())  # elementwise, which make zero of zero
OF_ALL = ("add", "sub", "max", "min", "clamp", "add_any", "select_n")  # of zeros alone
OF_ANY = ("mul", "div", "and")
INPUT, CHOSEN, ALONE = range(3)


class _Value(NamedTuple):
    """What is known of a value.

    Attributes:
      alone: `ALONE` if it follows from arrays of the network alone, `CHOSEN` if the input chooses
        which of their entries it has, as the kernels of an expert; else `INPUT`.
      axes: for each axis the axes of arrays that it comes from.
      number: what all of its entries are, if that is known.
      parts: of what does not follow from the input, but by choice, the arrays that it is made of.
    """

    alone: int
    axes: tuple[Origins, ...]
    number: Any = None
    parts: Parts = NO_PARTS


class Reads(NamedTuple):
    """The axes of arrays, as (array, axis), over which contractions and convolutions sum.

    Attributes:
      kernels: of the arrays that kernels are made of.
      others: that zeros in kernels do not close, but zeros in all arrays do: of a kernel that is
        the softplus of an array, and of what makes two things that depend on the input, as queries
        and keys.
      never: that no zeros close, as of queries of which the exponential is taken.
      products: of what makes both of two things that are multiplied, where zeros in either close.
      operands: by array of which what is contracted or convolved is made, or the input chooses,
        the axes of one kernel: not those that a loop goes over, nor others along which there are
        several.
    """

    kernels: set[tuple[int, int]]
    others: set[tuple[int, int]]
    never: set[tuple[int, int]]
    products: set[tuple[int, int]]
    operands: dict[int, set[int]]


def read_axes(analysis: Analysis) -> dict[str, frozenset[int]]:
    """By array the axes that contractions and convolutions of any program sum over.

    The kernel of a convolution is its second operand, that of another contraction the one that
    follows from arrays alone, or else is chosen of them; of two that both follow from arrays alone,
    the second one. A kernel is followed to the arrays that it is made of: as one that is
    transposed, joined of several, or mixed by weights that depend on the input.
    """
    return _by_array(analysis, _reads(analysis.programs.values()).kernels)


def operands(analysis: Analysis) -> dict[str, frozenset[int]]:
    """The arrays of which kernels, and what else is contracted or convolved, are made.

    They are whole in it, as an array that is cast, transposed, sliced, masked or standardised. What
    is added to or multiplied with what depends on the input is none, nor what is repeated first, as
    a bias or a scale. A table that the input chooses of is one: its rows are those of a kernel.

    Returns:
      By array the axes that a kernel has. Along the others are more of them, as the layers of a
      stack that a loop goes through, or experts.
    """
    found = _reads(analysis.programs.values()).operands
    return {analysis.names[number]: frozenset(axes) for number, axes in found.items()}


def open_axes(analysis: Analysis) -> tuple[dict[str, frozenset[int]], ...]:
    """By array the axes that are `others`, `never` and `products` of `Reads`.

    Zeros close an axis if they close it in every program.
    """
    reads = _reads(analysis.programs.values())
    found = reads.others, reads.never, reads.products
    return tuple(_by_array(analysis, axes) for axes in found)


def used_and_read(
    analysis: Analysis,
) -> Iterator[tuple[dict[str, frozenset[int]], dict[str, frozenset[int]]]]:
    """For each program by array the axes that its outputs follow from, and those it reads so."""
    for program in map(used_alone, analysis.programs.values()):
        jaxpr = program.closed.jaxpr
        taken = {id(atom) for eqn in jaxpr.eqns for atom in eqn.invars}
        arrays = enumerate(jaxpr.invars[: len(program.arrays)])
        used = {(n, k) for n, v in arrays if id(v) in taken for k in range(len(shape_of(v)))}
        yield _by_array(analysis, used), _by_array(analysis, _reads([program]).kernels)


def _by_array(analysis: Analysis, axes: set[tuple[int, int]]) -> dict[str, frozenset[int]]:
    return {
        name: frozenset(k for array, k in axes if array == number)
        for number, name in enumerate(analysis.names)
    }


def _reads(programs: Iterable[Program]) -> Reads:
    """What is found in any of some programs of the same arrays."""
    found = Reads(set(), set(), set(), set(), {})
    for program in programs:
        jaxpr = program.closed.jaxpr
        given = [_fixed(variable) for variable in jaxpr.invars]
        for number, (_, leaf) in enumerate(nnx.to_flat_state(program.state)):
            is_param = isinstance(leaf, nnx.Param)  # others have no gates
            axes = range(len(given[number].axes))
            own = tuple(frozenset({(number, k, is_param)}) for k in axes)
            parts = frozenset({(number, False)})
            given[number] = given[number]._replace(axes=own, parts=parts)
        for number in range(len(program.arrays), len(given)):
            given[number] = given[number]._replace(alone=INPUT)
        _follow(jaxpr, given, found)
    return found


def _fixed(atom: Any) -> _Value:
    """What is known of a constant."""
    entries = np.ravel(atom.val) if is_literal(atom) else ()
    number = entries[0].item() if len(entries) and (entries == entries[0]).all() else None
    return _Value(ALONE, (NONE,) * len(shape_of(atom)), number)


def _follow(jaxpr: Jaxpr, inputs: Sequence[_Value], found: Reads) -> list[_Value]:
    """What is known of a program's outputs; adds the axes that it reads to what was found."""
    at: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    at |= {variable: _fixed(variable) for variable in jaxpr.constvars}

    def read(atom: Any) -> _Value:
        return _fixed(atom) if is_literal(atom) else at[atom]

    for eqn in jaxpr.eqns:
        outputs = _outputs(eqn, [read(atom) for atom in eqn.invars], found)
        at |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(eqn: JaxprEqn, given: Sequence[_Value], found: Reads) -> Sequence[_Value]:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        return _follow(inner_program(eqn)[0], given, found)
    if name == "scan":
        fixed = params["num_consts"]
        last = fixed + params["num_carry"]
        slices = [value._replace(axes=value.axes[1:]) for value in given[last:]]
        body = params["jaxpr"].jaxpr
        carry, rest = _loop(body, given[:fixed], given[fixed:last], slices, found)
        return [*carry, *(value._replace(axes=(NONE, *value.axes)) for value in rest)]
    if name == "while":
        start, body = params["cond_nconsts"], params["body_jaxpr"].jaxpr
        last = start + params["body_nconsts"]
        return _loop(body, given[start:last], given[last:], [], found)[0]
    if name == "cond":
        each = [_follow(branch.jaxpr, given[1:], found) for branch in params["branches"]]
        made = [_either(values) for values in zip(*each, strict=True)]
        return [value._replace(alone=min(value.alone, _as_index(given[:1]))) for value in made]
    _sum_over(eqn, given, found)
    alone = min((value.alone for value in given), default=ALONE)
    if name in ("gather", "dynamic_slice"):
        alone = min(given[0].alone, _as_index(given[1:]))
        if alone == CHOSEN:
            _note_operand(given[0], (), found)
    elif name in SUMMING:
        beside = params["dimension_numbers"][1] if name == "dot_general" else ((), ())
        for value, axes in zip(given, beside, strict=False):
            _note_operand(value, axes, found)
        if alone == CHOSEN:  # of what was looked up, as an embedding
            alone = INPUT
    number = given[0].number if name in FILLED else None
    shapes = [shape_of(variable) for variable in eqn.outvars]
    parts = [_parts(eqn, given, shape) if alone != INPUT else NO_PARTS for shape in shapes]
    moved = [_moved(eqn, given, shape) for shape in shapes]
    return [_Value(alone, *own) for own in zip(moved, [number] * len(shapes), parts, strict=True)]


def _note_operand(value: _Value, beside: Sequence[int], found: Reads) -> None:
    """Notes the arrays that an operand is made of; along its axes `beside` are several kernels."""
    own = NONE.union(*(axis for k, axis in enumerate(value.axes) if k not in beside))
    for array, _ in value.parts:
        axes = found.operands.setdefault(array, set())
        axes |= {k for other, k, _ in own if other == array}


def _parts(eqn: JaxprEqn, given: Sequence[_Value], shape: tuple[int, ...]) -> Parts:
    """The arrays that are whole in what an operation makes of arrays alone."""
    name = eqn.primitive.name
    if name in SUMMING:  # what follows reads what they make
        return NO_PARTS
    arrays = [{array for array, _ in value.parts} for value in given if value.axes]
    if name in ELEMENTWISE and len(arrays) > 1:
        alike = all(own == arrays[0] for own in arrays)  # as of a kernel and its mean
        whole = zip(given, eqn.invars, strict=True)
        own = NO_PARTS.union(*(value.parts for value, a in whole if shape_of(a) == shape))
        return frozenset(part for part in own if alike or not part[1])
    parts = NO_PARTS.union(*(value.parts for value in given))
    before = shape_of(eqn.invars[0]) if eqn.invars else ()
    widened = name == "broadcast_in_dim" and len(shape) > len(before)
    if widened or (len(shape) > len(before) and shape[len(shape) - len(before) :] == before):
        return frozenset((array, True) for array, _ in parts)
    return parts


def _as_index(given: Sequence[_Value]) -> int:
    """What is left of arrays alone where values choose of it."""
    return max(CHOSEN, min((value.alone for value in given), default=ALONE))


def _loop(body, fixed, carry, slices, found) -> tuple[list[_Value], list[_Value]]:
    """What is known of what a loop carries, and of what else its steps return."""
    while True:
        outputs = _follow(body, [*fixed, *carry, *slices], found)
        after = [_either(pair) for pair in zip(carry, outputs, strict=False)]
        if after == list(carry):
            return after, outputs[len(carry) :]
        carry = after


def _either(values: Sequence[_Value]) -> _Value:
    """A value that may be any of several of one shape."""
    axes = tuple(NONE.union(*own) for own in zip(*(value.axes for value in values), strict=True))
    numbers = {value.number for value in values}
    number = numbers.pop() if len(numbers) == 1 else None
    alone = min(value.alone for value in values)
    parts = NO_PARTS.union(*(value.parts for value in values)) if alone != INPUT else NO_PARTS
    return _Value(alone, axes, number, parts)


def _sum_over(eqn: JaxprEqn, given: Sequence[_Value], found: Reads) -> None:
    """Notes the axes of arrays that an operation sums over."""
    sums = True
    if eqn.primitive.name == "dot_general":
        pair = eqn.params["dimension_numbers"][0]
        levels = [value.alone for value in given]
        side = 0 if levels[0] > levels[1] else 1
        has_kernel = levels[0] != levels[1] or levels[0] == ALONE
    elif eqn.primitive.name == "conv_general_dilated":
        pair = [[spec[1]] for spec in eqn.params["dimension_numbers"][:2]]
        side, has_kernel = 1, True
        sums = shape_of(eqn.invars[1])[pair[1][0]] > 1  # or each channel is read by itself
    else:
        return
    origins = [
        NONE.union(*(value.axes[k] for k in axes)) for value, axes in zip(given, pair, strict=True)
    ]
    if has_kernel:
        found.kernels.update((array, k) for array, k, _ in origins[side])
    closed = list(map(_is_zero, origins))
    if sums and not (has_kernel and closed[side]):
        left = found.others if any(closed) else found.never
        left.update((array, k) for own in origins for array, k, _ in own)
        if all(closed) and not has_kernel:
            found.products.update((array, k) for own in origins for array, k, _ in own)


def _is_zero(origins: Origins) -> bool:
    """Whether positions are zero where those of all arrays are that they come from."""
    return bool(origins) and all(zero for *_, zero in origins)


def _product(*own: Origins) -> Origins:
    """The origins of positions that are multiplied."""
    zero = any(map(_is_zero, own))
    return frozenset((array, axis, zero) for array, axis, _ in NONE.union(*own))


def _moved(eqn: JaxprEqn, given: Sequence[_Value], shape: tuple[int, ...]) -> tuple[Origins, ...]:
    """The origins of the axes of what an operation makes; none where they are not known."""
    name, params = eqn.primitive.name, eqn.params
    first = given[0].axes if given else ()
    if name in ELEMENTWISE:
        return tuple(_one_by_one(eqn, given, k, size) for k, size in enumerate(shape))
    if name == "transpose":
        return tuple(first[k] for k in params["permutation"])
    if name == "broadcast_in_dim":
        source = {k: j for j, k in enumerate(params["broadcast_dimensions"])}
        return tuple(first[source[k]] if k in source else NONE for k in range(len(shape)))
    if name in ("reshape", "squeeze", "expand_dims"):
        made = [NONE] * len(shape)
        for sources, targets in reshaped_together(shape_of(eqn.invars[0]), shape):
            for k in targets:
                made[k] = NONE.union(*(first[j] for j in sources))
        return tuple(made)
    if name in SAME or name in PARTS or name.startswith("scatter"):
        whole = [value.axes for value in given if len(value.axes) == len(shape)]
        return tuple(NONE.union(*own) for own in zip(*whole, strict=True))
    if name.startswith(("reduce_", "arg")) and "axes" in params:
        return tuple(own for k, own in enumerate(first) if k not in params["axes"])
    if name == "gather":
        numbers = params["dimension_numbers"]
        outside = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        inside = [own for k, own in enumerate(first) if k not in outside]
        taken = dict(zip(numbers.offset_dims, inside, strict=True))
        return tuple(taken.get(k, NONE) for k in range(len(shape)))
    if name == "dot_general":
        return _contracted(eqn, [value.axes for value in given])
    if name == "conv_general_dilated":
        (batch, feature, *_), (out, *_), (to_batch, to_feature, *_) = params["dimension_numbers"]
        made = {to_batch: first[batch], to_feature: given[1].axes[out]}
        groups, channels = params["feature_group_count"], shape_of(eqn.invars[0])[feature]
        if groups == channels == shape[to_feature]:  # depthwise
            made[to_feature] = _product(first[feature], given[1].axes[out])
        return tuple(made.get(k, NONE) for k in range(len(shape)))
    if name.startswith("reduce_window"):
        windows = params["window_dimensions"]
        return tuple(own if n == 1 else NONE for own, n in zip(first, windows, strict=True))
    return (NONE,) * len(shape)


def _one_by_one(eqn: JaxprEqn, given: Sequence[_Value], k: int, size: int) -> Origins:
    """The origins of an axis that an elementwise operation makes."""
    name, own, alike = eqn.primitive.name, [], []
    for n, (value, atom) in enumerate(zip(given, eqn.invars, strict=True)):
        if name == "select_n" and n == 0:
            continue
        sizes = shape_of(atom)
        same = len(sizes) > k and sizes[k] == size
        own.append(value.axes[k] if same else NONE)
        if not _leaves_zero(("max", name, "min")[n] if name == "clamp" else name, value.number):
            alike.append(_is_zero(own[-1]))
    origins = NONE.union(*own)
    if name in OF_ONE and eqn.params.get("y", 1) > 0:  # the exponent of an integer_pow
        return origins
    zero = all(alike) if name in OF_ALL else name in OF_ANY and any(alike[: 1 + (name != "div")])
    return frozenset((array, axis, zero) for array, axis, _ in origins)


def _leaves_zero(name: str, number: Any) -> bool:
    """Whether an operation with a number makes zero of a zero beside it."""
    if number is None or number == 0:
        return number is not None
    return (name == "max" and number < 0) or (name == "min" and number > 0)


def _contracted(eqn: JaxprEqn, given: Sequence[tuple[Origins, ...]]) -> tuple[Origins, ...]:
    """The origins of what a contraction makes."""
    summed, batch = eqn.params["dimension_numbers"]
    made = [_product(given[0][i], given[1][j]) for i, j in zip(*batch, strict=True)]
    for axes, *gone in zip(given, summed, batch, strict=True):
        made += [own for k, own in enumerate(axes) if k not in (*gone[0], *gone[1])]
    return tuple(made)
