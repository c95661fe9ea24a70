"""Networks of the user's own, by the names of the functions that make them: "module:function"."""

from collections.abc import Callable
import importlib
import os
import sys
from typing import Any

from flax import nnx

from dhp_jax.errors import ArgumentError, shown


def is_own(name: Any) -> bool:
    """Whether a name is that of a function to import, and not of a family."""
    return isinstance(name, str) and ":" in name


def imported(name: str, argument: str = "build") -> Callable[..., nnx.Module]:
    """The function that "module:function" names; modules are looked for in this folder too.

    The name is given by the user, never one that a file holds; an error calls it `argument`.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError(f"it is {shown(found)}")
    except Exception as error:  # a module of the user's may raise anything
        expected = "module:function, such as networks:Net"
        raise ArgumentError(
            argument, expected, name, f"expected {expected}; got {name!r}: {error}"
        ) from error
    return found
