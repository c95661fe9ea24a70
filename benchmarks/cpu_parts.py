"""Where does the time of a residual block go on a CPU, part by part, in XLA and in PyTorch?

The parts of a 3x3 convolution with BatchNorm and ReLU at the three shapes of a CIFAR ResNet, and at
the first of a pruned one, batch 64, taken in turn in one process: XLA as the library uses it,
PyTorch, and XLA with the convolution written in other ways. Pinned to one core it compares the
work; with two it shows which parts use both.

    taskset -c 1 python benchmarks/cpu_parts.py    # one core
    python benchmarks/cpu_parts.py                 # all cores
"""

import argparse
from collections.abc import Callable
import functools
import os
from pathlib import Path
import time

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from record import positive, publish_each, table_of
import torch
from torch.nn import functional

from dhp_jax.backend.cpu_conv import LAYOUT, _kernel_gradient, convolution
from dhp_jax.backend.norm import _normalize
from dhp_jax.backend.platform import compiler_options

BATCH, SHAPES = 64, ((32, 8), (32, 16), (16, 32), (8, 64))
PADS = ((1, 1), (1, 1))
NOTE = (
    "Milliseconds, batch 64, the least of {} rounds. BatchNorm is with ReLU, forward and backward. "
    "PyTorch has channels last, its faster layout."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=60)
    parser.add_argument("--out", type=Path, help="folder for the results as JSON and Markdown")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    name = "cpu_parts_1" if cores == 1 else "cpu_parts"
    title = f"Parts of a residual block on {cores} CPU core{'s' * (cores > 1)}"
    rows = (measure(*shape, options.rounds) for shape in SHAPES)
    publish_each(options.out, name, title, NOTE.format(options.rounds), rows, as_table)


def measure(side: int, channels: int, rounds: int) -> dict:
    """The least time of each part, in milliseconds."""
    parts = parts_of(side, channels)
    best = dict.fromkeys(parts, float("inf"))
    for number in range(rounds + 1):
        for name, run in parts.items():
            started = time.perf_counter()
            run()
            if number:  # the first compiles
                best[name] = min(best[name], time.perf_counter() - started)
    found = [
        {"part": part, "library": library, "ms": 1e3 * seconds}
        for (part, library), seconds in best.items()
    ]
    return {"shape": f"{side}x{side}x{channels}", "parts": found}


def parts_of(side: int, channels: int) -> dict[tuple[str, str], Callable[[], object]]:
    """What is measured, by the name of the part and of the library."""
    random = np.random.default_rng(0)
    shape = BATCH, side, side, channels
    x, grad = (jnp.asarray(random.normal(size=shape), jnp.float32) for _ in range(2))
    kernel = jnp.asarray(random.normal(size=(3, 3, channels, channels)), jnp.float32)
    scale, bias = jnp.ones(channels), jnp.zeros(channels)
    compiled = functools.partial(jax.jit, compiler_options=compiler_options())

    def normal(x, scale, bias):
        return jax.nn.relu(_normalize(x, (bias, scale), scale, bias, 0.9, 1e-5)[0])

    forward = compiled(lambda x, kernel: convolution(x, kernel, (1, 1), PADS))
    to_input = compiled(
        lambda x, kernel, grad: jax.vjp(lambda x: forward.__wrapped__(x, kernel), x)[1](grad)
    )
    to_kernel = compiled(lambda x, g: _kernel_gradient(x, g, (3, 3), (1, 1), PADS, (1, 1)))
    norm = compiled(lambda g, *given: jax.vjp(normal, *given)[1](g))
    others = {
        ("forward", "XLA, one column at a time"): (by_single_columns, x, kernel),
        ("forward", "XLA, patches"): (by_patches, x, kernel),
        ("forward", "XLA, nine products"): (by_nine_products, x, kernel),
        ("to kernel", "XLA, patches"): (gradient_by_patches, x, grad),
        ("to kernel", "XLA, halves of the batch"): (gradient_by_halves, x, grad),
        ("to kernel", "XLA, two columns"): (gradient_by_columns, x, grad),
        ("to kernel", "XLA, three rows"): (gradient_by_rows, x, grad),
    }
    check_ways(forward(x, kernel), to_kernel(x, grad), others)
    theirs, their_grad = (_to_torch(array, (0, 3, 1, 2)) for array in (x, grad))
    their_kernel = _to_torch(kernel, (3, 2, 0, 1))

    def backward(*wanted: bool) -> object:
        given = their_grad, theirs, their_kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        return torch.ops.aten.convolution_backward(*given, [*wanted, False])

    def their_norm() -> object:
        given = theirs.requires_grad_(), torch.ones(channels, requires_grad=True)
        shift, mean, var = torch.zeros(channels, requires_grad=True), *torch.eye(2, channels)
        y = functional.batch_norm(given[0], mean, var, given[1], shift, training=True)
        return torch.autograd.grad(functional.relu(y), (*given, shift), their_grad)

    return {
        **{
            name: functools.partial(waited_for, compiled(way), *given)
            for name, (way, *given) in others.items()
        },
        ("forward", "XLA"): lambda: jax.block_until_ready(forward(x, kernel)),
        ("forward", "PyTorch"): lambda: functional.conv2d(theirs.detach(), their_kernel, padding=1),
        ("to input", "XLA"): lambda: jax.block_until_ready(to_input(x, kernel, grad)),
        ("to input", "PyTorch"): lambda: backward(True, False),
        ("to kernel", "XLA"): lambda: jax.block_until_ready(to_kernel(x, grad)),
        ("to kernel", "PyTorch"): lambda: backward(False, True),
        ("BatchNorm", "XLA"): lambda: jax.block_until_ready(norm(grad, x, scale, bias)),
        ("BatchNorm", "PyTorch"): their_norm,
    }


def waited_for(function: Callable[..., jax.Array], *given: jax.Array) -> jax.Array:
    return jax.block_until_ready(function(*given))


def shifted(x: jax.Array) -> list[jax.Array]:
    """What the nine taps meet, each in the shape of `x`."""
    side = x.shape[1]
    padded = jnp.pad(x, ((0, 0), *PADS, (0, 0)))
    return [padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]


def patches(x: jax.Array) -> jax.Array:
    """The numbers that every output is made of, `(pixels, 9 * channels)`."""
    return jnp.concatenate(shifted(x), -1).reshape(-1, 9 * x.shape[-1])


def by_single_columns(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), PADS, dimension_numbers=LAYOUT)


def by_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    return (patches(x) @ kernel.reshape(9 * channels, -1)).reshape(x.shape)


def by_nine_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    taps = kernel.reshape(9, *kernel.shape[2:])
    return sum(part @ tap for part, tap in zip(shifted(x), taps, strict=True))


def gradient_by_patches(x: jax.Array, grad: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    return (patches(x).T @ grad.reshape(-1, channels)).reshape(3, 3, channels, channels)


def gradient_by_halves(x: jax.Array, grad: jax.Array) -> jax.Array:
    halves = zip(jnp.split(x, 2), jnp.split(grad, 2), strict=True)
    return sum(_kernel_gradient(*half, (3, 3), (1, 1), PADS, (1, 1)) for half in halves)


def gradient_by_columns(x: jax.Array, grad: jax.Array) -> jax.Array:
    """Of a kernel of four columns for two columns of the gradient, added where taps are alike."""
    batch, side, _, channels = grad.shape
    pairs = grad.reshape(batch, side, side // 2, 2 * channels)
    found = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        pairs.transpose(1, 2, 0, 3),
        (1, 1),
        PADS,
        rhs_dilation=(1, 2),
        dimension_numbers=LAYOUT,
    )
    found = found[:, :, :3, :channels] + found[:, :, 1:, channels:]
    return found.transpose(1, 2, 0, 3)


def gradient_by_rows(x: jax.Array, grad: jax.Array) -> jax.Array:
    """Of a kernel of one row for three rows of the gradient, which lie side by side as channels."""
    side, channels = grad.shape[1], grad.shape[-1]
    padded = jnp.pad(grad.transpose(1, 2, 0, 3), (PADS[0], (0, 0), (0, 0), (0, 0)))
    rows = jnp.concatenate([padded[i : i + side] for i in range(3)], -1)
    found = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), rows, (1, 1), ((0, 0), PADS[1]), dimension_numbers=LAYOUT
    )
    return found.reshape(channels, 3, 3, channels)[:, :, ::-1].transpose(2, 1, 0, 3)


def check_ways(output: jax.Array, gradient: jax.Array, ways: dict[tuple[str, str], tuple]) -> None:
    """Raises unless the other ways compute the same."""
    for (part, _), (way, *given) in ways.items():
        wanted = output if part == "forward" else gradient
        np.testing.assert_allclose(way(*given), wanted, rtol=1e-3, atol=1e-3 * wanted.std())


def _to_torch(array: jax.Array, order: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(array).transpose(order))
    return tensor.contiguous(memory_format=torch.channels_last)


def as_table(rows: list[dict]) -> str:
    cells = [
        (
            row["shape"],
            *(part["part"], part["library"], f"{part['ms']:.2f}"),
        )
        for row in rows
        for part in row["parts"]
    ]
    return table_of(["shape", "part", "library", ">ms"], cells)


if __name__ == "__main__":
    main()
