"""The methods of a run: what each trains, and how it makes the smaller network.

A method is one object in `METHODS`. Its function `smaller` makes the network from what the run
gives it, a `Start`. To add a method, add one object here, and a row to docs/methods.md.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from flax import nnx
from jaxtyping import Array
import numpy as np

from dhp_jax.budgets.counted import Scores, survivors_within
from dhp_jax.budgets.derivatives import gradient_scores, taylor_scores
from dhp_jax.budgets.importance import (
    fpgm_scores,
    group_scores,
    l1_scores,
    l2_scores,
    random_scores,
    scale_scores,
)
from dhp_jax.budgets.rounding import Multiples, multiples
from dhp_jax.budgets.selection import Selection, default_scores
from dhp_jax.budgets.uniform import uniform_within
from dhp_jax.core.cost import Cost
from dhp_jax.core.latent import latents_to_prune
from dhp_jax.core.survivors import survivors
from dhp_jax.tracing.gating import gated_places
from dhp_jax.tracing.weights import ANY, MADE, SCALED, scored_weights

PHASES = ("search", "converge", "baseline")  # the position selects the random stream of each
TAUGHT = ("search", "converge")  # those that may learn from the trained network they start from


class Smaller(NamedTuple):
    """A network just after pruning.

    Attributes:
      model: the network.
      budget: JSON values that tell what was chosen (`Chosen.notes`).
      exact: whether all that went was zero, so that the network computes what it did before.
    """

    model: nnx.Module
    budget: dict[str, Any]
    exact: bool = False


class Start(Protocol):
    """What a run gives the function that makes its smaller network.

    Attributes:
      seed: of the run's random numbers.
      batches: whose gradient a method asks for.
    """

    seed: int
    batches: int

    def unpruned(self) -> nnx.Module:
        """The network of latents with its initial weights."""
        ...

    def searched(self) -> nnx.Module:
        """The network of latents at the end of this run's search."""
        ...

    def trained(self) -> nnx.Module:
        """The network of latents with the weights of the run that this one starts from."""
        ...

    def training(
        self, count: int | None = None
    ) -> tuple[Callable[[nnx.Module, Any], Array], Iterable[Any]]:
        """The loss of a network on a batch, and so many batches of training data, or enough."""
        ...

    def per_flop(self, scores: Scores) -> Scores:
        """Scores divided by the power of FLOPs that the run asks for."""
        ...

    def within(self, model: nnx.Module, by: Scores | Selection | None = None) -> Smaller:
        """What is left of a network within all budgets of the run; `by` as for `dhp.prune_to`."""
        ...

    def found(self, model: nnx.Module) -> Smaller:
        """What is left of a network with the channels that the source has kept."""
        ...


@dataclass(frozen=True)
class Method:
    """What a run does.

    Attributes:
      title: what tables call it.
      lead: what its pruned network is, with `{left}` for its share of the cost.
      smaller: makes the smaller network; `None` where nothing is pruned.
      phases: of training, in order.
      source: the method of the finished run that it starts from, if it needs one.
      fades: whether its search is that of `dhp.fade_to_budget`, from the weights of its source.
      ranks: whether it ranks channels by their importance.
      check: raises a `ValueError` for a network of latents that it cannot rank, whatever its
        weights.
      fresh: whether its network starts from fresh weights, those of a baseline's layers.
      network: folder of the one of its networks that other runs start from.
    """

    title: str
    lead: str = ""
    smaller: Callable[[Start], Smaller] | None = None
    phases: tuple[str, ...] = ("converge",)
    source: str | None = None
    fades: bool = False
    ranks: bool = False
    check: Callable[[nnx.Module], object] = latents_to_prune
    fresh: bool = False
    network: str = "pruned"

    @property
    def searches(self) -> bool:
        """Whether it has a search, in which latents shrink to zero."""
        return "search" in self.phases

    @property
    def sources(self) -> tuple[str, ...]:
        """The methods of the finished runs that it can start from: any search, if it needs one."""
        begun = METHODS[self.source] if self.source else None
        return tuple(
            name
            for name, other in METHODS.items()
            if begun and (other is begun or (other.searches and begun.searches))
        )

    @property
    def prunes(self) -> bool:
        """Whether it leaves a smaller network than the unpruned one."""
        return self.smaller is not None

    @property
    def chooses(self) -> bool:
        """Whether it chooses survivors, within budgets; some take those of their source."""
        return self.prunes and (self.source is None or not METHODS[self.source].prunes)


def _by_chance(start: Start) -> Smaller:
    model = start.trained()
    return start.within(model, random_scores(model, start.seed))


def _by_gradient(start: Start) -> Smaller:
    model = start.unpruned()
    model.train()
    scores = gradient_scores(model, *start.training(start.batches))
    return start.within(model, start.per_flop(scores))


def _not_faded(
    model: nnx.Module, cost: Cost, multiple_of: Multiples = 1, **budget: float
) -> dict[str, np.ndarray]:
    """What a search from trained weights has left, less what budgets and widths do not allow."""
    masks, steps = survivors(model), multiples(model, multiple_of)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    left = cost.shares(counts)
    allowed = (counts[z] == masks[z].size or counts[z] % step == 0 for z, step in steps.items())
    if all(allowed) and all(left[name] <= share for name, share in budget.items()):
        return masks
    scores = default_scores(model)  # of what the search has left
    return survivors_within(model, cost, multiple_of, scores=scores, **budget)


def _by_importance(
    title: str,
    what: str,
    scores_of: Callable[[nnx.Module, Start], Scores],
    check: Callable[[nnx.Module], object] = gated_places,
) -> Method:
    """A method that cuts the least important channels of a trained network."""

    def smaller(start: Start) -> Smaller:
        model = start.trained()
        return start.within(model, start.per_flop(scores_of(model, start)))

    lead = f"Pruned by {what} to {{left}}"
    return Method(title, lead, smaller, source="baseline", ranks=True, check=check)


def _by_weights(
    title: str, what: str, scores_of: Callable[[nnx.Module], Scores], role: str = MADE
) -> Method:
    check = partial(scored_weights, role=role)
    return _by_importance(title, what, lambda model, _: scores_of(model), check)


def _taylor(model: nnx.Module, start: Start, *, squared: bool) -> Scores:
    model = nnx.clone(model)
    model.train()  # on statistics of each batch: the running ones are renewed after the cut
    return taylor_scores(model, *start.training(), squared=squared)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "dhp": Method(
            "DHP",
            "Pruned to {left}",
            lambda start: start.within(start.searched()),  # by the magnitudes of its latents
            phases=("search", "converge"),
        ),
        "baseline": Method("unpruned", phases=("baseline",), fresh=True, network="model"),
        "uniform": Method(
            "uniform width",
            "Narrowed uniformly to {left}, from fresh weights",
            lambda start: start.within(start.unpruned(), uniform_within),
            fresh=True,
        ),
        "gradient": Method(
            "gradient of latents",
            "Pruned by the gradient of latents to {left}, from fresh weights",
            _by_gradient,
            ranks=True,
            fresh=True,
        ),
        "random": Method(
            "random survivors",
            "Pruned at random to {left}",
            _by_chance,
            source="baseline",
        ),
        "fade": Method(
            "DHP from trained weights",
            "Pruned to {left} by a search from trained weights",
            lambda start: start.within(start.searched(), _not_faded),
            phases=("search", "converge"),
            source="baseline",
            fades=True,
        ),
        "l1_norm": _by_weights("\u21131 norm of filters", "the \u21131 norm of filters", l1_scores),
        "l2_norm": _by_weights("\u21132 norm of filters", "the \u21132 norm of filters", l2_scores),
        "group_norm": _by_weights("group norm", "the norm of whole groups", group_scores, ANY),
        "norm_scale": _by_weights(
            "BatchNorm scale", "the scales of BatchNorm", scale_scores, SCALED
        ),
        "fpgm": _by_weights("FPGM", "distance to the geometric median", fpgm_scores),
        "taylor": _by_importance(
            "squared Taylor terms", "squared Taylor terms", partial(_taylor, squared=True)
        ),
        "taylor_magnitude": _by_importance(
            "magnitudes of Taylor terms",
            "the magnitudes of Taylor terms",
            partial(_taylor, squared=False),
        ),
        "scratch": Method(
            "found network, fresh weights",
            "The network that a search has found, {left}, from fresh weights",
            lambda start: start.found(start.unpruned()),
            source="dhp",
            fresh=True,
        ),
    }
)
