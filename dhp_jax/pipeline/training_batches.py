"""Some training batches of a run, to score the channels of a network or to renew its statistics."""

from typing import Any, NamedTuple

from flax import nnx
import jax
from jaxtyping import Array, Key

from dhp_jax.activity import doing
from dhp_jax.config.methods import PHASES
from dhp_jax.pipeline.preparation import Run
from dhp_jax.pruned.statistics import has_batch_norm, renew_statistics
from dhp_jax.tasks.task import Data, Examples
from dhp_jax.train.inputs import make_inputs

EXAMPLES = 2048  # about as many; at most an epoch


class Position(NamedTuple):
    """Where among the steps of a phase a batch is taken."""

    step: int


def batches(run: Run, data: Data, examples: int) -> Any:
    """Training batches, augmented, as a generator of inputs and targets; the same in every call.

    There are about as many examples in all as are asked for: at least one batch, at most an epoch.
    """
    size, task = run.config.batch_size, run.setup.task
    count = max(1, min(examples, run.setup.epoch) // size)
    key = jax.random.fold_in(jax.random.key(run.config.seed), len(PHASES))
    inputs = make_inputs(data, key, examples=run.setup.epoch, batch_size=size)
    inputs.steps_per_call = 1

    def augmented(position: Position, examples: Examples, key: Key[Array, ""]) -> Any:
        return task.augmented(key, examples)

    take = jax.jit(inputs.feed(augmented, task, stops=False))
    with inputs.reading(0, count):
        inputs.begin_epoch(1)
        for step in range(count):
            yield take(Position(step), *inputs.take(step, step + 1))
            inputs.fetch_next()


@doing("measuring the statistics of BatchNorm again", "what measures statistics of BatchNorm")
def renew(run: Run, model: nnx.Module, data: Data) -> bool:
    """Measures the statistics of a network anew, in place; whether it has any."""
    if not has_batch_norm(model):
        return False
    renew_statistics(model, (images for images, _ in batches(run, data, EXAMPLES)))
    return True
