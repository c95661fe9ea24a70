"""What every benchmark writes: its figures, and what a reader needs to judge and repeat them."""

import datetime
import json
from pathlib import Path
import shlex
import statistics
import subprocess
import sys

from dhp_jax.report import hardware, versions


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def write(folder: Path, name: str, title: str, note: str, rows: list[dict], table: str) -> None:
    """Writes `name.json` and `name.md`, with hardware, versions, commit, date and command."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    about = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "hardware": hardware(),
        "versions": versions(),
    }
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
