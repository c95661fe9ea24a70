"""What a task is to the training loop, and the metrics that tasks report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree
import numpy as np

from dhp_jax.core.latent import LatentVector
from dhp_jax.data.stream import Stream

Data = PyTree[Any] | Stream  # what a task reads its examples from


Examples = PyTree[Array]  # some of them


Params = tuple[nnx.State, nnx.State]  # latent vectors, all other parameters


Evaluation = Callable[[Params, nnx.State], dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """A number that tells how good a network is.

    Attributes:
      name: in records and summaries.
      label: for people.
      higher_is_better: which way is up.
      form: formats it, multiplied by `factor`.
      factor: from the number to the unit that people read.
      unit: that unit.
    """

    name: str
    label: str
    higher_is_better: bool
    form: str
    factor: float = 1.0
    unit: str = ""

    def text(self, value: float) -> str:
        """The value for people, with its unit."""
        return f"{self.form.format(self.factor * value)} {self.unit}".rstrip()

    def better(self, value: float, other: float | None) -> bool:
        """Whether a value is better than another one; anything is better than none."""
        return other is None or (value > other if self.higher_is_better else value < other)


METRICS = {
    "error": Metric("error", "error", False, "{:.2f}", factor=100.0, unit="%"),
    "psnr": Metric("psnr", "PSNR", True, "{:.2f}", unit="dB"),
    "ssim": Metric("ssim", "SSIM", True, "{:.4f}"),
    "loss": Metric("loss", "loss", False, "{:.4f}"),
}


class Task(Protocol):
    """What a network is trained for.

    Attributes:
      metric: the one that tells which of two networks is better.
    """

    metric: Metric

    def examples(self, key: Key[Array, ""], data: Data, chosen: Int[Array, " n"]) -> Examples:
        """Some examples of training data that are on the device, as they are stored; jitted."""
        ...

    def augmented(self, key: Key[Array, ""], examples: Examples) -> tuple[Array, Any]:
        """Inputs and targets of some examples, augmented afresh; jitted."""
        ...

    def loss(self, outputs: Array, targets: Any) -> Float[Array, " n"]:
        """What training lowers, of each example."""
        ...

    def score(self, outputs: Array, targets: Any) -> Float[Array, " n"]:
        """The task's metric, of each example of a training batch."""
        ...

    def check(self, model: nnx.Module) -> None:
        """Raises a `ValueError` unless a network suits the task's settings."""
        ...

    def evaluation(self, model: nnx.Module, data: Data, *, batch_size: int) -> Evaluation:
        """Prepares a test on all of the test data: `(parameters, rest) -> metrics by name`."""
        ...

    def without_network(self, data: Data) -> dict[str, float]:
        """Metrics of the test inputs as they are; empty where that means nothing."""
        ...

    def pictures(
        self, model: nnx.Module, data: Data, count: int
    ) -> Sequence[tuple[str, Mapping[str, np.ndarray]]]:
        """Names of some test examples, with pictures `input`, `output` and `target` of each."""
        ...


def evaluate(
    model: nnx.Module, task: Task, data: Data, *, batch_size: int = 256
) -> dict[str, float]:
    """Metrics by name of a model over all of the test data, in evaluation mode."""
    _, latents, weights, rest = nnx.split(model, LatentVector, nnx.Param, ...)
    return task.evaluation(model, data, batch_size=batch_size)((latents, weights), rest)
