"""One writer for each format of exported networks."""

from collections.abc import Callable, Mapping
import json
from pathlib import Path
from typing import Any

from flax import nnx
import jax
from jax import export as jax_export
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from dhp_jax import files
from dhp_jax.activity import quiet
from dhp_jax.artifact import reading, writing
from dhp_jax.core.latent import walk

PLATFORMS = ("cpu", "cuda", "tpu")
OPSET = 21  # of ONNX; onnxruntime has it since 1.20

NEEDS = {  # packages that an extra of the same name brings
    "stablehlo": ("flatbuffers",),
    "onnx": ("jax2onnx", "onnxruntime"),
    "safetensors": (),
}

Shape = tuple[Any, ...]  # of a batch; texts are sizes that are free
Build = Callable[[nnx.Rngs], nnx.Module] | None
Forward = Callable[[Float[np.ndarray, "n *example"]], Any]


class ExportError(RuntimeError):
    """Raised for a file that does not compute what the network computes.

    Args:
      reason: how its outputs differ, in words.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"export: {self.reason}"


def symbolic_sizes(shape: Shape) -> Shape:
    """A shape with symbolic sizes in place of texts."""
    return jax_export.symbolic_shape(", ".join(map(str, shape)))


def extend_images(x: Float[np.ndarray, "n h w c"], multiple: int) -> Float[np.ndarray, "n h2 w2 c"]:
    """Extends images periodically at the bottom and on the right."""
    return np.pad(x, ((0, 0), (0, multiple), (0, 2 * multiple), (0, 0)), mode="wrap")


def output_names(model: nnx.Module, shape: Shape) -> list[str]:
    """Names of the outputs for a batch: `output`, or the places of several, as keys of a dict."""
    images = jax.ShapeDtypeStruct(symbolic_sizes(shape), jnp.float32)
    places, _ = jax.tree.flatten_with_path(nnx.eval_shape(lambda model, x: model(x), model, images))
    named = [jax.tree_util.keystr(place, simple=True, separator=".") for place, _ in places]
    return [f"output_{name}" if name.isdigit() else name or "output" for name in named]


def _stablehlo(model: nnx.Module, path: Path, shape: Shape, notes: Mapping[str, Any]) -> Forward:
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda images: nnx.merge(graphdef, state, copy=True)(images))
    images = jax.ShapeDtypeStruct(symbolic_sizes(shape), jnp.float32)
    files.write(path, jax_export.export(forward, platforms=PLATFORMS)(images).serialize())
    return jax.jit(jax_export.deserialize(bytearray(path.read_bytes())).call)


def _onnx(model: nnx.Module, path: Path, shape: Shape, notes: Mapping[str, Any]) -> Forward:
    import jax2onnx
    import onnxruntime

    with quiet("onnx_ir", "jax2onnx"):
        made = jax2onnx.to_onnx(
            _in_float32(model),
            inputs=[shape],
            model_name=type(model).__name__,
            opset=OPSET,
            input_names=["images"],
            output_names=output_names(model, shape),
        )
    # jax2onnx 0.17 moves transpositions about, but not the shapes noted of what lies between them.
    del made.graph.value_info[:]
    _round_down(made.graph)
    for name, value in notes.items():
        made.metadata_props.add(key=name, value=json.dumps(value))
    files.write(path, made.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(None, {"images": np.asarray(images)})


def _round_down(graph: Any) -> None:
    """Makes quotients of sizes round down, as in JAX; jax2onnx 0.17 rounds negative ones up.

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
    writing.save(path, model, **notes)
    return jax.jit(reading.load(path, build=build))


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
