"""Any network as one of latents: its arrays are on latents, and its code stays as it is."""

from collections.abc import Mapping
from dataclasses import replace
import logging
from types import SimpleNamespace
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax.core.latent import TRACED, Latent
from dhp_jax.core.latent import latents as find_latents
from dhp_jax.core.provenance import architecture_of, set_architecture
from dhp_jax.core.state import path_name, variables_of
from dhp_jax.errors import ArgumentError, check_integer
from dhp_jax.tracing.analysis import Analysis, set_mode
from dhp_jax.tracing.discovery import Discovery, discover, keep_one_factor
from dhp_jax.tracing.explain import notes_of
from dhp_jax.tracing.gating import Gating
from dhp_jax.tracing.generated import (
    GeneratedArray,
    PlacedAxis,
    arrays_replaced,
    is_read_as_stored,
    ordinary,
    replace_nodes,
)
from dhp_jax.tracing.ordinary_calls import call_as_ordinary
from dhp_jax.tracing.programs import Call, default_call, failure, trace_program
from dhp_jax.tracing.proof import check_restricted
from dhp_jax.tracing.table import ORDINARY_CALLS, LatentTable, table_of

logger = logging.getLogger(__name__)

MOST_TRIED = 8  # arrays that are tried one by one
_CONSTANT: Any = SimpleNamespace(params=lambda: jax.random.key(0))  # for latents that are set later


def traced(
    model: nnx.Module,
    inputs: Any,
    *,
    call: Call | None = None,
    embedding: int | None = None,
    min_channels: int = 4,
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """A network with its arrays on latents, found by tracing it; see `dhp.with_latents`."""
    if embedding is not None:
        check_integer("embedding", embedding)
        embedding = int(embedding)  # which files hold
    call = call or default_call
    rngs = rngs or nnx.Rngs(0)
    found = discover(model, inputs, call)
    keep_one_factor(found)
    if not found.families:
        raise ValueError(f"model: nothing of it can be pruned. {_first_reasons(found)}")
    table = table_of(_abstract(found), notes_of(found))
    analysis = found.analysis
    variables = variables_of(model)
    wanted = [name for name in table.places if _may_be_generated(variables[name])]
    generated, ordinary_calls, _ = _that_fit(model, table, analysis, wanted)
    notes = {"generated": generated, "embedding": embedding, ORDINARY_CALLS: ordinary_calls}
    table.notes.update(notes)
    return install(nnx.clone(model), table, generated, min_channels=min_channels, rngs=rngs)


def install(
    net: nnx.Module,
    table: LatentTable,
    generated: list[str],
    *,
    min_channels: int | Mapping[str, int] = 4,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Puts latents and generated arrays into a network, in place; returns it.

    Args:
      net: an ordinary network, which may be abstract.
      table: which latents there are, and where.
      generated: the paths of arrays that latents generate.
      min_channels: of the latents, for all or by name.
      rngs: the `params` stream draws what hypernetworks begin with.
    """
    embedding = None if "gates" in table.notes else table.notes.get("embedding")
    latents = []
    for name, size in table.sizes.items():
        least = min_channels[name] if isinstance(min_channels, Mapping) else min_channels
        z = Latent(size, min_channels=least, rngs=_CONSTANT)
        z.vector.set_value(jnp.ones(size, jnp.float32))
        latents.append(z)
    variables = variables_of(net)
    stand_ins: dict[int, nnx.Module] = {}
    for name in generated:
        variable = variables[name]
        places, gates = table.places[name], table.notes.get("gates")
        axes = {}
        for k in places if gates is None else gates.shares[name]:
            shares = [gates.shares[name][k].get(z, 0.0) for z in table.sizes] if gates else None
            axes[k] = PlacedAxis(latents, places[k], shares)
        stand_ins[id(variable)] = GeneratedArray(
            name, variable, axes, embedding=embedding, rngs=rngs
        )
    replace_nodes(net, stand_ins)
    setattr(net, TRACED, nnx.Dict(dict(zip(table.sizes, latents, strict=True))))
    if table.notes.get(ORDINARY_CALLS):
        call_as_ordinary(net)
    set_architecture(net, replace(architecture_of(net), axes=table))
    return net


def gated(net: nnx.Module, gates: Gating, rngs: nnx.Rngs) -> nnx.Module:
    """A network of traced latents that are all 1 and gate axes of arrays.

    Args:
      net: left as it was.
      gates: as `gating` has found them.
      rngs: as for `install`.

    Raises:
      ValueError: the network's code does not take other arrays in the place of some.
    """
    table, plain = architecture_of(net).axes, ordinary(net)
    names = list(gates.shares)
    notes = {**table.notes, "generated": names, "gates": gates}
    table = replace(table, notes=notes)
    if not set(names) <= set(architecture_of(net).axes.notes["generated"]):
        fit, notes[ORDINARY_CALLS], why = _that_fit(plain, table, table.analysis(plain), names)
        for name in sorted(set(names) - set(fit)):
            why = why.removeprefix("model: ")
            detail = f"the code allows no gates on {name!r}: {why}; dhp.prune_to needs none"
            raise ArgumentError("model", detail=detail)
    found = find_latents(net)
    least = {name: z.size if name in gates.stay else z.min_channels for name, z in found.items()}
    return install(nnx.clone(plain), table, names, min_channels=least, rngs=rngs)


def is_traced(model: nnx.Module) -> bool:
    """Whether a network has latents that were found by tracing."""
    return architecture_of(model).axes is not None and hasattr(model, TRACED)


def _may_be_generated(variable: nnx.Variable) -> bool:
    if not isinstance(variable, nnx.Param) or isinstance(variable, GeneratedArray):
        return False
    value = variable.get_value()
    return value.ndim > 1 and jnp.issubdtype(value.dtype, jnp.floating)


def _that_fit(
    model: nnx.Module, table: LatentTable, analysis: Analysis, names: list[str]
) -> tuple[list[str], bool, str]:
    """The arrays in whose place others may stand: with them the network computes what it did.

    Returns:
      Their names; whether they are ordinary arrays in calls; why that is not so of all of them.
    """
    directly, called = _with_calls(table, ordinary=False), _with_calls(table, ordinary=True)
    if not names or not _difference(model, directly, analysis, names):
        return names, False, ""
    variables = variables_of(model)
    stored = [name for name in names if is_read_as_stored(variables[name])]
    why = _difference(model, called, analysis, stored)
    if not why and stored == names:
        return names, True, ""
    fit, left = _by_halves(model, directly, analysis, names)
    if left and _same_numbers(model, directly, analysis, fit + left):
        fit, left = fit + left, []
    for name in left if len(left) <= MOST_TRIED else []:
        if _same_numbers(model, directly, analysis, [*fit, name]):
            fit = [*fit, name]
    if not why and len(stored) > len(fit):
        return stored, True, "it has a way of its own to be read"
    return [name for name in names if name in fit], False, why


def _with_calls(table: LatentTable, *, ordinary: bool) -> LatentTable:
    return replace(table, notes={**table.notes, ORDINARY_CALLS: ordinary})


def _by_halves(model, table, analysis, names) -> tuple[list[str], list[str]]:
    """The arrays with which the program is the same, and those for which that is not shown."""
    if not names or not _difference(model, table, analysis, names):
        return names, []
    if len(names) == 1:
        return [], names
    half = len(names) // 2
    parts = [_by_halves(model, table, analysis, part) for part in (names[:half], names[half:])]
    return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]


def _difference(model: nnx.Module, table: LatentTable, analysis: Analysis, names: list[str]) -> str:
    """Why the network's program is not the same with generated arrays in the place of some."""

    def called(merged: nnx.Module, *inputs: Any) -> Any:
        variables = variables_of(merged)
        own = [
            (path, variables.get(path_name(path), leaf)) for path, leaf in nnx.to_flat_state(hollow)
        ]
        net = nnx.merge(template_def, nnx.from_flat_state(own))
        with arrays_replaced({name: variables[name] for name in names}):
            return analysis.call(net, *inputs)

    graphdef, state = nnx.split(model)
    whole = nnx.merge(graphdef, state, copy=True)
    try:
        template = nnx.eval_shape(lambda: install(nnx.clone(model), table, names, rngs=nnx.Rngs(0)))
    except Exception as error:  # whatever its class makes of a subclass
        return failure(error)
    for context, program in analysis.programs.items():
        for each in (whole, template):
            set_mode(each, context)
        template_def, hollow = nnx.split(template)
        try:
            other = trace_program(whole, called, analysis.inputs)
            check_restricted(analysis.flow, program.closed, other.closed, frozenset(), context)
        except Exception as error:  # whatever the network's code makes of such arrays
            logger.debug("not shown to be the same: %s: %s", names, error)
            return failure(error)
    return ""


def _same_numbers(
    model: nnx.Module, table: LatentTable, analysis: Analysis, names: list[str]
) -> bool:
    """Whether the network computes the same, to the bit, of random inputs, and sets the same."""
    rng = np.random.default_rng(0)
    inputs = jax.tree.map(lambda like: _random(rng, like), analysis.inputs)
    net = install(nnx.clone(model), table, names, rngs=nnx.Rngs(0))
    outputs = []
    try:
        for each in (model, net):
            for context in analysis.programs:
                graphdef, state = nnx.split(nnx.clone(each))
                copy = nnx.merge(graphdef, state, copy=True)
                set_mode(copy, context)
                graphdef, state = nnx.split(copy)
                outputs.append(_computed(graphdef, analysis.call)(state, inputs))
    except Exception as error:  # whatever the network's code makes of such arrays
        logger.debug("not generated: %s: %s", names, error)
        return False
    half = len(outputs) // 2
    return all(
        np.array_equal(one, other, equal_nan=True)
        for one, other in zip(
            jax.tree.leaves(outputs[:half]), jax.tree.leaves(outputs[half:]), strict=True
        )
    )


def _computed(graphdef: nnx.GraphDef, call: Call) -> Any:
    @jax.jit
    def compute(state: nnx.State, inputs: Any) -> Any:
        model = nnx.merge(graphdef, state, copy=True)
        outputs = call(model, *inputs)
        return outputs, jax.tree.leaves(nnx.state(model, nnx.BatchStat))

    return compute


def _random(rng: np.random.Generator, like: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(like.dtype, jnp.floating):
        return jnp.asarray(rng.normal(size=like.shape), like.dtype)
    return jnp.asarray(rng.integers(0, 2, like.shape), like.dtype)


def _abstract(found: Discovery) -> Discovery:
    """The same without the numbers of arrays, which need not be kept."""
    for context, program in list(found.analysis.programs.items()):
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.state)
        arrays = tuple(jax.tree.leaves(state))
        found.analysis.programs[context] = program._replace(state=state, arrays=arrays)
    found.analysis.model = None
    return found


def _first_reasons(found: Discovery) -> str:
    reasons = [why for _, why in found.frozen] or list(found.fixed())
    return "; ".join(reasons[:3])
