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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
import functools
import io
import json
from pathlib import Path
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

import dhp_jax as dhp
from dhp_jax.budgets.counted import survivors_within
from dhp_jax.core.latent import walk
from dhp_jax.core.layers import Hyper
from dhp_jax.core.prox import soft_threshold
from dhp_jax.pruned.fresh_weights import reinitialize

SHAPE = (32, 32, 3)
BORDER = 4  # pixels of padding, out of which crops are cut
MEAN, DEVIATION = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
TEMPERATURE = 4.0  # of the distillation
PARTS = "train", "test"
BINARY = "data_batch_*.bin", "test_batch.bin"  # files of CIFAR-10's binary version
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


REHEARSAL = Size(depth=8, batch=8, segment=1, epochs=1, updates=12)


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
        named = dhp.latents(self.latents)
        self.names = {z: name for name, z in named.items()}
        self.prunable = [name for name, z in named.items() if z.prunable]
        self.sizes = {name: z.size for name, z in named.items()}
        self.cost = dhp.measure_cost(self.latents, SHAPE)
        self.layers = {path: layer for path, _, layer in walk(self.latents)}
        self.gates = {
            f"{path}.{array}": self.names[layer.z]
            for path, layer in self.layers.items()
            if isinstance(layer, dhp.BatchNorm)
            for array in ("scale", "bias")
        }
        self.graphdef, state = nnx.split(dhp.prune(self.latents))
        self.variables = {".".join(map(str, p)): (p, v) for p, v in nnx.to_flat_state(state)}

    def fresh(self, seed: int) -> dict[str, np.ndarray]:
        """Weights and statistics before any training, on the host."""
        plain = self.model({name: v[...] for name, (_, v) in self.variables.items()})
        reinitialize(plain, rngs=nnx.Rngs(seed))
        return {name: np.asarray(x) for group in self.split(plain) for name, x in group.items()}

    def is_weight(self, name: str) -> bool:
        return isinstance(self.variables[name][1], nnx.Param)

    def split(self, plain: nnx.Module) -> tuple[Arrays, Arrays]:
        """Weights and statistics of an ordinary network."""
        weights, statistics = {}, {}
        for path, variable in nnx.to_flat_state(nnx.state(plain)):
            name = ".".join(map(str, path))
            (weights if self.is_weight(name) else statistics)[name] = variable[...]
        return weights, statistics

    def model(self, arrays: Arrays) -> nnx.Module:
        """The ordinary network that has these arrays."""
        flat = [
            (path, v.replace(jnp.asarray(arrays[name])))
            for name, (path, v) in self.variables.items()
        ]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat), copy=True)

    def gated(self, weights: Arrays, gates: Arrays) -> Arrays:
        """Weights with the scale and bias of each normalised channel times the channel's gate."""
        return {
            name: array * gates[self.gates[name]] if self.gates.get(name) in gates else array
            for name, array in weights.items()
        }

    def full(self, value: float) -> dict[str, np.ndarray]:
        """A number for each entry of each prunable latent."""
        return {name: np.full(self.sizes[name], value, np.float32) for name in self.prunable}


def programs(net: Network, train: tuple, test: tuple, batch: int) -> tuple[Callable, Callable]:
    """The two compiled programs: some updates, and the errors on the test images."""
    border = (BORDER, BORDER)
    pixels = np.pad(train[0], ((0, 0), border, border, (0, 0)))
    data = jax.device_put((pixels, np.asarray(train[1], np.int32)))
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
        def crop(i, at):
            return jax.lax.dynamic_slice(pixels, (i, at[0], at[1], 0), (1, *SHAPE))[0]

        crops = jax.vmap(crop)(index, shift)
        return normalised(jnp.where(flip[:, None, None, None], crops[:, :, ::-1], crops))

    def logits_of(weights, gates, statistics, images, training):
        model = net.model({**net.gated(weights, gates), **statistics})
        model.train() if training else model.eval()
        return model(images).astype(jnp.float32), net.split(model)[1]

    def update(data, plan, teacher, run, batches):
        index, shift, flip, rate = batches
        images = cut_out(data[0], index, shift, flip)
        labels = data[1][index]

        def softened(images):
            logits, _ = logits_of(*teacher, images, training=False)
            return jax.nn.softmax(logits / TEMPERATURE)

        def nothing(images):
            return jnp.full((len(images), 10), 0.1)

        share = plan.distillation
        target = jax.lax.cond(share > 0, softened, nothing, images)

        def loss_of(weights, z):
            gates = jax.tree.map(jnp.multiply, z, plan.mask)
            logits, statistics = logits_of(weights, gates, run.statistics, images, training=True)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            apart = optax.kl_divergence(jax.nn.log_softmax(logits / TEMPERATURE), target).mean()
            loss = (1 - share) * loss + share * TEMPERATURE**2 * apart
            return loss, statistics

        (loss, statistics), (grads, grads_z) = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(
            run.weights, run.z
        )
        terms = jax.tree.map(jnp.multiply, grads_z, run.z)
        grads = jax.tree.map(lambda g, w: g + WEIGHT_DECAY * w, grads, run.weights)
        after = jax.tree.map(lambda v, g: MOMENTUM * v + g, run.velocity, (grads, grads_z))
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

    @functools.partial(jax.jit, donate_argnums=1)
    def advance(data, run, plan, teacher, batches):
        def body(carry, batch):
            run, total = carry
            run, sums = update(data, plan, teacher, run, batch)
            return (run, jax.tree.map(jnp.add, total, sums)), None

        zeros = jax.tree.map(jnp.asarray, net.full(0))
        nothing = Sums(zeros, zeros, jnp.zeros(()))
        (run, total), _ = jax.lax.scan(body, (run, nothing), batches)
        return run, jax.tree.map(lambda x: x / len(batches.rate), total)

    @jax.jit
    def test_errors(tested, run, mask):
        gates = jax.tree.map(jnp.multiply, run.z, mask)

        def body(_, batch):
            images, labels, counts = batch
            logits, _ = logits_of(
                run.weights, gates, run.statistics, normalised(images), training=False
            )
            wrong = (jnp.argmax(logits, -1) != labels) & counts
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels) * counts
            return None, (wrong, loss)

        return jax.lax.scan(body, None, tested)[1]

    def evaluate(run: Run, mask: Arrays) -> dict[str, float]:
        """Errors in percent; of the first and second half of the images as well."""
        wrong, loss = test_errors(tested, run, mask)
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


def summed(net: Network, weights: Arrays, number_of: Callable[[np.ndarray], np.ndarray]) -> Scores:
    """Sums, over the convolutions whose output a latent is, of what a function says of filters.

    Args:
      net: whose latents they are.
      weights: of the trained network.
      number_of: takes the filters of a convolution as rows, and returns a number for each.
    """
    total = {name: np.zeros(net.sizes[name]) for name in net.prunable}
    for path, layer in net.layers.items():
        if isinstance(layer, Hyper) and net.names[layer.z_out] in total:
            kernel = np.asarray(weights[f"{path}.kernel"], np.float64)
            total[net.names[layer.z_out]] += number_of(kernel.reshape(-1, kernel.shape[-1]).T)
    return total


def group_scores(net: Network, weights: Arrays) -> Scores:
    """The Euclidean norm of all weights that an entry rules: filters, scales, and what reads it."""
    total = {name: np.zeros(net.sizes[name]) for name in net.prunable}

    def add(axis, values):
        if net.names[axis] in total:
            total[net.names[axis]] += values

    for path, layer in net.layers.items():
        if isinstance(layer, Hyper):
            squares = np.asarray(weights[f"{path}.kernel"], np.float64) ** 2
            add(layer.z_in, squares.sum((0, 1, 3)))
            add(layer.z_out, squares.sum((0, 1, 2)))
        elif isinstance(layer, dhp.BatchNorm):
            add(layer.z, np.asarray(weights[f"{path}.scale"], np.float64) ** 2)
        elif isinstance(layer, dhp.Linear):
            add(layer.z_in, (np.asarray(weights[f"{path}.kernel"], np.float64) ** 2).sum(1))
    return of_mean_one({name: np.sqrt(values) for name, values in total.items()})


def scale_scores(net: Network, weights: Arrays) -> Scores:
    """The magnitudes of the BatchNorm scales of an entry, added up (slimming)."""
    total = {name: np.zeros(net.sizes[name]) for name in net.prunable}
    for array, name in net.gates.items():
        if array.endswith("scale") and name in total:
            total[name] += np.abs(np.asarray(weights[array], np.float64))
    return total


def magnitude_scores(net: Network, weights: Arrays) -> dict[str, Scores]:
    """The criteria that look at the weights alone."""

    def l1(filters):
        return np.abs(filters).sum(1)

    def l2(filters):
        return np.sqrt((filters**2).sum(1))

    return {
        "l1": of_mean_one(summed(net, weights, l1)),
        "l2": of_mean_one(summed(net, weights, l2)),
        "fpgm": of_mean_one(summed(net, weights, distances)),
        "group": group_scores(net, weights),
        "scale": scale_scores(net, weights),
    }


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
      relative: whether the scores of each latent are divided by their mean.
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
    relative: bool = False
    decay: float = 0.5


class Bench:
    """Data, programs, and the files that are written."""

    def __init__(self, options: argparse.Namespace, size: Size):
        self.size, self.out = size, options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60 * options.minutes
        self.train, self.test = read(options.data, options.rehearse)
        self.net = Network(size.depth, jnp.bfloat16)
        self.advance, self.evaluate = programs(self.net, self.train, self.test, size.batch)
        self.trained: dict[str, np.ndarray] = {}
        untrained = self.begin(self.net.fresh(0))
        self.teacher = untrained.weights, untrained.z, untrained.statistics
        self.scores: dict[str, Scores] = {}

    def left(self) -> float:
        """Seconds until no further row is begun."""
        return self.end - time.monotonic()

    def write(self, **row: Any) -> None:
        with (self.out / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def begin(self, arrays: Mapping[str, np.ndarray]) -> Run:
        """A run's state before its first update.

        Args:
          arrays: weights and statistics, on the host.
        """
        weights = {name: x for name, x in arrays.items() if self.net.is_weight(name)}
        statistics = {name: x for name, x in arrays.items() if name not in weights}
        z = self.net.full(1)
        velocity = jax.tree.map(np.zeros_like, (weights, z))
        return jax.tree.map(jnp.array, Run(weights, z, velocity, statistics))

    def batches(self, seed: int, rates: Sequence[float]) -> Iterator[Batches]:
        """The batches of a run, a segment at a time; every image comes before one comes again."""
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

        def as_arrays(tree):
            return {name: jnp.asarray(values, jnp.float32) for name, values in tree.items()}

        given = {"amount": self.net.full(0), "strength": self.net.full(0)} | fields
        arrays = {name: as_arrays(given.pop(name)) for name in ("amount", "strength")}
        numbers = {"relative": False, "rate": 0.0, "distillation": 0.0} | given
        return Plan(
            as_arrays(mask),
            **arrays,
            relative=jnp.asarray(numbers["relative"]),
            rate=jnp.float32(numbers["rate"]),
            distillation=jnp.float32(numbers["distillation"]),
        )

    def step(self, run: Run, plan: Plan, batches: Batches) -> tuple[Run, Sums]:
        return self.advance(run, plan, self.teacher, batches)


def cosine(peak: float, updates: int, warm_up: int) -> np.ndarray:
    """A learning rate for each update: up in a straight line, then down along a half cosine."""
    at = np.arange(updates)
    down = 0.5 * (1 + np.cos(np.pi * (at - warm_up) / max(1, updates - warm_up)))
    return peak * np.where(at < warm_up, (at + 1) / warm_up, down)


def train(bench: Bench, mask: Mapping[str, np.ndarray], seed: int, epochs: int) -> Run:
    """Training from fresh weights, of the whole network or of one with less channels."""
    size = bench.size
    segments = max(2, round(epochs * len(bench.train[1]) / size.batch / size.segment))
    updates = segments * size.segment
    run, plan = bench.begin(bench.net.fresh(seed)), bench.plan(mask)
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
    _, sums = bench.step(run, bench.plan(bench.net.full(1)), batches)
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    return {"taylor": sums.absolute, "taylor_square": sums.squares}


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
    began, size = time.monotonic(), bench.size
    run = bench.begin(bench.trained)
    rates = cosine(way.rate, size.updates, size.segment)
    stream = bench.batches(seed, rates)
    options = {"rate": way.gate_rate, "distillation": way.distillation}
    history = []
    if way.fade:
        run, mask = faded(bench, way, flops, run, stream, options, history)
    else:
        mask = cut(bench, way, flops, seed)
    plan = bench.plan(mask, **options)
    for batches in stream:
        run, sums = bench.step(run, plan, batches)
    finished(bench, way.name, asdict(way), flops, seed, run, mask, began, sums, history)


def cut(bench: Bench, way: Way, flops: float, seed: int) -> dict[str, np.ndarray]:
    """The survivors of a way that cuts at once."""
    net = bench.net
    if way.by == "random":
        return choose(net, dhp.random_scores(net.latents, seed), flops)
    if way.by.startswith("uniform"):
        return uniform(net, bench.scores[way.by.removeprefix("uniform_")], flops)
    scores = bench.scores[way.by]
    if way.relative:
        scores = of_mean_one({name: np.sqrt(values) for name, values in scores.items()})
    return choose(net, per_cost(net, scores, way.power, {}), flops)


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
    mask = net.full(1)
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

    def ranked():
        counts = {name: int(values.sum()) for name, values in mask.items()}
        scores = average if way.by.startswith("taylor") else bench.scores[way.by]
        scores = per_cost(net, scores, way.power, counts)
        return {name: np.maximum(scores[name], 1e-30) * mask[name] for name in mask}

    if way.by == "latent":
        strength = {name: way.strength * mask[name] for name in mask}
        if way.power:  # in proportion to what an entry costs; 1 on average
            cost = per_cost(net, net.full(1), -way.power, {})
            mean = np.mean(np.concatenate(list(cost.values())))
            strength = {name: strength[name] * cost[name] / mean for name in mask}
        plan = bench.plan(mask, strength=strength, relative=True, **options)
        for _ in range(way.fade):
            run, sums = bench.step(run, plan, next(stream))
        history += [np.asarray(values).round(4).tolist() for values in run.z.values()]
        scores = {name: np.abs(np.asarray(run.z[name], np.float64)) for name in mask}
        return run, choose(net, scores, flops)
    run, sums = bench.step(run, bench.plan(mask, **options), next(stream))
    observe(sums)
    if way.steps == 1:
        keep = None
        for left in range(way.fade, 0, -1):
            if keep is None or way.again:
                keep = choose(net, unfaded(ranked(), run.z, way), flops)
            amount = {
                name: np.where(
                    keep[name],
                    -1.0 / (way.fade * size.segment),
                    np.asarray(run.z[name]) / (left * size.segment),
                )
                for name in mask
            }
            plan = bench.plan(mask, amount=amount, **options)
            run, sums = bench.step(run, plan, next(stream))
            observe(sums)
        mask = {name: keep[name].astype(float) for name in mask}
    else:
        each = way.fade // way.steps
        for number in range(1, way.steps + 1):
            share = 1 - (1 - flops) * (1 - (1 - number / way.steps) ** 2)
            share = flops if number == way.steps else max(share, flops)
            keep = choose(net, ranked(), share)
            amount = {
                name: np.where(keep[name], 0, np.asarray(run.z[name]) / (each * size.segment))
                for name in mask
            }
            plan = bench.plan(mask, amount=amount, **options)
            for _ in range(each):
                run, sums = bench.step(run, plan, next(stream))
            observe(sums)
            mask = {name: mask[name] * keep[name] for name in mask}
            history.append({"share": share, "train_loss": float(sums.loss)})
    return run, mask


def unfaded(scores: Scores, z: Arrays, way: Way) -> Scores:
    """Taylor terms as they would be with gates at 1: `(g z)^2 / z^2`."""
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
    run = train(bench, bench.net.full(1), options.seed, bench.size.epochs)
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
        **bench.evaluate(run, bench.plan(bench.net.full(1)).mask),
    )


def load(bench: Bench, path: Path) -> None:
    """Takes the trained network as what all rows begin with, and as the teacher."""
    with np.load(path) as stored:
        bench.trained = {name: stored[name].astype(np.float32) for name in stored.files}
    run = bench.begin(bench.trained)
    bench.teacher = run.weights, run.z, run.statistics
    bench.scores = magnitude_scores(bench.net, bench.trained)
    bench.scores |= measure_taylor(bench, bench.begin(bench.trained))


CRITERIA = ("l1", "group", "taylor", "taylor_square", "scale", "fpgm", "l2", "random", "uniform_l1")
FADED = Way("", by="taylor_square", fade=6)


def explore_stage(bench: Bench, options: argparse.Namespace) -> None:
    """Short runs of many ways, the most telling ones first, as many as there is time for."""
    load(bench, options.weights or bench.out / "resnet20.npz")
    tried = list(exploration())
    for seed, flops, way in tried[2::7] if options.rehearse else tried:
        if bench.left() < 0:
            return
        pruned_row(bench, way, flops, seed)


def exploration() -> Iterator[tuple[int, float, Way]]:
    """What is tried in which order: seed, target and row."""
    one = {by: Way(by, by=by) for by in (*CRITERIA, "uniform_taylor_square")}
    for power in (0.5, 1.0):
        name = f"taylor_square per flop^{power}"
        one[name] = Way(name, by="taylor_square", power=power)
    one["root"] = Way("root of taylor_square, mean 1", by="taylor_square", relative=True)
    steps = {
        power: replace(FADED, name=f"six steps, per flop^{power}", steps=6, power=power)
        for power in (0.0, 0.5, 1.0)
    }
    half = steps[0.5]
    more = [
        replace(half, name="six steps, absolute, per flop^0.5", by="taylor"),
        replace(half, name="one step", steps=1),
        replace(half, name="one step, chosen again", steps=1, again=True),
        replace(half, name="one step, l1", by="l1", steps=1, power=0.0),
        replace(half, name="ten steps", fade=10, steps=10),
        replace(half, name="three steps", fade=3, steps=3),
        replace(half, name="six steps, gates trained", gate_rate=1.0),
        Way("relative latents", by="latent", fade=6, gate_rate=1.0, strength=0.5),
    ]
    distilled = replace(half, name="six steps, per flop^0.5, distilled 0.9", distillation=0.9)
    l1_distilled = replace(one["l1"], name="l1, distilled 0.9", distillation=0.9)
    rates = [replace(one["l1"], name=f"l1, rate {rate}", rate=rate) for rate in (0.02, 0.1)]
    at_once = [
        one[name] for name in one if name.startswith(("uniform", "taylor_square per", "root"))
    ]
    for way in [one["l1"], one["taylor_square"], half, steps[1.0], one["random"], *at_once, *rates]:
        yield 10, 0.25, way
    for way in [distilled, l1_distilled, steps[0.0], more[2], more[-1]]:
        yield 10, 0.25, way
    for way in [one["l1"], half, steps[1.0], one["taylor_square"], distilled, one["uniform_l1"]]:
        yield 10, 0.5, way
    for way in [one["group"], *more[:2], *more[3:-1], one["taylor"], one["scale"], one["fpgm"]]:
        yield 10, 0.25, way
    for seed in (11, 12):
        for flops in (0.25, 0.5):
            for way in [one["l1"], half, steps[1.0], one["taylor_square"], one["group"]]:
                yield seed, flops, way
    for way in [one["random"], one["scale"], one["fpgm"], one["taylor"], one["group"], more[-1]]:
        yield 10, 0.5, way


def final_stage(bench: Bench, options: argparse.Namespace) -> None:
    """The table: every row for every seed, both targets."""
    load(bench, options.weights or bench.out / "resnet20.npz")
    ways = [Way(by, by=by) for by in CRITERIA]
    for seed in options.seeds:
        for flops in TARGETS:
            for way in ways:
                if bench.left() < 0:
                    return
                pruned_row(bench, way, flops, seed)


STAGES = {"train": train_stage, "explore": explore_stage, "final": final_stage}


def read(path: Path, rehearse: bool) -> tuple[tuple, tuple]:
    """Images (uint8) and labels, of training and test; a few random ones in a rehearsal.

    Args:
      path: a folder with the binary version of CIFAR-10, a file that `cifar10_pack.py` has made, or
        an .npz file with `train_images`, `train_labels`, `test_images`, `test_labels`.
      rehearse: whether a few random ones do.
    """
    if rehearse:
        rng = np.random.default_rng(0)
        return tuple(
            (rng.integers(0, 256, (n, *SHAPE), np.uint8), rng.integers(0, 10, n)) for n in (32, 16)
        )
    if path.is_dir():
        return tuple(of_binary(sorted(path.rglob(pattern))) for pattern in BINARY)
    if path.suffix == ".npz":
        with np.load(path) as stored:
            return tuple((stored[f"{part}_images"], stored[f"{part}_labels"]) for part in PARTS)
    from cifar10_pack import unpacked

    splits, _ = unpacked(path.read_bytes())
    return tuple((decoded(images), np.asarray(labels)) for images, labels in map(splits.get, PARTS))


def of_binary(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of files of the binary version: a label, then the channels one by one."""
    if not paths:
        raise ValueError("--data: expected data_batch_1.bin to data_batch_5.bin and test_batch.bin")
    records = np.concatenate([np.fromfile(path, np.uint8) for path in paths]).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0]


def decoded(images: Sequence[bytes]) -> np.ndarray:
    """The pixels of encoded images, by several threads."""

    def some(images):
        return [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]

    parts = [images[at : at + 1000] for at in range(0, len(images), 1000)]
    with ThreadPoolExecutor() as pool:
        return np.concatenate([np.stack(part) for part in pool.map(some, parts)])


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
