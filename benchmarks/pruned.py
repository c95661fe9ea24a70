"""Are pruned networks faster, not only smaller?

Times the forward pass of every network, whole and pruned to some shares of its FLOPs, with widths
as they fall and rounded: interleaved, in one process. The ideal speed-up is the inverse of the
share of the FLOPs. Which channels go does not matter for the time; those of untrained latents do
here. With `--runtime onnxruntime` the networks are exported as ONNX first; that needs the extra
`onnx`.

    python benchmarks/pruned.py                        # every network
    python benchmarks/pruned.py --networks vgg16 unet  # some of them
    python benchmarks/pruned.py --flops 0.5 --multiples 1 16
    python benchmarks/pruned.py --runtime onnxruntime --networks resnet20
    python benchmarks/pruned.py --quick                # a smoke run of a few seconds
"""

import argparse
from collections.abc import Callable, Sequence
import itertools
from pathlib import Path
import tempfile

from flax import nnx
import onnx_files
from record import parser, positive, progress, publish_each, table_of, with_quartiles
from zoo import NETWORKS, QUICK, Network, queued

import dhp_jax as dhp
from dhp_jax.budgets import timing
from dhp_jax.budgets.timing import quartiles, time_in_turn
from dhp_jax.export import export

NOTE = (
    "Median of interleaved forward passes, quartiles of the speed-up of each pair in parentheses. "
    "The ideal speed-up is the inverse of the share of the FLOPs; of ideal: what share of it is "
    "reached. Widths: whether those of pruned networks are multiples of a number."
)


def main() -> None:
    arguments = parser(__doc__, NETWORKS, 15, "passes of each kind that count")
    arguments.add_argument(
        "--flops", nargs="+", type=share, default=[0.75, 0.5, 0.25], help="shares that are kept"
    )
    arguments.add_argument(
        "--multiples", nargs="+", type=positive, default=[1, 8], help="of pruned widths"
    )
    arguments.add_argument("--batches", nargs="+", type=positive, help="of images: one, and many")
    arguments.add_argument("--runtime", choices=FORWARD, default="xla")
    options = arguments.parse_args()
    if options.quick:
        options.networks, options.rounds = [QUICK], 3
        options.flops, options.multiples = [0.5], [1, 2]
    name, title, note = "pruned", "Speed of pruned networks", NOTE
    if options.runtime == "onnxruntime":
        import onnxruntime

        name, title = "pruned_onnxruntime", f"{title} in onnxruntime"
        note = f"onnxruntime {onnxruntime.__version__} on the CPU. {onnx_files.SPINNING} {NOTE}"
    rows = itertools.chain.from_iterable(
        measure(NETWORKS[network], batch, options)
        for network in options.networks
        for batch in options.batches or NETWORKS[network].forward_batches(options.quick)
    )
    publish_each(options.out, name, title, note, rows, as_table)


def share(text: str) -> float:
    """A number of the command line between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def measure(network: Network, batch: int, options: argparse.Namespace) -> list[dict]:
    """Times of the whole network and of every pruned one, run in turn; a row for each of these."""
    model = network.build(width=0.5, min_channels=1) if options.quick else network.build()
    smaller = {}
    for flops, multiple in itertools.product(options.flops, options.multiples):
        try:
            small = dhp.prune_to(model, network.input_shape, multiple, flops=flops)
        except ValueError as error:  # too wide for its latents, or for the budget
            progress(f"{network.label}: left out: {error}")
        else:
            smaller[flops, multiple] = small
    networks = {"whole": dhp.prune(model), **smaller}
    cost = {name: dhp.measure_cost(m, network.input_shape).flops for name, m in networks.items()}
    forward, each = FORWARD[options.runtime], queued(batch)
    passes = {name: forward(m, network.input_shape, batch, each) for name, m in networks.items()}
    seconds = time_in_turn(passes, options.rounds, each=each)
    rows = []
    for flops, multiple in smaller:
        times = seconds[flops, multiple]
        pairs = zip(seconds["whole"], times, strict=True)
        speedup = quartiles([whole / small for whole, small in pairs])
        ratio = cost[flops, multiple] / cost["whole"]
        rows.append(
            {
                "network": network.label,
                "input_shape": network.input_shape,
                "batch": batch,
                "asked_flops": flops,
                "multiple_of": multiple,
                "flops_ratio": ratio,
                "whole_ms": quartiles([1e3 * s for s in seconds["whole"]]),
                "pruned_ms": quartiles([1e3 * s for s in times]),
                "images_per_second": quartiles([batch / s for s in times]),
                "speedup": speedup,
                "share_of_ideal": speedup["median"] * ratio,
            }
        )
    return rows


def in_onnxruntime(
    model: nnx.Module, input_shape: Sequence[int], batch: int, times: int
) -> Callable[[], None]:
    """A function that runs a network so many times over a batch in onnxruntime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        export(model, path, tuple(input_shape), format="onnx")
        run = onnx_files.forward(path, batch, input_shape)

    def several() -> None:
        for _ in range(times):
            run()

    return several


FORWARD = {"xla": timing.forward_pass, "onnxruntime": in_onnxruntime}


def as_table(rows: list[dict]) -> str:
    columns = (
        *("network", ">batch", ">FLOPs", ">widths", ">whole, ms", ">pruned, ms", ">images/s"),
        *(">ideal", ">speed-up", ">of ideal"),
    )
    cells = [
        (
            row["network"],
            row["batch"],
            f"{row['flops_ratio']:.1%}",
            f"of {row['multiple_of']}" if row["multiple_of"] > 1 else "any",
            f"{row['whole_ms']['median']:.1f}",
            f"{row['pruned_ms']['median']:.1f}",
            f"{row['images_per_second']['median']:,.0f}",
            f"{1 / row['flops_ratio']:.2f}",
            with_quartiles(row["speedup"], ".2f"),
            f"{row['share_of_ideal']:.0%}",
        )
        for row in rows
    ]
    return table_of(columns, cells)


if __name__ == "__main__":
    main()
