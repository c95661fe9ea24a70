"""Which multiples do widths of pruned layers want to be of?

Prunes networks to one share of their FLOPs with widths as they fall and rounded to multiples of
several numbers, and times the forward passes of all of them in turn. All fit the same budget, so a
rounded network has no more FLOPs than the one beside it: what it gains is the hardware's. The
numbers that are best here are what `multiple_of="auto"` chooses (`budgets/rounding.py`).

    python benchmarks/widths.py                        # a few networks, float32 and bfloat16
    python benchmarks/widths.py --networks vgg16 unet --dtypes float32
    python benchmarks/widths.py --quick                # a smoke run of a few seconds
"""

import argparse
from collections.abc import Iterator
import math
import statistics

import jax
from record import parser, positive, progress, publish_each, table_of, with_quartiles
from zoo import NETWORKS, QUICK, Network, queued

import dhp_jax as dhp
from dhp_jax.budgets.timing import forward_pass, quartiles, time_in_turn

FLOPS = 0.5
NOTE = (
    f"Networks pruned to {FLOPS:.0%} of their FLOPs, widths rounded within that budget. Time: of "
    "the rounded network as a share of that with widths as they fall, medians of pairs of "
    "interleaved forward passes with their quartiles. Rounding pays where the upper quartile "
    "is below 1, costs where the lower one is above. The last rows have the "
    "geometric means, of numbers that all networks can keep within the budget."
)
ALL = "geometric mean"


def main() -> None:
    arguments = parser(
        __doc__, ("resnet20", "densenet40", "mobilenet_v2", "dncnn"), 15, "passes that count"
    )
    arguments.add_argument("--multiples", nargs="+", type=positive, default=[2, 4, 8, 16])
    arguments.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = arguments.parse_args()
    if options.quick:
        options.networks, options.rounds = [QUICK], 3
        options.multiples, options.dtypes = [2], ["float32"]
    publish_each(options.out, "widths", "Widths that hardware likes", NOTE, told(options), as_table)


def told(options: argparse.Namespace) -> Iterator[dict]:
    """The rows of all networks, and at the end those of their means."""
    rows = []
    for dtype in options.dtypes:
        for network in (NETWORKS[name] for name in options.networks):
            for batch in network.forward_batches(options.quick):
                found = measure(network, batch, dtype, options)
                rows += found
                yield from found
    yield from means(rows)


def measure(network: Network, batch: int, dtype: str, options: argparse.Namespace) -> list[dict]:
    """Times of networks with rounded widths, run in turn with that of any width; a row for each."""
    changes = {"width": 0.5, "min_channels": 1} if options.quick else {}
    model = network.build(dtype=dtype, **changes)
    small = {}
    for multiple in (1, *options.multiples):
        try:
            small[multiple] = dhp.prune_to(model, network.input_shape, multiple, flops=FLOPS)
        except ValueError as error:  # too wide for its latents, or for the budget
            progress(f"{network.label}: left out: {error}")
    each = queued(batch)
    passes = {m: forward_pass(net, network.input_shape, batch, each) for m, net in small.items()}
    seconds = time_in_turn(passes, options.rounds, each=each)
    whole = dhp.measure_cost(model, network.input_shape).flops
    return [
        {
            "platform": jax.default_backend(),
            "dtype": dtype,
            "network": network.label,
            "batch": batch,
            "multiple_of": multiple,
            "flops_ratio": dhp.measure_cost(small[multiple], network.input_shape).flops / whole,
            "ms": quartiles([1e3 * s for s in seconds[multiple]]),
            "time": quartiles(
                [t / any_width for t, any_width in zip(seconds[multiple], seconds[1], strict=True)]
            ),
        }
        for multiple in small
        if multiple > 1
    ]


def means(rows: list[dict]) -> list[dict]:
    """The geometric mean of the times of every dtype and multiple that all networks can keep."""
    kinds = dict.fromkeys((row["platform"], row["dtype"], row["multiple_of"]) for row in rows)
    found = []
    for platform, dtype, multiple in kinds:
        times = [
            row["time"]["median"]
            for row in rows
            if (row["platform"], row["dtype"], row["multiple_of"]) == (platform, dtype, multiple)
        ]
        if len(times) < len({(r["network"], r["batch"]) for r in rows if r["dtype"] == dtype}):
            continue
        mean = math.exp(statistics.fmean(map(math.log, times)))
        kind = {"platform": platform, "dtype": dtype, "multiple_of": multiple}
        found.append({"network": ALL, **kind, "batch": None, "mean": mean, "of": len(times)})
    return found


def as_table(rows: list[dict]) -> str:
    columns = ("network", "dtype", ">batch", ">widths of", ">FLOPs", ">ms", ">time", "rounding")
    return table_of(columns, [_cells(row) for row in rows])


def _cells(row: dict) -> tuple:
    named = row["network"], row["dtype"]
    if row["network"] == ALL:
        return (*named, "", row["multiple_of"], "", "", f"{row['mean']:.2f}", "")
    return (
        *(*named, row["batch"], row["multiple_of"], f"{row['flops_ratio']:.1%}"),
        f"{row['ms']['median']:.1f}",
        with_quartiles(row["time"], ".2f"),
        "pays" if row["time"]["high"] < 1 else "costs" if row["time"]["low"] > 1 else "neither",
    )


if __name__ == "__main__":
    main()
