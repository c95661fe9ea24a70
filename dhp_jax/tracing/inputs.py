"""Inputs of networks: what is taken for them, refused, and remembered."""

from collections import Counter
from collections.abc import Iterable
import contextlib
from numbers import Number
import traceback
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax.core.latent import walk
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.state import value_of
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.tracing.programs import Call, default_call, failure

_KNOWN: dict[Any, tuple[Any, ...]] = {}  # inputs by the structure of networks, latest last
_MOST_KNOWN = 32


def abstract_inputs(inputs: Any) -> tuple[Any, ...]:
    """The arguments of a forward pass as trees of abstract arrays.

    Args:
      inputs: the shape of one example; an array or abstract array with its batch axis; a tuple or
        list of arguments, each of these; or a dict of them, as one argument.

    Raises:
      ValueError: it is none of these.
    """
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), arguments_of(inputs)
    )


def arguments_of(inputs: Any) -> tuple[Any, ...]:
    """The same, with the arrays that were given in place of abstract ones."""
    listed = inputs if isinstance(inputs, tuple | list) else (inputs,)
    as_numbers = all(value is None or isinstance(value, Number) for value in listed)
    if not _is_shape(inputs) and as_numbers and set(listed) != {None}:
        raise ValueError(
            "inputs: expected the shape of one example, such as (height, width, channels), or "
            f"arrays; got {shown(inputs)}"
        )
    if isinstance(inputs, tuple | list) and not _is_shape(inputs) and len(inputs):
        return tuple(map(_argument, inputs))
    return (_argument(inputs),)


def batch_sizes(shapes: Iterable[tuple[int, ...]]) -> list[int]:
    """First sizes of shapes, each once: those that may be the batch size, the likeliest first.

    That is the one of the first array, and then that of most others.
    """
    first = [shape[0] for shape in shapes if shape]
    return sorted(Counter(first), key=lambda n: (n != first[0], -first.count(n)))


def batch_of(inputs: Any, batch: int, size: int) -> tuple[Any, ...]:
    """The arguments of a forward pass with so many examples.

    Args:
      inputs: as `abstract_inputs` takes. Arrays whose first axis is the batch are repeated along
        it; in place of shapes and abstract arrays come 0.5 and zeros of integers.
      batch: how many examples.
      size: of the axes that are the batch, as of `batch_sizes`.

    Raises:
      ValueError: it is none of these, or has random keys.
    """
    kinds, structure = jax.tree.flatten(abstract_inputs(inputs))

    def made(kind: jax.ShapeDtypeStruct, x: Any) -> jax.Array:
        if jnp.issubdtype(kind.dtype, jax.dtypes.extended):
            raise ArgumentError("batch", "None for inputs of random keys", shown(batch))
        shape = (batch, *kind.shape[1:]) if kind.shape[:1] == (size,) else kind.shape
        if isinstance(x, jax.ShapeDtypeStruct):
            floats = jnp.issubdtype(kind.dtype, jnp.inexact)
            return jnp.full(shape, 0.5 if floats else 0, kind.dtype)
        return jnp.asarray(np.resize(np.asarray(x, kind.dtype), shape))

    given = jax.tree.leaves(arguments_of(inputs))
    return jax.tree.unflatten(structure, map(made, kinds, given))


def _is_shape(value: Any) -> bool:
    integers = isinstance(value, tuple | list) and all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) for n in value
    )
    return integers and len(value) > 0


def _argument(value: Any) -> Any:
    if _is_shape(value):
        if min(value) < 1:
            raise ValueError(f"inputs: expected positive sizes of one example, got {tuple(value)}")
        return jax.ShapeDtypeStruct((1, *map(int, value)), jnp.float32)
    if isinstance(value, dict):
        return {key: _argument(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_argument, value))
    if value is None:
        return None
    if not isinstance(value, tuple):  # fields with names would not come back from a file
        with contextlib.suppress(TypeError):
            jnp.shape(value), jnp.result_type(value)  # of an array, abstract or not, or a number
            return value
    raise ValueError(
        "inputs: expected the shape of one example, an array, or a tuple, list or dict of them, of "
        f"which call= may make others; got a {type(value).__name__}"
    )


def looks_like_a_shape(value: Any) -> bool:
    """Whether a value is meant as the shape of one example."""
    if isinstance(value, dict) or hasattr(value, "dtype"):
        return False
    nested = isinstance(value, tuple | list) and any(
        isinstance(v, tuple | list | dict) or hasattr(v, "dtype") for v in value
    )
    return not nested


def check_no_batch(model: nnx.Module, inputs: Any, argument: str = "input_shape") -> None:
    """Raises if a shape of one example has more axes than every convolution of a network takes.

    Such a shape has the batch axis too, as `x.shape` has. Flax would take the axis before it for
    the batch, and compute something else.
    """
    sizes = [getattr(module, "kernel_size", ()) for _, _, module in walk(model)]
    most = max((len(size) for size in sizes if isinstance(size, tuple)), default=0)
    if most and _is_shape(inputs) and len(inputs) > most + 1:
        raise ValueError(
            f"{argument}: expected the shape of one example, without the batch axis, for "
            f"convolutions of {most} axes; got {tuple(inputs)}; an array, or jax.ShapeDtypeStruct, "
            "with its batch axis may have more"
        )


def check_input_shape(input_shape: tuple[int, ...]) -> None:
    """Raises unless a value can be the shape of one example."""
    listed = isinstance(input_shape, tuple | list) and len(input_shape) > 0
    if not listed or not all(isinstance(n, int | np.integer) and n >= 1 for n in input_shape):
        raise ValueError(
            "input_shape: expected positive integers, such as (height, width, channels); got "
            f"{shown(input_shape)}"
        )


def checked_inputs(input_shape: Any) -> tuple[Any, ...]:
    """As `abstract_inputs`, with errors that name `input_shape` where a shape is meant."""
    if looks_like_a_shape(input_shape):
        check_input_shape(input_shape)
    return abstract_inputs(input_shape)


def outputs_of(model: nnx.Module, input_shape: Any, call: Call = default_call) -> Any:
    """The abstract outputs of a network in evaluation mode.

    Args:
      model: the network.
      input_shape: the shape of one example, or other inputs, as `abstract_inputs` takes.
      call: a function of the model and the inputs.

    Raises:
      ValueError: it does not take such inputs.
    """
    graphdef, state = nnx.split(model)
    given = abstract_inputs(input_shape)
    try:
        return jax.eval_shape(
            lambda state, *given: call(nnx.merge(graphdef, state), *given), state, *given
        )
    except Exception as error:  # whatever a forward pass may raise
        shapes = ", ".join(str(x.shape) for x in jax.tree.leaves(given))
        told = input_shape if looks_like_a_shape(input_shape) else shapes
        raise ValueError(input_refused(told, error)) from error


def input_refused(input_shape: Any, error: Exception, argument: str = "input_shape") -> str:
    """The error message for an input on which the forward pass fails, with the place in the code.

    Args:
      input_shape: of one example, or other inputs in words.
      error: that it has raised.
      argument: that the input was given as.
    """
    message = f"{argument}: the model does not take {input_shape}: {failure(error)}"
    if "incompatible shapes" in message:
        message += "; axes that are added must be one latent"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames and frames[-1].f_code is default_call.__code__:  # so the model was not entered
        message += "; give a call that does, such as call=lambda model, x: model(x, train=False)"
    match input_shape:
        case (1 | 3, _, width) if width not in (1, 3):
            message += "; the shape of an image is (height, width, channels)"
    return message


def remember_inputs(model: nnx.Module, inputs: Any, call: Call) -> None:
    """Keeps the inputs with which a network could be traced, for `known_inputs`.

    Args:
      model: the network.
      inputs: as `abstract_inputs` takes; no arrays are kept.
      call: a function of the model and the inputs; nothing is kept unless it is `model(*inputs)`,
        for it may be a part of the network.
    """
    if call is not default_call:
        return
    key = _structure_of(model)
    _KNOWN.pop(key, None)
    while len(_KNOWN) >= _MOST_KNOWN:
        del _KNOWN[next(iter(_KNOWN))]
    _KNOWN[key] = abstract_inputs(inputs)


def known_inputs(model: nnx.Module) -> Any:
    """The inputs with which a network of the same arrays was traced, or that its family takes.

    It is `None` where there are none.
    """
    return _KNOWN.get(_structure_of(model), architecture_of(model).example)


def _structure_of(model: nnx.Module) -> Any:
    """Its class, and the paths and shapes of its arrays: the same when it was trained or merged."""
    flat = nnx.to_flat_state(nnx.state(model))
    return type(model), tuple((path, tuple(value_of(leaf).shape)) for path, leaf in flat)
