"""How long until the first step of the search, and how large is its state?

Construction, tracing, compilation and the first step of every network at full width.

    python benchmarks/compile.py                        # every network
    python benchmarks/compile.py --networks resnet110   # some of them
    python benchmarks/compile.py --quick                # a smoke run of a few seconds

Every network is measured in a process of its own, so that none profits from another's compilations.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from pathlib import Path
import sys
import time

import jax
from record import write
from zoo import NETWORKS, search_step

NOTE = (
    "Seconds, each network in a fresh process, one run. State: parameters of network and "
    "hypernetworks with those of the optimizer, BatchNorm statistics."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--quick", action="store_true", help="a tiny network")
    parser.add_argument("--out", type=Path, help="folder for compile.json and compile.md")
    options = parser.parse_args()
    if options.quick:
        options.networks = ["resnet20"]
    rows = []
    for name in options.networks:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            rows.append(fresh.submit(measure, name, options.quick).result())
        print(as_table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    table = as_table(rows)
    print(table)
    if options.out is not None:
        write(options.out, "compile", "Time to the first search step", NOTE, rows, table)


def measure(name: str, quick: bool) -> dict:
    """Seconds to construct a network, to trace, compile and run its search step; its state."""
    network, batch = NETWORKS[name], 4 if quick else None
    started = time.perf_counter()
    model = network.build(width=0.25) if quick else network.build()
    constructed = time.perf_counter()
    advance, state, inputs = search_step(network, model, batch)
    size = sum(array.nbytes for array in jax.tree.leaves(state))
    begun = time.perf_counter()
    traced = advance.lower(state, *inputs)
    lowered = time.perf_counter()
    compiled = traced.compile()
    ready = time.perf_counter()
    jax.block_until_ready(compiled(state, *inputs))
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
    lines = [
        "| network | batch | construct, s | trace, s | compile, s | first step, s | all, s "
        "| state, MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    seconds = ("construct_s", "trace_s", "compile_s", "first_step_s", "total_s")
    for row in rows:
        cells = [f"{row[name]:.1f}" for name in seconds] + [f"{row['state_bytes'] / 1e6:,.0f}"]
        lines.append(f"| {row['network']} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
