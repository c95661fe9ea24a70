"""Search, prune, converge, or another method, from a configuration."""

from dhp_jax.pipeline.execution import execute
from dhp_jax.pipeline.preparation import Run, prepare

__all__ = ["Run", "execute", "prepare"]
