"""Prune convolutional networks by differentiable meta pruning; see README.md."""

from dhp_jax import models
from dhp_jax.backend import compiler_options, inference
from dhp_jax.budgets import prune_to
from dhp_jax.checkpoint import load, save
from dhp_jax.cost import Cost, measure_cost
from dhp_jax.criteria import l1_scores, random_scores, uniform_within
from dhp_jax.fold import fold
from dhp_jax.hypernet import hyper_kernel
from dhp_jax.latent import Axis, Latent, LatentVector, concat, latents, repeat
from dhp_jax.layers import BatchNorm, Bias, HyperConv, HyperConvTranspose, Linear
from dhp_jax.optimizer import prunable_latents
from dhp_jax.prox import prox_l1, prox_l2
from dhp_jax.prune import BudgetError, check_axes, prune, survivors
from dhp_jax.reuse import with_classes, with_latents

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "BatchNorm",
    "Bias",
    "BudgetError",
    "Cost",
    "HyperConv",
    "HyperConvTranspose",
    "Latent",
    "LatentVector",
    "Linear",
    "check_axes",
    "compiler_options",
    "concat",
    "fold",
    "hyper_kernel",
    "inference",
    "l1_scores",
    "latents",
    "load",
    "measure_cost",
    "models",
    "prox_l1",
    "prox_l2",
    "prunable_latents",
    "prune",
    "prune_to",
    "random_scores",
    "repeat",
    "save",
    "survivors",
    "uniform_within",
    "with_classes",
    "with_latents",
]
