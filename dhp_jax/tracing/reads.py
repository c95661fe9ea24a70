"""Which axes of a network's arrays contractions sum over, as the inputs of a kernel."""

from collections.abc import Iterable, Iterator, Sequence
import os
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.extend.core import Jaxpr, JaxprEqn
import jax.numpy as jnp
import numpy as np

from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.marks import SUMMING
from dhp_jax.tracing.origins import (
    ALONE,
    CHOSEN,
    INPUT,
    NO_PARTS,
    NONE,
    NOWHERE,
    Parts,
    Places,
    Source,
    Value,
    either,
    is_zero,
    moved,
)
from dhp_jax.tracing.programs import (
    CALLS,
    DOTS,
    Program,
    dot_numbers,
    inner_program,
    is_literal,
    shape_of,
    used_alone,
)
from dhp_jax.tracing.rules import ELEMENTWISE

JAX = os.path.dirname(jax.__file__)
FILLED = ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "expand_dims", "copy")


class Reads(NamedTuple):
    """The axes of arrays, as (array, axis), over which contractions and convolutions sum.

    Attributes:
      kernels: of the arrays that kernels are made of.
      others: that zeros in kernels do not close, but zeros in all arrays do: of a kernel that is
        the softplus of an array, and of what makes two things that depend on the input, as queries
        and keys.
      never: that no zeros close, as of queries of which the exponential is taken.
      products: of what makes both of two things that are multiplied, where zeros in either close.
      bent: of arrays to which a kernel is not in proportion, as one that is rounded.
      bent_and_closed: the same, of kernels that zeros in these arrays close.
      bent_makers: of arrays to which a kernel is not in proportion that makes channels.
      channels: of each value other than a kernel that is summed over the axes that its channels
        come from, and of these the ones to which they are in proportion.
      sums: of what depends on the input and is added up without a kernel, as in a squared norm or
        a mean; zeros in all arrays close it.
      open_sums: the same, where no zeros do, as of a softplus.
      operands: by array of which what is contracted or convolved is made, or the input chooses,
        the axes of one kernel: not those that a loop goes over, nor others along which there are
        several.
    """

    kernels: set[tuple[int, int]]
    others: set[tuple[int, int]]
    never: set[tuple[int, int]]
    products: set[tuple[int, int]]
    bent: set[tuple[int, int]]
    bent_and_closed: set[tuple[int, int]]
    bent_makers: set[tuple[int, int]]
    channels: set[tuple[Places, Places]]
    sums: set[tuple[int, int]]
    open_sums: set[tuple[int, int]]
    operands: dict[int, set[int]]


def read_axes(analysis: Analysis, found: Reads) -> dict[str, frozenset[int]]:
    """By array the axes that contractions and convolutions of any program sum over.

    The kernel of a convolution is its second operand, that of another contraction the one that
    follows from arrays alone, or else is chosen of them; of two that both follow from arrays alone,
    the second one. A kernel is followed to the arrays that it is made of: as one that is
    transposed, joined of several, or mixed by weights that depend on the input.
    """
    return by_array(analysis, found.kernels)


def operands(analysis: Analysis, found: Reads) -> dict[str, frozenset[int]]:
    """The arrays of which kernels, and what else is contracted or convolved, are made.

    They are whole in it, as an array that is cast, transposed, sliced, masked or standardised. What
    is added to or multiplied with what depends on the input is none, nor what is repeated first, as
    a bias or a scale. A table that the input chooses of is one: its rows are those of a kernel.

    Returns:
      By array the axes that a kernel has. Along the others are more of them, as the layers of a
      stack that a loop goes through, or experts.
    """
    return {analysis.names[n]: frozenset(axes) for n, axes in found.operands.items()}


def all_reads(analysis: Analysis) -> Reads:
    """What is found in any program."""
    return _reads(analysis.programs.values())


def used_and_read(
    analysis: Analysis,
) -> Iterator[tuple[dict[str, frozenset[int]], dict[str, frozenset[int]]]]:
    """For each program by array the axes that its outputs follow from, and those it reads so."""
    for program in map(used_alone, analysis.programs.values()):
        jaxpr = program.closed.jaxpr
        taken = {id(atom) for eqn in jaxpr.eqns for atom in eqn.invars}
        arrays = enumerate(jaxpr.invars[: len(program.arrays)])
        used = {(n, k) for n, v in arrays if id(v) in taken for k in range(len(shape_of(v)))}
        yield by_array(analysis, used), by_array(analysis, _reads([program]).kernels)


def by_array(analysis: Analysis, axes: Iterable[tuple[int, int]]) -> dict[str, frozenset[int]]:
    """Axes of arrays, by the names of these."""
    axes = set(axes)
    return {
        name: frozenset(k for array, k in axes if array == number)
        for number, name in enumerate(analysis.names)
    }


def _reads(programs: Iterable[Program]) -> Reads:
    """What is found in any of some programs of the same arrays."""
    found = Reads(*(set() for _ in Reads._fields[:-1]), {})
    for program in programs:
        jaxpr = program.closed.jaxpr
        given = [_fixed(variable) for variable in jaxpr.invars]
        for number, (_, leaf) in enumerate(nnx.to_flat_state(program.state)):
            axes = range(len(given[number].axes))
            own = tuple(_of_array(leaf, number, k) for k in axes)
            depends, parts = frozenset({number}), frozenset({(number, False)})
            given[number] = given[number]._replace(axes=own, depends=depends, parts=parts)
        for number in range(len(program.arrays), len(given)):
            given[number] = given[number]._replace(alone=INPUT)
        _follow(jaxpr, given, found)
    return found


def _of_array(variable: nnx.Variable, number: int, k: int) -> Source:
    """What an axis of an array comes from: itself."""
    place, inexact = frozenset({(number, k)}), jnp.issubdtype(variable.dtype, jnp.inexact)
    gated = isinstance(variable, nnx.Param) and inexact  # others have no gates
    linear, scaled = (place if known else NOWHERE for known in (inexact, gated))
    return Source(frozenset({(number, k, gated)}), linear, scaled)


def _fixed(atom: Any) -> Value:
    """What is known of a constant."""
    entries = np.ravel(atom.val) if is_literal(atom) else ()
    number = entries[0].item() if len(entries) and (entries == entries[0]).all() else None
    return Value(ALONE, (Source(),) * len(shape_of(atom)), number)


def _follow(jaxpr: Jaxpr, inputs: Sequence[Value], found: Reads) -> list[Value]:
    """What is known of a program's outputs; adds the axes that it reads to what was found."""
    at: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    at |= {variable: _fixed(variable) for variable in jaxpr.constvars}

    def read(atom: Any) -> Value:
        return _fixed(atom) if is_literal(atom) else at[atom]

    for eqn in jaxpr.eqns:
        outputs = _outputs(eqn, [read(atom) for atom in eqn.invars], found)
        at |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(eqn: JaxprEqn, given: Sequence[Value], found: Reads) -> Sequence[Value]:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        inner = inner_program(eqn)[0]
        made = _follow(inner, given, found)
        return list(map(_bent, made)) if _has_own_derivative(name, inner) else made
    if name == "scan":
        fixed = params["num_consts"]
        last = fixed + params["num_carry"]
        slices = [value._replace(axes=value.axes[1:]) for value in given[last:]]
        body = params["jaxpr"].jaxpr
        carry, rest = _loop(body, given[:fixed], given[fixed:last], slices, found)
        return [*carry, *(value._replace(axes=(Source(), *value.axes)) for value in rest)]
    if name == "while":
        start, body = params["cond_nconsts"], params["body_jaxpr"].jaxpr
        last = start + params["body_nconsts"]
        return _loop(body, given[start:last], given[last:], [], found)[0]
    if name == "cond":
        each = [_follow(branch.jaxpr, given[1:], found) for branch in params["branches"]]
        made = [either(values) for values in zip(*each, strict=True)]
        return [value._replace(alone=min(value.alone, _as_index(given[:1]))) for value in made]
    _sum_over(eqn, given, found)
    alone = min((value.alone for value in given), default=ALONE)
    if name in ("gather", "dynamic_slice"):
        alone = min(given[0].alone, _as_index(given[1:]))
        if alone == CHOSEN:
            _note_operand(given[0], (), found)
    elif name in SUMMING:
        beside = ((), ())
        if name in DOTS:
            (_, (left, right)), (_, groups) = dot_numbers(eqn)
            beside = (left, (*right, *groups))
        for value, axes in zip(given, beside, strict=False):
            _note_operand(value, axes, found)
        if alone == CHOSEN:  # of what was looked up, as an embedding
            alone = INPUT
    number = given[0].number if name in FILLED else None
    depends = frozenset().union(*(value.depends for value in given))
    made = []
    for shape in map(shape_of, eqn.outvars):
        parts = _parts(eqn, given, shape) if alone != INPUT else NO_PARTS
        made.append(Value(alone, moved(eqn, given, shape), number, depends, parts))
    return made


def _note_operand(value: Value, beside: Sequence[int], found: Reads) -> None:
    """Notes the arrays that an operand is made of; along its axes `beside` are several kernels."""
    own = NONE.union(*(axis.comes for k, axis in enumerate(value.axes) if k not in beside))
    for array, _ in value.parts:
        axes = found.operands.setdefault(array, set())
        axes |= {k for other, k, _ in own if other == array}


def _parts(eqn: JaxprEqn, given: Sequence[Value], shape: tuple[int, ...]) -> Parts:
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


def _has_own_derivative(name: str, program: Jaxpr) -> bool:
    """Whether a function of the network's own code has a derivative that the code gives."""
    function = program.debug_info.func_src_info or ""
    return name.startswith("custom_") and f" at {JAX}" not in function


def _bent(value: Value) -> Value:
    return value._replace(axes=tuple(own.bent() for own in value.axes))


def _as_index(given: Sequence[Value]) -> int:
    """What is left of arrays alone where values choose of it."""
    return max(CHOSEN, min((value.alone for value in given), default=ALONE))


def _loop(body, fixed, carry, slices, found) -> tuple[list[Value], list[Value]]:
    """What is known of what a loop carries, and of what else its steps return."""
    while True:
        outputs = _follow(body, [*fixed, *carry, *slices], found)
        after = [either(pair) for pair in zip(carry, outputs, strict=False)]
        if after == list(carry):
            return after, outputs[len(carry) :]
        carry = after


def _sum_over(eqn: JaxprEqn, given: Sequence[Value], found: Reads) -> None:
    """Notes the axes of arrays that an operation sums over."""
    sums = True
    if eqn.primitive.name in DOTS:
        pair = dot_numbers(eqn)[0][0]
        levels = [value.alone for value in given[:2]]
        side = 0 if levels[0] > levels[1] else 1
        has_kernel = levels[0] != levels[1] or levels[0] == ALONE
    elif eqn.primitive.name == "conv_general_dilated":
        pair = [[spec[1]] for spec in eqn.params["dimension_numbers"][:2]]
        side, has_kernel = 1, True
        sums = shape_of(eqn.invars[1])[pair[1][0]] > 1  # or each channel is read by itself
    elif eqn.primitive.name == "reduce_sum" and given[0].alone == INPUT:
        for source in (given[0].axes[k] for k in eqn.params["axes"]):
            into = found.sums if is_zero(source.comes) else found.open_sums
            into.update((array, k) for array, k, _ in source.comes)
        return
    else:
        return
    own = [[value.axes[k] for k in axes] for value, axes in zip(given[:2], pair, strict=True)]
    origins = [NONE.union(*(source.comes for source in sources)) for sources in own]
    if has_kernel:
        found.kernels.update((array, k) for array, k, _ in origins[side])
        free = (source for k, source in enumerate(given[side].axes) if k not in pair[side])
        found.bent_makers.update(place for source in free for place in _not_linear(source))
    closed = list(map(is_zero, origins))
    if sums and not (has_kernel and closed[side]):
        left = found.others if any(closed) else found.never
        left.update((array, k) for own in origins for array, k, _ in own)
        if all(closed) and not has_kernel:
            found.products.update((array, k) for own in origins for array, k, _ in own)
    if sums and has_kernel:
        bent = [place for source in own[side] for place in _not_linear(source)]
        found.bent.update(bent)
        found.bent_and_closed.update(bent if closed[side] else ())
    for sources in (own[1 - side :: 2] if has_kernel else own) if sums else ():
        found.channels.update((source.changes_with(), source.scaled) for source in sources)


def _not_linear(source: Source) -> Places:
    return frozenset((array, k) for array, k, _ in source.comes) - source.linear
