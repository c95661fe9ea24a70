"""What do XLA's compilers make of the search step on a GPU and a TPU, where there is neither?

Compiles the step, as runs take it on the accelerator (many in a loop), and the plain network's, for
a device that need not be there, and reads from the programs

- how many operations a step starts on a GPU: kernels of XLA's, calls of cuDNN and cuBLAS, copies.
  Each takes a microsecond or more, however small; where many are small, that is what a step takes,
- how many cycles the TPU's compiler expects a step to take, by its own model of the device,
- the peak of memory, and as a share of what `memory.py` says is needed,
- the operations that ask the host for something, or tell it.

The compilers come with JAX's plug-ins: `pip install -e ".[cuda]"`, `".[tpu]"` or both; they need no
driver. Algorithms of cuDNN are not chosen by trying them out, which takes a GPU.

    python benchmarks/compiled.py --target h200
    python benchmarks/compiled.py --target v5e --networks resnet20    # minutes each
    python benchmarks/compiled.py --target h200 --quick               # a smoke run of a minute
"""

from flax import nnx
import jax
from jax.sharding import SingleDeviceSharding
from jax.stages import Compiled
from memory import needed_bytes
from programs import estimated_cycles, host_transfers, operations, peak_bytes, size
from record import parser, positive, publish_each, table_of
from targets import TARGETS, Target, compiling_for, prepare
from zoo import NETWORKS, QUICK, Network, search_step, shaped

import dhp_jax as dhp
from dhp_jax.backend.platform import steps_per_dispatch
from dhp_jax.tasks.task import Data
from dhp_jax.train.state import TrainState

NAMES = ("resnet20", "resnet56", "resnet110", "mobilenet_v2", "dncnn", "srresnet_x4")
NOTE = """Programs compiled for a device that was not there, and not run. {} Peak: memory in
MB, with up to 50,000 images or a photograph to train on; peak / needed: without these, of what the
search cannot do without (see memory.md). To host: transfers to and from it and calls of it, but not
the question whether a loop goes on."""
STARTED = "Started: operations that a step starts, each of which takes a GPU a microsecond or more."
CYCLES = "Mcycles: millions of cycles that the compiler expects a step to take."


def main() -> None:
    arguments = parser(__doc__, NAMES)
    arguments.add_argument("--target", choices=TARGETS, default="h200")
    arguments.add_argument("--batches", nargs="+", type=positive, default=[64])
    options = arguments.parse_args()
    if options.quick:
        options.networks, options.batches = [QUICK], [4]
    prepare()
    target = TARGETS[options.target]
    try:
        target.devices(1)
    except ValueError as error:
        arguments.error(f"--target: {error}")
    rows = (
        measure(NETWORKS[name], batch, target, options.quick)
        for name in options.networks
        for batch in options.batches
    )
    name, title = f"compiled_{options.target}", f"The search step, compiled for one {target.label}"
    note = NOTE.format(CYCLES if target.platform == "tpu" else STARTED)
    publish_each(options.out, name, title, note, rows, as_table)


def measure(network: Network, batch: int, target: Target, quick: bool) -> dict:
    """What the search step and the plain one come to."""
    model = network.build(width=0.25) if quick else network.build()
    plain = dhp.prune(model)
    row = {"network": network.label, "batch": batch, "target": target.label}
    for kind, trained in (("search", model), ("plain", plain)):
        program, state, data = compiled(network, trained, batch, target)
        text, needed = program.as_text(), needed_bytes(network, plain, state, batch)
        row |= {
            f"{kind}_operations": len(operations(text)),
            f"{kind}_cycles": estimated_cycles(text),
            f"{kind}_peak_bytes": peak_bytes(program),
            f"{kind}_host_transfers": len(host_transfers(text)),
            f"{kind}_needed_bytes": sum(needed.values()),
            f"{kind}_data_bytes": size(data),
        }
    return row


def compiled(
    network: Network, model: nnx.Module, batch: int, target: Target
) -> tuple[Compiled, TrainState, Data]:
    """A program of as many steps as runs give the device at once, the state and data it takes."""
    (device,) = target.devices(1)
    with compiling_for(target):
        advance, state, inputs = search_step(
            network, model, batch, steps=steps_per_dispatch(), images=network.examples
        )
        given = shaped((jax.tree.leaves(state), inputs), SingleDeviceSharding(device))
        return advance.lower(given[0], *given[1]).compile(), state, inputs[0]


def as_table(rows: list[dict]) -> str:
    cycles = bool(rows[0]["search_cycles"])
    columns = ("batch", f"search, {'Mcycles' if cycles else 'started'}", "plain", "search / plain")
    more = ("peak", "plain peak", "peak / needed", "to host")
    cells = []
    for row in rows:
        search, plain = (
            row[f"{kind}_{'cycles' if cycles else 'operations'}"] for kind in ("search", "plain")
        )
        without_data = row["search_peak_bytes"] - row["search_data_bytes"]
        cells.append(
            (
                row["network"],
                row["batch"],
                *(f"{n / 1e6:.2f}" if cycles else n for n in (search, plain)),
                f"{search / plain:.2f}",
                *(f"{row[f'{kind}_peak_bytes'] / 1e6:,.1f}" for kind in ("search", "plain")),
                f"{without_data / row['search_needed_bytes']:.2f}",
                row["search_host_transfers"],
            )
        )
    return table_of(["network", *(f">{c}" for c in (*columns, *more))], cells)


if __name__ == "__main__":
    main()
