"""Runs the benchmarks that need nothing but the library, one after another.

python benchmarks/run.py --out=benchmarks/results
python benchmarks/run.py --only memory scaling
python benchmarks/run.py --quick          # a smoke run of a minute
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
import subprocess
import sys

BENCHMARKS = ("step", "compile", "input", "memory", "scaling", "pruned", "widths", "checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="smoke runs")
    parser.add_argument("--out", type=Path, help="folder for the results as JSON and Markdown")
    options = parser.parse_args()
    arguments = ["--quick"] * options.quick
    if options.out is not None:
        arguments.append(f"--out={options.out}")
    failed = run([Path(__file__).with_name(f"{name}.py") for name in options.only], arguments)
    if failed:
        sys.exit(f"error: {', '.join(failed)}: ended with an error, told above")


def run(scripts: Sequence[Path], arguments: Sequence[str]) -> list[str]:
    """Runs scripts one after another; the names of those that failed, which stops no other."""
    failed = []
    for script in scripts:
        print(f"\n{script.stem}\n", flush=True)
        command = [sys.executable, str(script), *arguments]
        if subprocess.run(command, check=False).returncode:
            failed.append(script.stem)
    return failed


if __name__ == "__main__":
    main()
