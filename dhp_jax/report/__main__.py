"""What a run leaves for people: a page, a table of its layers, a summary, and plots.

Makes the page of a run again, finished or not, or one that compares several.

    dhp-report runs/resnet20  # writes runs/resnet20/report.html;
        # with targets, the pages of all sizes and runs/resnet20/compare.html
    dhp-report runs/resnet20 runs/resnet56  # writes compare.html
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from dhp_jax import files
from dhp_jax.cli import Parser, run
from dhp_jax.models.registry import add_own
from dhp_jax.report.write import COMPARED, PAGE, write_comparison, write_page, write_sizes
from dhp_jax.workdir import target_dirs
from dhp_jax.workdir.reader import configuration
from dhp_jax.workdir.summary import beside, read_baseline


def main(arguments: Sequence[str]) -> None:
    """Makes pages as the command line says, and prints where they are."""
    parser = Parser(prog="dhp-report", description=__doc__.split("\n\n", 1)[1])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help=f"file to write; RUN/{PAGE} by default, for a run with targets RUN/{COMPARED}, and "
        f"{COMPARED} for several runs",
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        help="run of the unpruned network to compare with; RUN-baseline if not given",
    )
    parser.add_argument(
        "--latency", action="store_true", help="measure the latency here and now, and note it"
    )
    parser.add_argument(
        "--build", metavar="NAME", help="module:function of a run on a network of your own"
    )
    options = parser.parse_args(arguments)
    if options.build is not None:
        add_own(options.build)
    print(_make(options))


def _make(options: argparse.Namespace) -> Path:
    if options.out is not None:
        if Path(options.out).is_dir():
            raise ValueError(f"--out: expected a file; got the folder {options.out!r}")
        if not Path(options.out).parent.is_dir():
            raise ValueError(
                f"--out: expected a file in a folder that is there; got {options.out!r}"
            )
    folder = "." if len(options.runs) > 1 else options.runs[0]
    folder = Path(folder) if options.out is None else Path(options.out).parent
    if why := files.why_unwritable(folder):
        raise ValueError(f"--out: expected a folder that can be written; got '{folder}' ({why})")
    if len(options.runs) > 1:
        for name in ("baseline", "latency"):
            if getattr(options, name):
                raise ValueError(f"--{name}: expected one run with it; got {len(options.runs)}")
        runs = [run for workdir in options.runs for run in target_dirs.begun(workdir) or [workdir]]
        return write_comparison(runs, options.out or COMPARED)
    (workdir,) = options.runs
    if options.baseline is not None:
        read_baseline(options.baseline)
    several = target_dirs.begun(workdir)
    config = configuration(several[0] if several else workdir)
    baseline = options.baseline or beside(workdir, config)
    make = write_sizes if several else write_page
    return make(workdir, baseline=baseline, measure=options.latency, out=options.out)


if __name__ == "__main__":
    sys.exit(run(main))
