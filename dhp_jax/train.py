"""The one training loop: search, converge and the unpruned baseline are phases of it."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
from dataclasses import dataclass
import math
import time
from typing import Any, NamedTuple, Protocol

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import optax

from dhp_jax.backend import compiler_options, tune
from dhp_jax.latent import LatentVector
from dhp_jax.tasks.task import Data, Params, Task


class Observer(Protocol):
    """Someone to tell how training goes."""

    def begin(self, phase: str, steps: int) -> None: ...
    def step(self) -> None: ...
    def record(self, values: dict[str, Any]) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class Budget:
    """A stop rule: train until `ratio(model)[0] <= limit`."""

    ratio: Callable[[nnx.Module], tuple[Array, Array]]  # shares of FLOPs and params; jitted
    limit: float


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
      name: in records and seeds.
      epochs: how many at most.
      learning_rate: of each step, for the records.
      optimizer: makes the transformation of `(latent vectors, other parameters)`.
      budget: a rule that ends the phase early.
    """

    name: str
    epochs: int
    learning_rate: optax.Schedule
    optimizer: Callable[[Params], optax.GradientTransformation]
    budget: Budget | None = None


@dataclass(frozen=True)
class Progress:
    """How a phase went, in numbers.

    Attributes:
      epochs, steps: how many there were.
      seconds: how long they took, tests included.
      met_budget: whether the stop rule ended the phase.
      last: metrics of the last epoch on the test data, by name.
      best: those of the epoch that was best by the task's metric.
      best_epoch: its number, from 1.
    """

    epochs: int
    steps: int
    seconds: float
    met_budget: bool
    last: dict[str, float]
    best: dict[str, float]
    best_epoch: int


@dataclass(frozen=True)
class Outcome:
    """What a phase came to: the model after its last epoch, and after its best on the test data.

    A phase with a budget keeps no best model; the last stands in for it.
    """

    model: nnx.Module
    best_model: nnx.Module
    progress: Progress


class Measures(NamedTuple):
    """Sums over examples, kept on the device."""

    loss: Float[Array, ""]
    score: Float[Array, ""]  # the task's metric
    examples: Int[Array, ""]

    @classmethod
    def zero(cls) -> "Measures":
        return cls(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))

    def means(self) -> tuple[float, float]:
        """Mean loss and score; waits for the device."""
        loss, score, examples = jax.device_get(self)
        return float(loss / examples), float(score / examples)


class TrainState(NamedTuple):
    """All that a step changes."""

    params: Params
    rest: nnx.State  # BatchNorm statistics
    opt_state: optax.OptState
    step: Int[Array, ""]
    measures: Measures  # since they were last read


def train(
    model: nnx.Module,
    phase: Phase,
    task: Task,
    train_data: Data,
    test_data: Data,
    *,
    examples: int,
    batch_size: int,
    log_every: int,
    key: Key[Array, ""],
    observers: Sequence[Observer] = (),
) -> Outcome:
    """Trains a model for a phase and tests it after every epoch.

    Every epoch goes through a new permutation of the examples; those left over at its end, fewer
    than a batch, wait for another epoch. All randomness follows from `key` and the step's number.

    Args:
      model: a network, with or without latents; left as it was.
      phase: what to do.
      task: losses, errors, and how examples become inputs.
      train_data, test_data: what the task reads its examples from.
      examples: how many training examples make an epoch.
      batch_size: examples in a step.
      log_every: steps between records, and between looks at the budget.
      key: random key of this phase.
      observers: told of every step, every `log_every` steps and every epoch.

    Returns:
      The trained model after the last epoch and after the best one, by the task's metric.

    Raises:
      ValueError: `batch_size` larger than `examples`.
      FloatingPointError: a loss that is not finite.
    """
    if not 0 < batch_size <= examples:
        raise ValueError(
            f"batch_size: expected 1 to {examples} (the examples of an epoch), got {batch_size}"
        )
    loop = _Loop(model, phase, task, train_data, examples, batch_size, log_every, key, observers)
    evaluate = task.evaluation(model, test_data, batch_size=4 * batch_size)
    name = task.metric.name
    started = time.perf_counter()
    last, best, best_epoch, best_state = {}, {}, 0, None
    met_budget, epoch = False, 0
    with _told(observers, phase.name, phase.epochs * loop.steps_per_epoch):
        while epoch < phase.epochs and not met_budget:
            epoch += 1
            values, met_budget = loop.run_epoch(epoch)
            last = evaluate(loop.state.params, loop.state.rest)
            for what, value in last.items():
                loop.check_finite(f"test {what}", value)
            loop.record(values | {f"test_{what}": value for what, value in last.items()})
            if task.metric.better(last[name], best.get(name)):
                best, best_epoch = last, epoch
                best_state = None if phase.budget else _copy((loop.state.params, loop.state.rest))
    progress = Progress(
        epochs=epoch,
        steps=loop.steps,
        seconds=time.perf_counter() - started,
        met_budget=met_budget,
        last=last,
        best=best,
        best_epoch=best_epoch,
    )
    trained = loop.model(loop.state.params, loop.state.rest)
    return Outcome(trained, trained if best_state is None else loop.model(*best_state), progress)


@contextlib.contextmanager
def _told(observers: Sequence[Observer], phase: str, steps: int) -> Iterator[None]:
    """Tells observers of the beginning of a phase and of its end, even one by an exception."""
    for observer in observers:
        observer.begin(phase, steps)
    try:
        yield
    finally:
        for observer in observers:
            observer.end()


class _Loop:
    """The compiled step of a phase, and the state it goes through."""

    def __init__(self, model, phase, task, data, examples, batch_size, log_every, key, observers):
        self.graphdef, optimizer, self.state = start(model, phase.optimizer)
        self.phase, self.data, self.batch_size = phase, data, batch_size
        self.log_every, self.observers, self.metric = log_every, observers, task.metric.name
        self.steps_per_epoch = examples // batch_size
        self.steps = 0
        self.order_key, self.step_key = jax.random.split(key)
        self.permute = jax.jit(lambda k: jax.random.permutation(k, examples))
        self.advance = make_step(self.graphdef, optimizer, task, batch_size)
        if phase.budget is not None:
            self.ratio = jax.jit(lambda p, r: phase.budget.ratio(nnx.merge(self.graphdef, *p, r)))

    def model(self, params: Params, rest: nnx.State) -> nnx.Module:
        return nnx.merge(self.graphdef, *params, rest, copy=True)

    def run_epoch(self, epoch: int) -> tuple[dict[str, Any], bool]:
        """Trains for an epoch, or until the budget is met.

        Returns what it last measured, and whether the budget is met.
        """
        order = self.permute(jax.random.fold_in(self.order_key, epoch))
        self.clock = time.perf_counter(), self.steps
        for position in range(self.steps_per_epoch):
            self.state = self.advance(self.state, self.data, order, position, self.step_key)
            self.steps += 1
            for observer in self.observers:
                observer.step()
            if self.steps == 1:  # what compiling takes is not the speed of training
                jax.block_until_ready(self.state)
                self.clock = time.perf_counter(), self.steps
            last = position == self.steps_per_epoch - 1
            if last or self.steps % self.log_every == 0:
                values = self._measure(epoch)
                met_budget = self._meets_budget(values)
                if last or met_budget:
                    return values, met_budget
                self.record(values)
        raise AssertionError("an epoch has at least one step")

    def _measure(self, epoch: int) -> dict[str, Any]:
        """The training measures since they were last read, and what of the network survives."""
        loss, score = self.state.measures.means()
        rate = float(self.phase.learning_rate(self.steps - 1))
        self.check_finite("loss", loss)
        self.state = self.state._replace(measures=Measures.zero())
        values = {"epoch": epoch, "loss": loss, self.metric: score, "learning_rate": rate}
        (then, steps), now = self.clock, time.perf_counter()
        if self.steps > steps:
            values["examples_per_second"] = (self.steps - steps) * self.batch_size / (now - then)
        if self.phase.budget is not None:
            flops, params = map(float, self.ratio(self.state.params, self.state.rest))
            values |= {"flops_ratio": flops, "params_ratio": params}
        self.clock = time.perf_counter(), self.steps
        return values

    def check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            rate = float(self.phase.learning_rate(self.steps - 1))
            raise FloatingPointError(
                f"{self.phase.name}: the {name} is {value} at step {self.steps}, "
                f"at a learning rate of {rate:g}"
            )

    def _meets_budget(self, values: dict[str, Any]) -> bool:
        budget = self.phase.budget
        return budget is not None and values["flops_ratio"] <= budget.limit

    def record(self, values: dict[str, Any]) -> None:
        for observer in self.observers:
            observer.record({"phase": self.phase.name, "step": self.steps, **values})


def start(
    model: nnx.Module, make_optimizer: Callable[[Params], optax.GradientTransformation]
) -> tuple[nnx.GraphDef, optax.GradientTransformation, TrainState]:
    """What the first step of a phase needs; the model is left as it was."""
    model = nnx.clone(model)
    model.train()
    graphdef, latents, weights, rest = nnx.split(model, LatentVector, nnx.Param, ...)
    params = (latents, weights)
    optimizer = make_optimizer(params)
    opt_state = jax.jit(optimizer.init)(params)
    state = TrainState(params, rest, opt_state, jnp.int32(0), Measures.zero())
    return graphdef, optimizer, _copy(state)


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    task: Task,
    batch_size: int,
) -> Callable[..., TrainState]:
    """The jitted step `(state, data, order, position, key) -> state`; its state is donated.

    It takes the `position`-th batch of the `data` in the given `order`, augments it, and steps.
    """

    def loss(params: Params, rest: nnx.State, inputs: Array, targets: Any):
        model = tune(nnx.merge(graphdef, *params, rest, copy=True))
        outputs = model(inputs)
        rest = nnx.state(model, nnx.Not(nnx.Param))
        return jnp.mean(task.loss(outputs, targets)), (task.score(outputs, targets), rest)

    def step(state: TrainState, data: Data, order, position, key) -> TrainState:
        chosen = jax.lax.dynamic_slice(order, (position * batch_size,), (batch_size,))
        step_key = jax.random.fold_in(key, state.step)
        inputs, targets = task.training_batch(step_key, data, chosen)
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, (scores, rest)), grads = gradient(state.params, state.rest, inputs, targets)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        loss_sum, score_sum, count = state.measures
        measures = Measures(
            loss_sum + value * batch_size, score_sum + jnp.sum(scores), count + batch_size
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, rest, opt_state, state.step + 1, measures)

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
