"""A record on each network of how it was made, from which a file can rebuild it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

Chains = Sequence[Sequence[str]]  # paths of layers, each with those that are folded into it


@dataclass(frozen=True)
class Architecture:
    """How a network was made.

    Attributes:
      family: name in `dhp.models.build`; of a network of the user's own "module:function" if a run
        has made it by that name, or `None`.
      arguments: of `dhp.models.build`, but for the random generators.
      survivors: indices kept of each latent; `None` before pruning. Of latents that were found by
        tracing those of the first pruning, and `cuts` tells the rest.
      renewed: whether it is one of latents whose entries are the survivors of an earlier pruning.
      folded: layers that others were folded into, with those, by their paths.
      axes: the table of latents that were found by tracing (`dhp_jax.tracing.table`).
      cuts: what was kept of the axes of its arrays (`dhp_jax.tracing.cuts`).
      example: the shape of an example that networks of its family take; `None` if it has none.
    """

    family: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    survivors: Mapping[str, tuple[int, ...]] | None = None
    renewed: bool = False
    folded: Chains = ()
    axes: Any = None
    cuts: Any = None
    example: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        family = repr(self.family) if self.family else "of one's own"
        return f"Architecture({family}{'' if self.survivors is None else ', pruned'})"

    def __hash__(self) -> int:  # a static attribute of modules, so `nnx.jit` hashes it
        return hash((self.family, tuple(self.arguments), tuple(self.survivors or ()), self.folded))


def architecture_of(model: nnx.Module) -> Architecture:
    """The record of how a network was made; an empty one for a network without it."""
    return getattr(model, "dhp_architecture", Architecture())


def set_architecture(model: nnx.Module, architecture: Architecture) -> None:
    """Sets the record of how a network was made."""
    model.dhp_architecture = architecture
