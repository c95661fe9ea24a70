"""Networks that are functions of a tree of parameters, as networks of flax.nnx."""

from collections.abc import Callable
from dataclasses import dataclass
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from dhp_jax.errors import ArgumentError, shown

Path = tuple[str, ...]


class FromFunction(nnx.Module):
    """A function of a tree of parameters and of inputs, as a network of `flax.nnx`.

    So a network in plain JAX is pruned, and one of a library whose networks are such functions and
    do not check the shapes of their parameters. What takes networks of `flax.nnx` takes it, as
    `dhp.with_latents` and `dhp.prune_to`. An array has the path that it has in the tree, such as
    `layers.0.w`.

    Args:
      function: takes the parameters, then the inputs.
      params: a tree of arrays. Those of floating point numbers are trained.

    Raises:
      ValueError: no function; no arrays; two arrays of one path; a path that begins with a name
        that modules of `flax.nnx` have.

    Example:
      >>> net = dhp.with_latents(dhp.FromFunction(forward, params), (32, 32, 3))
      >>> small = dhp.prune_to(net, flops=0.5)
      >>> logits = forward(small.parameters(), images)
    """

    def __init__(self, function: Callable[..., Any], params: Any):
        if not callable(function):
            raise ArgumentError("function", "a function of parameters and inputs", shown(function))
        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        arrays = {}
        for path, value in leaves:
            array = jnp.asarray(value)
            trained = jnp.issubdtype(array.dtype, jnp.inexact)
            arrays[_path_of(path)] = nnx.Param(array) if trained else nnx.Variable(array)
        if not arrays or len(arrays) < len(leaves):
            raise ArgumentError("params", "a tree of arrays, of one path each", shown(params))
        place("params", self, arrays)
        self.fixed = nnx.static(_Fixed(function, structure, tuple(arrays)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns for the parameters and these inputs."""
        return self.fixed.function(self.parameters(), *args, **kwargs)

    def parameters(self) -> Any:
        """The tree of parameters, as the function takes it."""
        arrays = [at(self, path)[...] for path in self.fixed.paths]
        return jax.tree.unflatten(self.fixed.structure, arrays)


@dataclass(eq=False)
class _Fixed:
    """What of a network is no array; equal to itself alone, for functions may have no hash."""

    function: Callable[..., Any]
    structure: Any
    paths: tuple[Path, ...]


def _path_of(keys: Any) -> Path:
    """The path of a leaf as names: keys of mappings, numbers in sequences, attributes."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def place(argument: str, module: nnx.Module, variables: dict[Path, nnx.Variable]) -> None:
    """Sets variables at their paths, in mappings that are made.

    Raises:
      ArgumentError: a path that begins with a name that the module has itself.
    """
    own = {*dir(module), "fixed"}
    for path in variables:
        if not path or path[0] in own:
            wanted = "paths that begin with other names than those of nnx.Module"
            raise ArgumentError(argument, wanted, ".".join(path))
    for path, variable in variables.items():
        node: Any = module
        for name in path[:-1]:
            if name not in vars(node):
                setattr(node, name, nnx.Dict())
            node = getattr(node, name)
        setattr(node, path[-1], variable)


def at(module: nnx.Module, path: Path) -> Any:
    """What stands at a path: a variable, or an array that latents generate."""
    return functools.reduce(getattr, path, module)
