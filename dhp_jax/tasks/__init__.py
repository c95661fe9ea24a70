"""Tasks: how examples become inputs and targets, the loss, and the metrics."""

from dhp_jax.data.photos.patches import Patches, patches
from dhp_jax.tasks.classification import Classification
from dhp_jax.tasks.restoration import Denoising, Restoration, SuperResolution
from dhp_jax.tasks.task import METRICS, Metric, Task, evaluate

__all__ = [
    "METRICS",
    "Classification",
    "Denoising",
    "Metric",
    "Patches",
    "Restoration",
    "SuperResolution",
    "Task",
    "evaluate",
    "patches",
]
