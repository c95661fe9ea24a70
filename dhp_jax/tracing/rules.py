"""The equations of operations on numbers one by one, and of those that move numbers about."""

from collections.abc import Sequence

from jax.extend.core import JaxprEqn
import numpy as np

from dhp_jax.tracing.flow import Axes, Flow, rule
from dhp_jax.tracing.programs import (
    CALLS,
    TRAINING,
    Context,
    inner_program,
    shape_of,
)
from dhp_jax.tracing.terms import Axis, merge_axes, split_axis

_ELEMENTWISE = """
    add sub mul div rem pow integer_pow max min neg sign abs floor ceil round exp exp2 log log1p
    expm1 sqrt rsqrt cbrt square tanh sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh
    logistic erf erfc erf_inv is_finite eq ne lt le gt ge and or xor not select_n clamp nextafter
    convert_element_type reduce_precision stop_gradient copy copy_p real imag conj complex lgamma
    digamma igamma igammac population_count clz shift_left shift_right_logical
    shift_right_arithmetic optimization_barrier add_any name device_put sharding_constraint
    mesh_cast reshard pvary
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
PRINTS = ("debug_callback", "debug_print")  # show numbers and return none


@rule(*ELEMENTWISE)
def elementwise(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    """Axes of one size are one, position by position; an axis of size 1 is broadcast."""
    if eqn.primitive.name in ("optimization_barrier", "device_put"):  # each array by itself
        return list(inputs)
    outputs = []
    for variable in eqn.outvars:
        shape, axes = shape_of(variable), []
        alike = [
            (given, shape_of(atom))
            for given, atom in zip(inputs, eqn.invars, strict=True)
            if len(shape_of(atom)) == len(shape)
        ]
        for k, size in enumerate(shape):
            axes.append(all_one(flow, [a[k] for a, sizes in alike if sizes[k] == size], eqn))
        outputs.append(tuple(axes))
    return outputs


@rule(*PRINTS)
def _print(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    return []


@rule("bitcast_convert_type")
def _bitcast(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    """Numbers one by one, as in random draws; of another width in bits they are other axes."""
    shape = shape_of(eqn.outvars[0])
    if shape_of(eqn.invars[0]) == shape:
        return [inputs[0]]
    for axis in inputs[0]:
        flow.freeze(axis, eqn, "takes numbers apart")
    return [(None,) * len(shape)]


def all_one(flow: Flow, axes: Sequence[Axis], eqn: JaxprEqn) -> Axis:
    """Axes that meet position by position in an operation, as one."""
    first, *others = axes or [None]
    for other in others:
        first = flow.meet(first, other, eqn)
    return first


@rule(*CALLS)
def _call(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    return flow.run(inner_program(eqn)[0], inputs, context)


@rule("broadcast_in_dim")
def _broadcast(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    given, shape = shape_of(eqn.invars[0]), eqn.params["shape"]
    outputs: list[Axis] = [None] * len(shape)
    source = {int(k): at for at, k in enumerate(eqn.params["broadcast_dimensions"])}
    for k, size in enumerate(shape):
        if k in source and given[source[k]] == size:
            outputs[k] = inputs[0][source[k]]
        elif size > 1:  # copies, as many as the code asks for
            outputs[k] = flow.fresh((context, k), size)
    return [tuple(outputs)]


@rule("reshape")
def _reshape(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    order = eqn.params.get("dimensions") or range(len(inputs[0]))
    given, old = ([x[k] for k in order] for x in (inputs[0], shape_of(eqn.invars[0])))
    new = shape_of(eqn.outvars[0])
    if 0 in old:
        for axis in given:
            flow.freeze(axis, eqn, "of no numbers")
        return [(None,) * len(new)]
    outputs: list[Axis] = [None] * len(new)
    for sources, targets in reshaped_together(old, new):
        if len(sources) == len(targets) == 1:
            outputs[targets[0]] = given[sources[0]]
            continue
        sizes = [old[k] for k in sources]
        flat = merge_axes(flow.terms, [given[k] for k in sources], sizes)
        if len(targets) == 1:
            outputs[targets[0]] = flat
            continue
        parts = split_axis(
            flow.terms,
            flat,
            [new[k] for k in targets],
            lambda k, size, targets=targets: flow.fresh((context, targets[k]), size),
            f"reshape to {new} at {flow.place()}",
        )
        for k, part in zip(targets, parts, strict=True):
            outputs[k] = part
    return [tuple(outputs)]


def reshaped_together(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of axes, of more than one position, that hold the same numbers."""
    olds = [k for k, size in enumerate(old) if size > 1]
    news = [k for k, size in enumerate(new) if size > 1]
    groups = []
    while olds and news:
        sources, targets = [olds.pop(0)], [news.pop(0)]
        before, after = old[sources[0]], new[targets[0]]
        while before != after:
            if before < after:
                sources.append(olds.pop(0))
                before *= old[sources[-1]]
            else:
                targets.append(news.pop(0))
                after *= new[targets[-1]]
        groups.append((sources, targets))
    return groups


@rule("transpose")
def _transpose(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    return [tuple(inputs[0][k] for k in eqn.params["permutation"])]


@rule("squeeze")
def _squeeze(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    gone = {k % len(inputs[0]) for k in eqn.params["dimensions"]}
    return [tuple(axis for k, axis in enumerate(inputs[0]) if k not in gone)]


@rule("expand_dims")
def _expand_dims(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    axes = list(inputs[0])
    for k in sorted(eqn.params["dimensions"]):
        axes.insert(k, None)
    return [tuple(axes)]


@rule("rev")
def _reverse(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    reversed_axes = eqn.params["dimensions"]
    return [
        tuple(
            axis[::-1] if axis is not None and k in reversed_axes else axis
            for k, axis in enumerate(inputs[0])
        )
    ]


@rule("iota")
def _iota(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    along = eqn.params["dimension"]
    return [
        tuple(
            None if k == along or size == 1 else flow.fresh((context, k), size)
            for k, size in enumerate(eqn.params["shape"])
        )
    ]


@rule("random_bits")
def _random_bits(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    """As many as the code asks for; of another width they are another draw.

    So a fixed key, of which evaluation draws the same numbers each time, makes them stay.
    """
    shape = shape_of(eqn.outvars[0])
    if TRAINING[0] not in context and flow.is_constant(context[:-1], eqn.invars[0]):
        return [(None,) * len(shape)]
    axes = tuple(flow.fresh((context, k), n) if n > 1 else None for k, n in enumerate(shape))
    for axis in axes if TRAINING[0] not in context else ():
        flow.note(flow.draws, axis)
    return [axes]


@rule("concatenate")
def _concatenate(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    along, outputs = eqn.params["dimension"], []
    for k in range(len(inputs[0])):
        parts = [axes[k] for axes in inputs]
        if k != along:
            outputs.append(all_one(flow, parts, eqn))
        elif all(part is None for part in parts):
            outputs.append(None)
        else:
            sizes = [shape_of(atom)[k] for atom in eqn.invars]
            outputs.append(_joined(parts, sizes))
    return [tuple(outputs)]


def _joined(parts: Sequence[Axis], sizes: Sequence[int]) -> np.ndarray:
    filled = [
        np.zeros(size, np.int64) if part is None else part
        for part, size in zip(parts, sizes, strict=True)
    ]
    return np.concatenate(filled)


@rule("stack")
def _stack(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    axes = [all_one(flow, [given[k] for given in inputs], eqn) for k in range(len(inputs[0]))]
    axes.insert(eqn.params["axis"], None)
    return [tuple(axes)]


@rule("unstack")
def _unstack(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    along, axes = eqn.params["axis"], inputs[0]
    flow.freeze(axes[along], eqn, "takes it apart")
    return [(*axes[:along], *axes[along + 1 :])] * len(eqn.outvars)


@rule("tile")
def _tile(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    sizes, outputs = shape_of(eqn.invars[0]), []
    for k, (axis, size, times) in enumerate(zip(inputs[0], sizes, eqn.params["reps"], strict=True)):
        if size == 1 and times > 1:
            outputs.append(flow.fresh((context, k), times))
        else:
            outputs.append(None if axis is None else np.tile(axis, times))
    return [tuple(outputs)]


@rule("split")
def _split(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    along, outputs, start = eqn.params["axis"], [], 0
    for size in map(int, eqn.params["sizes"]):
        part = slice(start, start + size)
        outputs.append(
            tuple(
                axis[part] if k == along and axis is not None else axis
                for k, axis in enumerate(inputs[0])
            )
        )
        start += size
    return outputs


@rule("slice")
def _slice(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    parts = slices_of(eqn)
    both = zip(inputs[0], parts, strict=True)
    return [tuple(None if axis is None else axis[part] for axis, part in both)]


def slices_of(eqn: JaxprEqn) -> list[slice]:
    """The slices that an operation takes, one an axis."""
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or [1] * len(starts)
    return [slice(*map(int, part)) for part in zip(starts, ends, steps, strict=True)]


@rule("pad")
def _pad(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    before, after, outputs = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]), []
    for k, (axis, config) in enumerate(zip(inputs[0], eqn.params["padding_config"], strict=True)):
        stays = before[k] > 1 and not flow.atoms_of(axis)
        if stays or not any(config):
            outputs.append(None if any(config) else axis)
            continue
        places = pad_places(before[k], config)
        padded = flow.fresh((context, k), after[k]).copy()
        inside = places >= 0
        padded[inside] = 0 if axis is None else axis[places[inside]]
        outputs.append(padded)
    return [tuple(outputs)]


def pad_places(size: int, config: Sequence[int]) -> np.ndarray:
    """For each position of a padded axis the one that it comes from, or -1."""
    low, high, between = map(int, config)
    places = np.full((size - 1) * (between + 1) + 1 if size else 0, -1)
    places[:: between + 1] = np.arange(size)
    places = places[-low:] if low < 0 else np.concatenate([np.full(low, -1), places])
    return places[:high] if high < 0 else np.concatenate([places, np.full(high, -1)])


@rule("dynamic_slice")
def _dynamic_slice(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    before, after, outputs = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]), []
    for axis, old, new in zip(inputs[0], before, after, strict=True):
        if old != new:
            flow.freeze(axis, eqn, "takes a part of it")
        outputs.append(axis if old == new else None)
    return [tuple(outputs)]


@rule("dynamic_update_slice")
def _dynamic_update_slice(
    flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context
) -> list[Axes]:
    whole, part, outputs = shape_of(eqn.invars[0]), shape_of(eqn.invars[1]), []
    for axis, update, old, new in zip(inputs[0], inputs[1], whole, part, strict=True):
        if old == new:
            outputs.append(flow.meet(axis, update, eqn))
            continue
        flow.freeze(axis, eqn, "writes a part of it")
        flow.freeze(update, eqn, "writes it to a part")
        outputs.append(None)
    return [tuple(outputs)]


@rule("gather")
def _gather(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    """Axes that are taken whole stay what they are; those that indices choose from must stay."""
    (axes, index_axes), shape = inputs[:2], shape_of(eqn.invars[0])
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    outside = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    outputs: list[Axis] = [None] * len(shape_of(eqn.outvars[0]))
    inside = [k for k in range(len(axes)) if k not in outside]
    for k, out in zip(inside, numbers.offset_dims, strict=True):
        if sizes[k] == shape[k]:  # whatever its index is: all of it is taken, or filled
            outputs[out] = axes[k]
    batch = [out for out in range(len(outputs)) if out not in numbers.offset_dims]
    for k, out in enumerate(batch):
        outputs[out] = index_axes[k]
    for k, axis in enumerate(axes):
        if k in numbers.operand_batching_dims:
            at = numbers.operand_batching_dims.index(k)
            flow.meet(axis, index_axes[numbers.start_indices_batching_dims[at]], eqn)
        elif k not in inside or sizes[k] != shape[k]:
            flow.freeze(axis, eqn, "takes entries of it by index")
    flow.freeze(index_axes[-1], eqn, "takes it as an index")
    return [tuple(outputs)]


@rule("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
def _scatter(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    """Axes that are written whole stay what they are; those that indices choose from must stay."""
    axes, index_axes, updates = inputs
    numbers, (shape, _, new) = eqn.params["dimension_numbers"], map(shape_of, eqn.invars)
    outputs, batching = list(axes), numbers.operand_batching_dims
    inside = [k for k in range(len(axes)) if k not in (*numbers.inserted_window_dims, *batching)]
    for k, part in zip(inside, numbers.update_window_dims, strict=True):
        if shape[k] == new[part]:  # whatever its index is: all of it is written, or dropped
            outputs[k] = flow.meet(axes[k], updates[part], eqn)
            continue
        flow.freeze(axes[k], eqn, "writes entries by index")
        flow.freeze(updates[part], eqn, "writes it to entries by index")
        outputs[k] = None
    for k in numbers.inserted_window_dims:
        flow.freeze(axes[k], eqn, "writes entries by index")
        outputs[k] = None
    batch = [axis for k, axis in enumerate(updates) if k not in numbers.update_window_dims]
    for n, (part, index) in enumerate(zip(batch, index_axes[:-1], strict=True)):
        if n in numbers.scatter_indices_batching_dims:
            k = batching[numbers.scatter_indices_batching_dims.index(n)]
            outputs[k] = all_one(flow, [axes[k], part, index], eqn)
            continue
        for axis in (part, index):
            flow.freeze(axis, eqn, "writes it to entries by index")
    flow.freeze(index_axes[-1], eqn, "takes it as an index")
    return [tuple(outputs)]
