"""PSNR and SSIM of the networks of finished runs on several folders of test images.

    python benchmarks/restoration.py runs/dncnn-baseline runs/dncnn_60 \
        --test BSD68=data/bsd68 --name=dncnn --title="DnCNN on BSD68" --out=benchmarks/results

Each run is tested as its own configuration says (task, scale, noise), on each folder.
"""

import argparse
import functools
import json
from pathlib import Path
import shutil

from record import publish_each, table_of

import dhp_jax as dhp
from dhp_jax.config.methods import METHODS
from dhp_jax.pipeline import setup
from dhp_jax.report import write as report_write
from dhp_jax.report.format import metrics_text
from dhp_jax.tasks import evaluate
from dhp_jax.workdir import reader
from dhp_jax.workdir.identity import stored_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="directories of finished runs")
    parser.add_argument("--test", nargs="+", required=True, help="NAME=FOLDER of test images")
    parser.add_argument("--name", default="restoration", help="of the files in --out")
    parser.add_argument("--title", default="Restoration")
    parser.add_argument("--note", default="", help="put before the table")
    parser.add_argument("--out", type=Path, help="folder for NAME.json, NAME.md and NAME.png")
    options = parser.parse_args()
    folders = dict(test.split("=", 1) for test in options.test)
    rows = (row_of(run, folders) for run in options.runs)
    note = options.note
    crops = options.runs[-1] / report_write.PLOTS / "crops.png"
    if options.out is not None and crops.is_file():
        options.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(crops, options.out / f"{options.name}.png")
        note += f"\n\n![Details of test images]({options.name}.png)"
    table = functools.partial(as_table, folders=list(folders))
    publish_each(options.out, options.name, options.title, note.strip(), rows, table)


def row_of(run: Path, folders: dict[str, str]) -> dict:
    """The summary of a run, and the metrics of its network on each folder."""
    config = stored_config(run)
    summary = json.loads((run / reader.SUMMARY).read_text())
    model = dhp.load(run / "model")
    tests = {}
    for name, folder in folders.items():
        config.data.update(name="photo_folder", test_dir=folder, streamed=False)
        problem = setup.set_up(config)
        data = problem.read("test")
        started = problem.task.without_network(data)
        tests[name] = {"input": started, "output": evaluate(model, problem.task, data)}
    for folder in ("dir", "test_dir"):  # where data lie on this machine helps no reader
        config.data[folder] = Path(config.data[folder]).name
    return {"run": run.name, "config": config.to_dict(), **summary, "tests": tests}


def as_table(rows: list[dict], folders: list[str]) -> str:
    columns = [">FLOPs", ">", ">params", ">", ">updates", *(f">{name}" for name in folders)]
    inputs = [metrics_text(rows[0]["tests"][name]["input"]) for name in folders]
    lines = [["input, no network", *[""] * 5, *inputs]]
    for row in rows:
        model, flops, params = row["model"], row["flops"], row["params"]
        target = f", target {row['target']:.0%}" if row["target"] else ""
        cells = [
            f"{model['name']}, width {model['width']:g}, {METHODS[row['method']].title}{target}",
            f"{flops['after'] / 1e9:.2f} G",
            f"{flops['ratio']:.1%}",
            f"{params['after'] / 1e3:.1f} k",
            f"{params['ratio']:.1%}",
            " + ".join(f"{phase['steps']:,}" for phase in row["phases"].values()),
            *(metrics_text(row["tests"][name]["output"]) for name in folders),
        ]
        lines.append(cells)
    return table_of(["network", *columns], lines)


if __name__ == "__main__":
    main()
