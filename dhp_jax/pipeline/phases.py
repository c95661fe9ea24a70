"""A run from a configuration: search, prune, converge, or another of the methods in methods.py.

Every phase ends with a network on disk, and keeps checkpoints on its way there. A run that is
started again in its directory goes on from what it finds whole of these; all randomness follows
from the seed, the phase and the step, so it ends with the same bits as a run that was never
stopped.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import logging
from typing import Any

from flax import nnx
import jax
import optax
from PIL import Image

from dhp_jax.artifact import reading, writing
from dhp_jax.artifact.description import ArtifactError
from dhp_jax.artifact.reading import exists, read_description, verify
from dhp_jax.budgets.chosen import Chosen
from dhp_jax.budgets.counted import BudgetError, Scores, limits
from dhp_jax.budgets.importance import l1_scores, random_scores, uniform_within
from dhp_jax.budgets.latency import clock
from dhp_jax.budgets.selection import Selection, choose
from dhp_jax.config.methods import METHODS
from dhp_jax.core.latent import latents
from dhp_jax.core.surgery import prune
from dhp_jax.core.survivors import latent_history, survivor_counts
from dhp_jax.distributed.processes import folder_from_first, from_first, is_first
from dhp_jax.errors import ConfigError
from dhp_jax.pipeline.preparation import PHASES, Run, counted
from dhp_jax.pruned.fresh_weights import carry_kernels, reinitialize
from dhp_jax.report.wording import in_words
from dhp_jax.tasks import evaluate
from dhp_jax.tasks.task import Params
from dhp_jax.train.checkpoints import Checkpoints
from dhp_jax.train.loop import train
from dhp_jax.train.optimizer import drop_schedule, optimizer, shrink_latents
from dhp_jax.train.phase import Budget, Observer, Outcome, Phase, Progress
from dhp_jax.workdir import reader, source_run
from dhp_jax.workdir.identity import CHECKPOINTS, grow, plain, stored

logger = logging.getLogger(__name__)


PICTURES = 4  # test examples shown in the report, where a task has something to show


Smaller = tuple[nnx.Module, dict[str, Any]]  # a network just after pruning, and what is noted of it


class _Growth:
    """Calls a function once a phase goes beyond a number of steps, before they are saved."""

    def __init__(self, steps: int, beyond: Callable[[], None]):
        self.left, self.beyond = steps, beyond

    def begin(self, phase: str, steps: int, done: int, records: Sequence[dict[str, Any]]) -> None:
        self.left -= done

    def step(self, count: int) -> None:
        before, self.left = self.left, self.left - count
        if before >= 0 > self.left:
            self.beyond()

    def record(self, values: dict[str, Any]) -> None:
        pass

    def end(self) -> None:
        pass


class _Work:
    """The phases of a run.

    Each is done if what it leaves is on disk, whole, and made from what the phase before it has
    left; the digest of that is noted as `made_from`. Of several processes all train, and the first
    alone reads and writes the directory.
    """

    def __init__(self, run: Run, stopping: Callable[[], bool]):
        self.run, self.config, self.stopping = run, run.config, stopping
        self.method = METHODS[run.config.method]
        self.data = functools.cache(run.problem.read)  # a run that is finished reads none

    def train_baseline(self) -> None:
        if from_first(lambda: self._trained("baseline", source="")):
            return
        outcome = self._train("baseline", self._renewed(prune(self.run.build())))
        from_first(lambda: self._save_trained(outcome, source=""))

    def _renewed(self, model: nnx.Module) -> nnx.Module:
        """An ordinary network that nothing was trained of, with the fresh weights of a baseline."""
        reinitialize(model, rngs=nnx.Rngs(self.config.seed))
        return model

    def start(self) -> str:
        """Returns the digest of the network that channels are taken from; "" for an untrained."""
        if "search" in self.method.phases:
            return self.search()
        if self.method.source is None:
            return ""
        return from_first(lambda: source_run.made_from(self.config, self.run.workdir))

    def search(self) -> str:
        """Returns the digest of the network at the end of the search."""
        found = from_first(lambda: self._found("search"))
        if found and from_first(lambda: self._complete("search", found)):
            from_first(lambda: self._mend_records("search", found))
            return found["sha256"]
        settings, cost = self.config.search, self.run.cost
        asked = limits(self.config.budget, self.config.target)
        budget = Budget(
            shares=lambda model: cost.shares(survivor_counts(model, settings.threshold)),
            limits={name: share + settings.stop_limit for name, share in asked.items()},
            history=lambda model: latent_history(model, settings.threshold),
        )
        outcome = self._train("search", self.run.build(), budget)
        if not outcome.progress.met_budget and is_first():
            logger.warning(
                "search: did not come down to %s within search.epochs=%d; pruning to %s anyway",
                in_words(budget.limits),
                settings.epochs,
                in_words(asked),
            )
        return from_first(lambda: self._save("search", outcome.model, outcome.progress))

    def prune(self, made_from: str) -> str:
        """Returns the digest of the network just after pruning."""
        return from_first(lambda: self._prune(made_from))

    def _prune(self, made_from: str) -> str:
        found = self._found("pruned")
        if found and found["notes"]["made_from"] == made_from:
            return found["sha256"]
        small, notes = SMALLER[self.config.method](self)
        if not self.method.fresh:
            test, batch = self.data("test"), 4 * self.config.batch_size
            notes["test"] = evaluate(small, self.run.problem.task, test, batch_size=batch)
        return self._save("pruned", small, made_from=made_from, **notes)

    def searched(self) -> Smaller:
        """By the latents at the end of the search."""
        return self._within(reading.load(self.run.workdir / "search"))

    def uniform(self) -> Smaller:
        """One share of all latents, with fresh weights."""
        small, notes = self._within(self.run.build(), uniform_within)
        return self._renewed(small), notes

    def at_random(self) -> Smaller:
        """Any channels of a trained network."""
        model, origin = self._trained_before()
        return self._within(model, random_scores(model, self.config.seed), origin=origin)

    def by_norm(self) -> Smaller:
        """The channels of a trained network with the largest filters."""
        model, origin = self._trained_before()
        return self._within(model, l1_scores(model), origin=origin)

    def as_found(self) -> Smaller:
        """The channels that another run has kept, with fresh weights."""
        model, found = self.run.build(), source_run.read(self.config)
        sizes = {name: z.size for name, z in latents(model).items()}
        notes = {"budget": found.budget, "origin": dict(found.origin)}
        return self._renewed(prune(model, found.masks(sizes))), notes

    def _trained_before(self) -> tuple[nnx.Module, dict[str, Any]]:
        """The trained network of the source as one of latents, and what it cost."""
        model, found = self.run.build(), source_run.read(self.config)
        carry_kernels(reading.load(found.path), model)
        return model, dict(found.origin)

    def _within(
        self, model: nnx.Module, by: Scores | Selection | None = None, **notes: Any
    ) -> Smaller:
        """What is left of a network within all budgets, and what is noted of it."""
        chosen = self._chosen(model, by)
        return prune(model, chosen.masks), {"budget": chosen.notes(), **notes}

    def _chosen(self, model: nnx.Module, by: Scores | Selection | None) -> Chosen:
        """The survivors within all budgets."""
        config, run, timed = self.config, self.run, None
        if config.budget.latency is not None:
            timed = clock(model, run.problem.input_shape, config.budget.batch or 1)
        try:
            return choose(
                model,
                run.cost,
                config.multiple_of,
                by=by,
                latency=config.budget.latency,
                timed=timed,
                **counted(config),
            )
        except BudgetError as error:  # the smallest network has become too slow
            kept = run.workdir / "search"
            hint = f"; the search is kept in {kept}, for dhp.prune_to" if kept.exists() else ""
            raise ConfigError.of(f"config.budget.{error.field}", error, hint) from error

    def converge(self, source: str) -> None:
        if not from_first(lambda: self._trained("converge", source)):
            small = folder_from_first(self.run.workdir / "pruned", reading.load)
            outcome = self._train("converge", small, source=source)
            from_first(lambda: self._save_trained(outcome, source))

    def _train(
        self, name: str, model: nnx.Module, budget: Budget | None = None, source: str = ""
    ) -> Outcome:
        config, settings, problem = self.config, self.config[name], self.run.problem
        schedule = drop_schedule(
            settings.learning_rate, settings.drops, problem.epoch // config.batch_size
        )
        phase = Phase(
            name=name,
            epochs=settings.epochs,
            learning_rate=schedule,
            optimizer=self._optimizer(name, schedule, proximal=budget is not None),
            budget=budget,
            skip_faulty=config.nonfinite == "skip",
            elementwise=True,
        )
        with contextlib.closing(self._checkpoints(name, source)) as checkpoints:
            return train(
                model,
                phase,
                problem.task,
                self.data("train"),
                self.data("test"),
                examples=problem.epoch,
                batch_size=config.batch_size,
                log_every=config.log_every,
                key=jax.random.fold_in(jax.random.key(config.seed), PHASES.index(name)),
                observers=self._observers(name),
                checkpoints=checkpoints,
                stopping=self.stopping,
                mesh=self.run.mesh,
            )

    def _observers(self, phase: str) -> Sequence[Observer]:
        if self.run.journal is None:
            return self.run.observers
        steps = self.run.problem.epoch // self.config.batch_size
        field, epochs = f"{phase}.epochs", self.config[phase].epochs
        growth = _Growth(
            steps * stored(self.run.workdir, field),
            lambda: grow(self.run.workdir, field, epochs),
        )
        return (*self.run.observers, growth, self.run.journal)

    def _optimizer(
        self, name: str, schedule: optax.Schedule, *, proximal: bool
    ) -> Callable[[Params], optax.GradientTransformation]:
        settings = self.config.optimizer
        plain = optimizer(
            settings.name,
            schedule,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )

        def with_proximal_step(params: Params) -> optax.GradientTransformation:
            shrink = shrink_latents(
                params,
                strength=self.config[name].strength,
                schedule=schedule,
                threshold=self.config[name].threshold,
            )
            return optax.chain(plain, shrink)

        return with_proximal_step if proximal else lambda params: plain

    def _save_trained(self, outcome: Outcome, source: str) -> None:
        """Saves the network after its best epoch on the test data, then the last: the run's end."""
        task, test, workdir = self.run.problem.task, self.data("test"), self.run.workdir
        for name, images in task.pictures(outcome.model, test, PICTURES):
            folder = workdir / reader.PICTURES / name
            folder.mkdir(parents=True, exist_ok=True)
            for what, image in images.items():
                Image.fromarray(image.squeeze()).save(folder / f"{what}.png")
        self._save("best", outcome.best_model, outcome.progress, made_from=source)
        self._save(
            "model",
            outcome.model,
            outcome.progress,
            made_from=source,
            without_network=task.without_network(test),
        )

    def _save(
        self, name: str, model: nnx.Module, progress: Progress | None = None, **notes: Any
    ) -> str:
        """Saves a network with what a reader of the file wants to know; returns its digest."""
        path = self.run.workdir / name
        phase = None if progress is None else dataclasses.asdict(progress)
        shape = self.run.problem.input_shape
        noted = {**self.run.problem.notes, **notes, "run": self._asked()}
        writing.save(path, model, input_shape=shape, phase=phase, **noted)
        return read_description(path)["sha256"]

    def _asked(self) -> dict[str, Any]:
        """What was asked of the run, by the names of the configuration: it tells a network's origin
        where the run's directory is not at hand."""
        fields = ("method", "seed")
        if self.method.chooses:
            fields += ("target", "budget", "multiple_of")
        config = plain(self.config)
        data = {"name": config["data"]["name"], "checksums": dict(self.run.problem.checksums)}
        return {name: config[name] for name in fields} | {"data": data}

    def _trained(self, phase: str, source: str) -> bool:
        """Whether both networks of the last phase are there."""
        found = [self._found(name) for name in ("best", "model")]
        trained = all(
            each and each["notes"]["made_from"] == source and self._complete(phase, each, source)
            for each in found
        )
        if trained:
            self._mend_records(phase, found[-1], source)
        return trained

    def _complete(self, phase: str, found: dict[str, Any], source: str = "") -> bool:
        """Whether a network was trained for as long as the configuration says.

        Raises:
          ConfigError: it was not, and there is no checkpoint from which it could be.
        """
        progress, epochs = found["notes"]["phase"], self.config[phase].epochs
        if progress["met_budget"] or progress["epochs"] >= epochs:
            return True
        if not self._checkpoints(phase, source).steps():
            raise ConfigError(
                f"config.{phase}.epochs",
                f"at most {progress['epochs']}, for the checkpoints from which more could "
                "follow are gone",
                epochs,
            )
        return False

    def _mend_records(self, phase: str, found: dict[str, Any], source: str = "") -> None:
        """Puts back records of a phase that has ended, where its last checkpoint has them."""
        end = found["notes"]["phase"]
        with contextlib.closing(self._checkpoints(phase, source)) as checkpoints:
            for step in checkpoints.steps()[:1]:
                try:
                    notes, _ = checkpoints.notes(step)
                except Exception as error:  # whatever a damaged file may raise
                    logger.warning("%s: step %d: %s", checkpoints.folder, step, error)
                else:
                    reached = notes["progress"]  # its last step may be saved before it is tested
                    same = all(reached[name] == end[name] for name in ("steps", "epochs"))
                    if notes["source"] == source and same:
                        self.run.journal.mend(phase, notes["records"])

    def _checkpoints(self, phase: str, source: str) -> Checkpoints:
        return Checkpoints(
            self.run.workdir / CHECKPOINTS / phase,
            source=source,
            keep=self.config.checkpoint.keep,
            seconds=self.config.checkpoint.seconds,
        )

    def _found(self, name: str) -> dict[str, Any] | None:
        """What a network on disk says of itself, if it is there and whole."""
        path = self.run.workdir / name
        if not exists(path):
            return None
        try:
            return verify(path)
        except ArtifactError as error:
            logger.warning("%s; it is made again", error)
            return None


SMALLER: Mapping[str, Callable[[_Work], Smaller]] = {  # how each method makes a network smaller
    "dhp": _Work.searched,
    "uniform": _Work.uniform,
    "random": _Work.at_random,
    "l1_norm": _Work.by_norm,
    "scratch": _Work.as_found,
}
