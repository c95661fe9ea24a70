"""The configuration of a run: its fields, their defaults, and the check of all of them."""

from dhp_jax.config.checks import check, check_overrides
from dhp_jax.config.fields import default
from dhp_jax.errors import ConfigError

__all__ = ["ConfigError", "check", "check_overrides", "default"]
