"""Networks that are functions of a tree of parameters, as networks of flax.nnx."""

from collections.abc import Callable, Iterator, Mapping
import copy
from dataclasses import dataclass
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax.errors import ArgumentError, shown

Path = tuple[str, ...]
Sizes = Mapping[str, Any]  # of an object, by attribute: numbers, and tuples of them


class FromFunction(nnx.Module):
    """A function of a tree of parameters and of inputs, as a network of `flax.nnx`.

    So a network in plain JAX is pruned, and one of a library whose networks are such functions, or
    trees of objects, as those of Equinox are. What takes networks of `flax.nnx` takes it, as
    `dhp.with_latents` and `dhp.prune_to`. An array has the path that it has in the tree, such as
    `layers.0.w`.

    Args:
      function: takes the parameters, then the inputs.
      params: a tree. Its arrays of floating point numbers are trained; what is no array, as a
        function or a Python number, stays. Objects in it may keep sizes as numbers, or tuples of
        them: those that the function needs are cut with the arrays.

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
        arrays, fixed = {}, _Fixed(function, structure, [], {})
        for keys, value in leaves:
            path = _path_of(keys)
            is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
            fixed.leaves.append((path, None) if is_array else (None, value))
            if is_array:
                trained = jnp.issubdtype(value.dtype, jnp.inexact)
                arrays[path] = (nnx.Param if trained else nnx.Variable)(jnp.asarray(value))
        if not arrays or len(arrays) < sum(path is not None for path, _ in fixed.leaves):
            raise ArgumentError("params", "a tree of arrays, of one path each", shown(params))
        place("params", self, arrays)
        for path, sizes in _sizes_in(params):
            sizes = {name: size for name, size in sizes.items() if _may_hold(self, path, name)}
            for name, size in sizes.items():
                setattr(at(self, path), name, size)
            if sizes:
                fixed.sizes[path] = sizes
        self.fixed = nnx.static(fixed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns for the parameters and these inputs."""
        return self.fixed.function(self.parameters(), *args, **kwargs)

    def parameters(self) -> Any:
        """The tree of parameters, as the function takes it."""
        fixed, changed = self.fixed, {}
        leaves = [other if path is None else at(self, path)[...] for path, other in fixed.leaves]
        for path, sizes in fixed.sizes.items():
            held = vars(at(self, path))
            if others := {name: held[name] for name, size in sizes.items() if held[name] != size}:
                changed[path] = others
        return _resized(jax.tree.unflatten(fixed.structure, leaves), changed)


@dataclass(eq=False)
class _Fixed:
    """What of a network is no array; equal to itself alone, for functions may have no hash."""

    function: Callable[..., Any]
    structure: Any
    leaves: list[tuple[Path | None, Any]]  # the path of an array, or what is none
    sizes: dict[Path, Sizes]  # that the objects of the tree had


def _path_of(keys: Any) -> Path:
    """The path of a leaf as names: keys of mappings, numbers in sequences, attributes."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _children(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """What a node of a tree holds itself, with its keys, and the node's structure."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)


def _sizes_in(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Sizes]]:
    """The paths of the objects in a tree, and the numbers that each keeps."""
    children, structure = _children(tree)
    if jax.tree_util.treedef_is_leaf(structure):
        return
    for keys, child in children:
        yield from _sizes_in(child, (*path, *_path_of(keys)))
    held = getattr(tree, "__dict__", {}).items()
    if own := {name: value for name, value in held if _is_size(value) and name[0] != "_"}:
        yield path, own


def _is_size(value: Any) -> bool:
    several = type(value) is tuple and len(value) > 0
    return type(value) is int or (several and all(type(size) is int for size in value))


def _may_hold(module: nnx.Module, path: Path, name: str) -> bool:
    """Whether there is a node at a path that can have an attribute of a name."""
    try:
        node = at(module, path)
    except AttributeError:  # an object without arrays
        return False
    return not hasattr(node, name)


def _resized(tree: Any, changed: Mapping[Path, Sizes]) -> Any:
    """A tree in which objects at some paths have other sizes."""
    if not changed:
        return tree
    if () in changed:
        tree = copy.copy(tree)
        for name, size in changed[()].items():
            object.__setattr__(tree, name, size)  # which may be frozen
    children, structure = _children(tree)
    made = []
    for keys, child in children:
        own = _path_of(keys)
        inner = {path[1:]: sizes for path, sizes in changed.items() if path[:1] == own}
        made.append(_resized(child, inner))
    return jax.tree.unflatten(structure, made)


def place(argument: str, module: nnx.Module, variables: dict[Path, nnx.Variable]) -> None:
    """Sets variables at their paths, in mappings that are made.

    Raises:
      ArgumentError: a path that begins with a name that the module has itself; two paths that are
        the same when joined by dots.
    """
    own, names = {*dir(module), "fixed"}, set[str]()
    for path in variables:
        if not path or path[0] in own:
            wanted = "paths that begin with other names than those of nnx.Module"
            raise ArgumentError(argument, wanted, ".".join(path))
        if (name := ".".join(path)) in names:
            raise ArgumentError(argument, "arrays of one path each", f"two of {name!r}")
        names.add(name)
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
