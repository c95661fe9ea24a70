"""The optimizers of the method: schedules, SGD or Adam, and the proximal step on the latents."""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from dhp_jax.prox import prox_l1

NAMES = ("sgd", "adam")


def drop_schedule(
    learning_rate: float, drops: Sequence[float], steps_per_epoch: int
) -> optax.Schedule:
    """A learning rate that is divided by 10 at each of some epochs."""
    boundaries = {round(epoch * steps_per_epoch): 0.1 for epoch in drops}
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def optimizer(
    name: str, schedule: optax.Schedule, *, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD with momentum or Adam, with the weight decay added to the gradient.

    Args:
      name: "sgd" or "adam".
      schedule: the learning rate of each step.
      momentum: of SGD; Adam's first decay rate.
      weight_decay: of every parameter, those of latents, hypernetworks and BatchNorm included.

    Raises:
      ValueError: another name.
    """
    if name == "sgd":
        step = optax.sgd(schedule, momentum=momentum)
    elif name == "adam":
        step = optax.adam(schedule, b1=momentum)
    else:
        raise ValueError(f"optimizer.name: expected one of {', '.join(NAMES)}; got {name!r}")
    return optax.chain(optax.add_decayed_weights(weight_decay), step)


def shrink_latents(
    vectors: nnx.State, *, strength: float, schedule: optax.Schedule, threshold: float
) -> optax.GradientTransformation:
    """The proximal step of the search on each prunable latent; last in the chain.

    It transforms updates of the pair `(latent vectors, other parameters)`. A latent is shrunk only
    while more than its `min_channels` entries reach the threshold.

    Args:
      vectors: the state of the latent vectors, of `LatentVector` variables.
      strength: regularization factor of the l1 norm.
      schedule: the learning rate of the step before it.
      threshold: entries below it in magnitude count as gone.

    Reference: DHP (arXiv 2003.13683), equation 8 and section 3.3.
    """
    variables = jax.tree.leaves(vectors, is_leaf=_is_variable)
    steps = []
    for floor in sorted({v.min_channels for v in variables if v.prunable}):

        def still_wide(vector: jax.Array, floor: int = floor) -> jax.Array:
            return jnp.sum(jnp.abs(vector) >= threshold) > floor

        def concerned(variable: nnx.Variable, floor: int = floor) -> bool:
            return variable.prunable and variable.min_channels == floor

        mask = jax.tree.map(concerned, vectors, is_leaf=_is_variable)
        steps.append(optax.masked(prox_l1(strength, schedule, where=still_wide), (mask, False)))
    return optax.chain(*steps) if steps else optax.identity()


def _is_variable(node: object) -> bool:
    return isinstance(node, nnx.Variable)
