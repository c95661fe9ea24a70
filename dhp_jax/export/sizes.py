"""Inputs that an exported network takes, and which of their sizes are free."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from dhp_jax.errors import ArgumentError, shown
from dhp_jax.tracing.inputs import (
    arguments_of,
    batch_sizes,
    checked_inputs,
    looks_like_a_shape,
)

Arguments = tuple[Any, ...]  # of a forward pass, each an array or a tree of arrays
Shape = tuple[Any, ...]  # texts are sizes that are free


@dataclass(frozen=True)
class Sizes:
    """Shapes of all arrays among the arguments.

    Attributes:
      shapes: of the arrays in the order of `jax.tree.leaves`; texts are sizes that are free.
      multiple: of height and width, where they are free; 0 where they are not.
    """

    shapes: tuple[Shape, ...]
    multiple: int = 0

    @property
    def free(self) -> bool:
        """Whether the batch size is free."""
        return any("batch" in shape for shape in self.shapes)

    def arguments(self, example: Arguments) -> Arguments:
        """Abstract arrays of these sizes, symbolic where they are free."""
        leaves, structure = jax.tree.flatten(example)
        scope = jax_export.SymbolicScope()
        found = [
            jax.ShapeDtypeStruct(
                jax_export.symbolic_shape(", ".join(map(str, shape)), scope=scope), leaf.dtype
            )
            for shape, leaf in zip(self.shapes, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, found)

    def enlarged(self, arguments: Arguments) -> Arguments:
        """Arguments with one more example, and larger images where height and width are free."""
        leaves, structure = jax.tree.flatten(arguments)
        found = [
            extend(np.asarray(x), self.multiple) if "batch" in shape else x
            for shape, x in zip(self.shapes, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, found)

    def take(self, arguments: Arguments) -> bool:
        """Whether the arrays of some arguments have these sizes, and one batch size."""
        pairs = list(zip(self.shapes, jax.tree.leaves(arguments), strict=True))
        batches = {x.shape[0] for shape, x in pairs if "batch" in shape}
        return len(batches) < 2 and all(
            all(isinstance(size, str) or size == n for size, n in zip(shape, x.shape, strict=True))
            for shape, x in pairs
        )


def extend(x: np.ndarray, multiple: int) -> np.ndarray:
    """Extends a batch by one example, and images periodically at the bottom and on the right."""
    more = (1, multiple, 2 * multiple, 0) if multiple else (1, *[0] * (x.ndim - 1))
    return np.pad(x, [(0, size) for size in more], mode="wrap")


def candidates(example: Arguments, of_one: bool, multiple: int) -> Iterator[Sizes]:
    """Sizes that an exported network may have, the freest first.

    Args:
      example: abstract arguments.
      of_one: whether they are of one example, so that there may be images of other sizes.
      multiple: of which height and width of images must be.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(example)]
    if of_one and len(shapes[0]) == 4:
        channels = shapes[0][-1]
        yield Sizes((("batch", "height", "width", channels),), multiple)
        if multiple > 1:
            free = f"{multiple}*height", f"{multiple}*width"
            yield Sizes((("batch", *free, channels),), multiple)
    # An array of another first size is the same for all examples. The trial tells if it is not.
    for size in batch_sizes(shapes):
        yield Sizes(tuple(("batch", *s[1:]) if s[:1] == (size,) else s for s in shapes))
    yield Sizes(tuple(shapes))


def example_of(input_shape: Any) -> tuple[Arguments, bool]:
    """Abstract arguments, and whether the shape of one example was given.

    Raises:
      ValueError: it is neither a shape of one example nor inputs with an array.
    """
    example = checked_inputs(input_shape)
    if looks_like_a_shape(input_shape):
        return example, True
    leaves = jax.tree.leaves(example)
    if not leaves or any(jnp.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in leaves):
        raise ArgumentError("input_shape", "a shape, or arrays of numbers", shown(input_shape))
    return example, False


def inputs_to_try(
    input_shape: Any, example: Arguments, of_one: bool, inputs: Mapping[str, Any] | None
) -> dict[str, Arguments]:
    """Arguments by name, on which what was written is tried.

    Args:
      input_shape: as it was given; arrays are tried as they are.
      example: what `example_of` makes of it.
      of_one: whether it is the shape of one example.
      inputs: batches by name.

    Raises:
      ValueError: batches of other shapes; none, where no random numbers can be drawn.
    """
    if inputs is not None:
        return _checked(inputs, example, of_one)
    given = arguments_of(input_shape)
    drawn = [isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(given)]
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct, x: Any) -> np.ndarray:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return np.asarray(x, leaf.dtype)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            expected = "batches by name to try what is written on, or arrays as input_shape"
            raise ArgumentError("inputs", f"{expected}, for {_told(leaf)} is not random", "none")
        shape = (2, *leaf.shape[1:]) if of_one else leaf.shape
        return np.asarray(rng.normal(size=shape), leaf.dtype)

    return {"random" if any(drawn) else "given": jax.tree.map(draw, example, given)}


def _checked(inputs: Any, example: Arguments, of_one: bool) -> dict[str, Arguments]:
    """Batches by name as arguments.

    Raises:
      ValueError: there are none, or not all are batches of such examples.
    """
    kinds, structure = jax.tree.flatten(example)
    what = f"batches of {kinds[0].shape[1:]} by name"
    if not of_one:
        what = f"inputs like {', '.join(map(_told, kinds))} by name"
    if not isinstance(inputs, Mapping) or not inputs:
        raise ArgumentError("inputs", what, shown(inputs))
    found = {}
    for name, given in inputs.items():
        try:
            arguments = (np.asarray(given),) if of_one else arguments_of(given)
            leaves, places = jax.tree.flatten(arguments)
            alike = places == structure and all(map(_is_alike, leaves, kinds))
        except (TypeError, ValueError, OverflowError):  # no arrays of such numbers
            leaves, alike = [given], False
        if not alike:
            told = ", ".join(map(_told, leaves))
            raise ArgumentError("inputs", what, f"{name!r}: {told}")
        arrays = [np.asarray(x, kind.dtype) for x, kind in zip(leaves, kinds, strict=True)]
        found[name] = jax.tree.unflatten(structure, arrays)
    return found


def _is_alike(x: Any, kind: jax.ShapeDtypeStruct) -> bool:
    """Whether an array has as many axes as another, some numbers, and such as that can hold."""
    if np.ndim(x) != len(kind.shape) or not np.size(x):
        return False
    inexact = [jnp.issubdtype(of, jnp.inexact) for of in (jnp.result_type(x), kind.dtype)]
    return inexact[1] or (not inexact[0] and np.array_equal(np.asarray(x, kind.dtype), x))


def _told(x: Any) -> str:
    try:
        return f"{jnp.result_type(x)}{list(np.shape(x))}"
    except (TypeError, ValueError):  # no numbers
        return shown(x)
