"""Where the console commands begin: a word first, because importing the library takes seconds."""

from collections.abc import Callable
import sys
from typing import NoReturn


def _command(name: str) -> Callable[[], NoReturn]:
    def command() -> NoReturn:
        if sys.stderr.isatty():
            print("loading    dhp_jax", file=sys.stderr, flush=True)
        try:
            from dhp_jax import commands

            getattr(commands, name)()
        except KeyboardInterrupt:  # of which no other handler is there yet
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return command


train, export, predict, report = map(_command, ("train", "export", "predict", "report"))
