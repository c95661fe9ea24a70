"""The records of a run on disk: JSON lines, and TensorBoard events."""

import json
import os
from pathlib import Path
import shutil
from typing import Any

from tensorboardX import SummaryWriter

RECORDS = "metrics.jsonl"


class Journal:
    """Writes every record of a phase to `metrics.jsonl` and to TensorBoard; an `Observer`.

    A phase that begins anew first drops what it had written before.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.records = Path(workdir) / RECORDS
        self.events = Path(workdir) / "tensorboard"

    def begin(self, phase: str, steps: int) -> None:
        kept = [record for record in read(self.records) if record["phase"] != phase]
        unfinished = self.records.with_name(f".{RECORDS}.unfinished")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in kept))
        unfinished.replace(self.records)
        shutil.rmtree(self.events / phase, ignore_errors=True)
        self.file = self.records.open("a")
        self.writer = SummaryWriter(str(self.events / phase))

    def step(self) -> None:
        pass

    def record(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        for name, value in values.items():
            if name not in ("phase", "step"):
                self.writer.add_scalar(name, value, values["step"])

    def end(self) -> None:
        self.file.close()
        self.writer.close()


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; none if there is no such file.

    A last line that was cut off, as by a machine that went down, is left out.
    """
    path = Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
