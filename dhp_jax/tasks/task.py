"""The protocol of tasks that the training loop uses, and the metrics that tasks report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree
import numpy as np

from dhp_jax.core.latent import LatentVector
from dhp_jax.data.stream import Stream
from dhp_jax.errors import check_integer

Data = PyTree[Any] | Stream  # what a task reads its examples from
Examples = PyTree[Array]  # some of them, as they are stored
Params = tuple[nnx.State, nnx.State]  # latent vectors, all other parameters
Evaluation = Callable[[Params, nnx.State], dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """A number that says how good a network is, and how it is written.

    Attributes:
      name: in records and summaries.
      label: in tables and reports.
      higher_is_better: whether a larger number is better.
      form: a format string for the number times `factor`.
      factor: from the number in records to that in reports.
      unit: of the number in reports.
    """

    name: str
    label: str
    higher_is_better: bool
    form: str
    factor: float = 1.0
    unit: str = ""

    def text(self, value: float) -> str:
        """The value as reports show it, with its unit."""
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
    """What a network is trained for: its inputs and targets, loss and metrics.

    Attributes:
      metric: the metric that decides which of two networks is better.
    """

    metric: Metric

    def examples(self, key: Key[Array, ""], data: Data, chosen: Int[Array, " n"]) -> Examples:
        """Takes examples of training data on the device, as they are stored; jitted."""
        ...

    def augmented(self, key: Key[Array, ""], examples: Examples) -> tuple[Array, Any]:
        """Makes inputs and targets of examples, with random augmentation; jitted."""
        ...

    def loss(self, outputs: Array, targets: Any) -> Float[Array, " n"]:
        """The loss of each example."""
        ...

    def distillation(self, outputs: Array, taught: Array, temperature: float) -> Float[Array, " n"]:
        """How far the outputs of each example are from those of a teacher."""
        ...

    def score(self, outputs: Array, targets: Any) -> Float[Array, " n"]:
        """The task's metric, of each example of a training batch."""
        ...

    def check(self, model: nnx.Module) -> None:
        """Raises a `ValueError` unless a network suits the task's settings."""
        ...

    def evaluation(self, model: nnx.Module, data: Data, *, batch_size: int) -> Evaluation:
        """Prepares a test on all test data: a function `(parameters, rest) -> metrics by name`.

        Raises a `ValueError` if there are none.
        """
        ...

    def without_network(self, data: Data) -> dict[str, float]:
        """Metrics of the test inputs without a network; empty if a task has none."""
        ...

    def pictures(
        self, model: nnx.Module, data: Data, count: int
    ) -> Sequence[tuple[str, Mapping[str, np.ndarray]]]:
        """Names of the first test examples, each with pictures `input`, `output` and `target`."""
        ...


def evaluate(
    model: nnx.Module, task: Task, data: Data, *, batch_size: int = 256
) -> dict[str, float]:
    """Tests a model on all test data, in evaluation mode; returns metrics by name.

    Raises:
      ValueError: no data, images without labels, or a batch of less than one example.
    """
    check_integer("batch_size", batch_size)
    _, latents, weights, rest = nnx.split(model, LatentVector, nnx.Param, ...)
    return task.evaluation(model, data, batch_size=batch_size)((latents, weights), rest)
