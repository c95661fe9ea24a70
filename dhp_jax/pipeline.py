"""A run from a configuration: search, prune, converge, or the unpruned baseline.

Every phase ends with a network on disk. A run that is started again in its directory goes on after
the last phase that had ended; all randomness follows from the seed, the phase and the step, so it
ends with the same bits as a run that was never stopped.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from dataclasses import dataclass
import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

from flax import nnx
import jax
from ml_collections import ConfigDict
import optax
from PIL import Image

from dhp_jax import checkpoint, models, report
from dhp_jax.config import ConfigError, check
from dhp_jax.cost import Cost, measure_cost
from dhp_jax.journal import Journal
from dhp_jax.layers import reinitialize
from dhp_jax.names import unknown
from dhp_jax.optimizer import drop_schedule, optimizer, shrink_latents
from dhp_jax.problems import Problem, known_arguments, origins, problem
from dhp_jax.prune import check_axes, check_budget, prune, survivor_counts, survivors_within
from dhp_jax.tasks import evaluate
from dhp_jax.tasks.task import Data, Params
from dhp_jax.train import Budget, Observer, Outcome, Phase, Progress, train

logger = logging.getLogger(__name__)

CONFIG = "config.json"
# Fields that may differ when a run is started again in its directory.
MAY_CHANGE = ("data.dir", "data.archive")
MAY_MOVE = ("data.test_dir",)  # may lie elsewhere, by the same name
PICTURES = 4  # test examples shown in the report, where a task has something to show
PHASES = ("search", "converge", "baseline")  # the position gives each its random stream


@dataclass(frozen=True)
class Run:
    """A run whose configuration, data and directory have been found good.

    Attributes:
      config: its configuration.
      workdir: the directory that it writes to.
      problem: its task and data.
      build: makes the unpruned network of latents.
      cost: of that network.
      observers: told how training goes.
    """

    config: ConfigDict
    workdir: Path
    problem: Problem
    build: Callable[[], nnx.Module]
    cost: Cost
    observers: Sequence[Observer] = ()


def prepare(
    config: ConfigDict, workdir: str | os.PathLike, observers: Sequence[Observer] = ()
) -> Run:
    """Checks everything that can be checked before work is done.

    Args:
      config: see `dhp_jax.config.default`.
      workdir: directory of the run; made if it is not there.
      observers: told how training goes, beside the journal in `workdir`.

    Raises:
      ValueError: a field of `config`, the data, or a `workdir` that cannot be written or is that
        of another configuration; the message names it, its value and what is possible.
    """
    check(config)
    arguments = dict(config.model)
    name = arguments.pop("name", None)
    if name not in models.FAMILIES:
        raise ConfigError(unknown("config.model.name", name, models.FAMILIES))
    for argument, field in origins(config).items():
        if argument in arguments:
            raise ConfigError(
                f"config.model.{argument}: follows from config.{field}, not given here"
            )
    arguments |= known_arguments(config)
    _abstract(name, arguments)  # before the data, which may have to be downloaded
    asked = problem(config)
    arguments |= asked.arguments
    abstract = _abstract(name, arguments)
    cost = measure_cost(abstract, asked.input_shape)
    try:
        check_budget(abstract, cost, config.multiple_of, flops=config.target)
    except ValueError as error:
        field = "config." if str(error).startswith("multiple_of:") else "config.target: "
        raise ConfigError(f"{field}{error}") from error
    check_axes(abstract, asked.input_shape)
    try:
        asked.task.check(abstract)
    except ValueError as error:
        raise ConfigError(f"config.task.{error}") from error
    workdir = Path(workdir)
    _claim(workdir, config)
    observers = (*observers, Journal(workdir))

    def build() -> nnx.Module:
        return models.build(name, **arguments, rngs=nnx.Rngs(config.seed))

    return Run(config, workdir, asked, build, cost, observers)


def _abstract(name: str, arguments: dict[str, Any]) -> nnx.Module:
    try:
        return models.build_abstract(name, **arguments)
    except ValueError as error:
        raise ConfigError(f"config.model: {error}") from error


def execute(run: Run, *, baseline: str | os.PathLike | None = None) -> dict[str, Any]:
    """Carries out a run, or what is left of it, and writes its report.

    Args:
      run: from `prepare`.
      baseline: directory of a finished run with `method="baseline"`, for comparison.

    Returns:
      The summary, as in `summary.json`.
    """

    @functools.cache
    def data(split: str) -> Data:  # a run that is finished reads none
        return run.problem.read(split)

    if run.config.method == "baseline":
        _train_baseline(run, data)
    else:
        _search(run, data)
        _prune(run, data)
        _converge(run, data)
    return report.write(run.workdir, baseline=baseline)


def _train_baseline(run: Run, data: Callable[[str], Data]) -> None:
    if not _done(run, "model"):
        ordinary = prune(run.build())
        gain = run.problem.task.initial_gain
        reinitialize(ordinary, gain=gain, rngs=nnx.Rngs(run.config.seed))
        _save_trained(run, data, _train(run, data, "baseline", ordinary))


def _search(run: Run, data: Callable[[str], Data]) -> None:
    if _done(run, "search"):
        return
    search, cost = run.config.search, run.cost
    budget = Budget(
        ratio=lambda model: cost.ratio(survivor_counts(model, search.threshold)),
        limit=run.config.target + search.stop_limit,
    )
    outcome = _train(run, data, "search", run.build(), budget)
    if not outcome.progress.met_budget:
        logger.warning(
            "search: did not come down to %g of the FLOPs within search.epochs=%d; "
            "pruning to the target %g anyway",
            budget.limit,
            search.epochs,
            run.config.target,
        )
    _save(run, "search", outcome.model, outcome.progress)


def _prune(run: Run, data: Callable[[str], Data]) -> None:
    if _done(run, "pruned"):
        return
    model = checkpoint.load(run.workdir / "search")
    keep = survivors_within(model, run.cost, run.config.multiple_of, flops=run.config.target)
    small = prune(model, keep)
    test = evaluate(small, run.problem.task, data("test"), batch_size=4 * run.config.batch_size)
    _save(run, "pruned", small, test=test)


def _converge(run: Run, data: Callable[[str], Data]) -> None:
    if not _done(run, "model"):
        small = checkpoint.load(run.workdir / "pruned")
        _save_trained(run, data, _train(run, data, "converge", small))


def _train(
    run: Run,
    data: Callable[[str], Data],
    name: str,
    model: nnx.Module,
    budget: Budget | None = None,
) -> Outcome:
    config, settings = run.config, run.config[name]
    steps_per_epoch = run.problem.epoch // config.batch_size
    schedule = drop_schedule(settings.learning_rate, settings.drops, steps_per_epoch)
    plain = optimizer(
        config.optimizer.name,
        schedule,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
    )

    def with_proximal_step(params: Params) -> optax.GradientTransformation:
        shrink = shrink_latents(
            params,
            strength=settings.strength,
            schedule=schedule,
            threshold=settings.threshold,
        )
        return optax.chain(plain, shrink)

    phase = Phase(
        name=name,
        epochs=settings.epochs,
        learning_rate=schedule,
        optimizer=with_proximal_step if budget else lambda params: plain,
        budget=budget,
    )
    return train(
        model,
        phase,
        run.problem.task,
        data("train"),
        data("test"),
        examples=run.problem.epoch,
        batch_size=config.batch_size,
        log_every=config.log_every,
        key=jax.random.fold_in(jax.random.key(config.seed), PHASES.index(name)),
        observers=run.observers,
    )


def _save_trained(run: Run, data: Callable[[str], Data], outcome: Outcome) -> None:
    """Saves the network after its best epoch on the test data, then the last: the run's end."""
    task, test = run.problem.task, data("test")
    for name, images in task.pictures(outcome.model, test, PICTURES):
        folder = run.workdir / report.PICTURES / name
        folder.mkdir(parents=True, exist_ok=True)
        for what, image in images.items():
            Image.fromarray(image.squeeze()).save(folder / f"{what}.png")
    _save(run, "best", outcome.best_model, outcome.progress)
    untouched = task.without_network(test)
    _save(run, "model", outcome.model, outcome.progress, without_network=untouched)


def _save(
    run: Run, name: str, model: nnx.Module, progress: Progress | None = None, **notes: Any
) -> None:
    """Saves a network with what a reader of the file wants to know of it."""
    phase = None if progress is None else dataclasses.asdict(progress)
    checkpoint.save(
        run.workdir / name, model, input_shape=run.problem.input_shape, phase=phase, **notes
    )


def _done(run: Run, name: str) -> bool:
    return checkpoint.exists(run.workdir / name)


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Makes the directory of a run, or finds that it belongs to a run of this configuration."""
    wanted = json.loads(config.to_json_best_effort())
    path = workdir / CONFIG
    if path.is_file():
        try:
            there = _flat(dict(json.loads(path.read_text())))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"workdir: {path} is no configuration: {error}") from error
        here = _flat(wanted)
        differing = [
            name
            for name in {**here, **there}
            if there.get(name) != here.get(name)
            and name not in MAY_CHANGE
            and not (name in MAY_MOVE and _same_name(there.get(name), here.get(name)))
        ]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"workdir: {workdir} holds a run with another configuration: config.{name} is "
                f"{there.get(name)!r} there and {here.get(name)!r} here"
                f"{f' ({len(differing)} fields differ)' if len(differing) > 1 else ''}; "
                "give another --workdir"
            )
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise ConfigError(f"workdir: expected a new or empty directory, or a run's; got {workdir}")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=1))
    except OSError as error:
        raise ConfigError(
            f"workdir: expected a directory that can be written; got {str(workdir)!r} "
            f"({error.strerror})"
        ) from error


def _same_name(*paths: str | None) -> bool:
    return len({path and Path(path).name for path in paths}) == 1


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat
