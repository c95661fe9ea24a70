"""The rows of from_trained.py: how each prunes the trained network and trains what is left.

The library scores channels, and counts which of them fit a budget.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import copy
from dataclasses import asdict, dataclass, replace
import functools
import io
import itertools
import json
from pathlib import Path
import re
import time
from typing import Any

from cifar10_arrays import read
from flax import nnx
from from_trained_programs import (
    BORDER,
    WEIGHT_DECAY,
    Array,
    Batches,
    Left,
    Network,
    Plan,
    Run,
    of_latents,
    programs,
)
from from_trained_searches import NAMES, after_updates, searched, sgd
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dhp_jax as dhp
from dhp_jax import files
from dhp_jax.budgets.counted import survivors_within
from dhp_jax.pipeline.training_batches import EXAMPLES
from dhp_jax.train.schedules import decay_schedule

ROWS, TRAINING = "rows.jsonl", "training"
SEGMENTS_OF_SEARCH = 7
SEGMENTS_KEPT = 40  # between two times that a long row keeps its state

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


@dataclass(frozen=True)
class Way:
    """One row.

    Attributes:
      name: of the row.
      by: the criterion; "fade" for the search from trained weights, "dhp" for the paper's, or one
        of from_trained_searches.py; for fresh weights "uniform" for the same share of all layers,
        "found" for what "fade" has left.
      power: of the FLOPs, by which the criterion is divided.
      relative: whether roots of the scores are divided by their mean over each latent.
      stages: of the search "fade": how often it chooses.
      search: segments of the search; 0 for a cut at once, and for fresh weights.
      strength: of the l1 norm of the paper's search, and of those of from_trained_searches.py.
      distillation: share of the loss that compares with the unpruned network, after the search.
      throughout: whether the loss of the search "fade" has that share, too.
      rate: largest learning rate.
      fresh: whether weights are drawn anew and have the updates of the trained network, too.
    """

    name: str
    by: str
    power: float = 0.0
    relative: bool = False
    stages: int = 0
    search: int = 0
    strength: float = 0.0
    distillation: float = 0.0
    throughout: bool = False
    rate: float = 0.05
    fresh: bool = False


BY_WEIGHTS = {
    "l1": dhp.l1_scores,
    "l2": dhp.l2_scores,
    "fpgm": dhp.fpgm_scores,
    "group": dhp.group_scores,
    "scale": dhp.scale_scores,
}
CRITERIA = ("l1", "group", "taylor_square", "scale", "fpgm", "random", "uniform_l1")
ONE = {by: Way(by, by=by) for by in (*CRITERIA, "taylor", "l2", "uniform_taylor_square")}
FADE = Way("fade", by="fade", power=1.0, stages=6, search=SEGMENTS_OF_SEARCH)
DISTILLED = tuple(
    replace(way, name=f"{way.name}, distilled", distillation=0.9) for way in (FADE, ONE["group"])
)
THROUGHOUT = replace(DISTILLED[0], name="fade, distilled throughout", throughout=True)
LONG = replace(DISTILLED[0], name="fade, distilled, long search", search=4 * FADE.search)
FRESH = tuple(
    Way(f"{by}, fresh weights", by=by, rate=0.2, fresh=True) for by in ("found", "uniform")
)
PER_FLOP = tuple(
    Way(f"{by} per flop{power}", by=by, power=float(power.removeprefix("^") or 1))
    for by in ("taylor_square", "group")
    for power in ("^0.5", "")
)
PAPER = Way("dhp, latents in kernels", by="dhp", search=SEGMENTS_OF_SEARCH, strength=0.01)
SEARCHES = tuple(
    Way(f"{name}, strength {strength}", by=name, search=SEGMENTS_OF_SEARCH, strength=strength)
    for strength in (0.25, 1.0)
    for name in NAMES
)


class Bench:
    """Data, programs, and the files that are written."""

    def __init__(self, options: argparse.Namespace, size: Size):
        self.size, self.out, self.commit = size, options.out, options.commit
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

    def searching(self, share: float) -> Callable:
        """What makes the updates of a search, whose loss has a share that compares with a teacher.

        See `Programs.search`.
        """
        return functools.partial(self.programs.search, teacher=self.teacher, share=share)

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
    """Training of the whole network; one that was stopped goes on."""
    size = bench.size
    updates = max(2, segments(bench, epochs)) * size.segment
    run, plan = bench.begin(start), bench.plan(bench.net.full(1))
    schedule = cosine(rate, updates, min(2 * size.segment, updates // 2))
    stream = bench.batches(1000 + seed, schedule(np.arange(updates)))
    run, loss = trained(bench, run, plan, stream, bench.out / f"{TRAINING}_{rate}_{seed}.state")
    if not np.isfinite(loss):
        raise RuntimeError("the training has diverged")
    return run


def of_mean_one(scores: Scores) -> Scores:
    """Scores of each latent divided by their mean."""
    return {name: values / max(values.mean(), 1e-12) for name, values in scores.items()}


def choose(net: Network, scores: Scores, flops: float) -> dict[str, np.ndarray]:
    """The survivors within a share of the FLOPs, by the library's own count."""
    masks = survivors_within(net.latents, net.cost, scores=scores, flops=flops)
    return {name: masks[name] for name in net.prunable}


def scores_by(bench: Bench, by: str) -> Scores:
    """Scores of the trained network by a criterion, computed once."""
    if by not in bench.scores:
        model = of_latents(bench.net, bench.trained)
        found = {by: BY_WEIGHTS[by](model)} if by in BY_WEIGHTS else taylor_scores(bench, model)
        bench.scores |= found
    return bench.scores[by]


def taylor_scores(bench: Bench, model: nnx.Module) -> dict[str, Scores]:
    """First-order Taylor terms of the trained network, as the library's methods measure them."""
    (batches,) = bench.batches(777, np.zeros(bench.size.segment))
    count = min(-(-EXAMPLES // bench.size.batch), bench.size.segment)
    each = [jax.tree.map(lambda x, at=at: x[at], batches) for at in range(count)]

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


@dataclass(frozen=True)
class Trainer:
    """What carries out the updates that follow a cut.

    Attributes:
      name: for the record.
      train: takes what rows share, the state of a run, its plan, its batches, and the file that a
        long run keeps its state in; returns the state after all updates, and the last loss.
    """

    name: str
    train: Callable[[Bench, Run, Plan, Iterator[Batches], Path], tuple[Run, float]]


def pruned_row(
    bench: Bench,
    way: Way,
    flops: float,
    seed: int,
    look: bool = False,
    trainer: Trainer | None = None,
) -> None:
    """Prunes the trained network in one way, trains what is left, and writes the row.

    Args:
      bench: what rows share.
      way: how.
      flops: the share that is left.
      seed: of the order of the images, and of what is drawn.
      look: whether the network is tested right after the cut, too, its statistics renewed.
      trainer: of what is left; the library's own packages if None.
    """
    trainer = trainer or Trainer("jax", trained)
    began, whole, size = time.monotonic(), bench, bench.size
    run, updates = bench.begin(bench.trained), updates_of(bench, way)
    schedule = cosine(way.rate, updates, size.segment)
    stream = bench.batches(seed, schedule(np.arange(updates)))
    if way.by == "fade":
        run, mask = faded(bench, way, flops, schedule, stream)
    elif way.by == "dhp":
        run, mask = shrunk(bench, way, flops, run, stream)
    elif way.by in NAMES:
        run, mask = sought(bench, way, flops, schedule, stream)
    else:
        mask = cut(bench, way, flops, seed)
    left = mask
    if way.fresh or jax.default_backend() == "cpu" or trainer.train is not trained:
        (bench, run), mask = bench.cut_down(run, mask), {}
    if way.fresh:
        run = bench.begin(bench.net.fresh(seed))
    plan = bench.plan(mask, way)
    after_cut = error_after_cut(bench, run, mask) if look and not way.fresh else None
    named = f"{way.name}_{flops}_{seed}_{updates}_{trainer.name}"
    kept = bench.out / (re.sub(r"[^\w.]+", "_", named) + ".state")
    run, loss = trainer.train(bench, run, plan, stream, kept)
    found = bench.evaluate(run, plan.mask) | {"after_cut": after_cut, "train_loss": loss}
    write_row(whole, way, flops, seed, left, began, **found, trained_by=trainer.name)
    kept.unlink(missing_ok=True)


def updates_of(bench: Bench, way: Way) -> int:
    """How many updates a row has."""
    more = segments(bench, bench.size.before) if way.fresh else 0
    return bench.size.updates + more * bench.size.segment


def write_row(
    bench: Bench,
    way: Way,
    flops: float,
    seed: int,
    mask: Mapping[str, np.ndarray],
    began: float,
    **measured: Any,
) -> None:
    """Writes a row: how it was made, what a mask leaves of the whole network, what was measured."""
    counts = bench.net.sizes | {name: int(np.sum(kept)) for name, kept in mask.items()}
    bench.write(
        name=way.name,
        target=flops,
        seed=seed,
        **measured,
        **bench.net.cost.shares(counts),
        widths={name: counts[name] for name in bench.net.prunable},
        updates=updates_of(bench, way),
        seconds=round(time.monotonic() - began, 3),
        way=asdict(way),
        commit=bench.commit,
    )


def trained(
    bench: Bench, run: Run, plan: Plan, stream: Iterator[Batches], kept: Path
) -> tuple[Run, float]:
    """The run after all updates of a stream, and the last loss.

    Args:
      bench: what rows share.
      run: where it begins.
      plan: of all updates.
      stream: what is left of the batches.
      kept: a file that is written now and then, and from which a run that was stopped goes on.
    """
    done, loss = 0, np.nan
    leaves, structure = jax.tree.flatten(run)
    if kept.exists():
        with np.load(kept) as file:
            done, loss, *leaves = (file[name] for name in file.files)
        run = jax.tree.unflatten(structure, map(jnp.asarray, leaves))
    for at, batches in enumerate(stream, 1):
        if at > done:
            run, loss = bench.step(run, plan, batches)
            if at % SEGMENTS_KEPT == 0:
                np.savez(data := io.BytesIO(), at, loss, *jax.tree.leaves(run))
                files.write(kept, data.getvalue())
    return run, float(loss)


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
        return found_widths(bench, FADE.name, flops, seed)
    if way.by == "uniform":
        masks = dhp.uniform_within(net.latents, net.cost, flops=flops)
        return {name: masks[name] for name in net.prunable}
    if way.by == "random":
        return choose(net, dhp.random_scores(net.latents, seed), flops)
    if way.by.startswith("uniform"):
        return uniform(net, scores_by(bench, way.by.removeprefix("uniform_")), flops)
    scores = scores_by(bench, way.by)
    if way.relative:
        scores = of_mean_one({name: np.sqrt(values) for name, values in scores.items()})
    return choose(net, dhp.per_cost(scores, net.cost, power=way.power), flops)


def found_widths(bench: Bench, name: str, flops: float, seed: int) -> dict[str, np.ndarray]:
    """As many entries of each latent as a row that is written has kept."""
    for row in map(json.loads, (bench.out / ROWS).read_text().splitlines()):
        if (row["name"], row.get("target"), row.get("seed")) == (name, flops, seed):
            return {name: np.arange(bench.net.sizes[name]) < n for name, n in row["widths"].items()}
    raise ValueError(f"--out: expected a row {name!r} at {flops} with seed {seed} in {ROWS}")


def faded(
    bench: Bench, way: Way, flops: float, schedule: optax.Schedule, stream: Iterator[Batches]
) -> tuple[Run, dict[str, np.ndarray]]:
    """The library's search from trained weights; see `dhp.fade_to_budget`.

    What is left goes on with a fresh optimizer, as in a run of the library.
    """
    net = bench.net
    fading = dhp.fade_to_budget(
        sgd(schedule, WEIGHT_DECAY),
        model := dhp.with_gates(net.model(bench.trained), rngs=nnx.Rngs(0)),
        net.cost,
        steps=way.search * bench.size.segment,
        stages=way.stages,
        power=way.power,
        flops=flops,
    )
    share = way.distillation if way.throughout else 0.0
    part = itertools.islice(stream, way.search)
    model = after_updates(model, fading, bench.searching(share), part)
    masks = dhp.survivors(model)
    mask = {name: masks[name].astype(np.float32) for name in net.prunable}
    return bench.begin(net.on_host(dhp.prune(model))), mask


def sought(
    bench: Bench, way: Way, flops: float, schedule: optax.Schedule, stream: Iterator[Batches]
) -> tuple[Run, dict[str, np.ndarray]]:
    """A search of from_trained_searches.py, and its cut."""
    rates = np.asarray(schedule(np.arange(way.search * bench.size.segment)))
    part = itertools.islice(stream, way.search)
    arrays, scores = searched(
        way.by, bench.net, bench.trained, bench.searching(0.0), rates, way.strength, part
    )
    return bench.begin(arrays), choose(bench.net, scores, flops)


def shrunk(bench: Bench, way: Way, flops: float, run: Run, stream: Iterator[Batches]):
    """The paper's search, from trained kernels with all latents at 1, and its cut by magnitude.

    Latents are in the kernels that make their channels and in those that read them, and are
    trained; an l1 norm of one strength is on all. Then the kernels are generated once.
    """
    net, mask = bench.net, bench.net.full(1)
    strength = {name: way.strength * ones for name, ones in mask.items()}
    plan = bench.plan(mask, way, strength=strength, rate=1.0, both=1.0)
    for batches in itertools.islice(stream, way.search):
        run, _ = bench.step(run, plan, batches)
    z = {name: np.abs(np.asarray(x, np.float64)) for name, x in run.z.items()}
    arrays = {**net.gated(run.weights, run.z, 1.0), **run.statistics}
    arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    return bench.begin(arrays), choose(net, z, flops)
