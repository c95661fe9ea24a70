"""Latent vectors: objects that stand for a channel axis.

A network says which axes are one by using one object for them. Two axes that are added share a
`Latent`; axes that are concatenated are `concat(z1, z2)`; channels that a pixel shuffle splits are
`repeat(z, 4)`. Everything else in the library reads the coupling of axes from here.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
import re
from typing import Any
import warnings

from flax import nnx
from flax.nnx import reprlib
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import numpy as np

from dhp_jax.core.initializers import normal
from dhp_jax.core.provenance import architecture_of
from dhp_jax.errors import check_integer, shown

TRACED = "traced_latents"  # attribute of a network that holds latents which were found by tracing


class LatentVector(nnx.Param):
    """The trainable vector behind a `Latent`; its own type, so optimizers can filter by it.

    Example:
      >>> graphdef, vectors, weights, rest = nnx.split(model, dhp.LatentVector, nnx.Param, ...)
    """


class Axis(nnx.Module):
    """A channel axis: a `Latent`, or a `concat` or `repeat` of axes.

    Attributes:
      size: number of channels.

    Example:
      >>> both = dhp.concat(dhp.Latent(8, rngs=rngs), dhp.Latent(24, rngs=rngs))
      >>> isinstance(both, dhp.Axis), both.size
      (True, 32)
    """

    size: int

    def __nnx_repr__(self) -> Iterator[Any]:
        return in_one_line(self, self.size)

    def value(self) -> Float[Array, " size"]:
        """The latent vector of this axis."""
        raise NotImplementedError

    def multiplicity(self) -> dict["Latent", int]:
        """How many channels of this axis each entry of each latent stands for."""
        channels = Counter(latent for latent, _ in self.entries())
        return {latent: count // latent.size for latent, count in channels.items()}

    def entries(self) -> list[tuple["Latent", int]]:
        """The latent and the index in it that each channel stands for."""
        raise NotImplementedError

    def keep(self, masks: Mapping["Latent", np.ndarray] | None) -> np.ndarray:
        """Boolean mask `(size,)` of the channels that survive; `None` keeps all of them."""
        raise NotImplementedError


class Latent(Axis):
    """A latent vector, one entry a channel, drawn from N(0, 1).

    Args:
      size: number of channels.
      prunable: whether pruning may remove entries. A latent that is not prunable is trained all
        the same; use it for image channels and for axes whose width is fixed from outside.
      min_channels: how many entries survive at least (all of them if `size` is smaller).
      rngs: the `params` stream draws the initial values.

    Raises:
      ValueError: `size` or `min_channels` is not a positive integer.

    Example:
      >>> from flax import nnx
      >>> import dhp_jax as dhp
      >>> rngs = nnx.Rngs(0)
      >>> image = dhp.Latent(3, prunable=False, rngs=rngs)
      >>> hidden = dhp.Latent(64, rngs=rngs)
      >>> dhp.HyperConv(image, hidden, (3, 3), rngs=rngs)(jnp.zeros((1, 8, 8, 3))).shape
      (1, 8, 8, 64)

    Reference: DHP (arXiv 2003.13683), section 3.1.
    """

    def __init__(self, size: int, *, prunable: bool = True, min_channels: int = 4, rngs: nnx.Rngs):
        check_integer("size", size)
        check_integer("min_channels", min_channels)
        self.size = int(size)
        self.vector = LatentVector(
            jnp.asarray(normal(rngs.params(), self.size), jnp.float32),
            prunable=bool(prunable),
            min_channels=min(int(min_channels), self.size),
        )

    def __nnx_repr__(self) -> Iterator[Any]:
        return in_one_line(self, self.size, **({} if self.prunable else {"prunable": False}))

    @property
    def prunable(self) -> bool:
        """Whether pruning may remove entries."""
        return self.vector.prunable

    @property
    def min_channels(self) -> int:
        """How many entries survive at least."""
        return self.vector.min_channels

    def value(self) -> Float[Array, " size"]:
        return self.vector[...]

    def entries(self) -> list[tuple["Latent", int]]:
        return [(self, index) for index in range(self.size)]

    def keep(self, masks: Mapping["Latent", np.ndarray] | None) -> np.ndarray:
        return np.ones(self.size, bool) if masks is None else np.asarray(masks[self], bool)


class Concat(Axis):
    """Axes one after another; made by `concat`."""

    def __init__(self, parts: tuple[Axis, ...]):
        self.parts = nnx.List(parts)
        self.size = sum(part.size for part in parts)

    def __nnx_repr__(self) -> Iterator[Any]:
        more = {"more": len(self.parts) - 3} if len(self.parts) > 4 else {}
        return in_one_line(self, *self.parts[: 3 if more else None], **more, size=self.size)

    def value(self) -> Float[Array, " size"]:
        return jnp.concatenate([part.value() for part in self.parts])

    def entries(self) -> list[tuple[Latent, int]]:
        return [entry for part in self.parts for entry in part.entries()]

    def keep(self, masks: Mapping[Latent, np.ndarray] | None) -> np.ndarray:
        return np.concatenate([part.keep(masks) for part in self.parts])


class Repeat(Axis):
    """An axis in which each entry stands for several neighbouring channels; made by `repeat`."""

    def __init__(self, base: Axis, times: int):
        self.base = base
        self.times = times
        self.size = base.size * times

    def __nnx_repr__(self) -> Iterator[Any]:
        return in_one_line(self, self.base, self.times)

    def value(self) -> Float[Array, " size"]:
        return jnp.repeat(self.base.value(), self.times)

    def entries(self) -> list[tuple[Latent, int]]:
        return [entry for entry in self.base.entries() for _ in range(self.times)]

    def keep(self, masks: Mapping[Latent, np.ndarray] | None) -> np.ndarray:
        return np.repeat(self.base.keep(masks), self.times)


def concat(*axes: Axis) -> Axis:
    """The axis of `jnp.concatenate([x1, x2, ...], axis=-1)`.

    A feature map flattened from `(h, w, c)` repeats its channels `h * w` times in a row, and is
    `concat(*[z] * (h * w))`.

    Args:
      *axes: the axes of the concatenated arrays, in order; the same axis may come more than once.

    Returns:
      An axis of the summed size. Pruning an entry of a part prunes it wherever the part stands.

    Raises:
      ValueError: no axis, or something that is not an axis.

    Example:
      >>> z1, z2 = (dhp.Latent(n, rngs=nnx.Rngs(n)) for n in (8, 24))
      >>> dhp.concat(z1, z2).size
      32
    """
    if not axes:
        raise ValueError("concat: expected at least one axis, got none")
    for position, axis in enumerate(axes):
        check_axis(f"concat: argument {position}", axis)
    return Concat(axes)


def repeat(axis: Axis, times: int) -> Axis:
    """The axis of `jnp.repeat(x, times, axis=-1)`: each entry stands for `times` channels in a row.

    This is the input axis of a pixel shuffle by `r` with `times = r * r`.

    Args:
      axis: the axis to repeat.
      times: how many neighbouring channels an entry stands for.

    Returns:
      An axis of size `times * axis.size`.

    Raises:
      ValueError: `axis` is no axis, or `times` is not a positive integer.

    Example:
      >>> dhp.repeat(dhp.Latent(16, rngs=nnx.Rngs(0)), 4).size
      64
    """
    check_axis("repeat: argument axis", axis)
    check_integer("times", times)
    return Repeat(axis, int(times))


def latents(model: nnx.Module) -> dict[str, Latent]:
    """Every latent of a model, by name.

    A latent's name is the shortest attribute path that leads to it (`"blocks.3.hidden"`), the first
    in natural order among equally short ones. Latents that were found by tracing have the name of a
    layer whose outputs they are.

    Args:
      model: any `nnx.Module`.

    Returns:
      The latents, in the order of a breadth-first walk; empty for a pruned model.

    Example:
      >>> {name: z.size for name, z in dhp.latents(model).items() if z.prunable}
    """
    found = ((path.removeprefix(f"{TRACED}."), m) for path, _, m in walk(model))
    return {name: m for name, m in found if isinstance(m, Latent)}


def check_module(model: object) -> None:
    """Raises unless a value is a network of `flax.nnx`."""
    if not isinstance(model, nnx.Module):
        raise ValueError(f"model: expected an nnx.Module, got {shown(model)}")


def latents_to_prune(model: nnx.Module) -> dict[str, Latent]:
    """The latents of a network, of which there must be some."""
    found = latents(model)
    if not found:
        raise ValueError(
            f"model: expected a network with latents, got a {type(model).__name__} that has none; "
            "dhp.with_latents makes one of it"
        )
    return found


def has_gates(model: nnx.Module) -> bool:
    """Whether the latents of a network are gates, see `dhp_jax.pruned.gates`."""
    declared = any(z.vector.get_metadata().get("gate") for z in latents(model).values())
    return declared or "gates" in getattr(architecture_of(model).axes, "notes", ())


def walk(model: nnx.Module) -> Iterator[tuple[str, nnx.Module | None, nnx.Module]]:
    """Yields `(path, parent, module)` for the model and every module in it, breadth first.

    A module that several parents share is yielded once, under its shortest path.
    """
    check_module(model)
    seen = {id(model)}
    level: list[tuple[str, nnx.Module | None, nnx.Module]] = [("", None, model)]
    while level:
        yield from level
        below = []
        for path, _, module in level:
            for name, child in children(module):
                if id(child) not in seen:
                    seen.add(id(child))
                    below.append((f"{path}.{name}" if path else name, module, child))
        level = below


def modules_by_path(model: nnx.Module) -> dict[str, nnx.Module]:
    """The modules of a model by their paths, in the order of `walk`."""
    return {path: module for path, _, module in walk(model)}


def children(module: nnx.Module) -> list[tuple[str, nnx.Module]]:
    """The modules right below a module, in natural order of their paths (`2` before `10`)."""
    found = modules_in(vars(module))
    return sorted(found, key=lambda item: [_natural(part) for part in re.split(r"(\d+)", item[0])])


def modules_in(value: Any, path: str = "") -> Iterator[tuple[str, nnx.Module]]:
    """Yields `(path, module)` for a module, or for those in lists, tuples and dicts of modules."""
    if isinstance(value, nnx.Pytree):  # modules, and blocks that are no modules
        yield path, value
    elif isinstance(value, list | tuple | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from modules_in(item, f"{path}.{key}" if path else str(key))


def in_one_line(module: nnx.Module, *arguments: Any, **options: Any) -> Iterator[Any]:
    """Yields what makes the `repr` of a module one line: for methods `__nnx_repr__`."""
    yield reprlib.Object(type(module), same_line=True, kv_sep="")
    yield from (reprlib.Attr("", value) for value in arguments)
    yield from (reprlib.Attr(f"{name}=", value) for name, value in options.items())


def check_axis(argument: str, axis: Axis) -> None:
    """Raises a `ValueError` that names `argument` unless `axis` is an axis."""
    if not isinstance(axis, Axis):
        raise ValueError(
            f"{argument}: expected a Latent, or a concat or repeat of latents, got {shown(axis)}"
        )


def _natural(part: str) -> tuple[int, int | str]:
    return (0, int(part)) if part.isdigit() else (1, part)


def prunable_latents(params: Any) -> Any:
    """A mask for `optax.masked`: true for latent vectors that may be pruned.

    Give `optax.masked` the mask and not this function: `nnx.Optimizer` shows transformations bare
    arrays, which do not tell what they are.

    Args:
      params: a state of `nnx.Variable`s, or a tree of such states.

    Returns:
      A tree of booleans, one a variable.

    Raises:
      ValueError: a tree of arrays without variables, or a model.

    Example:
      >>> mask = dhp.prunable_latents(nnx.state(model, nnx.Param))
      >>> shrink = optax.masked(dhp.prox_l1(strength=1e-4, learning_rate=0.1), mask)
      >>> tx = optax.chain(optax.sgd(0.1, momentum=0.9), shrink)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, nnx.Variable))
    bare = leaves and not any(isinstance(leaf, nnx.Variable) for leaf in leaves)
    is_model = isinstance(params, nnx.Module)
    if bare or is_model:
        found = type(params).__name__ if is_model else f"tree of {type(leaves[0]).__name__}"
        raise ValueError(
            "prunable_latents: expected a state of nnx.Variables, such as "
            f"nnx.state(model, nnx.Param); got a {found}"
        )
    if leaves and not any(isinstance(leaf, LatentVector) for leaf in leaves):
        warnings.warn(
            "prunable_latents: the state has no latents, so nothing shrinks; "
            "dhp.with_latents(model, shape) makes a network of latents",
            stacklevel=2,
        )
    return map_variables(lambda v: isinstance(v, LatentVector) and v.prunable, params)


def map_variables(function: Callable[[nnx.Variable], Any], params: PyTree) -> PyTree:
    """Maps a function over the `nnx.Variable`s of a tree."""
    return jax.tree.map(function, params, is_leaf=lambda node: isinstance(node, nnx.Variable))
