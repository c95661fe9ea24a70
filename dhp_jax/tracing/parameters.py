"""Parameters of operations: which of them tell sizes, and what they must be after pruning."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
import numpy as np

from dhp_jax.tracing.programs import CALLS
from dhp_jax.tracing.rules import pad_places, slices_of

Kept = Sequence[np.ndarray] | None  # what is left of each axis; None for a number
Check = Callable[[JaxprEqn, JaxprEqn, Sequence[Kept], Sequence[Kept]], None]

# Programs of calls, loops and branches are compared by themselves; the rest computes nothing.
_IGNORED = """
    jaxpr call_jaxpr fun_jaxpr call update_jaxpr branches cond_jaxpr body_jaxpr sharding
    out_sharding in_shardings out_shardings in_layouts out_layouts ctx_mesh resource_env
    donated_invars name debug_info jvp_jaxpr_fun jvp_jaxpr_thunk fwd_jaxpr_thunk bwd out_trees
    inline keep_unused compiler_options_kvs policy prevent_cse symbolic_zeros rule
"""
IGNORED = frozenset(_IGNORED.split())
WALKED = CALLS | {"scan", "while", "cond"}  # whose programs are compared
_SIZES = {  # that the shapes of inputs and outputs tell
    "broadcast_in_dim": {"shape"},
    "reshape": {"new_sizes"},
    "iota": {"shape"},
    "random_bits": {"shape"},
    "split": {"sizes"},
    "tile": {"reps"},
    "slice": {"start_indices", "limit_indices", "strides"},
    "pad": {"padding_config"},
    "gather": {"slice_sizes"},
    "dynamic_slice": {"slice_sizes"},
    "conv_general_dilated": {"feature_group_count"},
}


class ParameterMismatch(Exception):
    """A parameter that fewer positions do not explain."""


def check_parameters(
    whole: JaxprEqn,
    pruned: JaxprEqn,
    inputs: Callable[[], Sequence[Kept]],
    outputs: Callable[[], Sequence[Kept]],
) -> None:
    """Raises unless the parameters of an operation are those of the restricted one.

    Args:
      whole, pruned: the operation in both programs.
      inputs, outputs: tell what is left of each axis of what it reads and writes.

    Raises:
      ParameterMismatch: one is not.
    """
    name = whole.primitive.name
    if name in _CHECKS:
        _CHECKS[name](whole, pruned, inputs(), outputs())
    for key in sorted(whole.params.keys() | pruned.params.keys()):
        before, after = whole.params.get(key), pruned.params.get(key)
        ignored = key in IGNORED and (name in WALKED or not _is_program(before))
        if ignored or key in _SIZES.get(name, ()):
            continue
        if not _equal(before, after):
            raise ParameterMismatch(f"{key} of {name} is {before} and, after pruning, {after}")


def _check_slice(whole, pruned, inputs, outputs) -> None:
    for k, kept in enumerate(inputs[0]):
        places = np.cumsum(kept) - 1
        taken = np.arange(len(kept))[slices_of(whole)[k]]
        expected = places[taken[kept[taken]]]
        if not np.array_equal(expected, np.arange(int(kept.sum()))[slices_of(pruned)[k]]):
            raise ParameterMismatch(f"a slice takes other positions of axis {k} after pruning")


def _check_split(whole, pruned, inputs, outputs) -> None:
    along, start = whole.params["axis"], 0
    kept = inputs[0][along]
    for size, theirs in zip(whole.params["sizes"], pruned.params["sizes"], strict=True):
        if int(kept[start : start + size].sum()) != theirs:
            raise ParameterMismatch(f"a part of axis {along} has another size after pruning")
        start += size


def _check_pad(whole, pruned, inputs, outputs) -> None:
    configs = zip(whole.params["padding_config"], pruned.params["padding_config"], strict=True)
    for k, (before, after) in enumerate(configs):
        kept = inputs[0][k]
        places = pad_places(len(kept), before)[outputs[0][k]]
        places = np.where(places < 0, -1, (np.cumsum(kept) - 1)[places])
        if not np.array_equal(places, pad_places(int(kept.sum()), after)):
            padding = tuple(map(int, before))
            raise ParameterMismatch(f"axis {k} is padded by {padding} whatever its width")


def _check_slice_sizes(whole, pruned, inputs, outputs) -> None:
    sizes = zip(whole.params["slice_sizes"], pruned.params["slice_sizes"], inputs[0], strict=True)
    for size, theirs, kept in sizes:
        if theirs != (int(kept.sum()) if size == len(kept) else size):
            raise ParameterMismatch("other parts are taken after pruning")


def _check_convolution(whole, pruned, inputs, outputs) -> None:
    groups, got = whole.params["feature_group_count"], pruned.params["feature_group_count"]
    feature = whole.params["dimension_numbers"][0][1]
    left = int(inputs[0][feature].reshape(groups, -1).any(1).sum()) if groups > 1 else 1
    if got != left:
        raise ParameterMismatch(f"expected {left} groups of a convolution, got {got}")


_CHECKS: dict[str, Check] = {
    "slice": _check_slice,
    "split": _check_split,
    "pad": _check_pad,
    "gather": _check_slice_sizes,
    "dynamic_slice": _check_slice_sizes,
    "conv_general_dilated": _check_convolution,
}


def _is_program(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, float) and isinstance(right, float) and left != left:
        return right != right  # a fill of NaN
    if isinstance(left, ClosedJaxpr) and isinstance(right, ClosedJaxpr):
        return _equal(left.jaxpr, right.jaxpr) and _equal(left.consts, right.consts)
    if _is_program(left) and _is_program(right):
        return str(left) == str(right)
    if isinstance(left, np.ndarray | jax.Array) and isinstance(right, np.ndarray | jax.Array):
        return np.array_equal(left, right)
    try:
        return bool(left == right)
    except (TypeError, ValueError):  # parameters that are compared as texts alone
        return str(left) == str(right)
