"""The one training loop: search, converge and the unpruned baseline are phases of it."""

import collections
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import math
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key
import numpy as np

from dhp_jax.backend.hypernets import pack_axes
from dhp_jax.backend.platform import steps_per_dispatch
from dhp_jax.core.cost import MEASURES
from dhp_jax.data.stream import Stream
from dhp_jax.distributed.mesh import place, settled, whole
from dhp_jax.distributed.processes import Turns, arrays_from_first, from_first, is_first
from dhp_jax.errors import NonFiniteError
from dhp_jax.tasks.task import Data, Evaluation, Params, Task
from dhp_jax.train.checkpoints import Checkpoints
from dhp_jax.train.inputs import AHEAD, _Resident, _Streamed
from dhp_jax.train.phase import Observer, OriginError, Outcome, Phase, Progress, Stopped
from dhp_jax.train.state import Measures, Ticket, TrainState, _copy, _in_shape, _with_best, start
from dhp_jax.train.step import make_step

LONG_TEST = 5.0  # seconds after which the next test is worth a checkpoint before it


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
    checkpoints: Checkpoints | None = None,
    stopping: Callable[[], bool] = lambda: False,
    mesh: Mesh | None = None,
) -> Outcome:
    """Trains a model for a phase and tests it after every epoch.

    Every epoch goes through a new permutation of the examples; those left over at its end, fewer
    than a batch, wait for another epoch. All randomness follows from `key` and the step's number,
    whether the examples are on the device or a stream. Steps run on all devices of a mesh, in all
    processes together; tests on one device of the first process.

    Args:
      model: a network, with or without latents; left as it was.
      phase: what to do.
      task: losses, errors, and how examples become inputs.
      train_data, test_data: what the task reads its examples from; a `Stream`, of which each
        process reads its share, or what is on the device as a whole.
      examples: how many training examples make an epoch.
      batch_size: examples in a step.
      log_every: steps between records.
      key: random key of this phase.
      observers: told of every step, every `log_every` steps and every epoch.
      checkpoints: where the state is saved, and from the newest of which training goes on.
      stopping: asked after every step whether to stop; in several processes about once a second.
      mesh: of devices; see `dhp_jax.mesh`.

    Returns:
      The trained model after the last epoch and after the best one, by the task's metric.

    Raises:
      ValueError: `batch_size` larger than `examples`.
      OriginError: the phase goes on, but these are not the training data that it began with.
      FloatingPointError: a loss or a latent that is not finite.
      Stopped: `stopping` said so.
      CheckpointError: the state cannot be saved.
    """
    if not 0 < batch_size <= examples:
        raise ValueError(
            f"batch_size: expected 1 to {examples} (the examples of an epoch), got {batch_size}"
        )
    loop = _Loop(
        model, phase, task, train_data, examples, batch_size, log_every, key, observers, mesh
    )
    loop.keep(checkpoints, stopping)
    evaluate = task.evaluation(model, test_data, batch_size=4 * batch_size)
    with (
        _told(observers, phase.name, loop.last_step, loop.progress.steps, loop.records),
        loop.reading(),
    ):
        while not loop.done():
            values, met_budget = loop.run_epoch()
            loop.end_epoch(values, loop.test(evaluate), met_budget)
    loop.save()
    return loop.outcome()


@contextlib.contextmanager
def _told(
    observers: Sequence[Observer], phase: str, steps: int, done: int, records: list
) -> Iterator[None]:
    """Tells observers of the beginning of a phase and of its end, even one by an exception."""
    for observer in observers:
        observer.begin(phase, steps, done, records)
    try:
        yield
    finally:
        for observer in observers:
            observer.end()


class _Loop:
    """The compiled step of a phase, the state it goes through, and how far it has come."""

    def __init__(
        self, model, phase, task, data, examples, batch_size, log_every, key, observers, mesh
    ):
        form = pack_axes(model) if phase.elementwise else model
        self.graphdef, optimizer, state = start(form, phase.optimizer)
        self.mesh, self.here = mesh, jax.eval_shape(lambda state: state, state)
        self.shapes = self.here  # of the arrays that networks have, and files
        if form is not model:
            self.shapes = jax.eval_shape(lambda: start(model, phase.optimizer)[-1])
        self.state = place(mesh, state)
        self.phase, self.batch_size = phase, batch_size
        self.log_every, self.observers, self.metric = log_every, observers, task.metric
        self.steps_per_epoch = examples // batch_size
        self.last_step = phase.epochs * self.steps_per_epoch
        self.progress, self.records = Progress(), []
        self.in_flight: collections.deque[Ticket] = collections.deque()
        self.best_state: tuple[Params, nnx.State] | None = None
        self.compiling, self.test_seconds = True, 0.0
        order_key, step_key = jax.random.split(key)
        self.step_key = place(mesh, step_key)
        seed = np.ravel(jax.random.key_data(order_key)).tolist()
        kind = _Streamed if isinstance(data, Stream) else _Resident
        self.inputs = kind(data, seed, examples, batch_size, mesh)
        self.origin = {"examples": examples, "batch_size": batch_size}
        self.origin["data"] = self.inputs.checksum
        # That steps may follow a search's last one, and change nothing, costs a CPU much.
        waits = phase.budget is not None and steps_per_dispatch() == 1
        self.ahead = 0 if waits else AHEAD
        self.advance = make_step(
            self.structure,
            self.graphdef,
            optimizer,
            task,
            batch_size,
            skip_faulty=phase.skip_faulty,
            budget=phase.budget,
            mesh=mesh,
            streamed=isinstance(data, Stream),
            many=self.inputs.steps_at_once > 1,
            ends=phase.budget is not None and self.ahead > 0,
        )
        if phase.budget is not None:
            self.history = jax.jit(
                lambda p, r: settled(mesh, phase.budget.history(nnx.merge(self.graphdef, *p, r)))
            )

    @property
    def state(self) -> TrainState:
        """What the steps that were dispatched make of the state."""
        return jax.tree.unflatten(self.structure, self.arrays)

    @state.setter
    def state(self, state: TrainState) -> None:
        self.arrays, self.structure = jax.tree.flatten(state)

    def keep(self, checkpoints: Checkpoints | None, stopping: Callable[[], bool]) -> None:
        """Goes on from the newest checkpoint, if there is one."""
        self.checkpoints, self.stopping, self.turns = checkpoints, stopping, Turns()
        saved, notes = self._newest() if checkpoints else (None, None)
        self.began = time.perf_counter()
        if notes:
            self._check_origin(notes["origin"])
            saved = _in_shape(saved, _with_best(self.here, notes["has_best"]))
            self.state, self.best_state = _copy(place(self.mesh, saved))
            self.progress, self.records = Progress(**notes["progress"]), notes["records"]
            self.began -= self.progress.seconds
        self.told = self.progress.steps
        self.met_budget = self.phase.budget is not None and bool(self.state.remains.within)

    def _newest(self) -> tuple[tuple[TrainState, tuple | None] | None, dict[str, Any] | None]:
        """The newest checkpoint, which the first process reads, and its notes."""
        saved = None

        def read() -> dict[str, Any] | None:
            nonlocal saved
            saved, notes = self.checkpoints.newest(self._like) or (None, None)
            return notes

        notes = from_first(read)
        return notes and arrays_from_first(saved, self._like(notes)), notes

    def _like(self, notes: dict[str, Any]) -> tuple[TrainState, tuple | None]:
        return _with_best(self.shapes, notes["has_best"])

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Makes the examples of the steps that are left ready to be used."""
        return self.inputs.reading(self.progress.steps, self.last_step)

    def _check_origin(self, before: dict[str, Any]) -> None:
        for name, value in self.origin.items():
            if before[name] != value:
                lead = "checksum of the training data: " if name == "data" else ""
                raise OriginError(
                    name,
                    before[name],
                    value,
                    f"{lead}expected {before[name]}, with which the {self.phase.name} phase "
                    f"began; got {value}",
                )

    def done(self) -> bool:
        return self.progress.met_budget or self.progress.epochs >= self.phase.epochs

    def run_epoch(self) -> tuple[dict[str, Any], bool]:
        """Trains to the end of an epoch, or until the budget is met.

        Returns what it last measured, and whether the budget is met. A state is saved before a test
        that takes long.
        """
        epoch = self.progress.epochs + 1
        begin, end = ((epoch - k) * self.steps_per_epoch for k in (1, 0))
        self.inputs.begin_epoch(epoch)
        self.clock = time.perf_counter(), self.progress.steps
        while True:
            steps = self.progress.steps
            to_record = steps > begin and steps % self.log_every == 0
            if to_record or steps == end:
                self._wait()
            if self.met_budget or steps == end:
                # Before its measures are read: one that goes on from here reads them again.
                if self.test_seconds > LONG_TEST:
                    self.save()
                return self._measure(epoch), self.met_budget
            # A state is saved before it is looked at, so that a long test cannot keep it from that.
            if to_record:
                self._record(self._measure(epoch))
            self._advance(min(end, steps + self.log_every - steps % self.log_every))
            self._attend()

    def _advance(self, until: int) -> None:
        """Takes a step or, where that is faster, several; waits for those before the last."""
        before = self.progress.steps
        steps = min(before + self.inputs.steps_at_once, until)
        inputs = self.inputs.of(before, steps)
        self.arrays, ticket = self.advance(self.arrays, *inputs, self.step_key)
        self.inputs.look_ahead()
        self.in_flight.append(ticket)
        self.progress = dataclasses.replace(self.progress, steps=steps)
        self._wait(0 if self.compiling else self.ahead)
        if self.phase.budget is None:
            self._tell(steps)
        if self.compiling:  # what that takes is not the speed of training
            self.clock, self.compiling = (time.perf_counter(), self.progress.steps), False

    def _wait(self, ahead: int = 0) -> None:
        """Waits for all dispatches but the last few; with one of them a search may have ended."""
        while len(self.in_flight) > ahead:
            step, within = jax.device_get(self.in_flight.popleft())
            if self.phase.budget is not None and within:
                self.met_budget = True
                self.progress = dataclasses.replace(self.progress, steps=int(step))
                self.in_flight.clear()  # they have changed nothing
            self._tell(int(step))

    def _tell(self, steps: int) -> None:
        """Tells observers how many steps there were, once none of them can be one too many."""
        if steps > self.told:
            for observer in self.observers:
                observer.step(steps - self.told)
            self.told = steps

    def test(self, evaluate: Evaluation) -> dict[str, float]:
        """Metrics on the test data."""
        params, rest = whole((self.state.params, self.state.rest))
        began = time.perf_counter()
        metrics, self.test_seconds = from_first(
            lambda: (evaluate(params, rest), time.perf_counter() - began)
        )
        return metrics

    def end_epoch(self, values: dict[str, Any], last: dict[str, float], met_budget: bool) -> None:
        """Records an epoch with its test, and keeps the state of the best."""
        for what, value in last.items():
            if not math.isfinite(value):
                raise self._fault(f"test {what} is {value}", self.progress.steps, tested=True)
        self._record(values | {f"test_{what}": value for what, value in last.items()})
        epoch = self.progress.epochs + 1
        change: dict[str, Any] = {"epochs": epoch, "last": last, "met_budget": met_budget}
        name = self.metric.name
        if self.metric.better(last[name], self.progress.best.get(name)):
            change |= {"best": last, "best_epoch": epoch}
            if self.phase.budget is None:
                self.best_state = _copy((self.state.params, self.state.rest))
        self.progress = dataclasses.replace(self.progress, **change)
        self._attend()

    def outcome(self) -> Outcome:
        trained = self._model(self.state.params, self.state.rest)
        best = trained if self.best_state is None else self._model(*self.best_state)
        return Outcome(trained, best, self._timed())

    def _model(self, params: Params, rest: nnx.State) -> nnx.Module:
        params, rest = whole((params, rest))
        params = jax.tree.map(jnp.asarray, _in_shape(params, self.shapes.params))
        return nnx.merge(self.graphdef, *params, rest, copy=True)

    def _timed(self) -> Progress:
        return dataclasses.replace(self.progress, seconds=time.perf_counter() - self.began)

    def _measure(self, epoch: int) -> dict[str, Any]:
        """The training measures since they were last read, and what of the network survives."""
        self._check_fault()
        measures = jax.device_get(self.state.measures)
        self.state = self.state._replace(measures=place(self.mesh, Measures.zero()))
        steps, rate = self.progress.steps, self._rate(self.progress.steps)
        if not measures.examples:
            raise self._fault(
                "loss or gradient of every batch since the last record is not finite", steps
            )
        loss, score = (float(s / measures.examples) for s in (measures.loss, measures.score))
        values = {"epoch": epoch, "loss": loss, self.metric.name: score, "learning_rate": rate}
        if self.phase.skip_faulty:
            values["skipped"] = int(measures.skipped)
            skipped = self.progress.skipped + values["skipped"]
            self.progress = dataclasses.replace(self.progress, skipped=skipped)
        (then, before), now = self.clock, time.perf_counter()
        if steps > before:
            values["examples_per_second"] = (steps - before) * self.batch_size / (now - then)
        if self.phase.budget is not None:
            remains = jax.device_get(self.state.remains)
            values |= {f"{name}_ratio": float(getattr(remains, name)) for name in MEASURES}
            values |= _rounded(self.history(self.state.params, self.state.rest))
        self.clock = time.perf_counter(), steps
        return values

    def _record(self, values: dict[str, Any]) -> None:
        record = {"phase": self.phase.name, "step": self.progress.steps, **values}
        self.records.append(record)
        for observer in self.observers:
            observer.record(record)

    def _rate(self, step: int) -> float:
        return float(self.phase.learning_rate(step - 1))

    def _check_fault(self) -> None:
        fault = jax.device_get(self.state.fault)
        if fault.step:
            loss = float(fault.loss)
            what = self._faulty_latents() if math.isfinite(loss) else f"loss is {loss}"
            raise self._fault(what, int(fault.step))

    def _faulty_latents(self) -> str:
        found = jax.tree_util.tree_leaves_with_path(self.state.params[0])
        paths = [path for path, vector in found if not np.isfinite(vector).all()]
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
        name = names[0].removesuffix(".value").removesuffix(".vector")
        return f"latent {name!r} is not finite"

    def _fault(self, what: str, step: int, tested: bool = False) -> NonFiniteError:
        saved = self.checkpoints.steps() if self.checkpoints and is_first() else []
        last = f"; the last good checkpoint is of step {saved[0]}" if saved else ""
        return NonFiniteError(
            self.phase.name,
            f"the {what} at step {step}, at a learning rate of {self._rate(step):g}{last}",
            tested,
        )

    def _attend(self) -> None:
        """Saves if it is time, and stops if that is wanted."""
        stop, due = self.turns.look(
            self.stopping, lambda: bool(self.checkpoints and self.checkpoints.due())
        )
        if stop:
            self._wait()
            self.save(wait=True)
            raise Stopped(f"{self.phase.name}: stopped after step {self.progress.steps}")
        if due:
            self.save()

    def save(self, *, wait: bool = False) -> None:
        """Saves the state, unless it is faulty."""
        if not self.checkpoints:
            return
        self._wait()
        self._check_fault()
        notes = {
            "progress": dataclasses.asdict(self._timed()),
            "records": self.records,
            "has_best": self.best_state is not None,
            "origin": self.origin,
        }
        arrays, steps = whole((self.state, self.best_state)), self.progress.steps
        like = _with_best(self.shapes, notes["has_best"])
        try:
            from_first(
                lambda: self.checkpoints.save(steps, _in_shape(arrays, like), notes, wait=wait)
            )
        except FloatingPointError as error:
            raise self._fault(f"state is not finite ({error})", steps) from error


def _rounded(history: dict[str, Array]) -> dict[str, list[float]]:
    """Vectors to four digits: they are for people, and kept at every record."""
    return {
        name: [v if isinstance(v, int) else float(f"{v:.4g}") for v in np.asarray(vector).tolist()]
        for name, vector in jax.device_get(history).items()
    }
