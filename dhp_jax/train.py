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
from jaxtyping import Array, Float, Int, Key, PyTree
import optax

from dhp_jax.latent import LatentVector

Data = PyTree[Array]  # arrays of one example an entry along their first axis
Params = tuple[nnx.State, nnx.State]  # latent vectors, all other parameters


class Task(Protocol):
    """What a network is trained for."""

    def training_pair(self, key: Key[Array, ""], examples: Data) -> tuple[Array, Any]:
        """Inputs and targets of raw examples, augmented afresh."""
        ...

    def test_pair(self, examples: Data) -> tuple[Array, Any]:
        """Inputs and targets of raw examples as they are."""
        ...

    def loss(self, outputs: Array, targets: Any) -> Float[Array, " n"]:
        """What training lowers, of each example."""
        ...

    def error(self, outputs: Array, targets: Any) -> Float[Array, " n"]:
        """What is reported, of each example; lower is better."""
        ...


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
    """How a phase went, in numbers. Errors are those on the test data."""

    epochs: int
    steps: int
    seconds: float
    met_budget: bool
    last_error: float
    best_error: float
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
    error: Float[Array, ""]
    examples: Int[Array, ""]

    @classmethod
    def zero(cls) -> "Measures":
        return cls(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))

    def means(self) -> tuple[float, float]:
        """Mean loss and error; waits for the device."""
        loss, error, examples = jax.device_get(self)
        return float(loss / examples), float(error / examples)


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
      train_data, test_data: arrays of examples.
      batch_size: examples in a step.
      log_every: steps between records, and between looks at the budget.
      key: random key of this phase.
      observers: told of every step, every `log_every` steps and every epoch.

    Returns:
      The trained model after the last epoch and after the one with the smallest test error.

    Raises:
      ValueError: `batch_size` larger than the training data.
      FloatingPointError: a loss that is not finite.
    """
    examples = len(jax.tree.leaves(train_data)[0])
    if not 0 < batch_size <= examples:
        raise ValueError(
            f"batch_size: expected 1 to {examples} (the size of the training data), "
            f"got {batch_size}"
        )
    loop = _Loop(model, phase, task, train_data, batch_size, log_every, key, observers)
    evaluate = evaluation(model, task, test_data, batch_size=4 * batch_size)
    started = time.perf_counter()
    best_error, best_epoch, best = math.inf, 0, None
    last_error, met_budget, epoch = math.nan, False, 0
    with _told(observers, phase.name, phase.epochs * loop.steps_per_epoch):
        while epoch < phase.epochs and not met_budget:
            epoch += 1
            values, met_budget = loop.run_epoch(epoch)
            test_loss, last_error = evaluate(loop.state.params, loop.state.rest)
            loop.check_finite("test loss", test_loss)
            loop.record(values | {"test_loss": test_loss, "test_error": last_error})
            if last_error < best_error:
                best_error, best_epoch = last_error, epoch
                best = None if phase.budget else _copy((loop.state.params, loop.state.rest))
    progress = Progress(
        epochs=epoch,
        steps=loop.steps,
        seconds=time.perf_counter() - started,
        met_budget=met_budget,
        last_error=last_error,
        best_error=best_error,
        best_epoch=best_epoch,
    )
    trained = loop.model(loop.state.params, loop.state.rest)
    return Outcome(trained, trained if best is None else loop.model(*best), progress)


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

    def __init__(self, model, phase, task, data, batch_size, log_every, key, observers):
        self.graphdef, optimizer, self.state = start(model, phase.optimizer)
        self.phase, self.data, self.batch_size = phase, data, batch_size
        self.log_every, self.observers = log_every, observers
        examples = len(jax.tree.leaves(data)[0])
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
        loss, error = self.state.measures.means()
        rate = float(self.phase.learning_rate(self.steps - 1))
        self.check_finite("loss", loss)
        self.state = self.state._replace(measures=Measures.zero())
        values = {"epoch": epoch, "loss": loss, "error": error, "learning_rate": rate}
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
        model = nnx.merge(graphdef, *params, rest, copy=True)
        outputs = model(inputs)
        rest = nnx.state(model, nnx.Not(nnx.Param))
        return jnp.mean(task.loss(outputs, targets)), (task.error(outputs, targets), rest)

    def step(state: TrainState, data: Data, order, position, key) -> TrainState:
        chosen = jax.lax.dynamic_slice(order, (position * batch_size,), (batch_size,))
        examples = jax.tree.map(lambda array: array[chosen], data)
        inputs, targets = task.training_pair(jax.random.fold_in(key, state.step), examples)
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, (errors, rest)), grads = gradient(state.params, state.rest, inputs, targets)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        loss_sum, error_sum, count = state.measures
        measures = Measures(
            loss_sum + value * batch_size, error_sum + jnp.sum(errors), count + batch_size
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, rest, opt_state, state.step + 1, measures)

    return jax.jit(step, donate_argnums=0)


def evaluation(
    model: nnx.Module, task: Task, data: Data, *, batch_size: int
) -> Callable[[Params, nnx.State], tuple[float, float]]:
    """Compiles a test: `(parameters, rest) -> (mean loss, mean error)` over all of the data."""
    model = nnx.clone(model)
    model.eval()
    graphdef = nnx.graphdef(model)
    examples = len(jax.tree.leaves(data)[0])
    batch_size = min(batch_size, examples)

    @jax.jit
    def add(measures: Measures, params: Params, rest: nnx.State, data: Data, start) -> Measures:
        chosen = start + jnp.arange(batch_size)
        counted = chosen < examples
        batch = jax.tree.map(lambda array: array[jnp.minimum(chosen, examples - 1)], data)
        inputs, targets = task.test_pair(batch)
        outputs = nnx.merge(graphdef, *params, rest)(inputs)
        return Measures(
            measures.loss + jnp.sum(task.loss(outputs, targets), where=counted),
            measures.error + jnp.sum(task.error(outputs, targets), where=counted),
            measures.examples + jnp.sum(counted),
        )

    def run(params: Params, rest: nnx.State) -> tuple[float, float]:
        measures = Measures.zero()
        for start in range(0, examples, batch_size):
            measures = add(measures, params, rest, data, start)
        return measures.means()

    return run


def evaluate(model: nnx.Module, task: Task, data: Data, *, batch_size: int) -> tuple[float, float]:
    """Mean loss and mean error of a model over all of the data, in evaluation mode."""
    _, latents, weights, rest = nnx.split(model, LatentVector, nnx.Param, ...)
    return evaluation(model, task, data, batch_size=batch_size)((latents, weights), rest)


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
