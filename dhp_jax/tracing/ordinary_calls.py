"""Calls of networks of traced latents in which generated arrays are ordinary variables.

Transformations of `flax.nnx`, such as `nnx.scan` and `nnx.vmap`, take the state of a module apart,
by the first axis of each array. The latents of a generated array are part of its state, have other
axes, and belong to no layer of a stack. So for the time of a call ordinary variables, with the
arrays that were generated, stand where generated arrays do, and the latents are away. The modules
stay the same objects, as do all other variables: what a call sets in them, it sets.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import inspect
from typing import Any, NamedTuple

import flax
from flax import nnx
import jax
from jax.extend.core import Jaxpr, JaxprEqn
import numpy as np

from dhp_jax.core.latent import TRACED
from dhp_jax.core.state import variables_of
from dhp_jax.errors import ArgumentError
from dhp_jax.tracing.generated import KIND, GeneratedArray, replace_nodes
from dhp_jax.tracing.programs import CALLS, inner_program, is_literal, where


def call_as_ordinary(net: nnx.Module) -> None:
    """Makes calls of a network, and of its own methods, such ones; in place."""
    net.__class__ = _calling(type(net))


@functools.cache
def _calling(kind: type) -> type:
    methods = {name: _method(inspect.getattr_static(kind, name)) for name in _methods(kind)}
    copied = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    members, is_tree = {**copied, **methods, KIND: kind}, getattr(kind, "_pytree__is_pytree", True)
    # An `__init_subclass__` of the user's may take no options.
    options = {} if is_tree == flax.config.flax_pytree_module else {"pytree": is_tree}
    return type(kind)(kind.__name__, (kind,), members, **options)


def _methods(kind: type) -> Iterator[str]:
    """The methods of a class that `nnx.Module` does not have."""
    for name in dir(kind):
        found = inspect.getattr_static(kind, name)
        others = (property, staticmethod, classmethod, type)
        if name != "__call__" and (name.startswith("__") or hasattr(nnx.Module, name)):
            continue
        if callable(found) and hasattr(found, "__get__") and not isinstance(found, others):
            yield name


def _method(function: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: nnx.Module, *args: Any, **options: Any) -> Any:
        if TRACED not in vars(self):  # within another call
            return function.__get__(self)(*args, **options)
        with _as_ordinary(self) as taken:
            before = _State(*nnx.split(self))
            outputs = function.__get__(self)(*args, **options)
            changed = [each for each in taken if each.variable.get_raw_value() is not each.value]
            if changed:
                _check_unchanged(function, before, changed, args, options)
        return outputs

    return call


class _Taken(NamedTuple):
    """A variable in the place of a generated array, and its array before the call."""

    name: str
    variable: nnx.Variable
    value: Any


class _State:
    """A network before a call; variables that the call sets are not set in it."""

    def __init__(self, graphdef: nnx.GraphDef, state: nnx.State):
        self.graphdef = graphdef
        self.arrays, self.structure = jax.tree.flatten(state)

    def merged(self, arrays: list[Any]) -> nnx.Module:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.structure, arrays), copy=True)


@contextlib.contextmanager
def _as_ordinary(net: nnx.Module) -> Iterator[list[_Taken]]:
    """Puts ordinary variables where generated arrays stand, and takes the latents away."""
    nodes = [node for _, node in nnx.iter_graph(net) if isinstance(node, GeneratedArray)]
    nodes = list({id(node): node for node in nodes}.values())
    variables = [node.stand_in() for node in nodes]
    values = [variable.get_raw_value() for variable in variables]
    both = list(zip(nodes, variables, strict=True))
    latents = vars(net)[TRACED]
    replace_nodes(net, {id(node): variable for node, variable in both}, directly=True)
    del vars(net)[TRACED]
    try:
        yield [_Taken(node.name, v, x) for (node, v), x in zip(both, values, strict=True)]
    finally:
        vars(net)[TRACED] = latents
        try:
            replace_nodes(net, {id(variable): node for node, variable in both}, directly=True)
        except ValueError as error:
            detail = "expected a call that leaves arrays on latents where they stand"
            raise ArgumentError("model", detail=detail) from error


def _check_unchanged(
    function: Any, before: _State, changed: list[_Taken], args: Any, options: Any
) -> None:
    """Raises unless a call leaves arrays as they were, which may come out of it as others.

    What is computed by `nnx.remat` is read within it, and set to the same behind it.
    """
    leaves, structure = jax.tree.flatten((args, options))
    dynamic = [k for k, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]
    numbers = {id(array): k for k, array in enumerate(before.arrays)}

    def forward(arrays: list[Any], inputs: list[Any]) -> list[Any]:
        model, given = before.merged(arrays), list(leaves)
        for k, value in zip(dynamic, inputs, strict=True):
            given[k] = value
        own, named = jax.tree.unflatten(structure, given)
        function.__get__(model)(*own, **named)
        after = variables_of(model)
        return [after[each.name].get_raw_value() for each in changed]

    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in before.arrays]
    inputs = [jax.ShapeDtypeStruct(leaves[k].shape, leaves[k].dtype) for k in dynamic]
    jaxpr = jax.make_jaxpr(forward)(abstract, inputs).jaxpr
    for each, atom in zip(changed, jaxpr.outvars, strict=True):
        source, eqn = source_of(jaxpr, atom)
        if source != numbers[id(each.value)]:
            place = where(eqn)
            detail = f"expected a call that sets no array on latents; it sets {each.name!r}"
            raise ArgumentError("model", detail=detail + (f" at {place}" if place else ""))


def source_of(jaxpr: Jaxpr, atom: Any) -> tuple[int | None, JaxprEqn | None]:
    """The input of a program that a variable of it is; or no input, and what computes it."""
    inputs = {variable: k for k, variable in enumerate(jaxpr.invars)}
    made = {variable: (eqn, k) for eqn in jaxpr.eqns for k, variable in enumerate(eqn.outvars)}
    while not is_literal(atom) and atom not in inputs:
        if atom not in made:  # a constant
            return None, None
        eqn, number = made[atom]
        source, within = _source_in(eqn, number)
        if source is None:
            return None, within
        atom = eqn.invars[source]
    return (None, None) if is_literal(atom) else (inputs[atom], None)


def _source_in(eqn: JaxprEqn, number: int) -> tuple[int | None, JaxprEqn | None]:
    """The operand of an operation that one of its outputs is; or none, and what computes it."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        inner, _ = inner_program(eqn)
        return source_of(inner, inner.outvars[number])
    if name in ("copy", "optimization_barrier", "sharding_constraint"):
        return number, None
    if name == "scan":
        inner, first, carried = params["jaxpr"].jaxpr, params["num_consts"], params["num_carry"]
        source, within = source_of(inner, inner.outvars[number])
        if source is None:
            return None, within
        stays = source == first + number if number < carried else source >= first + carried
        return (source, None) if stays else (None, eqn)
    if name == "cond":
        found = [source_of(b.jaxpr, b.jaxpr.outvars[number]) for b in params["branches"]]
        for source, within in found:
            if source is None or source != found[0][0]:
                return None, within or eqn
        return found[0][0] + 1, None
    return None, eqn
