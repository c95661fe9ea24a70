"""The arrays of a network: by which names, and in what, its state holds them."""

from collections.abc import Iterable
from typing import Any

from flax import nnx
import jax


def path_name(path: Iterable[Any]) -> str:
    """The path of an array or a module as one name, such as "blocks.3.conv.kernel"."""
    return ".".join(map(str, path))


def variables_of(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The variables of a network by the path that their arrays have in its state."""
    return {path_name(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def value_of(leaf: nnx.Variable | jax.Array) -> jax.Array:
    """The array of a leaf of a state, which may be bare, as the state holds it."""
    value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
    return value[...] if nnx.variablelib.is_array_ref(value) else value


def with_value(leaf: nnx.Variable | jax.Array, value: Any) -> Any:
    """The same leaf with another array."""
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def with_metadata_of(like: nnx.Variable | None, made: nnx.Variable) -> nnx.Variable:
    """A variable with the type and metadata of the one that it is made of.

    It stays as it is where it has its own, or where reading the other one changes its numbers.
    """
    stays = not isinstance(like, type(made)) or made.get_metadata(exclude_required=True)
    stays = stays or like.get_value() is not like.get_raw_value()
    return made if stays else like.replace(made.get_raw_value())


def is_key(array: Any) -> bool:
    """Whether an array is of random keys."""
    return hasattr(array, "dtype") and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def numbers_of(array: Any) -> Any:
    """The array, or the numbers of random keys."""
    return jax.random.key_data(array) if is_key(array) else array
