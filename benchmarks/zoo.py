"""The networks that benchmarks measure, each at its full width with the batch of its experiment."""

from dataclasses import dataclass
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

import dhp_jax as dhp
from dhp_jax.backend.hypernets import pack_axes
from dhp_jax.core.latent import latents
from dhp_jax.core.survivors import survivor_counts
from dhp_jax.data.device_images import Rows
from dhp_jax.data.photos.photographs import Photograph
from dhp_jax.tasks import Classification, Denoising, SuperResolution, patches
from dhp_jax.tasks.task import Data, Task
from dhp_jax.train.optimizer import optimizer, shrink_latents
from dhp_jax.train.phase import Budget
from dhp_jax.train.schedules import drop_schedule
from dhp_jax.train.state import TrainState, start
from dhp_jax.train.step import CompiledStep, compile_step, make_step, many, on_resident_data

FADING = 700  # steps of a search from trained weights
THRESHOLD = 5e-3  # below which entries of latents are gone


@dataclass(frozen=True)
class Network:
    """A network.

    Attributes:
      label: for tables.
      family, arguments: of `dhp.models.build`.
      input_shape: of one example.
      batch: of a training step.
      patch: side of training patches of the target; 0 for classification.
    """

    label: str
    family: str
    arguments: dict[str, Any]
    input_shape: tuple[int, int, int]
    batch: int = 64
    patch: int = 0

    @property
    def examples(self) -> int:
        """Of a training set that is on the device: labelled images, or one photograph."""
        return 1 if self.patch else min(EXAMPLES, BYTES // math.prod(self.input_shape))

    @property
    def trained_shape(self) -> tuple[int, int, int]:
        """Of one example in training, which for restoration is a patch."""
        side = self.patch // self.arguments.get("scale", 1)
        return (side, side, self.input_shape[-1]) if side else self.input_shape

    def forward_batches(self, quick: bool) -> tuple[int, int]:
        """Of how many images forward passes are timed: one, and many."""
        many = 4 if quick or self.patch or self.input_shape[0] > 64 else 64
        return 1, many if jax.default_backend() == "cpu" else 16 * many

    def build(self, **changes: Any) -> nnx.Module:
        return dhp.models.build(self.family, rngs=nnx.Rngs(0), **self.arguments, **changes)


EXAMPLES, BYTES = 50_000, 2**28  # at most, of a training set that is on the device
CIFAR, TINY, IMAGENET = (32, 32, 3), (64, 64, 3), (224, 224, 3)
RGB, GRAY = (128, 128, 3), (128, 128, 1)
QUICK = "resnet8"  # for smoke runs
NETWORKS = {
    QUICK: Network("ResNet-8", "resnet", {"depth": 8}, CIFAR),
    "resnet20": Network("ResNet-20", "resnet", {"depth": 20}, CIFAR),
    "resnet56": Network("ResNet-56", "resnet", {"depth": 56}, CIFAR),
    "resnet110": Network("ResNet-110", "resnet", {"depth": 110}, CIFAR),
    "resnet164": Network("ResNet-164", "resnet", {"depth": 164}, CIFAR),
    "densenet40": Network("DenseNet-12-40", "densenet", {"depth": 40, "growth": 12}, CIFAR),
    "vgg16": Network("VGG-16", "vgg", {"depth": 16}, CIFAR),
    "mobilenet_v1": Network("MobileNetV1", "mobilenet_v1", {}, TINY),
    "mobilenet_v1_x2": Network("MobileNetV1 x2", "mobilenet_v1", {"width": 2.0}, TINY),
    "mobilenet_v2": Network("MobileNetV2", "mobilenet_v2", {}, TINY),
    "mobilenet_v2_x2": Network("MobileNetV2 x2", "mobilenet_v2", {"width": 2.0}, TINY),
    "resnet50": Network(
        "ResNet-50", "resnet", {"depth": 50, "num_classes": 1000}, IMAGENET, batch=16
    ),
    "resnext50": Network(
        "ResNeXt-50 32x4d",
        "resnet",
        {"depth": 50, "num_classes": 1000, "groups": 32, "group_width": 4},
        IMAGENET,
        batch=16,
    ),
    "srresnet_x4": Network("SRResNet x4", "srresnet", {"scale": 4}, RGB, batch=16, patch=96),
    "edsr_x4": Network("EDSR x4", "edsr", {"scale": 4}, RGB, batch=16, patch=192),
    "dncnn": Network("DnCNN", "dncnn", {}, GRAY, patch=64),
    "unet": Network("U-Net", "unet", {}, GRAY, batch=16, patch=128),
}


def queued(batch: int) -> int:
    """How many passes over a batch, or steps, are given to the device before they are waited for.

    What a pass over one image takes includes what the host does for it. An accelerator works on
    many images while the host is at the next batch.
    """
    return 1 if batch == 1 or jax.default_backend() == "cpu" else 8


def search_step(
    network: Network,
    model: nnx.Module,
    batch: int | None = None,
    mesh: Mesh | None = None,
    *,
    steps: int = 1,
    images: int | None = None,
    fades: bool = False,
) -> tuple[CompiledStep, TrainState, tuple]:
    """The jitted step of the search, a state, and what it takes after its arrays; data are random.

    With more than one of `steps`, so many in a loop on the device, as runs on accelerators take
    them. Every step counts what would survive, for a budget that it never meets. A model without
    latents shrinks none and counts nothing. What goes to a mesh has still to be placed there.
    Labelled images are so many, or those of one batch. With `fades` it is the step of a search from
    trained weights, and `model` is from `dhp.with_gates`.
    """
    batch = batch or network.batch
    if network.patch:
        schedule = optax.constant_schedule(1e-4)
        plain = optimizer("adam", schedule, momentum=0.9, weight_decay=0.0)
        strength = 0.1
    else:
        schedule = drop_schedule(0.1, (50,), 781)
        plain = optimizer("sgd", schedule, momentum=0.9, weight_decay=1e-4)
        strength = 2e-4

    def make_optimizer(params):
        if fades:
            cost = dhp.measure_cost(model, network.input_shape)
            return dhp.fade_to_budget(plain, model, cost, steps=FADING, flops=0.75)
        shrink = shrink_latents(params, strength=strength, schedule=schedule, threshold=THRESHOLD)
        return optax.chain(plain, shrink)

    task, data = task_on(network, images or batch)
    graphdef, transformation, state = start(pack_axes(model), make_optimizer)
    step = make_step(
        graphdef,
        transformation,
        task,
        batch,
        budget=never_met(network, model) if latents(model) else None,
        mesh=mesh,
    )
    step = on_resident_data(step, task, batch, mesh)
    advance = compile_step(many(step) if steps > 1 else step, jax.tree.structure(state))
    order = np.random.default_rng(0).permutation(images or batch)
    order = jnp.asarray(np.resize(order, batch * steps), jnp.int32)
    count = (steps,) * (steps > 1)
    return advance, state, (data, order, 0, *count, jax.random.key(0))


def shaped(tree: Any, sharding: Any) -> Any:
    """Shapes and places of arrays, which suffice to compile for them.

    Args:
      tree: of arrays and numbers.
      sharding: a `jax.sharding.Sharding` for all of them, or a tree of those of each.
    """
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype, sharding=at),
        tree,
        sharding,
    )


def never_met(network: Network, model: nnx.Module) -> Budget:
    """A stop rule that has its shares computed and ends nothing."""
    cost = dhp.measure_cost(model, network.input_shape)
    return Budget(lambda model: cost.shares(survivor_counts(model, THRESHOLD)), {"flops": 0.0})


def task_on(network: Network, images: int) -> tuple[Task, Data]:
    """The network's task, and random training data of so many images, or of one photograph."""
    random = np.random.default_rng(0)
    *_, channels = network.input_shape
    if not network.patch:
        pixels = random.integers(0, 256, (images, *network.input_shape), np.uint8)
        task = Classification((125.0,) * channels, (63.0,) * channels, crop_padding=4, flip=True)
        labels = random.integers(0, 10, images, np.int32)
        return task, jax.device_put((Rows.of(pixels), labels))
    scale = network.arguments.get("scale", 1)
    kind = Denoising if scale == 1 else SuperResolution
    task = kind(patch=network.patch, scale=scale)
    target = random.integers(0, 256, (2 * network.patch, 2 * network.patch, channels), np.uint8)
    degraded = target[::scale, ::scale] if scale > 1 else None
    return task, jax.device_put(patches([Photograph("random", target, degraded)], scale))
