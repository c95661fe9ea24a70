"""A run from its configuration to its report."""

from collections.abc import Callable, Sequence
import contextlib
import logging
import os
from typing import Any

import jax

from dhp_jax.distributed.processes import from_first, is_first
from dhp_jax.errors import ConfigError
from dhp_jax.pipeline.header import header
from dhp_jax.pipeline.phases import carry_out
from dhp_jax.pipeline.preparation import Run, hold_by_first, name_data_fields
from dhp_jax.report import write as report_write
from dhp_jax.train.phase import OriginError
from dhp_jax.workdir.identity import note_command
from dhp_jax.workdir.log import logged

logger = logging.getLogger(__name__)


@name_data_fields()
def execute(
    run: Run,
    *,
    baseline: str | os.PathLike | None = None,
    stopping: Callable[[], bool] = lambda: False,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Carries out a run, or what is left of it, and writes its report.

    Args:
      run: from `prepare`.
      baseline: directory of a finished run with `method="baseline"`, for comparison.
      stopping: asked after every step of training whether to stop.
      command: the command line, if there was one, to be noted in `workdir`.

    Returns:
      The summary, as in `summary.json`.

    Raises:
      Stopped: `stopping` said so; the run goes on from there when it is started again.
      FloatingPointError: a loss or a latent is not finite.
      OSError: `workdir` can no longer be written.
      ConfigError: another process is at work there.
      DataNotFoundError: an image cannot be decoded.
      ProcessError: another of the processes that carry out this run has failed.
    """
    precision = None if run.config.precision == "default" else run.config.precision
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold_by_first(run.workdir, run.config))
        stack.enter_context(jax.default_matmul_precision(precision))
        if is_first():
            stack.enter_context(logged(run.workdir))
            for line in header([run]).splitlines():
                logger.debug("%s", line)
            if command:
                note_command(run.workdir, command)
        try:
            carry_out(run, stopping)
        except OriginError as error:
            hint = "; give another --workdir"
            raise ConfigError.of(f"config.{error.field}", error, hint) from error
        return from_first(lambda: report_write.write(run.workdir, baseline=baseline))
