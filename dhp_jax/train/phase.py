"""A phase of training: its settings, its observers, and its result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flax import nnx
from jaxtyping import Array
import optax

from dhp_jax.errors import FieldError
from dhp_jax.tasks.task import Params

NETWORKS = {
    "search": "searched network",
    "converge": "pruned network",
    "baseline": "unpruned network",
}


class Stopped(Exception):
    """Training was asked to stop, saved its state, and stopped."""


class OriginError(FieldError):
    """A phase cannot go on with other data than it began with."""


class Observer(Protocol):
    """Something that is told how training goes, such as a progress bar.

    What a class that derives from it leaves out does nothing.

    `begin` is told the most steps that the phase may take, how many of them were taken before the
    phase was stopped, and the records of those. `step` is told how many steps were taken, `record`
    what was measured.
    """

    def begin(
        self, phase: str, steps: int, done: int, records: Sequence[dict[str, Any]]
    ) -> None: ...
    def step(self, count: int) -> None: ...
    def record(self, values: dict[str, Any]) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class Budget:
    """A stop rule: training ends with the first step after which no share is above its limit.

    Attributes:
      shares: from a model to shares of FLOPs, params and activations by name, as `Cost.shares`;
        called in a jitted function.
      limits: of some of these, by name.
      history: from a model to vectors by name, which every record keeps; called in a jitted
        function.
    """

    shares: Callable[[nnx.Module], Mapping[str, Array]]
    limits: Mapping[str, float]
    history: Callable[[nnx.Module], dict[str, Array]] = lambda model: {}


@dataclass(frozen=True)
class Teacher:
    """A network whose outputs another one learns.

    Attributes:
      model: the network; its mode does not matter, it is used in evaluation mode.
      weight: share of the loss that compares with its outputs, between 0 and 1.
      temperature: see `Task.distillation`.
    """

    model: nnx.Module
    weight: float
    temperature: float


@dataclass(frozen=True)
class Phase:
    """The settings of a phase of training: search, converge, or the unpruned baseline.

    Attributes:
      name: in records and seeds.
      epochs: how many at most.
      learning_rate: of each step, for the records.
      optimizer: makes the optimizer of `(latent vectors, other parameters)`.
      budget: a rule that ends the phase early.
      skip_faulty: whether a batch is left out, and counted, after which anything would not be
        finite. Otherwise a loss or latent that is not finite ends training.
      average: decay of the moving average of the weights that is tested and kept; 0 tests and
        keeps the weights themselves.
      teacher: what the network learns from besides its targets.
      elementwise: whether the optimizer treats each number by itself, whatever the shape of its
        array, as SGD and Adam do. Then a TPU keeps hypernetworks in a shape that it reads faster.
      max_steps: how many steps at most; `None` for those of all epochs. It may end within an epoch.
    """

    name: str
    epochs: int
    learning_rate: optax.Schedule
    optimizer: Callable[[Params], optax.GradientTransformation]
    budget: Budget | None = None
    skip_faulty: bool = False
    elementwise: bool = False
    average: float = 0.0
    teacher: Teacher | None = None
    max_steps: int | None = None

    @property
    def network(self) -> str:
        """What is trained, in words."""
        return NETWORKS.get(self.name, f"network of the {self.name} phase")

    @property
    def step(self) -> str:
        """The program of a training step, in words."""
        return "the search step" if self.budget else f"the training step of the {self.network}"


@dataclass(frozen=True)
class Progress:
    """How far a phase has come, in numbers; checkpoints and summaries have these fields.

    Attributes:
      epochs, steps: how many were taken; an epoch counts once it was tested.
      seconds: how long they took, tests included.
      met_budget: whether the stop rule ended the phase.
      last: metrics of the last epoch on the test data, by name.
      best: those of the best epoch by the task's metric.
      best_epoch: its number, from 1.
      validation: if examples are held out, which choose the best epoch, their metrics in the last
        epoch and in the best one, by "last" and "best".
      skipped: how many batches were left out because of `Phase.skip_faulty`.
    """

    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    met_budget: bool = False
    last: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_epoch: int = 0
    skipped: int = 0
    validation: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The result of a phase: the model after its last epoch, and after its best one.

    A phase with a budget keeps no best model. There `best_model` is the last one.
    """

    model: nnx.Module
    best_model: nnx.Module
    progress: Progress
