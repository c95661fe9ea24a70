"""A check before pruning to a budget: layers whose channels meet must share a latent."""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.core.cost import check_input_shape, input_refused
from dhp_jax.core.latent import Axis, latents, walk
from dhp_jax.core.plain import Prunable
from dhp_jax.core.surgery import prune
from dhp_jax.errors import shown


def check_axes(model: nnx.Module, input_shape: tuple[int, ...]) -> None:
    """Raises unless axes that meet in the forward pass are the same latent.

    It prunes the model in several ways and traces the forward passes; nothing is computed. Every
    latent loses channels, and any two lose different numbers of them at least once. It compares
    numbers of channels and not their order. It does not see latents of 1 or 2 channels, nor that
    the outputs of the network become fewer if their latent is prunable.

    Args:
      model: a network of latents; left as it was.
      input_shape: shape of one example, `(height, width, channels)`.

    Raises:
      ValueError: no network; axes of different latents meet, or one and something of fixed width
        (it tells which); or the model does not take such an input.

    Example:
      >>> dhp.check_axes(model, (32, 32, 3))
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"model: expected a network, got {shown(model)}")
    check_input_shape(input_shape)
    sizes = {name: z.size for name, z in latents(model).items()}
    prunable = [name for name, z in latents(model).items() if z.prunable and z.size > 2]
    numbers = {name: number for number, name in enumerate(prunable, start=1)}  # 0: not pruned
    base = min([8, *(sizes[name] - 1 for name in prunable)])
    place = 1
    while place <= len(numbers):
        removed = {name: number // place % base for name, number in numbers.items()}
        error = _forward_error(model, input_shape, sizes, removed)
        if error is not None:
            whole_error = _forward_error(model, input_shape, sizes, {})
            if whole_error is not None:
                raise ValueError(input_refused(input_shape, whole_error))
            alone = {n: _forward_error(model, input_shape, sizes, {n: 1}) for n in numbers}
            clashing = [name for name in numbers if alone[name] is not None]
            if len(clashing) == 1:
                error = alone[clashing[0]]
                fixed = [*_of_fixed_width(model, sizes[clashing[0]])[:3], "a number in its code"]
                what = f"an axis meets something of fixed width, such as {' or '.join(fixed)}"
            else:
                what = "axes that meet are not the same latent"
            names = " or ".join(f"{name!r} ({sizes[name]} channels)" for name in clashing)
            raise ValueError(
                f"model: {what}; pruning {names} alone breaks the forward pass: "
                f"{str(error).splitlines()[0]}"
            )
        place *= base


def _of_fixed_width(model: nnx.Module, width: int) -> list[str]:
    """Names of latents and arrays that have a given width and are not pruned."""
    named = latents(model).items()
    found = [f"latent {name!r}" for name, z in named if z.size == width and not z.prunable]
    for path, _, module in walk(model):
        if not isinstance(module, Axis | Prunable):
            own = {name: v for name, v in vars(module).items() if isinstance(v, nnx.Variable)}
            names = [n for n, v in own.items() if width in getattr(v.get_value(), "shape", ())]
            if names and path:
                found.append(f"{path!r} ({type(module).__name__})")
            else:
                found += [f"{name!r} ({type(own[name]).__name__})" for name in names]
    return found


def _forward_error(model, input_shape, sizes, removed) -> Exception | None:
    """The error of a forward pass after some latents have lost their last entries, if any."""
    keep = {name: np.arange(size) < size - removed.get(name, 0) for name, size in sizes.items()}

    def forward(state: nnx.State, x: Array) -> Array:
        small = prune(nnx.merge(graphdef, state, copy=True), keep)
        small.eval()
        return small(x)

    graphdef, state = nnx.split(model)
    try:
        jax.eval_shape(forward, state, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
    except (TypeError, ValueError) as error:
        return error
    return None
