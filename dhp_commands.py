"""Where the console commands begin: a word first, because importing the library takes seconds."""

from collections.abc import Callable
import sys
from typing import NoReturn


def _command(name: str) -> Callable[[], NoReturn]:
    def command() -> NoReturn:
        if sys.stderr.isatty():
            print("loading    dhp_jax", file=sys.stderr, flush=True)
        from dhp_jax import commands

        getattr(commands, name)()

    return command


train, export, predict, report = map(_command, ("train", "export", "predict", "report"))
