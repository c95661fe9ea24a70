"""Axes of arrays each position of which is an entry of a latent, or stays."""

from collections.abc import Mapping, Sequence

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from dhp_jax.core.latent import Axis, Latent


class Positions:
    """Which entry of which latent each position of an axis belongs to; constant, and hashed once.

    Attributes:
      owner: number of the latent in a list, -1 for a position that stays.
      entry: index in that latent, 0 for a position that stays.
    """

    def __init__(self, owner: Sequence[int] | np.ndarray, entry: Sequence[int] | np.ndarray):
        self.owner = np.asarray(owner, np.int64)
        self.entry = np.asarray(entry, np.int64)
        self._hash = hash((self.owner.tobytes(), self.entry.tobytes()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Positions)
            and np.array_equal(self.owner, other.owner)
            and np.array_equal(self.entry, other.entry)
        )

    def kept(self, masks: Sequence[np.ndarray]) -> np.ndarray:
        """Which positions are left, by a boolean mask of each latent."""
        kept = np.ones(len(self.owner), bool)
        for number, mask in enumerate(masks):
            own = self.owner == number
            kept[own] = np.asarray(mask, bool)[self.entry[own]]
        return kept


class PlacedAxis(Axis):
    """An axis of an array, each position of which is an entry of a latent, or stays.

    Args:
      latents: the latents.
      positions: which position belongs to which of them.
      shares: of each latent, how much the derivative by its values here counts; all of it if None.
    """

    def __init__(
        self,
        latents: Sequence[Latent],
        positions: Positions,
        shares: Sequence[float] | None = None,
    ):
        used = np.unique(positions.owner[positions.owner >= 0]).tolist()
        owner = np.where(positions.owner < 0, -1, np.searchsorted(used, positions.owner))
        self.latents = nnx.List([latents[n] for n in used])
        self.positions = nnx.static(Positions(owner, positions.entry))
        self.shares = nnx.static(tuple(shares[n] if shares else 1.0 for n in used))
        self.size = len(owner)

    def value(self) -> Float[Array, " size"]:
        """The entries at each position; 1 where a position stays."""
        if not len(self.latents):
            return jnp.ones(self.size)
        owner, entry = self.positions.owner, self.positions.entry
        one = len(self.latents) == 1 and self.latents[0].size == self.size
        if one and (owner == 0).all() and np.array_equal(entry, np.arange(self.size)):
            return self._value(0)
        starts = np.cumsum([1, *(latent.size for latent in self.latents)])
        values = jnp.concatenate([jnp.ones(1), *map(self._value, range(len(self.latents)))])
        return values[np.where(owner < 0, 0, starts[owner] + entry)]

    def _value(self, number: int) -> Float[Array, " size"]:
        """The value of a latent, of whose derivative its share is left."""
        value, share = self.latents[number].value(), self.shares[number]
        if share == 1:
            return value
        fixed = jax.lax.stop_gradient(value)
        return fixed + share * (value - fixed)

    def multiplicity(self) -> dict[Latent, int]:
        """How many positions belong to each entry, on average."""
        owner = self.positions.owner
        return {z: int((owner == n).sum()) // z.size for n, z in enumerate(self.latents)}

    def entries(self) -> list[tuple[Latent, int]]:
        """The latent and index of each position that does not stay."""
        both = zip(self.positions.owner.tolist(), self.positions.entry.tolist(), strict=True)
        return [(self.latents[owner], entry) for owner, entry in both if owner >= 0]

    def keep(self, masks: Mapping[Latent, np.ndarray] | None) -> np.ndarray:
        """Which positions survive."""
        if masks is None:
            return np.ones(self.size, bool)
        return self.positions.kept([masks[latent] for latent in self.latents])
