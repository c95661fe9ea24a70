"""The records of a run on disk: JSON lines, and TensorBoard events."""

from collections.abc import Sequence
import json
import os
from pathlib import Path
import shutil
from typing import Any

from dhp_jax import files

RECORDS = "metrics.jsonl"


class Journal:
    """Writes every record of a phase to `metrics.jsonl` and to TensorBoard; an `Observer`.

    When a phase begins, its earlier records are replaced by those of the steps it continues from.
    Beside `step`, which begins anew with every phase, a line has `total_step`, which goes on. Once
    a phase has ended, records are in the order of `phases`.
    """

    def __init__(self, workdir: str | os.PathLike, phases: Sequence[str] = ()):
        self.phases = phases
        self.records = Path(workdir) / RECORDS
        self.tensorboard = Path(workdir) / "tensorboard"

    def begin(self, phase: str, steps: int, done: int, records: Sequence[dict[str, Any]]) -> None:
        from dhp_jax.workdir.tensorboard import Events  # slow to import

        self.before = self._steps_before(phase)
        self._replace(phase, records)
        folder = self.tensorboard / phase
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = self.records.open("a")
        with files.naming(folder):
            self.events = Events(folder)
            for record in self._numbered(phase, records):
                self.events.write(record)

    def step(self, count: int) -> None:
        pass

    def record(self, values: dict[str, Any]) -> None:
        values = values | {"total_step": self.before + values["step"]}
        with files.naming(self.records):
            self.file.write(_line(values))
            self.file.flush()
        with files.naming(self.tensorboard):
            self.events.write(values)

    def end(self) -> None:
        with files.naming(self.records):
            self.file.close()
        with files.naming(self.tensorboard):
            self.events.close()
        self._write(read(self.records))

    def mend(self, phase: str, records: Sequence[dict[str, Any]]) -> None:
        """Restores the records of a phase that has ended, if any are missing."""
        there = [record for record in read(self.records) if record["phase"] == phase]
        if there != self._numbered(phase, records):
            self._replace(phase, records)

    def _replace(self, phase: str, records: Sequence[dict[str, Any]]) -> None:
        kept = [record for record in read(self.records) if record["phase"] != phase]
        self._write([*kept, *self._numbered(phase, records)])

    def _numbered(self, phase: str, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Records of a phase with their steps over all phases."""
        before = self._steps_before(phase)
        return [record | {"total_step": before + record["step"]} for record in records]

    def _steps_before(self, phase: str) -> int:
        """How many steps the phases before one have taken."""
        earlier = self.phases[: self.phases.index(phase)] if phase in self.phases else ()
        steps = dict.fromkeys(earlier, 0)
        for record in read(self.records):
            if record["phase"] in steps:
                steps[record["phase"]] = max(steps[record["phase"]], record["step"])
        return sum(steps.values())

    def _write(self, records: Sequence[dict[str, Any]]) -> None:
        order = {phase: place for place, phase in enumerate(self.phases)}
        records = sorted(records, key=lambda record: order.get(record["phase"], len(order)))
        files.write(self.records, "".join(map(_line, records)))


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; an empty list if there is no such file.

    Damaged lines, which a crash of the machine may leave, are skipped.
    """
    path = Path(path)
    content = path.read_text(errors="replace") if path.exists() else ""
    return [record for line in content.split("\n")[:-1] if (record := _record(line))]


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"phase", "step"} <= record.keys() else None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
