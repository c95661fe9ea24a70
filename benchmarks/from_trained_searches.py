"""Other searches from trained weights, tried beside the library's in from_trained.py.

Those of gates train a latent for every channel, all at 1 before the first update, where channels
are read. After each update, in proportion to its learning rate, a rule shrinks them: with a
strength of 1, a latent of 1 that the loss does not hold ends at 0. Latents have no weight decay.
No step leaves fewer entries of a latent than may stay. Then the channels of the smallest latents
go, until the budget holds.

The group lasso has no latents. It shrinks the norm of all weights that go with a channel.
"""

from collections.abc import Callable, Iterable, Mapping

from flax import nnx
from from_trained_programs import (
    MOMENTUM,
    WEIGHT_DECAY,
    Array,
    Batches,
    Network,
    Search,
    of_latents,
)
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dhp_jax as dhp
from dhp_jax.core.latent import LatentVector, map_variables
from dhp_jax.core.state import path_name
from dhp_jax.prox import soft_threshold
from dhp_jax.train.optimizer import optimizer

POLARISED = 1.2  # of the l1 norm, where the spread about the mean has 1

Rule = Callable[[Array, Array, Array], Array]
Arrays = dict[str, np.ndarray]
Found = tuple[Arrays, dict[str, np.ndarray]]  # weights and statistics; scores of each latent


def l1(z: Array, amount: Array, cost: Array) -> Array:
    """The proximal step of `s sum |z|`."""
    del cost
    return soft_threshold(z, amount)


def relative(z: Array, amount: Array, cost: Array) -> Array:
    """The same, relative to the mean of a latent, so that a common scale changes nothing."""
    return l1(z, amount * jnp.abs(z).mean(), cost)


def per_flop(z: Array, amount: Array, cost: Array) -> Array:
    """The same, of a strength in proportion to the FLOPs of a channel; the dearest has `s`."""
    return soft_threshold(z, amount * cost)


def polarised(z: Array, amount: Array, cost: Array) -> Array:
    """A step of `s (1.2 sum |z| - sum |z - mean z|)`, which parts small latents from large ones.

    Reference: Zhuang et al., Neuron-level Structured Pruning using Polarization Regularizer,
    NeurIPS 2020, equation 2, for each latent; there for the scales of all BatchNorms together.
    """
    side = jnp.sign(z - z.mean())
    return l1(z + amount * (side - side.mean()), POLARISED * amount, cost)


RULES: Mapping[str, Rule] = {
    "gates, l1": l1,
    "gates, l1 relative to the axis": relative,
    "gates, l1 per flop": per_flop,
    "gates, polarised": polarised,
    "gates, l1, Adam": l1,
}
LASSO = "group lasso"
NAMES = (*RULES, LASSO)


def searched(
    name: str,
    net: Network,
    trained: Mapping[str, np.ndarray],
    search: Callable,
    rates: np.ndarray,
    strength: float,
    stream: Iterable[Batches],
) -> Found:
    """The trained network after a search of one of `NAMES`, and what its channels are worth.

    Args:
      name: of the search.
      net: the network.
      trained: its weights and statistics.
      search: as of `Programs`.
      rates: the learning rate of each update.
      strength: how much of a 1, or of the mean norm of a channel, all updates take together.
      stream: the batches of these updates.
    """
    if name == LASSO:
        model = after_updates(*grouped(net, trained, rates, strength), search, stream)
        arrays = net.on_host(model)
        return arrays, dhp.group_scores(of_latents(net, arrays))
    model = after_updates(*gates(name, net, trained, rates, strength), search, stream)
    vectors = {name: z.vector[...] for name, z in dhp.latents(model).items()}
    scores = {name: np.abs(np.asarray(vectors[name], np.float64)) for name in net.prunable}
    return net.on_host(dhp.prune(model)), scores


def after_updates(
    model: nnx.Module,
    transformation: optax.GradientTransformation,
    search: Callable,
    stream: Iterable[Batches],
) -> nnx.Module:
    """A network after updates by a transformation, on all batches of a stream."""
    model.train()
    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)
    state = Search(params, statistics, transformation.init(params))
    advance = search(graphdef, transformation)
    for batches in stream:
        state = advance(state, batches)
    return nnx.merge(graphdef, state.params, state.statistics)


def sgd(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """The optimizer of every row."""
    given = {"momentum": MOMENTUM, "weight_decay": weight_decay, "nesterov": True}
    return optimizer("sgd", schedule, **given)


def gates(
    name: str, net: Network, trained: Mapping[str, np.ndarray], rates: np.ndarray, strength: float
) -> tuple[nnx.Module, optax.GradientTransformation]:
    """A network with a gate for every channel, and the updates of one of `RULES`."""
    model = dhp.with_gates(net.model(trained), rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    chosen = jax.tree.leaves(dhp.prunable_latents(params))
    floors = jax.tree.leaves(map_variables(lambda v: getattr(v, "min_channels", 0), params))
    costs, rule = jax.tree.leaves(nnx.state(with_costs(net, model), nnx.Param)), RULES[name]
    rates = jnp.asarray(rates, jnp.float32)
    amounts, steps_of_latents = strength * rates / rates.sum(), sgd(rates.__getitem__, 0.0)
    if name == "gates, l1, Adam":  # its steps are about as large as its rate
        amounts = jnp.full(len(rates), strength / len(rates))
        steps_of_latents = optax.adam(1 / len(rates))
    steps = {
        "gate": steps_of_latents,
        "other latent": optax.set_to_zero(),
        "weight": sgd(rates.__getitem__, WEIGHT_DECAY),
    }
    inner = optax.partition(steps, map_variables(kind, params))

    def shrunk(updates, params, count):
        leaves, structure = jax.tree.flatten(updates)
        values = jax.tree.leaves(params)
        for place, cost in enumerate(costs):
            if chosen[place]:
                z = values[place] + leaves[place]
                smaller = rule(z, amounts[count], cost)
                wide = jnp.sum(smaller != 0) > floors[place]
                leaves[place] = jnp.where(wide, smaller, z) - values[place]
        return jax.tree.unflatten(structure, leaves)

    return model, followed_by(inner, shrunk)


def kind(variable: nnx.Variable) -> str:
    """What a parameter is, of a network with gates."""
    if not isinstance(variable, LatentVector):
        return "weight"
    return "gate" if variable.prunable else "other latent"


def with_costs(net: Network, model: nnx.Module) -> nnx.Module:
    """The network with the FLOPs of a channel, over the most of any, in place of its latents."""
    whole = net.cost.shares(net.sizes)["flops"]
    of_one = {
        name: whole - net.cost.shares(net.sizes | {name: net.sizes[name] - 1})["flops"]
        for name in net.prunable
    }
    model = nnx.clone(model)
    for name, z in dhp.latents(model).items():
        if name in of_one:
            z.vector.set_value(jnp.full(z.size, of_one[name] / max(of_one.values())))
    return model


def grouped(
    net: Network, trained: Mapping[str, np.ndarray], rates: np.ndarray, strength: float
) -> tuple[nnx.Module, optax.GradientTransformation]:
    """An ordinary network, and updates that shrink all weights of a channel together.

    Of a channel are the kernels that read it and make it, and the scale and bias of BatchNorms. A
    step takes the same of every norm; with a strength of 1 all steps take the mean of all norms. A
    kernel has two channels to an entry, and is shrunk for both.
    """
    model = net.model(trained)
    params = nnx.state(model, nnx.Param)
    names = [path_name(path) for path, _ in nnx.to_flat_state(params)]
    groups = {latent: members(net, latent) for latent in net.prunable}
    floors = {name: z.min_channels for name, z in dhp.latents(net.latents).items()}

    def norms(values, latent):
        parts = [jnp.moveaxis(values[part], axis, 0) for part, axis in groups[latent]]
        flat = jnp.concatenate([x.reshape(len(x), -1) for x in parts], 1)
        return jnp.linalg.norm(flat, axis=1)

    mean = jnp.concatenate([norms(trained, latent) for latent in groups]).mean()
    rates = jnp.asarray(rates, jnp.float32)
    amounts = strength * mean * rates / rates.sum()

    def shrunk(updates, params, count):
        leaves, structure = jax.tree.flatten(updates)
        before = dict(zip(names, jax.tree.leaves(params), strict=True))
        values = {name: before[name] + u for name, u in zip(names, leaves, strict=True)}
        after = dict(values)
        for latent, parts in groups.items():
            factor = jnp.maximum(1 - amounts[count] / (norms(values, latent) + 1e-12), 0)
            factor = jnp.where(jnp.sum(factor != 0) > floors[latent], factor, 1)
            for part, axis in parts:
                at = [1] * values[part].ndim
                at[axis] = -1
                after[part] = after[part] * factor.reshape(at)
        return jax.tree.unflatten(structure, [after[name] - before[name] for name in names])

    return model, followed_by(sgd(rates.__getitem__, WEIGHT_DECAY), shrunk)


def members(net: Network, latent: str) -> list[tuple[str, int]]:
    """The arrays that have an axis of a latent, by name, and that axis."""
    found = []
    for kernel, (read, made) in net.reads.items():
        if read == latent:
            found.append((kernel, net.variables[kernel][1].ndim - 2))
        if made == latent:
            found.append((kernel, net.variables[kernel][1].ndim - 1))
            norm = kernel.removesuffix("conv.kernel") + "norm"
            found += [(f"{norm}.{part}", 0) for part in ("scale", "bias")]
    return found


def followed_by(
    inner: optax.GradientTransformation, shrunk: Callable
) -> optax.GradientTransformation:
    """The updates of a transformation, and then those of a rule that knows their number."""

    def init(params):
        return inner.init(params), jnp.zeros([], jnp.int32)

    def update(updates, state, params=None):
        updates, changed = inner.update(updates, state[0], params)
        return shrunk(updates, params, state[1]), (changed, state[1] + 1)

    return optax.GradientTransformation(init, update)
