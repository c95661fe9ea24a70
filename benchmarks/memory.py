"""How much memory does a search step take at its peak, beside what training cannot do without?

The peak is that of the compiled program, by XLA's own analysis: its arguments, results that do not
take an argument's place, and temporary arrays. It is compared with the sum of

- the parameters that the search trains, those of hypernetworks and latents among them,
- the state of its optimizer,
- a gradient of each parameter,
- the activations of the plain network: every array that `jax.vjp` of its loss keeps for the
  backward pass, the input images among them, but for parameters and constants. That is what enters
  each convolution and each BatchNorm, and which entries a ReLU let through. A compiler may do with
  less, or need more.

    python benchmarks/memory.py                        # the networks of the paper's tasks
    python benchmarks/memory.py --networks resnet164   # some of them
    python benchmarks/memory.py --quick                # a smoke run of a few seconds
"""

from flax import nnx
import jax
from programs import activation_bytes, peak_bytes, size
from record import parser, publish_each, table_of
from zoo import NETWORKS, QUICK, Network, search_step, task_on

import dhp_jax as dhp
from dhp_jax.train.state import TrainState

MOST = 1.25  # what the peak may be of the sum
NAMES = ("resnet20", "resnet56", "resnet110", "mobilenet_v2", "dncnn", "srresnet_x4", "unet")
NOTE = f"""MB of one search step, float32, from the compiled program. Needed: parameters and
optimizer state of the search, a gradient of each parameter, and activations: what `jax.vjp` of the
plain network's loss keeps, but for parameters. Peak / needed is meant to be at most {MOST}.
Plain peak: of the step of the same network without latents."""


def main() -> None:
    options = parser(__doc__, NAMES).parse_args()
    names = [QUICK] if options.quick else options.networks
    rows = (measure(NETWORKS[name], options.quick) for name in names)
    publish_each(options.out, "memory", "Memory of a search step", NOTE, rows, as_table)


def measure(network: Network, quick: bool) -> dict:
    """Bytes at the peak of the search step, and of each part of what it is compared with."""
    model = network.build(width=0.25) if quick else network.build()
    batch = 4 if quick else network.batch
    plain = dhp.prune(model)
    advance, state, inputs = search_step(network, model, batch)
    needed = needed_bytes(network, plain, state, batch)
    peak = peak_bytes(advance.lower(jax.tree.leaves(state), *inputs).compile())
    advance, state, inputs = search_step(network, plain, batch)
    return {
        "network": network.label,
        "batch": batch,
        **{f"{name}_bytes": value for name, value in needed.items()},
        "peak_bytes": peak,
        "ratio": peak / sum(needed.values()),
        "plain_peak_bytes": peak_bytes(advance.lower(jax.tree.leaves(state), *inputs).compile()),
    }


def needed_bytes(
    network: Network, plain: nnx.Module, state: TrainState, batch: int
) -> dict[str, int]:
    """Bytes of each part of what training in this state cannot do without."""
    return {
        "parameters": size(state.params),
        "optimizer": size(state.opt_state),
        "gradients": size(state.params),
        "activations": activation_bytes(plain, *task_on(network, batch), batch),
    }


def as_table(rows: list[dict]) -> str:
    sizes = ("parameters", "optimizer", "gradients", "activations", "peak", "plain_peak")
    columns = ["network", ">batch", *(f">{name.replace('_', ' ')}" for name in sizes)]
    cells = [
        (
            row["network"],
            row["batch"],
            *(f"{row[f'{name}_bytes'] / 1e6:,.1f}" for name in sizes),
            f"{row['ratio']:.2f}",
        )
        for row in rows
    ]
    return table_of([*columns, ">peak / needed"], cells)


if __name__ == "__main__":
    main()
