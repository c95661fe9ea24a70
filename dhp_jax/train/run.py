"""What the training loop works with: what a phase is made of, and how far it has come."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.sharding import Mesh
from jax.tree_util import PyTreeDef
from jaxtyping import Array

from dhp_jax.distributed.processes import Turns
from dhp_jax.tasks.task import Metric, Params
from dhp_jax.train.checkpoints import Checkpoints
from dhp_jax.train.phase import Observer, Phase, Progress
from dhp_jax.train.state import StepDone, TrainState


class Layout(NamedTuple):
    """How a network and its training state are put together from arrays.

    `graphdef` is the network's structure, and `structure` the state's. `here` are shapes of the
    state's arrays on the device, and `saved` shapes of the same arrays in networks and files.
    """

    graphdef: nnx.GraphDef
    structure: PyTreeDef
    here: TrainState
    saved: TrainState


@dataclass(frozen=True)
class Hooks:
    """Whom the loop tells, and asks, between steps; see `train`."""

    observers: Sequence[Observer]
    checkpoints: Checkpoints | None
    stopping: Callable[[], bool]
    turns: Turns


@dataclass(frozen=True)
class Plan:
    """What stays the same during a phase.

    Attributes:
      phase, batch_size, log_every, mesh: see `train`.
      metric: the task's, by which the best network is chosen.
      steps_per_epoch: training steps.
      calls_ahead: calls of the step that the device has while the host is at the next one.
      layout: of the network and its state.
      history: jitted; vectors of the budget that every record keeps, or `None`.
      origin: what tells this phase's data from others; checkpoints have it.
      hooks: observers, checkpoints, and who may stop training.
    """

    phase: Phase
    metric: Metric
    batch_size: int
    steps_per_epoch: int
    log_every: int
    mesh: Mesh | None
    calls_ahead: int
    layout: Layout
    history: Callable[[Params, nnx.State], dict[str, Array]] | None
    origin: Mapping[str, int]
    hooks: Hooks

    @property
    def last_step(self) -> int:
        """The number of the phase's last step, if no budget ends it before."""
        steps = self.phase.epochs * self.steps_per_epoch
        return steps if self.phase.max_steps is None else min(steps, self.phase.max_steps)


class Run(NamedTuple):
    """How far a phase has come; functions of the loop take one and return the next.

    Attributes:
      arrays: leaves of the `TrainState` after all calls of the step so far.
      progress: what is known of the phase; its steps are those of all calls so far.
      began: reading of the clock at which the phase began, without pauses between processes.
      records: of all steps so far.
      best: parameters and BatchNorm statistics of the best network, if there is one.
      in_flight: calls that the host has not waited for.
      told: how many steps observers know of.
      met_budget: whether the budget is known to be met.
      clock: time and step from which the speed of training is measured.
      compiled: whether the step was called in this process.
      test_seconds: how long the last test took.
    """

    arrays: list[Array]
    progress: Progress = Progress()
    began: float = 0.0
    records: tuple[dict[str, Any], ...] = ()
    best: tuple[Params, nnx.State] | None = None
    in_flight: tuple[StepDone, ...] = ()
    told: int = 0
    met_budget: bool = False
    clock: tuple[float, int] = (0.0, 0)
    compiled: bool = False
    test_seconds: float = 0.0


def state_of(plan: Plan, run: Run) -> TrainState:
    """The training state after all calls of the step so far."""
    return jax.tree.unflatten(plan.layout.structure, run.arrays)
