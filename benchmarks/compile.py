"""How long until the first step: construction, tracing and compilation of the search step.

    python benchmarks/compile.py             # ResNet-20, 56 and 110, batch 64
    python benchmarks/compile.py --quick     # a smoke run of a few seconds

Every network is measured in a process of its own, so that none profits from another's compilations.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from pathlib import Path
import time

from flax import nnx
from record import write
from step import batch_of, search_step

import dhp_jax as dhp

NOTE = "Seconds, each network in a fresh process; one run."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56, 110])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a tiny network")
    parser.add_argument("--out", type=Path, help="folder for compile.json and compile.md")
    options = parser.parse_args()
    if options.quick:
        options.depths, options.batch = [20], 4
    width = 0.25 if options.quick else 1.0
    rows = []
    for depth in options.depths:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            rows.append(fresh.submit(measure, depth, width, options.batch).result())
    table = as_table(rows)
    print(table)
    if options.out is not None:
        write(options.out, "compile", "Time to the first search step", NOTE, rows, table)


def measure(depth: int, width: float, batch: int) -> dict:
    """Seconds to construct a network, and to trace and compile its search step."""
    started = time.perf_counter()
    model = dhp.models.build("resnet", depth=depth, width=width, rngs=nnx.Rngs(0))
    constructed = time.perf_counter()
    advance, state = search_step(model, batch)
    begun = time.perf_counter()
    traced = advance.lower(state, *batch_of(batch))
    lowered = time.perf_counter()
    traced.compile()
    return {
        "model": f"ResNet-{depth}",
        "width": width,
        "batch": batch,
        "construct_s": constructed - started,
        "trace_s": lowered - begun,
        "compile_s": time.perf_counter() - lowered,
    }


def as_table(rows: list[dict]) -> str:
    lines = [
        "| network | batch | construct, s | trace, s | compile, s |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"{row[name]:.1f}" for name in ("construct_s", "trace_s", "compile_s")]
        lines.append(f"| {row['model']} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
