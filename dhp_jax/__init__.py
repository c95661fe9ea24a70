"""Makes networks of JAX smaller: channels are removed, and what is left is an ordinary network.

A trained network, of `flax.nnx`, `FromLinen` or `FromFunction`, at half its FLOPs:

    net = dhp.with_latents(model, (32, 32, 3))  # which channels can go; `explain(net)` tells why
    small = dhp.prune_to(net, flops=0.5, by=dhp.group_scores(net))
    print(dhp.summary(net, small, batch=64))
    dhp.save("small", small)

`prune_to` takes other scores (`l1_scores`, `taylor_scores`, ...) and other budgets. A search from
trained weights is `with_gates` and `fade_to_budget`. The search of DHP (arXiv 2003.13683) from
fresh weights is a network of `Latent`, `HyperConv` and other layers, or one of `models.build`,
trained with `prox_l1`.
"""

import sys

if (
    sys.argv[:1] == ["-m"]  # of `python -m dhp_jax.export`; the imports take a second or two
    and any(argument.startswith(f"{__name__}.") for argument in sys.orig_argv)
    and sys.stderr.isatty()
):
    print("loading    dhp_jax", file=sys.stderr, flush=True)

from dhp_jax import models
from dhp_jax.artifact.reading import load
from dhp_jax.artifact.writing import save
from dhp_jax.backend.inference import inference
from dhp_jax.backend.memory import keep_memory
from dhp_jax.backend.platform import compiler_options
from dhp_jax.budgets.axes import check_axes
from dhp_jax.budgets.before_and_after import Summary, summary
from dhp_jax.budgets.counted import BudgetError
from dhp_jax.budgets.derivatives import gradient_scores, taylor_scores
from dhp_jax.budgets.gradual import fade_to_budget
from dhp_jax.budgets.importance import (
    fpgm_scores,
    group_scores,
    l1_scores,
    l2_scores,
    per_cost,
    random_scores,
    scale_scores,
)
from dhp_jax.budgets.selection import prune_to
from dhp_jax.budgets.uniform import uniform_within
from dhp_jax.core.activations import PReLU
from dhp_jax.core.cost import Cost
from dhp_jax.core.hypernet import hyper_kernel
from dhp_jax.core.latent import (
    Axis,
    Latent,
    LatentVector,
    concat,
    latents,
    prunable_latents,
    repeat,
)
from dhp_jax.core.layers import (
    BatchNorm,
    Bias,
    GroupNorm,
    HyperConv,
    HyperConvTranspose,
    HyperLinear,
    LayerNorm,
    Linear,
    RMSNorm,
)
from dhp_jax.core.plain import Prunable
from dhp_jax.core.survivors import survivors
from dhp_jax.models.functions import FromFunction
from dhp_jax.models.linen import FromLinen, pruned_linen
from dhp_jax.prox import prox_l1, prox_l2
from dhp_jax.pruned.classifier import with_classes
from dhp_jax.pruned.fold import fold
from dhp_jax.pruned.gates import with_gates
from dhp_jax.pruned.relatent import with_latents
from dhp_jax.pruned.statistics import renew_statistics
from dhp_jax.tracing.counts import measure_cost
from dhp_jax.tracing.declared import prune
from dhp_jax.tracing.explain import explain
from dhp_jax.tracing.layer_terms import layer_terms

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "BatchNorm",
    "Bias",
    "BudgetError",
    "Cost",
    "FromFunction",
    "FromLinen",
    "GroupNorm",
    "HyperConv",
    "HyperConvTranspose",
    "HyperLinear",
    "Latent",
    "LatentVector",
    "LayerNorm",
    "Linear",
    "PReLU",
    "Prunable",
    "RMSNorm",
    "Summary",
    "check_axes",
    "compiler_options",
    "concat",
    "explain",
    "fade_to_budget",
    "fold",
    "fpgm_scores",
    "gradient_scores",
    "group_scores",
    "hyper_kernel",
    "inference",
    "keep_memory",
    "l1_scores",
    "l2_scores",
    "latents",
    "layer_terms",
    "load",
    "measure_cost",
    "models",
    "per_cost",
    "prox_l1",
    "prox_l2",
    "prunable_latents",
    "prune",
    "prune_to",
    "pruned_linen",
    "random_scores",
    "renew_statistics",
    "repeat",
    "save",
    "scale_scores",
    "summary",
    "survivors",
    "taylor_scores",
    "uniform_within",
    "with_classes",
    "with_gates",
    "with_latents",
]
