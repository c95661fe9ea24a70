"""Are pruned networks faster, not only smaller?

Times the forward pass of every network, whole and pruned to half its FLOPs: interleaved, in one
process. Which channels go does not matter for the time; those of untrained latents do here.

    python benchmarks/latency.py                        # every network
    python benchmarks/latency.py --networks vgg16 unet  # some of them
    python benchmarks/latency.py --multiple-of=8        # with rounded widths
    python benchmarks/latency.py --quick                # a smoke run of a few seconds
"""

import argparse
from pathlib import Path
import sys

from record import quartiles, write
from zoo import NETWORKS, Network

import dhp_jax as dhp
from dhp_jax.timing import forward, in_turn

NOTE = (
    "Median of interleaved forward passes, quartiles of the speed-up of each pair in parentheses. "
    "The ideal speed-up is the inverse of the share of the FLOPs."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--flops", type=float, default=0.5, help="share that pruned networks keep")
    parser.add_argument("--multiple-of", type=int, default=1, help="of pruned widths")
    parser.add_argument("--rounds", type=int, default=15, help="passes of each kind that count")
    parser.add_argument("--quick", action="store_true", help="a tiny network, few rounds")
    parser.add_argument("--out", type=Path, help="folder for latency.json and latency.md")
    options = parser.parse_args()
    if options.quick:
        options.networks, options.rounds = ["resnet20"], 3
    rows = []
    for name in options.networks:
        rows += measure(NETWORKS[name], options)
        print(*as_table(rows[-2:]).splitlines()[-2:], sep="\n", file=sys.stderr, flush=True)
    table = as_table(rows)
    print(table)
    if options.out is not None:
        rounded = f"_multiple_of_{options.multiple_of}" if options.multiple_of > 1 else ""
        write(options.out, f"latency{rounded}", "Latency of pruned networks", NOTE, rows, table)


def measure(network: Network, options: argparse.Namespace) -> list[dict]:
    """Milliseconds of both networks, run in turn, and the speed-up of each pair; per batch."""
    model = network.build(width=0.25, min_channels=1) if options.quick else network.build()
    small = dhp.prune_to(model, network.input_shape, options.multiple_of, flops=options.flops)
    whole = dhp.prune(model)
    costs = [dhp.measure_cost(m, network.input_shape).flops for m in (whole, small)]
    large = 4 if options.quick or network.patch or network.input_shape[0] > 64 else 64
    rows = []
    for batch in (1, large):
        both = {"whole": whole, "small": small}
        passes = {name: forward(m, network.input_shape, batch) for name, m in both.items()}
        seconds = in_turn(passes, options.rounds)
        pairs = zip(seconds["whole"], seconds["small"], strict=True)
        rows.append(
            {
                "network": network.label,
                "input_shape": network.input_shape,
                "batch": batch,
                "flops_ratio": costs[1] / costs[0],
                "whole_ms": quartiles([1e3 * s for s in seconds["whole"]]),
                "small_ms": quartiles([1e3 * s for s in seconds["small"]]),
                "speedup": quartiles([whole / small for whole, small in pairs]),
            }
        )
    return rows


def as_table(rows: list[dict]) -> str:
    lines = [
        "| network | input | batch | whole, ms | pruned, ms | FLOPs | ideal | speed-up |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        speedup = row["speedup"]
        cells = [
            row["network"],
            "x".join(map(str, row["input_shape"])),
            row["batch"],
            f"{row['whole_ms']['median']:.1f}",
            f"{row['small_ms']['median']:.1f}",
            f"{row['flops_ratio']:.1%}",
            f"{1 / row['flops_ratio']:.2f}",
            f"{speedup['median']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f})",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
