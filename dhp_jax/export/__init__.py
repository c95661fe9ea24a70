"""Exports networks to StableHLO, ONNX or safetensors, and tests each file it writes."""

from collections.abc import Mapping
from dataclasses import dataclass
import functools
import importlib.util
import logging
import os
from pathlib import Path
import re
import shutil
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax import files
from dhp_jax.activity import doing
from dhp_jax.artifact.writing import may_hold
from dhp_jax.core.latent import check_module
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.state import path_name
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.export.sizes import Arguments, Shape, Sizes, candidates, example_of, inputs_to_try
from dhp_jax.export.writers import (
    NARROW,
    NEEDS,
    WRITERS,
    Build,
    ExportError,
    Forward,
)
from dhp_jax.models import registry
from dhp_jax.pruned.fold import fold_for
from dhp_jax.tracing.inputs import outputs_of
from dhp_jax.tracing.programs import Call, all_programs, called, needed_inputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      path: the file, or the folder for safetensors.
      shape: of the input; texts are sizes that are free. Of several inputs, a tuple of shapes in
        the order of `jax.tree.leaves`.
      folded: how many layers were folded into others.
      differences: by the name of the inputs it was tried on, the largest absolute difference of its
        outputs to the network's.
      largest: the largest absolute value among the network's outputs.
      fixed: why sizes are fixed that might be free (height and width, or all of them), in one line;
        `None` where they are free, or were not to be.
    """

    path: Path
    shape: Shape
    folded: int
    differences: Mapping[str, float]
    largest: float
    fixed: str | None = None


def export(
    model: nnx.Module,
    path: str | os.PathLike,
    input_shape: Any,
    *,
    format: str,
    call: Call | None = None,
    inputs: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    build: Build = None,
) -> Exported:
    """Writes a network for inference, with BatchNorm folded where that is exact, and tries it.

    The batch size is free, and height and width of images too, where the network and the format
    allow. Otherwise height and width are fixed, and then the batch, at one example. Of arrays, the
    first axis is the batch where it is as long as that of the first array, or of others if the
    network does not take that. So give two examples or more, of a number unlike other sizes. If the
    batch has to be fixed, all sizes are those that were given.

    Args:
      model: an ordinary or pruned network; left as it was.
      path: the file to write, or the folder for safetensors; a file, or a folder with a network
        only, is replaced once what was written has been tried.
      input_shape: of one example, such as `(height, width, channels)`, for float32; or an array,
        an abstract array, or a tuple, list or dict of them, with their batch axis, as for
        `measure_cost`.
      format: "stablehlo" (for cpu, cuda and tpu; `jax.export.deserialize` reads it), "onnx" (in
        float32) or "safetensors" (a folder that `dhp.load` reads).
      call: a function of the model and the inputs, where that is not `model(*inputs)`.
      inputs: batches by name on which the outputs of what was written are compared with the
        network's, each as `input_shape` where that is no shape. If `None`, the arrays that
        `input_shape` has, or random floats. The first is tried at another size too, where the size
        is free.
      notes: JSON values that ONNX files carry as metadata, and folders as `dhp.save` keeps them.
      build: makes a network of your own class, unpruned, as for `dhp.load`; for safetensors.

    Returns:
      What was written, and how far its outputs were from the network's.

    Raises:
      ValueError: an unknown format or one whose packages are missing, a path where something else
        is, inputs that are no batches of such examples, none where inputs are abstract and not
        floats, a network with latents, one that draws random numbers in evaluation mode, or one
        that cannot be written in this format. What was at `path` before is left as it was.
      ExportError: outputs differ by more than rounding; what was at `path` is left as it was.

    Example:
      >>> export(small, "small.onnx", (32, 32, 3), format="onnx").differences
      {'random': 1.4e-06, 'another size': 1.9e-06}
    """
    check_module(model)
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError("path", "a file to write, as in export(model, path, ...)", shown(path))
    path = Path(path).expanduser()
    check_format(format)
    check_path(path, format)
    _check_build(model, format, build)
    call = called(call)
    example, of_one = example_of(input_shape)
    inputs = inputs_to_try(input_shape, example, of_one, inputs)
    model = nnx.clone(model)
    model.eval()
    outputs_of(model, input_shape, call)
    if format != "safetensors":  # which is read as the network that it is
        _check_draws_nothing(model, example, call)
    write = WRITERS[format] if build is None else functools.partial(WRITERS[format], build=build)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = files.unfinished(target)
    told = getattr(model, "multiple", 1)  # of height and width, see `dhp_jax.tasks.tiling`
    multiple = told if type(told) is int and told > 0 else 1
    possible = list(candidates(example, of_one, multiple))
    if format == "safetensors":  # read as the network that it is, with all its freedom
        possible = [sizes for sizes in possible if not sizes.multiple][: 1 if of_one else None]
    failure = None
    for sizes in possible:
        tried = _tried(inputs, sizes, of_one)
        if sizes.free and not (of_one and format == "safetensors"):
            tried["another size"] = sizes.enlarged(next(iter(tried.values())))
        try:
            abstract = sizes.arguments(example)
            folded = fold_for(model, example if format == "safetensors" else abstract, call)
            _remove(part)
            with doing(f"writing {format}, trying what was written"):
                run = write(folded, part, abstract, call, notes or {})
                differences, largest = _compare(model, call, run, tried)
                files.put(part, target)
        except Exception as error:  # whatever a forward pass or a converter may raise
            failure = error
            continue
        finally:
            _remove(part)
        count = sum(len(following) for _, *following in architecture_of(folded).folded)
        free = sizes.multiple or (sizes.free and not of_one)
        fixed = None if failure is None or free else _reason(failure)
        if not sizes.free and fixed is not None:
            what = "one example at a time" if of_one else "inputs of these sizes only"
            logger.warning("export: %s takes %s, for: %s", path, what, fixed)
        shape = sizes.shapes[0] if len(sizes.shapes) == 1 else sizes.shapes
        return Exported(path, shape, count, differences, largest, fixed)
    if isinstance(failure, ExportError):
        raise failure
    raise ValueError(f"model: it cannot be written as {format}: {_reason(failure)}") from failure


def _tried(inputs: Mapping[str, Arguments], sizes: Sizes, of_one: bool) -> dict[str, Arguments]:
    """The inputs that a file of these sizes takes; of batches the first example, if it takes one.

    Raises:
      ValueError: there are none.
    """
    if of_one and not sizes.free:
        inputs = {name: jax.tree.map(lambda x: x[:1], given) for name, given in inputs.items()}
    if of_one:  # of other heights and widths, too, whatever the file says of them
        return dict(inputs)
    found = {name: given for name, given in inputs.items() if sizes.take(given)}
    if not found:
        expected = f"inputs of {', '.join(map(str, sizes.shapes))} among them"
        shapes = {name: [x.shape for x in jax.tree.leaves(x)] for name, x in inputs.items()}
        raise ArgumentError("inputs", expected, shown(shapes))
    if left_out := sorted(inputs.keys() - found.keys()):
        logger.warning("export: not tried on %s, for sizes are fixed", ", ".join(left_out))
    return found


def _reason(failure: Exception) -> str:
    """Why a shape was not written, in one line."""
    if isinstance(failure, ExportError):
        return failure.reason
    what = f"{type(failure).__name__}: {failure}".splitlines()[0].rstrip(": ")
    if "_DimExpr" in what:
        what += "; the batch size is symbolic, so write x.shape[0] for len(x)"
    if isinstance(failure, TypeError) and "<locals>" in what:
        # The network itself has been traced before: it is the converter's function that refuses.
        what = re.sub(r"\S*<locals>\.", "", what)
        if "positional argument" in what:
            what += "; jax2onnx takes these by name only, as nnx.max_pool(x, window_shape=(2, 2))"
        elif "keyword argument" in what:
            what += "; jax2onnx takes these without names only, in their order"
    return what


def check_format(format: str) -> None:
    """Raises a `ValueError` unless a format is known and the packages that it needs are there."""
    if format not in NEEDS:
        raise ValueError(f"format: expected one of {', '.join(NEEDS)}; got {format!r}")
    missing = [name for name in NEEDS[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"format: {format!r} needs {' and '.join(missing)}, not installed here; "
            f'run: pip install "dhp_jax[{format}]"'
        )


def check_path(path: str | os.PathLike, format: str, argument: str = "path") -> None:
    """Raises a `ValueError` where something is that an export must not replace, or none can be."""
    path = Path(path)
    if why := files.why_unwritable(path.parent):
        raise ValueError(f"{argument}: expected a place that can be written, got {path} ({why})")
    if format == "safetensors" and not may_hold(path):
        raise ValueError(
            f"{argument}: expected no or an empty folder, or one with a network only, got {path}"
        )
    if format != "safetensors" and path.exists() and not path.is_file():
        what = "the folder" if path.is_dir() else "something else:"
        raise ValueError(f"{argument}: expected a file, or nothing there yet, got {what} {path}")


def _check_build(model: nnx.Module, format: str, build: Build) -> None:
    own = not registry.knows(architecture_of(model).family)
    if own and format == "safetensors" and build is None:
        raise ValueError("build: expected the function that builds this network, to read it back")
    if build is not None and format != "safetensors":
        raise ValueError(f"build: expected none for {format}, which is read without it")


def _check_draws_nothing(model: nnx.Module, example: Arguments, call: Call) -> None:
    """Raises a `ValueError` for a network whose file would draw the same numbers in every call."""
    graphdef, random, rest = nnx.split(model, nnx.RngState, ...)

    def forward(random: nnx.State, *arguments: Any) -> Any:
        return call(nnx.merge(graphdef, random, rest, copy=True), *arguments)

    # A key may be drawn that nothing follows from, as for the zeros that an nnx.RNN begins with.
    needed = needed_inputs(jax.make_jaxpr(forward)(random, *example).jaxpr)
    places = [path_name(path[:-1]) for path, _ in nnx.to_flat_state(random)]
    drawn = [place for place, is_needed in zip(places, needed, strict=False) if is_needed]
    if drawn:
        expected = "a network that draws no random numbers in evaluation mode"
        raise ArgumentError(
            "model", f"{expected}, for its file would draw the same", f"draws of {drawn[0]}"
        )


def _remove(part: Path) -> None:
    """Removes an unfinished file or folder, if there is one."""
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


def _compare(
    model: nnx.Module, call: Call, run: Forward, inputs: Mapping[str, Arguments]
) -> tuple[dict[str, float], float]:
    """Compares outputs: the largest difference for each input, and the largest output.

    Raises:
      ExportError: outputs that are missing, of another shape, or unlike by more than rounding.
    """
    network = jax.jit(lambda *x: call(nnx.clone(model), *x))  # it may write its variables
    differences, largest = {}, 0.0
    tolerance = _tolerance(network, next(iter(inputs.values())))
    for name, arguments in inputs.items():
        arguments = jax.tree.map(jnp.asarray, arguments)
        expected = [_wide(y) for y in jax.tree.leaves(network(*arguments))]
        found = [_wide(y) for y in jax.tree.leaves(run(*arguments))]
        shapes = [[y.shape for y in outputs] for outputs in (expected, found)]
        if shapes[0] != shapes[1]:
            raise ExportError(f"expected outputs of shapes {shapes[0]}, got {shapes[1]}")
        differences[name] = 0.0
        for a, b in zip(expected, found, strict=True):
            difference = np.subtract(a, b, where=a != b, out=np.zeros_like(a))  # not of infinities
            off = float(np.abs(difference).max(initial=0))
            peak = float(np.abs(a).max(initial=0, where=np.isfinite(a)))
            if not off <= tolerance * max(0.1, peak):  # of small outputs an absolute one
                sizes = ", ".join(str(x.shape) for x in jax.tree.leaves(arguments))
                told = f"differ from the network's by up to {off:.3g}"
                told = f"{told}, where they are up to {peak:.3g}"
                told = "or the network's, hold NaN" if np.isnan(off) else told
                raise ExportError(f"outputs on {name}, of shape {sizes}, {told}")
            differences[name], largest = max(differences[name], off), max(largest, peak)
    return differences, largest


def _wide(y: Any) -> np.ndarray:
    """An output as float32, or as complex numbers of that precision."""
    return np.asarray(y, np.complex64 if np.iscomplexobj(y) else np.float32)


def _tolerance(network: Forward, arguments: Arguments) -> float:
    """How far outputs may be off, as a share of the largest: more where narrow floats are made."""
    programs = all_programs(jax.make_jaxpr(network)(*arguments).jaxpr)
    made = (v.aval for _, program in programs for eqn in program.eqns for v in eqn.outvars)
    return 0.1 if any(getattr(aval, "dtype", None) in NARROW for aval in made) else 1e-3
