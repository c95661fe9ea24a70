"""What finished runs came to, side by side.

    python benchmarks/runs.py runs/resnet20-baseline runs/resnet20 --name=cifar10_resnet20 \
        --title="ResNet-20 on CIFAR-10" --out=benchmarks/results
"""

import argparse
import json
from pathlib import Path

from record import publish, table_of

from dhp_jax.report.format import main_metric, metrics_text
from dhp_jax.tasks import METRICS
from dhp_jax.workdir import reader

NOTE = "FLOPs and params as shares of the unpruned network; times include tests after every epoch."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="directories of finished runs")
    parser.add_argument("--name", default="runs", help="of the files in --out")
    parser.add_argument("--title", default="Runs")
    parser.add_argument("--note", default="", help="put before the table")
    parser.add_argument("--out", type=Path, help="folder for NAME.json and NAME.md")
    options = parser.parse_args()
    rows = [row_of(run) for run in options.runs]
    note = f"{options.note} {NOTE}".strip()
    publish(options.out, options.name, options.title, note, rows, as_table(rows))


def row_of(run: Path) -> dict:
    """The summary of a run, and its configuration."""
    summary = json.loads((run / reader.SUMMARY).read_text())
    return {"run": run.name, "config": json.loads((run / "config.json").read_text()), **summary}


def as_table(rows: list[dict]) -> str:
    metrics = {METRICS[main_metric(row["test"]["last"])].label: None for row in rows}
    test = f"test {' or '.join(metrics)}"
    columns = ["network", "method", ">seed", "epochs", ">FLOPs", ">params", f">{test}, last"]
    cells = [
        (
            f"{row['model']['name']} {row['model'].get('depth', '')}".rstrip(),
            row["method"],
            row["seed"],
            " + ".join(f"{phase['epochs']}" for phase in row["phases"].values()),
            f"{100 * row['flops']['ratio']:.2f} %",
            f"{100 * row['params']['ratio']:.2f} %",
            metrics_text(row["test"]["last"]),
            metrics_text(row["test"]["best"]),
            f"{row['seconds']:.0f}",
        )
        for row in rows
    ]
    return table_of([*columns, ">best", ">seconds"], cells)


if __name__ == "__main__":
    main()
