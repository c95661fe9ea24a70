"""Are pruned networks faster in onnxruntime?

Writes networks as ONNX, whole and pruned to half their FLOPs with widths as they fall and with
multiples of 8, and times them on the CPU: interleaved, in one process. Which channels go does not
matter for the time; those of untrained latents do here. Needs the extra `onnx`.

    python benchmarks/latency_onnx.py                        # every network
    python benchmarks/latency_onnx.py --networks resnet20    # some of them
    python benchmarks/latency_onnx.py --quick                # a smoke run of a few seconds
"""

import argparse
from collections.abc import Callable
from pathlib import Path
import sys
import tempfile
import time

from flax import nnx
import numpy as np
import onnxruntime
from record import quartiles, write
from zoo import NETWORKS, Network

import dhp_jax as dhp
from dhp_jax.export import export

MULTIPLES = (1, 8)
NOTE = (
    f"onnxruntime {onnxruntime.__version__} on the CPU with its default options. Median of "
    "interleaved passes, quartiles of the speed-up of each pair in parentheses. The ideal speed-up "
    "is the inverse of the share of the FLOPs."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=["resnet20", "resnet56", "mobilenet_v2"],
    )
    parser.add_argument("--flops", type=float, default=0.5, help="share that pruned networks keep")
    parser.add_argument("--rounds", type=int, default=31, help="passes of each kind that count")
    parser.add_argument("--quick", action="store_true", help="one network, few rounds")
    parser.add_argument("--out", type=Path, help="folder for latency_onnx.json and latency_onnx.md")
    options = parser.parse_args()
    if options.quick:
        options.networks, options.rounds = ["resnet20"], 3
    rows = []
    for name in options.networks:
        rows += measure(NETWORKS[name], options)
        print(*as_table(rows[-4:]).splitlines()[-4:], sep="\n", file=sys.stderr, flush=True)
    table = as_table(rows)
    print(table)
    if options.out is not None:
        title = "Latency of pruned networks in onnxruntime"
        write(options.out, "latency_onnx", title, NOTE, rows, table)


def measure(network: Network, options: argparse.Namespace) -> list[dict]:
    """Milliseconds of the networks, run in turn, and the speed-ups of each round; per batch."""
    model = network.build()
    shape = network.input_shape
    networks = {0: dhp.prune(model)}  # the whole one, then by the multiple of its widths
    for multiple in MULTIPLES:
        networks[multiple] = dhp.prune_to(model, shape, multiple, flops=options.flops)
    flops = {key: dhp.measure_cost(each, shape).flops for key, each in networks.items()}
    runs = {key: forward(each, shape) for key, each in networks.items()}
    rows = []
    for batch in (1, 4 if options.quick else 64):
        x = np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32)
        seconds = {key: [] for key in runs}
        for run in runs.values():  # warms up
            run(x)
            run(x)
        for _ in range(options.rounds):
            for key, run in runs.items():
                started = time.perf_counter()
                run(x)
                seconds[key].append(time.perf_counter() - started)
        for multiple in MULTIPLES:
            pairs = zip(seconds[0], seconds[multiple], strict=True)
            rows.append(
                {
                    "network": network.label,
                    "input_shape": shape,
                    "batch": batch,
                    "multiple_of": multiple,
                    "flops_ratio": flops[multiple] / flops[0],
                    "whole_ms": quartiles([1e3 * s for s in seconds[0]]),
                    "small_ms": quartiles([1e3 * s for s in seconds[multiple]]),
                    "speedup": quartiles([whole / small for whole, small in pairs]),
                }
            )
    return rows


def forward(model: nnx.Module, shape: tuple[int, ...]) -> Callable[[np.ndarray], list[np.ndarray]]:
    """A function that runs a network over a batch in onnxruntime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        export(model, path, shape, format="onnx")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x})


def as_table(rows: list[dict]) -> str:
    lines = [
        "| network | input | batch | widths | whole, ms | pruned, ms | FLOPs | ideal | speed-up |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        speedup = row["speedup"]
        cells = [
            row["network"],
            "x".join(map(str, row["input_shape"])),
            row["batch"],
            "any" if row["multiple_of"] == 1 else f"multiples of {row['multiple_of']}",
            f"{row['whole_ms']['median']:.2f}",
            f"{row['small_ms']['median']:.2f}",
            f"{row['flops_ratio']:.1%}",
            f"{1 / row['flops_ratio']:.2f}",
            f"{speedup['median']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f})",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
