"""The equations of operations over axes: contractions, sums, windows, and of loops."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn
import numpy as np

from dhp_jax.tracing.flow import Axes, Flow, rule
from dhp_jax.tracing.programs import DOTS, Context, dot_numbers, shape_of
from dhp_jax.tracing.rules import all_one, elementwise
from dhp_jax.tracing.terms import Axis

TAPS = "slides along it"  # why the taps of a kernel stay


@rule(*DOTS)
def _dot(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    ((left_sum, right_sum), (left_batch, right_batch)), (rows, groups) = dot_numbers(eqn)
    left, right = inputs[:2]
    for axis in (*(left[k] for k in rows), *(right[k] for k in groups), *sum(inputs[2:], ())):
        flow.freeze(axis, eqn, "has groups along it")
    for i, j in zip(left_sum, right_sum, strict=True):
        flow.meet(left[i], right[j], eqn)
    batch = [
        flow.meet(left[i], right[j], eqn) for i, j in zip(left_batch, right_batch, strict=True)
    ]
    left_free = [axis for k, axis in enumerate(left) if k not in (*left_sum, *left_batch)]
    gone = (*right_sum, *right_batch, *groups)
    right_free = [axis for k, axis in enumerate(right) if k not in gone]
    made = [*batch, *left_free, *right_free]
    more = len(shape_of(eqn.outvars[0])) - len(made)  # one sum a group
    return [(*[None] * more, *made)]


@rule("conv_general_dilated")
def _convolution(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    x, kernel = inputs
    (batch, feature, *space), (out, into, *taps), (to_batch, to_feature, *_) = eqn.params[
        "dimension_numbers"
    ]
    for axes, own, why in ((kernel, taps, TAPS), (x, space, "has a window along it")):
        for k in own:
            flow.freeze(axes[k], eqn, why)
    channels, filters, groups = x[feature], kernel[out], eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] != 1:
        for axis in (x[batch], channels, filters, kernel[into]):
            flow.freeze(axis, eqn, "has groups of the batch")
    elif groups == 1:
        flow.meet(channels, kernel[into], eqn)
    else:
        _groups(flow, eqn, channels, filters, kernel[into], groups)
    outputs: list[Axis] = [None] * len(shape_of(eqn.outvars[0]))
    outputs[to_batch], outputs[to_feature] = x[batch], filters
    return [tuple(outputs)]


def _groups(
    flow: Flow, eqn: JaxprEqn, channels: Axis, filters: Axis, within: Axis, groups: int
) -> None:
    """Whole groups go: all channels and filters of one are one unit.

    Where all groups have the same channels or filters, as where each example has a kernel of its
    own, a channel or filter goes with those in its place in the other groups. So it is where groups
    differ in a unit of their own alone, as the members of an ensemble; these go, too.
    """
    ours, theirs = (_in_each(flow, axis, groups) for axis in (channels, filters))
    if ours is not None and theirs is not None:
        why = f"a group of a convolution at {flow.place()}"
        for one, other in zip(ours[0], theirs[0], strict=True):
            flow.terms.equal(one, other, why)
        flow.meet(ours[1], within, eqn)
        return
    if shape_of(eqn.invars[1])[eqn.params["dimension_numbers"][1][1]] > 1:
        rows = [[None] if x is None else list(x.reshape(groups, -1)) for x in (channels, filters)]
        if any(all(_same(flow, own[0], other) for other in own) for own in rows):
            for first, *others in rows:
                for other in others:
                    flow.meet(first, other, eqn)
            ours = rows[0][0]
            if ours is not None and len(ours) > 1:  # what all have in common is of the group
                shared = frozenset.intersection(*map(flow.terms.atoms, ours.tolist()))
                for atom in shared if len(set(flow.terms.roots(ours).tolist())) > 1 else ():
                    flow.terms.freeze(atom, f"a group of a convolution at {flow.place()}")
            flow.meet(ours, within, eqn)
            return
    flow.freeze(within, eqn, "has it within a group")
    if channels is None or filters is None:
        flow.freeze(channels, eqn, "has groups of fixed filters")
        flow.freeze(filters, eqn, "has groups of fixed channels")
        return
    both = zip(channels.reshape(groups, -1), filters.reshape(groups, -1), strict=True)
    for ins, outs in both:
        first, *others = (*ins.tolist(), *outs.tolist())
        for other in others:
            flow.terms.equal(first, other, f"a group of a convolution at {flow.place()}")


def _in_each(flow: Flow, axis: Axis, groups: int) -> tuple[list[int], np.ndarray] | None:
    """The unit that each group of an axis has for itself, and what all groups are beside that.

    `None` if groups are not so.
    """
    if axis is None:
        return None
    terms = flow.terms
    rows = [[terms.atoms(term) for term in row] for row in axis.reshape(groups, -1).tolist()]
    units = [frozenset.intersection(*row) for row in rows]
    if not all(units) or len(frozenset().union(*units)) < sum(map(len, units)):
        return None
    inner = [[atoms - unit for atoms in row] for row, unit in zip(rows, units, strict=True)]
    if any(row != inner[0] for row in inner):
        return None
    return list(map(terms.product, units)), np.array(list(map(terms.product, inner[0])))


@rule("reduce_sum")
def _sum(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    for k in eqn.params["axes"]:
        flow.note(flow.sums, inputs[0][k])
    return [_without(axes, eqn.params["axes"]) for axes in inputs]


@rule("reduce_max", "reduce_min")
def _extreme(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    """What is left is compared with fewer others: as in a softmax, its numbers change."""
    for k in eqn.params["axes"]:
        flow.note(flow.choices, inputs[0][k])
    return [_without(inputs[0], eqn.params["axes"])]


@rule("reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin", "reduce")
def _reduce(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    """What is left would be chosen of fewer."""
    gone = eqn.params.get("axes", eqn.params.get("dimensions", ()))
    for axes in inputs:
        for k in gone:
            if len(axes) > k:
                flow.freeze(axes[k], eqn, "goes over it")
    return [_without(inputs[0], gone) for _ in eqn.outvars]


def _same(flow: Flow, one: Axis, other: Axis) -> bool:
    """Whether the positions of two axes are the same, in order."""
    if one is None or other is None:
        return one is other
    return np.array_equal(flow.terms.roots(one), flow.terms.roots(other))


def _without(axes: Axes, gone: Sequence[Any]) -> Axes:
    return tuple(axis for k, axis in enumerate(axes) if k not in gone)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    flow.freeze(inputs[0][eqn.params["axis"]], eqn, "goes along it")
    return [inputs[0]]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
def _window(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    axes, params, outputs = inputs[0], eqn.params, []
    ones = (1,) * len(axes)
    for k, axis in enumerate(axes):
        still = (
            params["window_dimensions"][k] == params["window_strides"][k] == 1
            and tuple(params["padding"][k]) == (0, 0)
            and (params.get("base_dilation") or ones)[k] == 1
        )
        if not still:
            flow.freeze(axis, eqn, "has a window along it")
        outputs.append(axis if still else None)
    return [tuple(outputs) for _ in eqn.outvars]


@rule("select_and_scatter_add", "select_and_gather_add")
def _window_of_another(
    flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context
) -> list[Axes]:
    """The derivatives of a maximum in windows, whose numbers it takes from one of them."""
    windows = eqn.params["window_dimensions"], eqn.params["window_strides"], eqn.params["padding"]
    outputs: list[Axis] = []
    for k, (size, stride, padding) in enumerate(zip(*windows, strict=True)):
        pair = [axes[k] for axes in inputs]
        if size == stride == 1 and tuple(padding) == (0, 0):
            outputs.append(flow.meet(*pair, eqn))
            continue
        for axis in pair:
            flow.freeze(axis, eqn, "has a window along it")
        outputs.append(None)
    return [tuple(outputs)]


@rule("sort")
def _sort(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    for axes in inputs:
        flow.freeze(axes[eqn.params["dimension"]], eqn, "orders it")
    return elementwise(flow, eqn, inputs, context)


@rule("top_k")
def _largest(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    along, axes = eqn.params["axis"] % len(inputs[0]), inputs[0]
    flow.freeze(axes[along], eqn, "orders it")
    return [(*axes[:along], None, *axes[along + 1 :])] * 2


@rule("fft")
def _fft(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    number = len(eqn.params["fft_lengths"])
    for axis in inputs[0][-number:]:
        flow.freeze(axis, eqn, "transforms it")
    return [(*inputs[0][:-number], *[None] * number)]


@rule("scan")
def _scan(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    fixed, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    stacked = inputs[fixed + carried :]
    for axes in stacked:
        flow.freeze(axes[0], eqn, "goes along it")
    given = [*inputs[: fixed + carried], *(axes[1:] for axes in stacked)]
    outputs = flow.run(eqn.params["jaxpr"].jaxpr, given, context)
    _carry(flow, eqn, given[fixed : fixed + carried], outputs[:carried])
    return [*outputs[:carried], *((None, *axes) for axes in outputs[carried:])]


@rule("while")
def _while(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    tested, used = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = inputs[tested + used :]
    flow.run(eqn.params["cond_jaxpr"].jaxpr, [*inputs[:tested], *carry], (*context, "cond"))
    given = [*inputs[tested : tested + used], *carry]
    outputs = flow.run(eqn.params["body_jaxpr"].jaxpr, given, context)
    _carry(flow, eqn, carry, outputs)
    return outputs


def _carry(flow: Flow, eqn: JaxprEqn, before: list[Axes], after: list[Axes]) -> None:
    """What enters a step of a loop and what leaves it are one."""
    for old, new in zip(before, after, strict=True):
        for one, other in zip(old, new, strict=True):
            flow.meet(one, other, eqn)


@rule("cond")
def _cond(flow: Flow, eqn: JaxprEqn, inputs: list[Axes], context: Context) -> list[Axes]:
    branches = enumerate(eqn.params["branches"])
    each = [flow.run(b.jaxpr, inputs[1:], (*context, number)) for number, b in branches]
    return [
        tuple(all_one(flow, axes, eqn) for axes in zip(*outputs, strict=True))
        for outputs in zip(*each, strict=True)
    ]
