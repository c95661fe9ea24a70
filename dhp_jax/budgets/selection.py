"""Choice of survivors within all budgets, and `prune_to`, which prunes to them."""

from collections.abc import Callable, Collection, Mapping
import functools
import inspect
from typing import Any
import warnings

from flax import nnx
import numpy as np

from dhp_jax.budgets.axes import proved_axes
from dhp_jax.budgets.chosen import Chosen, describe_choice
from dhp_jax.budgets.counted import (
    TINY,
    BudgetError,
    Scores,
    check_asked,
    check_budget,
    check_share,
    checked_scores,
    smallest_ratio,
    survivors_within,
)
from dhp_jax.budgets.importance import group_scores
from dhp_jax.budgets.latency import Clock, LatencySearch, clock
from dhp_jax.budgets.limits import Limits, check_limits, with_limits
from dhp_jax.budgets.other_widths import advice, time_other_widths
from dhp_jax.budgets.rounding import Multiples
from dhp_jax.budgets.timing import check_batch, hardware
from dhp_jax.core.cost import MEASURES, Cost
from dhp_jax.core.latent import latents, latents_to_prune
from dhp_jax.core.plain import Model
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.surgery import check_masks, prune
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.tracing.counts import measure_cost
from dhp_jax.tracing.declared import prove_declared
from dhp_jax.tracing.programs import Call

Selection = Callable[..., dict[str, np.ndarray]]  # takes what `survivors_within` does

SEARCHED = 0.5  # of its largest magnitude: a latent whose smallest is below was searched


def selection(by: Scores | Selection | None, budget: Collection[str]) -> Selection:
    """The function that chooses survivors: by magnitude, by scores, or the caller's own.

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
    return functools.partial(_select_within, by)


def _select_within(
    select: Selection, model: nnx.Module, cost: Cost, multiple_of: Multiples, **budget: float
) -> dict[str, np.ndarray]:
    """Calls the caller's function and checks that its survivors are within the budget."""
    masks = select(model, cost, multiple_of, **budget)
    check_masks(model, masks)
    masks = {name: np.asarray(mask) for name, mask in masks.items()}
    used = describe_choice(cost, masks).shares
    if any(used[name] > share for name, share in budget.items()):
        allowed, got = (
            ", ".join(f"{name}={shares[name]:g}" for name in budget) for shares in (budget, used)
        )
        raise ValueError(f"by: expected survivors within {allowed}; got {got}")
    return masks


def _within_recounted(
    select: Selection,
    asked: Mapping[str, float],
    model: nnx.Module,
    cost: Cost,
    multiple_of: Multiples,
    **budget: float,
) -> dict[str, np.ndarray]:
    """Survivors of which the network is within what was asked for when it is counted anew.

    `budget` may be smaller, as of a candidate that is timed.
    """
    least = smallest_ratio(model, cost, multiple_of)
    while True:
        masks = select(model, cost, multiple_of, **budget)
        counted, predicted = cost.recount(masks), describe_choice(cost, masks).shares
        used = {name: getattr(counted, name) / (getattr(cost, name) or 1) for name in asked}
        over = {name: share / used[name] for name, share in asked.items() if used[name] > share}
        if not over:
            return masks
        fewer = {name: max(least[name], predicted[name] * part) for name, part in over.items()}
        if all(share >= predicted[name] for name, share in fewer.items()):
            name = next(iter(over))
            least_used = f"at least {used[name]:.4f}"
            why = f"the smallest network uses {used[name]:.4f}, counted as its program is run"
            told = f"{asked[name]!r} cannot be reached: {why}"
            raise BudgetError(name, least_used, asked[name], told)
        budget |= fewer


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
    """Chooses survivors within all budgets and close to them; see `survivors_within`.

    Args:
      model: a network of latents.
      cost: its `measure_cost`.
      multiple_of: as for `prune_to`.
      by: as for `prune_to`.
      latency: share in (0, 1] of the time of the unpruned network, or `None`. The upper quartile of
        the measured ratio must be within it, in two of three measurements.
      timed: from `clock`, if `latency` is given.
      **budget: `flops`, `params`, `activations`, shares in (0, 1].

    Raises:
      ValueError: as `survivors_within`; `BudgetError` if the smallest network is not fast enough.
    """
    if latency is not None:
        check_share("latency", latency)
        budget = {"flops": 1.0, **budget}
    select = selection(by, budget)
    if cost.recount is not None:
        select = functools.partial(_within_recounted, select, dict(budget))
    if latency is None:
        return describe_choice(cost, select(model, cost, multiple_of, **budget))
    check_budget(model, cost, multiple_of, **budget)
    search = LatencySearch(model, cost, multiple_of, select, budget, latency, timed)
    return search.result()


def prune_to(
    model: Model,
    input_shape: Any = None,
    multiple_of: Multiples = 1,
    *,
    by: Scores | Selection | None = None,
    keep: Limits | None = None,
    call: Call | None = None,
    latency: float | None = None,
    batch: int | None = None,
    **budget: float,
) -> Model:
    """Prunes a network to budgets, by magnitude of its latents.

    The pruned network is within all budgets and as close to them as possible. Where no latent was
    searched, so that no entry is below half of the largest of its latent, `dhp.group_scores` ranks
    them, and if they are not all alike, a warning says so.

    Args:
      model: a network of latents; left as it was.
      input_shape: shape of one example, `(height, width, channels)`, or other inputs, as for
        `dhp.measure_cost`; `None` for those that `dhp.with_latents` was given.
      multiple_of: a latent that loses entries keeps a multiple of this number of them. One number
        for all latents; numbers by name or pattern, such as `{"stages.*": 8}`; or "auto", the best
        measured one for this platform and the dtype of the model (see `dhp_jax.budgets.rounding`).
      by: what ranks channels in place of magnitudes. Either scores for the entries of every
        prunable latent by name, as from `dhp.l1_scores` or `dhp.random_scores`; the smallest go
        first. Or a function that chooses survivors, such as `dhp.uniform_within`.
      keep: least share in (0, 1] of the entries of latents, by name or pattern, such as
        `{"stages.*": 0.5, "stem*": 1.0}`, where 1 leaves a latent out; or a pair of the least and
        the most share, such as `{"head": (0, 0.5)}`. The last pattern that fits counts. A least
        share above 0 takes the place of the latent's `min_channels`, even where it is smaller.
      call: a function of the model and the inputs, where that is not `model(*inputs)`; networks
        of traced latents know theirs.
      latency: share in (0, 1] of the time of the unpruned network, or `None`. Both networks are
        compiled and timed alternately on this machine. Three of four pairs of passes must be within
        the share, in two of three measurements. Up to ten candidates are compiled.
      batch: how many examples a timed pass takes, 1 for a `latency` if not given. Arrays that are
        given as inputs here are repeated; those of `dhp.with_latents` are not kept, and zeros come
        in their place. With a `batch` and no `latency` the pruned network is timed. Where it is
        slower than the unpruned one, networks of other `multiple_of` are timed too, and a warning
        tells which would help.
      **budget: `flops`, `params` or `activations` (bytes of the outputs of all layers; see
        `dhp_jax.core.cost`), as shares of the model's own in (0, 1].

    Returns:
      The pruned network, as from `prune`.

    Raises:
      ValueError: a share outside (0, 1]; a `multiple_of` below 1 or above the size of its latents;
        a `batch` below 1; scores that do not suit the latents; a function `by` that does not take
        these arguments, or whose survivors are not within the budgets; axes that meet in the
        forward pass without being one latent; a share that is out of reach (`BudgetError`, with
        the smallest one possible).

    Example:
      >>> small = dhp.prune_to(model, (32, 32, 3), flops=0.5)
      >>> quick = dhp.prune_to(model, (32, 32, 3), multiple_of=8, params=0.6, latency=0.7, batch=64)
    """
    check_batch(batch)
    if latency is not None:
        check_share("latency", latency)
        budget = {"flops": 1.0, **budget}
    latents_to_prune(model)
    check_asked(model, multiple_of, budget, (*MEASURES, "latency"))  # before any work, as all here
    selection(by, budget)
    if isinstance(by, Mapping):
        checked_scores(model, by)
    table = architecture_of(model).axes
    if input_shape is None and table is not None:
        input_shape = table.inputs
    call = call or (table and table.call)
    if keep is not None:
        model = with_limits(model, keep)
    cost = measure_cost(model, input_shape, call=call)
    try:
        check_budget(model, cost, multiple_of, **budget)
    except BudgetError:
        proved_axes(model, input_shape, call)  # a layer that cannot be pruned is told as that
        raise
    analysis = proved_axes(model, input_shape, call)
    timed = None
    if latency is not None or batch is not None:
        timed = clock(model, input_shape, batch or 1, call)
    by = default_scores(model) if by is None else by
    chosen = choose(model, cost, multiple_of, by=by, latency=latency, timed=timed, **budget)
    if keep is not None:
        check_limits(model, chosen.masks)
    if analysis is not None:
        prove_declared(model, chosen.masks, analysis)
    small = prune(model, chosen.masks)
    if timed is not None and latency is None and (time := timed(small)).ratio["low"] > 1:
        share = budget | {"flops": chosen.shares["flops"]}
        select = selection(by, share)
        tried = time_other_widths(model, cost, timed, multiple_of, lambda number: share, select)
        told = advice({number: found.ratio for number, found in tried.items()})
        warnings.warn(
            f"prune_to: the pruned network takes {time} of the unpruned one's time, batch {batch}, "
            f"on {hardware()}; {told}",
            stacklevel=2,
        )
    return small


def default_scores(model: nnx.Module) -> Scores | None:
    """Scores by group norms if no latent was searched; otherwise none, for magnitudes rank.

    A search brings entries down. In plain training they stay about alike, and say nothing. Where
    each is 0 or 1, as when `fade_to_budget` has ended, those that are 0 go first, with a score of
    0, and group norms rank the others.

    Warns:
      UserWarning: latents that are not all alike do not rank.

    Raises:
      ArgumentError: no latent was searched, and one is in no layer that has weights.
    """
    prunable = {name: z for name, z in latents(model).items() if z.prunable}
    magnitudes = {name: np.abs(np.asarray(z.value(), np.float64)) for name, z in prunable.items()}
    two_valued = all(np.isin(z, (0, 1)).all() for z in magnitudes.values())
    searched = any(z.min() < SEARCHED * z.max() for z in magnitudes.values())
    if not prunable or (searched and not two_valued):
        return None
    if any(np.ptp(z) > 0 for z in magnitudes.values()) and not searched:
        warnings.warn(
            "prune_to: group norms rank, and not the latents: no entry is below half of the "
            "largest of its latent, as after a search; give by= to rank by something else",
            stacklevel=3,
        )
    try:
        scores = group_scores(model)
    except ValueError as error:
        why = f"no latent was searched, and group_scores cannot rank their entries: {error}"
        raise ArgumentError("by", detail=f"expected scores by latent, for {why}") from None
    if not searched:
        return scores
    open_ones = {name: score * magnitudes[name] for name, score in scores.items()}  # by 0 or 1
    return {name: x / max(x.sum(), TINY) * (x > 0).sum() for name, x in open_ones.items()}
