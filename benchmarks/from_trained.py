"""Ways of pruning a trained network, at equal cost and an equal number of updates.

    python benchmarks/from_trained.py --data cifar10.pack --out DIR --stages train explore
    python benchmarks/from_trained.py --data cifar10.pack --out DIR --stages train final \
        --weights DIR/resnet20.npz
    python benchmarks/from_trained.py --table DIR/rows.jsonl --name from_trained \
        --out benchmarks/results
    python benchmarks/from_trained.py --rehearse --out DIR --stages train explore final

A ResNet-20 is trained on CIFAR-10. Every row of the table begins with its weights, is brought down
to a share of its FLOPs, and is trained for the same number of updates, those of a search included.
The search is the library's `dhp.fade_to_budget`. On an accelerator all else is one compiled
program, whose latents gate what layers read: a network with gates of 0 computes what `dhp.prune`
leaves (tests check it). A CPU trains what `dhp.prune` leaves, which takes it less time than
compiling. The library scores channels, and counts which of them fit a budget.

A row is written to DIR/rows.jsonl the moment it is measured. DIR/resnet20.npz holds the weights.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import copy
from dataclasses import asdict, dataclass, replace
import datetime
import functools
import io
import json
from pathlib import Path
import shlex
import sys
import time
from typing import Any, NamedTuple

import flax
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
from dhp_jax.prox import soft_threshold
from dhp_jax.pruned.fresh_weights import carry_kernels, reinitialize
from dhp_jax.tasks.classification import distillation_loss
from dhp_jax.train.optimizer import optimizer
from dhp_jax.train.schedules import decay_schedule

TITLE = "Ways of pruning a trained network at equal cost"
NOTE = (
    "ResNet-20 on CIFAR-10 (JPEG): every row begins with the same trained weights and has as many "
    "updates as any other, those of its search included. Means over the seeds of the order of the "
    "images, with the least and the most. After the cut: the test error of the first seed with "
    "renewed statistics, before any update (for a search: after it). Beyond the search: the error "
    "less that of the search with the same seed; above 0 is worse than the search."
)
SHAPE = (32, 32, 3)
BORDER = 4  # pixels of padding, out of which crops are cut
MEAN, DEVIATION = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
TEMPERATURE = 4.0  # of the distillation
PARTS = "train", "test"
BINARY = "data_batch_*.bin", "test_batch.bin"  # files of CIFAR-10's binary version
WEIGHTS, ROWS = "resnet20.npz", "rows.jsonl"
TARGETS = (0.5, 0.25)  # shares of the FLOPs

Array = jax.Array
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
    before: int = 100  # epochs of the trained network; rows with fresh weights have as many more


REHEARSAL = Size(depth=8, batch=8, segment=1, epochs=1, updates=9, before=1)


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
      strength: of the l1 norm of each entry.
      rate: of the latents, as a multiple of the learning rate.
      distillation: share of the loss that compares with the teacher.
      both: whether latents multiply the kernels that make their channels, too.
    """

    mask: Arrays
    strength: Arrays
    rate: Array | float = 0.0
    distillation: Array | float = 0.0
    both: Array | float = 0.0


class Batches(NamedTuple):
    """Which images the updates of a segment take, how they are cut out, and the learning rates."""

    order: np.ndarray
    shift: np.ndarray
    flip: np.ndarray
    rate: np.ndarray


class Search(NamedTuple):
    """What an update of the search changes."""

    params: nnx.State
    statistics: nnx.State
    optimizer: Any


class Network:
    """An ordinary network of the library with gates on what layers read, as pure functions.

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
        self.reads = {}  # the latent that each kernel reads, and that which it makes
        for path, layer in self.layers.items():
            if isinstance(layer, Hyper | dhp.Linear):
                made = self.names[layer.z_out] if isinstance(layer, Hyper) else None
                self.reads[f"{path}.kernel"] = self.names[layer.z_in], made
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

    def gated(self, weights: Arrays, gates: Arrays, both: Array | float = 0.0) -> Arrays:
        """Weights with the rows of each kernel times the gates of the channels that they read.

        Args:
          weights: of the ordinary network.
          gates: of prunable latents.
          both: 1 if the columns are multiplied by the gates of the channels that they make, too;
            then the kernel is that of a hypernetwork with an embedding of 1 and no biases.
        """
        found = dict(weights)
        for name, (read, made) in self.reads.items():
            if read in gates:
                found[name] = found[name] * gates[read][:, None]
            if made in gates:
                found[name] = found[name] * (1 + both * (gates[made] - 1))
        return found

    def full(self, value: float) -> dict[str, np.ndarray]:
        """A number for each entry of each prunable latent."""
        return {name: np.full(self.sizes[name], value, np.float32) for name in self.prunable}


class Left(Network):
    """What is left of a network once it is cut: the same functions, with no gates.

    Args:
      whole: the network.
      arrays: its weights and statistics.
      mask: which entries of each prunable latent stay.
    """

    def __init__(self, whole: Network, arrays: Arrays, mask: Mapping[str, np.ndarray]):
        masks = {name: np.ones(size, bool) for name, size in whole.sizes.items()}
        masks |= {name: np.asarray(kept, bool) for name, kept in mask.items()}
        self.reads, self.prunable = {}, []
        self.graphdef, state = nnx.split(dhp.prune(of_latents(whole, arrays), masks))
        self.variables = {".".join(map(str, p)): (p, v) for p, v in nnx.to_flat_state(state)}

    def arrays(self) -> dict[str, np.ndarray]:
        """Its weights and statistics, on the host."""
        return {name: np.asarray(v[...]) for name, (_, v) in self.variables.items()}


class Programs(NamedTuple):
    """The compiled programs.

    Attributes:
      advance: some updates of a run.
      search: takes the structure of a network with gates and an optimizer; returns some updates.
      inputs: the images and labels of batches, one after another.
      evaluate: errors on the test images.
    """

    advance: Callable
    search: Callable
    inputs: Callable
    evaluate: Callable


def one_after_another(body: Callable) -> Callable:
    """What carries out `body(given, carry, x)` for each x of several, as `jax.lax.scan` does.

    It is one program. On a CPU it is one for each x, for XLA's loops have slow convolutions there.
    """
    if jax.default_backend() != "cpu":
        return jax.jit(
            lambda given, carry, xs: jax.lax.scan(functools.partial(body, given), carry, xs)
        )
    step = jax.jit(body, compiler_options=dhp.compiler_options())

    def loop(given, carry, xs):
        found = []
        for at in range(len(jax.tree.leaves(xs)[0])):
            carry, y = step(given, carry, jax.tree.map(lambda x, at=at: x[at], xs))
            found.append(y)
        return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *found)

    return loop


def programs(
    net: Network, train: tuple, test: tuple, batch: int, teacher: Network | None = None
) -> Programs:
    """The programs for a network and its data.

    Args:
      net: the network.
      train: images and labels.
      test: the same, for the test.
      batch: images a batch.
      teacher: the network that the loss compares with; this one if None.
    """
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

    def logits_of(weights, gates, statistics, images, training, both=0.0, net=net):
        model = net.model({**net.gated(weights, gates, both), **statistics})
        model.train() if training else model.eval()
        return model(images).astype(jnp.float32), net.split(model)[1]

    @jax.jit
    def inputs_of(data, batch):
        images = cut_out(data[0], batch.order, batch.shift, batch.flip)
        return images, data[1][batch.order]

    def taught_by(arrays, images, share):
        def of(images):
            return logits_of(*arrays, images, training=False, net=teacher or net)[0]

        def nothing(images):
            return jnp.zeros((len(images), 10))

        return jax.lax.cond(share > 0, of, nothing, images)

    def total_loss(logits, labels, taught, share):
        plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        apart = distillation_loss(logits, taught, TEMPERATURE).mean()
        return (1 - share) * plain + share * apart

    def update(given, run, batch):
        data, plan, teacher = given
        rate = batch.rate
        images, labels = inputs_of(data, batch)
        taught = taught_by(teacher, images, plan.distillation)

        def loss_of(weights, z):
            gates = jax.tree.map(jnp.multiply, z, plan.mask)
            logits, statistics = logits_of(
                weights, gates, run.statistics, images, training=True, both=plan.both
            )
            return total_loss(logits, labels, taught, plan.distillation), statistics

        (loss, statistics), (grads, grads_z) = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(
            run.weights, run.z
        )
        grads = jax.tree.map(lambda g, w: g + WEIGHT_DECAY * w, grads, run.weights)
        after = jax.tree.map(lambda v, g: MOMENTUM * v + g, run.velocity, (grads, grads_z))
        step, step_z = jax.tree.map(lambda v, g: g + MOMENTUM * v, after, (grads, grads_z))
        weights = jax.tree.map(lambda w, s: w - rate * s, run.weights, step)

        def moved(z, s, strength):
            return soft_threshold(z - rate * plan.rate * s, rate * strength)

        z = jax.tree.map(moved, run.z, step_z, plan.strength)
        return Run(weights, z, after, statistics), loss

    updates = one_after_another(update)

    def advance(run, plan, teacher, batches):
        run, losses = updates((data, plan, teacher), run, batches)
        return run, losses.mean()

    def search(graphdef, optimizer):
        @one_after_another
        def steps(data, state, batch):
            images, labels = inputs_of(data, batch)

            def loss_of(params):
                model = nnx.merge(graphdef, params, state.statistics, copy=True)
                logits = model(images).astype(jnp.float32)
                loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
                return loss, nnx.state(model, nnx.Not(nnx.Param))

            grads, statistics = jax.grad(loss_of, has_aux=True)(state.params)
            updates, changed = optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            return Search(params, statistics, changed), None

        return lambda state, batches: steps(data, state, batches)[0]

    @one_after_another
    def test_errors(given, carry, batch):
        run, gates = given
        images, labels, counts = batch
        logits, _ = logits_of(
            run.weights, gates, run.statistics, normalised(images), training=False
        )
        wrong = (jnp.argmax(logits, -1) != labels) & counts
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels) * counts
        return carry, (wrong, loss)

    def evaluate(run: Run, mask: Arrays) -> dict[str, float]:
        """Errors in percent; of the first and second half of the images as well."""
        gates = jax.tree.map(jnp.multiply, run.z, mask)
        wrong, loss = test_errors((run, gates), None, tested)[1]
        wrong = np.asarray(wrong).reshape(-1)[:count]
        half = count // 2
        return {
            "error": 100 * float(wrong.mean()),
            "error_first_half": 100 * float(wrong[:half].mean()),
            "error_second_half": 100 * float(wrong[half:].mean()),
            "test_loss": float(np.asarray(loss).sum() / count),
        }

    return Programs(advance, search, functools.partial(inputs_of, data), evaluate)


# --------------------------------------------------------------------------------- the criteria


def of_mean_one(scores: Scores) -> Scores:
    """Scores of each latent divided by their mean."""
    return {name: values / max(values.mean(), 1e-12) for name, values in scores.items()}


def of_latents(net: Network, arrays: Arrays) -> nnx.Module:
    """The network of latents with the kernels of an ordinary one."""
    model = nnx.clone(net.latents)
    carry_kernels(net.model(arrays), model)
    return model


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
      by: the criterion; "fade" for the search from trained weights, "dhp" for the paper's; for
        fresh weights "uniform" for the same share of all layers, "found" for what "fade" has left.
      power: of the FLOPs, by which the criterion is divided.
      relative: whether roots of the scores are divided by their mean over each latent.
      stages: of the search, each a segment long, after one that only measures.
      strength: of the l1 norm of the paper's search.
      distillation: share of the loss that compares with the unpruned network, after the search.
      rate: largest learning rate.
      fresh: whether weights are drawn anew and have the updates of the trained network, too.
    """

    name: str
    by: str
    power: float = 0.0
    relative: bool = False
    stages: int = 0
    strength: float = 0.0
    distillation: float = 0.0
    rate: float = 0.05
    fresh: bool = False


class Bench:
    """Data, programs, and the files that are written."""

    def __init__(self, options: argparse.Namespace, size: Size):
        self.size, self.out = size, options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60 * options.minutes
        self.train, self.test = read(options.data, options.rehearse)
        on_cpu = jax.default_backend() == "cpu"
        self.net = Network(size.depth, jnp.float32 if on_cpu else jnp.bfloat16)
        self.programs = programs(self.net, self.train, self.test, size.batch)
        self.evaluate = self.programs.evaluate
        self.trained: dict[str, np.ndarray] = {}
        untrained = self.begin(self.net.fresh(0))
        self.teacher = untrained.weights, untrained.z, untrained.statistics
        self.scores: dict[str, Scores] = {}

    def left(self) -> float:
        """Seconds until no further row is begun."""
        return self.end - time.monotonic()

    def cut_down(self, run: Run, mask: Mapping[str, np.ndarray]) -> tuple["Bench", Run]:
        """The same for what a cut leaves, as a network of its own, and its state."""
        bench, arrays = copy.copy(self), jax.tree.map(np.asarray, {**run.weights, **run.statistics})
        bench.net = Left(self.net, arrays, mask)
        bench.programs = programs(bench.net, self.train, self.test, self.size.batch, self.net)
        bench.evaluate = bench.programs.evaluate
        return bench, bench.begin(bench.net.arrays())

    def write(self, **row: Any) -> None:
        with (self.out / ROWS).open("a") as file:
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

    def plan(self, mask: Mapping[str, np.ndarray], way: Way | None = None, **fields: Any) -> Plan:
        """A plan of float32 arrays; what is not given is zero."""
        given = {"strength": self.net.full(0)} | fields
        given |= {"distillation": way.distillation if way else 0.0}
        plan = Plan(dict(mask), **given)
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), plan)

    def step(self, run: Run, plan: Plan, batches: Batches) -> tuple[Run, Array]:
        """The run after some updates, and the mean of their losses."""
        return self.programs.advance(run, plan, self.teacher, batches)


def cosine(peak: float, updates: int, warm_up: int) -> optax.Schedule:
    """The learning rate of each update."""
    return decay_schedule("cosine", peak, updates, 1, warmup=warm_up)


def segments(bench: Bench, epochs: int) -> int:
    """How many segments come nearest to so many epochs."""
    return round(epochs * len(bench.train[1]) / bench.size.batch / bench.size.segment)


def train(
    bench: Bench, start: Mapping[str, np.ndarray], rate: float, seed: int, epochs: int
) -> Run:
    """Training of the whole network."""
    size = bench.size
    updates = max(2, segments(bench, epochs)) * size.segment
    run, plan = bench.begin(start), bench.plan(bench.net.full(1))
    schedule = cosine(rate, updates, min(2 * size.segment, updates // 2))
    for batches in bench.batches(1000 + seed, schedule(np.arange(updates))):
        run, loss = bench.step(run, plan, batches)
    if not np.isfinite(float(loss)):
        raise RuntimeError("the training has diverged")
    return run


def taylor_scores(bench: Bench, model: nnx.Module) -> dict[str, Scores]:
    """First-order Taylor terms of the trained network over a segment, in training mode."""
    (batches,) = bench.batches(777, np.zeros(bench.size.segment))
    each = [jax.tree.map(lambda x, at=at: x[at], batches) for at in range(bench.size.segment)]

    def loss(network, batch):
        logits = network(batch[0]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def scores(squared):
        return dhp.taylor_scores(model, loss, map(bench.programs.inputs, each), squared=squared)

    model.train()
    return {"taylor": scores(squared=False), "taylor_square": scores(squared=True)}


def uniform(net: Network, scores: Scores, flops: float) -> dict[str, np.ndarray]:
    """The same share of every latent, of each the entries with the largest scores."""
    masks = dhp.uniform_within(net.latents, net.cost, flops=flops)
    kept = {}
    for name in net.prunable:
        best = np.argsort(-scores[name], kind="stable")[: masks[name].sum()]
        kept[name] = np.isin(np.arange(net.sizes[name]), best)
    return kept


def pruned_row(bench: Bench, way: Way, flops: float, seed: int, look: bool = False) -> None:
    """Prunes the trained network in one way, trains what is left, and writes the row.

    Args:
      bench: what rows share.
      way: how.
      flops: the share that is left.
      seed: of the order of the images, and of what is drawn.
      look: whether the network is tested right after the cut, too, its statistics renewed.
    """
    began, net, size = time.monotonic(), bench.net, bench.size
    run, updates = bench.begin(bench.trained), size.updates
    if way.fresh:
        updates += segments(bench, size.before) * size.segment
    schedule = cosine(way.rate, updates, size.segment)
    stream = bench.batches(seed, schedule(np.arange(updates)))
    if way.by == "fade":
        run, mask = faded(bench, way, flops, schedule, stream)
    elif way.by == "dhp":
        run, mask = shrunk(bench, way, flops, run, stream)
    else:
        mask = cut(bench, way, flops, seed)
    counts = net.sizes | {name: int(np.sum(kept)) for name, kept in mask.items()}
    if way.fresh or jax.default_backend() == "cpu":
        (bench, run), mask = bench.cut_down(run, mask), {}
    if way.fresh:
        run = bench.begin(bench.net.fresh(seed))
    plan = bench.plan(mask, way)
    after_cut = error_after_cut(bench, run, mask) if look and not way.fresh else None
    for batches in stream:
        run, loss = bench.step(run, plan, batches)
    bench.write(
        name=way.name,
        target=flops,
        seed=seed,
        **bench.evaluate(run, plan.mask),
        after_cut=after_cut,
        train_loss=float(loss),
        **net.cost.shares(counts),
        widths={name: counts[name] for name in net.prunable},
        updates=updates,
        seconds=round(time.monotonic() - began, 3),
        way=asdict(way),
    )


def error_after_cut(bench: Bench, run: Run, mask: Mapping[str, np.ndarray]) -> float:
    """The test error, in percent, once a segment without updates has renewed the statistics."""
    plan = bench.plan(mask)
    (batches,) = bench.batches(778, np.zeros(bench.size.segment))
    run, _ = bench.step(run, plan, batches)
    return bench.evaluate(run, plan.mask)["error"]


def cut(bench: Bench, way: Way, flops: float, seed: int) -> dict[str, np.ndarray]:
    """The survivors of a way that cuts at once."""
    net = bench.net
    if way.by == "found":
        return found_widths(bench, flops, seed)
    if way.by == "uniform":
        masks = dhp.uniform_within(net.latents, net.cost, flops=flops)
        return {name: masks[name] for name in net.prunable}
    if way.by == "random":
        return choose(net, dhp.random_scores(net.latents, seed), flops)
    if way.by.startswith("uniform"):
        return uniform(net, bench.scores[way.by.removeprefix("uniform_")], flops)
    scores = bench.scores[way.by]
    if way.relative:
        scores = of_mean_one({name: np.sqrt(values) for name, values in scores.items()})
    return choose(net, dhp.per_cost(scores, net.cost, power=way.power), flops)


def found_widths(bench: Bench, flops: float, seed: int) -> dict[str, np.ndarray]:
    """As many entries of each latent as the row of the search with this seed has kept."""
    for row in map(json.loads, (bench.out / ROWS).read_text().splitlines()):
        if (row["name"], row.get("target"), row.get("seed")) == (FADE.name, flops, seed):
            return {name: np.arange(bench.net.sizes[name]) < n for name, n in row["widths"].items()}
    raise ValueError(f"--out: expected a row {FADE.name!r} at {flops} with seed {seed} in {ROWS}")


def faded(
    bench: Bench, way: Way, flops: float, schedule: optax.Schedule, stream: Iterator[Batches]
) -> tuple[Run, dict[str, np.ndarray]]:
    """The library's search from trained weights, a segment a part; see `dhp.fade_to_budget`.

    What is left goes on with a fresh optimizer, as in a run of the library.
    """
    net, parts = bench.net, way.stages + 1
    given = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "nesterov": True}
    fading = dhp.fade_to_budget(
        optimizer("sgd", schedule, **given),
        model := dhp.with_gates(net.model(bench.trained), rngs=nnx.Rngs(0)),
        net.cost,
        steps=parts * bench.size.segment,
        stages=way.stages,
        power=way.power,
        flops=flops,
    )
    model.train()
    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)
    state = Search(params, statistics, fading.init(params))
    advance = bench.programs.search(graphdef, fading)
    for _, batches in zip(range(parts), stream, strict=False):
        state = advance(state, batches)
    model = nnx.merge(graphdef, state.params, state.statistics)
    weights, statistics = net.split(dhp.prune(model))
    masks = dhp.survivors(model)
    mask = {name: masks[name].astype(np.float32) for name in net.prunable}
    return bench.begin(jax.tree.map(np.asarray, weights | statistics)), mask


def shrunk(bench: Bench, way: Way, flops: float, run: Run, stream: Iterator[Batches]):
    """The paper's search, from trained kernels with all latents at 1, and its cut by magnitude.

    Latents are in the kernels that make their channels and in those that read them, and are
    trained; an l1 norm of one strength is on all. Then the kernels are generated once.
    """
    net, mask = bench.net, bench.net.full(1)
    strength = {name: way.strength * ones for name, ones in mask.items()}
    plan = bench.plan(mask, way, strength=strength, rate=1.0, both=1.0)
    for _ in range(way.stages + 1):
        run, _ = bench.step(run, plan, next(stream))
    z = {name: np.abs(np.asarray(x, np.float64)) for name, x in run.z.items()}
    arrays = {**net.gated(run.weights, run.z, 1.0), **run.statistics}
    arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    return bench.begin(arrays), choose(net, z, flops)


# ----------------------------------------------------------------------------------- the stages


def train_stage(bench: Bench, options: argparse.Namespace) -> None:
    """Trains the network, or goes on with one, and keeps it, its kernels in half precision."""
    began, size = time.monotonic(), bench.size
    start, rate = bench.net.fresh(options.seed), size.rate
    if options.weights is not None:
        start, rate = stored(options.weights), size.rate / 4
    run = train(bench, start, rate, options.seed, size.epochs)
    arrays = {name: np.asarray(x) for name, x in {**run.weights, **run.statistics}.items()}
    arrays = {
        name: x.astype(np.float16) if name.endswith("kernel") else x.astype(np.float32)
        for name, x in arrays.items()
    }
    np.savez_compressed(bench.out / WEIGHTS, **arrays)
    run = bench.begin(stored(bench.out / WEIGHTS))
    bench.write(
        name="unpruned",
        epochs=size.epochs,
        seed=options.seed,
        goes_on=options.weights is not None,
        **bench.evaluate(run, bench.plan(bench.net.full(1)).mask),
        seconds=round(time.monotonic() - began, 3),
    )


def stored(path: Path) -> dict[str, np.ndarray]:
    """Weights and statistics that the stage train has kept."""
    with np.load(path) as file:
        return {name: file[name].astype(np.float32) for name in file.files}


def load(bench: Bench, options: argparse.Namespace) -> None:
    """Takes the trained network as what all rows begin with, and as the teacher."""
    own = bench.out / WEIGHTS
    bench.trained = stored(own if own.exists() else options.weights)
    run = bench.begin(bench.trained)
    bench.teacher = run.weights, run.z, run.statistics
    model = of_latents(bench.net, bench.trained)
    bench.scores = {by: scores_of(model) for by, scores_of in BY_WEIGHTS.items()}
    bench.scores |= taylor_scores(bench, model)


BY_WEIGHTS = {
    "l1": dhp.l1_scores,
    "l2": dhp.l2_scores,
    "fpgm": dhp.fpgm_scores,
    "group": dhp.group_scores,
    "scale": dhp.scale_scores,
}
CRITERIA = ("l1", "group", "taylor_square", "scale", "fpgm", "random", "uniform_l1")
ONE = {by: Way(by, by=by) for by in (*CRITERIA, "taylor", "l2", "uniform_taylor_square")}
FADE = Way("fade", by="fade", power=1.0, stages=6)
DISTILLED = tuple(
    replace(way, name=f"{way.name}, distilled", distillation=0.9) for way in (FADE, ONE["group"])
)
FRESH = tuple(
    Way(f"{by}, fresh weights", by=by, rate=0.2, fresh=True) for by in ("found", "uniform")
)
PER_FLOP = Way("taylor_square per flop^0.5", by="taylor_square", power=0.5)
PAPER = Way("dhp, latents in kernels", by="dhp", stages=6, strength=0.01)


def explore_stage(bench: Bench, options: argparse.Namespace) -> None:
    """Single runs of many ways at a quarter of the FLOPs, the most telling ones first."""
    load(bench, options)
    half = replace(FADE, name="fade per flop^0.5", power=0.5)
    ways = [ONE["l1"], ONE["taylor_square"], half, FADE, ONE["random"], ONE["uniform_l1"]]
    ways += [ONE["uniform_taylor_square"], PER_FLOP]
    ways += [replace(PER_FLOP, name="taylor_square per flop", power=1.0)]
    ways += [Way("root of taylor_square, mean 1", by="taylor_square", relative=True)]
    ways += [replace(ONE["l1"], name=f"l1, rate {rate}", rate=rate) for rate in (0.02, 0.1)]
    for way in (half, ONE["l1"]):
        ways.append(replace(way, name=f"{way.name}, distilled", distillation=0.9))
    ways += [replace(FADE, name="fade, not per flop", power=0.0)]
    for way in ways[:: 3 if options.rehearse else 1]:
        if bench.left() < 0:
            return
        pruned_row(bench, way, 0.25, 10)


def final_stage(bench: Bench, options: argparse.Namespace) -> None:
    """The table: what matters most is measured first, for every seed and both targets."""
    load(bench, options)
    first = [FADE, *(ONE[by] for by in CRITERIA)]
    half = replace(FADE, name="fade per flop^0.5", power=0.5)
    seeds, targets, each = options.seeds, TARGETS, 1
    if options.rehearse:
        seeds, targets, each = seeds[:1], TARGETS[:1], 5
    for ways in (first, [PAPER], [*DISTILLED], [PER_FLOP, half], [*FRESH]):
        for seed in seeds:
            for flops in targets:
                for way in ways[::each]:
                    if options.ways and way.name not in options.ways:
                        continue
                    if bench.left() < 0:
                        return
                    pruned_row(bench, way, flops, seed, look=seed == options.seeds[0])


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
    from cifar10_pack import unpacked  # needs the library's data

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


def tables(rows: Sequence[dict]) -> str:
    """A table for each target: means over the seeds, and what is lost against the search."""
    from record import table_of  # imports more than a device needs

    found: dict[float, dict[str, dict[int, dict]]] = {}
    for row in rows:
        if "target" in row:
            found.setdefault(row["target"], {}).setdefault(row["name"], {})[row["seed"]] = row
    columns = ["row", ">params", ">after the cut", ">test error", ">beyond the search", ">seeds"]
    return "\n\n".join(
        f"## {target:.0%} of the FLOPs\n\n"
        + table_of(
            columns, [[name, *cells(of_seeds, ways[FADE.name])] for name, of_seeds in ways.items()]
        )
        for target, ways in sorted(found.items(), reverse=True)
    )


def cells(found: Mapping[int, dict], search: Mapping[int, dict]) -> list[str]:
    """Of one row and target: params, the error after the cut and at the end, and differences."""
    apart = [row["error"] - search[seed]["error"] for seed, row in found.items() if seed in search]
    after = [row["after_cut"] for row in found.values() if row["after_cut"] is not None]
    return [
        f"{np.mean([row['params'] for row in found.values()]):.0%}",
        f"{after[0]:.2f} %" if after else "",
        spread([row["error"] for row in found.values()], ".2f", " %"),
        spread(apart, "+.2f"),
        str(len(found)),
    ]


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """A mean, with the least and the most of several."""
    if not values:
        return ""
    several = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{unit}{several}"


def publish(options: argparse.Namespace) -> None:
    """Makes NAME.json and NAME.md of the rows that a device has measured."""
    from record import write

    rows = [json.loads(line) for line in options.table.read_text().splitlines()]
    about = next(row for row in rows if row["name"] == "begin")
    about = {key: about[key] for key in ("date", "command", "commit", "hardware", "versions")}
    unpruned = [row["error"] for row in rows if row["name"] == "unpruned"]
    whole = f" The unpruned network has {unpruned[0]:.2f} %." if unpruned else ""
    note = f"{options.note} {NOTE}{whole}".strip()
    print(tables(rows))
    write(options.out, options.name, TITLE, note, rows, tables(rows), about)


def begin(parser: argparse.ArgumentParser, options: argparse.Namespace, *modules: Any) -> Bench:
    """What rows share, once it is written on what they are measured.

    Args:
      parser: tells of updates that make no whole segments.
      options: of the command line; those of `Size` that are given replace its own.
      modules: whose versions are told.
    """
    size = REHEARSAL if options.rehearse else Size()
    given = {name: getattr(options, name, None) for name in ("epochs", "updates")}
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    if size.updates % size.segment:
        parser.error(f"--updates: expected a multiple of {size.segment}, got {size.updates}")
    dhp.keep_memory()  # as runs do
    bench = Bench(options, size)
    bench.write(
        name="begin",
        date=datetime.date.today().isoformat(),
        command=shlex.join(["python", *sys.argv]),
        commit=options.commit,
        hardware=str(jax.devices()[0].device_kind),
        versions={module.__name__: module.__version__ for module in modules},
        size=asdict(size),
    )
    return bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="CIFAR-10: train_images, ..., test_labels")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--weights", type=Path, help="trained before, by the stage train")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no row begins")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the rows")
    parser.add_argument(
        "--ways", nargs="+", help="names of the rows of the stage final; all if none"
    )
    parser.add_argument("--table", type=Path, help="rows.jsonl: publish it, measure nothing")
    parser.add_argument("--name", default="from_trained", help="of the files of --table")
    parser.add_argument("--note", default="", help="put before the table")
    parser.add_argument("--commit", default="", help="of the code, for the record")
    parser.add_argument("--epochs", type=int, help="of the training")
    parser.add_argument("--updates", type=int, help="of every row")
    parser.add_argument("--rehearse", action="store_true", help="a smoke run of a minute on a CPU")
    options = parser.parse_args()
    if options.table is not None:
        return publish(options)
    bench = begin(parser, options, dhp, jax, flax, optax)
    for stage in options.stages:
        began = time.monotonic()
        STAGES[stage](bench, options)
        bench.write(name=f"stage {stage}", seconds=round(time.monotonic() - began, 2))


if __name__ == "__main__":
    main()
