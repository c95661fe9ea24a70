"""The compiled search step: what it keeps in memory, what crosses devices, what the host does."""

import dataclasses
import os
from pathlib import Path
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

import dhp_jax as dhp
from dhp_jax.core import hypernet

pytestmark = pytest.mark.usefixtures("compiled_as_for_users")

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.append(BENCHMARKS)
from memory import measure  # noqa: E402
from programs import (  # noqa: E402
    Collective,
    collectives,
    estimated_cycles,
    host_transfers,
    operations,
    residuals,
    size,
)
from zoo import NETWORKS, search_step, task_on  # noqa: E402

TEXT = """
ENTRY %main (p: f32[3,4], q: bf16[8]) -> f32[3,4] {
  %p = f32[3,4]{1,0} parameter(0)
  %q = bf16[8]{0} parameter(1)
  %all-reduce.1 = (f32[3,4]{1,0}, bf16[8]{0}) all-reduce(%p, %q), to_apply=%add
  %element = f32[3,4]{1,0} get-tuple-element(%all-reduce.1), index=0
  %start = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%q), dimensions={0}
  %done = bf16[32]{0} all-gather-done(%start)
  ROOT %moved = f32[3,4]{1,0} collective-permute(%element), source_target_pairs={{0,1}}
}
"""


def test_collectives_are_found_with_the_bytes_that_each_device_brings():
    assert collectives(TEXT) == [
        Collective("all-reduce", 48 + 16),
        Collective("all-gather", 16),
        Collective("collective-permute", 48),
    ]
    assert host_transfers(TEXT) == []


def test_what_the_host_is_asked_for_is_found():
    def asks(x):
        jax.debug.callback(print, x.sum())
        return 2 * x

    def text(function):
        return jax.jit(function).lower(jnp.ones(3)).compile().as_text()

    assert host_transfers(text(asks))
    assert not host_transfers(text(lambda x: 2 * x))
    assert host_transfers("  %t = token[] outfeed(%x, %token), outfeed_shape=f32[]") == ["outfeed"]


def test_every_array_of_the_training_state_that_a_step_reads_is_donated():
    network = dataclasses.replace(NETWORKS["dncnn"], patch=16)
    advance, state, inputs = search_step(network, network.build(depth=3, width=0.25), 4)
    compiled = advance.lower(jax.tree.leaves(state), *inputs).compile()
    read = size(state) - size(state.remains)  # what would survive, which each step tells anew
    assert compiled.memory_analysis().alias_size_in_bytes == read


def embedded(model, arrays):
    """Those of some arrays that are as large as a kernel's embedding, or as all it is summed of."""
    layers = [layer for _, layer in nnx.iter_graph(model) if isinstance(layer, dhp.HyperConv)]
    shapes = {array.shape for layer in layers for array in (layer.w1, layer.w2)}
    return [a for a in arrays if a.shape in shapes]


@pytest.mark.parametrize("name", ["resnet20", pytest.param("mobilenet_v1", marks=pytest.mark.slow)])
def test_the_backward_pass_keeps_no_embedding(name, monkeypatch):
    network = NETWORKS[name]
    model = network.build(width=0.25)
    task, data = task_on(network, 4)
    assert not embedded(model, residuals(model, task, data, 4))
    # What JAX keeps of the same formula without a backward pass of its own is found.
    monkeypatch.setattr(hypernet, "_generate_jitted", hypernet._kernel)
    assert embedded(model, residuals(model, task, data, 4))


@pytest.mark.slow
def test_a_search_step_of_a_mobilenet_needs_little_more_than_training_cannot_do_without():
    network = NETWORKS["mobilenet_v1"]
    assert measure(network, quick=True)["ratio"] <= 1.25


def test_residuals_are_what_layers_need_for_their_gradients():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 5, (3, 3), use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
            self.head = nnx.Linear(5, 200, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    network = NETWORKS["mobilenet_v1"]
    kept = residuals(Net(nnx.Rngs(0)), *task_on(network, 2), 2)
    large = sorted(f"{a.dtype}{a.shape}" for a in kept if a.size > 2000)
    assert large == ["bool(2, 64, 64, 5)", "float32(2, 64, 64, 3)", "float32(2, 64, 64, 5)"]


CHUNK = """
import sys
from flax import nnx
import jax
import dhp_jax as dhp
from dhp_jax.distributed.mesh import make_mesh, place
from programs import collectives, host_transfers, size
from zoo import Network, search_step
network = Network("DenseNet-7", "densenet", {"depth": 7, "growth": 8}, (8, 8, 3))
along_model = int(sys.argv[1])
mesh = make_mesh(4 // along_model, along_model)
assert mesh.size == 4
model = network.build()
advance, state, (data, order, *numbers, key) = search_step(network, model, 16, mesh, steps=2)
state, data, order, key = place(mesh, (state, data, order, key))
text = advance.lower(jax.tree.leaves(state), data, order, *numbers, key).compile().as_text()
assert " while(" in text
assert not host_transfers(text), host_transfers(text)
found = collectives(text)
plain = dhp.prune(model)
gradients, statistics = (size(nnx.state(plain, kind)) for kind in (nnx.Param, nnx.BatchStat))
exchanged = sum(c.bytes for c in found)
more = 16  # loss and errors
if along_model == 1:
    assert {c.kind for c in found} == {"all-reduce"}, found
else:  # kernels that lie in parts, and what these have of the gradients of latents
    more += gradients + size(nnx.state(model, dhp.LatentVector)) * 8
assert 0 <= exchanged - gradients - statistics <= more, (exchanged, found)
"""


@pytest.mark.slow
@pytest.mark.parametrize("along_model", [1, 2])
def test_a_chunk_of_steps_exchanges_gradients_and_statistics_and_does_not_ask_the_host(along_model):
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    paths = os.pathsep.join([BENCHMARKS, *sys.path])
    subprocess.run(
        [sys.executable, "-c", CHUNK, str(along_model)],
        env=os.environ | flags | {"PYTHONPATH": paths},
        check=True,
    )


PROGRAM = """HloModule jit_steps, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %add = f32[4]{0} add(%p, %p)
}

%step (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %carry = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[4]{0} get-tuple-element(%carry), index=1
  %fusion = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"70"}
  %call = (f32[4]{0}, u8[0]{0}) custom-call(%fusion), custom_call_target="__cudnn$convForward"
  %y = f32[4]{0} get-tuple-element(%call), index=0
  %copy = s32[] copy(%i), backend_config={"window_config":{},"estimated_cycles":"5"}
  ROOT %result = (s32[], f32[4]{0}) tuple(%copy, %y)
}

%more (carry.1: (s32[], f32[4])) -> pred[] {
  %carry.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x.1: f32[4]) -> f32[4] {
  %x.1 = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[4]{0}) tuple(%zero, %x.1)
  %while = (s32[], f32[4]{0}) while(%begin), condition=%more, body=%step
  ROOT %end = f32[4]{0} get-tuple-element(%while), index=1
}
"""


def test_operations_of_a_step_are_those_that_a_turn_of_the_loop_starts():
    assert operations(PROGRAM) == ["fusion", "custom-call", "copy"]
    assert estimated_cycles(PROGRAM) == 75
    without_loop = PROGRAM.replace("body=%step", "body=%gone")
    assert operations(without_loop) == ["while"]
    assert estimated_cycles(without_loop) == 0


def test_operations_of_a_program_without_a_loop_are_all_that_it_starts():
    text = jax.jit(lambda x: jnp.sort(jnp.cumsum(x, 0) @ x)[::2]).lower(jnp.ones((8, 8))).compile()
    started = operations(text.as_text())
    assert started
    assert not set(started) & {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
