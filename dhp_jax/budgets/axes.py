"""A check before pruning to a budget: layers whose channels meet must share a latent."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.core.latent import Axis, latents, walk
from dhp_jax.core.plain import is_prunable
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.surgery import prune
from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.declared import analysis_of, prove_declared
from dhp_jax.tracing.inputs import (
    check_input_shape,
    check_no_batch,
    input_refused,
    looks_like_a_shape,
)
from dhp_jax.tracing.programs import Call, default_call, failure


def check_axes(model: nnx.Module, input_shape: Any, *, call: Call | None = None) -> None:
    """Raises unless the latents of a network say which axes are one.

    It prunes the network in several ways and traces it, in evaluation and in training mode: what is
    left must be, operation for operation, the whole network without what is gone. Nothing is
    computed. Layers whose numbers change by their nature, as a LayerNorm over channels that go, are
    allowed.

    Args:
      model: a network of latents; left as it was.
      input_shape: shape of one example, `(height, width, channels)`, or other inputs, as
        `dhp.measure_cost` takes.
      call: a function of the model and the inputs, where that is not `model(*inputs)`.

    Raises:
      ValueError: no network; axes of different latents meet, or one and something of fixed width
        (it tells which); positions that go together are declared not to, with the place in the
        code; or the model does not take such an input.

    Example:
      >>> dhp.check_axes(model, (32, 32, 3))
    """
    proved_axes(model, input_shape, call)


def proved_axes(model: nnx.Module, input_shape: Any, call: Call | None = None) -> Analysis | None:
    """As `check_axes`; returns what `prove_declared` takes to prove other survivors.

    It is `None` for networks without prunable latents and for those of traced latents, of which
    each pruning is proved by itself.
    """
    named, call, refused = latents(model), call or default_call, None
    if architecture_of(model).axes is not None:
        return None
    if of_shape := call is default_call and looks_like_a_shape(input_shape):
        check_input_shape(input_shape)
        check_no_batch(model, input_shape)
    if not any(z.prunable for z in named.values()):
        return None
    try:
        analysis = analysis_of(model, input_shape, call)
        for masks in _survivors_to_prove(model):
            prove_declared(model, masks, analysis)
    except (TypeError, ValueError) as error:
        refused = error
    else:
        return analysis
    if of_shape:
        _check_widths(model, input_shape)  # it names the latents, if numbers of channels tell
    raise refused


def _survivors_to_prove(model: nnx.Module) -> list[dict[str, np.ndarray]]:
    """Random survivors, so many that any two latents of one size have differed."""
    rng, found = np.random.default_rng(0), []
    pruned = [name for name, z in latents(model).items() if z.prunable and z.size > 2]
    while True:
        masks = {name: np.ones(z.size, bool) for name, z in latents(model).items()}
        for name in pruned:
            size = masks[name].size
            gone = rng.integers(1, max(1, min(size - 2, round(0.6 * size))) + 1)
            masks[name][rng.choice(size, gone, replace=False)] = False
        found.append(masks)
        different = {tuple(each[name].tobytes() for each in found) for name in pruned}
        if len(different) == len(pruned):
            return found


def _check_widths(model: nnx.Module, input_shape: tuple[int, ...]) -> None:
    """Raises unless numbers of channels fit where axes meet, whatever is pruned.

    Every latent loses channels, and any two lose different numbers of them at least once. Its
    errors name the latents; of the order of channels it sees nothing.
    """
    sizes = {name: z.size for name, z in latents(model).items()}
    prunable = [name for name, z in latents(model).items() if z.prunable and z.size > 2]
    numbers = {name: number for number, name in enumerate(prunable, start=1)}  # 0: not pruned
    base = min([8, *(sizes[name] - 1 for name in prunable)])
    dtype = _input_dtype(model, input_shape, sizes)
    place = 1
    while place <= len(numbers):
        removed = {name: number // place % base for name, number in numbers.items()}
        error = _forward_error(model, input_shape, sizes, removed, dtype)
        if error is not None:
            whole_error = _forward_error(model, input_shape, sizes, {}, dtype)
            if whole_error is not None:
                raise ValueError(input_refused(input_shape, whole_error))
            alone = {n: _forward_error(model, input_shape, sizes, {n: 1}, dtype) for n in numbers}
            clashing = [name for name in numbers if alone[name] is not None]
            if len(clashing) == 1:
                error = alone[clashing[0]]
                fixed = [*_of_fixed_width(model, sizes[clashing[0]])[:3], "a number in its code"]
                what = f"an axis meets something of fixed width, such as {' or '.join(fixed)}"
            else:
                what = "axes that meet are not the same latent"
            names = " or ".join(f"{name!r} ({sizes[name]} channels)" for name in clashing)
            raise ValueError(
                f"model: {what}; pruning {names} alone breaks the forward pass: {failure(error)}"
            )
        place *= base


def _of_fixed_width(model: nnx.Module, width: int) -> list[str]:
    """Names of latents and arrays that have a given width and are not pruned."""
    named = latents(model).items()
    found = [f"latent {name!r}" for name, z in named if z.size == width and not z.prunable]
    for path, _, module in walk(model):
        if not (isinstance(module, Axis) or is_prunable(module)):
            own = {name: v for name, v in vars(module).items() if isinstance(v, nnx.Variable)}
            names = [n for n, v in own.items() if width in getattr(v.get_value(), "shape", ())]
            if names and path:
                found.append(f"{path!r} ({type(module).__name__})")
            else:
                found += [f"{name!r} ({type(own[name]).__name__})" for name in names]
    return found


def _input_dtype(model, input_shape, sizes):
    """Integers where a network takes them and no floats, as one of tokens."""
    takes = {
        dtype: _forward_error(model, input_shape, sizes, {}, dtype) is None
        for dtype in (jnp.float32, jnp.int32)
    }
    return jnp.int32 if takes[jnp.int32] and not takes[jnp.float32] else jnp.float32


def _forward_error(model, input_shape, sizes, removed, dtype) -> Exception | None:
    """The error of a forward pass after some latents have lost their last entries, if any."""
    keep = {name: np.arange(size) < size - removed.get(name, 0) for name, size in sizes.items()}

    def forward(state: nnx.State, x: Array) -> Array:
        small = prune(nnx.merge(graphdef, state, copy=True), keep)
        small.eval()
        return small(x)

    graphdef, state = nnx.split(model)
    try:
        jax.eval_shape(forward, state, jax.ShapeDtypeStruct((1, *input_shape), dtype))
    except (TypeError, ValueError) as error:
        return error
    return None
