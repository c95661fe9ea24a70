"""Prunes a network as a configuration says; experiments/configs has those of the paper.

Example: python experiments/main.py --config=experiments/configs/resnet20.py --config.target=0.38
"""

from collections.abc import Sequence
import logging
from pathlib import Path
import runpy
import sys

from absl import flags
from ml_collections import config_flags

from dhp_jax import pipeline, report
from dhp_jax.config import check_names
from dhp_jax.progress import ProgressBar

EXAMPLE = "experiments/configs/digits_resnet20.py"
CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration of the run.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; runs/<name of the configuration> if not given."
)
BASELINE = flags.DEFINE_string(
    "baseline",
    None,
    "Directory of a finished run with --config.method=baseline, for comparison; "
    "<workdir>-baseline if not given.",
)


def main(arguments: Sequence[str]) -> int:
    """Runs, prints what came of it, and returns the exit code: 2 for wrong input."""
    logging.basicConfig(format="%(message)s")
    try:
        name = parse(arguments)
        method = CONFIG.value.method
        workdir = WORKDIR.value or f"runs/{name}" + ("" if method == "dhp" else f"-{method}")
        run = pipeline.prepare(CONFIG.value, workdir, [ProgressBar()])
    except (flags.Error, ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    summary = pipeline.execute(run, baseline=BASELINE.value or f"{workdir}-baseline")
    print(report.text(workdir, summary))
    return 0


def parse(arguments: Sequence[str]) -> str:
    """Parses the command line; returns the name of the configuration."""
    given = dict(a.lstrip("-").split("=", 1) for a in arguments if a.startswith("-") and "=" in a)
    path = Path(given.get("config", ""))
    if not path.is_file():
        raise ValueError(
            f"--config: expected --config=FILE, such as {EXAMPLE}; got {given.get('config')!r}"
        )
    # The names first: the flag parser's own complaint does not tell what is possible.
    config = runpy.run_path(str(path))["get_config"]()
    check_names(config, [name for name in given if name.startswith("config.")])
    try:
        flags.FLAGS(arguments)
    except TypeError as error:  # a value that cannot become one of the field's type
        raise ValueError(error) from error
    return path.stem


if __name__ == "__main__":
    sys.exit(main(sys.argv))
