"""Which axes of a network's arrays contractions sum over, as the inputs of a kernel."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn

from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.programs import CALLS, EVALUATION, inner_program, is_literal, shape_of
from dhp_jax.tracing.rules import ELEMENTWISE, reshaped_together

Origins = tuple[frozenset[tuple[int, int]], ...]  # of each axis of a value, (array, axis)
NONE: frozenset[tuple[int, int]] = frozenset()


def read_axes(analysis: Analysis) -> dict[str, frozenset[int]]:
    """By array the axes that contractions and convolutions sum over.

    Values that follow from arrays alone, as a kernel that is transposed or normalised first, are
    followed to those. Of two that both do, the second one is the kernel.
    """
    program, found = analysis.programs[EVALUATION], set()
    given = [_own(number, x.ndim) for number, x in enumerate(program.arrays)]
    inputs = program.closed.jaxpr.invars
    _follow(program.closed.jaxpr, [*given, *[None] * (len(inputs) - len(given))], found)
    return {
        name: frozenset(k for array, k in found if array == number)
        for number, name in enumerate(analysis.names)
    }


def _own(array: int, rank: int) -> Origins:
    return tuple(frozenset({(array, k)}) for k in range(rank))


def _follow(
    jaxpr: Jaxpr, inputs: Sequence[Origins | None], found: set[tuple[int, int]]
) -> list[Origins | None]:
    """The origins of a program's outputs; `None` for what follows from inputs of the network."""
    at: dict[Any, Origins | None] = dict(zip(jaxpr.invars, inputs, strict=True))
    at |= {variable: (NONE,) * len(shape_of(variable)) for variable in jaxpr.constvars}

    def read(atom: Any) -> Origins | None:
        return (NONE,) * len(shape_of(atom)) if is_literal(atom) else at[atom]

    for eqn in jaxpr.eqns:
        given, name = [read(atom) for atom in eqn.invars], eqn.primitive.name
        if name in CALLS:
            outputs = _follow(inner_program(eqn)[0], given, found)
        elif name == "scan":
            stacked = eqn.params["num_consts"] + eqn.params["num_carry"]
            slices = [x and x[1:] for x in given[stacked:]]
            _follow(eqn.params["jaxpr"].jaxpr, [*given[:stacked], *slices], found)
            outputs = [None] * len(eqn.outvars)
        elif name == "while":
            of_test = eqn.params["cond_nconsts"]
            _follow(eqn.params["body_jaxpr"].jaxpr, given[of_test:], found)
            outputs = [None] * len(eqn.outvars)
        elif name == "cond":
            for branch in eqn.params["branches"]:
                _follow(branch.jaxpr, given[1:], found)
            outputs = [None] * len(eqn.outvars)
        else:
            found |= _summed(eqn, given)
            made = None if any(x is None for x in given) else _moved(eqn, given)
            outputs = [made] * len(eqn.outvars)
        at |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _summed(eqn: JaxprEqn, given: Sequence[Origins | None]) -> set[tuple[int, int]]:
    """The axes of arrays that an operation sums over as a kernel's."""
    if eqn.primitive.name == "dot_general":
        side = 0 if given[0] is not None and given[1] is None else 1
        axes = eqn.params["dimension_numbers"][0][side]
    elif eqn.primitive.name == "conv_general_dilated":
        side = 1
        axes = [eqn.params["dimension_numbers"][1][1]]
    else:
        return set()
    return set() if given[side] is None else set().union(*(given[side][k] for k in axes))


def _moved(eqn: JaxprEqn, given: Sequence[Origins]) -> Origins | None:
    """The origins of what an operation makes of values that follow from arrays alone."""
    name, shape = eqn.primitive.name, shape_of(eqn.outvars[0])
    if name in ELEMENTWISE:
        alike = [
            (origins, shape_of(atom))
            for origins, atom in zip(given, eqn.invars, strict=True)
            if len(origins) == len(shape)
        ]
        return tuple(
            NONE.union(*(origins[k] for origins, sizes in alike if sizes[k] == size))
            for k, size in enumerate(shape)
        )
    if name == "transpose":
        return tuple(given[0][k] for k in eqn.params["permutation"])
    if name == "broadcast_in_dim":
        source = {k: j for j, k in enumerate(eqn.params["broadcast_dimensions"])}
        return tuple(given[0][source[k]] if k in source else NONE for k in range(len(shape)))
    if name in ("reshape", "squeeze", "expand_dims"):
        made = [NONE] * len(shape)
        for sources, targets in reshaped_together(shape_of(eqn.invars[0]), shape):
            for k in targets:
                made[k] = NONE.union(*(given[0][j] for j in sources))
        return tuple(made)
    return (NONE,) * len(shape)
