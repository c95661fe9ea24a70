"""Does the input keep up with the model?

On the device: the time that taking and augmenting the examples of a batch needs, beside that of a
search step that contains it. Streamed: how many images a second the reading processes give from a
folder of JPEG files (500x375, resized to what the network takes), how many the search step takes,
and for which share of the time a search that streams them waits for its input.

    python benchmarks/input.py                           # from small images to large ones
    python benchmarks/input.py --workers 1 2 4 8 16
    python benchmarks/input.py --quick                   # a smoke run of a few seconds
"""

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import os
from pathlib import Path
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from PIL import Image
from record import parser, positive, publish_each, table_of, with_quartiles
from zoo import NETWORKS, QUICK, Network, queued, search_step, task_on

from dhp_jax.budgets.timing import quartiles, time_in_turn
from dhp_jax.data import Stream
from dhp_jax.data import load as load_data
from dhp_jax.data.stream import Batch

NOTE = (
    "On the device: median of interleaved calls, quartiles in parentheses; the share is that of "
    "the input in the search step. Streamed: images a second that the reading processes give, and "
    "that the search step takes; waiting is the share of a search's time in which the device has "
    "done a step before the next batch is there. Both begin when what was read ahead is used up."
)
READ_AHEAD = 4  # batches of a reading process, and more


def main() -> None:
    arguments = parser(__doc__, ["resnet20", "mobilenet_v2", "resnet50"], 9, "calls that count")
    arguments.add_argument(
        "--workers", nargs="+", type=positive, default=[max(1, os.cpu_count() - 1)]
    )
    arguments.add_argument("--images", type=positive, default=512, help="in the folder")
    options = arguments.parse_args()
    options.seconds = 5.0  # of each measurement of a stream
    if options.quick:
        options.networks, options.rounds, options.images = [QUICK], 3, 24
        options.seconds = 0.2
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), options.images)
        rows = (measure(NETWORKS[name], folder, options) for name in options.networks)
        publish_each(options.out, "input", "What the input costs", NOTE, rows, as_table)


def draw(folder: Path, count: int) -> None:
    """Smooth pictures with some noise, so that decoding them takes as long as photographs."""
    random = np.random.default_rng(0)
    rows, columns = np.indices((375, 500))[..., None] / random.uniform(20, 80, (2, 1, 1, 3))
    for split, size in (("train", count), ("test", 1)):
        for i in range(size):
            waves = 128 + 80 * np.sin(rows + i) * np.cos(columns - i)
            noisy = np.clip(waves + random.normal(0, 12, waves.shape), 0, 255)
            path = folder / split / str(i % 2 if split == "train" else 0) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy.astype(np.uint8)).save(path, quality=90)
    (folder / "test" / "1").mkdir()
    Image.fromarray(noisy.astype(np.uint8)).save(folder / "test" / "1" / "0.jpg")


def measure(network: Network, folder: str, options: argparse.Namespace) -> dict:
    model = network.build(width=0.25) if options.quick else network.build()
    batch = 4 if options.quick else network.batch
    images = 4 * batch if options.quick else network.examples
    advance, state, inputs = search_step(network, model, batch, images=images)
    arrays = jax.tree.leaves(state)
    task, _ = task_on(network, 1)
    data, order, *_ = inputs
    given, each = (jax.random.key(0), data, order), queued(batch)
    take = jax.jit(lambda key, *data: task.augmented(key, task.examples(key, *data)))

    def begin() -> jax.Array:
        """Begins a step; its number is there when it is done."""
        nonlocal arrays
        arrays, ticket = advance(arrays, *inputs)
        return ticket.step

    def several(call: Callable[[], Any]) -> Callable[[], None]:
        return lambda: jax.block_until_ready([call() for _ in range(each)][-1])

    passes = {"input": several(lambda: take(*given)), "step": several(begin)}
    times = time_in_turn(passes, options.rounds, each=each)
    pairs = zip(times["input"], times["step"], strict=True)
    size, *_ = network.input_shape
    source = load_data("image_folder", folder, image_size=size)
    streamed = {}
    for workers in options.workers:
        stream = source.stream("train", workers)
        streamed[workers] = {
            "images_per_second": rate(stream, batch, options.seconds),
            "waiting": waiting(stream, batch, options.seconds, begin),
        }
    return {
        "network": network.label,
        "batch": batch,
        "input_shape": network.input_shape,
        "examples": images,
        "input_ms": quartiles([1e3 * s for s in times["input"]]),
        "step_ms": quartiles([1e3 * s for s in times["step"]]),
        "share": quartiles([taken / whole for taken, whole in pairs]),
        "consumed_per_second": batch / quartiles(times["step"])["median"],
        "streamed": streamed,
    }


@contextlib.contextmanager
def batches(stream: Stream, batch: int) -> Iterator[Iterator[Batch]]:
    """Batches of a stream without end, after as many as processes may have read ahead."""
    settings = {"examples": stream.size, "batch_size": batch, "first": 0, "last": sys.maxsize}
    with stream.training((0,), **settings) as given:
        for _ in range(READ_AHEAD * (stream.workers + 1)):
            next(given)
        yield given


def rate(stream: Stream, batch: int, seconds: float) -> float:
    """Images a second, in so many seconds."""
    with batches(stream, batch) as given:
        steps, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds:
            next(given)
            steps += 1
        return steps * batch / passed


def waiting(stream: Stream, batch: int, seconds: float, begin: Callable[[], jax.Array]) -> float:
    """The share of so many seconds of training in which the device has no batch."""

    def end_of(number: jax.Array) -> float:
        jax.block_until_ready(number)
        return time.perf_counter()

    with batches(stream, batch) as given, ThreadPoolExecutor(1) as watcher:
        put = map(jax.device_put, given)
        began, waited = time.perf_counter(), 0.0
        while (passed := time.perf_counter() - began) < seconds:
            done = watcher.submit(end_of, begin())
            jax.block_until_ready(next(put))
            waited += max(0.0, time.perf_counter() - done.result())
    return waited / passed


def as_table(rows: list[dict]) -> str:
    columns = (
        *("network", ">batch", "input", ">input, ms", ">step, ms", ">share", ">takes, images/s"),
        *(">workers", ">streamed, images/s", ">waiting"),
    )
    cells = [
        (
            row["network"],
            row["batch"],
            "x".join(map(str, row["input_shape"])),
            f"{row['input_ms']['median']:.2f}",
            f"{row['step_ms']['median']:.1f}",
            with_quartiles(row["share"], ".2%"),
            f"{row['consumed_per_second']:,.0f}",
            workers,
            f"{streamed['images_per_second']:,.0f}",
            f"{streamed['waiting']:.1%}",
        )
        for row in rows
        for workers, streamed in row["streamed"].items()
    ]
    return table_of(columns, cells)


if __name__ == "__main__":
    main()
