"""Two references for a pruned network that know nothing of slicing.

`zeroed` is the whole network in which all numbers of what is gone are zero. `restricted` is the
whole program, evaluated operation by operation, in which every sum leaves out what is gone and
every mean divides by what is left; it is right where a normalisation goes over channels too.
"""

from collections.abc import Mapping
import math
from typing import Any

from flax import nnx
import jax
from jax.extend.core import Jaxpr, Literal
import jax.numpy as jnp
import numpy as np

from dhp_jax.core.state import with_value
from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.discovery import Discovery
from dhp_jax.tracing.programs import (
    CALLS,
    DOTS,
    EVALUATION,
    dot_numbers,
    inner_program,
    shape_of,
)
from dhp_jax.tracing.rules import ELEMENTWISE

PASSING = ("broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "expand_dims")


def gone_of(found: Discovery, masks: Mapping[str, np.ndarray]) -> frozenset[int]:
    """The atoms that boolean masks, by family, leave out."""
    root = found.analysis.flow.terms.root
    return frozenset(
        root(family.atoms[entry])
        for family in found.families
        if family.name in masks
        for entry in np.flatnonzero(~np.asarray(masks[family.name], bool))
    )


def proved_cut(found: Discovery, masks: Mapping[str, np.ndarray]) -> nnx.Module:
    """The network of what survives, proved to be that."""
    gone = gone_of(found, masks)
    found.analysis.prove(gone)
    return found.analysis.cut(gone)


def zeroed(analysis: Analysis, gone: frozenset[int], inputs: tuple[Any, ...]) -> Any:
    program = analysis.programs[EVALUATION]
    flat, leaves = nnx.to_flat_state(program.state), []
    for (path, leaf), x, kept in zip(flat, program.arrays, analysis.kept(gone), strict=True):
        if isinstance(leaf, nnx.Param):
            for k, mask in enumerate(kept):
                if not mask.all():
                    shape = [-1 if j == k else 1 for j in range(x.ndim)]
                    x = x * mask.astype(x.dtype).reshape(shape)
        leaves.append((path, with_value(leaf, x)))
    model = nnx.merge(program.graphdef, nnx.from_flat_state(leaves), copy=True)
    return analysis.call(model, *inputs)


def restricted(analysis: Analysis, gone: frozenset[int], inputs: tuple[Any, ...]) -> list[Any]:
    program = analysis.programs[EVALUATION]
    given = [*program.arrays, *jax.tree.leaves(inputs)]
    closed = program.closed
    nothing = [None] * len(given)
    outputs, _ = _Evaluator(analysis, gone)(closed.jaxpr, closed.consts, given, (), nothing)
    return outputs[: len(outputs) - len(program.arrays)]


class _Evaluator:
    def __init__(self, analysis: Analysis, gone: frozenset[int]):
        self.flow, self.gone = analysis.flow, gone

    def masks(self, context, variable):
        axes, sizes = self.flow.at[context, variable], shape_of(variable)
        return [self.flow.kept(a, self.gone, n) for a, n in zip(axes, sizes, strict=True)]

    def only(self, x, masks, axes, other=0):
        for k in axes:
            if not masks[k].all():
                shape = [-1 if j == k else 1 for j in range(x.ndim)]
                x = jnp.where(masks[k].reshape(shape), x, jnp.asarray(other, x.dtype))
        return x

    def __call__(self, jaxpr: Jaxpr, consts, args, context, counts_in):
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= dict(zip(jaxpr.invars, args, strict=True))
        counts = {v: c for v, c in zip(jaxpr.invars, counts_in, strict=True) if c is not None}

        def read(atom):
            return atom.val if isinstance(atom, Literal) else values[atom]

        for number, eqn in enumerate(jaxpr.eqns):
            given, name = [read(atom) for atom in eqn.invars], eqn.primitive.name
            sums = [None if isinstance(a, Literal) else counts.get(a) for a in eqn.invars]
            inner = (*context, number)
            if name in CALLS:
                program, constants = inner_program(eqn)
                outputs, found = self(program, constants, given, inner, sums)
                counts |= {v: c for v, c in zip(eqn.outvars, found, strict=True) if c is not None}
            elif name == "scan":
                outputs = self.scan(eqn, given, inner)
            elif name == "cond":
                branch = eqn.params["branches"][at := int(given[0])]
                none = [None] * (len(given) - 1)
                outputs, _ = self(branch.jaxpr, branch.consts, given[1:], (*inner, at), none)
            else:
                outputs = self.operation(eqn, given, sums, context, counts)
            values |= dict(zip(eqn.outvars, outputs, strict=True))
        outputs = [read(atom) for atom in jaxpr.outvars]
        return outputs, [None if isinstance(a, Literal) else counts.get(a) for a in jaxpr.outvars]

    def scan(self, eqn, given, context):
        body, fixed = eqn.params["jaxpr"], eqn.params["num_consts"]
        last = fixed + eqn.params["num_carry"]
        carry, stacked = given[fixed:last], []
        steps = range(eqn.params["length"])
        for step in reversed(steps) if eqn.params["reverse"] else steps:
            args = [*given[:fixed], *carry, *(x[step] for x in given[last:])]
            outputs, _ = self(body.jaxpr, body.consts, args, context, [None] * len(args))
            carry = outputs[: len(carry)]
            stacked.append(outputs[len(carry) :])
        return [*carry, *(jnp.stack(x) for x in zip(*stacked, strict=True))]

    def operation(self, eqn, given, sums, context, counts):
        name = eqn.primitive.name
        if name in DOTS:
            summed = dot_numbers(eqn)[0][0][0]
            given[0] = self.only(given[0], self.masks(context, eqn.invars[0]), summed)
        elif name == "conv_general_dilated":
            feature = eqn.params["dimension_numbers"][0][1]
            given[0] = self.only(given[0], self.masks(context, eqn.invars[0]), [feature])
        elif name == "reduce_sum":
            axes, masks = eqn.params["axes"], self.masks(context, eqn.invars[0])
            given[0] = self.only(given[0], masks, axes)
            counts[eqn.outvars[0]] = tuple(
                math.prod(count(masks[k]) for k in axes) for count in (len, np.sum)
            )
        elif name in ("reduce_max", "reduce_min"):
            nothing = -jnp.inf if name == "reduce_max" else jnp.inf
            axes, masks = eqn.params["axes"], self.masks(context, eqn.invars[0])
            given[0] = self.only(given[0], masks, axes, nothing)
        elif name == "div" and sums[0] and _is_number(given[1]) and float(given[1]) == sums[0][0]:
            given[1] = np.asarray(sums[0][1], np.asarray(given[1]).dtype)
        elif name in PASSING and sums[0]:
            counts[eqn.outvars[0]] = sums[0]
        if name in ELEMENTWISE and all(map(_is_number, given)):
            with jax.ensure_compile_time_eval():
                outputs = eqn.primitive.bind(*given, **eqn.params)
        else:
            outputs = eqn.primitive.bind(*given, **eqn.params)
        return outputs if eqn.primitive.multiple_results else [outputs]


def _is_number(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer) and np.ndim(x) == 0


def difference(left: Any, right: Any) -> float:
    """The largest difference of two trees of arrays, relative to the largest number."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.isfinite(x).all()
        worst = max(worst, np.abs(x - y).max(initial=0) / (np.abs(y).max(initial=0) + 1e-30))
    return worst


def in_float64(model: nnx.Module) -> nnx.Module:
    """A copy whose floating-point arrays are float64."""
    graphdef, state = nnx.split(model)
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )
    return nnx.merge(graphdef, wide, copy=True)


def randomised(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """Gives vectors numbers of their own, so that no zeros and ones hide a mistake."""
    rng = np.random.default_rng(seed)
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        x = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        if isinstance(leaf, nnx.Variable) and x.ndim == 1 and x.dtype == jnp.float32:
            leaf.set_value(jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32))
    return model
