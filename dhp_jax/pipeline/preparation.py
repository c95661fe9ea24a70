"""Checks a run before any work is done: its configuration, data and directory."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
from dataclasses import dataclass
import os
from pathlib import Path

from flax import nnx
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import optax

from dhp_jax.activity import doing
from dhp_jax.budgets.axes import check_axes
from dhp_jax.budgets.counted import check_budget, counted_limits
from dhp_jax.budgets.gradual import STAGES
from dhp_jax.budgets.latency import check_latency, clock
from dhp_jax.config.checks import check
from dhp_jax.config.methods import METHODS, PHASES, Method
from dhp_jax.core.cost import Cost
from dhp_jax.distributed.mesh import DATA, check_divisible, make_mesh
from dhp_jax.distributed.processes import from_first, is_first
from dhp_jax.errors import ArgumentError, ConfigError, FieldError
from dhp_jax.pipeline.blueprint import Blueprint, abstract, begin, complete
from dhp_jax.pipeline.setup import TaskSetup, set_up
from dhp_jax.tracing.counts import measure_cost
from dhp_jax.train.phase import Observer
from dhp_jax.train.schedules import make_schedule
from dhp_jax.workdir import source_run
from dhp_jax.workdir.identity import (
    CONFIG,
    check_directory,
    hold,
    read_data_choice,
    settle_data,
)
from dhp_jax.workdir.metrics import Journal

MAX_STEPS = 2**31 - 1  # they are counted in int32


@dataclass(frozen=True)
class Run:
    """A run whose configuration, data and directory have passed all checks.

    Attributes:
      config, workdir: its configuration, and the directory that it writes to.
      setup: its task and data.
      blueprint, cost: how its unpruned network is made, and what that costs.
      journal: writes its records; `None` in all processes but the first.
      observers: are told how training goes, as the journal is; in the first process.
      mesh: the devices, if there are several.
    """

    config: ConfigDict
    workdir: Path
    setup: TaskSetup
    blueprint: Blueprint
    cost: Cost
    journal: Journal | None
    observers: Sequence[Observer] = ()
    mesh: Mesh | None = None

    @property
    def method(self) -> Method:
        """The method of its configuration."""
        return METHODS[self.config.method]


@doing("checking the run")
def prepare(
    config: ConfigDict, workdir: str | os.PathLike, observers: Sequence[Observer] = ()
) -> Run:
    """Checks everything that can be checked before any work is done.

    Args:
      config: see `dhp_jax.config.default`.
      workdir: directory of the run; made if it is not there.
      observers: are told how training goes, as the journal in `workdir` is.

    Raises:
      ValueError: a field of `config` or the data are wrong; or `workdir` cannot be written, or
        belongs to another configuration. The message names the field, its value and what is
        possible.
    """
    check(config)
    method = METHODS[config.method]
    if config.targets is not None and method.prunes:
        raise ConfigError(
            "config.targets",
            "None for a single run, for `dhp_jax.targets` carries out several",
            tuple(config.targets),
        )
    from_first(lambda: check_directory(workdir, config))
    mesh = make_mesh(config.mesh.data, config.mesh.model)
    if mesh is not None:
        check_divisible(config.batch_size, mesh.shape[DATA], jax.process_count())
    blueprint = begin(config)
    origin = {"config.model.weights": blueprint.digest}
    if source_run.needs_source(config):
        origin = {"config.source": from_first(lambda: source_run.find_digest(config, workdir))}
    asked = _agree_on_setup(config, workdir)
    blueprint = complete(config, blueprint, asked)
    model = abstract(config, blueprint)
    if source_run.needs_source(config):
        from_first(lambda: source_run.check(config, workdir, asked.checksums, model))
    if method.fades:
        _check_stages(config, asked.epoch)
    with doing("counting FLOPs and params"):
        cost = measure_cost(model, asked.input_shape)
    try:
        check_budget(model, cost, config.multiple_of, **counted_budgets(config))
    except FieldError as error:
        raise _of_budget(config, error) from error
    with doing("checking which channels go together"):
        check_axes(model, asked.input_shape)
    with name_method(config):
        method.check(model)
    try:
        asked.task.check(model)
    except FieldError as error:
        raise ConfigError.of(f"config.task.{error.field}", error) from error

    workdir = Path(workdir)
    if method.chooses and config.budget.latency is not None:
        from_first(
            lambda: _check_latency(config, workdir, blueprint.build, cost, asked.input_shape)
        )
    with hold_by_first(workdir, config):  # so that an error comes now
        from_first(lambda: settle_data(workdir, asked.streamed, asked.checksums, origin))
    journal = Journal(workdir, PHASES) if is_first() else None

    told = observers if is_first() else ()
    return Run(config, workdir, asked, blueprint, cost, journal, told, mesh)


def counted_budgets(config: ConfigDict) -> dict[str, float]:
    """The budgets that are counted, as shares by name; of the FLOPs the smallest one."""
    return counted_limits(config.budget, config.target)


def _of_budget(config: ConfigDict, error: FieldError) -> ConfigError:
    """What an error of `check_budget` says, of the fields that it is about."""
    floors = "config.search.min_channels=1"
    floors += " and config.search.keep=0" * bool(config.search.keep)
    told = error.detail.replace("min_channels=1", floors)
    if error.field == "flops" and config.target <= (config.budget.flops or 1):
        return ConfigError("config.target", error.expected, error.got, f"flops: {told}")
    field = error.field if error.field == "multiple_of" else f"budget.{error.field}"
    return ConfigError(f"config.{field}", error.expected, error.got, told)


def most_steps(run: Run, phase: str) -> int:
    """How many steps a phase takes if no budget ends it before."""
    return _length(run.config, run.setup.epoch, phase)[0]


def length_field(run: Run, phase: str) -> str:
    """What ends a phase if no budget does, such as "search.epochs=100"."""
    _, name = _length(run.config, run.setup.epoch, phase)
    return f"{phase}.{name}={run.config[phase][name]}"


def _length(config: ConfigDict, epoch: int, phase: str) -> tuple[int, str]:
    """How many steps a phase takes at most, and the field that says so."""
    most = config[phase].max_steps
    steps = config[phase].epochs * (epoch // config.batch_size)
    return (steps, "epochs") if most is None or steps <= most else (most, "max_steps")


def _check_stages(config: ConfigDict, epoch: int) -> None:
    """Raises unless a search that fades channels has a step for each of its parts."""
    steps, name = _length(config, epoch, "search")
    if steps <= STAGES:
        raise ConfigError(
            f"config.search.{name}",
            f"more than {STAGES} steps for config.method={config.method}",
            f"{config.search[name]}, which is {steps}",
        )


def schedule_of(run: Run, phase: str) -> optax.Schedule:
    """The learning rate of each step of a phase."""
    settings = run.config[phase]
    return make_schedule(
        settings.schedule,
        settings.learning_rate,
        epochs=settings.epochs,
        drops=settings.drops,
        warmup=settings.warmup,
        steps_per_epoch=run.setup.epoch // run.config.batch_size,
    )


@doing("timing the smallest network")
def _check_latency(
    config: ConfigDict,
    workdir: Path,
    build: Callable[[], nnx.Module],
    cost: Cost,
    input_shape: tuple[int, ...],
) -> None:
    """Raises if a run has not begun and its smallest network exceeds the latency budget."""
    if (workdir / CONFIG).is_file():
        return
    model = build()
    timed = clock(model, input_shape, config.budget.batch or 1)
    try:
        check_latency(model, cost, config.budget.latency, timed, config.multiple_of)
    except FieldError as error:
        raise ConfigError.of(f"config.budget.{error.field}", error) from error


@contextlib.contextmanager
def hold_by_first(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Locks the directory of a run, in the first process, while the block runs."""
    with contextlib.ExitStack() as stack:
        from_first(lambda: stack.enter_context(hold(workdir, config)))
        yield


def _agree_on_setup(config: ConfigDict, workdir: str | os.PathLike) -> TaskSetup:
    """The task and its data, alike in all processes; streamed if they were when the run began."""
    known = from_first(lambda: [config.to_json_best_effort(), read_data_choice(workdir)])
    if config.to_json_best_effort() != known[0]:
        raise ConfigError(
            "config", detail="expected that of the first process; this one has another"
        )
    found = _set_up(config, known[1])
    agreed = from_first(lambda: [found.streamed, found.checksums])
    if agreed[0] != found.streamed:
        found = _set_up(config, agreed[0])
    if agreed[1] != found.checksums:
        raise ConfigError(
            "config.data", detail="expected the images of the first process; these are others"
        )
    return found


@doing("looking at the data")
def _set_up(config: ConfigDict, streamed: bool | None) -> TaskSetup:
    """The task and its data, with few enough steps in each phase."""
    with name_data_fields():
        found = set_up(config, streamed)
    steps = found.epoch // config.batch_size
    for phase in PHASES:
        if config[phase].epochs * steps > MAX_STEPS:
            raise ConfigError(
                f"config.{phase}.epochs",
                f"at most {MAX_STEPS // steps}, of {steps} steps each",
                config[phase].epochs,
            )
    return found


@contextlib.contextmanager
def name_method(config: ConfigDict) -> Iterator[None]:
    """A network in the block that the method cannot prune is told as an error of that field."""
    try:
        yield
    except ArgumentError as error:
        detail = f"{config.method} cannot prune this network: {error.detail}"
        raise ConfigError("config.method", detail=detail) from error


@contextlib.contextmanager
def name_data_fields() -> Iterator[None]:
    """An error in the block about a field such as "data.dir" names it "config.data.dir"."""
    try:
        yield
    except FieldError as error:
        if not error.field.startswith("data."):
            raise
        raise type(error).of(f"config.{error.field}", error) from error
