"""A network's program: its traced forward pass, in which every array of the network is an input."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
import sys
from typing import Any, NamedTuple

import flax
from flax import nnx
import jax
from jax._src import source_info_util  # where an operation comes from; there is no public way
from jax._src.interpreters import partial_eval
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
import numpy as np
import opt_einsum

from dhp_jax.core.state import path_name, value_of
from dhp_jax.errors import ArgumentError, first_line, shown

Context = tuple[Any, ...]  # the operations that lead to an inner program
EVALUATION: Context = ()
TRAINING: Context = ("training",)
Call = Callable[..., Any]

_CALLS = """
    jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call
    custom_vjp_call_jaxpr custom_lin core_closed_call xla_call named_call composite compute_on
    custom_vmap_call custom_partitioning
"""
CALLS = frozenset(_CALLS.split())
DOTS = ("dot_general", "ragged_dot_general")
_LIBRARIES = tuple(
    os.path.dirname(module.__file__) + os.sep for module in (jax, flax) if module.__file__
)
_OTHERS = ("einops", "equinox", "haiku", "jaxtyping")  # libraries that a network's code may call
_LIBRARY = os.path.dirname(os.path.dirname(__file__))
_OWN = tuple(
    os.path.join(_LIBRARY, *part)
    for part in (["tracing", ""], ["core", ""], ["models", "functions.py"], ["models", "linen.py"])
)
_AS_WRITTEN = jax.make_user_context(False)  # what is jitted in a network is traced for each


class UntraceableError(ArgumentError):
    """A network or call of which no program can be, whatever the inputs are."""


class Program(NamedTuple):
    """A forward pass as a function of the network's arrays and its inputs.

    Its outputs are those of the network, then what is in the place of each array afterwards.
    """

    closed: ClosedJaxpr
    names: tuple[str, ...]  # of the arrays, the paths that lead to them
    graphdef: nnx.GraphDef
    state: nnx.State
    arrays: tuple[jax.Array | jax.ShapeDtypeStruct, ...]


def trace_program(
    model: nnx.Module, call: Call, inputs: tuple[Any, ...], *, as_written: bool = True
) -> Program:
    """Traces `call(model, *inputs)`; nothing is computed.

    Args:
      model: left as it was; its arrays may be abstract.
      call: a function of the model and the inputs.
      inputs: trees of abstract arrays.
      as_written: whether an einsum of several arrays goes through them in turn, whatever their
        sizes are. It is run in the order that is cheapest for its sizes.

    Raises:
      UntraceableError: a variable or an output that is no array.
    """
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    for path, leaf in flat:
        if not hasattr(value_of(leaf), "dtype"):
            name, kind = path_name(path), type(value_of(leaf)).__name__
            raise UntraceableError("model", f"an array in variable {name!r}", f"a value of {kind}")
    arrays, structure = jax.tree.flatten(state)
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]

    def forward(arrays: list[Any], *inputs: Any) -> tuple[Any, list[Any]]:
        merged = nnx.merge(graphdef, jax.tree.unflatten(structure, arrays), copy=True)
        outputs = call(merged, *inputs)
        for leaf in jax.tree.leaves(outputs):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | complex | float | int):
                wanted = "a function whose outputs are arrays, or trees of them"
                raise UntraceableError("call", wanted, f"a {type(leaf).__name__} among them")
        after = dict(nnx.to_flat_state(nnx.state(merged)))
        kept = [after.get(path, x) for (path, _), x in zip(flat, arrays, strict=True)]
        return outputs, [value_of(leaf) for leaf in kept]

    with _short_errors(), _in_turn() if as_written else contextlib.nullcontext():
        closed = jax.make_jaxpr(forward)(abstract, *inputs)
    names = tuple(path_name(path) for path, _ in flat)
    return Program(closed, names, graphdef, state, tuple(arrays))


def used_alone(program: Program) -> Program:
    """A program without the operations of which nothing reads what they compute."""
    return program._replace(closed=without_unread(program.closed))


def without_unread(closed: ClosedJaxpr) -> ClosedJaxpr:
    """A traced function without the operations of which nothing reads what they compute."""
    every = [True] * len(closed.jaxpr.outvars)
    alive, *_ = partial_eval.dce_jaxpr(closed.jaxpr, every, instantiate=True)
    return closed.replace(jaxpr=alive)


def needed_inputs(jaxpr: Jaxpr) -> list[bool]:
    """Whether what a program returns follows from each of its inputs."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]


@contextlib.contextmanager
def _short_errors() -> Iterator[None]:
    """Keeps JAX from looking for the origin of traced arrays, for errors that nobody sees.

    Flax asks each for its sharding when BatchNorm's statistics are set, and catches the error. In
    deep networks looking for its text takes most of the time of tracing.
    """
    kind = partial_eval.DynamicJaxprTracer
    before = kind._origin_msg
    kind._origin_msg = lambda self: ""
    try:
        yield
    finally:
        kind._origin_msg = before


class _Written(opt_einsum.paths.PathOptimizer):
    """The order in which the arrays of an einsum are written: always the first two."""

    def __call__(self, inputs: list[Any], *_: Any, **__: Any) -> list[tuple[int, int]]:
        return [(0, 1)] * (len(inputs) - 1)


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    """Keeps `jnp.einsum` from an order of contractions that depends on sizes."""
    before = opt_einsum.contract_path

    def contract_path(*operands: Any, **options: Any) -> Any:
        return before(*operands, **options | {"optimize": _Written()})

    opt_einsum.contract_path = contract_path
    try:
        with _AS_WRITTEN(True):
            yield
    finally:
        opt_einsum.contract_path = before


def default_call(model: nnx.Module, *inputs: Any) -> Any:
    """`model(*inputs)`."""
    return model(*inputs)


def called(call: Call | None) -> Call:
    """How a network is called.

    Raises:
      ArgumentError: it is no function.
    """
    if call is not None and not callable(call):
        raise ArgumentError("call", "a function of the model and the inputs, or None", shown(call))
    return call or default_call


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of what an operation reads or writes."""
    return tuple(getattr(atom.aval, "shape", ()))


def dot_numbers(eqn: JaxprEqn) -> tuple[Any, tuple[Sequence[int], Sequence[int]]]:
    """The axes of a contraction: summed and batch axes, and what has groups of each operand.

    The rows of the first operand are in groups, each of which has a matrix of the second one.
    """
    if eqn.primitive.name == "dot_general":
        return eqn.params["dimension_numbers"], ((), ())
    found = eqn.params["ragged_dot_dimension_numbers"]
    return found.dot_dimension_numbers, (found.lhs_ragged_dimensions, found.rhs_group_dimensions)


def inner_program(eqn: JaxprEqn) -> tuple[Jaxpr, list[Any]]:
    """The program that a call-like operation calls, and its constants."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        if key in eqn.params:
            found = eqn.params[key]
            return (found.jaxpr, found.consts) if isinstance(found, ClosedJaxpr) else (found, [])
    raise KeyError(eqn.primitive.name)


def inner_programs(eqn: JaxprEqn, context: Context) -> Iterator[tuple[Context, Jaxpr]]:
    """The programs within an operation, each with the context that its variables have."""
    match eqn.primitive.name:
        case name if name in CALLS:
            yield context, inner_program(eqn)[0]
        case "scan":
            yield context, eqn.params["jaxpr"].jaxpr
        case "while":
            yield (*context, "cond"), eqn.params["cond_jaxpr"].jaxpr
            yield context, eqn.params["body_jaxpr"].jaxpr
        case "cond":
            for number, branch in enumerate(eqn.params["branches"]):
                yield (*context, number), branch.jaxpr


def all_programs(jaxpr: Jaxpr, context: Context = ()) -> Iterator[tuple[Context, Jaxpr]]:
    """A program and all programs within it."""
    yield context, jaxpr
    for number, eqn in enumerate(jaxpr.eqns):
        for inner_context, inner in inner_programs(eqn, (*context, number)):
            yield from all_programs(inner, inner_context)


def where(eqn: JaxprEqn | None) -> str:
    """File and line of the user's code that an operation comes from; empty if it is not known."""
    if eqn is None:
        return ""
    found = ""
    for frame in source_info_util.user_frames(eqn.source_info.traceback):
        found = found or _place(frame.file_name, frame.start_line)
        if not frame.file_name.startswith((*_libraries(), *_OWN)):
            return _place(frame.file_name, frame.start_line)
    return found


def _libraries() -> tuple[str, ...]:
    """The folders of libraries that are loaded, in whose code no user looks."""
    loaded = (getattr(sys.modules.get(name), "__file__", None) for name in _OTHERS)
    return _LIBRARIES + tuple(os.path.dirname(file) + os.sep for file in loaded if file)


def where_raised(error: BaseException) -> str:
    """File and line of the user's code in which an error was raised; empty if it is not known."""
    found, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        others = (*_libraries(), *_OWN, os.path.dirname(os.__file__) + os.sep)
        if not name.startswith(others) and "site-packages" not in name:
            found = _place(name, trace.tb_lineno)
        trace = trace.tb_next
    return found


def failure(error: BaseException) -> str:
    """What an error in the user's code says, and where it was raised."""
    place = where_raised(error)
    return first_line(error) + (f" at {place}" if place else "")


def _place(file: str, line: int) -> str:
    return f"{'/'.join(file.split(os.sep)[-2:])}:{line}"


def is_literal(atom: Any) -> bool:
    """Whether what an operation reads is a number in the program."""
    return isinstance(atom, Literal)
