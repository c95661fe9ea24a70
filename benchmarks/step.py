"""How much do hypernetworks, proximal step and budget check add to a training step?

Times the search step against the step of the same network without latents: interleaved, in one
process, on the same data. Both are the library's own `make_step`, augmentation included, with as
many steps a dispatch as runs take on the device. With `--trained` also the step of a search from
trained weights (`dhp.fade_to_budget`) against the plain one. With `--torch` also against the search
step in PyTorch (see torch_search.py), which has to be installed, checks no budget, and waits for
its device as often; `--torch compiled` needs what `torch.compile` needs, on CPU a C++ compiler.
PyTorch is in a process of its own. With `--torch-keeps` that one keeps its memory, as ours does.

    python benchmarks/step.py                # ResNet-20 and ResNet-56, batch 64
    python benchmarks/step.py --torch eager --networks mobilenet_v2 dncnn --batches 64 256
    python benchmarks/step.py --trained --networks resnet56
    python benchmarks/step.py --quick        # a smoke run of a few seconds
"""

import argparse
from collections.abc import Callable
import contextlib
import multiprocessing
from multiprocessing.connection import Connection
import os
import resource

from flax import nnx
import jax
from record import parser, positive, publish_each, table_of, with_quartiles
from zoo import NETWORKS, QUICK, Network, search_step

import dhp_jax as dhp
from dhp_jax.backend.platform import steps_per_dispatch
from dhp_jax.budgets.timing import quartiles, time_in_turn

KINDS = ("plain", "torch eager", "torch compiled", "trained")
NOTE = (
    "Median of interleaved dispatches, each divided by its steps, quartiles in parentheses; the "
    "ratio is that of each round. The search step checks its budget, PyTorch's does not."
)
FREED = " Without `dhp.keep_memory()`."
KEEPS = " PyTorch's process keeps its memory by `dhp.keep_memory()`, too, which is not its default."
TRAINED = " Trained: the step of a search from trained weights, with gates."


def main() -> None:
    arguments = parser(__doc__, ["resnet20", "resnet56"], 20, "dispatches of each kind that count")
    arguments.add_argument("--torch", nargs="+", choices=("eager", "compiled"), default=[])
    arguments.add_argument("--memory", choices=("kept", "default"), default="kept", help="of ours")
    arguments.add_argument("--torch-keeps", action="store_true", help="dhp.keep_memory() for it")
    arguments.add_argument("--trained", action="store_true", help="the search from trained weights")
    arguments.add_argument("--batches", nargs="+", type=positive, default=[64])
    arguments.add_argument(
        "--seconds",
        type=positive,
        default=60,
        help="after which a network has no more rounds than three",
    )
    arguments.add_argument("--steps", type=positive, help="a dispatch; as in runs if not given")
    options = arguments.parse_args()
    if options.torch:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two share a GPU
    if options.memory == "kept":  # as runs do
        dhp.keep_memory()
    options.steps = options.steps or steps_per_dispatch()
    check_torch(arguments, options)
    if options.quick:
        options.networks, options.batches, options.rounds = [QUICK], [4], 3
    kinds = [*(["torch"] * bool(options.torch)), *options.torch, *(["trained"] * options.trained)]
    name = "_".join(["step", *kinds, *(["keeping"] * options.torch_keeps)])
    name += "_default_memory" * (options.memory == "default")
    title = " and PyTorch's ".join(["Search step against the plain network's", *options.torch])
    rows = (
        measure(NETWORKS[name], batch, options)
        for name in options.networks
        for batch in options.batches
    )
    note = NOTE + TRAINED * options.trained + KEEPS * options.torch_keeps
    note += FREED * (options.memory == "default")
    publish_each(options.out, name, f"{title} step", note, rows, as_table)


def check_torch(arguments: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with an error where there is no PyTorch version of what is asked for."""
    if not options.torch:
        return
    if options.quick:
        arguments.error("--torch: expected without --quick, whose network is smaller")
    import torch_search  # its packages are not among ours

    for name in options.networks:
        if not torch_search.can_build(NETWORKS[name]):
            there = ", ".join(n for n in NETWORKS if torch_search.can_build(NETWORKS[n]))
            arguments.error(f"--torch: expected networks among {there}; got {name}")


def measure(network: Network, batch: int, options: argparse.Namespace) -> dict:
    """Milliseconds of the steps, run in turn, and the ratios of those of each round."""
    model = network.build(width=0.25) if options.quick else network.build()
    steps = {
        "search": stepper(network, model, batch, options.steps),
        "plain": stepper(network, dhp.prune(model), batch, options.steps),
    }
    if options.trained:
        gated = dhp.with_gates(dhp.prune(model), rngs=nnx.Rngs(0))
        steps["trained"] = stepper(network, gated, batch, options.steps, fades=True)
    for how in options.torch:
        given = network, batch, options.steps, how == "compiled", options.torch_keeps
        steps[f"torch {how}"] = torch_stepper(*given)
    seconds = time_in_turn(steps, options.rounds, options.seconds, each=options.steps)
    row = {"network": network.label, "batch": batch, "page_faults": page_faults(steps["search"])}
    row |= {"steps_per_dispatch": options.steps, "rounds": len(seconds["search"])}
    for kind, values in seconds.items():
        name = kind.replace(" ", "_")
        row[f"{name}_ms"] = quartiles([1e3 * s for s in values])
        row[f"search_to_{name}"] = ratio(seconds["search"], values)
    if options.trained:
        row["trained_to_plain"] = ratio(seconds["trained"], seconds["plain"])
    return row


def torch_stepper(*given: object) -> Callable[[], None]:
    """`torch_search.stepper` in a process of its own, for what it takes; see `serve_torch`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=serve_torch, args=(there, *given), daemon=True).start()
    here.recv()

    def dispatch() -> None:
        here.send(None)
        here.recv()

    return dispatch


def serve_torch(
    pipe: Connection, network: Network, batch: int, steps: int, compiled: bool, keeps: bool
) -> None:
    """Takes the steps whenever it is told to, and says when they are done."""
    import torch_search

    if keeps:
        dhp.keep_memory()
    dispatch = torch_search.stepper(network, batch, steps, compiled=compiled)
    with contextlib.suppress(EOFError):  # until the process that asks has ended
        while True:
            pipe.send(None)
            pipe.recv()
            dispatch()


def page_faults(dispatch: Callable[[], None]) -> int:
    """Of this process during a dispatch."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    dispatch()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def ratio(seconds: list[float], others: list[float]) -> dict:
    """Quartiles of the ratios of each round."""
    return quartiles([s / other for s, other in zip(seconds, others, strict=True)])


def stepper(
    network: Network, model: nnx.Module, batch: int, steps: int, *, fades: bool = False
) -> Callable[[], None]:
    """A function that takes so many training steps in one dispatch, and waits for them."""
    advance, state, inputs = search_step(network, model, batch, steps=steps, fades=fades)
    arrays = jax.tree.leaves(state)

    def dispatch() -> None:
        nonlocal arrays
        arrays, _ = jax.block_until_ready(advance(arrays, *inputs))

    return dispatch


def as_table(rows: list[dict]) -> str:
    others = {k: k.replace(" ", "_") for k in KINDS if f"{k.replace(' ', '_')}_ms" in rows[0]}
    digits = ".0f" if rows[0]["search_ms"]["median"] >= 100 else ".2f"
    columns = {"search step, ms": ("search_ms", digits)}
    columns |= {f"{kind} step, ms": (f"{name}_ms", digits) for kind, name in others.items()}
    ratios = {kind: name for kind, name in others.items() if kind != "trained"}
    columns |= {f"search / {kind}": (f"search_to_{name}", ".3f") for kind, name in ratios.items()}
    if "trained_to_plain" in rows[0]:
        columns["trained / plain"] = ("trained_to_plain", ".3f")
    cells = [
        (
            row["network"],
            row["batch"],
            *(with_quartiles(row[n], form) for n, form in columns.values()),
        )
        for row in rows
    ]
    return table_of(["network", ">batch", *(f">{column}" for column in columns)], cells)


if __name__ == "__main__":
    main()
