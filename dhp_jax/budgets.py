"""Survivors within several budgets at once, one of which may be measured time.

FLOPs, params and activations are counted before anything is pruned; time is not. So candidates are
pruned, compiled and timed against the whole network, the two in turn, and the largest one that is
fast enough is found by bisection over its FLOPs.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
import functools
import inspect
from typing import Any

from flax import nnx
import numpy as np

from dhp_jax.cost import Cost, measure_cost
from dhp_jax.names import shown
from dhp_jax.prune import (
    BudgetError,
    Scores,
    check_axes,
    check_budget,
    check_masks,
    check_share,
    prune,
    smallest_ratio,
    survivors_within,
)
from dhp_jax.timing import forward, hardware, in_turn, quartiles
from dhp_jax.widths import Multiples

RESOLUTION = 0.01  # of the FLOPs, at which the bisection ends
ROUNDS, SECONDS = 101, 2.0  # of a measurement, at most


@dataclass(frozen=True)
class Time:
    """How long a pruned network takes, measured in turn with the whole one.

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


Clock = Callable[[nnx.Module], Time]
Selection = Callable[..., dict[str, np.ndarray]]  # takes what `survivors_within` does


def selection(by: Scores | Selection | None, budget: Collection[str]) -> Selection:
    """The function that chooses survivors: by scores, or the one that is given.

    Args:
      by: as for `prune_to`.
      budget: names of the budgets that it is going to be given.

    Raises:
      ValueError: `by` is neither scores nor a function that can be called so.
    """
    if by is None:
        return survivors_within
    if isinstance(by, Mapping):
        return functools.partial(survivors_within, scores=by)
    try:
        inspect.signature(by).bind("model", "cost", "multiple_of", **dict.fromkeys(budget))
    except (TypeError, ValueError):  # no function, or of something else, as `l1_scores` itself
        raise ValueError(
            "by: expected scores by latent, such as l1_scores(model), or a function such as "
            f"uniform_within(model, cost, multiple_of, **budget); got {shown(by)}"
        ) from None
    return functools.partial(_held_to_budget, by)


def _held_to_budget(
    select: Selection, model: nnx.Module, cost: Cost, multiple_of: Multiples, **budget: float
) -> dict[str, np.ndarray]:
    """What a function chooses, if that is within the budget."""
    masks = select(model, cost, multiple_of, **budget)
    check_masks(model, masks)
    used = _chosen(cost, masks).shares
    if any(used[name] > share for name, share in budget.items()):
        allowed, got = (
            ", ".join(f"{name}={shares[name]:g}" for name in budget) for shares in (budget, used)
        )
        raise ValueError(f"by: expected survivors within {allowed}; got {got}")
    return masks


def clock(model: nnx.Module, input_shape: tuple[int, ...], batch: int = 1) -> Clock:
    """A function that times pruned networks against a model with nothing pruned.

    Args:
      model: a network of latents; left as it was.
      input_shape: of one input, `(h, w, c)`.
      batch: how many inputs a pass takes.
    """
    whole = forward(prune(model), input_shape, batch)

    @functools.lru_cache(maxsize=1)  # most networks are timed several times
    def compiled(small: nnx.Module) -> Callable[[], None]:
        return forward(small, input_shape, batch)

    def timed(small: nnx.Module) -> Time:
        passes = {"whole": whole, "small": compiled(small)}
        seconds = in_turn(passes, ROUNDS, SECONDS)
        pairs = list(zip(seconds["whole"], seconds["small"], strict=True))
        return Time(
            ratio=quartiles([small / whole for whole, small in pairs]),
            whole_ms=quartiles([1e3 * s for s in seconds["whole"]]),
            ms=quartiles([1e3 * s for s in seconds["small"]]),
            rounds=len(pairs),
        )

    return timed


@dataclass(frozen=True)
class Chosen:
    """Survivors within budgets, and what was measured to find them.

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
        """What is kept of it beside the network, as JSON values."""
        if self.time is None:
            return {"predicted": self.shares}
        measured = {**asdict(self.time), "hardware": hardware(), "tried": list(self.tried)}
        return {"predicted": self.shares, "time": measured}


def choose(
    model: nnx.Module,
    cost: Cost,
    multiple_of: Multiples = 1,
    *,
    by: Scores | Selection | None = None,
    latency: float | None = None,
    timed: Clock | None = None,
    **budget: float,
) -> Chosen:
    """The survivors that use as much of all budgets as fits; see `survivors_within`.

    Args:
      model: a network of latents.
      cost: its `measure_cost`.
      multiple_of: latents that lose entries keep a multiple of so many.
      by: as for `prune_to`.
      latency: share in (0, 1] of the whole network's time, within which the upper quartile of the
        measured ratio is, in two of three measurements; `None` for no such budget.
      timed: from `clock`, if `latency` is given.
      **budget: `flops`, `params`, `activations`, shares in (0, 1].

    Raises:
      ValueError: as `survivors_within`; `BudgetError` if the smallest network is not fast enough.
    """
    if latency is not None:
        check_share("latency", latency)
        budget = {"flops": 1.0, **budget}
    select = selection(by, budget)
    if latency is None:
        return _chosen(cost, select(model, cost, multiple_of, **budget))
    check_budget(model, cost, multiple_of, **budget)
    search = _Bisection(model, cost, multiple_of, select, budget, latency, timed)
    return search.result()


class _Bisection:
    """Candidates by their FLOPs, each pruned and timed two or three times."""

    def __init__(self, model, cost, multiple_of, select, budget, latency, timed):
        self.model, self.cost, self.multiple_of, self.select = model, cost, multiple_of, select
        self.budget, self.latency, self.timed = budget, latency, timed
        self.known: dict[tuple[int, ...], Chosen | None] = {}
        self.tried: list[dict[str, Any]] = []

    def result(self) -> Chosen:
        low = smallest_ratio(self.model, self.cost, self.multiple_of)["flops"]
        high = self.budget["flops"]
        best = self.fast_enough(low)
        if best is None:
            raise BudgetError(_unreachable(self.latency, self.last))
        if (largest := self.fast_enough(high)) is not None:
            return self.told(largest)
        while high - low > RESOLUTION:
            middle = (low + high) / 2
            if (found := self.fast_enough(middle)) is None:
                high = middle
            else:
                best, low = found, middle
        return self.told(best)

    def fast_enough(self, flops: float) -> Chosen | None:
        """The candidate of a share of the FLOPs, if it is; the same widths are timed once."""
        masks = self.select(
            self.model, self.cost, self.multiple_of, **self.budget | {"flops": flops}
        )
        widths = tuple(int(mask.sum()) for mask in masks.values())
        if widths not in self.known:
            chosen = _chosen(self.cost, masks)
            time = self.two_of_three(prune(self.model, masks), chosen.shares["flops"])
            self.known[widths] = time and replace(chosen, time=time)
        return self.known[widths]

    def two_of_three(self, small: nnx.Module, flops: float) -> Time | None:
        """The slower of two measurements within the budget, if most are: one may be by chance."""
        within, beyond = [], []
        while max(len(within), len(beyond)) < 2:
            self.last = time = self.timed(small)
            self.tried.append({"flops": flops, **time.ratio})
            (within if time.within(self.latency) else beyond).append(time)
        return max(within, key=lambda time: time.ratio["high"]) if len(within) == 2 else None

    def told(self, chosen: Chosen) -> Chosen:
        return replace(chosen, tried=tuple(self.tried))


def _chosen(cost: Cost, masks: dict[str, np.ndarray]) -> Chosen:
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    return Chosen(masks, cost.shares(counts))


def _unreachable(latency: float, time: Time) -> str:
    return (
        f"latency: {latency!r} cannot be reached: the smallest possible network takes {time} of "
        f"the whole one's time, on {hardware()}"
    )


def check_latency(
    model: nnx.Module, cost: Cost, latency: float, timed: Clock, multiple_of: Multiples = 1
) -> None:
    """Raises a `BudgetError` if the smallest network is clearly slower than a budget.

    Clearly: three of four passes are, in two measurements. What is closer is left to `choose`.
    """
    check_share("latency", latency)
    smallest = smallest_ratio(model, cost, multiple_of)
    small = prune(model, survivors_within(model, cost, multiple_of, **smallest))
    if all((time := timed(small)).ratio["low"] > latency for _ in range(2)):
        raise BudgetError(_unreachable(latency, time))


def prune_to(
    model: nnx.Module,
    input_shape: tuple[int, ...],
    multiple_of: Multiples = 1,
    *,
    by: Scores | Selection | None = None,
    latency: float | None = None,
    batch: int = 1,
    **budget: float,
) -> nnx.Module:
    """Prunes to a network that uses as much of all budgets as fits, by magnitude of the latents.

    Args:
      model: a network of latents; left as it was.
      input_shape: shape of one example, `(height, width, channels)`.
      multiple_of: latents that lose entries keep a multiple of so many. A number for all; numbers
        by name or pattern, such as `{"stages.*": 8}`; or "auto", for what was measured to be best
        on this platform for the dtype of the model (see `dhp_jax.widths`).
      by: what decides instead of the magnitudes: scores for the entries of every prunable latent by
        name, such as from `dhp.l1_scores` and `dhp.random_scores`, the smallest of which go first;
        or `dhp.uniform_within`, or another function that takes and returns what that does.
      latency: share in (0, 1] of the time that the whole network takes, measured here and now on
        compiled forward passes of both in turn: of every four pairs three are within it, in two of
        three measurements. Every candidate has to be compiled; there are up to ten. `None` for no
        such budget.
      batch: how many inputs these passes take.
      **budget: `flops`, `params` or `activations` (bytes of the outputs of all layers; see
        `dhp_jax.cost`), as shares of the model's own in (0, 1]. All that are given hold.

    Returns:
      The pruned network, as from `prune`.

    Raises:
      ValueError: a share outside (0, 1]; a `multiple_of` below 1 or above the size of its latents;
        a `batch` below 1; scores that do not suit the latents; a function `by` that does not take
        these arguments, or whose survivors are not within the budgets; axes that meet in the
        forward pass without being one latent; a share that is out of reach (`BudgetError`, with the
        smallest one possible).

    Example:
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5)
      >>> quick = dhp.prune_to(model, (32, 32, 3), multiple_of=8, params=0.6, latency=0.7, batch=64)
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: expected an integer of at least 1, got {batch!r}")
    if latency is not None:
        check_share("latency", latency)
        budget = {"flops": 1.0, **budget}
    selection(by, budget)  # so that what it refuses is told before any work
    cost = measure_cost(model, input_shape)
    try:
        check_budget(model, cost, multiple_of, **budget)
    except BudgetError:
        check_axes(model, input_shape)  # a layer that cannot be pruned is told as that
        raise
    check_axes(model, input_shape)
    timed = None if latency is None else clock(model, input_shape, batch)
    chosen = choose(model, cost, multiple_of, by=by, latency=latency, timed=timed, **budget)
    return prune(model, chosen.masks)


def limits(budget: Mapping[str, float | None], target: float) -> dict[str, float]:
    """What a search comes down to: budgets by name, with the FLOPs that a latency asks for.

    Time cannot be measured while a search goes on. It is taken to fall as the FLOPs do.

    Args:
      budget: `flops`, `params`, `activations` and `latency`, shares or `None`.
      target: another share of the FLOPs; the smallest one counts.
    """
    flops = [target, budget.get("flops"), budget.get("latency")]
    found = {"flops": min(share for share in flops if share is not None)}
    others = {name: budget.get(name) for name in ("params", "activations")}
    return found | {name: share for name, share in others.items() if share is not None}
