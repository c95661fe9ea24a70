"""Ways of choosing the channels of a trained network, at equal cost and an equal number of updates.

    python benchmarks/from_trained.py --data cifar10.npz --out DIR --stages train explore
    python benchmarks/from_trained.py --data cifar10.npz --out DIR --stages final \
        --weights DIR/resnet20.npz
    python benchmarks/from_trained.py --rehearse --out DIR --stages train explore final

A ResNet-20 is trained on CIFAR-10. Every row of the table then begins with its weights, is brought
down to a share of its FLOPs, and is trained for the same number of updates, those of a search
included. All of it is one compiled program of a few dozen steps: a channel that is gone has gate 0
behind its BatchNorm, and then the network computes what `dhp.prune` leaves (tests check it). Which
channels fit a budget is counted by the library.

A row is written to DIR/rows.jsonl the moment it is measured. DIR/resnet20.npz holds the weights.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
import functools
import json
from pathlib import Path
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dhp_jax as dhp
from dhp_jax.latent import walk
from dhp_jax.layers import Hyper, reinitialize
from dhp_jax.prox import soft_threshold
from dhp_jax.prune import survivors_within
from dhp_jax.reuse import carry_kernels

SHAPE = (32, 32, 3)
BORDER = 4  # pixels of padding, out of which crops are cut
MEAN, DEVIATION = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
TEMPERATURE = 4.0  # of the distillation
TARGETS = (0.5, 0.25)  # shares of the FLOPs

Arrays = dict[str, jax.Array]
Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Size:
    """How large everything is: of the measurement, or of a rehearsal on a CPU."""

    depth: int = 20
    batch: int = 256
    segment: int = 49  # updates that one call carries out; four are an epoch
    epochs: int = 50  # of the training
    rate: float = 0.2  # largest learning rate of the training
    updates: int = 980  # of every row


REHEARSAL = Size(depth=8, batch=16, segment=2, epochs=1, updates=24)


# ---------------------------------------------------------------------------------- the program


class Run(NamedTuple):
    """What an update changes."""

    weights: Arrays
    z: Arrays
    velocity: tuple[Arrays, Arrays]
    statistics: Arrays


class Plan(NamedTuple):
    """What is the same for all updates of a segment.

    Attributes:
      mask: 1 for the entries of latents that are there, 0 for those that are gone.
      amount: by how much each update moves an entry towards 0; towards 1 if negative.
      strength: of the l1 norm of each entry; times the learning rate, it is added to the amount.
      relative: whether each latent is rescaled to a mean of 1 after every update.
      rate: of the latents, as a multiple of the learning rate.
      distillation: share of the loss that compares with the teacher.
    """

    mask: Arrays
    amount: Arrays
    strength: Arrays
    relative: bool = False
    rate: float = 0.0
    distillation: float = 0.0


class Batches(NamedTuple):
    """Which images the updates of a segment take, how they are cut out, and the learning rates."""

    order: np.ndarray
    shift: np.ndarray
    flip: np.ndarray
    rate: np.ndarray


class Sums(NamedTuple):
    """Over the updates of a segment, for each entry; `g z` is the first-order Taylor term."""

    absolute: Arrays
    squares: Arrays
    loss: jax.Array


class Network:
    """An ordinary network of the library whose BatchNorms have gates, as pure functions.

    Args:
      depth: of the ResNet.
      dtype: of activations and kernels.
    """

    def __init__(self, depth: int, dtype: Any):
        self.latents = dhp.models.build("resnet", depth=depth, dtype=dtype, rngs=nnx.Rngs(0))
        self.names = {z: name for name, z in dhp.latents(self.latents).items()}
        self.prunable = [name for z, name in self.names.items() if z.prunable]
        self.sizes = {name: z.size for z, name in self.names.items()}
        self.cost = dhp.measure_cost(self.latents, SHAPE)
        self.gates = {
            f"{path}.{array}": self.names[layer.z]
            for path, _, layer in walk(self.latents)
            if isinstance(layer, dhp.BatchNorm)
            for array in ("scale", "bias")
        }
        plain = dhp.prune(self.latents)
        self.graphdef, state = nnx.split(plain)
        self.variables = {".".join(map(str, p)): (p, v) for p, v in nnx.to_flat_state(state)}

    def fresh(self, seed: int) -> tuple[Arrays, Arrays]:
        """Weights and statistics before any training."""
        plain = self.model({name: v[...] for name, (_, v) in self.variables.items()})
        reinitialize(plain, rngs=nnx.Rngs(seed))
        return self.split(plain)

    def split(self, plain: nnx.Module) -> tuple[Arrays, Arrays]:
        """Weights and statistics of an ordinary network."""
        weights, statistics = {}, {}
        for path, variable in nnx.to_flat_state(nnx.state(plain)):
            group = weights if isinstance(variable, nnx.Param) else statistics
            group[".".join(map(str, path))] = variable[...]
        return weights, statistics

    def model(self, arrays: Arrays) -> nnx.Module:
        """The ordinary network that has these arrays."""
        flat = [(path, v.replace(arrays[name])) for name, (path, v) in self.variables.items()]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat), copy=True)

    def gated(self, weights: Arrays, gates: Arrays) -> Arrays:
        """Weights with the scale and bias of each normalised channel times the channel's gate."""
        return {
            name: array * gates[self.gates[name]] if self.gates.get(name) in gates else array
            for name, array in weights.items()
        }

    def of_latents(self, weights: Arrays, statistics: Arrays) -> nnx.Module:
        """The network of latents that computes what the ordinary one does."""
        model = nnx.clone(self.latents)
        carry_kernels(self.model({**weights, **statistics}), model)
        return model

    def ones(self) -> Arrays:
        return {name: jnp.ones(self.sizes[name]) for name in self.prunable}

    def zeros(self) -> Arrays:
        return {name: jnp.zeros(self.sizes[name]) for name in self.prunable}


def programs(net: Network, train: tuple, test: tuple, batch: int) -> tuple[Callable, Callable]:
    """The two compiled programs: some updates, and the errors on the test images."""
    pixels = jnp.pad(jnp.asarray(train[0]), ((0, 0), (BORDER, BORDER), (BORDER, BORDER), (0, 0)))
    data = pixels, jnp.asarray(train[1], jnp.int32)
    count = len(test[1])
    whole = -(-count // batch) * batch
    tested = (
        np.resize(test[0], (whole, *SHAPE)).reshape(-1, batch, *SHAPE),
        np.resize(test[1], whole).astype(np.int32).reshape(-1, batch),
        (np.arange(whole) < count).reshape(-1, batch),
    )
    tested = jax.device_put(tested)

    def normalised(images):
        return (images.astype(jnp.float32) - jnp.array(MEAN)) / jnp.array(DEVIATION)

    def cut_out(pixels, index, shift, flip):
        crop = lambda i, s: jax.lax.dynamic_slice(pixels, (i, s[0], s[1], 0), (1, *SHAPE))[0]
        crops = jax.vmap(crop)(index, shift)
        return normalised(jnp.where(flip[:, None, None, None], crops[:, :, ::-1], crops))

    def logits_of(weights, gates, statistics, images, training):
        model = net.model({**net.gated(weights, gates), **statistics})
        model.train() if training else model.eval()
        return model(images).astype(jnp.float32), net.split(model)[1]

    def update(data, plan, teacher, distilled, run, batches):
        index, shift, flip, rate = batches
        images = cut_out(data[0], index, shift, flip)
        labels = data[1][index]
        target = None
        if distilled:
            soft, _ = logits_of(*teacher, images, training=False)
            target = jax.nn.softmax(soft / TEMPERATURE)

        def loss_of(weights, z):
            gates = jax.tree.map(jnp.multiply, z, plan.mask)
            logits, statistics = logits_of(weights, gates, run.statistics, images, training=True)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            if distilled:
                apart = optax.kl_divergence(jax.nn.log_softmax(logits / TEMPERATURE), target).mean()
                share = plan.distillation
                loss = (1 - share) * loss + share * TEMPERATURE**2 * apart
            return loss, statistics

        (loss, statistics), (grads, grads_z) = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(
            run.weights, run.z
        )
        terms = jax.tree.map(jnp.multiply, grads_z, run.z)
        grads = jax.tree.map(lambda g, w: g + WEIGHT_DECAY * w, grads, run.weights)
        after = jax.tree.map(
            lambda v, g: MOMENTUM * v + g, run.velocity, (grads, grads_z)
        )
        step, step_z = jax.tree.map(lambda v, g: g + MOMENTUM * v, after, (grads, grads_z))
        weights = jax.tree.map(lambda w, s: w - rate * s, run.weights, step)

        def moved(z, s, mask, amount, strength):
            z = z - rate * plan.rate * s
            amount = amount + rate * strength
            shrunk = soft_threshold(z, jnp.maximum(amount, 0))
            z = jnp.where(amount < 0, jnp.minimum(z - amount, 1), shrunk)
            mean = jnp.sum(jnp.abs(z) * mask) / jnp.maximum(jnp.sum(mask), 1)
            return jnp.where(plan.relative, z / jnp.maximum(mean, 1e-6), z)

        z = jax.tree.map(moved, run.z, step_z, plan.mask, plan.amount, plan.strength)
        sums = Sums(jax.tree.map(jnp.abs, terms), jax.tree.map(jnp.square, terms), loss)
        return Run(weights, z, after, statistics), sums

    @functools.partial(jax.jit, static_argnames="distilled", donate_argnums=1)
    def advance(data, run, plan, teacher, batches, distilled):
        def body(carry, batch):
            run, total = carry
            run, sums = update(data, plan, teacher, distilled, run, batch)
            return (run, jax.tree.map(jnp.add, total, sums)), None

        nothing = Sums(net.zeros(), net.zeros(), jnp.zeros(()))
        (run, total), _ = jax.lax.scan(body, (run, nothing), batches)
        return run, jax.tree.map(lambda x: x / len(batches.rate), total)

    @jax.jit
    def test_errors(tested, weights, gates, statistics):
        def body(_, batch):
            images, labels, counts = batch
            logits, _ = logits_of(weights, gates, statistics, normalised(images), training=False)
            wrong = (jnp.argmax(logits, -1) != labels) & counts
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels) * counts
            return None, (wrong, loss)

        return jax.lax.scan(body, None, tested)[1]

    def evaluate(run: Run, mask: Arrays) -> dict[str, float]:
        """Errors in percent; of the first and second half of the images as well."""
        gates = jax.tree.map(jnp.multiply, run.z, mask)
        wrong, loss = test_errors(tested, run.weights, gates, run.statistics)
        wrong = np.asarray(wrong).reshape(-1)[:count]
        half = count // 2
        return {
            "error": 100 * float(wrong.mean()),
            "error_first_half": 100 * float(wrong[:half].mean()),
            "error_second_half": 100 * float(wrong[half:].mean()),
            "test_loss": float(np.asarray(loss).sum() / count),
        }

    return functools.partial(advance, data), evaluate


# --------------------------------------------------------------------------------- the criteria


def of_mean_one(scores: Scores) -> Scores:
    """Scores of each latent divided by their mean, as `dhp.l1_scores` does."""
    return {name: values / max(values.mean(), 1e-12) for name, values in scores.items()}


def summed(
    net: Network, model: nnx.Module, scores_of: Callable[[np.ndarray], np.ndarray]
) -> Scores:
    """Sums, over the convolutions whose output a latent is, of what a function says of filters.

    Args:
      net: whose latents they are.
      model: the network of latents.
      scores_of: takes the filters of a convolution as rows, and returns a number for each.
    """
    total = {name: np.zeros(net.sizes[name]) for name in net.prunable}
    names = {z: name for name, z in dhp.latents(model).items()}
    for _, _, layer in walk(model):
        if isinstance(layer, Hyper) and names[layer.z_out] in total:
            kernel = np.asarray(layer.kernel(), np.float64)
            total[names[layer.z_out]] += scores_of(kernel.reshape(-1, kernel.shape[-1]).T)
    return total


def group_scores(net: Network, model: nnx.Module) -> Scores:
    """The Euclidean norm of all weights that an entry rules: filters, scales, and what reads it."""
    total = {name: np.zeros(net.sizes[name]) for name in net.prunable}
    names = {z: name for name, z in dhp.latents(model).items()}

    def add(axis, values):
        if names[axis] in total:
            total[names[axis]] += values

    for _, _, layer in walk(model):
        if isinstance(layer, Hyper):
            squares = np.asarray(layer.kernel(), np.float64) ** 2
            add(layer.z_in, squares.sum((0, 1, 3)))
            add(layer.z_out, squares.sum((0, 1, 2)))
        elif isinstance(layer, dhp.BatchNorm):
            add(layer.z, np.asarray(layer.scale[...], np.float64) ** 2)
        elif isinstance(layer, dhp.Linear):
            add(layer.z_in, (np.asarray(layer.kernel[...], np.float64) ** 2).sum(1))
    return of_mean_one({name: np.sqrt(values) for name, values in total.items()})


def scale_scores(net: Network, weights: Arrays) -> Scores:
    """The magnitudes of the BatchNorm scales of an entry, added up (slimming)."""
    total = {name: np.zeros(net.sizes[name]) for name in net.prunable}
    for array, name in net.gates.items():
        if array.endswith("scale") and name in total:
            total[name] += np.abs(np.asarray(weights[array], np.float64))
    return total


def distances(filters: np.ndarray) -> np.ndarray:
    """The sum of the distances of each filter from all others of its layer (FPGM)."""
    return np.sqrt(((filters[:, None] - filters[None]) ** 2).sum(-1)).sum(1)


def per_cost(net: Network, scores: Scores, power: float, counts: Mapping[str, int]) -> Scores:
    """Scores divided by a power of the share of the FLOPs that one entry costs.

    Args:
      net: the network.
      scores: of the entries.
      power: 0 for no division, 1 for importance per FLOP.
      counts: entries that each latent has at the moment.
    """
    if not power:
        return scores
    whole = {name: counts.get(name, size) for name, size in net.sizes.items()}
    flops = net.cost.amounts(whole)["flops"]
    saved = {
        name: flops - net.cost.amounts(whole | {name: whole[name] - 1})["flops"] for name in scores
    }
    return {name: values / (saved[name] / flops) ** power for name, values in scores.items()}


def choose(net: Network, scores: Scores, flops: float) -> dict[str, np.ndarray]:
    """The survivors within a share of the FLOPs, by the library's own count."""
    masks = survivors_within(net.latents, net.cost, scores=scores, flops=flops)
    return {name: masks[name] for name in net.prunable}


# ------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Way:
    """One row.

    Attributes:
      name: of the row.
      by: the criterion.
      power: of the FLOPs, by which the criterion is divided.
      fade: segments over which entries are brought to zero; 0 cuts at once.
      steps: in how many steps the budget is reached; 1 for at once.
      again: whether entries are chosen anew in every segment of a fade in one step.
      gate_rate: of the latents, as a multiple of the learning rate.
      strength: of the l1 norm on relative latents, in a search that ends when the budget holds.
      distillation: share of the loss that compares with the unpruned network.
      rate: largest learning rate.
      decay: share of a segment's Taylor terms that the average keeps from before.
    """

    name: str
    by: str = "l1"
    power: float = 0.0
    fade: int = 0
    steps: int = 1
    again: bool = False
    gate_rate: float = 0.0
    strength: float = 0.0
    distillation: float = 0.0
    rate: float = 0.05
    decay: float = 0.5


class Bench:
    """Data, programs, and the files that are written."""

    def __init__(self, options: argparse.Namespace, size: Size):
        self.size, self.out = size, options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60 * options.minutes
        self.train, self.test = read(options.data, options.rehearse)
        self.net = Network(size.depth, None if options.rehearse else jnp.bfloat16)
        self.advance, self.evaluate = programs(self.net, self.train, self.test, size.batch)
        self.teacher = None
        self.taylor = None

    def left(self) -> float:
        """Seconds until no further row is begun."""
        return self.end - time.monotonic()

    def write(self, **row: Any) -> None:
        with (self.out / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def begin(self, weights: Arrays, statistics: Arrays) -> Run:
        """A run's state before its first update; copies, for updates write over them."""
        run = Run(weights, self.net.ones(), (weights, self.net.ones()), statistics)
        run = jax.tree.map(lambda x: jnp.array(x, copy=True), run)
        return run._replace(velocity=jax.tree.map(jnp.zeros_like, run.velocity))

    def batches(self, seed: int, rates: Sequence[float]) -> Iterator[Batches]:
        """The batches of a run, a segment at a time: one permutation of the images after another."""
        rng = np.random.default_rng(seed)
        each, count = self.size.batch * self.size.segment, len(self.train[1])
        rates = np.asarray(rates, np.float32).reshape(-1, self.size.segment)
        order = np.zeros(0, np.int32)
        for rate in rates:
            while len(order) < each:
                order = np.concatenate([order, rng.permutation(count).astype(np.int32)])
            shape = self.size.segment, self.size.batch
            shift = rng.integers(0, 2 * BORDER + 1, (*shape, 2), np.int32)
            flip = rng.integers(0, 2, shape, np.int32).astype(bool)
            yield Batches(order[:each].reshape(shape), shift, flip, rate)
            order = order[each:]

    def plan(self, mask: Mapping[str, np.ndarray], **fields: Any) -> Plan:
        as_arrays = lambda tree: {k: jnp.asarray(v, jnp.float32) for k, v in tree.items()}
        zeros = {name: np.zeros(self.net.sizes[name]) for name in mask}
        given = {"amount": zeros, "strength": zeros} | fields
        arrays = {name: as_arrays(given.pop(name)) for name in ("amount", "strength")}
        numbers = {"relative": False, "rate": 0.0, "distillation": 0.0} | given
        return Plan(
            as_arrays(mask),
            **arrays,
            relative=jnp.asarray(numbers["relative"]),
            rate=jnp.float32(numbers["rate"]),
            distillation=jnp.float32(numbers["distillation"]),
        )

    def step(self, run: Run, plan: Plan, batches: Batches, distilled: bool = False):
        teacher = self.teacher if distilled else None
        return self.advance(run, plan, teacher, batches, distilled=distilled)


def cosine(peak: float, updates: int, warm_up: int) -> np.ndarray:
    """A learning rate for each update: up in a straight line, then down along a half cosine."""
    at = np.arange(updates)
    down = 0.5 * (1 + np.cos(np.pi * (at - warm_up) / max(1, updates - warm_up)))
    return peak * np.where(at < warm_up, (at + 1) / warm_up, down)


def whole(net: Network) -> dict[str, np.ndarray]:
    return {name: np.ones(net.sizes[name]) for name in net.prunable}


def train(bench: Bench, weights: Arrays, statistics: Arrays, mask, seed: int, epochs: int) -> Run:
    """Training from fresh weights."""
    size = bench.size
    segments = max(2, round(epochs * len(bench.train[1]) / size.batch / size.segment))
    updates = segments * size.segment
    run, plan = bench.begin(weights, statistics), bench.plan(mask)
    rates = cosine(size.rate, updates, min(2 * size.segment, updates // 2))
    for batches in bench.batches(1000 + seed, rates):
        run, sums = bench.step(run, plan, batches)
    jax.block_until_ready(run)
    if not np.isfinite(float(sums.loss)):
        raise RuntimeError("the training has diverged")
    return run


def measure_taylor(bench: Bench, run: Run) -> dict[str, Scores]:
    """First-order Taylor terms of the trained network over a segment, without an update."""
    rates = np.zeros(bench.size.segment)
    (batches,) = bench.batches(777, rates)
    _, sums = bench.step(run, bench.plan(whole(bench.net)), batches)
    as_numpy = lambda tree: {k: np.asarray(v, np.float64) for k, v in tree.items()}
    return {"taylor": as_numpy(sums.absolute), "taylor_square": as_numpy(sums.squares)}


def scores_of(bench: Bench, way: Way, run: Run, seed: int) -> Scores:
    """The criterion of a row on the trained network."""
    net = bench.net
    if way.by in ("taylor", "taylor_square"):
        return bench.taylor[way.by]
    if way.by == "random":
        return dhp.random_scores(net.latents, seed)
    if way.by == "scale":
        return scale_scores(net, run.weights)
    model = net.of_latents(run.weights, run.statistics)
    if way.by == "group":
        return group_scores(net, model)
    if way.by == "fpgm":
        return of_mean_one(summed(net, model, distances))
    if way.by == "l2":
        norms = summed(net, model, lambda filters: np.sqrt((filters**2).sum(1)))
        return of_mean_one(norms)
    return dhp.l1_scores(model)


def uniform(net: Network, scores: Scores, flops: float) -> dict[str, np.ndarray]:
    """The same share of every latent, of each the entries with the largest scores."""
    masks = dhp.uniform_within(net.latents, net.cost, flops=flops)
    kept = {}
    for name in net.prunable:
        best = np.argsort(-scores[name], kind="stable")[: masks[name].sum()]
        kept[name] = np.isin(np.arange(net.sizes[name]), best)
    return kept


def pruned_row(bench: Bench, way: Way, flops: float, seed: int) -> None:
    """Prunes the trained network in one way, trains what is left, and writes the row."""
    began, net, size = time.monotonic(), bench.net, bench.size
    run = bench.begin(*bench.teacher_arrays)
    rates = cosine(way.rate, size.updates, size.segment)
    stream = bench.batches(seed, rates)
    distilled = way.distillation > 0
    options = {"rate": way.gate_rate, "distillation": way.distillation}
    history = []
    if way.fade:
        run, mask = faded(bench, way, flops, run, stream, options, history)
    elif way.by == "uniform":
        mask = uniform(net, scores_of(bench, replace(way, by="l1"), run, seed), flops)
    else:
        scores = scores_of(bench, way, run, seed)
        mask = choose(net, per_cost(net, scores, way.power, {}), flops)
    plan = bench.plan(mask, **options)
    for batches in stream:
        run, sums = bench.step(run, plan, batches, distilled)
    finished(bench, way.name, asdict(way), flops, seed, run, mask, began, sums, history)


def finished(bench, name, way, flops, seed, run, mask, began, sums=None, history=()) -> None:
    """Measures a network and writes its row."""
    counts = {**bench.net.sizes, **{k: int(np.sum(v)) for k, v in mask.items()}}
    bench.write(
        name=name,
        target=flops,
        seed=seed,
        **bench.evaluate(run, bench.plan(mask).mask),
        train_loss=None if sums is None else float(sums.loss),
        **bench.net.cost.shares(counts),
        widths={name: counts[name] for name in bench.net.prunable},
        updates=bench.size.updates,
        seconds=round(time.monotonic() - began, 3),
        history=list(history),
        way=way,
    )


def faded(bench, way, flops, run, stream, options, history):
    """Brings the entries that a budget has no room for to zero, little by little.

    The first segment only measures (and trains). Then, in every segment, the entries that are to go
    move towards zero by the same amount in every update: a proximal step of the l1 norm, of the
    strength that brings them there in time.
    """
    net, size = bench.net, bench.size
    distilled = way.distillation > 0
    mask = whole(net)
    average = None

    def observe(sums):
        nonlocal average
        terms = sums.absolute if way.by == "taylor" else sums.squares
        terms = {name: np.asarray(values, np.float64) for name, values in terms.items()}
        if average is None:
            average = terms
        else:
            average = {
                name: way.decay * average[name] + (1 - way.decay) * terms[name] for name in terms
            }

    def ranked(z):
        counts = {name: int(values.sum()) for name, values in mask.items()}
        if way.by in ("taylor", "taylor_square"):
            scores = average
        else:
            scores = scores_of(bench, way, run, 0)
        scores = per_cost(net, scores, way.power, counts)
        return {name: np.maximum(scores[name], 1e-30) * mask[name] for name in mask}

    if way.by == "latent":
        strength = {name: way.strength * mask[name] for name in mask}
        if way.power:  # in proportion to what an entry costs; 1 on average
            cost = per_cost(net, whole(net), -way.power, {})
            mean = np.mean(np.concatenate(list(cost.values())))
            strength = {name: strength[name] * cost[name] / mean for name in mask}
        plan = bench.plan(mask, strength=strength, relative=True, **options)
        for _ in range(way.fade):
            run, sums = bench.step(run, plan, next(stream), distilled)
        history += [np.asarray(values).round(4).tolist() for values in run.z.values()]
        scores = {name: np.abs(np.asarray(run.z[name], np.float64)) for name in mask}
        return run, choose(net, scores, flops)
    run, sums = bench.step(run, bench.plan(mask, **options), next(stream), distilled)
    observe(sums)
    if way.steps == 1:
        keep = None
        for left in range(way.fade, 0, -1):
            if keep is None or way.again:
                keep = choose(net, unfaded(ranked(run.z), run.z, way), flops)
            amount = {
                name: np.where(
                    keep[name],
                    -1.0 / (way.fade * size.segment),
                    np.asarray(run.z[name]) / (left * size.segment),
                )
                for name in mask
            }
            plan = bench.plan(mask, amount=amount, **options)
            run, sums = bench.step(run, plan, next(stream), distilled)
            observe(sums)
        mask = {name: keep[name].astype(float) for name in mask}
    else:
        each = way.fade // way.steps
        for number in range(1, way.steps + 1):
            share = 1 - (1 - flops) * (1 - (1 - number / way.steps) ** 2)
            share = flops if number == way.steps else max(share, flops)
            keep = choose(net, ranked(run.z), share)
            amount = {
                name: np.where(keep[name], 0, np.asarray(run.z[name]) / (each * size.segment))
                for name in mask
            }
            plan = bench.plan(mask, amount=amount, **options)
            for _ in range(each):
                run, sums = bench.step(run, plan, next(stream), distilled)
            observe(sums)
            mask = {name: mask[name] * keep[name] for name in mask}
            history.append({"share": share, "train_loss": float(sums.loss)})
    return run, mask


def unfaded(scores: Scores, z: Arrays, way: Way) -> Scores:
    """Taylor terms as they would be with gates at 1: `(g z)^2 / z^2`; for entries that still count."""
    if not way.again:
        return scores
    power = 1 if way.by == "taylor" else 2 if way.by == "taylor_square" else 0
    return {
        name: values / np.maximum(np.asarray(z[name], np.float64), 0.1) ** power
        for name, values in scores.items()
    }


# ----------------------------------------------------------------------------------- the stages


def train_stage(bench: Bench, options: argparse.Namespace) -> None:
    """Trains the network and keeps it, its kernels in half precision."""
    began = time.monotonic()
    run = train(bench, *bench.net.fresh(options.seed), whole(bench.net), options.seed, bench.size.epochs)
    arrays = {name: np.asarray(x) for name, x in {**run.weights, **run.statistics}.items()}
    arrays = {
        name: x.astype(np.float16) if name.endswith("kernel") else x.astype(np.float32)
        for name, x in arrays.items()
    }
    np.savez_compressed(bench.out / "resnet20.npz", **arrays)
    bench.write(
        name="unpruned",
        epochs=bench.size.epochs,
        seed=options.seed,
        seconds=round(time.monotonic() - began, 3),
        **bench.evaluate(run, bench.plan(whole(bench.net)).mask),
    )


def load(bench: Bench, path: Path) -> None:
    """Takes the trained network as what all rows begin with, and as the teacher."""
    with np.load(path) as stored:
        arrays = {name: jnp.asarray(stored[name], jnp.float32) for name in stored.files}
    weights, statistics = bench.net.split(bench.net.model(arrays))
    bench.teacher_arrays = weights, statistics
    bench.teacher = (dict(weights), bench.net.ones(), dict(statistics))
    bench.taylor = measure_taylor(bench, bench.begin(weights, statistics))


ONE_SHOT = ("l1", "group", "taylor", "taylor_square", "scale", "fpgm", "l2", "random", "uniform")
FADED = Way("", by="taylor_square", fade=6)


def explore_stage(bench: Bench, options: argparse.Namespace) -> None:
    """Short runs of many ways, the most telling ones first, as many as there is time for."""
    load(bench, options.weights or bench.out / "resnet20.npz")
    for seed, flops, way in exploration():
        if bench.left() < 0:
            return
        pruned_row(bench, way, flops, seed)


def exploration() -> Iterator[tuple[int, float, Way]]:
    """What is tried in which order: seed, target and row."""
    one = {by: Way(by, by=by) for by in ONE_SHOT}
    low, half = 0.25, 0.5
    squared = {
        power: Way(f"square per flop^{power}", by="taylor_square", power=power) for power in (0.5, 1.0)
    }
    steps = {
        power: replace(FADED, name=f"six steps, per flop^{power}", steps=6, power=power)
        for power in (0.0, 0.5, 1.0)
    }
    absolute = replace(FADED, name="six steps, absolute", by="taylor", steps=6, power=0.5)
    again = replace(FADED, name="fade, chosen again, per flop^0.5", again=True, power=0.5)
    once = replace(FADED, name="fade, chosen once, per flop^0.5", power=0.5)
    l1_fade = replace(FADED, name="fade, l1", by="l1")
    latent = Way("relative latents", by="latent", fade=6, gate_rate=1.0, strength=0.5)
    distilled = {
        share: replace(steps[0.5], name=f"six steps, distilled {share}", distillation=share)
        for share in (0.5, 0.9)
    }
    l1_distilled = replace(one["l1"], name="l1, distilled 0.9", distillation=0.9)
    first = [one["l1"], one["taylor_square"], steps[0.5], steps[1.0], steps[0.0], one["random"]]
    first += [replace(one["l1"], name=f"l1, rate {rate}", rate=rate) for rate in (0.02, 0.1)]
    first += [squared[0.5], squared[1.0], one["taylor"], one["uniform"], again, distilled[0.9]]
    for way in first:
        yield 10, low, way
    for way in [one["l1"], steps[0.5], steps[1.0], one["taylor_square"], distilled[0.9], again]:
        yield 10, half, way
    for way in [one["group"], l1_distilled, distilled[0.5], absolute, once, l1_fade, latent]:
        yield 10, low, way
    longer = replace(steps[0.5], name="ten steps, per flop^0.5", fade=10, steps=10)
    shorter = replace(steps[0.5], name="three steps, per flop^0.5", fade=3, steps=3)
    moving = replace(steps[0.5], name="six steps, gates trained", gate_rate=1.0)
    for way in [longer, shorter, moving, one["scale"], one["fpgm"]]:
        yield 10, low, way
    for seed in (11, 12):
        for flops in (low, half):
            for way in [one["l1"], steps[0.5], steps[1.0], one["taylor_square"], one["group"]]:
                yield seed, flops, way
    for way in [one["random"], one["uniform"], one["scale"], one["fpgm"], squared[1.0], latent]:
        yield 10, half, way


def final_stage(bench: Bench, options: argparse.Namespace) -> None:
    """The table: every row for every seed, both targets."""
    load(bench, options.weights or bench.out / "resnet20.npz")
    ways = [Way(by, by=by) for by in ONE_SHOT]
    for seed in options.seeds:
        for flops in TARGETS:
            for way in ways:
                if bench.left() < 0:
                    return
                pruned_row(bench, way, flops, seed)


STAGES = {"train": train_stage, "explore": explore_stage, "final": final_stage}


def read(path: Path | None, rehearse: bool) -> tuple[tuple, tuple]:
    """Images (uint8) and labels, of training and test; a few random ones in a rehearsal."""
    if rehearse:
        rng = np.random.default_rng(0)
        draw = lambda n: (rng.integers(0, 256, (n, *SHAPE), np.uint8), rng.integers(0, 10, n))
        return draw(200), draw(40)
    with np.load(path) as stored:
        return tuple(
            (stored[f"{part}_images"], stored[f"{part}_labels"]) for part in ("train", "test")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="CIFAR-10: train_images, ..., test_labels")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--weights", type=Path, help="trained before, by the stage train")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no row begins")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the rows")
    parser.add_argument("--epochs", type=int, help="of the training")
    parser.add_argument("--updates", type=int, help="of every row")
    parser.add_argument("--rehearse", action="store_true", help="a smoke run of a minute on a CPU")
    options = parser.parse_args()
    size = REHEARSAL if options.rehearse else Size()
    given = {name: getattr(options, name) for name in ("epochs", "updates")}
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    if size.updates % size.segment:
        parser.error(f"--updates: expected a multiple of {size.segment}, got {size.updates}")
    bench = Bench(options, size)
    bench.write(name="begin", device=str(jax.devices()[0].device_kind), jax=jax.__version__)
    for stage in options.stages:
        began = time.monotonic()
        STAGES[stage](bench, options)
        bench.write(name=f"stage {stage}", seconds=round(time.monotonic() - began, 2))


if __name__ == "__main__":
    main()
