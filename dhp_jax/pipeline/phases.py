"""The phases of a run: search, prune, converge, or those of another method.

Every phase ends with a network on disk, and keeps checkpoints on its way there. It is done if that
network is there, whole, and made from what the phase before it has left; the digest of that is
noted as `made_from`. A run that is started again in its directory goes on from what it finds. All
randomness follows from the seed, the phase and the step, so it ends with the same bits as a run
that was never stopped.

Of several processes all train, and the first alone reads and writes the directory.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
import jax
import optax

from dhp_jax.activity import doing
from dhp_jax.artifact import reading
from dhp_jax.artifact.arrays import is_finite
from dhp_jax.budgets.counted import search_limits, smallest_ratio
from dhp_jax.budgets.gradual import fade_to_budget, finish_fade
from dhp_jax.config.methods import PHASES, TAUGHT
from dhp_jax.core.state import path_name, value_of
from dhp_jax.core.survivors import survivor_counts
from dhp_jax.distributed.processes import folder_from_first, from_first, is_first
from dhp_jax.errors import NonFiniteError
from dhp_jax.pipeline import networks
from dhp_jax.pipeline.header import tell_reach
from dhp_jax.pipeline.preparation import (
    Run,
    length_field,
    most_steps,
    name_method,
    schedule_of,
)
from dhp_jax.pipeline.smaller import RunStart
from dhp_jax.pipeline.training_batches import renew
from dhp_jax.pruned.gates import ungate
from dhp_jax.report.format import in_words
from dhp_jax.tasks import evaluate
from dhp_jax.tasks.task import Data, Params
from dhp_jax.train.loop import train
from dhp_jax.train.optimizer import optimizer, shrink_latents
from dhp_jax.train.phase import Budget, Observer, Outcome, Phase, Teacher
from dhp_jax.train.records import latent_history
from dhp_jax.workdir import source_run
from dhp_jax.workdir.identity import grow, read_field

logger = logging.getLogger(__name__)


class Work(NamedTuple):
    """A run, and what its phases share.

    `stopping` is asked after every step of training whether to stop. `read("train")` gives the data
    of a split, which are read once; a run that is finished reads none.
    """

    run: Run
    stopping: Callable[[], bool]
    read: Callable[[str], Data]


def carry_out(run: Run, stopping: Callable[[], bool]) -> None:
    """Carries out all phases of a run, or those that are left."""

    @functools.cache
    def read(split: str) -> Data:
        with doing(f"reading the {'training' if split == 'train' else split} data"):
            return run.setup.read(split)

    work = Work(run, stopping, read)
    if not run.method.prunes:
        train_last(work, "baseline", run.blueprint.baseline, run.blueprint.digest)
        return
    start = find_start(work)
    pruned_from = from_first(lambda: prune_to_budget(work, start))
    folder = run.workdir / "pruned"
    train_last(work, "converge", lambda: folder_from_first(folder, reading.load), pruned_from)


def find_start(work: Work) -> str:
    """Returns the digest of the network that channels are taken from; "" for an untrained."""
    run, method, source = work.run, work.run.method, work.run.blueprint.digest
    if source_run.needs_source(run.config):
        source = from_first(lambda: source_run.find_digest(run.config, run.workdir))
    if any(run.config[phase].distillation.weight for phase in TAUGHT):
        from_first(lambda: networks.keep_teacher(run, source))
    return search(work, source) if method.searches else source


def search(work: Work, source: str = "") -> str:
    """Trains until enough latents are gone; returns the digest of the network then.

    It begins with the trained network of the digest `source`, or with fresh weights if that is "".
    """
    run, settings, cost = work.run, work.run.config.search, work.run.cost
    fades = run.method.fades
    if found := from_first(lambda: networks.find_trained(run, "search", source)):
        return found["sha256"]
    asked = search_limits(run.config.budget, run.config.target)
    # What fades reaches the budget itself and becomes zero, at the end of the phase.
    margin, threshold = (0.0, 1e-30) if fades else (settings.stop_limit, settings.threshold)
    budget = Budget(
        shares=lambda model: cost.shares(survivor_counts(model, threshold)),
        limits={name: share + margin for name, share in asked.items()},
        history=lambda model: latent_history(model, threshold),
    )
    with name_method(run.config):
        model = run.blueprint.gated(_trained(run)) if fades else run.blueprint.build()
    noted: dict[str, Any] = {"made_from": source} if source else {}
    if source_run.needs_source(run.config):  # which may change or go once the search has ended
        noted["origin"] = from_first(lambda: _origin(run, source))
    if not fades and is_first():
        tell_reach(run, model, budget)
    outcome = _train(work, "search", model, budget, source)
    searched, early = outcome.model, 0
    if fades:
        searched, early = finish_fade(searched)
        searched = ungate(searched, run.blueprint.build())
    if (early or not outcome.progress.met_budget) and is_first():
        logger.warning(
            "search: did not come down to %s within %s; pruning to %s anyway%s",
            in_words(budget.limits),
            length_field(run, "search"),
            "its budgets" if run.config.budget.latency else in_words(asked),
            f"; its last steps were left out, so {early} channels had not faded" if early else "",
        )
    return from_first(lambda: networks.save(run, "search", searched, outcome.progress, **noted))


def _origin(run: Run, source: str) -> dict[str, Any]:
    """How the source was trained, whose network must have a digest."""
    there = source_run.read(run.config)
    source_run.check_digest(there, source, run.workdir)
    return dict(there.origin)


def _trained(run: Run) -> nnx.Module:
    """The ordinary network that a search from trained weights begins with."""
    if not source_run.needs_source(run.config):
        return run.blueprint.ordinary()
    path = from_first(lambda: str(source_run.read(run.config).path))
    return folder_from_first(Path(path), reading.load)


def prune_to_budget(work: Work, made_from: str) -> str:
    """Makes the smaller network as the method does, of that with a digest; returns its own."""
    run, method = work.run, work.run.method
    found = networks.find(run, "pruned")
    if found and found["notes"]["made_from"] == made_from:
        return found["sha256"]
    with doing("choosing the channels that stay"), name_method(run.config):
        small, budget, exact = method.smaller(RunStart(run, work.read))
    if method.searches:
        _check_weights(small)
    notes: dict[str, Any] = {"budget": budget}
    if source_run.needs_source(run.config):
        begun = {"made_from": made_from}
        if method.searches:
            begun = reading.read_description(run.workdir / "search")["notes"]
        notes["origin"] = begun.get("origin") or _origin(run, begun["made_from"])  # earlier code
    if method.fresh:
        run.blueprint.refresh(small)
    else:
        notes["test"] = _test(work, small, "right after pruning")
        given = run.blueprint.weights is not None
        if given:
            notes["given"] = _test(work, run.blueprint.ordinary(), "of the given weights")
        trained = given or method.source == "baseline"
        if trained and not exact and renew(run, small, work.read("train")):
            notes["renewed"] = _test(work, small, "with renewed statistics")
    return networks.save(run, "pruned", small, made_from=made_from, **notes)


@doing("testing what is pruned", "the test of what is pruned")
def _test(work: Work, model: nnx.Module, when: str) -> dict[str, float]:
    setup, batch_size = work.run.setup, 4 * work.run.config.batch_size
    found = evaluate(model, setup.task, work.read("test"), batch_size=batch_size)
    for name, value in found.items():
        if not math.isfinite(value):
            what = f"the test {name} {when} is {value}"
            raise NonFiniteError("converge", what, tested=True)
    return found


def _check_weights(small: nnx.Module) -> None:
    """Raises a `NonFiniteError` if weights that a search has made are not finite.

    They are products of what it trains, and overflow where that is finite.
    """
    for path, leaf in nnx.to_flat_state(nnx.state(small)):
        if not is_finite(value_of(leaf)):
            what = f"the array {path_name(path)!r} of the pruned network is not finite"
            hint = "try a smaller --config.search.learning_rate"
            raise NonFiniteError("search", f"{what}; {hint}", tested=True)


def train_last(work: Work, phase: str, make: Callable[[], nnx.Module], source: str = "") -> None:
    """Carries out the last phase, "converge" or "baseline": leaves the networks `best` and `model`.

    `source` is the digest of the network that `make` gives; "" for one that is not on disk.
    """
    run = work.run
    if from_first(lambda: networks.find_trained(run, phase, source) is not None):
        return
    outcome = _train(work, phase, make(), source=source)
    from_first(lambda: networks.save_trained(run, outcome, work.read("test"), source))


def _train(
    work: Work, name: str, model: nnx.Module, budget: Budget | None = None, source: str = ""
) -> Outcome:
    run, config, settings = work.run, work.run.config, work.run.config[name]
    schedule = schedule_of(run, name)
    phase = Phase(
        name=name,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        learning_rate=schedule,
        optimizer=_optimizer(run, name, schedule, None if budget is None else model),
        budget=budget,
        skip_faulty=config.nonfinite == "skip",
        elementwise=name != "search" or not run.method.fades,
        average=0.0 if name == "search" else config.optimizer.average,
        teacher=_teacher(run, name) if name in TAUGHT else None,
    )
    with contextlib.closing(networks.open_checkpoints(run, name, source)) as checkpoints:
        return train(
            model,
            phase,
            run.setup.task,
            work.read("train"),
            work.read("test"),
            work.read("validation") if "validation" in run.setup.checksums else None,
            examples=run.setup.epoch,
            batch_size=config.batch_size,
            log_every=config.log_every,
            key=jax.random.fold_in(jax.random.key(config.seed), PHASES.index(name)),
            observers=_observers(run, name),
            checkpoints=checkpoints,
            stopping=work.stopping,
            mesh=run.mesh,
        )


def _teacher(run: Run, name: str) -> Teacher | None:
    settings = run.config[name].distillation
    if not settings.weight:
        return None
    model = folder_from_first(run.workdir / "teacher", reading.load)
    return Teacher(model, settings.weight, settings.temperature)


def _optimizer(
    run: Run, name: str, schedule: optax.Schedule, searched: nnx.Module | None
) -> Callable[[Params], optax.GradientTransformation]:
    """Makes the optimizer of a phase, with the proximal step of a search if it is one."""
    settings = run.config.optimizer
    plain = optimizer(
        settings.name,
        schedule,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        decayed=settings.decayed,
        clip=settings.clip,
    )

    def with_proximal_step(params: Params) -> optax.GradientTransformation:
        shrink = shrink_latents(
            params,
            strength=run.config[name].strength,
            schedule=schedule,
            threshold=run.config[name].threshold,
        )
        return optax.chain(plain, shrink)

    if searched is None:
        return lambda params: plain
    if not run.method.fades:
        return with_proximal_step
    steps = most_steps(run, name)
    asked = search_limits(run.config.budget, run.config.target)
    multiple_of = run.config.multiple_of
    least = smallest_ratio(searched, run.cost, multiple_of)["flops"]  # of a share of the time
    asked["flops"] = max(asked["flops"], least)
    given = {"steps": steps, "multiple_of": multiple_of}
    fading = fade_to_budget(plain, searched, run.cost, **given, **asked)
    return lambda params: fading


def _observers(run: Run, phase: str) -> Sequence[Observer]:
    """Who is told of a phase; the journal comes last."""
    if run.journal is None:
        return run.observers
    steps = run.setup.epoch // run.config.batch_size
    field, epochs = f"{phase}.epochs", run.config[phase].epochs
    growth = _Growth(
        steps * read_field(run.workdir, field), lambda: grow(run.workdir, field, epochs)
    )
    return (*run.observers, growth, run.journal)


class _Growth(Observer):
    """Calls a function once a phase goes beyond a number of steps, before they are saved."""

    def __init__(self, steps: int, beyond: Callable[[], None]):
        self.left, self.beyond = steps, beyond

    def begin(self, phase: str, steps: int, done: int, records: Sequence[dict[str, Any]]) -> None:
        self.left -= done

    def step(self, count: int) -> None:
        before, self.left = self.left, self.left - count
        if before >= 0 > self.left:
            self.beyond()
