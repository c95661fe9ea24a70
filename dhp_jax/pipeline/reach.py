"""Whether a search can come down to its budget with its schedule, told before it begins."""

import logging

from flax import nnx

from dhp_jax.core.latent import latents
from dhp_jax.core.survivors import survivor_counts
from dhp_jax.pipeline.preparation import Run, length_field, most_steps, schedule_of
from dhp_jax.report.format import in_words
from dhp_jax.train.optimizer import largest_to_vanish
from dhp_jax.train.phase import Budget

logger = logging.getLogger(__name__)


def tell_reach(run: Run, model: nnx.Module, budget: Budget) -> None:
    """Warns of a search whose steps are too few or too small to bring its latents to the budget.

    The model is the network of latents before the first step.
    """
    config, settings = run.config, run.config.search
    largest = largest_to_vanish(
        config.optimizer.name,
        schedule_of(run, "search"),
        most_steps(run, "search"),
        strength=settings.strength,
        threshold=settings.threshold,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay if config.optimizer.decayed == "all" else 0.0,
    )
    counts = survivor_counts(model, largest)
    shares = {name: float(share) for name, share in run.cost.shares(counts).items()}
    if all(shares[name] <= limit for name, limit in budget.limits.items()):
        return
    prunable = {name: z.size for name, z in latents(model).items() if z.prunable}
    gone = 1 - sum(int(counts[name]) for name in prunable) / sum(prunable.values())
    logger.warning(
        "search: may not come down to %s: within %s entries of latents below %.3g "
        "reach search.threshold unless the loss moves them, %.0f %% of all, which leaves %s",
        in_words(budget.limits),
        length_field(run, "search"),
        largest,
        100 * gone,
        in_words({name: round(shares[name], 3) for name in budget.limits}),
    )
