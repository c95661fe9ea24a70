"""Writes a saved network in a format that runs without this library, and tries what it has written.

python -m dhp_jax.export runs/resnet56 --format=onnx
python -m dhp_jax.export runs/resnet56 --format=stablehlo --which=best --out=resnet56.stablehlo
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
from dataclasses import dataclass
import functools
import importlib.util
import json
import logging
import os
from pathlib import Path
import shutil
import sys
from typing import Any

from flax import nnx
import jax
from jax import export as jax_export
import jax.numpy as jnp
from jaxtyping import Float, Shaped, UInt8
from ml_collections import ConfigDict
import numpy as np

from dhp_jax import checkpoint, command, durable
from dhp_jax.command import Saved
from dhp_jax.data import photographs
from dhp_jax.data.augment import normalize
from dhp_jax.data.stream import Stream
from dhp_jax.fold import Identity, fold
from dhp_jax.latent import walk
from dhp_jax.problems import problem
from dhp_jax.tasks import Classification
from dhp_jax.tasks.task import Data
from dhp_jax.tasks.whole import tiling
from dhp_jax.workdir import CONFIG

PLATFORMS = ("cpu", "cuda", "tpu")
OPSET = 21  # of ONNX; onnxruntime has it since 1.20
NEEDS = {  # packages that an extra of the same name brings
    "stablehlo": ("flatbuffers",),
    "onnx": ("jax2onnx", "onnxruntime"),
    "safetensors": (),
}
ENDINGS = {"stablehlo": ".stablehlo", "onnx": ".onnx", "safetensors": "-folded"}
REAL = 8  # test images that an export is tried on, at most

Shape = tuple[Any, ...]  # of a batch; texts are sizes that are free
Build = Callable[[nnx.Rngs], nnx.Module] | None
Forward = Callable[[Float[np.ndarray, "n *example"]], Any]


class ExportError(RuntimeError):
    """A file that does not compute what the network computes."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      path: the file, or the folder for safetensors.
      shape: of the inputs; texts are sizes that are free.
      folded: how many layers were folded into others.
      differences: by the name of the inputs it was tried on, the largest absolute difference of its
        outputs to the network's.
      largest: the largest absolute value among the network's outputs.
      fixed: why height and width are fixed, in one line; `None` where they are free, or were not
        to be.
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
    input_shape: tuple[int, ...],
    *,
    format: str,
    inputs: Mapping[str, Float[np.ndarray, "n *example"]] | None = None,
    notes: Mapping[str, Any] | None = None,
    build: Build = None,
) -> Exported:
    """Writes a network for inference, with BatchNorm folded where that is exact, and tries it.

    The batch size is free, and height and width too where the network and the format allow.

    Args:
      model: an ordinary or pruned network; left as it was.
      path: the file to write, or the folder for safetensors; a file, or a folder with a network
        only, is replaced once what was written has been tried.
      input_shape: of one example, `(height, width, channels)`.
      format: "stablehlo" (for cpu, cuda and tpu; `jax.export.deserialize` reads it), "onnx" (in
        float32) or "safetensors" (a folder that `dhp.load` reads).
      inputs: float32 batches by name on which the outputs of what was written are compared with the
        network's; two random examples if `None`. The first is tried at another size too, where the
        size is free.
      notes: JSON values that ONNX files carry as metadata, and folders as `dhp.save` keeps them.
      build: makes a network of your own class, unpruned, as for `dhp.load`; for safetensors.

    Returns:
      What was written, and how far its outputs were from the network's.

    Raises:
      ValueError: an unknown format or one whose packages are missing, a path where something else
        is, a network with latents, or one that cannot be written in this format. What was at `path`
        before is left as it was.
      ExportError: outputs differ by more than rounding; what was at `path` is left as it was.

    Example:
      >>> export(small, "small.onnx", (32, 32, 3), format="onnx").differences
      {'random': 1.4e-06, 'another size': 1.9e-06}
    """
    check_format(format)
    check_path(path, format)
    _check_build(model, format, build)
    path, input_shape = Path(path), tuple(input_shape)
    if inputs is None:
        random = np.random.default_rng(0).normal(size=(2, *input_shape))
        inputs = {"random": random.astype(np.float32)}
    model = nnx.clone(model)
    model.eval()
    write = WRITERS[format] if build is None else functools.partial(WRITERS[format], build=build)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = durable.unfinished(target)
    multiple = tiling(model).multiple
    shapes = list(_shapes(input_shape, multiple))
    if format == "safetensors":  # read as the network that it is, with all its freedom
        shapes = shapes[-1:]
    failure = None
    for shape in shapes:
        tried = dict(inputs)
        if "batch" not in shape[1:] and shape[1:] != input_shape:
            tried["another size"] = _enlarged(next(iter(inputs.values())), multiple)
        try:
            folded = fold(model, input_shape if format == "safetensors" else _sizes(shape))
            with _removed(part):
                run = write(folded, part, shape, notes or {})
                differences, largest = _compared(model, run, tried)
                durable.put(part, target)
        except Exception as error:  # whatever a forward pass or a converter may raise
            failure = error
            continue
        count = sum(isinstance(module, Identity) for _, _, module in walk(folded))
        fixed = _reason(failure) if failure is not None and shape == shapes[-1] else None
        return Exported(path, shape, count, differences, largest, fixed)
    if isinstance(failure, ExportError):
        raise failure
    what = _reason(failure)
    if "_DimExpr" in what:
        what += "; the batch size is symbolic, so write x.shape[0] for len(x)"
    raise ValueError(f"model: it cannot be written as {format}: {what}") from failure


def _reason(failure: Exception) -> str:
    """Why a shape was not written, in one line."""
    if isinstance(failure, ExportError):
        return str(failure).removeprefix("export: ")
    return f"{type(failure).__name__}: {failure}".splitlines()[0].rstrip(": ")


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
    """Raises a `ValueError` where something is that an export must not replace."""
    path = Path(path)
    if format == "safetensors" and not checkpoint.may_hold(path):
        raise ValueError(
            f"{argument}: expected no or an empty folder, or one with a network only, got {path}"
        )
    if format != "safetensors" and path.exists() and not path.is_file():
        what = "the folder" if path.is_dir() else "something else:"
        raise ValueError(f"{argument}: expected a file, or nothing there yet, got {what} {path}")


def _check_build(model: nnx.Module, format: str, build: Build) -> None:
    own = checkpoint.architecture_of(model).family is None
    if own and format == "safetensors" and build is None:
        raise ValueError("build: expected the function that builds this network, to read it back")
    if build is not None and format != "safetensors":
        raise ValueError(f"build: expected none for {format}, which is read without it")


def _shapes(input_shape: tuple[int, ...], multiple: int) -> Iterator[Shape]:
    """Shapes of a batch, the freest first."""
    if len(input_shape) == 3:
        yield "batch", "height", "width", input_shape[-1]
        if multiple > 1:
            yield "batch", f"{multiple}*height", f"{multiple}*width", input_shape[-1]
    yield "batch", *input_shape


def _sizes(shape: Shape) -> Shape:
    """A shape with symbolic sizes in place of texts."""
    return jax_export.symbolic_shape(", ".join(map(str, shape)))


def _enlarged(x: Float[np.ndarray, "n h w c"], multiple: int) -> Float[np.ndarray, "n h2 w2 c"]:
    """Images that go on periodically at the bottom and on the right."""
    return np.pad(x, ((0, 0), (0, multiple), (0, 2 * multiple), (0, 0)), mode="wrap")


@contextlib.contextmanager
def _removed(part: Path) -> Iterator[None]:
    """Removes an unfinished file or folder, before and after."""
    _remove(part)
    try:
        yield
    finally:
        _remove(part)


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


# Writing, and reading what was written


def _stablehlo(model: nnx.Module, path: Path, shape: Shape, notes: Mapping[str, Any]) -> Forward:
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda images: nnx.merge(graphdef, state, copy=True)(images))
    images = jax.ShapeDtypeStruct(_sizes(shape), jnp.float32)
    durable.write(path, jax_export.export(forward, platforms=PLATFORMS)(images).serialize())
    return jax.jit(jax_export.deserialize(bytearray(path.read_bytes())).call)


def _onnx(model: nnx.Module, path: Path, shape: Shape, notes: Mapping[str, Any]) -> Forward:
    import jax2onnx
    import onnxruntime

    with _quiet("onnx_ir", "jax2onnx"):
        made = jax2onnx.to_onnx(
            _in_float32(model),
            inputs=[shape],
            model_name=type(model).__name__,
            opset=OPSET,
            input_names=["images"],
        )
    # jax2onnx 0.17 moves transpositions about, but not the shapes noted of what lies between them.
    del made.graph.value_info[:]
    _round_down(made.graph)
    for name, value in notes.items():
        made.metadata_props.add(key=name, value=json.dumps(value))
    durable.write(path, made.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(None, {"images": np.asarray(images)})


def _round_down(graph: Any) -> None:
    """Quotients of sizes are rounded down, as in JAX: jax2onnx 0.17 has those below 0 rounded up.

    One below 0 is in the size that a convolution with strides and padding "SAME" puts out, by which
    a mean divides: -(-height // 2).
    """
    from onnx import helper

    for place, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "Div" and node.output[0].startswith("dimexpr"):
            size, divisor = node.input
            rest, whole = f"{node.output[0]}_rest", f"{node.output[0]}_whole"
            graph.node.insert(place, helper.make_node("Sub", [size, rest], [whole]))
            graph.node.insert(place, helper.make_node("Mod", [size, divisor], [rest]))
            node.input[0] = whole


def _safetensors(
    model: nnx.Module, path: Path, shape: Shape, notes: Mapping[str, Any], build: Build = None
) -> Forward:
    checkpoint.save(path, model, **notes)
    return jax.jit(checkpoint.load(path, build=build))


WRITERS: Mapping[str, Callable[..., Forward]] = {
    "stablehlo": _stablehlo,
    "onnx": _onnx,
    "safetensors": _safetensors,
}


def _in_float32(model: nnx.Module) -> nnx.Module:
    """The network with layers that compute in float32: onnxruntime has no other convolutions."""
    model = nnx.clone(model)
    for _, _, layer in walk(model):
        if getattr(layer, "dtype", None) in (jnp.bfloat16, jnp.float16):
            layer.dtype = jnp.float32
    return model


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Loggers of these names say nothing below an error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# Comparing


def _compared(
    model: nnx.Module, run: Forward, inputs: Mapping[str, Float[np.ndarray, "n *example"]]
) -> tuple[dict[str, float], float]:
    """The largest differences of outputs by name of the inputs, and the largest output.

    Raises:
      ExportError: outputs that are missing, of another shape, or unlike by more than rounding.
    """
    network = jax.jit(lambda x: model(x))
    differences, largest = {}, 0.0
    for name, x in inputs.items():
        expected = [np.asarray(y, np.float32) for y in jax.tree.leaves(network(jnp.asarray(x)))]
        found = [np.asarray(y, np.float32) for y in jax.tree.leaves(run(jnp.asarray(x)))]
        shapes = [[y.shape for y in outputs] for outputs in (expected, found)]
        if shapes[0] != shapes[1]:
            raise ExportError(f"export: expected outputs of shapes {shapes[0]}, got {shapes[1]}")
        pairs = list(zip(expected, found, strict=True))
        peak = max(float(np.abs(y).max()) for y in expected)
        differences[name] = max(float(np.abs(a - b).max()) for a, b in pairs)
        largest = max(largest, peak)
        if not differences[name] <= _tolerance(model) * max(1.0, peak):
            raise ExportError(
                f"export: outputs on {name}, of shape {x.shape}, differ from the network's by up "
                f"to {differences[name]:.3g}, where they are up to {peak:.3g}"
            )
    return differences, largest


def _tolerance(model: nnx.Module) -> float:
    """How far outputs may be off, as a share of the largest."""
    dtypes = (getattr(layer, "dtype", None) for _, _, layer in walk(model))
    return 0.1 if any(dtype in (jnp.bfloat16, jnp.float16) for dtype in dtypes) else 1e-3


# The command


def main(arguments: Sequence[str]) -> None:
    """Parses the arguments, writes the file and prints what became of it."""
    parser = command.parser(__doc__)
    parser.add_argument("--format", choices=NEEDS, required=True)
    parser.add_argument("--out", type=Path, help="file or folder; beside the network by default")
    parser.add_argument("--input-shape", type=_shape_of, help="32,32,3, if none is noted")
    options = parser.parse_args(arguments)
    check_format(options.format)
    if options.out is not None:
        check_path(options.out, options.format, "--out")
    saved = command.opened(options.model, options.which, options.build)
    if options.out is not None and options.out.resolve() == saved.path.resolve():
        raise ValueError(f"--out: expected another folder than the network's, got {options.out}")
    shape = options.input_shape or saved.input_shape
    if shape is None:
        raise ValueError(f"--input-shape: expected one, for {saved.path} notes none; got none")
    folder = options.format == "safetensors"
    made = export(
        saved.model,
        options.out or saved.path.with_name(saved.path.resolve().name + ENDINGS[options.format]),
        shape,
        format=options.format,
        inputs=_inputs(saved, shape, options.model),
        notes={**saved.notes, "input_shape": list(shape)},
        build=command.imported(options.build) if options.build and folder else None,
    )
    sizes = ", ".join(map(str, made.shape))
    print(f"{made.path}: takes ({sizes}) in float32; {made.folded} layers folded into others")
    if made.fixed is not None:
        print(f"height and width are fixed, because with free ones: {made.fixed}")
    told = ", ".join(f"{value:.2g} on {name}" for name, value in made.differences.items())
    print(f"largest difference to the network: {told}; its outputs are up to {made.largest:.4g}")


def _shape_of(text: str) -> tuple[int, ...]:
    """The type of a flag: "32,32,3"."""
    sizes = tuple(map(int, text.split(",")))
    if min(sizes) < 1:
        raise ValueError(text)
    return sizes


def _inputs(
    saved: Saved, shape: tuple[int, ...], folder: Path
) -> dict[str, Float[np.ndarray, "n h w c"]] | None:
    """Random and real inputs; `None` for a network that does not take images."""
    if len(shape) != 3 or shape[-1] not in (1, 3):
        return None
    random = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    inputs = {"random pixels": _prepared(saved, random)}
    if (folder / CONFIG).is_file():
        try:
            tested = _of_run(folder, shape)
        except ValueError as error:  # data that are no longer there
            print(f"test images cannot be read: {error}", file=sys.stderr)
        else:
            return inputs | {f"{len(tested)} test images": tested}
    images = _photographs(shape)
    return inputs | {f"{len(images)} photographs": _prepared(saved, images)}


def _prepared(saved: Saved, images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n h w c"]:
    """What the network takes for images; a guess where it is not noted how to normalise them."""
    if saved.task == "classification" and not {"mean", "std"} <= saved.notes.keys():
        return (images.astype(np.float32) - 127) / 64
    return np.asarray(saved.inputs(images))


def _of_run(folder: Path, shape: tuple[int, ...]) -> Float[np.ndarray, "n h w c"]:
    """Inputs from a run's test data."""
    asked = problem(ConfigDict(json.loads((folder / CONFIG).read_text())))
    data = asked.read("test")
    if isinstance(asked.task, Classification):
        return np.asarray(normalize(_first_images(data), asked.task.mean, asked.task.std))
    inputs = (asked.task.test_input(photo, i) for i, photo in enumerate(data[:REAL]))
    return np.stack([_cropped(image, shape) for image in inputs])


def _first_images(data: Data) -> UInt8[np.ndarray, "n h w c"]:
    if not isinstance(data, Stream):
        images, _ = data
        return images[np.arange(min(REAL, len(images)))]
    with dataclasses.replace(data, workers=0).in_order(min(REAL, data.size)) as batches:
        (images, _), _ = next(batches)
        return np.array(images)


def _photographs(shape: tuple[int, ...]) -> UInt8[np.ndarray, "n h w c"]:
    """Photographs that scikit-image ships, cut to a size."""
    shipped = photographs.load("photographs", channels=shape[-1], patch=1)
    return np.stack([_cropped(photo.target, shape) for photo in shipped.read("test")])


def _cropped(
    image: Shaped[np.ndarray, "h w c"], shape: tuple[int, ...]
) -> Shaped[np.ndarray, "..."]:
    """An image from its top left corner, which goes on periodically if it is too small."""
    height, width, _ = shape
    missing = (max(0, height - image.shape[0]), max(0, width - image.shape[1]))
    padded = np.pad(image, (*((0, n) for n in missing), (0, 0)), mode="wrap")
    return padded[:height, :width]


if __name__ == "__main__":
    sys.exit(command.run(main))
