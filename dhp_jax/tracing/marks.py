"""Calls of layers, marked in a traced program: whose an operation is, and how often it runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import math
import re
from types import MappingProxyType
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.extend.core import Jaxpr, JaxprEqn, Primitive, jaxprs_in_params
from jax.interpreters import ad, batching
import numpy as np

from dhp_jax.core.activations import ReLU
from dhp_jax.core.branches import Place
from dhp_jax.core.latent import Axis, walk
from dhp_jax.core.surgery import override
from dhp_jax.errors import ArgumentError
from dhp_jax.tracing.flow import rule
from dhp_jax.tracing.layer_terms import layer_terms
from dhp_jax.tracing.programs import (
    CALLS,
    DOTS,
    Context,
    all_programs,
    dot_numbers,
    inner_program,
    is_literal,
    shape_of,
    where,
)
from dhp_jax.tracing.rules import elementwise

SUMMING = (*DOTS, "conv_general_dilated")
_SPARSE = """
    bcoo_dot_general bcoo_dot_general_sampled bcoo_spdot_general bcsr_dot_general coo_matvec
    coo_matmat coo_spmv coo_spmm csr_matvec csr_matmat csr_spmv csr_spmm
"""
SPARSE = frozenset(_SPARSE.split())  # products of `jax.experimental.sparse`
_SCOPE = re.compile(r"layer_call_(\d+)")
_EINSUM = re.compile(r",[\s\w.]*,")  # of more than two arrays; `jnp.einsum` names a scope so

layer_output = Primitive("layer_output")  # what a call of a layer returned; computes nothing


@layer_output.def_impl
def _(x, call):
    return x


@layer_output.def_abstract_eval
def _(x, call):
    return x


batching.defvectorized(layer_output)
ad.deflinear2(layer_output, lambda cotangent, x, call: [cotangent])
rule("layer_output")(elementwise)


class LayerCall(NamedTuple):
    """One call of a layer, as the code makes it."""

    path: str
    layer: nnx.Module
    shape: tuple[int, ...]  # of what it returned
    nbytes: int


class Operation(NamedTuple):
    """An operation that costs something, or the mark of a call.

    Attributes:
      eqn: the operation.
      context: of the program that it stands in.
      call: number of the call that it belongs to; `None` if of no layer.
      times: how often it runs.
      owner: whose arrays it reads, if of one alone.
      scope: the names of `jax.named_scope` around it, from the outermost on.
      place: the branches that it stands in.
    """

    eqn: JaxprEqn
    context: Context
    call: int | None
    times: int
    owner: str | None
    scope: tuple[str, ...]
    place: Place


def is_counted(module: nnx.Module) -> bool:
    """Whether `layer_terms` is registered for a module."""
    return layer_terms.dispatch(type(module)) is not layer_terms.dispatch(object)


def is_activation(module: nnx.Module) -> bool:
    """Whether it is a layer of which the last call alone counts, as in the published costs."""
    return isinstance(module, ReLU | nnx.PReLU)


def has_arrays(module: nnx.Module) -> bool:
    """Whether it is a layer: one with arrays of its own, or that `layer_terms` is told of."""
    return not isinstance(module, Axis) and (
        is_counted(module) or any(isinstance(v, nnx.Variable) for v in vars(module).values())
    )


def flops_of_an_element(found: LayerCall | None) -> int:
    """FLOPs of each number that a layer returns, where `layer_terms` says so; else 0."""
    if found is None or not is_counted(found.layer):
        return 0
    _, outputs, flops, _ = layer_terms(found.layer, found.shape)
    full = outputs if isinstance(outputs, int) else outputs.size
    return flops[1] * full // max(1, math.prod(found.shape))


def mark_calls(model: nnx.Module, is_layer: Callable[[nnx.Module], bool]) -> list[LayerCall]:
    """Lets every call of a model's layers leave a mark in what is traced, in place.

    Args:
      model: one that was merged for a trace.
      is_layer: which modules are layers.

    Returns:
      A list, to which each call is added when it ends.
    """
    calls: list[LayerCall] = []
    for path, _, module in list(walk(model)):
        if is_layer(module):
            # The module of this walk, not that of the call: under `nnx.jit` or `nnx.remat` the
            # latter is a copy whose latents are none of ours.
            module.marks = nnx.static((_started(calls, path, module), _ended(calls)))
            override(module, __call__=_marked_call)
    return calls


def _started(calls: list[LayerCall], path: str, module: nnx.Module) -> Callable[[], int]:
    """A function that notes the start of a call and returns its number."""

    def start() -> int:
        calls.append(LayerCall(path, module, (), 0))
        return len(calls) - 1

    return start


def _ended(calls: list[LayerCall]) -> Callable[[int, jax.Array], None]:
    """A function that notes what a call returned."""

    def end(number: int, output: jax.Array) -> None:
        nbytes = output.size * output.dtype.itemsize
        calls[number] = calls[number]._replace(shape=output.shape, nbytes=nbytes)

    return end


def _marked_call(call: Callable[..., Any], layer: nnx.Module, *args: Any, **options: Any) -> Any:
    start, end = layer.marks
    number = start()
    with jax.named_scope(f"layer_call_{number}"):
        output = call(layer, *args, **options)
    if isinstance(output, jax.Array):
        end(number, output)
        output = layer_output.bind(output, call=number)
    return output


def costly_operations(
    jaxpr: Jaxpr,
    context: Context = (),
    times: int = 1,
    call: int | None = None,
    owners: Mapping[Any, str] = MappingProxyType({}),
    scope: tuple[str, ...] = (),
    place: Place = (),
) -> Iterator[Operation]:
    """Contractions, convolutions and marks of a program, wherever they stand.

    Loops count as often as they run. `owners` are those of the arrays among the inputs of the
    program.

    Raises:
      ValueError: a loop with a contraction in it runs as often as the data wants; another operation
        runs a contraction in a program of its own, as on parts of arrays; a product is of sparse
        arrays.
    """
    owners = dict(owners)
    for number, eqn in enumerate(jaxpr.eqns):
        name, inner = eqn.primitive.name, (*context, number)
        stack = str(eqn.source_info.name_stack)
        calls, names = _SCOPE.findall(stack), (*scope, *stack.split("/"))
        own = int(calls[-1]) if calls else call
        read = [None if is_literal(atom) else owners.get(atom) for atom in eqn.invars]
        known = {owner for owner in read if owner}
        owner = known.pop() if len(known) == 1 else None
        if owner and all(read[n] or is_literal(atom) for n, atom in enumerate(eqn.invars)):
            owners |= dict.fromkeys(eqn.outvars, owner)  # it follows from these arrays alone
        if name in SUMMING:
            yield Operation(eqn, context, own, times, owner, names, place)
        elif name == "layer_output":
            yield Operation(eqn, context, eqn.params["call"], times, owner, names, place)
        elif name in CALLS:
            program = inner_program(eqn)[0]
            within = _of_inputs(program, read)
            yield from costly_operations(program, inner, times, own, within, names, place)
        elif name == "scan":
            runs, body = times * eqn.params["length"], eqn.params["jaxpr"].jaxpr
            within = _of_inputs(body, read)
            yield from costly_operations(body, inner, runs, own, within, names, place)
        elif name == "cond":
            for n, branch in enumerate(eqn.params["branches"]):
                at = (*inner, n)
                yield from costly_operations(branch.jaxpr, at, times, own, {}, names, (*place, at))
        else:
            _check_has_no_cost(eqn)


def _check_has_no_cost(eqn: JaxprEqn) -> None:
    """Raises if contractions belong to an operation, and nothing tells how much they compute."""
    name = eqn.primitive.name
    if name in SPARSE:
        detail = f"{name} at {where(eqn)} is a product of sparse arrays, so what it costs cannot be"
        raise ArgumentError("model", detail=f"{detail} counted; a product of dense arrays can be")
    # The other programs of a solve, as the product that it inverts, are for its derivatives.
    programs = [eqn.params["jaxprs"].solve.jaxpr] if name == "custom_linear_solve" else None
    for program in programs or jaxprs_in_params(eqn.params):
        if any(found.eqn.primitive.name in SUMMING for found in costly_operations(program)):
            reason = "runs a contraction or convolution in a program of its own"
            advice = "one outside of it"
            if name == "while":
                reason, advice = "runs as often as its data wants", "a loop of fixed length"
            what = "the loop" if name == "while" else name
            detail = f"{what} at {where(eqn)} {reason}, so what it costs cannot be counted"
            raise ArgumentError("model", detail=f"{detail}; {advice} can be")


def last_calls(operations: Iterable[Operation], calls: Sequence[LayerCall]) -> set[int]:
    """The numbers of the calls after which their layer is called no more where they run."""
    last: dict[str, dict[Place, int]] = {}
    for operation in operations:
        if operation.call is not None:
            place, known = operation.place, last.setdefault(calls[operation.call].path, {})
            for within in [other for other in known if other[: len(place)] == place]:
                del known[within]
            known[place] = operation.call
    return {number for known in last.values() for number in known.values()}


def depends_on_widths(jaxpr: Jaxpr) -> bool:
    """Whether contractions may go in another order for other widths, as those of an einsum do."""
    return any(
        eqn.primitive.name in SUMMING and _is_of_several(eqn)
        for _, program in all_programs(jaxpr)
        for eqn in program.eqns
    )


def _is_of_several(eqn: JaxprEqn) -> bool:
    """Whether an einsum of several arrays made a contraction, or may have: with no scope of it."""
    scope, traceback = str(eqn.source_info.name_stack), eqn.source_info.traceback
    if "," in scope or eqn.primitive.name != "dot_general" or traceback is None:
        return _EINSUM.search(scope) is not None
    return any(frame.function_name == "einsum" for frame in traceback.frames)  # as of multi_dot


def _of_inputs(jaxpr: Jaxpr, owners: Sequence[str | None]) -> dict[Any, str]:
    return {v: owner for v, owner in zip(jaxpr.invars, owners, strict=True) if owner}


def summed_axes(eqn: JaxprEqn) -> tuple[int, list[int]]:
    """An operand of a contraction or convolution, and its axes whose sizes its FLOPs multiply."""
    if eqn.primitive.name == "conv_general_dilated":
        out = eqn.params["dimension_numbers"][1][0]
        return 1, [k for k in range(len(shape_of(eqn.invars[1]))) if k != out]
    return 0, list(dot_numbers(eqn)[0][0][0])  # in groups each row with the matrix of its own


def call_size(operation: Operation) -> int:
    """How many numbers a mark stands for, all runs together."""
    return operation.times * int(np.prod(shape_of(operation.eqn.outvars[0])))


def used_inputs(jaxpr: Jaxpr) -> set[Any]:
    """The inputs of a program that an operation reads, if only to hand them on to one."""
    return _used_and_returned(jaxpr)[0]


def _used_and_returned(jaxpr: Jaxpr) -> tuple[set[Any], list[Any]]:
    """The same, and what a program returns; what a call in it returns as it was is one with that.

    As a method under `nnx.jit`, which returns all arrays of its module.
    """
    used, same = set[Any](), dict[Any, Any]()

    def read(atoms: Iterable[Any]) -> list[Any]:
        return [None if is_literal(atom) else same.get(atom, atom) for atom in atoms]

    for eqn in jaxpr.eqns:
        given = read(eqn.invars)
        if eqn.primitive.name in CALLS:
            inner = inner_program(eqn)[0]
            within, returned = _used_and_returned(inner)
            pairs = dict(zip(inner.invars, given, strict=True))
            used |= {atom for variable, atom in pairs.items() if variable in within}
            made = zip(eqn.outvars, map(pairs.get, returned), strict=True)
            same |= {variable: atom for variable, atom in made if atom is not None}
        else:
            used |= set(given)
    return used & set(jaxpr.invars), read(jaxpr.outvars)
