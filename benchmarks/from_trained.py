"""Ways of pruning a trained network, at equal cost and an equal number of updates.

    python benchmarks/from_trained.py --data cifar10.pack --out DIR --stages train explore
    python benchmarks/from_trained.py --data cifar10.pack --out DIR --stages train final \
        --weights DIR/resnet20.safetensors
    python benchmarks/from_trained.py --table DIR/rows.jsonl --name from_trained \
        --out benchmarks/results
    python benchmarks/from_trained.py --rehearse --out DIR --stages train explore final

A ResNet-20 is trained on CIFAR-10. Every row of the table begins with its weights, is brought down
to a share of its FLOPs, and is trained for the same number of updates, those of a search included.
The search is the library's `dhp.fade_to_budget`. from_trained_rows.py has the rows,
from_trained_programs.py what they compute, and from_trained_searches.py searches that were tried
beside the library's. With --in-torch, PyTorch carries out the same updates after the cut, which is
sooner on a CPU; see torch_resnet.py.

A row is written to DIR/rows.jsonl the moment it is measured. DIR/resnet20.safetensors holds the
weights.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
import datetime
import json
from pathlib import Path
import shlex
import sys
import time
from typing import Any

import flax
from from_trained_rows import (
    CRITERIA,
    DISTILLED,
    FADE,
    FRESH,
    LONG,
    ONE,
    PAPER,
    PER_FLOP,
    REHEARSAL,
    SEARCHES,
    THROUGHOUT,
    TRAINING,
    Bench,
    Size,
    Trainer,
    Way,
    pruned_row,
    train,
)
import jax
import numpy as np
import optax
from safetensors.numpy import load_file, save_file

import dhp_jax as dhp

TITLE = "Ways of pruning a trained network at equal cost"
NOTE = (
    "ResNet-20 on CIFAR-10 (JPEG): every row begins with the same trained weights and has as many "
    "updates as any other, those of its search included, but for rows whose names tell how many. "
    "Means over the seeds of the order of the images, with the least and the most. After the cut: "
    "the test error of the first seed with renewed statistics, before any update (for a search: "
    "after it). Beyond the search: the error less that of the search with the same seed; above 0 "
    "is worse than the search."
)
WEIGHTS = "resnet20.safetensors"
TARGETS = (0.5, 0.25)  # shares of the FLOPs
HALF = replace(FADE, name="fade per flop^0.5", power=0.5)
FINAL = (  # of the stage final: what matters most is measured first, for all seeds and targets
    (FADE, *(ONE[by] for by in CRITERIA)),
    (PAPER,),
    DISTILLED,
    (THROUGHOUT, LONG),
    (ONE["taylor"], *PER_FLOP, HALF, replace(FADE, name="fade, one stage", stages=1), *SEARCHES),
    FRESH,
)


def train_stage(bench: Bench, options: argparse.Namespace) -> None:
    """Trains the network, or goes on with one, and keeps it, its kernels in half precision."""
    began, size = time.monotonic(), bench.size
    start, rate = bench.net.fresh(options.seed), size.rate
    if options.weights is not None:
        start, rate = stored(options.weights), size.rate / 4
    run = train(bench, start, rate, options.seed, size.epochs)
    arrays = {name: np.asarray(x) for name, x in {**run.weights, **run.statistics}.items()}
    arrays = {
        name: x.astype(np.float16) if name.endswith("kernel") else x.astype(np.float32)
        for name, x in arrays.items()
    }
    save_file(arrays, bench.out / WEIGHTS)
    for kept in bench.out.glob(f"{TRAINING}_*.state"):
        kept.unlink()
    run = bench.begin(stored(bench.out / WEIGHTS))
    bench.write(
        name="unpruned",
        epochs=size.epochs,
        seed=options.seed,
        goes_on=options.weights is not None,
        **bench.evaluate(run, bench.plan(bench.net.full(1)).mask),
        seconds=round(time.monotonic() - began, 3),
    )


def stored(path: Path | None) -> dict[str, np.ndarray]:
    """Weights and statistics that the stage train has kept."""
    if path is None:
        raise SystemExit(f"--weights: expected the {WEIGHTS} of the stage train; got none")
    return {name: x.astype(np.float32) for name, x in load_file(path).items()}


def load(bench: Bench, options: argparse.Namespace) -> None:
    """Takes the trained network as what all rows begin with, and as the teacher."""
    own = bench.out / WEIGHTS
    bench.trained = stored(own if own.exists() else options.weights)
    run = bench.begin(bench.trained)
    bench.teacher = run.weights, run.z, run.statistics


def explore_stage(bench: Bench, options: argparse.Namespace) -> None:
    """Single runs of many ways at a quarter of the FLOPs, the most telling ones first."""
    load(bench, options)
    ways = [ONE["l1"], ONE["taylor_square"], HALF, FADE, ONE["random"], ONE["uniform_l1"]]
    ways += [ONE["uniform_taylor_square"], *PER_FLOP]
    ways += [Way("root of taylor_square, mean 1", by="taylor_square", relative=True)]
    ways += [replace(ONE["l1"], name=f"l1, rate {rate}", rate=rate) for rate in (0.02, 0.1)]
    for way in (HALF, ONE["l1"]):
        ways.append(replace(way, name=f"{way.name}, distilled", distillation=0.9))
    ways += [replace(FADE, name="fade, not per flop", power=0.0)]
    for way in ways[:: 3 if options.rehearse else 1]:
        if bench.left() < 0:
            return
        pruned_row(bench, way, 0.25, 10)


def final_stage(bench: Bench, options: argparse.Namespace) -> None:
    """The table."""
    load(bench, options)
    trainer = in_torch(bench, options.bfloat16) if options.in_torch else None
    seeds, targets, each = options.seeds, options.targets, 1
    if options.rehearse:
        seeds, targets, each = seeds[:1], targets[:1], 5
    for ways in FINAL:
        for seed in seeds:
            for flops in targets:
                for way in ways[::each]:
                    if options.ways and way.name not in options.ways:
                        continue
                    if way.search * bench.size.segment >= bench.size.updates:
                        continue  # nothing would be left for what follows the search
                    if bench.left() < 0:
                        return
                    look = seed == options.seeds[0]
                    pruned_row(bench, way, flops, seed, look, trainer)


def in_torch(bench: Bench, bfloat16: bool) -> Trainer:
    """PyTorch, once its network is known to compute what ours does."""
    import torch
    from torch_resnet import check_same, trainer

    check_same(torch, bench)
    return trainer(torch, bfloat16=bfloat16)


STAGES = {"train": train_stage, "explore": explore_stage, "final": final_stage}


def tables(rows: Sequence[dict]) -> str:
    """A table for each target: means over the seeds, and what is lost against the search.

    One more has the commits of rows that tell theirs, and what carried their updates out.
    """
    from record import table_of  # imports more than a device needs

    found: dict[float, dict[str, dict[int, dict]]] = {}
    for row in rows:
        if "target" in row:
            found.setdefault(row["target"], {}).setdefault(name_of(row), {})[row["seed"]] = row
    columns = ["row", ">params", ">after the cut", ">test error", ">beyond the search", ">seeds"]
    parts = [
        f"## {target:.0%} of the FLOPs\n\n"
        + table_of(
            columns, [[name, *cells(of_seeds, ways[FADE.name])] for name, of_seeds in ways.items()]
        )
        for target, ways in sorted(found.items(), reverse=True)
    ]
    if any(row.get("commit") for row in rows if "target" in row):
        parts.append(f"## How rows were measured\n\n{origins(rows)}")
    return "\n\n".join(parts)


def origins(rows: Sequence[dict]) -> str:
    """A table of what carried out the updates after the search, and of which code it was."""
    from record import table_of

    found: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        if row.get("commit") and "target" in row:
            by = row.get("trained_by", "the library, float32")
            key = (name_of(row), f"{row['target']:.0%}", by, row["commit"])
            found.setdefault(key, []).append(row["seed"])
    columns = ["row", ">of the FLOPs", "seeds", "updated by", "commit"]
    lines = [(*key[:2], ", ".join(map(str, seeds)), *key[2:]) for key, seeds in found.items()]
    return table_of(columns, lines)


def name_of(row: Mapping[str, Any]) -> str:
    """The name of a row, with its updates where they are not those of all others."""
    usual = row["updates"] in (Size.updates, REHEARSAL.updates) or row["way"]["fresh"]
    return row["name"] if usual else f"{row['name']}, {row['updates']:,} updates"


def cells(found: Mapping[int, dict], search: Mapping[int, dict]) -> list[str]:
    """Of one row and target: params, the error after the cut and at the end, and differences."""
    apart = [row["error"] - search[seed]["error"] for seed, row in found.items() if seed in search]
    after = [row["after_cut"] for row in found.values() if row["after_cut"] is not None]
    return [
        f"{np.mean([row['params'] for row in found.values()]):.0%}",
        f"{after[0]:.2f} %" if after else "",
        mean_and_range([row["error"] for row in found.values()], ".2f", " %"),
        mean_and_range(apart, "+.2f"),
        str(len(found)),
    ]


def mean_and_range(values: Sequence[float], form: str, unit: str = "") -> str:
    """A mean, with the least and the most of several."""
    if not values:
        return ""
    several = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{unit}{several}"


def measured(path: Path) -> tuple[list[dict], dict[str, Any]]:
    """The rows of a rows.jsonl, and on what and by which command they were measured."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    about = next(row for row in rows if row["name"] == "begin")
    return rows, {key: about[key] for key in ("date", "command", "commit", "hardware", "versions")}


def publish(options: argparse.Namespace) -> None:
    """Makes NAME.json and NAME.md of the rows that a device has measured."""
    from record import write

    rows, about = measured(options.table)
    unpruned = [row["error"] for row in rows if row["name"] == "unpruned"]
    whole = f" The unpruned network has {unpruned[0]:.2f} %." if unpruned else ""
    note = f"{options.note} {NOTE}{whole}".strip()
    print(tables(rows))
    write(options.out, options.name, TITLE, note, rows, tables(rows), about)


def parser_of(description: str, minutes: float) -> argparse.ArgumentParser:
    """The arguments of all benchmarks that train these rows."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", type=Path, help="CIFAR-10: train_images, ..., test_labels")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--weights", type=Path, help="of the network that the stage train has left")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the rows")
    parser.add_argument("--targets", type=float, nargs="+", default=list(TARGETS), help="of FLOPs")
    parser.add_argument("--updates", type=int, help="of every row")
    parser.add_argument("--minutes", type=float, default=minutes, help="after which no row begins")
    parser.add_argument("--commit", default="", help="of the code, for the record")
    parser.add_argument("--rehearse", action="store_true", help="a smoke run of a minute on a CPU")
    return parser


def begin(parser: argparse.ArgumentParser, options: argparse.Namespace, *modules: Any) -> Bench:
    """What rows share, once it is written on what they are measured.

    Args:
      parser: tells of data that are missing, and of updates that make no whole segments.
      options: of the command line; those of `Size` that are given replace its own.
      modules: whose versions are told.
    """
    if options.data is None and not options.rehearse:
        parser.error("--data: expected CIFAR-10, such as cifar10.pack; got none")
    size = REHEARSAL if options.rehearse else Size()
    given = {name: getattr(options, name, None) for name in ("epochs", "updates")}
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    if size.updates % size.segment:
        parser.error(f"--updates: expected a multiple of {size.segment}, got {size.updates}")
    dhp.keep_memory()  # as runs do
    bench = Bench(options, size)
    bench.write(
        name="begin",
        date=datetime.date.today().isoformat(),
        command=shlex.join(["python", *sys.argv]),
        commit=options.commit,
        hardware=str(jax.devices()[0].device_kind),
        versions={module.__name__: module.__version__ for module in modules},
        size=asdict(size),
    )
    return bench


def main() -> None:
    parser = parser_of(__doc__, minutes=60)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument(
        "--ways", nargs="+", help="names of the rows of the stage final; all if none"
    )
    parser.add_argument("--in-torch", action="store_true", help="updates after a cut by PyTorch")
    parser.add_argument("--bfloat16", action="store_true", help="convolutions of --in-torch")
    parser.add_argument("--table", type=Path, help="rows.jsonl: publish it, measure nothing")
    parser.add_argument("--name", default="from_trained", help="of the files of --table")
    parser.add_argument("--note", default="", help="put before the table")
    parser.add_argument("--epochs", type=int, help="of the training")
    options = parser.parse_args()
    if options.table is not None:
        return publish(options)
    if options.bfloat16 and not options.in_torch:
        parser.error("--bfloat16: expected together with --in-torch")
    known = {way.name: way for ways in FINAL for way in ways}
    for name in options.ways or ():
        if name not in known:
            parser.error(f"--ways: expected some of {', '.join(map(repr, known))}; got {name!r}")
        least, updates = known[name].search * Size.segment, options.updates or Size.updates
        if updates <= least:
            parser.error(f"--updates: expected more than {least} for {name!r}, got {updates}")
    bench = begin(parser, options, dhp, jax, flax, optax)
    for stage in options.stages:
        began = time.monotonic()
        STAGES[stage](bench, options)
        bench.write(name=f"stage {stage}", seconds=round(time.monotonic() - began, 2))


if __name__ == "__main__":
    main()
