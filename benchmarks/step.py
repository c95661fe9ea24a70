"""How much do the hypernetworks and the proximal step add to a training step?

Times the search step against the step of the same network without latents: interleaved, in one
process, on the same data. Both are the library's own `make_step`, augmentation included.

    python benchmarks/step.py                # ResNet-20 and ResNet-56, batch 64
    python benchmarks/step.py --quick        # a smoke run of a few seconds
"""

import argparse
from collections.abc import Callable
from pathlib import Path
import time

from flax import nnx
import jax
from record import quartiles, write
from zoo import NETWORKS, Network, search_step

import dhp_jax as dhp

NOTE = "Median of interleaved steps, quartiles in parentheses; the ratio is that of each pair."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind that count")
    parser.add_argument("--quick", action="store_true", help="a tiny network, few rounds")
    parser.add_argument("--out", type=Path, help="folder for step.json and step.md")
    options = parser.parse_args()
    if options.quick:
        options.depths, options.batch, options.rounds = [20], 4, 3
    rows = [measure(depth, options) for depth in options.depths]
    table = as_table(rows)
    print(table)
    if options.out is not None:
        write(
            options.out, "step", "Search step against the plain network's step", NOTE, rows, table
        )


def measure(depth: int, options: argparse.Namespace) -> dict:
    """Seconds of both steps, run in turn, and the ratio of each pair."""
    width = 0.25 if options.quick else 1.0
    network = NETWORKS[f"resnet{depth}"]
    model = network.build(width=width)
    steps = {
        "search": stepper(network, model, options.batch),
        "plain": stepper(network, dhp.prune(model), options.batch),
    }
    for step in steps.values():  # compiles, then warms up
        step()
        step()
    seconds = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    ratios = [s / p for s, p in zip(seconds["search"], seconds["plain"], strict=True)]
    return {
        "model": f"ResNet-{depth}",
        "width": width,
        "batch": options.batch,
        "rounds": options.rounds,
        "search_ms": quartiles([1e3 * s for s in seconds["search"]]),
        "plain_ms": quartiles([1e3 * s for s in seconds["plain"]]),
        "ratio": quartiles(ratios),
    }


def stepper(network: Network, model: nnx.Module, batch: int) -> Callable[[], None]:
    """A function that takes one training step, and waits for it."""
    advance, state, inputs = search_step(network, model, batch)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(advance(state, *inputs))

    return step


def as_table(rows: list[dict]) -> str:
    lines = [
        "| network | batch | search step, ms | plain step, ms | search / plain |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            "{median:{form}} ({low:{form}} to {high:{form}})".format(form=form, **row[name])
            for name, form in (("search_ms", ".0f"), ("plain_ms", ".0f"), ("ratio", ".3f"))
        ]
        lines.append(f"| {row['model']} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
