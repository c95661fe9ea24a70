"""All there is to know of the accelerator at hand, in the minutes that it is at hand.

Stages run in order of worth, each in a process of its own that ends with its share of the time.
Every row is on disk when it has been measured, and a stage that fails or is ended stops no other.
Compiled programs are kept in one folder, so that no stage compiles what another one has.

    a  the search step against the plain network's, and against PyTorch's (eager)
    b  a whole recipe on CIFAR-10, ResNet-20's unless --recipe says otherwise; it needs --data
    c  what is there for the hardware's sake, on and off
    d  pruned networks, as they fall and with rounded widths, as a share of the ideal
    e  where the time of a step goes: its costliest operations, and when the device waits
    f  the search step against PyTorch's as torch.compile makes it

    python benchmarks/accelerator.py --minutes=8 --out=benchmarks/results
    python benchmarks/accelerator.py --minutes=6 --out=/tmp/out --stages c a
    python benchmarks/accelerator.py --minutes=9 --out=/tmp/out --stages b --data=cifar10.pack
    python benchmarks/accelerator.py --rehearse --out=/tmp/out     # the same way, tiny, anywhere
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
import contextlib
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

from record import commit, positive, progress, table_of, with_quartiles

STAGES = {  # in order of worth, with the share of the time that each is worth
    "a": 35,
    "c": 25,
    "d": 20,
    "e": 10,
    "f": 10,
    "b": 0,  # by name only: it takes what it is given
}
TITLES = {
    "a": "The search step against others",
    "b": "A whole recipe on CIFAR-10 (JPEG)",
    "c": "What is there for the hardware's sake, on and off",
    "d": "Pruned networks, and rounded widths",
    "e": "Where the time of a step goes",
    "f": "The search step against torch.compile",
}
NAME = "accelerator"
LAST = 5.0  # seconds that the page and the end of a process take


def main() -> None:
    options = parse()
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(options.cache.absolute()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    # PyTorch shares the GPU in some stages, and each stage's process follows another one's.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.rehearse:  # which asks whether all of it runs, not how fast
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    if options.stage:
        import stages  # JAX looks for its devices in the processes of stages alone

        stages.run(options.stage, options, Journal(folder))
        return
    journal = Journal(folder)
    journal.clear()
    journal.add(stage=None, event="begin", command=command(), commit=options.commit or commit())
    ends = time.time() + 60 * options.minutes - LAST
    for i, stage in enumerate(options.stages):
        seconds = share(options.stages[i:], ends - time.time(), options.rehearse)
        journal.add(stage=stage, event="start", seconds=round(seconds, 1))
        code = run_stage(stage, seconds, folder) if seconds > LAST else "no time"
        journal.add(stage=stage, event="end", code=code)
        write_page(folder, journal)
    progress((folder / f"{NAME}.md").read_text())
    failed = [entry for entry in journal.entries() if entry["event"] == "error"]
    if failed and options.rehearse:
        sys.exit(f"error: {failed[0]['stage']}, {failed[0]['item']}: {failed[0]['error']}")


def parse() -> argparse.Namespace:
    """The command line."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--minutes", type=minutes, default=8.0, help="that all of it may take")
    arguments.add_argument("--out", type=Path, required=True, help="folder for what is measured")
    arguments.add_argument("--stages", nargs="+", choices=STAGES, help="in this order")
    arguments.add_argument("--rehearse", action="store_true", help="tiny networks, on any device")
    arguments.add_argument("--commit", help="what is measured, for a tree without git")
    arguments.add_argument("--data", type=Path, help="CIFAR-10 as cifar10_pack.py makes it")
    arguments.add_argument("--recipe", choices=("resnet20", "resnet56"), default="resnet20")
    arguments.add_argument(
        "--resume", type=Path, help="the first file that an unfinished recipe left"
    )
    arguments.add_argument("--batch", type=positive, default=64, help="of the recipe")
    arguments.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other fields of the recipe"
    )
    arguments.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/dhp_jax/xla").expanduser(),
        help="folder for compiled programs",
    )
    arguments.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.stages is None:
        options.stages = [name for name, share in STAGES.items() if share]
    for name in ("data", "resume"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            arguments.error(f"--{name}: expected a file, got {path}")
    if "b" in options.stages and options.data is None and not options.rehearse:
        arguments.error("--stages: expected --data with b, whose recipe needs the images")
    return options


def minutes(text: str) -> float:
    """A positive number of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def share(stages: Sequence[str], seconds: float, rehearse: bool) -> float:
    """The seconds of the first of some stages, of those that are left for all of them."""
    worth = [STAGES[stage] or 100 for stage in stages]
    return seconds if rehearse else seconds * worth[0] / sum(worth)


class Journal:
    """A file with a line for everything that happens, written at once.

    Args:
      folder: that of the results.
    """

    def __init__(self, folder: Path):
        self.path = folder / f"{NAME}.jsonl"

    def clear(self) -> None:
        """Begins anew."""
        self.path.write_text("")

    def add(self, **entry: Any) -> None:
        """Adds an entry, which is on disk when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def entries(self) -> list[dict[str, Any]]:
        """All of them; a line that a process could not finish is left out."""
        found = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found


def run_stage(stage: str, seconds: float, folder: Path) -> int | str:
    """Runs a stage in a process of its own; how it ended, or that it was ended.

    What it prints goes to the end of one file. Its last seconds are its own to save in, if it has
    something to save; then it is ended with all that it has started.
    """
    until = time.time() + seconds
    arguments = [sys.executable, __file__, *sys.argv[1:], f"--stage={stage}", f"--until={until}"]
    with (folder / f"{NAME}.log").open("a") as log:
        log.write(f"\n== stage {stage}, {seconds:.0f} s\n")
        log.flush()
        process = subprocess.Popen(
            arguments, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(1.0, until - time.time()))
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def command() -> str:
    """The command line, with the names of files only as they were given."""
    return " ".join(["python", *sys.argv])


def write_page(folder: Path, journal: Journal) -> None:
    """Everything measured so far as one page."""
    (folder / f"{NAME}.md").write_text(page(journal.entries()))


def page(entries: Sequence[Mapping[str, Any]]) -> str:
    """The page, as Markdown.

    Args:
      entries: of the journal.
    """
    begin = next(entry for entry in entries if entry["event"] == "begin")
    about = next((e["about"] for e in entries if e["event"] == "about"), {})
    packages = [f"{name} {version}" for name, version in about.get("versions", {}).items()]
    packages += [about["platform"]] if "platform" in about else []
    parts = [
        "# Measured on an accelerator",
        f"{about.get('date', '?')}, {about.get('hardware', 'no device')}, {', '.join(packages)}, "
        f"commit {begin['commit']}",
        f"    {begin['command']}",
        "Medians, with quartiles in parentheses. What a row compares ran in turn in one process; "
        "a ratio is that of each round.",
    ]
    for stage in dict.fromkeys(entry["stage"] for entry in entries if entry["stage"]):
        of_stage = [entry for entry in entries if entry["stage"] == stage]
        parts.append(f"## {stage}: {TITLES[stage]}")
        parts += [table for table in tables(of_stage) if table]
        parts += left_out(of_stage)
    return "\n\n".join(parts) + "\n"


def tables(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The rows of a stage; those with the same columns as one table."""
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for entry in entries:
        if entry["event"] == "row":
            row = {k: v for k, v in entry["row"].items() if not k.startswith("_")}
            groups.setdefault(tuple(row), []).append([cell(value) for value in row.values()])
    return [
        table_of([name if i == 0 else f">{name}" for i, name in enumerate(columns)], rows)
        for columns, rows in groups.items()
    ]


def cell(value: Any) -> str:
    """A value for a table: a median with its spread, a number with four digits, or as it is."""
    if isinstance(value, Mapping) and set(value) == {"median", "low", "high"}:
        return with_quartiles(value, digits(value["median"]))
    if isinstance(value, float):
        return f"{value:{digits(value)}}"
    return str(value).replace("|", "\\|")


def digits(value: float) -> str:
    """How to write a number of such a size."""
    size = abs(value)
    return ",.0f" if size >= 1000 else ".1f" if size >= 100 else ".2f" if size >= 10 else ".3f"


def left_out(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a stage was to measure and has not, and why."""
    planned = [name for entry in entries if entry["event"] == "plan" for name in entry["items"]]
    done = {entry["item"] for entry in entries if entry["event"] == "done"}
    failed = {e["item"]: e["error"] for e in entries if e["event"] == "error"}
    code = next((entry["code"] for entry in entries if entry["event"] == "end"), "unfinished")
    lines = [f"- {name}: {error}" for name, error in failed.items()]
    missing = [name for name in planned if name not in done and name not in failed]
    if missing:
        lines.append(f"- no time: {', '.join(missing)}")
    if code not in (0, "out of time"):
        lines.append(f"- the stage ended with: {code}")
    return ["Left out:\n\n" + "\n".join(lines)] if lines else []


if __name__ == "__main__":
    main()
