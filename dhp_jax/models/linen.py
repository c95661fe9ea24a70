"""Networks of flax.linen as networks of flax.nnx, and variables of pruned ones in flax.linen."""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import copy
from dataclasses import dataclass
import functools
from types import MappingProxyType
from typing import Any

from flax import nnx
from flax.core import Scope, meta, unfreeze
import flax.linen as linen
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
from jax._src.core import get_axis_env  # which axes are bound; there is no public way
import jax.numpy as jnp
import numpy as np

from dhp_jax.errors import ArgumentError, shown
from dhp_jax.models.functions import Path, at, place
from dhp_jax.models.registry import taken

PARAMS = "params"
CELLS = (linen.GRUCell, linen.LSTMCell, linen.OptimizedLSTMCell, linen.MGUCell, linen.SimpleCell)
NOTHING: Mapping[str, Any] = MappingProxyType({})


class FromLinen(nnx.Module):
    """A network of `flax.linen` with its variables, as a network of `flax.nnx`.

    It takes what `module.apply` takes after the variables, and computes the same. What takes
    networks of `flax.nnx` takes it: `dhp.with_latents`, `dhp.prune_to`, `nnx.jit`,
    `nnx.Optimizer`, `dhp.save`. An array has the path that it has in its collection, such as
    `Conv_0.kernel`. It begins in evaluation mode.

    Args:
      module: the network.
      variables: its collections, as `module.init` returns them: `params`, and what there is beside
        them, such as `batch_stats`.
      training: keyword arguments of the call in training mode, such as `{"train": True}`. All
        collections but `params` may change there.
      evaluation: those of the call in evaluation mode, such as `{"train": False}`.
      rngs: streams of random keys for training mode, such as `nnx.Rngs(0)` for dropout.

    Statistics of `BatchNorm(axis_name=...)` are those of all devices where that axis is bound, as
    in `nnx.pmap`; where none is, those of the batch. Where only others are, training is refused.

    Raises:
      ValueError: no `params` among the variables; two arrays of one path; a path that begins with
        a name that modules of `flax.nnx` have; no `training` where there is more than `params`.

    Example:
      >>> net = dhp.FromLinen(module, variables, training={"train": True})
      >>> net = dhp.with_latents(net, (32, 32, 3))
      >>> small = dhp.prune_to(net, flops=0.5)
      >>> with dhp.pruned_linen():
      ...     logits = module.apply(small.variables(), images)
    """

    def __init__(
        self,
        module: linen.Module,
        variables: Mapping[str, Any],
        *,
        training: Mapping[str, Any] | None = None,
        evaluation: Mapping[str, Any] = NOTHING,
        rngs: nnx.Rngs | None = None,
    ):
        if not isinstance(module, linen.Module):
            raise ArgumentError("module", "a module of flax.linen", shown(module))
        if not isinstance(variables, Mapping) or PARAMS not in variables:
            wanted = "what module.init returns, with its 'params'"
            raise ArgumentError("variables", wanted, shown(variables))
        others = sorted(set(variables) - {PARAMS})
        if others and training is None:
            wanted = "keyword arguments of the call in training, such as {'train': True}"
            raise ArgumentError("training", f"{wanted}, for {others[0]!r}", shown(training))
        self.deterministic, self.rngs = True, rngs
        self.conv_general_dilated = jax.lax.conv_general_dilated  # of convolutions with none told
        collections: dict[Path, str] = {}
        arrays: dict[Path, nnx.Variable] = {}
        for name in (PARAMS, *others):
            kind = nnx.variable_type_from_name(name, allow_register=True)
            for path, value in flatten_dict(unfreeze(meta.unbox(variables[name]))).items():
                if path in arrays:
                    wanted = "collections whose arrays have paths of their own"
                    raise ArgumentError("variables", wanted, ".".join(path))
                collections[path], arrays[path] = name, kind(jnp.asarray(value))
        place("variables", self, arrays)
        fixed = _Fixed(module, collections, dict(training or {}), dict(evaluation))
        self.fixed = nnx.static(fixed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's outputs; keyword arguments come before those of the mode.

        Another `method` than `__call__` gets those of the mode that it takes.
        """
        fixed = self.fixed
        as_stored = functools.partial(
            _with_stored_shapes,
            convolve=self.conv_general_dilated,
            trained=not self.deterministic,
            removed=fixed.removed,
        )
        if self.deterministic:
            with linen.intercept_methods(as_stored):
                options = _options(fixed.module, fixed.evaluation, kwargs)
                return fixed.module.apply(self.variables(), *args, **options)
        changing = sorted({*fixed.collections.values()} - {PARAMS})
        options = _options(fixed.module, fixed.training, kwargs)
        streams = dict(self.rngs.items()) if self.rngs else {}
        # What `flax.linen` takes for a name that is not there is that of `params`.
        keys = {PARAMS if name == "default" else name: key() for name, key in streams.items()}
        with linen.intercept_methods(as_stored):
            outputs, changed = fixed.module.apply(
                self.variables(), *args, rngs=keys, mutable=changing, **options
            )
        for collection, tree in changed.items():
            for path, value in flatten_dict(unfreeze(tree)).items():
                if fixed.collections.get(path) == collection:
                    at(self, path).set_value(value)
        return outputs

    def variables(self) -> dict[str, Any]:
        """The collections with their arrays, as `module.apply` takes them."""
        found: dict[str, dict[Path, jax.Array]] = {PARAMS: {}}
        for path, collection in self.fixed.collections.items():
            found.setdefault(collection, {})[path] = at(self, path)[...]
        return {collection: unflatten_dict(flat) for collection, flat in found.items()}

    def remove_norms(self, layer: Path, norms: Collection[Path]) -> None:
        """Removes BatchNorm modules, in place, and gives the layer before them a bias.

        Raises:
          ValueError: one of the paths leads to no such module.
        """
        places, kernel = dict(self.fixed.collections), (*layer, "kernel")
        for path in norms:
            if path not in self.batch_norms():
                raise ValueError(f"folded: {'.'.join(path)!r}: expected a BatchNorm of flax.linen")
        if kernel not in places:
            raise ValueError(f"folded: {'.'.join(layer)!r}: expected a layer with a kernel")
        for path in [path for path in places if path[:-1] in norms]:
            delattr(at(self, path[:-1]), path[-1])
            del places[path]
        if (*layer, "bias") not in places:
            array = at(self, kernel)
            at(self, layer).bias = type(array)(jnp.zeros(array.shape[-1], array.dtype))
            places[*layer, "bias"] = PARAMS
        fixed = copy.copy(self.fixed)
        fixed.collections, fixed.removed = places, fixed.removed.union(norms)
        self.fixed = nnx.static(fixed)

    def batch_norms(self) -> dict[Path, nnx.Module]:
        """What holds the `mean` and `var` of each BatchNorm, by the path of its module."""
        places = self.fixed.collections
        paths = [path[:-1] for path in places if path[-1] == "mean" and len(path) > 1]
        statistics = [path for path in paths if places.get((*path, "var")) == "batch_stats"]
        return {path: at(self, path) for path in statistics}


@contextlib.contextmanager
def pruned_linen() -> Iterator[None]:
    """Lets modules of `flax.linen` take variables of pruned networks.

    In it a parameter that is there is taken as it is, whatever its shape would be at first. Layers
    that keep sizes beside their parameters, as groups of channels and heads of attention, take
    those of the parameters. Within `jax.jit` it is entered in the function, which is traced later
    than it is made.

    Returns:
      A context manager.

    Example:
      >>> @jax.jit
      ... def forward(variables, images):
      ...     with dhp.pruned_linen():
      ...         return module.apply(variables, images)
    """
    with linen.intercept_methods(_with_stored_shapes):
        yield


def _with_stored_shapes(
    method: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: linen.module.InterceptorContext,
    convolve: Callable[..., Any] | None = None,
    trained: bool = False,
    removed: Collection[Path] = (),
) -> Any:
    """Calls a method of a module whose parameters have the shapes that are stored.

    Modules that are `removed` return what they are given.

    With a `convolve` layers leave out axes of devices of which there are none. Those that are
    `trained` raise an `ArgumentError` where there are others.
    """
    module = context.module
    if module.scope is not None:
        if module.path in removed:
            return args[0]
        module.scope.param = functools.partial(_param, module.scope)
        if context.method_name == "__call__":
            _resize(module, (*args, *kwargs.values()))
            if convolve and getattr(module, "conv_general_dilated", convolve) is None:
                _set(module, conv_general_dilated=convolve)
            if convolve and not _is_bound(axis := getattr(module, "axis_name", None)):
                bound = [repr(name) for name in get_axis_env().axis_names() if name is not None]
                if trained and bound:
                    wanted = f"one of the axes that are bound, {', '.join(bound)}, for "
                    where = module.name or type(module).__name__
                    raise ArgumentError("axis_name", f"{wanted}{where} in training", repr(axis))
                _set(module, axis_name=None)
    return method(*args, **kwargs)


def _is_bound(axis: Any) -> bool:
    """Whether an axis that is named, as by `BatchNorm(axis_name=...)`, is one of this trace."""
    try:
        return not isinstance(axis, str) or bool(jax.lax.axis_size(axis))
    except NameError:
        return False


def _resize(module: linen.Module, given: tuple[Any, ...]) -> None:
    """Sets the sizes that a module keeps, and its call uses, to those of what is stored."""
    stored = meta.unbox(module.variables.get(PARAMS, {}))
    shape = getattr(stored.get("kernel"), "shape", ())
    if "bias" in stored and isinstance(module, linen.Conv | linen.ConvTranspose | linen.Dense):
        _set(module, use_bias=True)  # others may be folded into it
    if isinstance(module, linen.MultiHeadDotProductAttention) and "query" in stored:
        *_, heads, size = np.shape(stored["query"]["kernel"])
        outputs = np.shape(stored["out"]["kernel"])[-1]
        _set(module, num_heads=heads, qkv_features=heads * size, out_features=outputs)
    elif isinstance(module, linen.RNN) and isinstance(module.cell, CELLS):
        cell = meta.unbox(module.cell.variables.get(PARAMS, {}))
        hidden = [np.shape(layer["kernel"])[-2] for name, layer in cell.items() if name[0] == "h"]
        if hidden:  # the first carry is of that size
            _set(module.cell, features=hidden[0])
    elif isinstance(module, linen.Conv) and shape:
        groups = np.shape(given[0])[-1] // shape[-2]
        _set(module, feature_group_count=groups, features=shape[-1])
    elif isinstance(module, linen.DenseGeneral) and shape:
        rank = len(module.features) if isinstance(module.features, tuple | list) else 1
        _set(module, features=shape[-rank:])
    elif isinstance(module, linen.Einsum) and shape:
        _set(module, shape=shape)


def _set(module: linen.Module, **values: Any) -> None:
    """Sets attributes of a module, which is frozen."""
    for name, value in values.items():
        object.__setattr__(module, name, value)


def _param(scope: Scope, name: str, init: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A parameter as it is stored, or with its initial value where there is none."""
    if not scope.has_variable(PARAMS, name):
        return Scope.param(scope, name, init, *args, **kwargs)
    scope.reserve(name, PARAMS)
    stored = scope.get_variable(PARAMS, name)
    return meta.unbox(stored) if kwargs.get("unbox", True) else stored


def _options(
    module: linen.Module, mode: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of a call: those that are given, and those of the mode."""
    method = given.get("method")
    if method is not None:
        found = getattr(module, method) if isinstance(method, str) else method
        mode = {name: mode[name] for name in taken(found, mode)}
    return {**mode, **given}


@dataclass(eq=False)
class _Fixed:
    """What of a network is no array; equal to itself alone, for modules may have no hash."""

    module: linen.Module
    collections: dict[Path, str]  # of each array
    training: dict[str, Any]
    evaluation: dict[str, Any]
    removed: frozenset[Path] = frozenset()  # modules that were folded into others
