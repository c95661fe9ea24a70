"""The stages of accelerator.py: what each measures, item by item, in order of worth."""

import argparse
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
from dataclasses import dataclass
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import os
import statistics
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import kernels
import optax
import recipe
import zoo
from zoo import NETWORKS, QUICK, Network, queued, search_step

import dhp_jax as dhp
from dhp_jax.backend import hypernets, inference
from dhp_jax.backend.platform import compiler_options
from dhp_jax.budgets import timing
from dhp_jax.train import step as train_step
from dhp_jax.train.state import StepDone
from dhp_jax.workdir.summary import versions

Rows = Iterator[dict[str, Any]]
FLOPS = 0.5  # share that pruned networks keep
MULTIPLES = (1, 8, 16, 32)  # of their widths
TORCH_STEPS = 4  # of PyTorch's between two waits: its host is as busy as the device
THREADS = 12  # that compile
MOSTLY = 0.8  # share of the time of which it must be known what it is for


@dataclass(frozen=True)
class Item:
    """Something to measure.

    Attributes:
      name: for the list of what was left out.
      measure: gives rows.
      seconds: below which it is not begun.
    """

    name: str
    measure: Callable[[], Rows]
    seconds: float = 10.0


@dataclass(frozen=True)
class Size:
    """How much of everything: as much as is worth knowing, or as little as goes the same way.

    Attributes:
      rehearse: whether it is the latter.
      steps: in a dispatch.
      rounds: at most.
      seconds: that the rounds of a comparison take, if there are three of them.
    """

    rehearse: bool
    steps: int
    rounds: int
    seconds: float

    def network(self, name: str) -> Network:
        """A network by name, or the smallest one on the smallest images."""
        small = dataclasses.replace(NETWORKS[QUICK], input_shape=(8, 8, 3))
        return small if self.rehearse else NETWORKS[name]

    def build(self, network: Network, **changes: Any) -> nnx.Module:
        """A network with latents."""
        if self.rehearse:
            changes |= {"width": 0.25, "min_channels": 1}
        return network.build(**changes)

    def batches(self, *wanted: int) -> tuple[int, ...]:
        """Batch sizes."""
        return (4,) if self.rehearse else wanted


def size_of(rehearse: bool) -> Size:
    """The size of a rehearsal, or of the real thing."""
    return Size(True, 2, 3, 0.1) if rehearse else Size(False, 32, 15, 4.0)


def run(stage: str, options: argparse.Namespace, journal: Any) -> None:
    """Measures the items of a stage until its time is over, and tells the journal of each row."""
    size = size_of(options.rehearse)
    about = {"hardware": timing.hardware(), "versions": versions()}
    about["date"] = datetime.date.today().isoformat()
    about["platform"] = " ".join(jax.devices()[0].client.platform_version.split())
    if has_torch():
        about["versions"]["torch"] = importlib.metadata.version("torch")
    journal.add(stage=stage, event="about", about=about)
    items = PLANS[stage](size, options)
    journal.add(stage=stage, event="plan", items=[item.name for item in items])
    for item in items:
        if options.until - time.time() < item.seconds and not size.rehearse:
            continue
        tell = functools.partial(journal.add, stage=stage, item=item.name)
        began = time.time()
        try:
            for row in item.measure():
                tell(event="row", row=row)
                print(f"{time.time() - began:6.1f} s", row, flush=True)
        except Exception as error:  # whatever one of them ends with, the next one can be measured
            print(f"{item.name}: {error!r:.2000}", flush=True)
            tell(event="error", error=f"{type(error).__name__}: {error}"[:300].splitlines()[0])
        else:
            tell(event="done", seconds=round(time.time() - began, 1))
        gc.collect()  # arrays of networks, whose objects refer to each other


# Programs: traced one after another, then compiled together by threads.


@dataclass
class Program:
    """A search step that is compiled, its state, and what it is given.

    Attributes:
      compiled: the program.
      arrays: of the state, which every call replaces.
      inputs: what the call takes after them.
      count: place of the number of steps among the inputs; `None` if it takes one step.
      seconds: that tracing and compiling took.
    """

    compiled: Any
    arrays: list[jax.Array]
    inputs: tuple
    count: int | None
    seconds: float

    def dispatch(self, steps: int | None = None) -> StepDone:
        """Gives the device steps, as many as it was made for unless told, and does not wait."""
        inputs = self.inputs
        if self.count is not None and steps is not None:
            inputs = (*inputs[: self.count], steps, *inputs[self.count + 1 :])
        self.arrays, ticket = self.compiled(self.arrays, *inputs)
        return ticket

    def wait(self) -> None:
        """Takes its steps and waits for them."""
        jax.block_until_ready(self.dispatch())
        jax.block_until_ready(self.arrays)


@dataclass
class Traced:
    """A search step before it is compiled; see `Program`."""

    lowered: Any
    arrays: list[jax.Array]
    inputs: tuple
    count: int | None
    seconds: float

    def compile(self) -> Program:
        began = time.perf_counter()
        compiled = self.lowered.compile()
        seconds = self.seconds + time.perf_counter() - began
        return Program(compiled, self.arrays, self.inputs, self.count, seconds)


def traced(network: Network, model: nnx.Module, batch: int, steps: int) -> Traced:
    """The search step of a network, or the plain one of a network without latents."""
    began = time.perf_counter()
    advance, state, inputs = search_step(network, model, batch, steps=steps)
    arrays = jax.tree.leaves(state)
    lowered = advance.lower(arrays, *inputs)
    count = 3 if steps > 1 else None  # after data, order and position
    return Traced(lowered, arrays, inputs, count, time.perf_counter() - began)


def together(work: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Calls functions in threads; what each gives, or the exception that it ends with."""

    def attempt(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:  # one program that cannot be had is no reason to lose others
            return error

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(work, pool.map(attempt, work.values()), strict=True))


def usable(programs: Mapping[Any, Any], needed: Any) -> dict[Any, Any]:
    """Those that are no exceptions; raises that of the one which is needed."""
    if isinstance(programs[needed], Exception):
        raise programs[needed]
    return {k: v for k, v in programs.items() if not isinstance(v, Exception)}


def timed(
    runs: Mapping[str, tuple[Callable[[], None], int]], size: Size, times: float = 1.0
) -> dict[str, list[float]]:
    """Seconds of one step of each kind, round by round.

    Args:
      runs: by name, a function and how many steps it takes.
      size: how many rounds.
      times: as many seconds as usual.
    """
    passes = {name: function for name, (function, _) in runs.items()}
    taken = timing.time_in_turn(passes, size.rounds, times * size.seconds)
    return {name: [s / runs[name][1] for s in values] for name, values in taken.items()}


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return timing.quartiles([1e3 * s for s in seconds])


def ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    return timing.quartiles([a / b for a, b in zip(of, to, strict=True)])


# a and f: against the plain step, and against PyTorch.


def has_torch() -> bool:
    """Whether PyTorch is installed, which is none of our packages."""
    return importlib.util.find_spec("torch") is not None


def steps_plan(size: Size, options: argparse.Namespace) -> list[Item]:
    """Search, plain and eager PyTorch."""
    eager = ["eager"] if has_torch() else []
    wanted = [("resnet56", (64, 256)), ("resnet20", (64, 256)), ("resnet110", (64, 256))]
    wanted += [("mobilenet_v2", (64, 256)), ("dncnn", (64,)), ("srresnet_x4", (16,))]
    return step_items(size, wanted[:1] if size.rehearse else wanted, eager, plain=True)


def compiled_plan(size: Size, options: argparse.Namespace) -> list[Item]:
    """Search, and PyTorch's as `torch.compile` makes it."""
    if not has_torch() or size.rehearse:  # which on CPU would need a C++ compiler
        return []
    wanted = [("resnet56", (64,)), ("resnet20", (64,)), ("resnet56", (256,))]
    return step_items(size, wanted, ["compiled"], plain=False)


def step_items(
    size: Size, wanted: Sequence[tuple[str, tuple[int, ...]]], torch: Sequence[str], plain: bool
) -> list[Item]:
    return [
        Item(
            f"{size.network(name).label}, batch {' and '.join(map(str, size.batches(*batches)))}",
            functools.partial(
                against, size, size.network(name), size.batches(*batches), torch, plain
            ),
            seconds=15.0,
        )
        for name, batches in wanted
    ]


def against(
    size: Size, network: Network, batches: Sequence[int], torch: Sequence[str], plain: bool
) -> Rows:
    """The search step in turn with others; a row for each batch size."""
    model = size.build(network)
    small = dhp.prune(model)
    work = {}
    for batch in batches:
        work["search", batch] = traced(network, model, batch, size.steps).compile
        if plain:
            work["plain", batch] = traced(network, small, batch, size.steps).compile
    programs = together(work)
    del work
    for batch in batches:
        ours = {kind: program for (kind, b), program in programs.items() if b == batch}
        yield compared(size, network, batch, usable(ours, "search"), torch)


def compared(
    size: Size, network: Network, batch: int, ours: dict[str, Program], torch: Sequence[str]
) -> dict[str, Any]:
    """A row of `against`."""
    runs = {kind: (program.wait, size.steps) for kind, program in ours.items()}
    without = ""
    for how in torch:
        try:
            runs[f"torch {how}"] = torch_step(network, batch, how), TORCH_STEPS
        except Exception as error:  # ours is worth measuring without it
            without = f"{type(error).__name__}: {error}"[:200]
    seconds = timed(runs, size)
    row: dict[str, Any] = {"network": network.label, "batch": batch}
    row["compile, s"] = "; ".join(f"{kind} {p.seconds:.1f}" for kind, p in ours.items())
    row["rounds"] = len(seconds["search"])
    row |= {f"{kind}, ms": milliseconds(values) for kind, values in seconds.items()}
    others = {kind: values for kind, values in seconds.items() if kind != "search"}
    row |= {f"search / {k}": ratio(seconds["search"], v) for k, v in others.items()}
    row["examples/s"] = batch / statistics.median(seconds["search"])
    return row | ({"without PyTorch": without} if without else {})


def torch_step(network: Network, batch: int, how: str) -> Callable[[], None]:
    """PyTorch's steps, which have run once."""
    import torch_search

    run = torch_search.stepper(network, batch, TORCH_STEPS, compiled=how == "compiled")
    run()
    return run


# c: what is there for the hardware's sake.


@contextlib.contextmanager
def put(module: Any, name: str, value: Any) -> Iterator[None]:
    """While the block runs, a module's global has another value."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def with_options(**options: Any) -> contextlib.AbstractContextManager[None]:
    """While the block runs, steps are made with these options of the compiler."""
    given = compiler_options() | options
    return put(train_step, "compiler_options", lambda: given)


def with_barrier() -> contextlib.AbstractContextManager[None]:
    """While the block runs, a step's update begins when it has all gradients."""
    barrier = optax.stateless(lambda grads, params: jax.lax.optimization_barrier(grads))
    ordinary = zoo.optimizer
    return put(
        zoo, "optimizer", lambda *given, **named: optax.chain(barrier, ordinary(*given, **named))
    )


def with_generation() -> tuple[str, contextlib.AbstractContextManager[None]]:
    """The other way to generate kernels: one by one on a GPU, elsewhere alike ones together."""
    if jax.default_backend() == "gpu":
        return "kernels generated one by one", put(
            inference, "generate_together", lambda model: None
        )

    def tuned(model: nnx.Module) -> nnx.Module:
        hypernets.generate_together(model)
        return inference.tune(model)

    return "kernels of a shape generated together", put(train_step, "tune", tuned)


Switches = dict[str, tuple[contextlib.AbstractContextManager[None], dict[str, Any]]]


def first_switches() -> Switches:
    """What makes another program of the same step: by name, within what, and built with what.

    "as it is" is the program that all others are compared with.
    """
    generation, within = with_generation()
    found = {
        "as it is": (contextlib.nullcontext(), {}),
        generation: (within, {}),
        "bfloat16": (contextlib.nullcontext(), {"dtype": "bfloat16"}),
        "barrier before the update": (with_barrier(), {}),
    }
    if jax.default_backend() == "tpu":
        found["channel axes apart"] = put(zoo, "pack_axes", lambda model: model), {}
    if jax.default_backend() == "gpu":
        found["GPU: convolutions NHWC"] = with_options(xla_gpu_force_conv_nhwc=True), {}
    return found


def more_switches() -> Switches:
    """The same of what is less likely to matter."""
    found = {
        "as it is": (contextlib.nullcontext(), {}),
        "1 step a check (STEPS_PER_CHECK)": (put(train_step, "STEPS_PER_CHECK", 1), {}),
        "8 steps a check (STEPS_PER_CHECK)": (put(train_step, "STEPS_PER_CHECK", 8), {}),
        "precision high": (jax.default_matmul_precision("high"), {}),
        "precision highest": (jax.default_matmul_precision("highest"), {}),
    }
    if jax.default_backend() == "gpu":
        found["GPU: no graphs"] = with_options(xla_gpu_enable_command_buffer=""), {}
    return found


def switches_plan(size: Size, options: argparse.Namespace) -> list[Item]:
    wanted = [
        ("resnet56", 64, "programs", first_switches),
        ("resnet56", 64, "dispatches", None),
        ("resnet56", 64, "more programs", more_switches),
        ("resnet56", 256, "programs", first_switches),
        ("resnet20", 64, "programs", first_switches),
        ("resnet20", 64, "dispatches", None),
        ("resnet20", 64, "more programs", more_switches),
        ("resnet110", 64, "programs", first_switches),
    ]
    items = []
    for name, batch, what, of in wanted[:3] if size.rehearse else wanted:
        network, (batch,) = size.network(name), size.batches(batch)
        measure = functools.partial(
            *((switched, size, network, batch, of) if of else (dispatched, size, network, batch))
        )
        items.append(Item(f"{network.label}, batch {batch}: {what}", measure, seconds=15.0))
    return items


def switched(size: Size, network: Network, batch: int, switches: Callable[[], Switches]) -> Rows:
    """The step as it is, in turn with every one of some switches."""
    work, models = {}, {}
    for name, (within, changes) in switches().items():
        key = tuple(changes.items())
        if key not in models:
            models[key] = size.build(network, **changes)
        with within:
            work[name] = traced(network, models[key], batch, size.steps).compile
    programs = together(work)
    for name, program in programs.items():
        if isinstance(program, Exception):
            told = f"{type(program).__name__}: {program}"[:200].splitlines()[0]
            yield {"network": network.label, "batch": batch, "not compiled": name, "because": told}
    programs = usable(programs, "as it is")
    runs = {name: (program.wait, size.steps) for name, program in programs.items()}
    compiling = {name: program.seconds for name, program in programs.items()}
    yield from switch_rows(network, batch, timed(runs, size, times=2.0), compiling)


def dispatched(size: Size, network: Network, batch: int) -> Rows:
    """The step as it is, in turn with other ways to give it to the device."""
    model, most = size.build(network), size.steps
    programs = together(
        {
            "many": traced(network, model, batch, most).compile,
            "one": traced(network, model, batch, 1).compile,
        }
    )
    program, single = usable(programs, "many")["many"], usable(programs, "one")["one"]
    few = max(1, most // 4)
    runs = {
        "as it is": (program.wait, most),
        f"{most} steps a dispatch, 2 ahead": (several(program, most, 4, 2), 4 * most),
        f"{few} steps a dispatch": (several(program, few, 4, 0), 4 * few),
        f"{few} steps a dispatch, 2 ahead": (several(program, few, 4, 2), 4 * few),
        "1 step a dispatch": (several(single, 1, most, 0), most),
        "1 step a dispatch, 2 ahead": (several(single, 1, most, 2), most),
    }
    yield from switch_rows(network, batch, timed(runs, size, times=2.0), {})


def switch_rows(
    network: Network,
    batch: int,
    seconds: Mapping[str, Sequence[float]],
    compiling: Mapping[str, float],
) -> Rows:
    """A row for each kind of step, which says how it compares with the step as it is."""
    for name, values in seconds.items():
        yield {
            "network": network.label,
            "batch": batch,
            "switch": name,
            "step, ms": milliseconds(values),
            "/ as it is": ratio(values, seconds["as it is"]),
            "rounds": len(values),
            "compile, s": compiling.get(name, ""),
        }


def several(program: Program, steps: int, dispatches: int, ahead: int) -> Callable[[], None]:
    """A function that dispatches so often, and waits for all but the last few as runs do."""

    def passes() -> None:
        waiting: deque[StepDone] = deque()
        for _ in range(dispatches):
            waiting.append(program.dispatch(steps))
            while len(waiting) > ahead:
                jax.device_get(waiting.popleft())
        jax.block_until_ready(program.arrays)

    return passes


# d: pruned networks.


def pruned_plan(size: Size, options: argparse.Namespace) -> list[Item]:
    wanted = [
        ("resnet56", ("float32", "bfloat16"), (256, 1)),
        ("resnet50", ("float32", "bfloat16"), (256, 1)),
        ("vgg16", ("float32", "bfloat16"), (256, 1)),
        ("mobilenet_v2", ("float32", "bfloat16"), (256, 1)),
        ("resnet56", ("float32", "bfloat16"), (1024,)),
    ]
    items = []
    for name, dtypes, batches in wanted[:1] if size.rehearse else wanted:
        network = size.network(name)
        whole_and_pruned = functools.cache(functools.partial(pruned, size, network))
        told = functools.partial(unpruned, network, whole_and_pruned)
        items.append(Item(f"{network.label}, pruned", told))
        for batch, dtype in itertools.product(size.batches(*batches), dtypes):
            measure = functools.partial(forwards, size, network, whole_and_pruned, batch, dtype)
            items.append(Item(f"{network.label}, batch {batch}, {dtype}", measure))
    return sorted(items, key=lambda item: ", batch 1," in item.name)  # large batches first


def pruned(size: Size, network: Network) -> tuple[dict[int, nnx.Module], dict[int, str]]:
    """The network without latents by 0, and pruned to half its FLOPs by the multiple of widths.

    Multiples for which that is impossible have a reason instead.
    """
    model = size.build(network)
    found, reasons = {0: dhp.prune(model)}, {}
    for multiple in MULTIPLES[: 2 if size.rehearse else None]:
        try:
            found[multiple] = dhp.prune_to(model, network.input_shape, multiple, flops=FLOPS)
        except ValueError as error:  # wider than its latents, or out of reach
            reasons[multiple] = str(error)
    return found, reasons


def unpruned(network: Network, networks: Callable[[], tuple[Any, dict[int, str]]]) -> Rows:
    """A row for each multiple of widths that a network cannot be pruned with."""
    for multiple, reason in networks()[1].items():
        row = {"network": network.label, "widths": f"of {multiple}"}
        yield row | {f"not pruned to {FLOPS:.0%}": reason}


def in_dtype(model: nnx.Module, dtype: str) -> nnx.Module:
    """A network without latents that computes in a dtype."""
    model = nnx.clone(model)
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "param_dtype"):
            module.dtype = jnp.dtype(dtype)
    return model


def forwards(
    size: Size,
    network: Network,
    networks: Callable[[], tuple[dict[int, nnx.Module], Any]],
    batch: int,
    dtype: str,
) -> Rows:
    """Forward passes of the whole network and of pruned ones in turn; a row for each of these."""
    models = {m: in_dtype(model, dtype) for m, model in networks()[0].items()}
    cost = {m: dhp.measure_cost(model, network.input_shape).flops for m, model in models.items()}
    each = 1 if size.rehearse else 16 if batch == 1 else queued(batch)
    passes = {
        m: timing.forward_pass(model, network.input_shape, batch, each)
        for m, model in models.items()
    }
    programs = usable(together(passes), 0)  # which compiles them
    seconds = timed({m: (passes[m], each) for m in programs}, size, times=0.75)
    for multiple in [m for m in seconds if m]:
        speedup, share = ratio(seconds[0], seconds[multiple]), cost[multiple] / cost[0]
        yield {
            "network": network.label,
            "batch": batch,
            "dtype": dtype,
            "widths": f"of {multiple}" if multiple > 1 else "any",
            "FLOPs": share,
            "whole, ms": milliseconds(seconds[0]),
            "pruned, ms": milliseconds(seconds[multiple]),
            "images/s": batch / statistics.median(seconds[multiple]),
            "speed-up": speedup,
            "of ideal": speedup["median"] * share,
        }


# e: where the time of a step goes.


def kernels_plan(size: Size, options: argparse.Namespace) -> list[Item]:
    limits = functools.cache(functools.partial(ceilings, size))
    items = [Item("what the device can do", lambda: iter([limits()]))]
    wanted = [("resnet56", 64), ("resnet56", 256), ("resnet20", 64)]
    for name, batch in wanted[:1] if size.rehearse else wanted:
        network, (batch,) = size.network(name), size.batches(batch)
        measure = functools.partial(profiled, size, network, batch, limits, options)
        items.append(Item(f"{network.label}, batch {batch}", measure, seconds=15.0))
    return items


def ceilings(size: Size) -> dict[str, Any]:
    """How many bytes a second the device copies, and FLOPs of large matrix products."""
    count = 2**20 if size.rehearse else 2**29
    side = 256 if size.rehearse else 8192
    x = jax.random.normal(jax.random.key(0), (count,))
    copy = jax.jit(lambda x: x + 1)
    matrix = jax.random.normal(jax.random.key(1), (side, side))
    half = matrix.astype(jnp.bfloat16)

    def product(x: jax.Array, precision: str) -> Callable[[], None]:
        multiply = jax.jit(functools.partial(jnp.matmul, precision=precision))
        return lambda: jax.block_until_ready([multiply(x, x) for _ in range(4)])

    runs = {
        "copy": (lambda: jax.block_until_ready([copy(x) for _ in range(4)]), 4),
        "float32": (product(matrix, "default"), 4),
        "float32, highest": (product(matrix, "highest"), 4),
        "bfloat16": (product(half, "default"), 4),
    }
    seconds = {name: statistics.median(s) for name, s in timed(runs, size, times=0.5).items()}
    row = {"copied, GB/s": 2 * x.nbytes / seconds.pop("copy") / 1e9}
    return row | {f"{kind}, TFLOP/s": 2 * side**3 / s / 1e12 for kind, s in seconds.items()}


def profiled(
    size: Size,
    network: Network,
    batch: int,
    limits: Callable[[], dict[str, Any]],
    options: argparse.Namespace,
) -> Rows:
    """The operations of a step that take longest, and a row on the step as a whole."""
    program = traced(network, size.build(network), batch, size.steps).compile()
    name = f"profile_{network.label}_{batch}".lower().replace("-", "")
    for _ in range(3):
        program.wait()
    began = time.perf_counter()
    program.wait()
    wall = (time.perf_counter() - began) / size.steps
    kept = options.out / f"{name}.json.gz"
    events = kernels.trace(program.wait, kept)
    label = {"network": network.label, "batch": batch}
    summary = kernels.summary(events, size.steps)
    yield label | {"program": "as it is", "step, ms": 1e3 * wall} | summary
    if jax.default_backend() == "gpu" and kernels.told(events) < MOSTLY:
        # Kernels of a CUDA graph do not tell what of the program they are.
        with with_options(xla_gpu_enable_command_buffer=""):
            program = traced(network, size.build(network), batch, size.steps).compile()
        for _ in range(3):
            program.wait()
        began = time.perf_counter()
        program.wait()
        wall = (time.perf_counter() - began) / size.steps
        events = kernels.trace(program.wait)
        summary = kernels.summary(events, size.steps)
        yield label | {"program": "without graphs", "step, ms": 1e3 * wall} | summary
    found = kernels.by_operation(events, program.compiled.as_text(), size.steps)
    bandwidth = 1e9 * limits()["copied, GB/s"]
    rate = 1e12 * limits()["float32, TFLOP/s"]
    for operation in found[:10]:
        floor = max(operation.bytes / bandwidth, operation.flops / rate)
        yield label | {
            "operation": operation.name,
            "what": operation.kind,
            "times a step": operation.count,
            "ms a step": 1e3 * operation.seconds,
            "of the busy time": operation.seconds * 1e3 / max(summary["busy, ms"], 1e-9),
            "MB": operation.bytes / 1e6,
            "GFLOP": operation.flops / 1e9,
            "of the roofline": floor / operation.seconds if operation.seconds else 0.0,
        }
    for kind, seconds, count in kernels.by_kind(found):
        yield label | {"kind": kind, "times a step": count, "ms a step": 1e3 * seconds}


def recipe_plan(size: Size, options: argparse.Namespace) -> list[Item]:
    measure = functools.partial(recipe.run, options, size.rehearse)
    return [Item(options.recipe, measure, seconds=20.0)]


PLANS = {
    "a": steps_plan,
    "b": recipe_plan,
    "c": switches_plan,
    "d": pruned_plan,
    "e": kernels_plan,
    "f": compiled_plan,
}
