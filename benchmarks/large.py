"""How long does it take to prune a network of one's own, and how much memory?

    python benchmarks/large.py             # transformers and ResNets of plain flax.nnx
    python benchmarks/large.py --quick     # a smoke run of a few seconds

Each network is measured in a process of its own: `with_latents`, which traces it, `group_scores`,
and `prune_to` to half the FLOPs, which traces it again. The peak is the most memory that the
process has had by then, JAX's own 0.3 GB among it.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from pathlib import Path
import resource
import sys
import time

from flax import nnx
import jax
from record import publish_each, table_of

import dhp_jax as dhp

TITLE = "Pruning a network of one's own"
NOTE = (
    "Seconds, each network in a fresh process, one run, and the most memory that the process has "
    "had by then, in GB. Built: the network, with its weights, before it is traced; a ResNet is "
    "the plain form of one of hypernetworks, which takes memory."
)
TRANSFORMERS = {  # layers, width, heads
    "transformer, 12 layers of 384": (12, 384, 6),
    "transformer, 24 layers of 384": (24, 384, 6),
    "transformer, 12 layers of 1024": (12, 1024, 16),
}
RESNETS = {"ResNet-50": 50, "ResNet-110": 110}  # of 1,000 and of 10 classes
QUICK = "transformer, 1 layer of 24"
PARTS = ("with_latents", "group_scores", "prune_to")


class Block(nnx.Module):
    """A layer of a transformer, normalised before each part."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.before_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.before_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.before_attention(x))
        return x + self.down(nnx.gelu(self.up(self.before_mlp(x))))


class Transformer(nnx.Module):
    """A classifier of 16 patches of 48 numbers."""

    def __init__(self, layers: int, width: int, heads: int, rngs: nnx.Rngs):
        self.embed = nnx.Linear(48, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def build(name: str) -> tuple[nnx.Module, tuple[int, ...]]:
    """A network without latents, and the shape of an example."""
    rngs = nnx.Rngs(0)
    if name == QUICK:
        return Transformer(1, 24, 2, rngs), (16, 48)
    if name in TRANSFORMERS:
        return Transformer(*TRANSFORMERS[name], rngs), (16, 48)
    classes, side = (1000, 224) if RESNETS[name] == 50 else (10, 32)
    made = dhp.models.build("resnet", depth=RESNETS[name], num_classes=classes, rngs=rngs)
    return dhp.prune(made), (side, side, 3)


def measure(name: str) -> dict:
    """Seconds and the peak of memory of each part."""
    model, shape = build(name)
    row = {"network": name, "built_gb": peak()}
    row["params"] = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    net = timed(row, "with_latents", lambda: dhp.with_latents(model, shape))
    scores = timed(row, "group_scores", lambda: dhp.group_scores(net))
    small = timed(row, "prune_to", lambda: dhp.prune_to(net, flops=0.5, by=scores))
    row["params_left"] = sum(x.size for x in jax.tree.leaves(nnx.state(small, nnx.Param)))
    return row


def timed(row: dict, part: str, function):
    """What a function returns; its seconds and the peak are written into a row."""
    began = time.perf_counter()
    made = function()
    row[f"{part}_s"], row[f"{part}_gb"] = time.perf_counter() - began, peak()
    return made


def peak() -> float:
    """The most memory that this process has had, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def as_table(rows: list[dict]) -> str:
    columns = ["network", ">params", ">built, GB", *(f">{part}" for part in PARTS), ">params left"]
    cells = [
        [
            row["network"],
            f"{row['params'] / 1e6:,.1f} M",
            f"{row['built_gb']:.2f}",
            *(f"{row[f'{part}_s']:.1f} s, {row[f'{part}_gb']:.2f} GB" for part in PARTS),
            f"{row['params_left'] / 1e6:,.1f} M",
        ]
        for row in rows
    ]
    return table_of(columns, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few seconds")
    parser.add_argument("--out", type=Path, help="folder for the results as JSON and Markdown")
    options = parser.parse_args()
    names = [QUICK] if options.quick else [*TRANSFORMERS, *RESNETS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as fresh:
        publish_each(options.out, "large", TITLE, NOTE, fresh.map(measure, names), as_table)


if __name__ == "__main__":
    main()
