"""The command of a run: from its arguments to an exit code, with one line for what goes wrong."""

from collections.abc import Callable, Sequence
import logging
import os
from pathlib import Path
import sys
import textwrap
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from dhp_jax.activity import program, told_when_silent
from dhp_jax.artifact.description import ArtifactError
from dhp_jax.backend.cache import keep_compiled, long_compilations
from dhp_jax.backend.memory import keep_memory
from dhp_jax.cli import expanded
from dhp_jax.config.checks import check_overrides
from dhp_jax.config.from_file import find_config, read_config
from dhp_jax.config.methods import METHODS, TAUGHT
from dhp_jax.data.stream import StreamError
from dhp_jax.distributed import processes
from dhp_jax.distributed.preemption import EXIT_CODE, exit_at_once, watch_for_stop
from dhp_jax.distributed.processes import ProcessError, are_several, is_first
from dhp_jax.errors import ConfigError, DataNotFoundError, NonFiniteError
from dhp_jax.pipeline import targets
from dhp_jax.pipeline.header import header
from dhp_jax.pipeline.preparation import Run
from dhp_jax.report import text as report_text
from dhp_jax.report.run_report import network_name
from dhp_jax.train.checkpoints import CheckpointError
from dhp_jax.train.phase import Stopped
from dhp_jax.train.progress_bar import ProgressBar
from dhp_jax.workdir.identity import CONFIG, typed
from dhp_jax.workdir.summary import beside, read_baseline

WEIGHTS = "config.model.weights"
Define = Callable[[Sequence[str]], flags.FlagValues]  # the flags of a command line, not yet parsed


class _Message(logging.Formatter):
    """The message alone, in lines of 80 columns on a terminal, and in one line elsewhere."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.exc_info or not sys.stderr.isatty():
            return text
        return textwrap.fill(text, 80, subsequent_indent="  ", break_on_hyphens=False)


def run(arguments: Sequence[str], define: Define) -> int:
    """Carries out what a command line says, and prints what came of it.

    Args:
      arguments: the command line, with the name of the program first.
      define: gives the flags for it, see `pipeline.flags`.

    Returns:
      The exit code: 2 for wrong input; 1 for a loss that is not finite, a disk that is full, or
      another process that has died; 75 for a run that was told to end and that the same command
      takes up again; 130 for Ctrl-C.
    """
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO)  # the log of the run has more
    handler.setFormatter(_Message("%(message)s"))
    logging.basicConfig(handlers=[handler], force=True)  # absl may have made one
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # pages of Orbax's, where a line is ours
    bar = ProgressBar()
    with told_when_silent(lambda *what: bar.wait(*what) if is_first() else None):
        return _run(expanded(arguments), define, bar)


def _run(arguments: Sequence[str], define: Define, bar: ProgressBar) -> int:
    try:
        with exit_at_once():
            options = parse(arguments, define)
            runs = prepare(options, bar)
    except (flags.Error, ValueError, OSError, ProcessError) as error:
        print("error:", _in_one_line(error), file=sys.stderr)
        return 2
    try:
        summaries = _carry_out(runs, options, arguments)
    except (Exception, KeyboardInterrupt) as error:
        code, line = explain(error, options, runs)
        if code is None:
            raise
        print(line, file=sys.stderr)
        return code
    if is_first():
        print(_told(runs, summaries, options, arguments))
    return 0


def _told(
    runs: Sequence[Run],
    summaries: Sequence[dict[str, Any]],
    options: flags.FlagValues,
    arguments: Sequence[str],
) -> str:
    """What is printed at the end."""
    missing = baseline_command(arguments, options.workdir, options.config)
    if runs[0].workdir == Path(options.workdir):
        return report_text.text(options.workdir, summaries[0], missing)
    named = {run.workdir.name: summary for run, summary in zip(runs, summaries, strict=True)}
    return report_text.sizes_text(options.workdir, named, missing)


def baseline_command(
    arguments: Sequence[str], workdir: str | os.PathLike, config: ConfigDict
) -> str:
    """The command line that trains the unpruned network of a run, where it is looked for."""
    program, *given = arguments
    left_out = ("workdir", "baseline", "config.method", "config.source", "config.targets")
    kept, skipped = [], False
    for argument in given:
        name, equals, _ = argument.lstrip("-").partition("=")
        if name in left_out:
            skipped = not equals  # its value is the next argument
        elif not skipped:
            kept.append(argument)
        else:
            skipped = False
    # A baseline is refused with these, and a file may set them.
    unfit = ["--config.per_flop=0"] * bool(config.per_flop)
    taught = [phase for phase in TAUGHT if config[phase].distillation.weight]
    unfit += [f"--config.{phase}.distillation.weight=0" for phase in taught]
    unfit += ["--config.source=None"] * (config.source is not None)
    where = f"--workdir={beside(workdir, config)}"
    return typed([program, *kept, "--config.method=baseline", *unfit, where])


def parse(arguments: Sequence[str], define: Define) -> flags.FlagValues:
    """The options of a command line, and the directory of the run if it is not given."""
    named = [a.lstrip("-").partition("=") for a in arguments if a.startswith("-")]
    given = {name: value if equals else None for name, equals, value in named}
    # First, because the flag parser's own complaints do not tell what is possible.
    overrides = {name: text for name, text in given.items() if name.startswith("config.")}
    weights = overrides.pop(WEIGHTS, "None")  # which files need not mention
    if weights is None:
        raise ValueError(f"{WEIGHTS}: expected --{WEIGHTS}=<value>; got none")
    if "config" not in given and arguments[1:] and not arguments[1].startswith("-"):
        raise ValueError(f"expected --config={arguments[1]}; got {arguments[1]!r}")
    for name in given:
        if name.startswith("noconfig."):
            raise ValueError(f"--{name}: expected --{name.removeprefix('no')}=False")
    config = read_config(given.get("config"))
    absent = check_overrides(config, overrides)
    found = find_config(given["config"])  # for a name, its file
    arguments = [
        a.replace(given["config"], found) if a.lstrip("-").startswith("config=") else a
        for a in arguments
        if a.lstrip("-").partition("=")[0] not in (WEIGHTS, *absent)
    ]
    options = _parsed(define(arguments), arguments, config)
    for name in absent:
        options.config.update_from_flattened_dict({name.removeprefix("config."): None})
    if WEIGHTS in given and isinstance(options.config.get("model"), ConfigDict):
        with options.config.unlocked():
            options.config.model.weights = None if weights == "None" else weights
    if options.workdir is None:
        method = options.config.method
        options.workdir = f"runs/{Path(given['config']).stem}"
        options.workdir += "" if method == "dhp" else f"-{method}"
    options.workdir = os.path.normpath(options.workdir)
    return options


def _parsed(
    options: flags.FlagValues, arguments: Sequence[str], config: ConfigDict
) -> flags.FlagValues:
    """The flags with the values of a command line; their parser's errors in words of ours."""
    try:
        surplus = options(arguments)[1:]
    except TypeError as error:  # a value that cannot become one of the field's type
        raise ValueError(error) from error
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        if name.partition(".")[0] in config:
            raise ValueError(f"--{name}: expected --config.{name}=<value>") from error
        raise
    if surplus:
        raise ValueError(f"expected flags only, such as --config.target=0.5; got {surplus[0]!r}")
    return options


def prepare(options: flags.FlagValues, bar: ProgressBar) -> list[Run]:
    """Checks all that can be checked before training; a run for each target."""
    join_others(options)
    if options.baseline is not None:
        read_baseline(options.baseline)
    keep_compiled(options.compilation_cache)
    keep_memory()
    if is_first() and sys.stderr.isatty():  # what follows takes seconds
        network = f"{network_name(options.config.model)} on {options.config.data.name}"
        print(f"checking   {network}, for {options.workdir}", file=sys.stderr, flush=True)
    runs = targets.prepare(options.config, options.workdir, [bar] if is_first() else [])
    if is_first():
        tell_target(options.config)
        print(header(runs), file=sys.stderr, flush=True)
    return runs


def join_others(options: flags.FlagValues) -> None:
    """Makes this process one of several, if it is told to."""
    given = options.coordinator, options.processes, options.process
    if options.distributed or any(value is not None for value in given):
        print(
            f"waiting for the other processes, up to {processes.JOIN_TIMEOUT_S} s", file=sys.stderr
        )
        processes.join(*given)


def tell_target(config: ConfigDict) -> None:
    """Prints a line where the target holds beside other budgets, and may not have been meant."""
    others = [name for name in ("params", "activations", "latency") if config.budget[name]]
    if others and METHODS[config.method].chooses and config.targets is None and config.target < 1:
        print(
            f"config.target={config.target:g} of the FLOPs holds besides {', '.join(others)}; "
            "--config.target=1 leaves it out",
            file=sys.stderr,
        )


def _carry_out(
    runs: Sequence[Run], options: flags.FlagValues, arguments: Sequence[str]
) -> list[dict[str, Any]]:
    """The summary of each run."""
    with (
        long_compilations(_tell_compiled),
        watch_for_stop(options.config.checkpoint.grace) as stopping,
    ):
        baseline = options.baseline or beside(options.workdir, options.config)
        return targets.execute(
            runs, options.workdir, baseline=baseline, stopping=stopping, command=arguments
        )


def _tell_compiled(seconds: float) -> None:
    """Prints a line above the bar for a program that a run is made of."""
    if compiled := program():
        tqdm.write(f"compiled {compiled} in {seconds:.1f} s", file=sys.stderr)


def explain(
    error: BaseException, options: flags.FlagValues, runs: Sequence[Run] = ()
) -> tuple[int | None, str]:
    """The exit code for what ended a run, `None` if nobody has foreseen it, and the line for it."""
    again = "the same command goes on"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"interrupted; {again} from the last checkpoint"
    if isinstance(error, Stopped):
        return EXIT_CODE, f"{error}; {again} from there"
    if is_first() and (gone := [r.workdir for r in runs if not (r.workdir / CONFIG).is_file()]):
        return 1, f"error: {gone[0]}: deleted while the run was at work in it"
    if isinstance(error, DataNotFoundError | ConfigError):  # as a file that is damaged when read
        return 2, f"error: {_in_one_line(error)}"
    if isinstance(error, NonFiniteError):
        hint = ""
        if options.config.nonfinite == "stop" and not error.tested:
            rate = f"--config.{error.phase}.learning_rate"
            hint = f"; try a smaller {rate}; --config.nonfinite=skip leaves such batches out"
        return 1, f"error: {error}{hint}"
    if isinstance(error, OSError):
        where = "" if isinstance(error, CheckpointError) else f"{options.workdir}: "
        told = f"{error.filename}: {error.strerror}" if error.filename else f"{where}{error}"
        return 1, f"error: {told}; {again} once that is mended"
    if isinstance(error, ArtifactError):  # a network of the run's, for its source's are told before
        return 1, f"error: {error.detail}; {again}"
    if isinstance(error, StreamError):
        return 1, f"error: {error}; {again}"
    if isinstance(error, RuntimeError | ValueError) and are_several():
        return 1, f"error: {processes.describe_loss(error)}; the same commands go on"
    return None, ""


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
