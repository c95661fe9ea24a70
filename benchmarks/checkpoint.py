"""What share of a run's time do its checkpoints take?

Stretches of search steps, some of which begin with a checkpoint that is written while they go on,
against stretches without: interleaved, in one process.

    python benchmarks/checkpoint.py                       # from small states to large ones
    python benchmarks/checkpoint.py --networks resnet110
    python benchmarks/checkpoint.py --quick               # a smoke run of a few seconds
"""

import statistics
import tempfile
import time

import jax
from record import parser, publish_each, table_of
from zoo import NETWORKS, QUICK, search_step

from dhp_jax.config.fields import default
from dhp_jax.train.checkpoints import Checkpoints

NAMES = ("resnet20", "resnet56", "resnet110", "mobilenet_v2", "dncnn", "unet")
NOTE = (
    "Medians. A checkpoint holds parameters, the optimizer's state and BatchNorm statistics; "
    "training waits while it is copied, and goes on while it is written. Lost: how much longer a "
    "stretch of steps takes that begins with a checkpoint. Share: what is lost, of the time from "
    "one checkpoint to the next by default."
)


def main() -> None:
    options = parser(__doc__, NAMES, 5, "stretches of each kind").parse_args()
    if options.quick:
        options.networks, options.rounds = [QUICK], 2
    rows = (measure(name, options.rounds, options.quick) for name in options.networks)
    publish_each(options.out, "checkpoint", "What checkpoints cost", NOTE, rows, as_table)


def measure(name: str, rounds: int, quick: bool) -> dict:
    """Seconds that training waits for a checkpoint, that writing it takes, and that it loses."""
    network = NETWORKS[name]
    model = network.build(width=0.25) if quick else network.build()
    advance, state, inputs = search_step(network, model, 4 if quick else None)
    arrays = jax.tree.leaves(state)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, number = Checkpoints(folder, seconds=default().checkpoint.seconds), 0

        def stretch(steps: int, *, saving: bool) -> tuple[float, float]:
            """Seconds that so many steps take, and for which they wait at first."""
            nonlocal arrays, number
            started = time.perf_counter()
            if saving:
                number += 1
                checkpoints.save(number, arrays, {}, wait=False)
            waited = time.perf_counter() - started
            for _ in range(steps):
                arrays, _ = jax.block_until_ready(advance(arrays, *inputs))
            return time.perf_counter() - started, waited

        stretch(2, saving=False)  # compiles
        step, _ = stretch(1, saving=False)
        written = []
        for _ in range(2):  # the first one makes the folder
            started = time.perf_counter()
            number += 1
            checkpoints.save(number, arrays, {}, wait=True)
            written.append(time.perf_counter() - started)
        steps = 1 + round(2 * written[-1] / step)
        times = [
            (*stretch(steps, saving=True), stretch(steps, saving=False)[0]) for _ in range(rounds)
        ]
        checkpoints.close()
        apart = checkpoints.interval
    waited = statistics.median(waited for _, waited, _ in times)
    lost = statistics.median(with_one - without for with_one, _, without in times)
    return {
        "network": network.label,
        "state_bytes": sum(array.nbytes for array in arrays),
        "step_s": step,
        "waited_s": waited,
        "written_s": written[-1],
        "lost_s": lost,
        "apart_s": apart,
        "share": lost / apart,
    }


def as_table(rows: list[dict]) -> str:
    columns = ("state, MB", "step, s", "waits, s", "written in, s", "lost, s", "every, s", "share")
    cells = [
        (
            row["network"],
            f"{row['state_bytes'] / 1e6:,.1f}",
            *(f"{row[f'{name}_s']:.2f}" for name in ("step", "waited", "written", "lost")),
            f"{row['apart_s']:.0f}",
            f"{100 * row['share']:.2f} %",
        )
        for row in rows
    ]
    return table_of(["network", *(f">{column}" for column in columns)], cells)


if __name__ == "__main__":
    main()
