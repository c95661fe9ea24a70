"""Helpers that turn a layer on latents into a plain layer of the surviving channels."""

from collections.abc import Callable, Mapping
import inspect
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar, runtime_checkable

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax.core.latent import Axis, Latent

Keep = Mapping[Latent, np.ndarray]
Model = TypeVar("Model", bound=nnx.Module)  # what is given back as a network of its own class
Layer = TypeVar("Layer", bound=nnx.Module)
NO_RNGS: Any = SimpleNamespace(params=lambda: None)  # for layers whose initial values are given


@runtime_checkable
class Prunable(Protocol):
    """A layer that pruning replaces; write `plain` to make a layer of your own prunable.

    Example:
      >>> class ScaleOf(Scale):  # docs/extending.md has it: a number for each channel
      ...     def plain(self, keep=None):
      ...         return Scale(self.scale[...][self.z.keep(keep)])
    """

    def plain(self, keep: Keep | None = None) -> nnx.Module:
        """The layer of the channels that `keep` has true for; of all of them if it is `None`."""
        ...


def is_prunable(module: Any) -> bool:
    """Whether pruning replaces a module: its class has a method `plain`, as `Prunable` tells."""
    return callable(getattr(type(module), "plain", None))


def select_entries(variable: nnx.Variable | None, mask: np.ndarray) -> jax.Array | None:
    """The entries of a variable's first axis that a mask keeps; `None` for no variable."""
    return None if variable is None else slice_axes(variable[...], {0: mask})


def slice_axes(array: jax.Array, masks: Mapping[int, np.ndarray]) -> jax.Array:
    """The entries of each axis that its mask keeps."""
    masks = {axis: mask for axis, mask in masks.items() if not mask.all()}
    on_host = bool(masks) and not isinstance(array, jax.core.Tracer)
    left, numpy = (np.asarray(array), np) if on_host else (array, jnp)
    for axis, mask in masks.items():
        left = numpy.take(left, np.flatnonzero(mask), axis)
    return jax.device_put(left, may_alias=False) if on_host else left  # asarray compiles per shape


def make_like(kind: type[Layer], layer: nnx.Module, **given: Any) -> Layer:
    """A layer of a kind with the options that another one keeps as attributes, and those given."""
    taken = inspect.signature(kind.__init__).parameters
    kept = {name: value for name, value in vars(layer).items() if name in taken}
    return kind(**{**kept, **given, "rngs": NO_RNGS})


def initializer_of(array: Any) -> Callable[..., Any]:
    """An initializer that returns a given array."""
    return lambda *args, **kwargs: array


def check_channels(layer: nnx.Module, x: jax.Array, axis: Axis, position: int = -1) -> None:
    """Raises unless an input has as many channels as an axis."""
    if x.ndim == 0 or x.shape[position] != axis.size:
        raise ValueError(
            f"{type(layer).__name__}: x: expected {axis.size} channels on axis {position}, "
            f"got shape {x.shape}"
        )
