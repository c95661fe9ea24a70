"""What do several devices send each other in a step, and how well will many of them do?

Compiles the search step for 1 to 256 simulated devices, each with the batch of one device, and
reads from the program what its collective operations exchange. It does not run it.

From that, the efficiency on real devices is predicted (`predict`): the time of one device, divided
by that of a step on many. The time of one device is a roofline, the longer of

- 6 FLOPs for each multiply-accumulate of the forward pass (2 forward, 4 backward) at the peak rate,
- 4 times the activations (each is written and read again, and its gradient too) and 2 times the
  training state and the gradients (read and written) through the memory.

Every collective operation adds its steps' latency, and its bytes through the links as a ring moves
them. Nothing is taken to overlap, and devices compute at their full rate: both make the prediction
lower than what is to be expected. XLA may merge operations in another way on an accelerator.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --networks dncnn --devices 4 16
    python benchmarks/scaling.py --quick      # a smoke run of a few seconds
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
import math
import multiprocessing
import os

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from programs import Collective, activation_bytes, collectives, host_transfers, size
from record import parser, positive, publish_each, table_of
from zoo import NETWORKS, QUICK, search_step, task_on

import dhp_jax as dhp
from dhp_jax.mesh import make_mesh


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
NOTE = """Search step, float32, the same batch on each device. Exchanged: what each device brings to
the step's collective operations, read from the program compiled for so many simulated CPU devices
(not run); needed: the gradients of the plain network and the BatchNorm statistics. The rest is the
predicted efficiency, by a roofline without any overlap, from published peak rates and estimated
latencies (benchmarks/scaling.py spells it out): predictions, not measurements."""


def main() -> None:
    arguments = parser(__doc__, ["resnet20", "resnet56", "mobilenet_v2"])
    arguments.add_argument(
        "--devices", nargs="+", type=positive, default=[1, 4, 8, 32, 256], help="numbers of devices"
    )
    options = arguments.parse_args()
    if options.quick:
        options.networks, options.devices = [QUICK], [4]
    rows = (
        simulated(name, devices, options.quick)
        for name in options.networks
        for devices in options.devices
    )
    publish_each(options.out, "scaling", "Communication of a step", NOTE, rows, as_table)


def simulated(name: str, devices: int, quick: bool) -> dict:
    """`measure` in a process of its own, that has so many CPU devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(measure, name, quick).result()


def measure(name: str, quick: bool) -> dict:
    """What the step on all devices exchanges, and the efficiency that follows."""
    network, devices = NETWORKS[name], jax.device_count()
    model = network.build(width=0.25) if quick else network.build()
    batch = 4 if quick else network.batch
    mesh = make_mesh()
    advance, state, inputs = search_step(network, model, batch * devices, mesh)
    if mesh is not None:  # lowering needs shapes and places, not arrays
        state, inputs = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                jnp.shape(x), jnp.asarray(x).dtype, sharding=NamedSharding(mesh, PartitionSpec())
            ),
            (state, inputs),
        )
    text = advance.lower(jax.tree.leaves(state), *inputs).compile().as_text()
    exchanged = collectives(text)
    plain = dhp.prune(model)
    gradients = size(nnx.state(plain, nnx.Param))
    work = Work(
        flops=6.0 * batch * dhp.measure_cost(plain, network.trained_shape).flops,
        activations=activation_bytes(plain, *task_on(network, batch), batch),
        state=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)),
        gradients=gradients,
    )
    return {
        "network": network.label,
        "devices": devices,
        "batch": batch,
        "exchanged_bytes": sum(c.bytes for c in exchanged),
        "needed_bytes": gradients + size(nnx.state(plain, nnx.BatchStat)),
        "operations": dict(Counter(c.kind for c in exchanged)),
        "host_transfers": len(host_transfers(text)),
        "efficiency": {h.name: predict(h, devices, work, exchanged) for h in HARDWARE},
    }


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
    names = [hardware.name for hardware in HARDWARE]
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
