"""Prunes a network as a configuration says; experiments/configs has the paper's.

Example: dhp-train --config=resnet20 --config.target=0.38
In a clone: python experiments/main.py --config=experiments/configs/resnet20.py
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dhp_jax.config.documentation import describe
from dhp_jax.pipeline import command


def main(arguments: Sequence[str]) -> int:
    """Runs, and prints what came of it; returns the exit code, see `dhp_jax.pipeline.command`."""
    if {"--help", "-help", "-h"} & set(arguments):
        _, told = define(arguments).get_help(include_special_flags=False).strip().split("\n", 1)
        print(__doc__, told, "", describe(), sep="\n")
        return 0
    return command.run(arguments, define)


def define(arguments: Sequence[str]) -> flags.FlagValues:
    """The flags, not yet parsed."""
    options = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration of the run, given first: a file, or the name of one of the library's, such "
        "as resnet56; --config.<field>=<value> overrides a field.",
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
