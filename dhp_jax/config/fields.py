"""Every field of a configuration: its default, its rule, and what it is.

`default`, the check of a configuration, the help of the command and docs/configuration.md all read
these tables.
"""

from collections.abc import Iterator, Mapping
import copy
from typing import Any

from ml_collections import ConfigDict, config_dict

from dhp_jax.config.methods import METHODS, PHASES
from dhp_jax.config.rules import (
    BOOLEAN,
    DEVICES,
    EPOCHS,
    MAX_COUNT,
    MULTIPLE,
    NEVER,
    PATH,
    SHARE,
    SHARES,
    WHOLE_EPOCHS,
    Field,
    Fields,
    Rule,
    integer,
    number,
    one_of,
    or_none,
)
from dhp_jax.config.task_fields import TASK_FIELDS
from dhp_jax.errors import ConfigError
from dhp_jax.models.arguments import MAX_CHANNELS
from dhp_jax.train import optimizer, schedules

DTYPES = ("float32", "bfloat16")
PRECISIONS = ("default", "high", "highest")
MAX_EXAMPLES = 2**28  # of an epoch; their order takes 4 bytes each
_BUDGET = or_none(SHARE, "for no such budget")


def _budget(of: str) -> Field:
    return Field(None, _BUDGET, f"share of the unpruned network's {of}", float)


_DISTILLATION = {
    "weight": Field(
        0.0,
        number(0, 1),
        "share of the loss that compares with the trained network that the run starts from",
        absent=0.0,
    ),
    "temperature": Field(
        4.0,
        number(0, 1000, above=True),
        "by which logits are divided for that; images are compared as they are",
        absent=4.0,
    ),
}


def _schedule(epochs: int, drops: tuple[float, ...], text: str) -> dict[str, Field]:
    return {
        "epochs": Field(epochs, WHOLE_EPOCHS, text),
        "max_steps": Field(
            None,
            or_none(integer(1), "for all epochs"),
            "steps after which the phase ends, for a quick try; learning rates are those of epochs",
            int,
            absent=None,
        ),
        "learning_rate": Field(0.1, number(0, above=True), "the largest learning rate"),
        "schedule": Field(
            "drops",
            one_of(*schedules.NAMES),
            "how the learning rate falls: at drops, or to zero by the end of the last epoch",
            absent="drops",
        ),
        "drops": Field(drops, EPOCHS, "epochs after which the learning rate is divided by 10"),
        "warmup": Field(
            0.0,
            number(0, MAX_COUNT),
            "first epochs, in which the learning rate rises in a straight line",
            absent=0.0,
        ),
    }


FIELDS: Fields = {
    "seed": Field(
        0,
        integer(0, 2**32 - 1),  # of larger ones JAX would use the last 32 bits
        "seed of all random numbers",
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
        "several targets instead; dhp has one search for all",
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
    "per_flop": Field(
        0.0,
        number(0),
        "power of its FLOPs by which the importance of a channel is divided; docs/methods.md",
        absent=0.0,
    ),
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
        "seconds": Field(
            60.0, number(0), "seconds between two checkpoints; more where writing one takes long"
        ),
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
        "name of a family, or module:function of your own, and arguments; weights to start from",
    ),
    "optimizer": {
        "name": Field("sgd", one_of(*optimizer.NAMES), "of all parameters"),
        "momentum": Field(
            0.9, number(0, 1, below=True), "of sgd; of adam and adamw the first decay"
        ),
        "nesterov": Field(
            False, BOOLEAN, "whether the momentum of sgd is Nesterov's", absent=False
        ),
        "weight_decay": Field(
            1e-4,
            number(0),
            "share of the parameters added to their gradient, or by adamw to their update",
        ),
        "decayed": Field(
            "all",
            one_of(*optimizer.DECAYED),
            "which parameters decay: kernels leaves out latents, biases and norms",
            absent="all",
        ),
        "clip": Field(
            None,
            or_none(number(0, above=True), "for any norm"),
            "largest norm of the gradient of all parameters",
            float,
            absent=None,
        ),
        "average": Field(
            0.0,
            number(0, 1, below=True),
            "decay of a moving average of weights, tested and kept, not in a search; 0 for none",
            absent=0.0,
        ),
    },
    "search": {
        **_schedule(100, (50.0,), "epochs at most; the search ends when the budget is nearly met"),
        "strength": Field(2e-4, number(0), "factor of the l1 norm of the latents"),
        "threshold": Field(5e-3, number(0), "smaller entries of a latent count as gone"),
        "stop_limit": Field(0.02, number(0, 1), "the search ends at target + stop_limit"),
        "min_channels": Field(4, integer(1, MAX_CHANNELS), "entries that every latent keeps"),
        "keep": Field(
            0.0, number(0, 1), "least share of its entries that every latent keeps", absent=0.0
        ),
        "batches": Field(
            10, integer(1), "of method gradient, to choose channels; at most an epoch", absent=10
        ),
        "distillation": _DISTILLATION,
    },
    "converge": {
        **_schedule(300, (150.0, 225.0), "epochs of the pruned network"),
        "distillation": _DISTILLATION,
    },
    "baseline": _schedule(300, (150.0, 225.0), "epochs of the unpruned network"),
}

_RESTORATION: Mapping[str, Any] = {
    "target": 0.6,
    "optimizer.name": "adam",
    "optimizer.weight_decay": 0.0,
    "search.strength": 0.1,
    **{f"{phase}.learning_rate": 1e-4 for phase in PHASES},
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
    """The fields of a task's configurations, in groups."""
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

    Of a task that is none, nothing is known.
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
