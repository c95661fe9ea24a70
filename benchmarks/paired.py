"""Is a step as fast, as quickly compiled and as small as that of another commit?

Both trees have a process of their own. They compile in turn and take steps in turn, so that other
load on the machine affects both alike; the ratios of a pair are what counts.

    python benchmarks/paired.py --before 5add151    # the commit before modules were moved
    python benchmarks/paired.py --before HEAD --quick
    python benchmarks/paired.py --before HEAD --flops 0.25     # of pruned networks
"""

import argparse
import io
import json
import os
from pathlib import Path
import subprocess
import sys
import tarfile
import tempfile
from typing import Any

from record import positive, progress, publish_each, table_of, with_quartiles
from zoo import NETWORKS, QUICK

from dhp_jax.budgets.timing import quartiles

ROOT = Path(__file__).parents[1]
NOTE = """One {}, float32. Ratio: this tree to commit {}; medians and quartiles of pairs,
compiled and run in turn. Peak memory is that of the compiled program, by XLA's own analysis."""
CHILD = """
import json, sys, time
import jax
from programs import peak_bytes
from zoo import NETWORKS, search_step

import dhp_jax as dhp

network, quick, flops = NETWORKS[sys.argv[1]], sys.argv[2] == "True", float(sys.argv[3])

def build():
    model = network.build(width=0.25) if quick else network.build()
    return dhp.prune_to(model, network.input_shape, flops=flops) if flops < 1 else model

arrays = None
for asked in sys.stdin:
    if asked.strip() == "compile":
        jax.clear_caches()
        advance, state, inputs = search_step(network, build(), 4 if quick else network.batch)
        arrays = jax.tree.leaves(state)
        lowered = advance.lower(arrays, *inputs)
        started = time.perf_counter()
        compiled = lowered.compile()
        told = [time.perf_counter() - started, peak_bytes(compiled)]
    else:
        started = time.perf_counter()
        arrays, _ = jax.block_until_ready(advance(arrays, *inputs))
        told = [time.perf_counter() - started]
    print(json.dumps(told), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="the other commit")
    names = ["resnet20", "resnet56", "mobilenet_v2"]
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=names)
    parser.add_argument("--rounds", type=positive, default=30, help="pairs of steps")
    parser.add_argument("--compiles", type=positive, default=3, help="pairs of compilations")
    parser.add_argument(
        "--flops", type=float, default=1.0, help="share to prune networks to before"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--out", type=Path, help="folder for the results as JSON and Markdown")
    options = parser.parse_args()
    if options.quick:
        options.networks, options.rounds, options.compiles = [QUICK], 3, 2
    if min(options.rounds, options.compiles) < 2:
        parser.error("--rounds, --compiles: expected at least 2")
    named = subprocess.run(
        ["git", "rev-parse", "--verify", "--short", f"{options.before}^{{commit}}"],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": False},
    )
    if named.returncode:
        parser.error(f"--before: expected a commit of this repository, got {options.before!r}")
    commit = named.stdout.strip()
    with tempfile.TemporaryDirectory() as other:
        files = subprocess.run(
            ["git", "archive", commit], cwd=ROOT, capture_output=True, check=True
        )
        with tarfile.open(fileobj=io.BytesIO(files.stdout)) as archive:
            archive.extractall(other, filter="data")
        rows = (measure(name, Path(other), options) for name in options.networks)
        name, what = "paired", "search step"
        if options.flops < 1:
            name, what = (
                "paired_pruned",
                f"training step of networks with {options.flops:.0%} FLOPs",
            )
        title = f"A {what} before and after"
        publish_each(options.out, name, title, NOTE.format(what, commit), rows, as_table)


def measure(name: str, other: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a step of a network comes to in both trees."""
    trees = {
        tree: begin(folder, name, options.quick, options.flops)
        for tree, folder in (("before", other), ("after", ROOT))
    }
    compiled = in_turn(trees, "compile", options.compiles)
    in_turn(trees, "step", 2)  # compiles, then warms up
    stepped = in_turn(trees, "step", options.rounds)
    for process in trees.values():
        process.communicate()
    row: dict[str, Any] = {"network": NETWORKS[name].label}
    for what, factor, pairs in (("compile_s", 1, compiled), ("step_ms", 1e3, stepped)):
        for tree in trees:
            row[f"{tree}_{what}"] = quartiles([factor * pair[tree][0] for pair in pairs])
        row[f"{what}_ratio"] = quartiles([pair["after"][0] / pair["before"][0] for pair in pairs])
    for tree in trees:
        row[f"{tree}_peak_bytes"] = compiled[-1][tree][1]
    return row


def begin(tree: Path, name: str, quick: bool, flops: float) -> subprocess.Popen:
    """A process that compiles or steps with the code of a tree, each time that it is told to."""
    paths = os.pathsep.join(map(str, (tree, tree / "benchmarks")))
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, name, str(quick), str(flops)],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tree},
        env=os.environ | {"PYTHONPATH": paths, "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )


def in_turn(trees: dict[str, subprocess.Popen], what: str, pairs: int) -> list[dict[str, list]]:
    """What each tree tells of the same work, pair by pair; every other pair in reverse order."""
    found = []
    for number in range(pairs):
        progress(f"{what} {number + 1} of {pairs}")
        told = {}
        for tree in reversed(trees) if number % 2 else trees:
            process = trees[tree]
            process.stdin.write(f"{what}\n")
            process.stdin.flush()
            told[tree] = json.loads(process.stdout.readline())
        found.append(told)
    return found


def as_table(rows: list[dict[str, Any]]) -> str:
    columns = ["network", *(f">{name}" for name in ("step, ms", "ratio", "compile, s", "ratio"))]
    cells = [
        (
            row["network"],
            with_quartiles(row["after_step_ms"], ".2f"),
            with_quartiles(row["step_ms_ratio"], ".3f"),
            with_quartiles(row["after_compile_s"], ".2f"),
            with_quartiles(row["compile_s_ratio"], ".3f"),
            f"{row['after_peak_bytes'] / 1e6:,.1f}",
            f"{row['after_peak_bytes'] / row['before_peak_bytes']:.3f}",
        )
        for row in rows
    ]
    return table_of([*columns, ">peak, MB", ">ratio"], cells)


if __name__ == "__main__":
    main()
