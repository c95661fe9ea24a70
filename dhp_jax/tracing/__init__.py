"""The axes of a network that nobody wrote for pruning, read from its program.

`discover` finds which channels may go together, `Discovery.restrict` makes the smaller network and
proves that it is the whole one without what is gone. `resize` is the table of sizes that layers
keep, open for layers of one's own.
"""

from dhp_jax.tracing.discovery import Discovery, discover
from dhp_jax.tracing.layer_sizes import resize
from dhp_jax.tracing.proof import Mismatch

__all__ = ["Discovery", "Mismatch", "discover", "resize"]
