"""A whole recipe on CIFAR-10 in pieces: each stops in time, and packs what the next one needs."""

import argparse
from collections.abc import Iterator
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any

from dhp_jax.distributed.preemption import EXIT_CODE
from dhp_jax.workdir import metrics
from dhp_jax.workdir.reader import SUMMARY

ROOT = Path(__file__).parents[1]
GRACE = 25.0  # seconds that a run may take to save its state
ENDS = (0, EXIT_CODE)  # of a run that is done, and of one that stopped and can go on
PACKING = 10.0  # and that packing it may take
PART = 15 * 2**20  # bytes of a file
DATA = "CIFAR-10 (JPEG)"


def run(options: argparse.Namespace, rehearse: bool) -> Iterator[dict[str, Any]]:
    """Runs a recipe, or goes on with one, until it is done or the time is over; gives one row.

    What it leaves is `recipe_NAME.tar.00`, and more parts if it is large, in the folder of results:
    the first one is for `--resume`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(scratch, "run")
        if options.resume is not None:
            restore(options.resume, Path(scratch))
        pieces = Path(scratch, "pieces.json")
        before = json.loads(pieces.read_text()) if pieces.is_file() else []
        command = [sys.executable, "experiments/main.py", *arguments(options, rehearse, scratch)]
        began = time.time()
        code = until([*command, f"--workdir={workdir}"], options.until - GRACE - PACKING)
        taken = time.time() - began
        pieces.write_text(json.dumps([*before, taken]))
        parts = pack(workdir, pieces, options.out / f"recipe_{options.recipe}.tar")
        yield {
            "recipe": options.recipe,
            "data": "digits" if rehearse else DATA,
            "batch": options.batch,
            "exit code": code,
            "seconds here": taken,
            "seconds before": float(sum(before)),
            **outcome(workdir),
            "archive, MB": sum(part.stat().st_size for part in parts) / 1e6,
        }
        if code not in ENDS:
            raise ChildProcessError(f"experiments/main.py ended with exit code {code}; see the log")


def arguments(options: argparse.Namespace, rehearse: bool, scratch: str) -> list[str]:
    """Those of experiments/main.py."""
    changes = [f"--config.{change}" for change in options.set]
    if rehearse:
        given = ["--config=experiments/configs/digits_resnet20.py", "--config.model.width=0.25"]
        given += ["--config.model.depth=8", "--config.search.min_channels=1"]
        given += ["--config.search.epochs=1", "--config.converge.epochs=1"]
        given += ["--config.search.strength=0.5", "--config.multiple_of=1"]
        return given + changes
    folder = Path(scratch, "data")
    if options.data.is_dir():
        folder = options.data.absolute()
    else:
        import cifar10_pack

        cifar10_pack.unpack(options.data, folder)
    given = [f"--config=experiments/configs/{options.recipe}.py", "--config.data.name=cifar10"]
    given += [f"--config.data.dir={folder}", f"--config.batch_size={options.batch}"]
    return given + changes


def until(command: list[str], stop: float) -> int:
    """Runs a command, and tells it to end when it is time; its exit code."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    }
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        return process.wait(max(1.0, stop - time.time()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def pack(workdir: Path, pieces: Path, archive: Path) -> list[Path]:
    """The directory of a run in files: all that it needs to go on, or that it came to.

    Checkpoints of a phase that has left its network are not needed; of those of another phase the
    newest is enough.

    Args:
      workdir: of the run.
      pieces: file with the seconds of each piece.
      archive: the files' name, but for the number of each.

    Returns:
      The files, in order.
    """
    done = {"search": "pruned", "converge": "model"}
    left = [
        checkpoint
        for phase, network in done.items()
        if not (workdir / network).exists()
        for checkpoint in newest(workdir / "checkpoints" / phase)
    ]
    whole = workdir.with_name("whole.tar")
    with tarfile.open(whole, "w") as file:
        file.add(pieces, pieces.name)
        for path in sorted(workdir.iterdir()) if workdir.is_dir() else []:
            if path.name not in (".lock", "checkpoints"):
                file.add(path, f"{workdir.name}/{path.name}")
        for path in left:
            file.add(path, f"{workdir.name}/{path.relative_to(workdir)}")
    archive.parent.mkdir(parents=True, exist_ok=True)
    for old in archive.parent.glob(f"{archive.name}.*"):
        old.unlink()
    parts = []
    with whole.open("rb") as file:
        while part := file.read(PART):
            parts.append(archive.with_name(f"{archive.name}.{len(parts):02}"))
            parts[-1].write_bytes(part)
    return parts


def newest(folder: Path) -> list[Path]:
    """The newest of the checkpoints in a folder; none if there is none."""
    steps = [path for path in folder.glob("[0-9]*") if path.name.isdecimal()]
    return [max(steps, key=lambda path: int(path.name))] if steps else []


def restore(first: Path, folder: Path) -> None:
    """Puts what `pack` was given into a folder.

    Args:
      first: the first of its files; the others lie beside it.
      folder: that is there.
    """
    parts = sorted(first.parent.glob(f"{first.stem}.[0-9][0-9]"))
    whole = folder / "whole.tar"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(whole) as archive:
        archive.extractall(folder, filter="data")
    whole.unlink()


def outcome(workdir: Path) -> dict[str, Any]:
    """How far a run is, and its error on the test data."""
    path = workdir / SUMMARY
    if path.is_file():
        summary = json.loads(path.read_text())
        return {
            "finished": True,
            "epochs": " + ".join(str(p["epochs"]) for p in summary["phases"].values()),
            "FLOPs": summary["flops"]["ratio"],
            "params": summary["params"]["ratio"],
            "test error, last": summary["test"]["last"]["error"],
            "best": summary["test"]["best"]["error"],
            "run, s": summary["seconds"],
            "phases, s": "; ".join(
                f"{name} {phase['seconds']:.1f}"
                for name, phase in summary["phases"].items()
                if "seconds" in phase
            ),
        }
    records = metrics.read(workdir / metrics.RECORDS)
    tested = [record for record in records if "test_error" in record]
    last = tested[-1] if tested else {}
    found = {"finished": False, "phase": last.get("phase", ""), "epochs": last.get("epoch", 0)}
    rates = [r["examples_per_second"] for r in records if "examples_per_second" in r]
    found["examples/s"] = sorted(rates)[len(rates) // 2] if rates else 0.0
    return found | {"test error, last": last.get("test_error", float("nan"))}
