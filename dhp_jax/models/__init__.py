"""Families of networks, by name."""

from dhp_jax.models.registry import FAMILIES, build, build_abstract, task_of

__all__ = ["FAMILIES", "build", "build_abstract", "task_of"]
