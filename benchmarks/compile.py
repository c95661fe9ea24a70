"""How long until the first step of the search, and how large is its state?

Construction, tracing, compilation and the first step of every network at full width.

    python benchmarks/compile.py                        # every network
    python benchmarks/compile.py --networks resnet110   # some of them
    python benchmarks/compile.py --quick                # a smoke run of a few seconds

Every network is measured in a process of its own, so that none profits from another's compilations.
"""

from concurrent.futures import ProcessPoolExecutor
import multiprocessing
import os
import time

import jax
from record import parser, publish_each, table_of
from zoo import NETWORKS, QUICK, search_step

NOTE = (
    "Seconds, each network in a fresh process, one run. State: parameters of network and "
    "hypernetworks with those of the optimizer, BatchNorm statistics."
)


def main() -> None:
    options = parser(__doc__, NETWORKS).parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes share a GPU
    names = [QUICK] if options.quick else options.networks
    rows = (in_fresh_process(name, options.quick) for name in names)
    publish_each(options.out, "compile", "Time to the first search step", NOTE, rows, as_table)


def in_fresh_process(name: str, quick: bool) -> dict:
    """`measure` where nothing has been compiled yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(measure, name, quick).result()


def measure(name: str, quick: bool) -> dict:
    """Seconds to construct a network, to trace, compile and run its search step; its state."""
    network, batch = NETWORKS[name], 4 if quick else None
    started = time.perf_counter()
    model = network.build(width=0.25) if quick else network.build()
    constructed = time.perf_counter()
    advance, state, inputs = search_step(network, model, batch)
    arrays = jax.tree.leaves(state)
    size = sum(array.nbytes for array in arrays)
    begun = time.perf_counter()
    traced = advance.lower(arrays, *inputs)
    lowered = time.perf_counter()
    compiled = traced.compile()
    ready = time.perf_counter()
    jax.block_until_ready(compiled(arrays, *inputs))
    ended = time.perf_counter()
    return {
        "network": network.label,
        "batch": batch or network.batch,
        "construct_s": constructed - started,
        "trace_s": lowered - begun,
        "compile_s": ready - lowered,
        "first_step_s": ended - ready,
        "total_s": ended - started,
        "state_bytes": size,
    }


def as_table(rows: list[dict]) -> str:
    parts = ("construct", "trace", "compile", "first_step", "total")
    columns = [f">{part.replace('_', ' ')}, s" for part in parts]
    cells = [
        (
            row["network"],
            row["batch"],
            *(f"{row[f'{part}_s']:.1f}" for part in parts),
            f"{row['state_bytes'] / 1e6:,.0f}",
        )
        for row in rows
    ]
    return table_of(["network", ">batch", *columns, ">state, MB"], cells)


if __name__ == "__main__":
    main()
