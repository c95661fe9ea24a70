"""The library beside Torch-Pruning 1.6: the same trained weights, FLOPs, updates and images.

    python benchmarks/beside_torch_pruning.py --data cifar10.pack --out DIR \
        --weights benchmarks/results/from_trained_resnet20.safetensors
    python benchmarks/beside_torch_pruning.py --table DIR/rows.jsonl --out benchmarks/results
    python benchmarks/beside_torch_pruning.py --rehearse --out DIR

It needs `pip install torch torch-pruning==1.6.0`, which are no packages of the library. The trained
ResNet-20 of from_trained.py becomes a PyTorch network that computes the same. Its group-norm pruner
goes on in 400 small steps until the FLOPs, as the library counts them, are within the target. It
compares the channels of all layers, with its bound of three quarters for each (which it exceeds by
less than a channel) or without one, or takes the same share of each layer, which is its default.
What is left is finetuned in PyTorch by the recipe of from_trained.py, on the same images in the
same order. The rows of the library are those of from_trained.py, in the same process; on a CPU the
same PyTorch code finetunes what they leave. Last come the times of a forward pass of all of them,
taken in turn.
"""

import argparse
from collections.abc import Callable, Mapping
import copy
from pathlib import Path
import time
from typing import Any

from flax import nnx
import from_trained as ours
from from_trained_programs import DEVIATION, MEAN, SHAPE, Network, of_latents
from from_trained_rows import FADE, ONE, REHEARSAL, Bench, cosine, found_widths, pruned_row
import jax
import numpy as np
from torch_resnet import check_same, layers_of, network, torch_inputs, train, trainer

import dhp_jax as dhp
from dhp_jax.budgets.timing import quartiles, time_in_turn

NAME, TITLE = "beside_torch_pruning", "Beside Torch-Pruning 1.6"
NOTE = (
    "ResNet-20 on CIFAR-10 (JPEG), pruned from the same trained weights and finetuned for the same "
    "updates on the same images. FLOPs are counted by the library. A mean over the seeds, with the "
    "least and the most. Times are medians of passes taken in turn, with quartiles."
)
STEPS = 400  # of the pruner, from nothing to all channels
COMPARED = {  # whether layers are compared, and the largest share of a layer that may go
    "Torch-Pruning, all layers": {"global_pruning": True, "max_pruning_ratio": 1.0},
    "Torch-Pruning, all layers, at most 3/4 go": {
        "global_pruning": True,
        "max_pruning_ratio": 0.75,
    },
    "Torch-Pruning, each layer": {"global_pruning": False, "max_pruning_ratio": 1.0},
}
LATENCY_BATCHES = 1, 256


def widths(net: Network, model) -> dict[str, int]:
    """How many channels each latent of ours has in a PyTorch network."""
    kernels = {"classifier.kernel": model.classifier.weight}
    kernels |= {f"{path}.conv.kernel": layer[0].weight for path, layer in layers_of(model).items()}
    counts = dict(net.sizes)
    for name, weight in kernels.items():
        for latent, size in zip(reversed(net.reads[name]), weight.shape[:2], strict=True):
            if latent is not None:
                counts[latent] = int(size)
    return counts


def pruned_by_torch(torch, bench: Bench, flops: float, options: Mapping[str, Any]):
    """The network that Torch-Pruning leaves within a share of the FLOPs, and the share."""
    import torch_pruning

    model = network(torch, bench.trained).eval()
    pruner = torch_pruning.pruner.GroupNormPruner(
        model,
        torch.zeros(1, 3, *SHAPE[:2]),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=[model.classifier],
        **options,
    )
    for _ in range(STEPS):
        shares = bench.net.cost.shares(widths(bench.net, model))
        if shares["flops"] <= flops:
            return model, shares
        pruner.step()
    raise ValueError(f"flops: Torch-Pruning ended at {shares['flops']:.4f}; expected {flops}")


def torch_row(torch, device, bench: Bench, name: str, flops: float, seed: int) -> None:
    """Prunes and finetunes in PyTorch, and writes the row."""
    began, size = time.monotonic(), bench.size
    model, shares = pruned_by_torch(torch, bench, flops, COMPARED[name])
    model = model.to(device)
    stream = bench.batches(
        seed, cosine(FADE.rate, size.updates, size.segment)(np.arange(size.updates))
    )
    loss = train(torch, device, bench, model, stream, bfloat16=device.type != "cpu")
    bench.write(
        name=name,
        target=flops,
        seed=seed,
        error=torch_error(torch, device, bench, model),
        train_loss=loss,
        **shares,
        widths=widths(bench.net, model),
        updates=size.updates,
        seconds=round(time.monotonic() - began, 3),
    )


def torch_error(torch, device, bench: Bench, model) -> float:
    """The test error in percent."""
    images, labels = bench.test
    model.eval()
    wrong = 0
    with torch.no_grad():
        for at in range(0, len(labels), bench.size.batch):
            part = slice(at, at + bench.size.batch)
            x = (images[part].astype(np.float32) - MEAN) / DEVIATION
            found = model(torch_inputs(torch, device, x)).argmax(1).cpu().numpy()
            wrong += int((found != labels[part]).sum())
    return 100 * wrong / len(labels)


def latencies(torch, device, bench: Bench, flops: float, options: argparse.Namespace) -> None:
    """Times forward passes of whole and pruned networks of both, in turn, and writes the row."""
    model = of_latents(bench.net, bench.trained)
    whole = {name: np.ones(size, bool) for name, size in bench.net.sizes.items()}
    modules = {"ours, whole": dhp.prune(model)}
    for name in options.ways:
        found = found_widths(bench, name, flops, options.seeds[0])
        modules[f"ours, {name}"] = dhp.prune(model, whole | found)
    theirs = {
        name: pruned_by_torch(torch, bench, flops, COMPARED[name])[0] for name in options.compared
    }
    theirs["torch, whole"] = network(torch, bench.trained)
    for batch in LATENCY_BATCHES if bench.size != REHEARSAL else (4,):
        x = np.zeros((batch, *SHAPE), np.float32)
        passes = {name: of_ours(module, x) for name, module in modules.items()}
        for name, module in theirs.items():
            passes[name] = of_torch(torch, device, copy.deepcopy(module), x)
        seconds = time_in_turn(passes, options.rounds, 60)
        found = {name: quartiles([1e3 * s for s in values]) for name, values in seconds.items()}
        bench.write(name="forward pass", share=flops, batch=batch, ms=found)


def of_ours(model: nnx.Module, x: np.ndarray) -> Callable[[], None]:
    x, run = jax.numpy.asarray(x), dhp.inference(model)
    return lambda: jax.block_until_ready(run(x))


def of_torch(torch, device, model, x: np.ndarray) -> Callable[[], None]:
    model, x = model.to(device).eval(), torch_inputs(torch, device, x)

    def run() -> None:
        with torch.no_grad():
            found = model(x)
        if device.type != "cpu":
            torch.cuda.synchronize()
        del found

    return run


def publish(options: argparse.Namespace) -> None:
    """Makes the JSON and Markdown of rows that were measured."""
    from record import table_of, with_quartiles, write

    rows, about = ours.measured(options.table)
    found: dict[tuple[float, str], list[dict]] = {}
    for row in rows:
        if "target" in row:
            found.setdefault((row["target"], row["name"]), []).append(row)
    cells = [
        (
            f"{target:.0%}",
            name,
            ours.mean_and_range([100 * row["flops"] for row in some], ".2f", " %"),
            ours.mean_and_range([row["error"] for row in some], ".2f", " %"),
            len(some),
        )
        for (target, name), some in sorted(
            found.items(), key=lambda item: (-item[0][0], item[0][1])
        )
    ]
    errors = table_of([">FLOPs asked for", "row", ">FLOPs", ">test error", ">seeds"], cells)
    cells = [
        (f"{row['share']:.0%}", row["batch"], name, with_quartiles(ms, ".2f"))
        for row in rows
        if row["name"] == "forward pass"
        for name, ms in row["ms"].items()
    ]
    times = table_of([">FLOPs", ">batch", "network", ">forward pass, ms"], cells)
    text = f"## Errors\n\n{errors}\n\n## Forward passes\n\n{times}"
    print(text)
    write(options.out, NAME, TITLE, NOTE, rows, text, about)


def main() -> None:
    parser = ours.parser_of(__doc__, minutes=60)
    parser.add_argument("--rounds", type=int, default=50, help="of forward passes")
    known = {way.name: way for way in (*ONE.values(), FADE)}
    for flag, nargs, names, default, rows in (
        ("--ways", "*", known, ["group", "fade"], "ours"),
        ("--compared", "+", COMPARED, list(COMPARED), "others"),
    ):
        named = f"rows of {rows}: some of {'; '.join(names)}"
        parser.add_argument(
            flag, nargs=nargs, metavar="NAME", choices=names, default=default, help=named
        )
    parser.add_argument("--table", type=Path, help="rows.jsonl: publish it, measure nothing")
    options = parser.parse_args()
    if options.table is not None:
        return publish(options)
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = ours.begin(parser, options, dhp, jax, torch)
    if options.rehearse:
        bench.trained = bench.net.fresh(0)
    else:
        ours.load(bench, options)
    check_same(torch, bench)
    finetune = trainer(torch, bfloat16=False) if device.type == "cpu" else None
    for seed in options.seeds:
        for flops in options.targets:
            for way in (*options.compared, *options.ways):
                if bench.left() < 0:
                    return
                if way in COMPARED:
                    torch_row(torch, device, bench, way, flops, seed)
                else:
                    pruned_row(bench, known[way], flops, seed, trainer=finetune)
    for flops in options.targets:
        latencies(torch, device, bench, flops, options)


if __name__ == "__main__":
    main()
