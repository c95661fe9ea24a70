"""Prunes a network as a configuration says; experiments/configs has those of the paper.

Example: python experiments/main.py --config=experiments/configs/resnet20.py --config.target=0.38
"""

from collections.abc import Callable, Sequence
import logging
import os
from pathlib import Path
import runpy
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from dhp_jax.backend.cache import keep_compiled, long_compilations
from dhp_jax.config.checks import check_overrides
from dhp_jax.config.methods import METHODS
from dhp_jax.data import DataNotFoundError, StreamError
from dhp_jax.distributed import processes
from dhp_jax.distributed.preemption import EXIT_CODE, exit_at_once, watch_for_stop
from dhp_jax.distributed.processes import ProcessError, are_several, is_first
from dhp_jax.errors import ConfigError, NonFiniteError
from dhp_jax.pipeline import targets
from dhp_jax.pipeline.preparation import Run
from dhp_jax.pipeline.targets import execute
from dhp_jax.report import text as report_text
from dhp_jax.report import write as report_write
from dhp_jax.train.checkpoints import CheckpointError
from dhp_jax.train.phase import Stopped
from dhp_jax.train.progress_bar import ProgressBar
from dhp_jax.workdir.summary import beside, read_baseline

EXAMPLE = "experiments/configs/digits_resnet20.py"


def main(arguments: Sequence[str]) -> int:
    """Runs, and prints what came of it.

    Returns the exit code: 2 for wrong input, 1 for a loss that is no longer finite, a disk that is
    full, or another process that has died, 75 for a run that was told to end and that the same
    command takes up again.
    """
    logging.basicConfig(format="%(message)s", force=True)  # Orbax has made another at its import
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # pages of Orbax's, where a line is ours
    if "--help" in arguments:
        print(__doc__, define(arguments).main_module_help(), sep="\n")
        return 0
    try:
        options = parse(arguments)
        with exit_at_once():
            runs = prepare(options)
    except (flags.Error, ValueError, ProcessError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    try:
        with (
            long_compilations(tell_compiled),
            watch_for_stop(options.config.checkpoint.grace) as stopping,
        ):
            baseline = options.baseline or beside(options.workdir, options.config)
            summaries = execute(
                runs, options.workdir, baseline=baseline, stopping=stopping, command=arguments
            )
    except (DataNotFoundError, ConfigError) as error:  # as a file that is damaged when it is read
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except NonFiniteError as error:
        hint = ""
        if options.config.nonfinite == "stop" and not error.tested:
            rate = f"--config.{error.phase}.learning_rate"
            hint = f"; try a smaller {rate}; --config.nonfinite=skip leaves such batches out"
        print(f"error: {error}{hint}", file=sys.stderr)
        return 1
    except OSError as error:
        where = "" if isinstance(error, CheckpointError) else f"{options.workdir}: "
        mended = "the same command goes on once that is mended"
        print(f"error: {where}{error}; {mended}", file=sys.stderr)
        return 1
    except Stopped as error:
        print(f"{error}; the same command goes on from there", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except StreamError as error:
        print(f"error: {error}; the same command goes on", file=sys.stderr)
        return 1
    except (RuntimeError, ValueError) as error:
        if not are_several():
            raise
        print(f"error: {processes.describe_loss(error)}; the same commands go on", file=sys.stderr)
        return 1
    if is_first():
        for run, summary in zip(runs, summaries, strict=True):
            print(report_text.text(run.workdir, summary))
        if runs[0].workdir != Path(options.workdir):
            print(f"{'all sizes':<16} {Path(options.workdir) / report_write.COMPARED}")
    return 0


def prepare(options: flags.FlagValues) -> list[Run]:
    """Checks all that can be checked before training; a run for each target."""
    join(options)
    if options.baseline is not None:
        read_baseline(options.baseline)
    keep_compiled(options.compilation_cache)
    bar = [ProgressBar()] if is_first() else []
    runs = targets.prepare(options.config, options.workdir, bar)
    if is_first():
        tell_target(options.config)
    return runs


def tell_target(config: ConfigDict) -> None:
    """A line where the FLOPs have a budget beside others, which need not have been asked for."""
    others = [name for name in ("params", "activations", "latency") if config.budget[name]]
    if others and METHODS[config.method].chooses and config.targets is None and config.target < 1:
        print(
            f"config.target={config.target:g} of the FLOPs holds besides {', '.join(others)}; "
            "--config.target=1 leaves it out",
            file=sys.stderr,
        )


def join(options: flags.FlagValues) -> None:
    """Makes this process one of several, if it is told to."""
    given = options.coordinator, options.processes, options.process
    if options.distributed or any(value is not None for value in given):
        wait = f"up to {processes.JOIN_TIMEOUT_S} s"
        print(f"waiting for the other processes, {wait}", file=sys.stderr)
        processes.join(*given)


def tell_compiled(function: str, seconds: float) -> None:
    """A line on the terminal, above the bar."""
    tqdm.write(f"compiled {function} in {seconds:.1f} s", file=sys.stderr)


def define(arguments: Sequence[str]) -> flags.FlagValues:
    """The flags, not yet parsed."""
    options = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration of the run, given first; --config.<field>=<value> overrides a field.",
        options,
        sys_argv=list(arguments),
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run; runs/<name of the configuration>, with -<method> after it for "
        "another --config.method than dhp, if not given.",
        options,
    )
    flags.DEFINE_string(
        "baseline",
        None,
        "Directory of a finished run with --config.method=baseline, for comparison; "
        "if not given the source of the run if that is a baseline, and otherwise "
        "<workdir>-baseline (without -<method> before).",
        options,
    )
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "Folder in which compiled programs are kept for the next run; "
        "~/.cache/dhp_jax/xla if not given, off to keep none.",
        options,
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "One of several processes, which find each other: on Cloud TPU, GKE, SLURM, Open MPI.",
        options,
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "host:port of the first of several processes, with --processes and --process.",
        options,
    )
    flags.DEFINE_integer("processes", None, "How many processes there are.", flag_values=options)
    flags.DEFINE_integer("process", None, "Number of this process, from 0.", flag_values=options)
    return options


def parse(arguments: Sequence[str]) -> flags.FlagValues:
    """The options of a command line, and the directory of the run if it is not given."""
    named = [a.lstrip("-").partition("=") for a in arguments if a.startswith("-")]
    given = {name: value if equals else None for name, equals, value in named}
    path = Path(given.get("config") or "")
    if not path.is_file():
        got = f"{given['config']!r}, which is no file" if given.get("config") is not None else None
        raise ValueError(f"--config: expected --config=FILE, such as {EXAMPLE}; got {got}")
    try:
        module = runpy.run_path(str(path))
    except Exception as error:  # whatever a file that is no configuration may raise
        raise ValueError(f"--config: {path}: {type(error).__name__}: {error}") from error
    if "get_config" not in module:
        raise ValueError(f"--config: expected a file with a function get_config(); got {path}")
    # First, because the flag parser's own complaints do not tell what is possible.
    overrides = {name: text for name, text in given.items() if name.startswith("config.")}
    check_overrides(read_config(path, module["get_config"]), overrides)
    options = define(arguments)
    try:
        surplus = options(arguments)[1:]
    except TypeError as error:  # a value that cannot become one of the field's type
        raise ValueError(error) from error
    if surplus:
        raise ValueError(f"expected flags only, such as --config.target=0.5; got {surplus[0]!r}")
    if options.workdir is not None:
        options.workdir = os.path.normpath(options.workdir)
    else:
        method = options.config.method
        options.workdir = f"runs/{path.stem}" + ("" if method == "dhp" else f"-{method}")
    return options


def read_config(path: Path, get_config: Callable[[], ConfigDict]) -> ConfigDict:
    """What the function of a configuration file returns.

    Raises:
      ValueError: it raises something, or returns something else.
    """
    try:
        config = get_config()
    except Exception as error:  # whatever someone's function may raise
        raise ValueError(f"--config: {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"--config: {path}: expected get_config() to return a ConfigDict; got {config!r:.100}"
        )
    return config


if __name__ == "__main__":
    code = main(sys.argv)
    if code in (0, EXIT_CODE):  # as in all processes
        sys.exit(code)
    processes.leave(code)
