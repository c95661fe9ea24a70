"""The proof of axes that were declared by hand: what pruning does to every array must be right."""

from collections.abc import Mapping
import contextlib
from typing import Any

from flax import nnx
import jax
import numpy as np

from dhp_jax.core.latent import Axis, LatentVector, walk
from dhp_jax.core.layers import Hyper
from dhp_jax.core.plain import Model
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.state import is_key, path_name, value_of, with_value
from dhp_jax.core.surgery import check_masks
from dhp_jax.core.surgery import prune as cut
from dhp_jax.tracing.analysis import Analysis, analyse
from dhp_jax.tracing.gone import gone_atoms
from dhp_jax.tracing.inputs import (
    check_input_shape,
    known_inputs,
    looks_like_a_shape,
    remember_inputs,
)
from dhp_jax.tracing.programs import Call, default_call
from dhp_jax.tracing.proof import Mismatch

EXACT = 2**24  # integers below this are float32 numbers
Masks = Mapping[str, np.ndarray]


def analysis_of(model: nnx.Module, inputs: Any, call: Call = default_call) -> Analysis:
    """The solved equations of the ordinary network that a network of latents is."""
    found = analyse(nnx.eval_shape(cut, model), inputs, call)
    remember_inputs(model, inputs, call)
    return found


def prune(
    model: Model,
    keep: Masks | None = None,
    input_shape: Any = None,
    *,
    call: Call | None = None,
) -> Model:
    """Makes the smaller network: every layer on latents becomes its plain counterpart.

    Each hypernetwork runs once; its kernel is sliced to the survivors, as are biases, scales,
    statistics and the rows of linear layers. No latent, no hypernetwork and no mask is left.
    Variables keep their types and metadata; a generated kernel has those of `b2`, its shape.

    It is proved, without computing anything, that the smaller network is the whole one without
    what is gone, in evaluation and in training mode. For that the network is traced. Families and
    networks of traced latents know their inputs. Those of other networks are known once
    `measure_cost`, `check_axes`, `prune_to` or this function was told them without `call=`.

    Args:
      model: a network of latents; left as it was.
      keep: a boolean mask for every latent by name, as `survivors` returns; `None` keeps
        everything and makes the ordinary, unpruned network.
      input_shape: shape of one example, `(height, width, channels)`, or other inputs, as
        `dhp.measure_cost` takes; `None` for those that are known.
      call: a function of the model and the inputs, where that is not `model(*inputs)`.

    Returns:
      A model of the same class, of ordinary `flax.nnx` layers. What was not cut is shared with
      `model`: copy it before donating its buffers, if you still need `model`.

    Raises:
      ValueError: a mask that is missing, unknown, of another length, or keeps nothing; masks for a
        network without latents; no `input_shape` where inputs are not known and something is gone;
        survivors for which the smaller network is not proved to be right, with the place in the
        code.

    Example:
      >>> small = dhp.prune(model, dhp.survivors(model, threshold=5e-3), (32, 32, 3))
    """
    if keep and architecture_of(model).axes is None:
        check_masks(model, keep)
        if input_shape is not None or not all(np.all(mask) for mask in keep.values()):
            prove_declared(model, keep, _analysis(model, input_shape, call))
    return cut(model, keep)


def _analysis(model: nnx.Module, inputs: Any, call: Call | None) -> Analysis:
    """The solved equations for given inputs, or for known ones."""
    call = call or default_call
    if inputs is not None:
        if looks_like_a_shape(inputs):
            check_input_shape(inputs)
        return analysis_of(model, inputs, call)
    known = known_inputs(model)
    with contextlib.suppress(ValueError):  # they were those of another network of its class
        if known is not None:
            return analysis_of(model, known, call)
    raise ValueError(
        "input_shape: expected the shape of one example, such as "
        "dhp.prune(model, keep, (32, 32, 3)), to prove that the pruned network is right; got "
        "None, and measure_cost and check_axes were told none that this network takes"
    )


def prove_declared(model: nnx.Module, masks: Masks, analysis: Analysis) -> None:
    """Raises unless a network of declared latents may be pruned to some survivors.

    Args:
      model: the network of latents.
      masks: a boolean mask for every latent by name.
      analysis: from `analysis_of`.

    Raises:
      ValueError: it may not; it tells why, and where.
    """
    masks = {name: _at_least_two(np.asarray(mask, bool)) for name, mask in masks.items()}
    try:
        kept = kept_arrays(model, masks)
        pruned = nnx.eval_shape(lambda whole: cut(whole, masks), model)
        analysis.prove(gone_atoms(analysis, kept), pruned)
    except Mismatch as error:
        raise ValueError(f"model: its latents do not say which axes are one: {error}") from None


def kept_arrays(model: nnx.Module, masks: Masks) -> dict[str, list[np.ndarray]]:
    """What pruning keeps of each axis of every array of the ordinary network, by its path.

    Every array is given the numbers of its positions, and those that are left are read.

    Raises:
      Mismatch: a layer does not keep whole positions of axes.
    """
    whole = _arrays(nnx.eval_shape(cut, model))
    shapes = {name: tuple(x.shape) for name, x in whole.items()}
    largest = max(map(np.prod, shapes.values()), default=1)
    with jax.ensure_compile_time_eval():  # also where the network is pruned within `jit`
        low = _arrays(cut(_numbered(model, 0), masks))
        high = _arrays(cut(_numbered(model, 1), masks)) if largest > EXACT else {}
    kept = {}
    for name, shape in shapes.items():
        if is_key(low[name]):
            kept[name] = [np.ones(size, bool) for size in shape]
            continue
        numbers = np.asarray(low[name]).astype(np.int64)
        if high:
            numbers = numbers + EXACT * np.asarray(high[name]).astype(np.int64)
        kept[name] = _axes_of(name, numbers, shape)
    return kept


def kept_of_layer(layer: nnx.Module, keep: Mapping[Any, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """What `layer.plain(keep)` keeps of each axis of every array that the layer has, by its name.

    Raises:
      ValueError: the plain layer has other arrays, or they are no parts of the layer's.
    """
    own = {name: v for name, v in vars(layer).items() if isinstance(v, nnx.Variable)}
    values = {name: variable.get_value() for name, variable in own.items()}
    with jax.ensure_compile_time_eval():
        for name, variable in own.items():
            variable.set_value(_positions(values[name].shape, 0))
        try:
            made = layer.plain(keep)
            theirs = {name for name, v in vars(made).items() if isinstance(v, nnx.Variable)}
            if theirs != own.keys():
                raise ValueError(
                    f"model: {type(layer).__name__} is a layer that cannot be cut down"
                )
            found = {name: np.asarray(getattr(made, name).get_value()) for name in own}
        finally:
            for name, variable in own.items():
                variable.set_value(values[name])
    try:
        return {
            name: _axes_of(name, numbers.astype(np.int64), values[name].shape)
            for name, numbers in found.items()
        }
    except Mismatch as error:
        raise ValueError(f"model: {type(layer).__name__}: {error}") from None


def _axes_of(name: str, numbers: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """The positions of each axis, by the numbers of what is left of an array."""
    masks = []
    if numbers.ndim != len(shape) or numbers.size == 0:
        raise Mismatch(f"{name!r}: expected what is left of shape {shape}, got {numbers.shape}")
    places = np.unravel_index(np.clip(numbers, 0, int(np.prod(shape)) - 1), shape)
    for k, size in enumerate(shape):
        line = np.moveaxis(places[k], k, 0).reshape(numbers.shape[k], -1)
        if not (line == line[:, :1]).all() or not (np.diff(line[:, 0]) > 0).all():
            raise Mismatch(f"{name!r}: what pruning leaves of axis {k} is no part of it, in order")
        mask = np.zeros(size, bool)
        mask[line[:, 0]] = True
        masks.append(mask)
    return masks


def _numbered(model: nnx.Module, part: int) -> nnx.Module:
    """A copy whose arrays hold the numbers of their positions, or how often `EXACT` fits in."""
    graphdef, state = nnx.split(model)
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        value = value_of(leaf)
        if is_key(value):
            made = jax.random.split(jax.random.key(0), value.shape)
        elif isinstance(leaf, LatentVector):  # a gate, where kernels are not generated
            made = np.ones(value.shape, np.float32)
        else:
            made = _positions(value.shape, part)
        filled.append((path, with_value(leaf, made)))
    copy = nnx.merge(graphdef, nnx.from_flat_state(filled), copy=True)
    for _, _, layer in walk(copy):
        if isinstance(layer, Hyper):
            shape = (*layer.kernel_size, layer.kernel_axis().size, layer.z_out.size)
            layer.kernel = nnx.static(_Given(_positions(shape, part)))
        if not isinstance(layer, Axis) and hasattr(layer, "param_dtype"):
            layer.param_dtype = np.dtype("float32")
    return copy


def _positions(shape: tuple[int, ...], part: int) -> np.ndarray:
    """The number of each position of an array, or how often `EXACT` fits in it."""
    flat = np.arange(int(np.prod(shape)), dtype=np.int64)
    flat = flat // EXACT if part else flat % EXACT
    return flat.astype(np.float32).reshape(shape)


class _Given:
    """A function that returns an array."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __call__(self) -> np.ndarray:
        return self.array


def _arrays(model: nnx.Module) -> dict[str, Any]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {path_name(path): value_of(leaf) for path, leaf in flat}


def _at_least_two(mask: np.ndarray) -> np.ndarray:
    """A mask that keeps two entries: an axis of one is broadcast, and another program."""
    if mask.sum() == 1 and len(mask) > 2:
        mask = mask.copy()
        mask[np.flatnonzero(~mask)[0]] = True
    return mask
