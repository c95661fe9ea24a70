"""Every field of a configuration: its default, its rule, and what it is.

`default`, the check of a configuration and the help of the command all read these tables.
"""

from collections.abc import Iterator, Mapping
import copy
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict, config_dict

from dhp_jax.config.methods import METHODS
from dhp_jax.config.rules import (
    BOOLEAN,
    DEVICES,
    EPOCHS,
    MULTIPLE,
    PATH,
    SHARE,
    SHARES,
    Rule,
    integer,
    number,
    one_of,
    or_none,
)
from dhp_jax.data.labelled import registry
from dhp_jax.data.photos import files as photos_files
from dhp_jax.errors import ConfigError
from dhp_jax.models.arguments import MAX_CHANNELS
from dhp_jax.tasks.restoration import LOSSES
from dhp_jax.train import optimizer

DTYPES = ("float32", "bfloat16")

PRECISIONS = ("default", "high", "highest")

NEVER: Any = object()  # of `Field.absent`
MAX_SIDE = 10_000  # of images, in pixels
MAX_WORKERS = 1024
MAX_EXAMPLES = 2**28  # of an epoch; their order takes 4 bytes each


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
      default: its value if nothing else is said; some tasks have another one, see `RECIPES`.
      rule: which values it may have.
      text: what it is, in one line.
      kind: the type that values of the command line become, where the default does not tell.
      absent: what a stored configuration means that lacks the field, because its run was begun
        earlier; `NEVER` if none lacks it.
    """

    default: Any
    rule: Rule
    text: str
    kind: type | None = None
    absent: Any = NEVER


Fields = Mapping[str, "Field | Fields"]  # by name; groups hold fields of their own
_BUDGET = or_none(SHARE, "for no such budget")


def _budget(of: str) -> Field:
    return Field(None, _BUDGET, f"share of the unpruned network's {of}", float)


def _schedule(epochs: int, drops: tuple[float, ...], text: str) -> dict[str, Field]:
    return {
        "epochs": Field(epochs, integer(1), text),
        "learning_rate": Field(0.1, number(0, above=True), "of the first step"),
        "drops": Field(drops, EPOCHS, "epochs after which the learning rate is divided by 10"),
    }


FIELDS: Fields = {
    "seed": Field(
        0,
        integer(0, 2**32 - 1),  # of larger ones JAX would use the last 32 bits
        "of all random numbers",
    ),
    "method": Field("dhp", one_of(*METHODS), "how the smaller network is made; docs/methods.md"),
    "source": Field(
        None,
        or_none(PATH, "for a method that starts from no other run"),
        "directory of the finished run that some methods start from",
        str,
    ),
    "target": Field(0.5, SHARE, "share of the FLOPs that the pruned network may use"),
    "targets": Field(
        None,
        or_none(SHARES, "for the target alone"),
        "several targets instead, from one search",
        tuple,
    ),
    "budget": {  # all that are given hold, and the target
        "flops": _budget("FLOPs"),
        "params": _budget("parameters"),
        "activations": _budget("bytes of the outputs of all layers"),
        "latency": _budget("latency, measured where the run is"),
        "batch": Field(
            None, or_none(integer(1), "for one input"), "inputs of a pass that is timed", int
        ),
    },
    "multiple_of": Field(
        1, MULTIPLE, "widths of pruned layers are multiples of it; docs/budgets.md", object
    ),
    "batch_size": Field(64, integer(1), "examples of a training step"),
    "dtype": Field(
        "float32", one_of(*DTYPES), "of activations and kernels; parameters stay float32"
    ),
    "precision": Field(
        "default",
        one_of(*PRECISIONS),
        "of products of float32; by default a TPU rounds their inputs to bfloat16",
        absent="default",
    ),
    "log_every": Field(100, integer(1), "steps between two records"),
    "nonfinite": Field(
        "stop", one_of("stop", "skip"), "at a loss or latent that is not finite: stop, or skip it"
    ),
    "checkpoint": {
        "seconds": Field(60.0, number(0), "between two; more where writing one takes long"),
        "keep": Field(3, integer(2), "checkpoints of each phase that are kept"),
        "grace": Field(
            30.0,
            number(0, 86_400, above=True),  # as long as threads can wait
            "seconds in which a run saves its state when it is told to end",
        ),
    },
    "mesh": {
        "data": Field(-1, DEVICES, "devices that divide the examples of a batch"),
        "model": Field(1, integer(1), "devices that divide the arrays of hypernetworks"),
    },
    "model": Field(
        {"name": "resnet", "depth": 20, "width": 1.0},
        Rule(
            lambda value: isinstance(value, ConfigDict), "the name of a network and its arguments"
        ),
        "name of a family, and its arguments",
    ),
    "optimizer": {
        "name": Field("sgd", one_of(*optimizer.NAMES), "of all parameters"),
        "momentum": Field(0.9, number(0, 1, below=True), "of sgd"),
        "nesterov": Field(
            False, BOOLEAN, "whether the momentum of sgd is Nesterov's", absent=False
        ),
        "weight_decay": Field(1e-4, number(0), "of kernels"),
    },
    "search": {
        **_schedule(100, (50.0,), "at most; the search ends when the budget is nearly met"),
        "strength": Field(2e-4, number(0), "factor of the l1 norm of the latents"),
        "threshold": Field(5e-3, number(0), "smaller entries of a latent count as gone"),
        "stop_limit": Field(0.02, number(0, 1), "the search ends at target + stop_limit"),
        "min_channels": Field(4, integer(1, MAX_CHANNELS), "entries that every latent keeps"),
        "keep": Field(
            0.0, number(0, 1), "least share of its entries that every latent keeps", absent=0.0
        ),
    },
    "converge": _schedule(300, (150.0, 225.0), "of the pruned network"),
    "baseline": _schedule(300, (150.0, 225.0), "of the unpruned network"),
}

_READING: Fields = {
    "streamed": Field(
        None,
        or_none(BOOLEAN, "for whether they do not fit on the device"),
        "whether data are read while they are used",
        bool,
    ),
    "workers": Field(
        None,
        or_none(integer(0, MAX_WORKERS), "for all cores but one"),
        "processes that read what is streamed",
        int,
    ),
}

_LABELLED: Fields = {
    "name": Field("cifar10", one_of(*registry.NAMES), "of the data set"),
    "dir": Field(
        None, or_none(PATH, "for the default of tensorflow-datasets"), "folder of the data", str
    ),
    "image_size": Field(
        None,
        or_none(integer(1, MAX_SIDE), "for the size of the data"),
        "sides of images of folders and ImageNet",
        int,
    ),
    "channels": Field(
        None,
        or_none(one_of(1, 3), "for what the images have"),
        "of image_folder: 1 makes all images gray, 3 colour",
        int,
        absent=None,
    ),
    "archive": Field(None, or_none(PATH, "if there is none"), "of Tiny-ImageNet", str),
    "crop_padding": Field(
        None,
        or_none(integer(0, MAX_SIDE), "for what suits the data"),
        "pixels by which a random crop may lie outside",
        int,
    ),
    "flip": Field(
        None, or_none(BOOLEAN, "likewise"), "whether images are mirrored at random", bool
    ),
    **_READING,
}

_PHOTOGRAPHS: Fields = {
    "name": Field(
        "photographs", one_of(*photos_files.NAMES), "those of scikit-image, or of a folder"
    ),
    "dir": Field(
        None, or_none(PATH, "for embedded photographs"), "folder of the training data", str
    ),
    "test_dir": Field(None, or_none(PATH, "for embedded photographs"), "of the test data", str),
    "cache": Field(
        None, or_none(PATH, "for the user's cache folder"), "for photographs that are streamed", str
    ),
    **_READING,
}


def _patches(side: int, channels: int, steps: int, absent_loss: str) -> dict[str, Field]:
    """The fields of a task on patches of photographs."""
    return {
        "loss": Field(
            "l1",
            one_of(*LOSSES),
            "mean absolute (l1) or squared (l2) error of pixels, which training lowers",
            absent=absent_loss,
        ),
        "patch": Field(side, integer(1, MAX_SIDE), "side of the square of a training example"),
        "channels": Field(channels, one_of(1, 3), "1 for gray, 3 for color"),
        "steps_per_epoch": Field(steps, integer(1), "steps that count as an epoch"),
        "tile": Field(
            None,
            or_none(integer(1, MAX_SIDE), "to run test images whole"),
            "side of the tiles that larger test images are cut into",
            int,
        ),
        "overlap": Field(
            None,
            or_none(integer(0, MAX_SIDE), "for as far as the network sees"),
            "pixels of a tile's border that are not used",
            int,
        ),
    }


TASK_FIELDS: Mapping[str, Fields] = {
    "classification": {"task": {}, "data": _LABELLED},
    "super_resolution": {
        "task": {
            **_patches(96, 3, 2013, "l1"),  # 32,208 patches in batches of 16
            "scale": Field(4, one_of(2, 3, 4), "how many times as large the output is"),
            "psnr": Field("y", one_of("y", "rgb"), "what errors are measured on"),
        },
        "data": _PHOTOGRAPHS,
    },
    "denoising": {
        "task": {
            **_patches(64, 1, 10_000, "l2"),
            "sigma": Field(70.0, number(0), "standard deviation of the noise, of 255"),
            "shave": Field(
                1,
                integer(0, MAX_SIDE),
                "pixels of each border that PSNR and SSIM leave out",
                absent=0,
            ),
        },
        "data": _PHOTOGRAPHS,
    },
}

_RESTORATION: Mapping[str, Any] = {
    "target": 0.6,
    "optimizer.name": "adam",
    "optimizer.weight_decay": 0.0,
    "search.strength": 0.1,
    **{f"{phase}.learning_rate": 1e-4 for phase in ("search", "converge", "baseline")},
}


# The defaults of a task that differ from those of classification.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "classification": {},
    "super_resolution": {
        **_RESTORATION,
        "batch_size": 16,
        "model": {"name": "srresnet", "blocks": 16, "width": 1.0, "prune_upsampler": True},
        "search.epochs": 80,
        "search.drops": (40.0,),
        **{f"{phase}.epochs": 300 for phase in ("converge", "baseline")},
        **{f"{phase}.drops": (200.0,) for phase in ("converge", "baseline")},
    },
    "denoising": {
        **_RESTORATION,
        "model": {"name": "dncnn", "depth": 17, "width": 1.0},
        "search.epochs": 20,
        "search.drops": (10.0,),
        **{f"{phase}.epochs": 60 for phase in ("converge", "baseline")},
        **{f"{phase}.drops": (40.0,) for phase in ("converge", "baseline")},
    },
}


def fields_of(task: str) -> Fields:
    """The fields of a task's configurations, in groups.

    Args:
      task: one of `TASK_FIELDS`.
    """
    own = TASK_FIELDS[task]
    name = Field(task, one_of(*TASK_FIELDS), "what the network is for")
    return {**FIELDS, "task": {"name": name, **own["task"]}, "data": own["data"]}


def flat_fields(fields: Fields, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Fields by their full names, such as "search.epochs"."""
    for name, field in fields.items():
        if isinstance(field, Field):
            yield f"{prefix}{name}", field
        else:
            yield from flat_fields(field, f"{prefix}{name}.")


def absent_values(task: Any) -> dict[str, Any]:
    """What a stored configuration means that lacks fields, for it is older: values by full name.

    Args:
      task: its task; of one that is none, nothing is known.
    """
    if not isinstance(task, str) or task not in TASK_FIELDS:
        return {}
    fields = flat_fields(fields_of(task))
    return {name: field.absent for name, field in fields if field.absent is not NEVER}


def default(task: str = "classification") -> ConfigDict:
    """The paper's recipe for a task; configurations start from it.

    Args:
      task: "classification" (ResNet-20 on CIFAR-10), "super_resolution" (SRResNet x4) or
        "denoising" (DnCNN).

    Raises:
      ConfigError: another task.
    """
    if task not in TASK_FIELDS:
        raise ConfigError.unknown("task", task, TASK_FIELDS)
    return ConfigDict(_defaults(fields_of(task), RECIPES[task]))


def _defaults(fields: Fields, recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if not isinstance(field, Field):
            values[name] = _defaults(field, recipe, f"{prefix}{name}.")
            continue
        value = copy.copy(recipe.get(f"{prefix}{name}", field.default))
        typed = field.kind is not None
        values[name] = config_dict.FieldReference(value, field_type=field.kind) if typed else value
    return values


def describe() -> str:
    """All fields with what they are, what they may be and their defaults, a line each."""
    lines = ["Fields of a configuration, such as --config.target=0.38:"]
    lines += [_line(name, field) for name, field in flat_fields(FIELDS)]
    for task in TASK_FIELDS:
        fields = fields_of(task)
        lines.append(f"Of {task}:")
        lines += [
            _line(name, field)
            for group in ("task", "data")
            for name, field in flat_fields({group: fields[group]})
        ]
    return "\n".join(lines)


def _line(name: str, field: Field) -> str:
    return f"  {name}: {field.text} ({field.rule}; default {field.default})"
