"""What a method makes its smaller network from: the run's own networks, and those of its source."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from dhp_jax.artifact import reading
from dhp_jax.budgets.counted import BudgetError, Scores
from dhp_jax.budgets.importance import per_cost
from dhp_jax.budgets.latency import clock
from dhp_jax.budgets.selection import Selection, choose
from dhp_jax.config.methods import Smaller
from dhp_jax.core.latent import latents
from dhp_jax.errors import ConfigError
from dhp_jax.pipeline.preparation import Run, counted_budgets
from dhp_jax.pipeline.training_batches import EXAMPLES, batches
from dhp_jax.tasks.task import Data
from dhp_jax.tracing.declared import prune
from dhp_jax.train.step import dropout_from
from dhp_jax.workdir import source_run


@dataclass(frozen=True)
class RunStart:
    """What a run gives a method; see `config.methods.Start`."""

    run: Run
    read: Callable[[str], Data]

    @property
    def seed(self) -> int:
        return self.run.config.seed

    @property
    def batches(self) -> int:
        return self.run.config.search.batches

    def unpruned(self) -> nnx.Module:
        return self.run.blueprint.build()

    def searched(self) -> nnx.Module:
        model = reading.load(self.run.workdir / "search")
        return self.run.blueprint.with_floors(model)

    def trained(self) -> nnx.Module:
        blueprint = self.run.blueprint
        if not source_run.needs_source(self.run.config):
            return blueprint.of_trained(blueprint.ordinary())
        return blueprint.of_trained(reading.load(source_run.read(self.run.config).path))

    def training(
        self, count: int | None = None
    ) -> tuple[Callable[[nnx.Module, Any], Array], Iterable[Any]]:
        task = self.run.setup.task
        examples = EXAMPLES if count is None else count * self.run.config.batch_size

        def loss(model: nnx.Module, numbered: Any) -> Array:
            number, (inputs, targets) = numbered
            with dropout_from(jax.random.fold_in(jax.random.key(self.seed), number), model):
                return jnp.mean(task.loss(model(inputs), targets))

        found = batches(self.run, self.read("train"), examples)
        return loss, ((jnp.int32(number), batch) for number, batch in enumerate(found))

    def per_flop(self, scores: Scores) -> Scores:
        power = self.run.config.per_flop
        return per_cost(scores, self.run.cost, power=power) if power else scores

    def within(self, model: nnx.Module, by: Scores | Selection | None = None) -> Smaller:
        run, config, timed = self.run, self.run.config, None
        if config.budget.latency is not None:
            timed = clock(model, run.setup.input_shape, config.budget.batch or 1)
        try:
            chosen = choose(
                model,
                run.cost,
                config.multiple_of,
                by=by,
                latency=config.budget.latency,
                timed=timed,
                **counted_budgets(config),
            )
        except BudgetError as error:  # the smallest network has become too slow
            kept = run.workdir / "search"
            hint = f"; the search is kept in {kept}, for dhp.prune_to" if kept.exists() else ""
            raise ConfigError.of(f"config.budget.{error.field}", error, hint) from error
        gone = (z.value()[~chosen.masks[name]] for name, z in latents(model).items())
        return Smaller(
            prune(model, chosen.masks, run.setup.input_shape),
            chosen.notes(),
            exact=not any(map(np.any, gone)),
        )

    def found(self, model: nnx.Module) -> Smaller:
        source = source_run.read(self.run.config)
        masks = source.masks({name: z.size for name, z in latents(model).items()})
        return Smaller(prune(model, masks, self.run.setup.input_shape), source.budget)
