"""The axes of a network that nobody wrote for pruning, read from its program.

`discover` finds which channels may go together. Its analysis cuts out what is gone, and proves that
this leaves the whole network without it. `resize` is the table of sizes that layers keep, open for
layers of one's own.
"""

from dhp_jax.tracing.discovery import Discovery, discover
from dhp_jax.tracing.layer_sizes import resize
from dhp_jax.tracing.proof import Mismatch

__all__ = ["Discovery", "Mismatch", "discover", "resize"]
