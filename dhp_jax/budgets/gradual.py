"""A search from trained weights: what a budget has no room for fades away, little by little."""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np
import optax
from optax._src.base import NO_PARAMS_MSG

from dhp_jax.budgets.counted import check_budget, entry_shares, removals
from dhp_jax.budgets.rounding import Multiples, multiples
from dhp_jax.core.cost import Cost
from dhp_jax.core.latent import LatentVector, has_gates, latents
from dhp_jax.core.state import path_name
from dhp_jax.errors import ArgumentError, check_at_least_zero, check_integer, shown
from dhp_jax.prox import soft_threshold

STAGES = 6  # parts of a search, each with a choice of its own
Vectors = dict[str, Array]  # by the name of a prunable latent


class FadeToBudgetState(NamedTuple):
    """State of `fade_to_budget`, with that of the optimizer in it.

    `count` are the steps taken, `average` is of the squared first-order Taylor terms of each entry,
    and `keep` are the entries that are not to fade.
    """

    count: Int[Array, ""]
    average: dict[str, Float[Array, " size"]]
    keep: dict[str, Bool[Array, " size"]]
    inner: Any


def fade_to_budget(
    inner: optax.GradientTransformation,
    model: nnx.Module,
    cost: Cost,
    *,
    steps: int,
    stages: int = STAGES,
    power: float = 1.0,
    memory: float = 0.98,
    multiple_of: Multiples = 1,
    **budget: float,
) -> optax.GradientTransformationExtraArgs:
    """Trains a network with gates while the channels that a budget has no room for fade away.

    With `z` for an entry of a latent, and `g` for the derivative of the loss by it, every step
    averages the square of the first-order Taylor term:

        v <- memory v + (1 - memory) (g z)^2

    In the first of `stages + 1` equal parts of the steps nothing fades. At the beginning of part
    `j = 1 .. stages` the entries with the smallest `v / c^power` are chosen, of all latents at
    once, as many as have to go so that no share is above

        1 - (1 - target) (1 - (1 - j / stages)^2)

    Of these the ones that still fit come back, the largest first: a costly channel may have taken
    more than had to go. Here `c` is what an entry costs in the network that is left: the derivative
    of its FLOPs by the width of the latent; of branches, the largest. (Of several budgets the first
    counts.) Until the end of the part, `k` steps away, every step ends with the proximal step of an
    l1 norm that brings the other chosen entries to zero in time:

        `z <- sign(z) max(|z| - |z| / k, 0)`

    Nothing else moves a latent: the others stay at 1, for the scales of BatchNorm and the kernels
    do what they could. What has become zero stays zero. So after the last step the network computes
    what `dhp.prune` leaves, and the cut loses nothing; but a mean or maximum over channels, as in
    LayerNorm, still counts those at zero.

    A term that is not finite leaves `v` as it is. With `optax.apply_if_finite` for `inner` the fade
    goes on in steps that it leaves out; around the whole, such steps do not count, nor do those in
    which `optax.MultiSteps` gathers gradients. What stands before it in a chain may clip or scale
    gradients; an optimizer there would leave nothing to rank by, so it is `inner`. Put it last:
    what stands behind it, as weight decay or a factor, would change the steps of latents too. Means
    of parameters, as of `optax.lookahead`, `optax.contrib.schedule_free` or `optax.ema`, have
    latents between 0 and 1: prune the parameters that its own updates lead to.

    Args:
      inner: the optimizer of all other parameters; it sees zeros for the gradients of latents,
        and what it says of them is not heeded.
      model: what is trained, from `with_gates`.
      cost: its `measure_cost`.
      steps: in how many steps the budget is met; at least `stages + 1`.
      stages: in how many parts, each with a choice of its own.
      power: 0 ranks by the loss alone, 1 by loss per FLOP.
      memory: share of the average that a step leaves.
      multiple_of: a latent that loses entries keeps a multiple of this number of them, as for
        `prune_to`: entries go in groups of so many, ranked by their largest score.
      **budget: some of `flops`, `params`, `activations`, shares in (0, 1]; all of them hold.

    Returns:
      A transformation of all `nnx.Param` of the model, in their own order, as `nnx.Optimizer(model,
      tx, wrt=nnx.Param)` and a tuple of its latent vectors and other parameters have it.

    Raises:
      ValueError: a number outside its range; budgets as of `prune_to`; a model without gates; from
        `update`, `params` missing.

    Warns:
      UserWarning: the order of an einsum of several arrays depends on widths, so that what is left
        may cost more than `cost` tells; `dhp.prune_to` counts anew.

    Example:
      >>> model = dhp.with_gates(trained, rngs=nnx.Rngs(0))
      >>> cost = dhp.measure_cost(model, (32, 32, 3))
      >>> tx = dhp.fade_to_budget(
      ...     optax.sgd(0.05, momentum=0.9), model, cost, steps=300, flops=0.5
      ... )
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    References: DHP (arXiv 2003.13683) for latents and the proximal step; Molchanov et al., CVPR
    2019 (arXiv 1906.10771), for the terms; Wang et al., Neural Pruning via Growing Regularization,
    ICLR 2021 (arXiv 2012.09243), for strengths that grow for what is to go.
    """
    if not all(callable(getattr(inner, name, None)) for name in ("init", "update")):
        got = f"a {type(inner).__name__}" if isinstance(inner, nnx.Pytree) else shown(inner)
        raise ArgumentError("inner", "an optax transformation, such as optax.sgd(0.1)", got)
    if not isinstance(cost, Cost):
        raise ArgumentError("cost", "what dhp.measure_cost returns", shown(cost))
    _check_numbers(steps, stages, power, memory)
    check_budget(model, cost, multiple_of, **budget)
    if not has_gates(model):  # at 0 others leave something behind
        got = f"a {type(model).__name__} that has none"
        raise ArgumentError("model", "a network of dhp.with_gates", got)
    _tell_orders(cost, budget)
    inner = optax.with_extra_args_support(inner)
    named = {name: z for name, z in latents(model).items() if z.prunable}
    steps_of = multiples(model, multiple_of)
    removed = {n: np.array(removals(z, steps_of[n]), int) for n, z in named.items()}
    sizes = {name: z.size for name, z in named.items()}
    names = _vector_names(model)
    limits = _limits(cost, stages, budget)
    begins = np.array([round(j * steps / (stages + 1)) for j in range(stages + 2)])

    def vectors_of(tree: PyTree) -> Vectors:
        leaves, places = jax.tree.leaves(tree), _vectors(tree, names)
        return {name: leaves[places[name]] for name in named}

    def with_vectors(tree: PyTree, made: Callable[[str, Array], Array]) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        for name, place in _vectors(tree, names).items():
            leaves[place] = made(name, leaves[place])
        return jax.tree.unflatten(structure, leaves)

    def init(params: optax.Params) -> FadeToBudgetState:
        return FadeToBudgetState(
            jnp.zeros([], jnp.int32),
            {name: jnp.zeros(size) for name, size in sizes.items()},
            {name: jnp.ones(size, bool) for name, size in sizes.items()},
            inner.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        z, average = vectors_of(params), {}
        for name, gradient in vectors_of(updates).items():
            term = (gradient.astype(jnp.float32) * z[name]) ** 2  # a float16 would be 0
            moved = memory * state.average[name] + (1 - memory) * term
            average[name] = jnp.where(jnp.isfinite(term), moved, state.average[name])
        updates = with_vectors(updates, lambda _, u: jnp.zeros_like(u))  # no norm that clips has it
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        stage = jnp.searchsorted(jnp.asarray(begins), state.count, side="right") - 1
        chooses = jnp.isin(state.count, begins[1:-1])
        # Those that have been chosen are gone, even if a step that was left out kept them from 0.
        alive = {name: jnp.where(state.keep[name], z[name], 0) for name in named}
        keep = jax.lax.cond(
            chooses,
            lambda: entries_that_stay(average, alive, stage, cost, removed, power, limits),
            lambda: state.keep,
        )
        end = jnp.asarray(begins)[jnp.minimum(stage + 1, stages + 1)]
        left = jnp.maximum(end - state.count, 1)

        def faded(name: str, u: Array) -> Array:
            shrunk = soft_threshold(z[name], jnp.abs(z[name]) / left)
            return jnp.where(keep[name], 0, shrunk - z[name]).astype(u.dtype)

        updates = with_vectors(
            updates, lambda name, u: faded(name, u) if name in named else jnp.zeros_like(u)
        )
        count = optax.safe_increment(state.count)
        return updates, FadeToBudgetState(count, average, keep, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def finish_fade(model: nnx.Module) -> tuple[nnx.Module, int]:
    """A network at the end of its search, with all that was fading at zero.

    If the last steps were left out, it has not reached zero yet: how many entries are set to it.
    """
    model, early = nnx.clone(model), 0
    for z in latents(model).values():
        vector = z.vector[...]
        early += int(jnp.sum((vector != 1) & (vector != 0)))
        z.vector.set_value(jnp.where(vector == 1, vector, 0))
    return model, early


def entries_that_stay(
    average: Vectors,
    z: Vectors,
    stage: Array,
    cost: Cost,
    removed: Mapping[str, np.ndarray],
    power: float,
    limits: Mapping[str, np.ndarray],
) -> Vectors:
    """Which entries stay when a part of the way to the budget is due; usable in jit.

    Entries of a latent go in groups, those with the smallest scores first; `removed` tells how many
    are gone with each group. The largest score of a group ranks it, and as few go as are within.
    Then groups that still fit come back, those of the largest scores first.
    """
    names, sizes = list(z), np.array([x.size for x in z.values()])
    owner = np.repeat(np.arange(len(names)), [len(removed[name]) for name in names])
    if not owner.size:
        return {name: x != 0 for name, x in z.items()}
    gone = np.concatenate([removed[name] for name in names])
    taken = np.concatenate([np.diff(removed[name], prepend=0) for name in names])
    narrower = jnp.asarray(sizes[owner] - gone)  # what a latent has without each group
    wider = jnp.asarray(sizes[owner] - gone + taken)  # and with it

    def within(counts: Array) -> Array:
        amounts = cost.amounts(cost.sizes | dict(zip(names, counts, strict=True)))
        with jax.enable_x64(True):  # whole numbers, for float32 may round a little too much down
            fits = [amounts[m] <= jnp.asarray(most)[stage] for m, most in limits.items()]
            return jnp.all(jnp.stack(fits))

    # All entries in a row, latent after latent: one operation for all that are wanted of each.
    of, starts = np.repeat(np.arange(len(names)), sizes), np.cumsum(sizes) - sizes
    there = jnp.concatenate([x != 0 for x in z.values()])
    alive = jax.ops.segment_sum(there.astype(jnp.int32), of, len(names))
    left = cost.sizes | dict(zip(names, alive, strict=True))
    worth = entry_shares(cost, left, next(iter(limits)), jnp.float32)
    worth = jnp.stack([worth[name] for name in names]) ** power
    # What is zero scores below everything, so that it never comes back.
    scores = jnp.concatenate([average[name] for name in names]) / worth[of]
    scores = jnp.where(there, scores, -1.0)
    _, ascending, entries = jax.lax.sort((of, scores, np.arange(of.size)), num_keys=2)
    order = jnp.argsort(ascending[starts[owner] + gone - 1])
    ranks = jnp.zeros(owner.size, jnp.int32).at[order].set(jnp.arange(owner.size, dtype=jnp.int32))

    def without(smallest: Array) -> Array:
        """What is left of each latent without so many of the smallest groups."""
        lost = jnp.where(ranks < smallest, taken, 0)
        return sizes - jax.ops.segment_sum(lost, owner, len(names))

    def halved(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        fits = within(without(middle))
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    # Cost falls with every group that goes, so their number is found by bisection.
    none, all_of_them = jnp.int32(0), jnp.int32(owner.size)
    fewest, _ = jax.lax.while_loop(lambda b: b[0] < b[1], halved, (none, all_of_them))
    counts = jnp.minimum(without(fewest), alive)

    def filled(counts: Array, group: Array) -> tuple[Array, None]:
        i, width = jnp.asarray(owner)[group], wider[group]
        more = counts.at[i].set(width)
        is_next = counts[i] == narrower[group]
        return jnp.where(is_next & (width <= alive[i]) & within(more), more, counts), None

    counts, _ = jax.lax.scan(filled, counts, order[::-1])
    stays = np.arange(of.size) - starts[of] >= (sizes - counts)[of]
    keep = jnp.zeros(of.size, bool).at[entries].set(stays) & there
    return dict(zip(names, jnp.split(keep, starts[1:]), strict=True))


def _limits(cost: Cost, stages: int, budget: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The most FLOPs, params or activations that are left after each stage, exactly."""

    def most(whole: int, share: float) -> int:
        found = int(share * whole) + 1
        while whole and found / whole > share:
            found -= 1
        return found

    limits = {}
    for name, target in budget.items():
        way = [1 - (1 - target) * (1 - (1 - j / stages) ** 2) for j in range(stages)]
        limits[name] = np.array([most(getattr(cost, name), n) for n in (*way, target)], np.int64)
    return limits


def _vector_names(model: nnx.Module) -> dict[str, str]:
    """Names of all latents by the paths of their vectors in the model's state, in its order."""
    numbered = nnx.clone(model)
    named = latents(numbered)
    for number, z in enumerate(named.values()):
        z.vector.set_value(np.full(z.size, number))  # known, where this is traced
    names, vectors = list(named), nnx.to_flat_state(nnx.state(numbered, LatentVector))
    return {path_name(path): names[int(vector[0])] for path, vector in vectors}


def _vectors(params: PyTree, names: Mapping[str, str]) -> dict[str, int]:
    """Where among the leaves of parameters the vector of each latent is."""
    found = []
    for place, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        keys = (str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        if (name := names.get(".".join(keys))) is not None:
            found.append((name, place))
    if len(found) != len(names) or len(dict(found)) != len(names):
        raise ValueError(
            f"fade_to_budget: params: expected those of the model, with {len(names)} latent "
            f"vectors; got {len(found)}"
        )
    return dict(found)


def _tell_orders(cost: Cost, budget: Mapping[str, float]) -> None:
    """Warns of budgets that may not hold, for contractions whose order depends on widths."""
    asked = ", ".join(f"{name}={budget[name]:g}" for name in budget if name != "params")
    if cost.recount is not None and asked:
        warnings.warn(
            f"fade_to_budget: {asked} may be exceeded, for an einsum of several arrays is run in "
            "another order where that is cheaper; prune with dhp.prune_to, which counts anew",
            stacklevel=3,
        )


def _check_numbers(steps: int, stages: int, power: float, memory: float) -> None:
    check_integer("stages", stages)
    check_integer("steps", steps)
    if steps <= stages:
        raise ValueError(f"steps: expected more than the {stages} stages, got {steps!r}")
    check_at_least_zero("power", power)
    if isinstance(memory, bool) or not isinstance(memory, Real) or not 0 <= memory < 1:
        raise ValueError(f"memory: expected a number in [0, 1), got {memory!r}")
