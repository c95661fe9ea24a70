"""How much do the hypernetworks and the proximal step add to a training step?

Times the search step against the step of the same network without latents: interleaved, in one
process, on the same data. Both are the library's own `make_step`, augmentation included. With
`--torch` also against the search step in PyTorch (see torch_search.py), which has to be installed.

    python benchmarks/step.py                # ResNet-20 and ResNet-56, batch 64
    python benchmarks/step.py --torch eager --networks resnet110 dncnn --batch 256
    python benchmarks/step.py --quick        # a smoke run of a few seconds
"""

import argparse
from collections.abc import Callable
from pathlib import Path
import time

from flax import nnx
import jax
from record import quartiles, write
from zoo import NETWORKS, Network, search_step

import dhp_jax as dhp

NOTE = "Median of interleaved steps, quartiles in parentheses; the ratio is that of each pair."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20", "resnet56"])
    parser.add_argument("--torch", choices=("eager", "compiled"), help="PyTorch's step beside ours")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind that count")
    parser.add_argument("--quick", action="store_true", help="a tiny network, few rounds")
    parser.add_argument("--out", type=Path, help="folder for step.json and step.md")
    options = parser.parse_args()
    if options.torch is not None:
        if options.quick:
            parser.error("--torch: expected without --quick, whose network is smaller")
        import torch_search  # its packages are not among ours

        for name in options.networks:
            if not torch_search.can_build(NETWORKS[name]):
                parser.error(f"--torch: expected CIFAR ResNets or dncnn, got {name}")
    if options.quick:
        options.networks, options.batch, options.rounds = ["resnet20"], 4, 3
    rows = [measure(name, options) for name in options.networks]
    table = as_table(rows)
    print(table)
    if options.out is not None:
        write(
            options.out, "step", "Search step against the plain network's step", NOTE, rows, table
        )


def measure(name: str, options: argparse.Namespace) -> dict:
    """Milliseconds of the steps, run in turn, and the ratios of those of each round."""
    network = NETWORKS[name]
    model = network.build(width=0.25) if options.quick else network.build()
    steps = {
        "search": stepper(network, model, options.batch),
        "plain": stepper(network, dhp.prune(model), options.batch),
    }
    if options.torch is not None:
        import torch_search

        steps["torch"] = torch_search.stepper(
            network, options.batch, compiled=options.torch == "compiled"
        )
    for step in steps.values():  # compiles, then warms up
        step()
        step()
    seconds = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    row = {"model": network.label, "batch": options.batch, "rounds": options.rounds}
    for kind, values in seconds.items():
        row[f"{kind}_ms"] = quartiles([1e3 * s for s in values])
        row[f"search_to_{kind}"] = quartiles(
            [s / other for s, other in zip(seconds["search"], values, strict=True)]
        )
    return row


def stepper(network: Network, model: nnx.Module, batch: int) -> Callable[[], None]:
    """A function that takes one training step, and waits for it."""
    advance, state, inputs = search_step(network, model, batch)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(advance(state, *inputs))

    return step


def as_table(rows: list[dict]) -> str:
    others = [kind for kind in ("plain", "torch") if f"{kind}_ms" in rows[0]]
    columns = {"search step, ms": ("search_ms", ".0f")}
    columns |= {f"{kind} step, ms": (f"{kind}_ms", ".0f") for kind in others}
    columns |= {f"search / {kind}": (f"search_to_{kind}", ".3f") for kind in others}
    lines = [
        f"| network | batch | {' | '.join(columns)} |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for row in rows:
        cells = [
            "{median:{form}} ({low:{form}} to {high:{form}})".format(form=form, **row[name])
            for name, form in columns.values()
        ]
        lines.append(f"| {row['model']} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
