"""The methods of a run: which phases it trains, and what its smaller network starts from."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Method:
    """What a run does.

    Attributes:
      title: what tables call it.
      lead: what its pruned network is, with `{left}` for its share of the cost.
      phases: of training, in order.
      source: the method of the finished run that it starts from, if it needs one.
      fresh: whether its network starts from fresh weights, those of a baseline's layers.
      network: folder of the one of its networks that other runs start from.
    """

    title: str
    lead: str
    phases: tuple[str, ...] = ("converge",)
    source: str | None = None
    fresh: bool = False
    network: str = "pruned"

    @property
    def prunes(self) -> bool:
        """Whether it leaves a smaller network than the whole one."""
        return "converge" in self.phases

    @property
    def chooses(self) -> bool:
        """Whether it chooses survivors, within budgets; some take those of their source."""
        return self.prunes and (self.source is None or not METHODS[self.source].prunes)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "dhp": Method("DHP", "Pruned to {left}", phases=("search", "converge")),
        "baseline": Method("unpruned", "", phases=("baseline",), fresh=True, network="model"),
        "uniform": Method(
            "uniform width", "Narrowed uniformly to {left}, from fresh weights", fresh=True
        ),
        "random": Method("random survivors", "Pruned at random to {left}", source="baseline"),
        "l1_norm": Method(
            "\u21131 norm of filters",
            "Pruned by the \u21131 norm of filters to {left}",
            source="baseline",
        ),
        "scratch": Method(
            "found network, fresh weights",
            "The network that a search has found, {left}, from fresh weights",
            source="dhp",
            fresh=True,
        ),
    }
)
