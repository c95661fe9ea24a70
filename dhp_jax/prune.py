"""Which channels survive, how many fit a budget, and the surgery that makes the network smaller."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
import math
from numbers import Real
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from dhp_jax.architecture import architecture_of, set_architecture
from dhp_jax.cost import MEASURES, Cost, Counts, check_input_shape, input_refused
from dhp_jax.latent import Axis, Latent, latents, latents_to_prune, modules_in, walk
from dhp_jax.layers import Prunable
from dhp_jax.names import shown, unknown
from dhp_jax.widths import Multiples, multiples

Masks = Mapping[str, np.ndarray]
Scores = Mapping[str, np.ndarray]  # by latent a number for each entry; the smallest go first
TOLERANCE = 0.005  # of a budget that may be left before entries are traded
TRADES = 32
Group = tuple[str, tuple[int, ...]]  # a latent, and entries of it that go together


class BudgetError(ValueError):
    """A budget that no choice of survivors can meet."""


def survivor_mask(
    vector: Float[Array, " size"], threshold: float, min_channels: int
) -> Bool[Array, " size"]:
    """The entries with `|z| >= threshold`, and the `min_channels` largest; usable in jit.

    Of equal ones, as those that the proximal step has made zero, the first are the larger.
    """
    magnitude = jnp.abs(vector)
    _, largest = jax.lax.top_k(magnitude, min(min_channels, vector.size))
    return (magnitude >= threshold).at[largest].set(True)


def survivors(model: nnx.Module, threshold: float = 5e-3) -> dict[str, np.ndarray]:
    """The channels that survive a threshold.

    Args:
      model: a network of latents.
      threshold: entries of smaller magnitude go, except that every latent keeps its
        `min_channels` largest (the first of those that are equal); latents that are not prunable
        keep everything.

    Returns:
      A boolean mask for each latent by name (see `dhp.latents`).

    Raises:
      ValueError: a threshold that is no number of at least 0; a latent that is not finite.

    Example:
      >>> {name: int(mask.sum()) for name, mask in dhp.survivors(model, threshold=5e-3).items()}

    Reference: DHP (arXiv 2003.13683), section 3.3.
    """
    if not isinstance(threshold, Real | np.ndarray | jax.Array) or not threshold >= 0:
        raise ValueError(f"threshold: expected a number >= 0, got {threshold!r}")
    for name, z in latents(model).items():
        if not np.isfinite(z.value()).all():
            raise ValueError(f"model: expected finite latents, got NaN or infinity in {name!r}")
    return {
        name: np.asarray(survivor_mask(z.value(), threshold, z.min_channels))
        if z.prunable
        else np.ones(z.size, bool)
        for name, z in latents(model).items()
    }


def survivor_counts(model: nnx.Module, threshold: float) -> dict[str, Array]:
    """How many entries of each latent survive a threshold, as of `survivor_mask`; usable in jit.

    Latents that are alike are counted together, which is one small piece of work for an accelerator
    and not one for each.
    """
    named = latents(model)
    counts: dict[str, Array | int] = {name: z.size for name, z in named.items()}
    alike = defaultdict(dict)
    for name, z in named.items():
        if z.prunable:
            alike[z.size, z.min_channels][name] = z.value()
    for (size, min_channels), vectors in alike.items():
        reach_it = jnp.abs(jnp.stack(list(vectors.values()))) >= threshold
        kept = jnp.maximum(jnp.sum(reach_it, axis=1), min(min_channels, size))
        counts |= dict(zip(vectors, kept, strict=True))
    return counts


def latent_history(model: nnx.Module, threshold: float) -> dict[str, Array]:
    """What a search records of its latents as they die; usable in jit.

    Returns:
      `survivors`, how many entries of each prunable latent survive the threshold, in the order of
      `dhp.latents`; and `magnitudes`, the 0th, 10th, ... 100th percentile of all their magnitudes.
      Nothing for a network without prunable latents.
    """
    prunable = [z for z in latents(model).values() if z.prunable]
    if not prunable:
        return {}
    counts = survivor_counts(model, threshold)
    magnitudes = jnp.abs(jnp.concatenate([z.value() for z in prunable]))
    return {
        "survivors": jnp.stack([counts[name] for name, z in latents(model).items() if z.prunable]),
        "magnitudes": jnp.quantile(magnitudes, jnp.linspace(0, 1, 11)),
    }


def smallest_ratio(model: nnx.Module, cost: Cost, multiple_of: Multiples = 1) -> dict[str, float]:
    """The shares, as of `Cost.shares`, when every latent keeps as few entries as it can."""
    steps = multiples(model, multiple_of)
    counts = {
        name: z.size - max(removals(z, steps.get(name, 1)), default=0)
        for name, z in latents(model).items()
    }
    return cost.shares(counts)


def check_budget(
    model: nnx.Module, cost: Cost, multiple_of: Multiples = 1, **budget: float
) -> None:
    """Raises unless there are latents, and each budget is in (0, 1] and can be reached; see
    `survivors_within`."""
    latents_to_prune(model)
    multiples(model, multiple_of)
    if not budget or not set(budget) <= set(MEASURES):
        expected = "expected some of flops=, params=, activations="
        raise ValueError(f"budget: {expected}, got {sorted(budget)}")
    smallest = smallest_ratio(model, cost, multiple_of)
    for name, target in budget.items():
        check_share(name, target)
        if target < smallest[name]:
            reachable = math.ceil(1e4 * smallest[name]) / 1e4
            raise BudgetError(
                f"{name}: {target!r} cannot be reached: the smallest possible share is "
                f"{reachable:.4f}, with min_channels entries left in every prunable latent"
                + (f", up to a multiple of {multiple_of}" if multiple_of != 1 else "")
            )


def check_share(name: str, share: float) -> None:
    """Raises unless a share is in (0, 1]."""
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
        raise ValueError(f"{name}: expected a share in (0, 1], got {share!r}")


def survivors_within(
    model: nnx.Module,
    cost: Cost,
    multiple_of: Multiples = 1,
    *,
    scores: Scores | None = None,
    **budget: float,
) -> dict[str, np.ndarray]:
    """The survivors, by magnitude of the latents, that use as much of a budget as fits.

    Entries of all latents go in order of magnitude, smallest first, until the budget holds; then
    those that still fit come back, largest first. The result is within the budget, and no channel
    that was removed fits in what is left of it. If more than 0.5 % is left even so, costly channels
    that do not fit are traded for the smallest of other latents.

    Args:
      model: a network of latents.
      cost: its `measure_cost`.
      multiple_of: latents that lose entries keep a multiple of so many; see `widths.multiples`.
        Entries then go and come back in groups, each by its largest, and more of the budget may be
        left.
      scores: numbers of at least 0 for the entries of every prunable latent by name, which count
        instead of the magnitudes.
      **budget: some of `flops`, `params`, `activations` (see `dhp_jax.cost`), shares in (0, 1]; all
        of them hold.

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
    order = _removable(model, multiple_of, _magnitudes(model) if scores is None else scores)
    sizes = {name: z.size for name, z in latents(model).items()}

    def left_without(gone: Set[int]) -> float:
        left = Counter(sizes)
        for i in gone:
            left[order[i][0]] -= len(order[i][1])
        return slack(cost, left, budget)

    # Cost falls with every group removed, so the number to remove is found by bisection.
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if left_without(range(middle)) >= 0 else (middle + 1, high)
    gone = _refilled(set(range(low)), order, left_without)
    if left_without(gone) > TOLERANCE:
        gone = _traded(gone, order, left_without)
    masks = {name: np.ones(size, bool) for name, size in sizes.items()}
    for i in gone:
        name, entries = order[i]
        masks[name][list(entries)] = False
    return masks


def slack(cost: Cost, counts: Counts, budget: Mapping[str, float]) -> float:
    """What is left of the tightest budget by numbers of survivors; negative if it is exceeded."""
    used = cost.shares(counts)
    return min(share - used[name] for name, share in budget.items())


def _refilled(gone: set[int], order: list[Group], slack: Callable[[Set[int]], float]) -> set[int]:
    """Takes groups back that fit, largest first; of each latent none before its larger ones."""
    full = set()
    for i in sorted(gone, reverse=True):
        name = order[i][0]
        if name not in full and slack(gone - {i}) >= 0:
            gone = gone - {i}
        else:
            full.add(name)
    return gone


def _traded(gone: set[int], order: list[Group], slack: Callable[[Set[int]], float]) -> set[int]:
    """Takes an entry back that does not fit, for the smallest ones of other latents, if that helps.

    For channels of very different cost: once the costly ones are gone, none of them fits again.
    """
    for i in sorted(gone, reverse=True)[:TRADES]:
        if any(j > i and order[j][0] == order[i][0] for j in gone):
            continue  # a larger one of its latent is gone
        trial = gone - {i}
        for j, (name, _) in enumerate(order):
            if slack(trial) >= 0:
                break
            if name != order[i][0]:
                trial = trial | {j}
        if slack(trial) >= 0:
            trial = _refilled(trial, order, slack)
            gone = min(gone, trial, key=slack)
        if slack(gone) <= TOLERANCE:
            break
    return gone


def removals(z: Latent, multiple_of: int) -> range:
    """How many entries of a latent may go: numbers that leave a multiple, and `min_channels`."""
    first = z.size % multiple_of or multiple_of
    last = z.size - max(z.min_channels, multiple_of) if z.prunable else 0
    return range(first, last + 1, multiple_of)


def _magnitudes(model: nnx.Module) -> Scores:
    return {name: np.abs(np.asarray(z.value())) for name, z in latents(model).items()}


def _removable(model: nnx.Module, multiple_of: Multiples, scores: Scores) -> list[Group]:
    """The groups of entries that may go, smallest score first; ties by name and order."""
    groups, steps = [], multiples(model, multiple_of)
    for name in sorted(scores.keys() - latents(model).keys(), key=str):
        raise ValueError(unknown("scores", name, latents(model)))
    for name, z in latents(model).items():
        if not z.prunable:
            continue
        step, score = steps[name], _checked(scores, name, z.size)
        order = np.argsort(score, kind="stable")
        for end in removals(z, step):
            entries = order[max(0, end - step) : end]
            groups.append((score[entries[-1]], name, end, tuple(map(int, entries))))
    return [(name, entries) for _, name, _, entries in sorted(groups)]


def _checked(scores: Scores, name: str, size: int) -> np.ndarray:
    """The scores of a latent, if they are numbers of at least 0 for all of its entries."""
    if name not in scores:
        raise ValueError(f"scores: expected those of latent {name!r}; got {sorted(scores)}")
    score = np.asarray(scores[name], np.float64)
    if score.shape != (size,) or not (np.isfinite(score) & (score >= 0)).all():
        raise ValueError(
            f"scores[{name!r}]: expected {size} finite numbers >= 0; got an array of shape "
            f"{score.shape}, from {score.min(initial=np.inf):g} to {score.max(initial=-np.inf):g}"
        )
    return score


def prune(model: nnx.Module, keep: Masks | None = None) -> nnx.Module:
    """Makes the smaller network: every layer on latents becomes its plain counterpart.

    Each hypernetwork runs once; its kernel is sliced to the survivors, as are biases, BatchNorm
    scales, biases and statistics and the rows of linear layers. No latent, no hypernetwork and no
    mask is left.

    Args:
      model: a network of latents; left as it was.
      keep: a boolean mask for every latent by name, as `survivors` returns; `None` keeps
        everything and makes the ordinary, unpruned network.

    Returns:
      A model of the same class, of ordinary `flax.nnx` layers. What was not cut is shared with
      `model`: copy it before donating its buffers, if you still need `model`.

    Raises:
      ValueError: a mask that is missing, unknown, of another length, or keeps nothing; masks for a
        network without latents.

    Example:
      >>> small = dhp.prune(model, dhp.survivors(model, threshold=5e-3))
    """
    if keep is None:
        keep = {name: np.ones(z.size, bool) for name, z in latents(model).items()}
    check_masks(model, keep)
    model = nnx.clone(model)
    masks = {z: np.asarray(keep[name], bool) for name, z in latents(model).items()}
    architecture = architecture_of(model)
    if masks:
        kept = {name: np.flatnonzero(keep[name]) for name in keep}
        if architecture.renewed:  # of what an earlier pruning has left
            kept = {name: np.take(architecture.survivors[name], kept[name]) for name in kept}
        kept = {name: tuple(indices.tolist()) for name, indices in kept.items()}
        architecture = replace(architecture, survivors=kept, renewed=False)

    def plain(module: nnx.Module) -> Any:
        if isinstance(module, Axis):
            return None
        return module.plain(masks) if isinstance(module, Prunable) else module

    small = replaced(model, plain)
    set_architecture(small, architecture)
    return small


def replaced(module: nnx.Module, change: Callable[[nnx.Module], Any]) -> Any:
    """A module with others in the place of those in it; in place, but for the module itself.

    Args:
      module: where to begin.
      change: what stands in a module's place; the module itself to look at those in it. A module
        that several parents share is changed once.
    """
    done: dict[int, Any] = {}

    def of(module: nnx.Module) -> Any:
        if id(module) not in done:
            done[id(module)] = substitute = change(module)
            if substitute is module:
                for name, value in list(vars(module).items()):
                    if any(modules_in(value)):
                        setattr(module, name, in_value(value))
        return done[id(module)]

    def in_value(value: Any) -> Any:  # a module, or a list, tuple or dict of modules
        return jax.tree.map(
            lambda item: of(item) if isinstance(item, nnx.Module) else item,
            value,
            is_leaf=lambda item: isinstance(item, nnx.Module),
        )

    return of(module)


def check_masks(model: nnx.Module, keep: Masks) -> None:
    """Raises unless there is a mask for every latent, of its size, that keeps what has to stay."""
    expected = latents_to_prune(model) if keep else latents(model)
    for name in [*(n for n in keep if n not in expected), *(n for n in expected if n not in keep)]:
        what = "has no mask for latent" if name in expected else "has a mask for unknown latent"
        raise ValueError(f"keep: {what} {name!r}; the model's latents are {sorted(expected)}")
    for name, z in expected.items():
        mask = np.asarray(keep[name])
        if mask.shape != (z.size,) or mask.dtype != bool or not mask.any():
            raise ValueError(
                f"keep[{name!r}]: expected a boolean mask of shape ({z.size},) that keeps at least "
                f"one entry, got {mask.dtype} of shape {mask.shape} that keeps {int(mask.sum())}"
            )
        if not z.prunable and not mask.all():
            raise ValueError(
                f"keep[{name!r}]: expected a mask that keeps all {z.size} entries, for it is not "
                f"prunable; got one that drops {int((~mask).sum())}"
            )


def check_axes(model: nnx.Module, input_shape: tuple[int, ...]) -> None:
    """Raises unless axes that meet in the forward pass are the same latent.

    Prunes the model in several ways, so that any two latents lose different numbers of channels in
    at least one of them, and each loses some, and traces the forward passes; nothing is computed.
    It sees numbers of channels, not their order, and no latents of 1 or 2 channels; nor that the
    network's own outputs, if their latent is prunable, become fewer.

    Args:
      model: a network of latents; left as it was.
      input_shape: shape of one example, `(height, width, channels)`.

    Raises:
      ValueError: no network; axes of different latents meet, or one and something of fixed width
        (it tells which); or the model does not take such an input.

    Example:
      >>> dhp.check_axes(model, (32, 32, 3))
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"model: expected a network, got {shown(model)}")
    check_input_shape(input_shape)
    sizes = {name: z.size for name, z in latents(model).items()}
    prunable = [name for name, z in latents(model).items() if z.prunable and z.size > 2]
    numbers = {name: number for number, name in enumerate(prunable, start=1)}  # 0: not pruned
    base = min([8, *(sizes[name] - 1 for name in prunable)])
    place = 1
    while place <= len(numbers):
        removed = {name: number // place % base for name, number in numbers.items()}
        error = _forward_error(model, input_shape, sizes, removed)
        if error is not None:
            whole_error = _forward_error(model, input_shape, sizes, {})
            if whole_error is not None:
                raise ValueError(input_refused(input_shape, whole_error))
            alone = {n: _forward_error(model, input_shape, sizes, {n: 1}) for n in numbers}
            clashing = [name for name in numbers if alone[name] is not None]
            if len(clashing) == 1:
                error = alone[clashing[0]]
                fixed = [*_of_fixed_width(model, sizes[clashing[0]])[:3], "a number in its code"]
                what = f"an axis meets something of fixed width, such as {' or '.join(fixed)}"
            else:
                what = "axes that meet are not the same latent"
            names = " or ".join(f"{name!r} ({sizes[name]} channels)" for name in clashing)
            raise ValueError(
                f"model: {what}; pruning {names} alone breaks the forward pass: "
                f"{str(error).splitlines()[0]}"
            )
        place *= base


def _of_fixed_width(model: nnx.Module, width: int) -> list[str]:
    """What in a model has an axis of so many numbers that pruning does not change."""
    named = latents(model).items()
    found = [f"latent {name!r}" for name, z in named if z.size == width and not z.prunable]
    for path, _, module in walk(model):
        if not isinstance(module, Axis | Prunable):
            own = {name: v for name, v in vars(module).items() if isinstance(v, nnx.Variable)}
            names = [n for n, v in own.items() if width in getattr(v.get_value(), "shape", ())]
            if names and path:
                found.append(f"{path!r} ({type(module).__name__})")
            else:
                found += [f"{name!r} ({type(own[name]).__name__})" for name in names]
    return found


def _forward_error(model, input_shape, sizes, removed) -> Exception | None:
    """What the forward pass raises once some latents have lost a number of their last entries."""
    keep = {name: np.arange(size) < size - removed.get(name, 0) for name, size in sizes.items()}

    def forward(state: nnx.State, x: Array) -> Array:
        small = prune(nnx.merge(graphdef, state, copy=True), keep)
        small.eval()
        return small(x)

    graphdef, state = nnx.split(model)
    try:
        jax.eval_shape(forward, state, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
    except (TypeError, ValueError) as error:
        return error
    return None
