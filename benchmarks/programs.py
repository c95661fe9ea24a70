"""What a compiled training step says of itself: memory, and what it sends devices and the host.

Read from XLA's own analysis and from the text of the optimised program, so that it depends on the
program and not on how busy a machine is.
"""

from dataclasses import dataclass
import math
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.stages import Compiled
import optax

from dhp_jax.backend.inference import tune
from dhp_jax.tasks.task import Data, Task
from dhp_jax.train.state import start

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
NAMES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")  # of what is there
TO_HOST = ("infeed", "outfeed", "send", "recv")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "c128": 128}

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<given>.*?)\)",
    re.MULTILINE,
)
_COMPUTATION = re.compile(r"^(ENTRY )?(%[\w.\-]+) .*? \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


@dataclass(frozen=True)
class Collective:
    """An operation in which devices exchange arrays.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: of the arrays that each device brings.
    """

    kind: str
    bytes: int


def collectives(text: str) -> list[Collective]:
    """The collective operations of a compiled program, each with the bytes of its operands.

    What a loop repeats is counted once.
    """
    instructions = list(_INSTRUCTION.finditer(text))
    types = {found["name"]: found["type"] for found in instructions}
    result = []
    for found in instructions:
        kind = found["op"].removesuffix("-start")
        if kind in COLLECTIVES:
            operands = re.findall(r"%([\w.\-]+)", found["given"])
            result.append(Collective(kind, sum(_bytes(types[name]) for name in operands)))
    return result


def host_transfers(text: str) -> list[str]:
    """The operations of a compiled program that talk to the host: feeds, sends, callbacks."""
    found = [i["op"] for i in _INSTRUCTION.finditer(text)]
    operations = [op for op in found if op.removesuffix("-done") in TO_HOST]
    targets = [t for t in _TARGET.findall(text) if re.search("callback|host", t, re.IGNORECASE)]
    return operations + targets


def operations(text: str) -> list[str]:
    """The operations that a device starts in a step: fusions, calls of libraries, copies, others.

    A step is the program or, if that has more of them, the body of a loop.
    """
    return [op for op in (i["op"] for i in _INSTRUCTION.finditer(_step(text))) if op not in NAMES]


def estimated_cycles(text: str) -> int:
    """What XLA's compiler for TPUs expects the operations of a step to take, in cycles."""
    return sum(map(int, _CYCLES.findall(_step(text))))


def _step(text: str) -> str:
    """The instructions of a step; see `operations`."""
    bodies = set(re.findall(r"\bbody=(%[\w.\-]+)", text))
    found = [body for entry, name, body in _COMPUTATION.findall(text) if entry or name in bodies]
    return max(found, key=lambda body: body.count("\n"))


def _bytes(shape: str) -> int:
    """The size of an array, or of a tuple of them, from its type in the program's text."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
        total += bits * math.prod(int(size) for size in sizes.split(",") if size) // 8
    return total


def size(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def peak_bytes(compiled: Compiled) -> int:
    """The most memory a program takes: arguments, results outside their place, all else."""
    analysis = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def residuals(model: nnx.Module, task: Task, data: Data, batch: int) -> list[jax.core.ShapedArray]:
    """What JAX keeps of a forward pass and its loss for the backward pass, but for parameters.

    Every array once, and the inputs too, but no constants.
    """
    graphdef, _, state = start(model, lambda params: optax.identity())

    def kept(params: Any, rest: Any, inputs: jax.Array, targets: Any) -> list[jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, nnx.State]:
            network = tune(nnx.merge(graphdef, *params, rest, copy=True))
            outputs = network(inputs)
            return jnp.mean(task.loss(outputs, targets)), nnx.state(network, nnx.Not(nnx.Param))

        _, backward, _ = jax.vjp(loss, params, has_aux=True)
        return jax.tree.leaves(backward)

    key, chosen = jax.random.key(0), jnp.arange(batch)
    examples = jax.eval_shape(
        lambda *given: task.augmented(key, task.examples(key, *given)), data, chosen
    )
    traced = jax.make_jaxpr(kept)(state.params, state.rest, *examples).jaxpr
    computed = set(map(id, traced.invars))  # constants take no memory
    for equation in traced.eqns:
        if any(id(v) in computed for v in equation.invars):
            computed.update(map(id, equation.outvars))
    parameters = traced.invars[: len(jax.tree.leaves((state.params, state.rest)))]
    counted = computed - set(map(id, parameters))
    return list({id(v): v.aval for v in traced.outvars if id(v) in counted}.values())


def activation_bytes(model: nnx.Module, task: Task, data: Data, batch: int) -> int:
    """Bytes of the `residuals`."""
    return sum(a.size * a.dtype.itemsize for a in residuals(model, task, data, batch))
