"""Arrays that latents generate, in the place of a network's own; its code stays as it is."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import contextvars
from dataclasses import replace
import operator
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.core.hypernet import HypernetArrays, KernelGenerator
from dhp_jax.core.initializers import uniform
from dhp_jax.core.latent import TRACED, Axis, in_one_line
from dhp_jax.core.provenance import architecture_of, set_architecture
from dhp_jax.errors import ArgumentError
from dhp_jax.tracing.placed import PlacedAxis, Positions

KIND = "dhp_ordinary_kind"  # of a class whose calls `ordinary_calls` has changed, the user's class
SMALL_START = 0.1  # of the second layer where the first is zero, as a share of the kernel's scale
_REPLACED: contextvars.ContextVar[Mapping[str, nnx.Variable] | None] = contextvars.ContextVar(
    "replaced", default=None
)


class GeneratedArray(KernelGenerator):
    """What stands in the place of a parameter: it answers as that does, with a generated array.

    Where two axes are on latents a hypernetwork makes the array of them (`hyper_kernel`), with all
    other axes as taps. The cheap form, `embedding=None`, multiplies one number of each weight with
    the latents of all its axes. Both begin with the array that was there, to the bit, if all
    latents are 1. The cheap form keeps the type and metadata of the parameter. No hypernetwork
    makes an array that is not of the type `nnx.Param` itself, or has metadata.

    Args:
      name: path of the parameter.
      parameter: what it stands for.
      axes: the axes on latents, by their number in the array.
      embedding: size `m` of the hypernetwork's embedding; `None` for the cheap form.
      rngs: the `params` stream draws what the hypernetwork begins with beside the array.
    """

    def __init__(
        self,
        name: str,
        parameter: nnx.Variable,
        axes: Mapping[int, PlacedAxis],
        *,
        embedding: int | None,
        rngs: nnx.Rngs,
    ):
        value = parameter.get_value()
        self.name = name
        self.array_shape = tuple(map(int, value.shape))
        self.array_dtype = jnp.dtype(value.dtype).name
        self.embedding = embedding
        self.on_latents = nnx.Dict({str(k): axis for k, axis in sorted(axes.items())})
        may_pair = embedding and is_plain_param(parameter)
        self.pair = _pair(self.array_shape, sorted(axes)) if may_pair else None
        if self.pair is None:
            self.weight = parameter.copy()
            return
        kernel = jnp.moveaxis(value, self.pair, (-2, -1))
        self.kernel_size, self.param_dtype = tuple(kernel.shape[:-2]), jnp.dtype(value.dtype)
        self.ends = nnx.List([axes.get(k) or _staying(value.shape[k]) for k in self.pair])
        arrays = _starting_at(kernel, embedding, rngs)
        for field, array in arrays._asdict().items():
            setattr(self, field, parameter.replace(array))

    def __nnx_repr__(self) -> Iterator[Any]:
        return in_one_line(self, self.array_shape)

    def get_value(self) -> Array:
        """The generated array."""
        replaced = _REPLACED.get()
        if replaced is not None:
            return replaced[self.name].get_value()
        _check_whole(self)
        if self.pair is not None:
            return jnp.moveaxis(self.kernel(), (-2, -1), self.pair)
        made = self.weight[...]
        for k, axis in self.on_latents.items():
            others = [j for j in range(len(self.array_shape)) if j != int(k)]
            made = made * jnp.expand_dims(axis.value(), others).astype(made.dtype)
        return made

    def stand_in(self) -> nnx.Variable:
        """A variable of the parameter's type that has the generated array."""
        replaced = _REPLACED.get()
        return self.variable(self.get_value()) if replaced is None else replaced[self.name]

    def kernel_axes(self) -> tuple[Axis, Axis]:
        return tuple(self.ends)

    def plain(self) -> nnx.Variable:
        """The parameter, with the generated array; latents that are all 1 cost no other one."""
        if self.pair is None:
            if all(map(_is_one, self.on_latents.values())):
                return self.weight.copy()
            if not is_read_as_stored(self.weight):
                kind = type(self.weight).__name__
                detail = f"a {kind} that is read as it is stored, or latents that are 1"
                raise ArgumentError("model", detail=f"array {self.name!r}: expected {detail}")
        return self.variable(self.get_value())

    def variable(self, value: Array) -> nnx.Variable:
        """A variable of the parameter's type, with its metadata, of a given array."""
        return (self.weight if self.pair is None else self.b2).replace(value)

    def hold(self, value: Array) -> None:
        """Makes it a given array, whatever the latents are; in the cheap form where none is 0."""
        if self.pair is None:
            self.weight.set_value(jnp.ones_like(value))
            factor = self.get_value()
            self.weight.set_value(jnp.where(factor == 0, value, value / factor))
            return
        self.w2.set_value(jnp.zeros_like(self.w2[...]))
        self.b2.set_value(jnp.moveaxis(value, self.pair, (-2, -1)))

    def numbers(self) -> int:
        """How many numbers are trained in the place of the array's."""
        fields = ("weight",) if self.pair is None else HypernetArrays._fields
        return sum(getattr(self, field).get_value().size for field in fields)

    def __getitem__(self, index: Any) -> Array:
        return self.get_value()[index]

    def __jax_array__(self) -> Array:
        return self.get_value()

    def __getattr__(self, name: str) -> Any:
        """What arrays have, such as `shape`, `T` and `astype`."""
        if name == "value":
            return self.get_value()
        if name in ("shape", "dtype", "ndim", "size"):
            like = jax.ShapeDtypeStruct(self.array_shape, jnp.dtype(self.array_dtype))
            return getattr(like, name)
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.get_value(), name)


def _operator(name: str, reflected: bool) -> Any:
    function = getattr(operator, name)

    def apply(self: GeneratedArray, other: Any) -> Any:
        other = other.get_value() if isinstance(other, GeneratedArray | nnx.Variable) else other
        value = self.get_value()
        return function(other, value) if reflected else function(value, other)

    return apply


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "floordiv", "mod"):
    setattr(GeneratedArray, f"__{_name}__", _operator(_name, False))
    setattr(GeneratedArray, f"__r{_name}__", _operator(_name, True))
GeneratedArray.__neg__ = lambda self: -self.get_value()
GeneratedArray.__len__ = lambda self: self.array_shape[0]


def is_plain_param(variable: nnx.Variable) -> bool:
    """Whether a variable is of the type `nnx.Param` itself, without metadata of its own."""
    return type(variable) is nnx.Param and not variable.get_metadata(exclude_required=True)


def is_read_as_stored(variable: nnx.Variable) -> bool:
    """Whether a variable has neither a `get_value` or `set_value` of its own nor hooks in them."""
    methods, hooks = ("get_value", "set_value"), ("on_get_value", "on_set_value")
    own = any(getattr(type(variable), n) is not getattr(nnx.Variable, n) for n in methods)
    return not own and not any(variable.get_metadata(hook, None) for hook in hooks)


def ordinary(net: nnx.Module) -> nnx.Module:
    """The network without latents, which computes the same; `net` is left as it was."""
    net = nnx.clone(net)
    stand_ins = {
        id(node): node for _, node in nnx.iter_graph(net) if isinstance(node, GeneratedArray)
    }
    replace_nodes(net, {key: node.plain() for key, node in stand_ins.items()})
    delattr(net, TRACED)
    net.__class__ = vars(type(net)).get(KIND, type(net))
    set_architecture(net, replace(architecture_of(net), axes=None))
    return net


def replace_nodes(model: nnx.Module, others: Mapping[int, Any], *, directly: bool = False) -> None:
    """Puts others in the place of variables and modules, by their `id`, wherever they stand.

    That may be in lists, tuples and dictionaries, too. If it is done `directly` the modules do not
    learn of it, so it may be undone where they may not change, as within `jax.jit`.
    """
    placed: list[int] = []

    def other(value: Any) -> Any:
        if id(value) in others:
            placed.append(id(value))
            return others[id(value)]
        if type(value) is dict:
            return {key: other(inner) for key, inner in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(other, value))
        return type(value)(map(other, value)) if type(value) in (list, tuple) else value

    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Pytree)]
    for node in nodes:
        for attribute, value in list(vars(node).items()):
            before = len(placed)
            made = other(value)
            if len(placed) > before and directly:
                vars(node)[attribute] = made
            elif len(placed) > before:
                setattr(node, attribute, made if id(value) in others else nnx.data(made))
    if set(placed) != set(others):
        raise ValueError(
            "model: expected arrays in attributes, lists, tuples and dictionaries of modules"
        )


@contextlib.contextmanager
def arrays_replaced(variables: Mapping[str, nnx.Variable]):
    """Lets generated arrays answer as given variables, by the paths of their parameters."""
    token = _REPLACED.set(variables)
    try:
        yield
    finally:
        _REPLACED.reset(token)


def _check_whole(node: GeneratedArray) -> None:
    """Raises where a transformation has taken an array or its latents apart."""
    latents = [z for axis in node.on_latents.values() for z in axis.latents]
    whole = all(z.vector.get_value().shape == (z.size,) for z in latents)
    if not whole or (node.pair is None and node.weight.get_value().shape != node.array_shape):
        detail = (
            f"array {node.name!r} is taken apart, as by nnx.scan or nnx.vmap: call the network "
            "or a method of it, and not a part of it"
        )
        raise ArgumentError("model", detail=detail)


def _is_one(axis: PlacedAxis) -> bool:
    """Whether all latents of an axis are known to be 1."""
    values = [z.vector[...] for z in axis.latents]
    if any(isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct) for value in values):
        return False
    return all((np.asarray(value) == 1).all() for value in values)


def _staying(size: int) -> PlacedAxis:
    """An axis of which no position is on a latent."""
    return PlacedAxis([], Positions([-1] * size, [0] * size))


def _pair(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, int] | None:
    """The two axes of a hypernetwork's inputs; `None` if more than two are on latents."""
    rank = len(shape)
    if len(axes) > 2 or rank < 2:
        return None
    if len(axes) == 2:
        return axes[0], axes[1]
    (axis,) = axes
    if axis in (rank - 2, rank - 1):
        return rank - 2, rank - 1
    other = max((k for k in range(rank) if k != axis), key=lambda k: (shape[k], k))
    return min(axis, other), max(axis, other)


def _starting_at(kernel: Array, embedding: int, rngs: nnx.Rngs) -> HypernetArrays:
    """Arrays of a hypernetwork that makes a kernel, to the bit, of latents that are 1.

    The first number of the embedding is the product of the latents, and its weights are the kernel;
    the others are zero, with small random weights, so that gradients reach both.
    """
    *taps, into, out = kernel.shape
    pair, dtype = (into, out), kernel.dtype
    first = np.zeros((embedding, *pair), dtype)
    first[0] = 1
    w2 = jnp.expand_dims(kernel, -3)
    if embedding > 1:
        draws = uniform(rngs.params(), (embedding - 1) * kernel.size)
        scale = SMALL_START * jnp.sqrt(jnp.mean(jnp.square(kernel.astype(jnp.float32))))
        draws = scale * jnp.asarray(draws).reshape(*taps, embedding - 1, *pair)
        w2 = jnp.concatenate([w2, draws.astype(dtype)], -3)
    return HypernetArrays(  # of NumPy: JAX would compile a program for each shape
        b0=jnp.asarray(np.zeros(pair, dtype)),
        w1=jnp.asarray(first),
        b1=jnp.asarray(np.zeros_like(first)),
        w2=w2,
        b2=jnp.asarray(np.zeros(kernel.shape, dtype)),
    )
