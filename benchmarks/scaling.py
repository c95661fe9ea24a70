"""What do several devices send each other in a step, and how well will many of them do?

Compiles the search step for 1 to 256 devices, each with the batch of one device, and reads from the
program what its collective operations exchange. It does not run it, and no device has to be there:
without `--target` they are simulated on the CPU, with it the compiler is the accelerator's own (see
`targets.py` for what has to be installed). With `--model` so many devices divide the hypernetworks
and have the same batch.

From that, the efficiency on real devices is predicted (`predict`): the time of one device, divided
by that of a step on many. The time of one device is a roofline, the longer of

- 6 FLOPs for each multiply-accumulate of the forward pass (2 forward, 4 backward) at the peak rate,
- 4 times the activations (each is written and read again, and its gradient too) and 2 times the
  training state and the gradients (read and written) through the memory.

Every collective operation adds its steps' latency, and its bytes through the links as a ring moves
them. Nothing is taken to overlap, and devices compute at their full rate: both make the prediction
lower than what is to be expected. With `--model` nothing is predicted: collective operations are
among some devices then, and others repeat what these compute.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --target h200 --devices 1 4 8
    python benchmarks/scaling.py --devices 4 --model 2    # 2 along each axis of the mesh
    python benchmarks/scaling.py --networks dncnn --devices 4 16
    python benchmarks/scaling.py --quick      # a smoke run of a few seconds
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
import contextlib
from dataclasses import dataclass
import math
import multiprocessing
import os
from typing import Any

from flax import nnx
import jax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.stages import Compiled
from programs import Collective, activation_bytes, collectives, host_transfers, size
from record import parser, positive, publish_each, table_of
from targets import TARGETS, compiling_for, prepare
from zoo import NETWORKS, QUICK, Network, search_step, shaped, task_on

import dhp_jax as dhp
from dhp_jax.distributed.mesh import make_mesh, shardings
from dhp_jax.train.state import TrainState


@dataclass(frozen=True)
class Hardware:
    """A kind of device by the figures that its maker publishes, and how it is connected.

    Attributes:
      name: for tables.
      flops: each second, of float32 numbers at XLA's default precision.
      memory: bytes each second.
      links: number of devices up to which, bytes each second that a device can send, and seconds
        from one device to the next, which are estimates.
    """

    name: str
    flops: float
    memory: float
    links: tuple[tuple[int, float, float], ...]


HARDWARE = (
    # cloud.google.com/tpu/docs/v5e: 197 TFLOP/s in bfloat16, 819 GB/s, ICI 400 GB/s both ways.
    Hardware("TPU v5e", 197e12, 819e9, ((256, 200e9, 1e-6),)),
    # NVIDIA's data sheets of H100 and H200 SXM: 989 TFLOP/s in TF32 with sparsity, thus 494.5
    # without; 3.35 and 4.8 TB/s; NVLink 900 GB/s both ways between 8. Beyond: 400 Gbit/s each.
    Hardware("H100", 494.5e12, 3.35e12, ((8, 450e9, 2.5e-6), (256, 50e9, 5e-6))),
    Hardware("H200", 494.5e12, 4.8e12, ((8, 450e9, 2.5e-6), (256, 50e9, 5e-6))),
)
NOTE = """Search step, float32, the same batch on each device{}. Exchanged: what each device brings
to the step's collective operations, read from the program compiled for so many {} (not run);
needed: the gradients of the plain network and the BatchNorm statistics.{}"""
PREDICTED = """ The rest is the predicted
efficiency, by a roofline without any overlap, from published peak rates and estimated latencies
(benchmarks/scaling.py spells it out): predictions, not measurements."""
DEVICES = (1, 4, 8, 32, 256)


def main() -> None:
    arguments = parser(__doc__, ["resnet20", "resnet56", "mobilenet_v2"])
    arguments.add_argument("--devices", nargs="+", type=positive, help="numbers of devices")
    arguments.add_argument(
        "--model", type=positive, default=1, help="devices along which hypernetworks are divided"
    )
    arguments.add_argument("--target", choices=TARGETS, help="compile for these devices")
    options = arguments.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if options.quick:
        options.networks, options.devices = [QUICK], [4]
    options.devices = options.devices or [n for n in DEVICES if n % options.model == 0]
    check(arguments, options)
    rows = (
        in_process(measure, devices, name, devices, options.model, options.target, options.quick)
        for name in options.networks
        for devices in options.devices
    )
    along = f"model{options.model}" if options.model > 1 else None
    name = "_".join(filter(None, ("scaling", options.target, along)))
    kind = TARGETS[options.target].label if options.target else "simulated CPU devices"
    each = f" along `data`, hypernetworks divided among {options.model}" if along else ""
    note = NOTE.format(each, kind, "" if along else PREDICTED)
    publish_each(options.out, name, "Communication of a step", note, rows, as_table)


def check(arguments: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with an error where nothing can be compiled or predicted for what is asked for."""
    most = max(most for hardware in HARDWARE for most, _, _ in hardware.links)
    if not options.devices:
        arguments.error(
            f"--model: expected a divisor of {DEVICES[1]} to {DEVICES[-1]} devices, or --devices; "
            f"got {options.model}"
        )
    for devices in options.devices:
        if devices > most:
            arguments.error(f"--devices: expected at most {most}, got {devices}")
        if devices % options.model:
            arguments.error(
                f"--model: expected a divisor of {devices}, which is one of --devices; "
                f"got {options.model}"
            )
    if options.target:
        # In a process of its own: a plug-in may serve one at a time.
        reason = in_process(refusal, 1, options.target, max(options.devices))
        if reason:
            arguments.error(f"--target: {reason}")


def refusal(target: str, devices: int) -> str | None:
    """Why nothing can be compiled for so many devices, if so."""
    prepare()
    try:
        TARGETS[target].devices(devices)
    except ValueError as error:
        return str(error)
    return None


def in_process(function: Callable[..., Any], devices: int, *given: Any) -> Any:
    """What a function returns in a process of its own, which has so many CPU devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(function, *given).result()


def measure(name: str, devices: int, model_axis: int, target: str | None, quick: bool) -> dict:
    """What the step on all devices exchanges, and the efficiency that follows."""
    if target:
        prepare()
    network = NETWORKS[name]
    model = network.build(width=0.25) if quick else network.build()
    batch = 4 if quick else network.batch
    program, state = program_of(network, model, batch, devices, model_axis, target)
    text = program.as_text()
    exchanged = collectives(text)
    plain = dhp.prune(model)
    gradients = size(nnx.state(plain, nnx.Param))
    work = Work(
        flops=6.0 * batch * dhp.measure_cost(plain, network.trained_shape).flops,
        activations=activation_bytes(plain, *task_on(network, batch), batch),
        state=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)),
        gradients=gradients,
    )
    of_interest = [
        hardware
        for hardware in HARDWARE
        if model_axis == 1 and (target is None or hardware.name == TARGETS[target].label)
    ]
    return {
        "network": network.label,
        "devices": devices,
        "model_axis": model_axis,
        "target": target and TARGETS[target].label,
        "batch": batch,
        "exchanged_bytes": sum(c.bytes for c in exchanged),
        "needed_bytes": gradients + size(nnx.state(plain, nnx.BatchStat)),
        "operations": dict(Counter(c.kind for c in exchanged)),
        "host_transfers": len(host_transfers(text)),
        "efficiency": {h.name: predict(h, devices, work, exchanged) for h in of_interest},
    }


def program_of(
    network: Network,
    model: nnx.Module,
    batch: int,
    devices: int,
    model_axis: int,
    target: str | None,
) -> tuple[Compiled, TrainState]:
    """The program of a step on so many devices, and the state it takes."""
    along_data = devices // model_axis
    there = TARGETS[target].devices(devices) if target else jax.devices()[:devices]
    mesh = make_mesh(along_data, model_axis, there)
    with compiling_for(TARGETS[target]) if target else contextlib.nullcontext():
        advance, state, inputs = search_step(network, model, batch * along_data, mesh)
        if mesh is None:
            everywhere = in_place = SingleDeviceSharding(there[0])
        else:
            everywhere = NamedSharding(mesh, PartitionSpec())
            in_place = shardings(mesh, state)
        # Lowering needs shapes and places, not arrays.
        arrays = jax.tree.leaves(shaped(state, in_place))
        return advance.lower(arrays, *shaped(inputs, everywhere)).compile(), state


@dataclass(frozen=True)
class Work:
    """What one device does in a step: FLOPs, and bytes of what it holds meanwhile."""

    flops: float
    activations: int
    state: int
    gradients: int


def predict(hardware: Hardware, devices: int, work: Work, exchanged: Sequence[Collective]) -> float:
    """The share of a device's time in which it computes; see the docstring of this file."""
    moved = 4 * work.activations + 2 * (work.state + work.gradients)
    computing = max(work.flops / hardware.flops, moved / hardware.memory)
    rate, latency = next((rate, s) for most, rate, s in hardware.links if devices <= most)
    hops = 2 * math.ceil(math.log2(devices))
    exchanging = sum(hops * latency + sent(c, devices) / rate for c in exchanged)
    return computing / (computing + exchanging)


def sent(collective: Collective, devices: int) -> float:
    """Bytes that each device sends for a collective operation among all, in a ring."""
    others = (devices - 1) / devices
    factor = {"all-reduce": 2 * others, "all-gather": devices - 1, "collective-permute": 1}
    return collective.bytes * factor.get(collective.kind, others)


def as_table(rows: list[dict]) -> str:
    names = list(rows[0]["efficiency"])
    cells = [
        (
            row["network"],
            row["devices"],
            row["batch"],
            f"{row['exchanged_bytes'] / 1e6:,.3f}",
            f"{row['needed_bytes'] / 1e6:,.3f}",
            sum(row["operations"].values()),
            row["host_transfers"],
            *(f"{row['efficiency'][name]:.0%}" for name in names),
        )
        for row in rows
    ]
    columns = ("devices", "batch each", "exchanged, MB", "needed, MB", "operations", "to host")
    return table_of(["network", *(f">{c}" for c in (*columns, *names))], cells)


if __name__ == "__main__":
    main()
