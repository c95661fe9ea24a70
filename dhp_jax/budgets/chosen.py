"""The survivors chosen within budgets, with predicted costs and measured times."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dhp_jax.budgets.timing import hardware
from dhp_jax.core.cost import Cost


@dataclass(frozen=True)
class Time:
    """Times of a pruned network and of the unpruned one, measured alternately.

    Attributes:
      ratio: quartiles of its time as a share of the whole network's, over pairs of passes.
      whole_ms, ms: quartiles of the milliseconds of both.
      rounds: how many pairs there were.
    """

    ratio: dict[str, float]
    whole_ms: dict[str, float]
    ms: dict[str, float]
    rounds: int

    def within(self, share: float) -> bool:
        """Whether three of four pairs are within a share."""
        return self.ratio["high"] <= share

    def __str__(self) -> str:
        return "{median:.2f} ({low:.2f} to {high:.2f})".format(**self.ratio)


@dataclass(frozen=True)
class Chosen:
    """Survivors within budgets, and the measurements that led to them.

    Attributes:
      masks: a boolean mask for each latent by name.
      shares: of the whole network's FLOPs, params and activations, predicted from the masks.
      time: of the pruned network; `None` if nothing was measured.
      tried: every measurement in turn, the FLOPs share of its network and the quartiles of its
        time's share.
    """

    masks: dict[str, np.ndarray]
    shares: dict[str, float]
    time: Time | None = None
    tried: tuple[dict[str, Any], ...] = ()

    def notes(self) -> dict[str, Any]:
        """JSON values to save with the network."""
        if self.time is None:
            return {"predicted": self.shares}
        measured = {**asdict(self.time), "hardware": hardware(), "tried": list(self.tried)}
        return {"predicted": self.shares, "time": measured}


def describe_choice(cost: Cost, masks: dict[str, np.ndarray]) -> Chosen:
    """Survivors with the shares of the whole network's cost that they leave."""
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    return Chosen(masks, cost.shares(counts))
