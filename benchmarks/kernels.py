"""Where a device's time goes: operations of a profile, with the bytes and FLOPs of the program."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
import gzip
import json
import math
from pathlib import Path
import re
import tempfile

import jax
from programs import _INSTRUCTION, _bytes

_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_DIMENSION = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
MOST_EVENTS = 200_000  # of a trace that is kept


@dataclass(frozen=True)
class Event:
    """Something that a device did.

    Attributes:
      kernel: its name on the device.
      operation: the name of the program's instruction that it is of; "" if it is not told.
      line: stream or core.
      start, end: in nanoseconds.
    """

    kernel: str
    operation: str
    line: str
    start: float
    end: float


@dataclass(frozen=True)
class Operation:
    """An instruction of the program, or the kernels of a name where the instruction is not told.

    Attributes:
      name, kind: of it, and what it does.
      count: how often a step has it run, on average.
      seconds: that it takes a step.
      bytes, flops: a step; of its operands and result, each once, and 0 where they are not known.
    """

    name: str
    kind: str
    count: float
    seconds: float
    bytes: float
    flops: float


def trace(run: Callable[[], None], kept: Path | None = None) -> list[Event]:
    """What devices do while a function runs.

    Args:
      run: has been run before, and waits for what it starts.
      kept: file for the events, as gzipped JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        found = events(data)
    if kept is not None:
        rows = [(e.kernel, e.operation, e.line, e.start, e.end) for e in found[:MOST_EVENTS]]
        kept.write_bytes(gzip.compress(json.dumps(rows).encode()))
    return found


def events(data: jax.profiler.ProfileData) -> list[Event]:
    """The operations of devices; where there is no device but the CPU, those of its threads."""
    planes = [plane for plane in data.planes if plane.name.startswith("/device:")]
    found = []
    for plane in planes or list(data.planes):
        lines = list(plane.lines)
        if planes:  # a GPU has a line for each stream, a TPU one for all operations
            streams = [line for line in lines if line.name.startswith("Stream")]
            lines = streams or [line for line in lines if line.name == "XLA Ops"]
        for line in lines:
            for event in line.events:
                stats = {name: value for name, value in event.stats if name is not None}
                operation = str(stats.get("hlo_op", ""))
                if planes or operation:
                    start, end = event.start_ns, event.end_ns
                    found.append(Event(event.name, operation, line.name, start, end))
    return found


def summary(found: Sequence[Event], steps: int) -> dict[str, float]:
    """How many kernels a step starts, how long the device is busy, and what share it waits."""
    if not found:
        return {"kernels a step": 0.0, "busy, ms": 0.0, "idle": 0.0}
    begin, end = min(e.start for e in found), max(e.end for e in found)
    busy, last = 0.0, begin
    for event in sorted(found, key=lambda e: e.start):
        busy += max(0.0, event.end - max(last, event.start))
        last = max(last, event.end)
    return {
        "kernels a step": len(found) / steps,
        "busy, ms": busy / steps / 1e6,
        "idle": 1 - busy / max(end - begin, 1.0),
    }


def by_operation(found: Sequence[Event], text: str, steps: int) -> list[Operation]:
    """The operations by what they take together, longest first.

    Args:
      found: events of some steps.
      text: the compiled program.
      steps: how many there were.
    """
    taken: dict[str, float] = defaultdict(float)
    count: Counter[str] = Counter()
    for event in found:
        name = event.operation or event.kernel
        taken[name] += event.end - event.start
        count[name] += 1
    known = costs(text)
    # A kernel that XLA has generated has its fusion's name, as far as a kernel can.
    known |= {_as_kernel(name): cost for name, cost in known.items()}
    result = []
    for name, nanoseconds in taken.items():
        kind, size, flops = known.get(name, ("kernel", 0, 0))
        runs = count[name] / steps
        result.append(
            Operation(name, kind, runs, nanoseconds / steps / 1e9, runs * size, runs * flops)
        )
    return sorted(result, key=lambda operation: -operation.seconds)


def by_kind(found: Sequence[Operation], most: int = 8) -> list[tuple[str, float, float]]:
    """Seconds and number a step of the operations of each kind, longest first."""
    seconds: dict[str, float] = defaultdict(float)
    count: dict[str, float] = defaultdict(float)
    for operation in found:
        kind = operation.kind if operation.kind != "kernel" else _family(operation.name)
        seconds[kind] += operation.seconds
        count[kind] += operation.count
    order = sorted(seconds, key=lambda kind: -seconds[kind])[:most]
    return [(kind, seconds[kind], count[kind]) for kind in order]


def _as_kernel(name: str) -> str:
    """An instruction's name as that of a kernel."""
    return re.sub(r"[^\w]", "_", name)


def told(found: Sequence[Event]) -> float:
    """The share of the time of events of which the instruction is told."""
    total = sum(event.end - event.start for event in found)
    named = sum(event.end - event.start for event in found if event.operation)
    return named / total if total else 0.0


def _family(kernel: str) -> str:
    """The name of a kernel without its number."""
    return re.sub(r"[._]?\d+$", "", kernel)[:60]


def costs(text: str) -> dict[str, tuple[str, int, int]]:
    """What each instruction of a program is, its bytes (operands and result), and its FLOPs.

    FLOPs are those of convolutions and matrix products, also of those within a fusion; all else
    counts none. A loop's body counts once.
    """
    lines = text.splitlines()
    found, types, inner, current = {}, {}, defaultdict(int), ""
    parsed = []
    for line in lines:
        if line.endswith("{") and not line.startswith(" "):
            current = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
        match = _INSTRUCTION.match(line)
        if match:
            types[match["name"]] = match["type"]
            parsed.append((current, match, line))
    for computation, match, line in parsed:
        operands = [n for n in re.findall(r"%([\w.\-]+)", match["given"]) if n in types]
        flops = _flops(match, line, [types[n] for n in operands])
        inner[computation] += flops
        size = _bytes(match["type"]) + sum(_bytes(types[n]) for n in operands)
        found[match["name"]] = [_kind(match, line), size, flops, _CALLS.search(line)]
    return {
        name: (kind, size, flops or (inner[calls[1]] if calls else 0))
        for name, (kind, size, flops, calls) in found.items()
    }


def _kind(match: re.Match, line: str) -> str:
    """What an instruction does."""
    target = re.search(r'custom_call_target="([^"]+)"', line)
    if target:
        return target[1]
    kind = re.search(r"kind=(\w+)", line)
    return f"{match['op']} {kind[1]}" if kind else match["op"]


def _flops(match: re.Match, line: str, operands: Sequence[str]) -> int:
    """Of a convolution or a matrix product; 0 of all else."""
    result = _sides(match["type"])
    labels = _LABELS.search(line)
    if labels and len(operands) >= 2:
        lhs, rhs = _sides(operands[0]), _sides(operands[1])
        if "BackwardFilter" in line:  # (image, gradient) -> kernel
            output, kernel = rhs, result
        elif "BackwardInput" in line:  # (gradient, kernel) -> image
            output, kernel = lhs, rhs
        else:
            output, kernel = result, rhs
        features = labels[2].index("o")
        if len(kernel) <= features:
            return 0
        return 2 * math.prod(output) * math.prod(kernel) // max(1, kernel[features])
    contracting = _DIMENSION.search(line)
    if contracting and operands:
        lhs = _sides(operands[0])
        inner = [lhs[int(i)] for i in contracting[1].split(",") if i and int(i) < len(lhs)]
        return 2 * math.prod(result) * math.prod(inner)
    return 0


def _sides(shape: str) -> list[int]:
    """The sizes of an array, or of the first one of a tuple."""
    found = _SHAPE.search(shape)
    return [int(side) for side in found[1].split(",") if side] if found else []
