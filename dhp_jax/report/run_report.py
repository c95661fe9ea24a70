"""A run as reports tell it: what it has left, and what that comes to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
import inspect
import math
from typing import Any

from dhp_jax.models.own import is_own
from dhp_jax.models.registry import FAMILIES
from dhp_jax.report.format import interval
from dhp_jax.tasks.task import METRICS, Metric
from dhp_jax.workdir.reader import Result, is_complete

PHASES = {"search": "search", "converge": "pruned", "baseline": "unpruned"}
Point = tuple[float, float]


@dataclass(frozen=True)
class RunReport:
    """A run, and what it came to if it is finished; see `workdir.summary.summarize`."""

    result: Result
    summary: Mapping[str, Any] | None

    @property
    def metric(self) -> Metric:
        """What its task is judged by."""
        labelled = self.result.config["task"].get("name") == "classification"
        return METRICS["error" if labelled else "psnr"]

    @property
    def test_examples(self) -> int | None:
        """How many examples the test data hold; `None` where that was not noted."""
        noted = [self.summary or {}, *self.result.notes.values()]
        counts = (values.get("test_examples") for values in noted)
        return next((count for count in counts if isinstance(count, int) and count > 0), None)

    @property
    def network(self) -> str:
        """What is trained on what: "ResNet-20 on digits"."""
        data = self.result.config["data"].get("name", "its data")
        return f"{network_name(self.result.config['model'])} on {data}"

    @property
    def last_tested(self) -> Mapping[str, Any] | None:
        """The last record with metrics on the test data."""
        return next((r for r in reversed(self.result.records) if tested(r)), None)

    @property
    def last_ratio(self) -> Mapping[str, Any] | None:
        """The last record that tells what would survive."""
        records = reversed(self.result.records)
        return next((r for r in records if number(r.get("flops_ratio")) is not None), None)

    def interval(self, metric: Metric, value: float) -> str:
        """The 95 % interval of an error on the test data; nothing where it is not known."""
        count = self.test_examples
        return interval(value, count) if metric.name == "error" and count else ""

    def missing(self) -> list[str]:
        """What a run that is not finished has not left yet; empty for one that is."""
        result = self.result
        if result.finished:
            return self._to_come()
        found = []
        recorded = {record["phase"] for record in result.records}
        if not recorded:
            found.append("records of training: no step has been recorded")
        without = "no channels, layers, FLOPs and params to show"
        if result.method.searches and result.search is None:
            found.append(f"the end of the search, and with it which channels go: {without}")
        elif result.method.prunes and result.after is None:
            found.append(f"the pruned network: {without}")
        last = result.method.phases[-1]
        began = "has not ended" if last in recorded else "has not begun"
        return [
            *found,
            f"the trained network: the {last} phase {began}, so no final result, no latency",
        ]

    def _to_come(self) -> list[str]:
        """The rest of a finished run that was given more epochs."""
        found = []
        for phase in self.result.method.phases:
            notes = self.result.notes.get("search" if phase == "search" else "model")
            settings = self.result.config.get(phase, {})
            if notes and not is_complete(notes["phase"], settings):
                left = f"epochs {notes['phase']['epochs'] + 1} to {settings['epochs']}"
                found.append(f"{left} of {phase}: the run has since been given more of them")
        return found

    def curve(self, name: str, factor: float = 1.0) -> list[Point | None]:
        """Steps and values of what was recorded by a name, through all phases.

        `None` is where one phase follows another, whose steps go on from it.
        """
        found = []
        for _, start, records in self._by_phase():
            found += [None] if found else []
            found += [(start + step, y) for step, y in points(records, name, factor)]
        return found if any(found) else []

    def starts(self) -> list[tuple[str, int]]:
        """Every phase after the first one that was recorded, with the step at which it begins."""
        found = self._by_phase()
        return [(PHASES[phase], start) for phase, start, records in found if start and records]

    def _by_phase(self) -> Iterator[tuple[str, int, list[Mapping[str, Any]]]]:
        """Each phase with the step at which it begins and its records."""
        start = 0
        for phase in self.result.method.phases:
            records = self.records(phase)
            yield phase, start, records
            start += records[-1]["step"] if records else 0

    def records(self, phase: str) -> list[Mapping[str, Any]]:
        """The records of a phase."""
        return [record for record in self.result.records if record["phase"] == phase]


def tested_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a task without what is of its training alone."""
    return {name: value for name, value in task.items() if name != "label_smoothing"}


def network_name(model: Mapping[str, Any]) -> str:
    """A network as papers call it: "ResNet-20", "MobileNetV2 (width 0.5)"."""
    arguments = {argument: value for argument, value in model.items() if argument != "weights"}
    name = arguments.pop("name", "network")
    family, defaults = FAMILIES.get(name) if isinstance(name, str) else None, {}
    if family is not None:
        defaults = inspect.signature(family.__init__).parameters
        depth = f"-{arguments.pop('depth')}" if "depth" in arguments else ""
        name = f"{family.__name__}{depth}"
    elif is_own(name):
        name = name.partition(":")[2]
    shown = [
        f"{argument} {f'{value:g}' if isinstance(value, float) else value}"
        for argument, value in arguments.items()
        if argument not in defaults or value != defaults[argument].default
    ]
    return f"{name} ({', '.join(shown)})" if shown else str(name)


def points(records: Sequence[Mapping[str, Any]], name: str, factor: float = 1.0) -> list[Point]:
    """Step and value of the records that have a finite number by that name."""
    values = [(record["step"], number(record.get(name))) for record in records]
    return [(step, factor * value) for step, value in values if value is not None]


def tested(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics on test data of a record, by name."""
    return {
        name.removeprefix("test_"): value
        for name, value in record.items()
        if name.startswith("test_") and number(value) is not None
    }


def when(record: Mapping[str, Any]) -> str:
    """When in a run it was tested."""
    return f"{record['phase']} phase, epoch {record.get('epoch')}"


def number(value: Any) -> float | None:
    """A finite number, or nothing."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None
