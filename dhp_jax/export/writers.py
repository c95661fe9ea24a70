"""One writer for each format of exported networks."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import json
from pathlib import Path
from typing import Any

from flax import linen, nnx
import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from dhp_jax import files
from dhp_jax.activity import quiet
from dhp_jax.artifact import reading, writing
from dhp_jax.core.latent import walk
from dhp_jax.export.sizes import Arguments
from dhp_jax.models.linen import FromLinen
from dhp_jax.tracing.programs import Call

PLATFORMS = ("cpu", "cuda", "tpu")
NARROW = (jnp.bfloat16, jnp.float16)
INPUT = "images"  # of an ONNX file
OPSET = 21  # of ONNX; onnxruntime has it since 1.20

NEEDS = {  # packages that an extra of the same name brings
    "stablehlo": ("flatbuffers",),
    "onnx": ("jax2onnx", "onnxruntime"),
    "safetensors": (),
}

Build = Callable[[nnx.Rngs], nnx.Module] | None
Forward = Callable[..., Any]  # of the arguments of a forward pass


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


def input_names(arguments: Arguments) -> list[str]:
    """Names of the arrays among the arguments.

    `images` for one of floats, the keys of one dict, or the places: `input_0`, `input_1.key`.
    """
    leaves, _ = jax.tree.flatten_with_path(arguments)
    if len(leaves) == 1 and jnp.issubdtype(leaves[0][1].dtype, jnp.floating):
        return [INPUT]
    names = [jax.tree_util.keystr(place, simple=True, separator=".") for place, _ in leaves]
    if isinstance(arguments[0], dict) and len(arguments) == 1:
        return [name.removeprefix("0.") for name in names]
    return [f"input_{name}" for name in names]


def output_names(model: nnx.Module, arguments: Arguments, call: Call) -> list[str]:
    """Names of the outputs: `output`, or the places of several, as keys of a dict."""
    places, _ = jax.tree.flatten_with_path(nnx.eval_shape(call, model, *arguments))
    named = [jax.tree_util.keystr(place, simple=True, separator=".") for place, _ in places]
    names, taken = [], input_names(arguments)
    for name in named:
        free = f"output_{name}" if name.isdigit() or name in taken else name or "output"
        names.append(free if free not in names else f"{free}_{len(names)}")
    return names


def _stablehlo(
    model: nnx.Module, path: Path, arguments: Arguments, call: Call, notes: Mapping[str, Any]
) -> Forward:
    forward = jax.jit(_function(model, call))
    files.write(path, jax_export.export(forward, platforms=PLATFORMS)(*arguments).serialize())
    return jax.jit(jax_export.deserialize(bytearray(path.read_bytes())).call)


def _onnx(
    model: nnx.Module, path: Path, arguments: Arguments, call: Call, notes: Mapping[str, Any]
) -> Forward:
    import jax2onnx
    import onnxruntime

    forward = _function(_in_float32(model), call)
    leaves, places = jax.tree.flatten(arguments)
    names = input_names(arguments)
    of_linen = any(isinstance(module, FromLinen) for _, _, module in walk(model))
    written = _read_by_linen() if of_linen else {}

    def apart(*inputs: Any) -> Any:  # jax2onnx 0.17 names an array once
        with _restored(written):
            outputs, structure = jax.tree.flatten(forward(*jax.tree.unflatten(places, inputs)))
        seen = [*inputs, *outputs]
        apart = [
            jnp.array(y) if any(y is x for x in seen[: n + len(inputs)]) else y
            for n, y in enumerate(outputs)
        ]
        return jax.tree.unflatten(structure, apart)

    with quiet("onnx_ir", "jax2onnx"), linen.intercept_methods(_widened):
        made = jax2onnx.to_onnx(
            apart,
            inputs=[_spec(leaf) for leaf in leaves],
            model_name=type(model).__name__,
            opset=OPSET,
            input_names=names,
            output_names=output_names(model, arguments, call),
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

    def run(*given: Any) -> Any:
        arrays = map(np.asarray, jax.tree.leaves(given))
        return session.run(None, dict(zip(names, arrays, strict=True)))

    return run


def _spec(leaf: jax.ShapeDtypeStruct) -> Any:
    """An input as jax2onnx takes it: texts for free sizes, and a bare shape for float32."""
    shape = tuple(size if isinstance(size, int) else str(size) for size in leaf.shape)
    return shape if leaf.dtype == jnp.float32 else jax.ShapeDtypeStruct(shape, leaf.dtype)


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
    model: nnx.Module,
    path: Path,
    arguments: Arguments,
    call: Call,
    notes: Mapping[str, Any],
    build: Build = None,
) -> Forward:
    writing.save(path, model, **notes)
    return jax.jit(functools.partial(call, reading.load(path, build=build)))


WRITERS: Mapping[str, Callable[..., Forward]] = {
    "stablehlo": _stablehlo,
    "onnx": _onnx,
    "safetensors": _safetensors,
}


def _in_float32(model: nnx.Module) -> nnx.Module:
    """The network with layers that compute in float32: onnxruntime has no other convolutions."""
    model = nnx.clone(model)
    for _, _, layer in walk(model):
        if getattr(layer, "dtype", None) in NARROW:
            layer.dtype = jnp.float32
    return model


def _widened(method: Callable[..., Any], args: Any, options: Any, context: Any) -> Any:
    """Calls a method of a module of flax.linen that computes in float32."""
    if getattr(context.module, "dtype", None) in NARROW:
        object.__setattr__(context.module, "dtype", jnp.float32)  # it is frozen
    return method(*args, **options)


def _read_by_linen() -> dict[tuple[Any, str], Any]:
    """What jax2onnx may replace that modules of flax.linen need; `None` for what is inherited."""
    kinds = [kind for kind in vars(linen).values() if isinstance(kind, type)]
    calls = [(kind, "__call__") for kind in kinds if issubclass(kind, linen.Module)]
    return {(owner, name): vars(owner).get(name) for owner, name in [(jnp, "shape"), *calls]}


@contextlib.contextmanager
def _restored(written: Mapping[tuple[Any, str], Any]) -> Iterator[None]:
    """Within the block, functions are those that were written.

    jax2onnx 0.17 replaces `__call__` by functions that `linen.intercept_methods` does not see, and
    so `dhp_jax.FromLinen` would not get the shapes that its arrays have.
    """
    there = {place: vars(place[0]).get(place[1]) for place in written}
    replaced = {place: it for place, it in there.items() if it is not written[place]}
    for owner, name in replaced:
        if written[owner, name] is None:
            delattr(owner, name)
        else:
            setattr(owner, name, written[owner, name])
    try:
        yield
    finally:
        for (owner, name), it in replaced.items():
            setattr(owner, name, it)


def _function(model: nnx.Module, call: Call) -> Forward:
    """A network as a function of its inputs, which may be traced though it writes its variables."""
    graphdef, state = nnx.split(model)
    return lambda *arguments: call(nnx.merge(graphdef, state, copy=True), *arguments)
