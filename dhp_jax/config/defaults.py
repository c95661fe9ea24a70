"""The default of every field, for each task."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict, config_dict

from dhp_jax.errors import ConfigError


def default(task: str = "classification") -> ConfigDict:
    """The paper's recipe for a task; configurations start from it.

    Args:
      task: "classification" (ResNet-20 on CIFAR-10), "super_resolution" (SRResNet x4) or
        "denoising" (DnCNN).

    Raises:
      ConfigError: another task.
    """
    if task not in TASKS:
        raise ConfigError.unknown("task", task, TASKS)
    config = ConfigDict(
        {
            "seed": 0,
            "method": "dhp",  # "baseline" trains the unpruned network; others: docs/methods.md
            "source": config_dict.placeholder(str),  # finished run that some methods start from
            "target": 0.5,  # share of the FLOPs that the pruned network may use
            "targets": config_dict.placeholder(tuple),  # one after another instead, from one search
            "budget": {  # further shares of the unpruned network's; all that are given hold
                "flops": config_dict.placeholder(float),
                "params": config_dict.placeholder(float),
                "activations": config_dict.placeholder(float),  # bytes of all layers' outputs
                "latency": config_dict.placeholder(float),  # measured where the run is
                "batch": config_dict.placeholder(int),  # of which latency is measured; 1
            },
            # Widths of pruned layers are multiples of it: a number, "auto", or such as
            # "stages.*:8,head:4" by latent; see dhp_jax/budgets/rounding.py.
            "multiple_of": config_dict.FieldReference(1, field_type=object),
            "batch_size": 64,
            "dtype": "float32",  # of activations and kernels; parameters stay float32
            "log_every": 100,  # steps between records, and between looks at the budget
            "nonfinite": "stop",  # at a loss or latent that is not finite; or "skip" the batch
            "checkpoint": {
                "seconds": 60.0,  # between two of them; more where writing one takes long
                "keep": 3,  # of each phase
                "grace": 30.0,  # seconds that a run has to save its state when it is told to end
            },
            "mesh": {  # devices among which work is divided
                "data": -1,  # along the examples of a batch; -1 for all that there are
                "model": 1,  # along the arrays of hypernetworks and their optimizer state
            },
            "task": {"name": task},
            "model": {"name": "resnet", "depth": 20, "width": 1.0},
            "data": {"name": "cifar10", "dir": config_dict.placeholder(str)},
            "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
            "search": {
                "epochs": 100,  # at most; the search ends when the budget is nearly met
                "learning_rate": 0.1,
                "drops": (50.0,),  # epochs after which the learning rate is divided by 10
                "strength": 2e-4,  # regularization factor of the l1 norm of the latents
                "threshold": 5e-3,  # smaller entries of a latent count as gone
                "stop_limit": 0.02,  # the search ends at target + stop_limit
                "min_channels": 4,  # entries that every latent keeps
            },
            "converge": {"epochs": 300, "learning_rate": 0.1, "drops": (150.0, 225.0)},
            "baseline": {"epochs": 300, "learning_rate": 0.1, "drops": (150.0, 225.0)},
        }
    )
    TASKS[task](config)
    config.data.streamed = config_dict.placeholder(bool)  # not on the device; if not given, by size
    config.data.workers = config_dict.placeholder(int)  # processes that read what is streamed
    return config


def _classification(config: ConfigDict) -> None:
    config.data.image_size = config_dict.placeholder(int)  # sides of image folders and ImageNet
    config.data.archive = config_dict.placeholder(str)  # of Tiny-ImageNet
    config.data.crop_padding = config_dict.placeholder(int)  # what suits the data if not given
    config.data.flip = config_dict.placeholder(bool)


def _super_resolution(config: ConfigDict) -> None:
    _restoration(config)
    config.batch_size = 16
    config.task.update(scale=4, patch=96, channels=3, steps_per_epoch=1000)
    config.task.psnr = "y"  # or "rgb"
    config.model = ConfigDict(
        {"name": "srresnet", "blocks": 16, "width": 1.0, "prune_upsampler": True}
    )
    config.search.update(epochs=80, drops=(40.0,))
    for phase in (config.converge, config.baseline):
        phase.update(epochs=300, drops=(200.0,))


def _denoising(config: ConfigDict) -> None:
    _restoration(config)
    config.task.update(sigma=70.0, patch=64, channels=1, steps_per_epoch=10_000)
    config.model = ConfigDict({"name": "dncnn", "depth": 17, "width": 1.0})
    config.search.update(epochs=20, drops=(10.0,))
    for phase in (config.converge, config.baseline):
        phase.update(epochs=60, drops=(40.0,))


def _restoration(config: ConfigDict) -> None:
    config.target = 0.6
    config.task.tile = config_dict.placeholder(int)  # larger test images are cut into tiles
    config.task.overlap = config_dict.placeholder(int)  # of tiles; as far as the network sees
    config.data = ConfigDict(
        {
            "name": "photographs",  # those of scikit-image, or "photo_folder"
            "dir": config_dict.placeholder(str),
            "test_dir": config_dict.placeholder(str),
            "cache": config_dict.placeholder(str),  # for decoded photographs that are streamed
        }
    )
    config.optimizer.update(name="adam", weight_decay=0.0)
    config.search.strength = 0.1
    for phase in (config.search, config.converge, config.baseline):
        phase.learning_rate = 1e-4


TASKS: Mapping[str, Callable[[ConfigDict], None]] = {
    "classification": _classification,
    "super_resolution": _super_resolution,
    "denoising": _denoising,
}
