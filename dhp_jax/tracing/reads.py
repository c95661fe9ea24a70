"""Which axes of a network's arrays contractions sum over, as the inputs of a kernel."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn

from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.marks import SUMMING
from dhp_jax.tracing.programs import CALLS, EVALUATION, inner_program, is_literal, shape_of
from dhp_jax.tracing.rules import ELEMENTWISE, reshaped_together

Origins = frozenset[tuple[int, int]]  # (array, axis)
NONE: Origins = frozenset()
SAME = ("rev", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "fft", "copy")
PARTS = ("slice", "dynamic_slice", "pad", "split", "tile", "concatenate", "dynamic_update_slice")


INPUT, CHOSEN, ALONE = range(3)


class _Value(NamedTuple):
    """What is known of a value.

    Attributes:
      alone: `ALONE` if it follows from arrays of the network alone, `CHOSEN` if the input chooses
        which of their entries it has, as the kernels of an expert; else `INPUT`.
      axes: for each axis the axes of arrays that it comes from.
    """

    alone: int
    axes: tuple[Origins, ...]


def read_axes(analysis: Analysis) -> dict[str, frozenset[int]]:
    """By array the axes that contractions and convolutions sum over.

    The kernel of a convolution is its second operand, that of another contraction the one that
    follows from arrays alone, or else is chosen of them; of two that both follow from arrays alone,
    the second one. A kernel is followed to the
    arrays that it is made of: as one that is transposed, joined of several, or mixed by weights
    that depend on the input.
    """
    program, found = analysis.programs[EVALUATION], set[tuple[int, int]]()
    jaxpr = program.closed.jaxpr
    given = [_fixed(variable) for variable in jaxpr.invars]
    for number, value in enumerate(given):
        own = tuple(frozenset({(number, k)}) for k in range(len(value.axes)))
        is_array = number < len(program.arrays)
        given[number] = value._replace(axes=own) if is_array else value._replace(alone=INPUT)
    _follow(jaxpr, given, found)
    return {
        name: frozenset(k for array, k in found if array == number)
        for number, name in enumerate(analysis.names)
    }


def _fixed(atom: Any) -> _Value:
    """What is known of a constant."""
    return _Value(ALONE, (NONE,) * len(shape_of(atom)))


def _follow(jaxpr: Jaxpr, inputs: Sequence[_Value], found: set[tuple[int, int]]) -> list[_Value]:
    """What is known of a program's outputs; adds the axes that it reads to what was found."""
    at: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    at |= {variable: _fixed(variable) for variable in jaxpr.constvars}

    def read(atom: Any) -> _Value:
        return _fixed(atom) if is_literal(atom) else at[atom]

    for eqn in jaxpr.eqns:
        outputs = _outputs(eqn, [read(atom) for atom in eqn.invars], found)
        at |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(
    eqn: JaxprEqn, given: Sequence[_Value], found: set[tuple[int, int]]
) -> Sequence[_Value]:
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
    found |= _summed(eqn, given)
    alone = min((value.alone for value in given), default=ALONE)
    if name in ("gather", "dynamic_slice"):
        alone = min(given[0].alone, _as_index(given[1:]))
    elif name in SUMMING and alone == CHOSEN:  # of what was looked up, as an embedding
        alone = INPUT
    return [_Value(alone, _moved(eqn, given, shape_of(v))) for v in eqn.outvars]


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
    axes = zip(*(value.axes for value in values), strict=True)
    return _Value(min(value.alone for value in values), tuple(NONE.union(*own) for own in axes))


def _summed(eqn: JaxprEqn, given: Sequence[_Value]) -> set[tuple[int, int]]:
    """The axes of arrays that an operation sums over as a kernel's."""
    if eqn.primitive.name == "dot_general":
        left, right = given[0].alone, given[1].alone
        if left == right != ALONE:  # two that both depend on the input, as queries and keys
            return set()
        side = 0 if left > right else 1
        axes = eqn.params["dimension_numbers"][0][side]
    elif eqn.primitive.name == "conv_general_dilated":
        side = 1
        axes = [eqn.params["dimension_numbers"][1][1]]
    else:
        return set()
    return set().union(*(given[side].axes[k] for k in axes))


def _moved(eqn: JaxprEqn, given: Sequence[_Value], shape: tuple[int, ...]) -> tuple[Origins, ...]:
    """The origins of the axes of what an operation makes; none where they are not known."""
    name, params = eqn.primitive.name, eqn.params
    first = given[0].axes if given else ()
    if name in ELEMENTWISE:
        alike = [
            (value.axes, shape_of(atom))
            for value, atom in zip(given, eqn.invars, strict=True)
            if len(value.axes) == len(shape)
        ]
        return tuple(
            NONE.union(*(axes[k] for axes, sizes in alike if sizes[k] == size))
            for k, size in enumerate(shape)
        )
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
    return (NONE,) * len(shape)


def _contracted(eqn: JaxprEqn, given: Sequence[tuple[Origins, ...]]) -> tuple[Origins, ...]:
    """The origins of what a contraction makes."""
    summed, batch = eqn.params["dimension_numbers"]
    made = [given[0][i] | given[1][j] for i, j in zip(*batch, strict=True)]
    for axes, *gone in zip(given, summed, batch, strict=True):
        made += [own for k, own in enumerate(axes) if k not in (*gone[0], *gone[1])]
    return tuple(made)
