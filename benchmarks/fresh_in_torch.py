"""The rows of from_trained.py with fresh weights, trained by PyTorch, which is sooner on a CPU.

    python benchmarks/fresh_in_torch.py --data cifar10.pack --out DIR \
        --weights benchmarks/results/from_trained_resnet20.npz --seeds 0 --targets 0.25
    python benchmarks/fresh_in_torch.py --rehearse --out DIR

It needs `pip install torch`, which is no package of the library. The library chooses the widths,
draws the weights, and cuts out the images. PyTorch carries out the updates of the same recipe:
those of the trained network and those of every row. The trained weights come back, and the
library tests them. DIR keeps the state of a row that was stopped, and the row goes on from there.
The rows are those that from_trained.py would write, so `from_trained.py --table` publishes them.
"""

import time

import from_trained as ours
from from_trained_rows import FRESH, Bench, Way, cosine, cut, updates_of, write_row
import jax
import numpy as np
from torch_resnet import check_same, layers_of, network, train

import dhp_jax as dhp


def fresh_row(torch, bench: Bench, way: Way, flops: float, seed: int, *, bfloat16: bool) -> None:
    """Trains fresh weights, with the updates of the trained network too, and writes the row."""
    began, updates = time.monotonic(), updates_of(bench, way)
    mask = cut(bench, way, flops, seed)
    small, _ = bench.cut_down(bench.begin(bench.trained), mask)
    model = network(torch, small.net.fresh(seed))
    stream = bench.batches(seed, cosine(way.rate, updates, bench.size.segment)(np.arange(updates)))
    dtype = "bfloat16" if bfloat16 else "float32"
    kept = bench.out / f"{way.by}_{flops}_{seed}_{updates}_{dtype}.pt"
    device = torch.device("cpu")
    loss = train(torch, device, bench, model, stream, bfloat16=bfloat16, kept=kept)
    run = small.begin(arrays_of(model, small.net.arrays()))
    found = small.evaluate(run, {}) | {"after_cut": None, "train_loss": loss}
    by = f"torch {torch.__version__}, {dtype}"
    write_row(bench, way, flops, seed, mask, began, **found, trained_by=by)
    kept.unlink(missing_ok=True)


def arrays_of(model, names) -> dict[str, np.ndarray]:
    """Weights and statistics of a PyTorch network, by the names that ours have for them."""
    found = {
        "classifier.kernel": model.classifier.weight.T,
        "classifier.bias": model.classifier.bias,
    }
    for path, (conv, norm) in layers_of(model).items():
        found[f"{path}.conv.kernel"] = conv.weight.permute(2, 3, 1, 0)
        found[f"{path}.norm.scale"], found[f"{path}.norm.bias"] = norm.weight, norm.bias
        found[f"{path}.norm.mean"], found[f"{path}.norm.var"] = norm.running_mean, norm.running_var
    return {name: found[name].detach().numpy().copy() for name in names}


def main() -> None:
    parser = ours.parser_of(__doc__, minutes=600)
    parser.add_argument("--targets", type=float, nargs="+", default=list(ours.TARGETS))
    parser.add_argument("--ways", nargs="+", choices=[way.by for way in FRESH], default=["uniform"])
    parser.add_argument("--bfloat16", action="store_true", help="as the rows of an accelerator")
    options = parser.parse_args()
    import torch

    bench = ours.begin(parser, options, dhp, jax, torch)
    bench.trained = bench.net.fresh(0) if options.rehearse else ours.stored(options.weights)
    check_same(torch, bench)
    for seed in options.seeds:
        for flops in options.targets:
            for way in FRESH:
                if way.by in options.ways and bench.left() > 0:
                    fresh_row(torch, bench, way, flops, seed, bfloat16=options.bfloat16)


if __name__ == "__main__":
    main()
