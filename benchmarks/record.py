"""What benchmarks have in common: arguments, tables, and the files they write."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
import datetime
import json
from pathlib import Path
import shlex
import subprocess
import sys
from typing import Any

import jax
from zoo import NETWORKS, QUICK

from dhp_jax.budgets.timing import hardware
from dhp_jax.workdir.summary import versions


def parser(
    about: str, networks: Sequence[str], rounds: int | None = None, what: str = ""
) -> argparse.ArgumentParser:
    """The arguments that all benchmarks of networks take.

    Args:
      about: the benchmark's docstring.
      networks: those measured by default.
      rounds: the default of `--rounds`; `None` for no such argument.
      what: is repeated, for the help on `--rounds`.
    """
    arguments = argparse.ArgumentParser(description=about.splitlines()[0])
    arguments.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=[name for name in networks if name != QUICK],
        metavar="NETWORK",
    )
    if rounds is not None:
        arguments.add_argument("--rounds", type=positive, default=rounds, help=what)
    arguments.add_argument("--quick", action="store_true", help="a smoke run of a few seconds")
    arguments.add_argument("--out", type=Path, help="folder for the results as JSON and Markdown")
    return arguments


def positive(text: str) -> int:
    """A positive integer of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def progress(line: str) -> None:
    """Tells how far a benchmark is."""
    print(line, file=sys.stderr, flush=True)


def table_of(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; columns whose name begins with ">" are aligned to the right."""
    ruler = ["---:" if name.startswith(">") else "---" for name in columns]
    names = [name.removeprefix(">") for name in columns]
    return "\n".join(
        [
            f"| {' | '.join(names)} |",
            f"|{'|'.join(ruler)}|",
            *(f"| {' | '.join(map(str, row))} |" for row in rows),
        ]
    )


def with_quartiles(values: dict[str, float], form: str) -> str:
    """A median with its quartiles, for tables."""
    return "{median:{form}} ({low:{form}} to {high:{form}})".format(form=form, **values)


def publish(
    folder: Path | None, name: str, title: str, note: str, rows: list[dict], table: str
) -> None:
    """Prints a table; writes `name.json` and `name.md` into a folder, if there is one.

    They tell hardware, versions, commit, date and command.
    """
    print(table)
    write(folder, name, title, note, rows, table, circumstances())


def publish_each(
    folder: Path | None,
    name: str,
    title: str,
    note: str,
    rows: Iterable[dict],
    as_table: Callable[[list[dict]], str],
) -> None:
    """`publish` of rows that take long: each is told and written as soon as it has been measured.

    So a benchmark that is ended early keeps what it has.
    """
    about, measured, table = circumstances(), [], ""
    for row in rows:
        measured.append(row)
        before, table = table, as_table(measured)
        progress(table.splitlines()[-1] if before else table)
        jax.clear_caches()  # programs of this row, which take memory
        write(folder, name, title, note, measured, table, about)
    print(table)


def commit() -> str:
    """The commit of the tree."""
    asked, here = ["git", "rev-parse", "--short", "HEAD"], Path(__file__).parent
    told = subprocess.run(asked, cwd=here, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "not known"


def circumstances() -> dict[str, Any]:
    """With what, by which command and when something is measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def write(
    folder: Path | None,
    name: str,
    title: str,
    note: str,
    rows: list[dict],
    table: str,
    about: Mapping[str, Any],
) -> None:
    """The files of `publish`."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
    )
    packages = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    (folder / f"{name}.md").write_text(
        f"# {title}\n\n{note}\n\n{table}\n\n"
        f"{about['date']}, {about['hardware']}, {packages}, commit {about['commit']}\n\n"
        f"    {about['command']}\n"
    )
