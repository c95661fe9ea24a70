"""Operations of a traced function, those of functions in it too."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

CONTRACTIONS = ("conv_general_dilated", "dot_general")


def count_operations(
    function: Callable, *args: Any, names: tuple[str, ...] | None = CONTRACTIONS
) -> int:
    """How many operations of such names a function has, or of all names."""

    def count(jaxpr):
        own = sum(names is None or e.primitive.name in names for e in jaxpr.eqns)
        inner = (inside for e in jaxpr.eqns for inside in jaxprs_in_params(e.params))
        return own + sum(map(count, inner))

    return count(jax.make_jaxpr(function)(*args).jaxpr)
