"""Survivors within budgets that are counted: FLOPs, params, activations."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
import math
from numbers import Real
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.budgets.rounding import Multiples, multiples
from dhp_jax.core.cost import MEASURES, Cost, Counts
from dhp_jax.core.latent import Latent, has_gates, latents, latents_to_prune
from dhp_jax.errors import ArgumentError, nearest, shown

Scores = Mapping[str, np.ndarray]  # by latent a number for each entry; the smallest go first
TOLERANCE = 0.005  # of the whole network's cost may be left before entries are traded
TRADES = 32
TINY = 1e-12  # share of the cost of an entry that is free
Group = tuple[str, tuple[int, ...]]  # a latent, and entries of it that go together


class BudgetError(ArgumentError):
    """Raised for a budget that no choice of survivors can meet."""


def search_limits(budget: Mapping[str, float | None], target: float) -> dict[str, float]:
    """The shares that a search has to reach, with a latency taken as a share of the FLOPs.

    Time cannot be measured while a search goes on. It is taken to fall as the FLOPs do.

    Args:
      budget: `flops`, `params`, `activations` and `latency`, shares or `None`.
      target: another share of the FLOPs; the smallest one counts.
    """
    flops = [target, budget.get("flops"), budget.get("latency")]
    found = {"flops": min(share for share in flops if share is not None)}
    others = {name: budget.get(name) for name in ("params", "activations")}
    return found | {name: share for name, share in others.items() if share is not None}


def counted_limits(budget: Mapping[str, float | None], target: float) -> dict[str, float]:
    """The budgets that are counted, as shares; of the FLOPs the smallest one.

    Args:
      budget: `flops`, `params` and `activations`, shares or `None`; others are left out.
      target: another share of the FLOPs.
    """
    return search_limits({**budget, "latency": None}, target)


def smallest_ratio(model: nnx.Module, cost: Cost, multiple_of: Multiples = 1) -> dict[str, float]:
    """The smallest shares of FLOPs, params and activations that pruning can reach."""
    steps = multiples(model, multiple_of)
    counts = {name: fewest(z, steps.get(name, 1)) for name, z in latents(model).items()}
    return cost.shares(counts)


def check_budget(
    model: nnx.Module, cost: Cost, multiple_of: Multiples = 1, **budget: float
) -> None:
    """Raises unless the model has latents and each budget is in (0, 1] and can be reached."""
    sizes = {name: z.size for name, z in latents_to_prune(model).items()}
    if cost.sizes != sizes:  # as of the network before it had latents
        detail = f"expected the measure_cost of the model, with latents of {shown(sizes)}; "
        raise ArgumentError("cost", detail=f"{detail}got one with {shown(dict(cost.sizes))}")
    check_asked(model, multiple_of, budget)
    smallest = smallest_ratio(model, cost, multiple_of)
    for name, target in budget.items():
        if target < smallest[name]:
            reachable = math.ceil(1e4 * smallest[name]) / 1e4
            rounded = f", up to a multiple of {multiple_of}" if multiple_of != 1 else ""
            raise BudgetError(
                name,
                f"at least {reachable:.4f}",
                target,
                f"{target!r} cannot be reached: the smallest possible share is {reachable:.4f}, "
                f"with min_channels entries left in every prunable latent{rounded}"
                f"{_hint_of_floors(model, multiple_of)}",
            )


def _hint_of_floors(model: nnx.Module, multiple_of: Multiples) -> str:
    """That a smaller `min_channels`, or `keep` where it was given, lets more go, where it does."""
    steps, named = multiples(model, multiple_of), latents(model)
    held = {
        name: z.size
        for name, z in named.items()
        if z.prunable and fewest(z, steps[name]) > steps[name]
    }
    if not held:
        return ""
    few = min(held, key=held.get)
    limited = "max_channels" in named[few].vector.get_metadata()  # see `limits.with_limits`
    fewer = "a smaller keep" if limited else "min_channels=1"
    return f"; {fewer} of small latents, as {few!r} of {held[few]} entries, lets more go"


def check_asked(
    model: nnx.Module,
    multiple_of: Multiples,
    budget: Mapping[str, float],
    known: Sequence[str] = MEASURES,
) -> None:
    """Raises for what can be told to be wrong before anything is counted.

    Args:
      model: a network of latents.
      multiple_of: as for `prune_to`.
      budget: shares by name.
      known: names that there are.
    """
    multiples(model, multiple_of)
    unknown = [name for name in budget if name not in known]
    if unknown or not budget:
        expected = f"expected some of {', '.join(f'{name}=' for name in known)}"
        near = nearest(unknown[0], known) if unknown else ""
        raise ArgumentError("budget", detail=f"{expected}, got {sorted(budget)}{near}")
    for name, target in budget.items():
        check_share(name, target)


def check_share(name: str, share: float) -> None:
    """Raises unless a share is in (0, 1]."""
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
        raise ArgumentError(name, "a share in (0, 1]", shown(share))


def survivors_within(
    model: nnx.Module,
    cost: Cost,
    multiple_of: Multiples = 1,
    *,
    scores: Scores | None = None,
    **budget: float,
) -> dict[str, np.ndarray]:
    """Chooses survivors by magnitude of the latents, within budgets and close to them.

    First the smallest entries of all latents go, until the budget holds. Then those that still fit
    come back, largest first. The result is within the budget, and no channel that was removed fits
    in the rest. If more than 0.5 % of the whole network's cost is left, an expensive channel that
    does not fit comes back in exchange for the smallest ones of other latents. Of gates, all
    entries whose score is 0 go.

    Args:
      model: a network of latents.
      cost: its `measure_cost`.
      multiple_of: a latent that loses entries keeps a multiple of this number; see
        `rounding.multiples`. Entries then go and come back in groups, ranked by their largest, and
        more of the budget may be left.
      scores: replace the magnitudes: numbers of at least 0 for the entries of every prunable
        latent, by name.
      **budget: some of `flops`, `params`, `activations` (see `dhp_jax.core.cost`), shares in
        (0, 1]; all of them hold.

    Returns:
      A boolean mask for each latent by name.

    Raises:
      ValueError: a network without latents; a share outside (0, 1]; `multiple_of` below 1, or above
        the size of every latent; scores that are missing, of another size, not finite, or of an
        unknown latent;
        `BudgetError`, a `ValueError`, if `min_channels`, `multiple_of` and latents that are not
        prunable make a share unreachable (it tells the smallest one).
    """
    check_budget(model, cost, multiple_of, **budget)
    scores = _magnitudes(model) if scores is None else scores
    always, order = _removable(model, multiple_of, scores)
    masks = {name: np.ones(z.size, bool) for name, z in latents(model).items()}
    for name, entries in always:
        masks[name][list(entries)] = False
    most = {name: int(mask.sum()) for name, mask in masks.items()}

    def left_without(gone: Set[int]) -> float:
        left = Counter(most)
        for i in gone:
            left[order[i][0]] -= len(order[i][1])
        return slack(cost, left, budget)

    # Cost falls with every group removed, so the number to remove is found by bisection.
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if left_without(range(middle)) >= 0 else (middle + 1, high)
    closed = [not scores[name][list(entries)].any() for name, entries in order]
    never = set(np.flatnonzero(closed).tolist()) if has_gates(model) else set()
    gone = _refill(set(range(low)) | never, order, left_without, never)
    if left_without(gone) > TOLERANCE:
        gone = _trade(gone, order, left_without, never)
    for i in gone:
        name, entries = order[i]
        masks[name][list(entries)] = False
    return masks


def entry_shares(cost: Cost, counts: Counts, measure: str, dtype: Any) -> dict[str, Array]:
    """What one more entry of each latent costs, as a share of what `counts` cost; usable in jit.

    It is the derivative of the cost, and of branches the largest one: what is saved in one shows as
    soon as no other costs more.
    """
    polynomials, number = cost.polynomials, MEASURES.index(measure)

    def amounts(present: Array) -> Array:
        at_places = polynomials.at_places(present)
        return jnp.stack([at_places[place][number] for place in polynomials.places])

    def total(each: Array) -> Array:
        return cost.total(measure, dict(zip(polynomials.places, each, strict=True)))

    present = polynomials.present(counts, dtype)
    whole, derivatives = total(amounts(present)), total(jax.jacrev(amounts)(present))
    shares = jnp.unstack(jnp.maximum(derivatives / jnp.maximum(whole, 1), TINY))
    found = dict(zip(polynomials.names, shares[1:], strict=True))
    return {name: found.get(name, jnp.asarray(TINY, dtype)) for name in counts}


def slack(cost: Cost, counts: Counts, budget: Mapping[str, float]) -> float:
    """How far the tightest budget is from being used up, in its shares; negative beyond it."""
    used = cost.shares(counts)
    return min(share - used[name] for name, share in budget.items())


def _refill(
    gone: set[int], order: list[Group], slack: Callable[[Set[int]], float], never: Set[int]
) -> set[int]:
    """Brings back groups that fit, largest first, in order within each latent; some never."""
    full = set()
    for i in sorted(gone - never, reverse=True):
        name = order[i][0]
        if name not in full and slack(gone - {i}) >= 0:
            gone = gone - {i}
        else:
            full.add(name)
    return gone


def _trade(
    gone: set[int], order: list[Group], slack: Callable[[Set[int]], float], never: Set[int]
) -> set[int]:
    """Brings back an entry that does not fit, in exchange for the smallest of other latents.

    For channels of very different cost: once the costly ones are gone, none of them fits again.
    """
    for i in sorted(gone - never, reverse=True)[:TRADES]:
        if any(j > i and order[j][0] == order[i][0] for j in gone):
            continue  # a larger one of its latent is gone
        trial = gone - {i}
        for j, (name, _) in enumerate(order):
            if slack(trial) >= 0:
                break
            if name != order[i][0]:
                trial = trial | {j}
        if slack(trial) >= 0:
            trial = _refill(trial, order, slack, never)
            gone = min(gone, trial, key=slack)
        if slack(gone) <= TOLERANCE:
            break
    return gone


def removals(z: Latent, multiple_of: int) -> range:
    """The numbers of entries that a latent may lose, by its multiple and `min_channels`."""
    first = z.size % multiple_of or multiple_of
    last = z.size - max(z.min_channels, multiple_of) if z.prunable else 0
    return range(first, last + 1, multiple_of)


def fewest(z: Latent, multiple_of: int) -> int:
    """The smallest number of entries that a latent may keep."""
    return z.size - max(removals(z, multiple_of), default=0)


def widths_of(z: Latent, multiple_of: int) -> list[int]:
    """The numbers of entries that a latent may have, ascending."""
    widths = [z.size - gone for gone in (0, *removals(z, multiple_of))]
    allowed = [width for width in widths if width <= most_channels(z)]
    if not allowed:
        raise ArgumentError(
            "keep",
            detail=f"expected at most {most_channels(z)} entries of a latent, but {widths[-1]} "
            f"have to stay, with multiple_of={multiple_of}",
        )
    return allowed[::-1]


def most_channels(z: Latent) -> int:
    """How many entries of a latent survive at most; see `limits.with_limits`."""
    return z.vector.get_metadata().get("max_channels", z.size)


def _magnitudes(model: nnx.Module) -> Scores:
    return {name: np.abs(np.asarray(z.value())) for name, z in latents(model).items()}


def _removable(
    model: nnx.Module, multiple_of: Multiples, scores: Scores
) -> tuple[list[Group], list[Group]]:
    """The groups of entries that must go, and those that may, smallest score first.

    The score of a group is its largest; ties by the sum, name and order.
    """
    always, groups, steps, named = [], [], multiples(model, multiple_of), latents(model)
    for name, score in checked_scores(model, scores).items():
        z, step = named[name], steps[name]
        order = np.argsort(score, kind="stable")
        widest = widths_of(z, step)[-1]
        for end in removals(z, step):
            entries = order[max(0, end - step) : end]
            largest, total = score[entries[-1]], score[entries].sum()
            group = (largest, total, name, end, tuple(map(int, entries)))
            (always if z.size - end >= widest else groups).append(group)
    return tuple(
        [(name, entries) for _, _, name, _, entries in sorted(found)] for found in (always, groups)
    )


def checked_scores(model: nnx.Module, scores: Scores) -> dict[str, np.ndarray]:
    """The scores of all prunable latents, if they are such; they may be of others too."""
    found = latents(model)
    for name in sorted(scores.keys() - found.keys(), key=str):
        raise ArgumentError.unknown("scores", name, found)
    return {name: _check_scores(scores, name, z.size) for name, z in found.items() if z.prunable}


def _check_scores(scores: Scores, name: str, size: int) -> np.ndarray:
    """The scores of a latent, if they are numbers of at least 0 for all of its entries."""
    if name not in scores:
        raise ArgumentError(
            "scores", detail=f"expected those of latent {name!r}; got {sorted(scores)}"
        )
    score, told = np.asarray(scores[name]), f"expected {size} finite numbers >= 0; got "
    try:
        score = score.astype(np.float64, casting="same_kind")
    except TypeError:  # complex numbers, texts, others
        told += shown(scores[name])
        raise ArgumentError(f"scores[{name!r}]", detail=told) from None
    if score.shape != (size,) or not (np.isfinite(score) & (score >= 0)).all():
        least, most = score.min(initial=np.inf), score.max(initial=-np.inf)
        told += f"an array of shape {score.shape}, from {least:g} to {most:g}"
        raise ArgumentError(f"scores[{name!r}]", detail=told)
    return score
