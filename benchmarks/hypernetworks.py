"""Hypernetworks of other sizes and kinds: what each brings, and what it costs.

    python benchmarks/hypernetworks.py --out=benchmarks/results

A ResNet on scikit-learn's digits is searched to half its FLOPs, pruned, and trained further. All
kinds have the same updates in all, and the same images in the same order for a seed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
import statistics
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from record import positive, progress, publish, table_of
from sklearn.datasets import load_digits

import dhp_jax as dhp
from dhp_jax.core.latent import walk
from dhp_jax.core.layers import Hyper
from dhp_jax.core.surgery import override

SHAPE = (8, 8, 1)
BATCH, TRAINED = 64, 1297  # images of a batch, and all of training; 500 are for the test
RATE, STRENGTH, THRESHOLD, TARGET = 0.1, 9e-3, 5e-3, 0.5
CHECKED = 10  # steps between two looks at the budget
NOTE = (
    "ResNet-{depth} of half the width on scikit-learn's digits (1,297 images for training, the "
    "last 500 for the test), half the FLOPs, {updates} updates in all, those of the search "
    "included. `Z = z_in z_out + b0` for every pair of channels; the paper's kernel is "
    "`w2 (w1 Z + b1) + b2`, with arrays of their own for every pair. Tanh: "
    "`w2 tanh(w1 Z + b1) + b2`. Shared embedding: one `w1` and `b1` for all pairs of all layers. "
    "No hypernetwork: `z_in z_out w`. Initial kernels have the variance of the paper's. Numbers a "
    "weight: trained in the search, for each of the network. Step: the median time of a search "
    "step over one of the ordinary network, taken in turns. Search: its updates, and the share of "
    "the FLOPs that its survivors had when it ended, at most; it ends within 0.02 of the target, "
    "or after two thirds of the updates. Errors are means over {seeds} seeds, with the least and "
    "the most; one image is 0.2 points."
)


Batches = Callable[[], tuple[jax.Array, jax.Array]]  # each call gives the next one


class Kind(NamedTuple):
    """A kind of hypernetwork.

    Attributes:
      name: in the table.
      embedding: numbers of an embedding.
      change: of a fresh network, in place.
    """

    name: str
    embedding: int
    change: Callable[[nnx.Module], None] = lambda model: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=3, help="how many")
    parser.add_argument("--depth", type=positive, default=8, help="of the ResNet: 8, 14, 20 ...")
    parser.add_argument("--updates", type=positive, default=1800, help="in all, for each kind")
    names = [kind.name for kind in KINDS]
    named = f"all if none; some of {'; '.join(names)}"
    parser.add_argument("--kinds", nargs="+", metavar="NAME", choices=names, help=named)
    parser.add_argument(
        "--out", type=Path, help="folder for hypernetworks.json and hypernetworks.md"
    )
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if options.kinds is None or kind.name in options.kinds]
    rows = []
    for kind in kinds:
        runs = [run(kind, seed, options.depth, options.updates) for seed in range(options.seeds)]
        rows.append({"kind": kind.name, "runs": runs})
    for row, ratios in zip(rows, step_ratios(kinds, options.depth), strict=True):
        row["step"] = ratios
    note = NOTE.format(depth=options.depth, updates=options.updates, seeds=options.seeds)
    publish(options.out, "hypernetworks", "Kinds of hypernetworks", note, rows, as_table(rows))


def run(kind: Kind, seed: int, depth: int, updates: int) -> dict[str, Any]:
    """One search, its pruned network, and what came of it."""
    model = build(kind, seed, depth)
    cost = dhp.measure_cost(model, SHAPE)
    trained = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    batches = batches_of(seed)
    searched, share = search(model, cost, batches, updates * 2 // 3)
    small = dhp.prune_to(model, SHAPE, flops=TARGET)
    after = dhp.measure_cost(small, SHAPE)
    left = updates - searched
    rates = optax.piecewise_constant_schedule(RATE, {left // 2: 0.1, left * 3 // 4: 0.1})
    train(small, sgd(rates), batches, left)
    found = {
        "seed": seed,
        "numbers a weight": trained / cost.params,
        "search": searched,
        "flops after the search": share,
        "flops": after.flops / cost.flops,
        "params": after.params / cost.params,
        "error": error_of(small),
    }
    progress(f"{kind.name}: {found}")
    return found


def build(kind: Kind, seed: int, depth: int) -> nnx.Module:
    """A fresh network with hypernetworks of a kind."""
    arguments = {"depth": depth, "width": 0.5, "channels": 1, "embedding": kind.embedding}
    model = dhp.models.build("resnet", **arguments, rngs=nnx.Rngs(seed))
    kind.change(model)
    return model


def sgd(rates: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rates, momentum=0.9))


def search(model: nnx.Module, cost: dhp.Cost, batches: Batches, most: int) -> tuple[int, float]:
    """Trains with the proximal step until the budget is nearly met; returns steps and share."""
    mask = dhp.prunable_latents(nnx.state(model, nnx.Param))
    shrink = optax.masked(dhp.prox_l1(STRENGTH, RATE), mask)
    step = stepper(model, optax.chain(sgd(RATE), shrink))
    done, share = 0, 1.0
    while share > TARGET + 0.02 and done < most:
        for _ in range(CHECKED):
            step(*batches())
        done += CHECKED
        counts = {name: int(kept.sum()) for name, kept in dhp.survivors(model, THRESHOLD).items()}
        share = float(cost.shares(counts)["flops"])
    return done, share


def train(
    model: nnx.Module, tx: optax.GradientTransformation, batches: Batches, steps: int
) -> None:
    step = stepper(model, tx)
    for _ in range(steps):
        step(*batches())


def stepper(model: nnx.Module, tx: optax.GradientTransformation) -> Callable[..., None]:
    """A function of images and labels that trains a network by a step, in place."""
    model.train()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(model: nnx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    def step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
        optimizer.update(model, nnx.grad(loss)(model, x, y))

    return nnx.cached_partial(nnx.jit(step, donate_argnums=(0, 1)), model, optimizer)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """All images, in [-1, 1], and their labels; the last are of other writers."""
    given = load_digits()
    return np.float32(given.images[..., None] / 8 - 1), given.target


def batches_of(seed: int) -> Batches:
    """A function that returns the next batch."""
    images, labels = digits()
    rng = np.random.default_rng(seed)

    def following() -> tuple[jax.Array, jax.Array]:
        chosen = rng.integers(TRAINED, size=BATCH)
        return jnp.asarray(images[chosen]), jnp.asarray(labels[chosen])

    return following


def error_of(model: nnx.Module) -> float:
    images, labels = digits()
    model.eval()
    outputs = dhp.inference(model)(jnp.asarray(images[TRAINED:]))
    return float(np.mean(np.argmax(outputs, -1) != labels[TRAINED:]))


def tanh_kernels(model: nnx.Module) -> None:
    """Puts a tanh behind the embedding."""
    for layer in hypernetworks(model):
        override(layer, kernel=_tanh_kernel)
    keep_variance(model)


def shared_embedding(model: nnx.Module) -> None:
    """One embedding layer for all pairs of all layers."""
    layers = hypernetworks(model)
    m = layers[0].w1.shape[0]
    w1 = nnx.Param(jnp.linspace(-jnp.sqrt(3.0), jnp.sqrt(3.0), m).reshape(m, 1, 1))
    b1 = nnx.Param(jnp.zeros((m, 1, 1)))
    for layer in layers:
        layer.w1, layer.b1 = w1, b1
        override(layer, kernel=_shared_kernel)
    keep_variance(model)


def shared_tanh(model: nnx.Module) -> None:
    """One embedding layer for all pairs of all layers, with a tanh behind it."""
    shared_embedding(model)
    tanh_kernels(model)


def no_hypernetwork(model: nnx.Module) -> None:
    """A number for every weight, multiplied by the latents of its two axes."""
    for layer in hypernetworks(model):
        weight = layer.w2[..., 0, :, :]
        for name in ("w1", "b0", "b1", "w2", "b2"):
            delattr(layer, name)
        layer.weight = nnx.Param(weight)
        override(layer, kernel=_scaled_kernel)
    keep_variance(model)


def hypernetworks(model: nnx.Module) -> list[Hyper]:
    return [layer for _, _, layer in walk(model) if isinstance(layer, Hyper)]


def keep_variance(model: nnx.Module) -> None:
    """Scales the last arrays so that kernels begin with the variance 1 / fan-in of the paper's."""
    for layer in hypernetworks(model):
        kernel = layer.kernel()
        fan_in = kernel.size // kernel.shape[-1]
        last = layer.w2 if hasattr(layer, "w2") else layer.weight
        last.set_value(last[...] / (jnp.std(kernel) * fan_in**0.5))


def _pairs(layer: Hyper) -> jax.Array:
    return layer.kernel_axis().value()[:, None] * layer.z_out.value()


def _tanh_kernel(_: Callable[..., Any], layer: Hyper) -> jax.Array:
    embedding = jnp.tanh(layer.w1[...] * (_pairs(layer) + layer.b0[...]) + layer.b1[...])
    return (layer.w2[...] * embedding).sum(-3) + layer.b2[...]


def _shared_kernel(_: Callable[..., Any], layer: Hyper) -> jax.Array:
    embedding = layer.w1[...] * (_pairs(layer) + layer.b0[...]) + layer.b1[...]
    return (layer.w2[...] * embedding).sum(-3) + layer.b2[...]


def _scaled_kernel(_: Callable[..., Any], layer: Hyper) -> jax.Array:
    return layer.weight[...] * _pairs(layer)


KINDS = (
    Kind("paper's, embedding 8", 8),
    Kind("paper's, embedding 4", 4),
    Kind("paper's, embedding 2", 2),
    Kind("paper's, embedding 1", 1),
    Kind("tanh, embedding 8", 8, tanh_kernels),
    Kind("shared embedding of 10", 10, shared_embedding),
    Kind("shared embedding of 10, tanh", 10, shared_tanh),
    Kind("no hypernetwork", 1, no_hypernetwork),
)


def step_ratios(kinds: list[Kind], depth: int, rounds: int = 5, steps: int = 20) -> list[list]:
    """For each kind the times of a search step over those of an ordinary one, one a round."""
    batch = batches_of(0)()
    plain = stepper(dhp.prune(build(KINDS[0], 0, depth)), sgd(RATE))
    searches = []
    for kind in kinds:
        model = build(kind, 0, depth)
        mask = dhp.prunable_latents(nnx.state(model, nnx.Param))
        shrink = optax.masked(dhp.prox_l1(STRENGTH, RATE), mask)
        searches.append(stepper(model, optax.chain(sgd(RATE), shrink)))
    for step in (plain, *searches):
        step(*batch)

    def seconds(step: Callable[..., None]) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step(*batch)
        return time.perf_counter() - began

    ratios: list[list[float]] = [[] for _ in kinds]
    for _ in range(rounds):
        for found, step in zip(ratios, searches, strict=True):
            found.append(seconds(step) / seconds(plain))
    return ratios


def as_table(rows: list[dict[str, Any]]) -> str:
    columns = [
        "kind",
        ">numbers a weight",
        ">step",
        ">search",
        ">FLOPs then",
        ">params",
        ">test error",
    ]
    lines = []
    for row in rows:
        runs = row["runs"]
        errors = [100 * run["error"] for run in runs]
        lines.append(
            (
                row["kind"],
                f"{runs[0]['numbers a weight']:.1f}",
                f"{statistics.median(row['step']):.2f}",
                f"{statistics.mean(run['search'] for run in runs):.0f}",
                f"{100 * max(run['flops after the search'] for run in runs):.0f} %",
                f"{100 * statistics.mean(run['params'] for run in runs):.0f} %",
                f"{statistics.mean(errors):.2f} % ({min(errors):.2f} to {max(errors):.2f})",
            )
        )
    return table_of(columns, lines)


if __name__ == "__main__":
    main()
