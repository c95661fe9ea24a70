"""Methods of pruning at equal cost: a table of finished runs of several seeds, or the runs too.

    python benchmarks/methods.py runs/methods --train --seeds 0 1 2 \
        --config=experiments/configs/resnet20.py --config.converge.epochs=3
    python benchmarks/methods.py runs/methods --name=resnet20_methods --out=benchmarks/results

Runs lie in FOLDER/seed<N>/<method>. With --train all that are not finished are carried out, one
after another; what follows --config is for experiments/main.py, and the same for all of them.
"""

import argparse
from collections.abc import Mapping, Sequence
import graphlib
import itertools
import json
from pathlib import Path
import runpy
import shlex
import subprocess
import sys
from typing import Any

from absl import flags
from record import progress, publish, table_of

from dhp_jax.budgets.layer_table import percent
from dhp_jax.config.methods import METHODS
from dhp_jax.pipeline import command
from dhp_jax.report.format import main_metric, milliseconds
from dhp_jax.tasks import METRICS
from dhp_jax.tasks.task import Metric
from dhp_jax.workdir.identity import (
    COMMANDS,
    CONFIG,
    MAY_CHANGE,
    MAY_CHANGE_GROUPS,
    MAY_GROW,
    MAY_MOVE,
    flatten,
    read_data_checksums,
)
from dhp_jax.workdir.reader import SUMMARY, is_complete

MAIN = Path(__file__).parents[1] / "experiments/main.py"
NEEDS = {  # all are compared with the baseline, and some start from another run
    name: {"baseline", method.source} - {name, None} for name, method in METHODS.items()
}
ORDER = tuple(graphlib.TopologicalSorter(NEEDS).static_order())
DIFFER = ("seed", "method", "source", *MAY_CHANGE, *MAY_MOVE)  # between runs of one table
NOTE = (
    "Means over the seeds, with the least and the most. Metrics are of the last epoch on the test "
    "data. Updates before are those of the search, or of the network whose weights go on. Beyond "
    "DHP is the metric less that of DHP with the same seed: above 0 is worse for an error, and "
    "better for PSNR."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("--train", action="store_true", help="carry out what is not finished")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --train")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        choices=ORDER,
        default=ORDER,
        help=f"of --train, and what they start from: some of {', '.join(ORDER)}",
    )
    parser.add_argument("--name", default="methods", help="of the files in --out")
    parser.add_argument("--title", default="Methods at equal cost")
    parser.add_argument("--note", default="", help="put before the table")
    parser.add_argument("--out", type=Path, help="folder for NAME.json and NAME.md")
    options, overrides = parser.parse_known_args()
    strange = [text for text in overrides if not text.startswith("--config")]
    if strange or bool(overrides) != options.train:
        given = (strange or overrides or ["none"])[0]
        expected = "such as --config=FILE and --config.FIELD=VALUE with --train, and only then"
        parser.error(f"expected arguments of experiments/main.py {expected}; got {given}")
    try:
        if options.train:
            train(options.folder, options.seeds, overrides, options.methods)
        runs = runs_in(options.folder)
    except (flags.Error, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    rows = rows_of(runs)
    note = f"{options.note} {NOTE}".strip()
    publish(options.out, options.name, options.title, note, rows, as_table(rows))


def with_needs(chosen: Sequence[str]) -> list[str]:
    """Methods, and those that they need, in an order in which they can be carried out."""
    needed = set(chosen)
    for method in reversed(ORDER):
        if method in needed:
            needed |= NEEDS[method]
    return [method for method in ORDER if method in needed]


def train(
    folder: Path, seeds: Sequence[int], overrides: Sequence[str], chosen: Sequence[str] = ORDER
) -> None:
    """Carries out methods for each seed; ends the program where one of the runs fails."""
    define = runpy.run_path(str(MAIN))["define"]
    asked = command.parse([str(MAIN), *overrides], define).config
    for seed in seeds:
        for method in with_needs(chosen):
            run = folder / f"seed{seed}" / method
            arguments = command_of(run, method, seed, overrides)
            if is_noted(run, arguments) and finished(run, asked):
                progress(f"{run}: finished")
                continue
            progress(f"{run}: {shlex.join(arguments)}")
            code = subprocess.run([sys.executable, *arguments], check=False).returncode
            if code:
                progress(f"error: {run} ended with code {code}; the same command goes on")
                sys.exit(code)


def command_of(run: Path, method: str, seed: int, overrides: Sequence[str]) -> list[str]:
    """The arguments of a run, for Python."""
    command = [str(MAIN), *overrides, f"--config.seed={seed}", f"--config.method={method}"]
    if METHODS[method].source is not None:
        command.append(f"--config.source={run.with_name(METHODS[method].source)}")
    if method != "baseline":
        command.append(f"--baseline={run.with_name('baseline')}")
    return [*command, f"--workdir={run}"]


def is_noted(run: Path, command: Sequence[str]) -> bool:
    """Whether a run was begun or taken up by this very command."""
    if not (run / COMMANDS).is_file():
        return False
    given = f"&& {shlex.join(['python', *command])}"
    return any(line.endswith(given) for line in (run / COMMANDS).read_text().splitlines())


def finished(run: Path, asked: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The summary of a run, unless it has yet to train for longer.

    Args:
      run: its directory.
      asked: a configuration whose length it must have reached, too, besides that of its own.
    """
    if not (run / SUMMARY).is_file():
        return None
    summary, config = (json.loads((run / name).read_text()) for name in (SUMMARY, CONFIG))
    for phase in METHODS[config["method"]].phases:
        reached = summary["phases"][phase]
        if not all(is_complete(reached, given[phase]) for given in (config, asked or config)):
            return None
    return summary


def runs_in(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The summaries of finished runs, by method and seed.

    Raises:
      ValueError: there is none, or two differ in more than method and seed, or in their data.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    configs: dict[Path, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"seed*/*/{SUMMARY}")):
        run, summary = path.parent, finished(path.parent)
        if summary is None:
            progress(f"{run}: not finished, left out")
            continue
        configs[run] = config = json.loads((run / CONFIG).read_text())
        found.setdefault(config["method"], {})[config["seed"]] = summary
    if not found:
        raise ValueError(
            f"folder: expected runs in {folder}/seed0/dhp and so on; got none finished"
        )
    check_alike(configs)
    return {method: found[method] for method in ORDER if method in found}


def check_alike(configs: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raises unless runs have the same network, data, budget and recipes."""
    for (run, config), (other, others) in itertools.combinations(configs.items(), 2):
        here, there = flatten(config), flatten(others)
        for name in sorted({*here, *there}):
            may = may_differ(name, config["method"], others["method"])
            if not may and here.get(name) != there.get(name):
                raise ValueError(
                    f"folder: expected runs that differ in method and seed; config.{name} is "
                    f"{here.get(name)!r} in {run} and {there.get(name)!r} in {other}"
                )
    for run, other in itertools.pairwise(configs):
        if read_data_checksums(run) != read_data_checksums(other):
            raise ValueError(
                f"folder: expected runs on the same images; those of {run} and {other} differ in "
                "names, sizes or statistics"
            )


def may_differ(name: str, *methods: str) -> bool:
    """Whether a field may differ between runs of two methods."""
    if name in MAY_GROW:  # it grows in the runs that train the phase, and stays in others
        return any(name.split(".")[0] not in METHODS[method].phases for method in methods)
    return name in DIFFER or name.startswith(MAY_CHANGE_GROUPS)


def rows_of(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What is told of each method."""
    rows = []
    for method, by_seed in runs.items():
        summaries = list(by_seed.values())
        metric = main_metric(summaries[0]["test"]["last"])
        values = {seed: run["test"]["last"][metric] for seed, run in by_seed.items()}
        beside = {seed: run["test"]["last"][metric] for seed, run in runs.get("dhp", {}).items()}
        differences = [values[seed] - beside[seed] for seed in values if seed in beside]
        rows.append(
            {
                "method": method,
                "seeds": list(by_seed),
                "metric": metric,
                "flops": over([run["flops"]["ratio"] for run in summaries]),
                "params": over([run["params"]["ratio"] for run in summaries]),
                "updates_before": over([before(run) for run in summaries]),
                "updates": over([last_phase(run)["steps"] for run in summaries]),
                "test": over(list(values.values())),
                "beyond_dhp": over(differences) if method != "dhp" and differences else None,
                "latency_ms": latency(summaries),
                "runs": summaries,
            }
        )
    return rows


def over(values: Sequence[float]) -> dict[str, float]:
    """The mean of some values, the least and the most."""
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}


def before(run: Mapping[str, Any]) -> int:
    """Updates that were spent before a network converged."""
    spent = run["phases"].get("search") or run.get("origin")
    return spent["steps"] if spent else 0


def last_phase(run: Mapping[str, Any]) -> Mapping[str, Any]:
    return run["phases"][METHODS[run["method"]].phases[-1]]


def latency(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Milliseconds of the largest batch that was measured, over the seeds."""
    measured = [run["latency"]["batches"][-1] for run in summaries if run["latency"]]
    if not measured:
        return None
    return {"batch": measured[0]["batch"], **over([row["after_ms"]["median"] for row in measured])}


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    metric = METRICS[rows[0]["metric"]]
    columns = ["method", ">seeds", ">FLOPs", ">params", ">updates before", ">then"]
    columns += [f">test {metric.label}", f">beyond DHP, {unit(metric)}", ">latency"]
    return table_of(columns, [cells_of(row, metric) for row in rows])


def cells_of(row: Mapping[str, Any], metric: Metric) -> list[str]:
    low, high = (metric.text(row["test"][name]) for name in ("low", "high"))
    return [
        METHODS[row["method"]].title,
        str(len(row["seeds"])),
        *(percent(row[name]["mean"]) for name in ("flops", "params")),
        *(f"{row[name]['mean']:,.0f}" for name in ("updates_before", "updates")),
        f"{metric.text(row['test']['mean'])} ({low} to {high})",
        beyond(row["beyond_dhp"], metric),
        in_milliseconds(row["latency_ms"]),
    ]


def beyond(values: Mapping[str, float] | None, metric: Metric) -> str:
    """How far a metric is from that of DHP with the same seed."""
    if values is None:
        return ""
    shown = {name: f"{metric.factor * value:+.2f}" for name, value in values.items()}
    return "{mean} ({low} to {high})".format(**shown)


def unit(metric: Metric) -> str:
    return "points" if metric.unit == "%" else metric.unit


def in_milliseconds(values: Mapping[str, Any] | None) -> str:
    return f"{milliseconds(values['mean'])} (batch {values['batch']})" if values else ""


if __name__ == "__main__":
    main()
