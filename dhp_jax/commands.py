"""The commands that come with the library: dhp-train, dhp-export, dhp-predict, dhp-report."""

from collections.abc import Callable
import importlib
import os
import sys
from typing import Any, NoReturn


def train() -> NoReturn:
    """Makes a smaller network as a configuration says; `dhp_jax.pipeline.flags` parses."""
    leave(_loaded("dhp_jax.pipeline.flags").main(sys.argv))


def export() -> NoReturn:
    """Writes a saved network in another format."""
    _run_module("dhp_jax.export.__main__")


def predict() -> NoReturn:
    """Labels or restores images with a saved network."""
    _run_module("dhp_jax.predict")


def report() -> NoReturn:
    """Makes the page of a run, or of several."""
    _run_module("dhp_jax.report.__main__")


def leave(code: int) -> NoReturn:
    """Ends the process of a run; one of several does not wait for others that have died."""
    import jax

    from dhp_jax.distributed.preemption import EXIT_CODE

    if code in (0, EXIT_CODE) or not jax.distributed.is_initialized():  # as in all processes
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once, so that the others notice; JAX would wait for them first


def _run_module(name: str) -> NoReturn:
    main: Callable[..., None] = _loaded(name).main
    sys.exit(_loaded("dhp_jax.cli").run(main))


def _loaded(name: str) -> Any:
    """A module of ours; one line of error where a package is missing that the library lacks."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(
            f'error: {error.name} is not installed; run: pip install "dhp_jax[experiments]"',
            file=sys.stderr,
        )
        sys.exit(2)
