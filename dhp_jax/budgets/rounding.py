"""Rounding: the width that each latent keeps is a multiple of a number."""

from collections.abc import Mapping
import fnmatch
import re
from types import MappingProxyType

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax.core.latent import Latent, latents, walk
from dhp_jax.core.layers import Hyper
from dhp_jax.errors import ArgumentError

AUTO = "auto"

# By platform and dtype the best of benchmarks/results/widths.json; others have not been measured.
MEASURED: Mapping[tuple[str, str], int] = MappingProxyType(
    {("cpu", "float32"): 8, ("cpu", "bfloat16"): 8}
)

Multiples = int | str | Mapping[str, int]


def parse_multiples(text: str) -> dict[str, int]:
    """The multiples that a text such as "stages.*:8,head:4" gives latents, by pattern.

    Raises:
      ValueError: it is none.
    """
    found = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^\s:,]+)\s*:\s*([1-9][0-9]{0,5})\s*", part, re.ASCII)
        if match is None:
            raise ArgumentError(
                "multiple_of",
                detail=f"expected {AUTO!r}, or latents with a number each, such as "
                f"'stages.*:8,head:4'; got {text!r}",
            )
        found.pop(match[1], None)  # so that it comes last, which counts
        found[match[1]] = int(match[2])
    return found


def multiples(model: nnx.Module, multiple_of: Multiples) -> dict[str, int]:
    """The multiple that each prunable latent of a model has to keep, by its name.

    Args:
      model: a network of latents.
      multiple_of: one number for all of them; numbers by name or pattern (as in file names; the
        last that fits counts, others have 1), as a mapping or as a text for `parse_multiples`; or
        "auto", for the number that was best in benchmarks/results/widths.json on this platform for
        the dtype of the model's convolutions, in latents at least twice as large; 1 where nothing
        was measured.

    Raises:
      ValueError: a number below 1; one that is larger than a latent that it is for; a name
        that fits no prunable latent.
    """
    prunable = {name: z for name, z in latents(model).items() if z.prunable}
    if isinstance(multiple_of, str) and multiple_of == AUTO:
        return _auto(model, prunable)
    if isinstance(multiple_of, str):
        multiple_of = parse_multiples(multiple_of)
    if isinstance(multiple_of, Mapping):
        return _by_name(prunable, multiple_of)
    _check_number("", multiple_of)
    narrow = [name for name, z in prunable.items() if z.size < multiple_of]
    if narrow:
        others = f" and {len(narrow) - 1} more" if len(narrow) > 1 else ""
        raise ArgumentError(
            "multiple_of",
            detail=f"expected at most {min(prunable[name].size for name in narrow)}, the size "
            f"of the smallest prunable latent; got {multiple_of}, which "
            f"{narrow[0]!r}{others} cannot keep; {AUTO!r} and numbers by name leave "
            "such latents at 1",
        )
    return dict.fromkeys(prunable, int(multiple_of))


def _auto(model: nnx.Module, prunable: Mapping[str, Latent]) -> dict[str, int]:
    best = MEASURED.get((jax.default_backend(), _dtype(model)), 1)
    return {name: best if z.size >= 2 * best else 1 for name, z in prunable.items()}


def _dtype(model: nnx.Module) -> str:
    """What the layers with generated kernels of a model compute in."""
    first = next((m for _, _, m in walk(model) if isinstance(m, Hyper)), None)
    return jnp.dtype((first and first.dtype) or jnp.float32).name


def _by_name(prunable: Mapping[str, Latent], multiple_of: Mapping[str, int]) -> dict[str, int]:
    found = dict.fromkeys(prunable, 1)
    for pattern, number in multiple_of.items():
        _check_number(f"{pattern}: ", number)
        fitting = [name for name in prunable if fnmatch.fnmatchcase(name, pattern)]
        if not fitting:
            raise ArgumentError(
                "multiple_of",
                detail=f"{pattern}: expected prunable latents, of {', '.join(prunable)}; got none "
                "that fit",
            )
        for name in fitting:
            if number > prunable[name].size:
                raise ArgumentError(
                    "multiple_of",
                    detail=f"{pattern}: expected at most {prunable[name].size}, the size of latent "
                    f"{name!r}, got {number}",
                )
            found[name] = int(number)
    return found


def _check_number(where: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
        others = "" if where else f", {AUTO!r} or such by latent"
        raise ArgumentError(
            "multiple_of",
            detail=f"{where}expected an integer of at least 1{others}, got {number!r}",
        )
