"""Measures the time of forward passes on this machine."""

from collections.abc import Callable, Mapping, Sequence
import os
import platform
import statistics
import time
from typing import Any

from flax import nnx
import jax

from dhp_jax.activity import doing
from dhp_jax.backend.inference import inference
from dhp_jax.errors import ArgumentError, check_integer
from dhp_jax.tracing.inputs import batch_of, batch_sizes, checked_inputs, outputs_of
from dhp_jax.tracing.programs import Call, called

MIN_ROUNDS = 3  # rounds


def time_in_turn(
    passes: Mapping[str, Callable[[], None]],
    rounds: int,
    seconds: float = float("inf"),
    each: int = 1,
    what: str = "",
) -> dict[str, list[float]]:
    """Times functions alternately, so that other load on the machine affects all alike.

    Every other round runs in reverse order, so that no function always follows the same other one.

    Args:
      passes: functions by name, as of a network; each runs twice before it is timed.
      rounds: the largest number of timed rounds.
      seconds: no round begins after this time, except for the first three.
      each: how many times one call repeats the work; times are divided by it.
      what: is passed to the networks, for what is told of compilations, such as ", batch 64".

    Returns:
      Seconds of every call, by name; the i-th ones belong to one round.

    Raises:
      RuntimeError: a call took no time, by the clock of this machine.
    """
    for name, run in passes.items():  # compiles, then warms up
        with doing(program=f"the forward pass of the {name} network{what}"):
            run()
            run()
    taken: dict[str, list[float]] = {name: [] for name in passes}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - began > seconds:
            break
        for name in reversed(passes) if done % 2 else passes:
            started = time.perf_counter()
            passes[name]()
            taken[name].append((time.perf_counter() - started) / each)
            if not taken[name][-1] > 0:
                found = f"a pass of the {name} network{what} took {taken[name][-1]:g} s"
                raise RuntimeError(f"{found} by the clock of this machine; time a larger batch")
    return taken


def forward_pass(
    model: nnx.Module,
    input_shape: Any,
    batch: int,
    queued: int = 1,
    call: Call | None = None,
) -> Callable[[], None]:
    """A function that runs a network on some batches and waits until all are done.

    Arguments are as those of `measure_latency`; `queued` is how many batches.
    """
    return passes_of(model, timed_inputs(model, input_shape, batch, call), queued, call)


def passes_of(
    model: nnx.Module, inputs: tuple[Any, ...], queued: int = 1, call: Call | None = None
) -> Callable[[], None]:
    """As `forward_pass`, on arguments that the network is known to take."""
    run = inference(model, call)
    return lambda: jax.block_until_ready([run(*inputs) for _ in range(queued)])


def check_batch(batch: int | None) -> None:
    """Raises unless a value can be how many inputs a timed pass takes, or `None`."""
    if batch is not None:
        check_integer("batch", batch)


def timed_inputs(
    model: nnx.Module, input_shape: Any, batch: int, call: Call | None = None
) -> tuple[Any, ...]:
    """The arguments of a forward pass with so many examples, which the network takes.

    Raises:
      ValueError: it takes none of them.
    """
    call = called(call)
    shapes = [x.shape for x in jax.tree.leaves(checked_inputs(input_shape))]
    refused = None
    for size in batch_sizes(shapes) or [1]:
        inputs = batch_of(input_shape, batch, size)
        try:
            outputs_of(model, inputs, call)
        except ValueError as error:
            refused = refused or error
        else:
            return inputs
    why = str(refused).removeprefix("input_shape: ")
    expected = "a number of examples that the model takes, where first axes alone are the batch"
    raise ArgumentError("batch", detail=f"expected {expected}; got {batch}: {why}") from refused


def measure_latency(
    models: Mapping[str, nnx.Module],
    input_shape: Any,
    batch: int,
    *,
    rounds: int = 25,
    seconds: float = 1.0,
    call: Call | None = None,
) -> dict[str, list[float]]:
    """Times the forward passes of networks, compiled, in evaluation mode.

    Args:
      models: networks by name.
      input_shape: of one example in float32, `(h, w, c)`, or other inputs, as for `measure_cost`;
        arrays are repeated along their batch axis.
      batch: how many examples a pass takes.
      rounds, seconds: when to end; see `time_in_turn`. Compilation comes on top.
      call: a function of the model and the inputs, where that is not `model(*inputs)`.

    Returns:
      Milliseconds of every pass, by name: the i-th ones ran one after the other.

    Raises:
      ValueError: a batch that is none, or that the networks do not take.

    Example:
      >>> times = measure_latency({"whole": dhp.prune(model), "small": small}, (32, 32, 3), 64)
    """
    check_batch(batch)
    passes = {
        name: forward_pass(model, input_shape, batch, call=call) for name, model in models.items()
    }
    taken = time_in_turn(passes, rounds, seconds, what=f", batch {batch}")
    return {name: [1e3 * s for s in times] for name, times in taken.items()}


def hardware() -> str:
    """The accelerator, or the processor and how many cores of it there are."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of two numbers or more."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}
