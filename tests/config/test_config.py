"""Configurations: the paper's numbers, and wrong values that are named in one line."""

import copy
import functools
import operator
from pathlib import Path
import re
import runpy

from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
import pytest

import dhp_jax as dhp
from dhp_jax.config import fields as config_fields
from dhp_jax.config.checks import check, check_overrides
from dhp_jax.config.fields import default
from dhp_jax.config.methods import METHODS, TAUGHT
from dhp_jax.errors import ConfigError, shown
from dhp_jax.workdir.identity import flatten

CONFIGS = Path(__file__).parents[2] / "experiments/configs"
PHASES = ("search", "converge", "baseline")
RESTORATION = ("super_resolution", "denoising")
TASKS = ("classification", *RESTORATION)


def read(name):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()


def changed(field, value, task="classification"):
    """A task's default configuration with one field replaced, whatever the type of the value."""
    values = default(task).to_dict()
    *groups, name = field.split(".")
    group = values
    for part in groups:
        group = group[part]
    group[name] = value
    return ConfigDict(values)


def refusal(config):
    """What `check` says, without the class of the error; always one line."""
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The paper's configurations


@pytest.mark.parametrize("task", TASKS)
def test_the_default_configuration_of_a_task_passes(task):
    assert default(task).task.name == task
    check(default(task))


def test_the_default_task_is_classification():
    assert default().to_dict() == default("classification").to_dict()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_configuration_passes_and_opens_with_what_it_is(path):
    module = runpy.run_path(str(path))
    check(module["get_config"]())
    assert module["__doc__"].splitlines()[0].endswith(".")


@pytest.mark.parametrize(
    ("name", "depth", "strength", "stop_limit", "target", "search_drops"),
    [
        ("resnet20", 20, 2e-4, 0.02, 0.5, (50,)),
        ("resnet56", 56, 3e-4, 0.01, 0.5, (20, 50)),
        ("resnet56_38", 56, 3e-4, 0.02, 0.38, (25, 50)),
        ("resnet110", 110, 1e-4, 0.02, 0.62, (50,)),
        ("resnet164", 164, 1e-4, 0.02, 0.5, (50,)),
    ],
)
def test_the_cifar_configurations_have_the_papers_hyperparameters(
    name, depth, strength, stop_limit, target, search_drops
):
    config = read(name)
    assert (config.model.name, config.model.depth, config.model.width) == ("resnet", depth, 1.0)
    assert (config.data.name, config.batch_size, config.method) == ("cifar10", 64, "dhp")
    assert config.optimizer.to_dict() == {
        **{"name": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4},
        **{"decayed": "all", "clip": None, "average": 0.0},
    }
    assert config.target == target
    assert config.log_every == 100
    assert config.search.strength == strength
    assert config.search.stop_limit == stop_limit
    assert config.search.threshold == 5e-3
    assert config.search.min_channels == 4
    assert config.search.drops == search_drops
    for phase in PHASES:
        assert config[phase].learning_rate == 0.1
    for phase in ("converge", "baseline"):
        assert config[phase].epochs == 300
        assert config[phase].drops == (150, 225)


@pytest.mark.parametrize(
    ("name", "model", "task"),
    [
        (
            *("srresnet_x4", ("srresnet", {"blocks": 16})),
            {"scale": 4, "patch": 96, "channels": 3, "loss": "l1", "steps_per_epoch": 2013},
        ),
        (
            *("dncnn_s70", ("dncnn", {"depth": 17})),
            {"sigma": 70.0, "patch": 64, "channels": 1, "loss": "l1", "shave": 1},
        ),
    ],
)
def test_the_restoration_configurations_are_of_the_papers_networks(name, model, task):
    config = read(name)
    assert (config.model.name, config.model.width) == (model[0], 1.0)
    assert model[1].items() <= config.model.to_dict().items()
    assert task.items() <= config.task.to_dict().items()
    assert (config.optimizer.name, config.target, config.data.name) == ("adam", 0.6, "photo_folder")


LONG = {"epochs": 220, "drops": (200, 205, 210, 215)}
NARROW = {"threshold": 2e-3, "drops": (50, 70)}
ENLARGING = {"epochs": 300, "drops": (200,)}
DENOISING = {"epochs": 60, "drops": (40,)}


@pytest.mark.parametrize(
    ("name", "model", "target", "strength", "search", "after", "batch", "task"),
    [
        ("mobilenet_v1", (1.0, 0.4), 0.5, 5e-5, NARROW, LONG, 64, {}),
        ("mobilenet_v1_x2", (2.0, 0.45), 0.24, 5e-5, NARROW, LONG, 64, {}),
        ("mobilenet_v2", (1.0, 0.4), 0.1, 1e-4, {**NARROW, "threshold": 1e-3}, LONG, 64, {}),
        ("mobilenet_v2_x2", (2.0, 0.45), 0.24, 1e-4, {"drops": (50, 70)}, LONG, 64, {}),
        ("srresnet_x4", (1.0, None), 0.6, 0.1, {"drops": (40,)}, ENLARGING, 16, {"patch": 96}),
        ("edsr_x4", (1.0, None), 0.6, 0.1, {"drops": (40,)}, ENLARGING, 16, {"patch": 192}),
        ("dncnn_s70", (1.0, None), 0.6, 0.1, {"drops": (10,)}, DENOISING, 64, {"patch": 64}),
        ("unet_s70", (1.0, None), 0.6, 0.1, {"drops": (10,)}, DENOISING, 16, {"patch": 128}),
    ],
)
def test_other_configurations_have_the_papers_hyperparameters(
    name, model, target, strength, search, after, batch, task
):
    config = read(name)
    assert (config.model.width, config.model.get("classifier_keep")) == model
    assert (config.target, config.batch_size) == (target, batch)
    search = {"strength": strength, "threshold": 5e-3, "stop_limit": 0.02, **search}
    assert search.items() <= config.search.to_dict().items()
    for phase in ("converge", "baseline"):
        assert after.items() <= config[phase].to_dict().items()
    assert {config[phase].learning_rate for phase in PHASES} == {1e-4 if task else 0.1}
    if task:
        steps = {"super_resolution": 2013, "denoising": 10_000}[config.task.name]
        task = {"loss": "l1", "steps_per_epoch": steps, **task}
        assert (config.optimizer.name, config.optimizer.weight_decay) == ("adam", 0)
    assert task.items() <= config.task.to_dict().items()


@pytest.mark.parametrize("depth", [20, 56])
def test_residual_networks_of_twice_the_width_are_searched_down_to_the_cost_of_width_1(depth):
    wide, narrow = read(f"resnet{depth}_x2"), read(f"resnet{depth}")
    flops = [
        dhp.measure_cost(dhp.models.build_abstract(**config.model), (32, 32, 3)).flops
        for config in (wide, narrow)
    ]
    assert 0.98 < wide.target * flops[0] / flops[1] <= 1
    assert wide.search == narrow.search


def test_densenet_has_nesterovs_momentum_and_mobilenets_have_dropout():
    for path in CONFIGS.glob("*.py"):
        config = read(path.stem)
        assert config.optimizer.nesterov == (path.stem in ("densenet40", "resnet20_from_trained"))
        mobile = path.stem.startswith("mobilenet")
        assert config.model.get("dropout") == (0.2 if mobile else None)


def test_adam_with_nesterovs_momentum_is_refused():
    config = default("denoising")
    config.optimizer.nesterov = True
    assert refusal(config) == (
        "config.optimizer.nesterov: expected False, for adam has none; got True"
    )


def test_only_methods_by_importance_divide_it_by_flops():
    config = default()
    config.per_flop = 0.5
    assert refusal(config) == (
        "config.per_flop: expected 0, for config.method=dhp ranks no channels by their importance; "
        "got 0.5"
    )
    config.method, config.source = "taylor", "runs/baseline"
    check(config)


@pytest.mark.parametrize("phase", ["search", "converge"])
def test_only_what_starts_from_a_trained_network_learns_from_it(phase):
    config = default()
    config[phase].distillation.weight = 0.5
    assert refusal(config) == (
        f"config.{phase}.distillation.weight: expected 0, for config.method=dhp starts from no "
        "trained network without config.model.weights; got 0.5"
    )
    why_not = "has no search" if phase == "search" else "starts from fresh"
    for method, why in (("baseline", "leaves no pruned network"), ("uniform", why_not)):
        config.method = method
        assert f"expected 0, for config.method={method} {why}" in refusal(config)
    config.method, config.source = "fade", "runs/baseline"
    check(config)
    with config.unlocked():
        config.model.weights = "net.safetensors"
    config.method, config.source = "dhp", None
    check(config)


@pytest.mark.parametrize("warmup", [3, 3.5, 10**6])
def test_a_warm_up_that_fills_its_phase_is_refused(warmup):
    config = default()
    config.converge.epochs, config.converge.warmup = 3, float(warmup)
    assert refusal(config) == (
        f"config.converge.warmup: expected less than converge.epochs=3; got {float(warmup)}"
    )


# One wrong value


BUDGETS = ("flops", "params", "activations", "latency")
GOOD = {
    "seed": [0, 1, 2**32 - 1],
    "method": ["dhp", "baseline", "uniform"],
    "source": [None],  # for these
    "target": [0.5, 1, 1e-9],
    **{f"budget.{name}": [None, 1, 0.5, 1e-9] for name in BUDGETS},
    "budget.batch": [None, 1, 64],
    "targets": [None, (0.75, 0.5), [1, 0.1], (0.5,)],
    "multiple_of": [1, 8, "auto", "stages.*:8", "stages.1:8,blocks.*.hidden.0:16"],
    "per_flop": [0],
    "batch_size": [1, 4096],
    "dtype": ["float32", "bfloat16"],
    "log_every": [1],
    "precision": ["default", "high", "highest"],
    "nonfinite": ["stop", "skip"],
    "checkpoint.seconds": [0, 0.5, 3600],
    "checkpoint.keep": [2, 10],
    "checkpoint.grace": [1e-3, 25],
    "mesh.data": [-1, 1, 8],
    "mesh.model": [1, 4],
    "task.name": ["classification"],
    "data.name": [
        *("digits", "cifar10", "cifar100"),
        *("tiny_imagenet", "imagenet2012", "image_folder"),
    ],
    "data.dir": [None, "somewhere", Path("somewhere")],
    "data.image_size": [None, 1, 224],
    "data.channels": [None, 1, 3],
    "data.archive": [None, "some.zip", Path("some.zip")],
    "data.crop_padding": [None, 0, 4],
    "data.flip": [None, True, False],
    "data.cutout": [0, 8],
    "data.mixup": [0, 0.2, 1],
    "task.label_smoothing": [0, 0.1],
    "data.streamed": [None, True, False],
    "data.workers": [None, 0, 4],
    "data.validation": [0, 0.1, 0.9],
    "optimizer.name": ["sgd", "adam", "adamw"],
    "optimizer.momentum": [0, 0.99],
    "optimizer.nesterov": [False, True],
    "optimizer.weight_decay": [0, 3.0],
    "optimizer.decayed": ["all", "kernels"],
    "optimizer.clip": [None, 0.1, 5],
    "optimizer.average": [0, 0.999],
    "search.strength": [0, 100],
    "search.threshold": [0.0, 1],
    "search.stop_limit": [0, 1],
    "search.min_channels": [1, 1000],
    "search.keep": [0, 0.1, 1],
    "search.batches": [1, 10, 10**6],
    **{f"{phase}.distillation.weight": [0] for phase in TAUGHT},
    **{f"{phase}.distillation.temperature": [0.5, 4] for phase in TAUGHT},
    **{f"{phase}.epochs": [1, 10**6] for phase in PHASES},
    **{f"{phase}.max_steps": [None, 1, 10**6] for phase in PHASES},
    **{f"{phase}.learning_rate": [1e-9, 10] for phase in PHASES},
    **{f"{phase}.schedule": ["drops", "cosine", "linear"] for phase in PHASES},
    **{f"{phase}.drops": [(), [], (1,), [0, 0.5, 7.25]] for phase in PHASES},
    **{f"{phase}.warmup": [0, 0.5, 5] for phase in PHASES},
}
NUMBERS = [None, "1", "", True, float("nan"), float("inf"), -float("inf"), 1e31, [1], {}]
INTEGERS = [*NUMBERS, 1.0, 0.5, 10**18]
COUNT = "an integer >= 1 and <= 1000000"
EPOCHS = f"{COUNT} (max_steps is for a part of one)"
CHANNELS = "an integer >= 1 and <= 32768"
WORDS = [None, 1, "", "SGD", "dhp ", ["dhp"], {}]
BAD = {
    "seed": ([*INTEGERS, -1, 2**32], "an integer >= 0 and <= 4294967295"),
    "method": (WORDS, f"one of {', '.join(METHODS)}"),
    "source": (
        [3, ["somewhere"], "x" * 5000],
        "a path, or None for a method that starts from no other run",
    ),
    "target": ([*NUMBERS, 0, -0.5, 1.5], "a number > 0 and <= 1"),
    **{
        f"budget.{name}": (
            [*NUMBERS[1:], 0, -0.5, 1.5],
            "a number > 0 and <= 1, or None for no such budget",
        )
        for name in BUDGETS
    },
    "budget.batch": ([*INTEGERS[1:], 0, -1], f"{COUNT}, or None for one input"),
    "targets": (
        [0.5, "0.5", (), (0.5, 0.5), (0.5, 0.75), (0.5, 0), (1.5, 0.5), (True, 0.5), (0.5, None)],
        "up to 20 shares > 0 and <= 1 in descending order, such as (0.75, 0.5), or None for the "
        "target alone",
    ),
    "multiple_of": (
        [*INTEGERS, 0, -8, "Auto", "8", "stages", "stages:0", "stages:8,", "a:99999", ["a:8"]],
        f"{CHANNELS}, auto, or numbers by latent, such as stages.*:8,head:4",
    ),
    "per_flop": ([*NUMBERS, -1], "a number >= 0 and <= 1e+30"),
    "batch_size": ([*INTEGERS, 0, -64], COUNT),
    "dtype": ([*WORDS, "float16"], "one of float32, bfloat16"),
    "precision": ([*WORDS, "float32"], "one of default, high, highest"),
    "log_every": ([*INTEGERS, 0], COUNT),
    "nonfinite": ([*WORDS, "ignore"], "one of stop, skip"),
    "checkpoint.seconds": ([*NUMBERS, -1], "a number >= 0 and <= 1e+30"),
    "checkpoint.keep": ([*INTEGERS, 0, 1], COUNT.replace(">= 1", ">= 2")),
    "checkpoint.grace": ([*NUMBERS, 0, -1], "a number > 0 and <= 86400"),
    "mesh.data": ([*INTEGERS, 0, -2], "an integer >= 1 and <= 1000000, or -1 for all devices"),
    "mesh.model": ([*INTEGERS, 0, -1], COUNT),
    "task.name": ([*WORDS, "denoise"], "one of classification, super_resolution, denoising"),
    "data.name": (
        [*WORDS, "cifar", "photographs"],
        "one of digits, cifar10, cifar100, tiny_imagenet, imagenet2012, image_folder",
    ),
    "data.dir": (
        [3, ["somewhere"], b"somewhere", "\0", "long" * 100, "~no_such_person/data"],
        "a path, or None for the default of tensorflow-datasets",
    ),
    "data.image_size": (
        [*INTEGERS[1:], 0, -1],
        "an integer >= 1 and <= 10000, or None for the size of the data",
    ),
    "data.channels": (
        [0, 2, "3", True],
        "one of 1, 3, or None for what the images have",
    ),
    "data.archive": ([3, ["some.zip"]], "a path, or None if there is none"),
    "data.crop_padding": (
        [-1, 0.5, "4", 10_001],
        "an integer >= 0 and <= 10000, or None for what suits the data",
    ),
    "data.cutout": ([*INTEGERS, -1, 10_001], "an integer >= 0 and <= 10000"),
    "data.mixup": ([*NUMBERS, -0.1], "a number >= 0 and <= 1e+30"),
    "task.label_smoothing": ([*NUMBERS, -0.1, 1], "a number >= 0 and < 1"),
    "data.flip": ([0, 1, "no"], "True or False, or None for what suits the data"),
    "data.streamed": (
        [0, 1, "no"],
        "True or False, or None for whether they do not fit on the device",
    ),
    "data.workers": (
        [*INTEGERS[1:], -1, 1025],
        "an integer >= 0 and <= 1024, or None for all cores but one",
    ),
    "data.validation": ([*NUMBERS, -0.1, 1], "a number >= 0 and < 1"),
    "optimizer.name": (WORDS, "one of sgd, adam, adamw"),
    "optimizer.momentum": ([*NUMBERS, -0.1, 1, 1.1], "a number >= 0 and < 1"),
    "optimizer.nesterov": ([None, 0, 1, "no"], "True or False"),
    "optimizer.weight_decay": ([*NUMBERS, -1e-9], "a number >= 0 and <= 1e+30"),
    "optimizer.decayed": ([*WORDS, "biases"], "one of all, kernels"),
    "optimizer.clip": ([*NUMBERS[1:], 0, -1], "a number > 0 and <= 1e+30, or None for any norm"),
    "optimizer.average": ([*NUMBERS, -0.1, 1], "a number >= 0 and < 1"),
    "search.strength": ([*NUMBERS, -1], "a number >= 0 and <= 1e+30"),
    "search.threshold": ([*NUMBERS, -1], "a number >= 0 and <= 1e+30"),
    "search.stop_limit": ([*NUMBERS, -0.01, 1.01], "a number >= 0 and <= 1"),
    "search.min_channels": ([*INTEGERS, 0], CHANNELS),
    "search.keep": ([*NUMBERS, -0.1, 1.1], "a number >= 0 and <= 1"),
    "search.batches": ([*INTEGERS, 0], COUNT),
    **{
        f"{phase}.distillation.{name}": ([*NUMBERS, *values], expected)
        for phase in TAUGHT
        for name, values, expected in (
            ("weight", (-0.1, 1.1), "a number >= 0 and <= 1"),
            ("temperature", (0, -1, 1e4), "a number > 0 and <= 1000"),
        )
    },
    **{f"{phase}.epochs": ([*INTEGERS, 0, 0.1], EPOCHS) for phase in PHASES},
    **{
        f"{phase}.max_steps": ([*INTEGERS[1:], 0], f"{COUNT}, or None for all epochs")
        for phase in PHASES
    },
    **{
        f"{phase}.learning_rate": ([*NUMBERS, 0, -1], "a number > 0 and <= 1e+30")
        for phase in PHASES
    },
    **{f"{phase}.schedule": ([*WORDS, "step"], "one of drops, cosine, linear") for phase in PHASES},
    **{f"{phase}.warmup": ([*NUMBERS, -1], "a number >= 0 and <= 1e+06") for phase in PHASES},
    **{
        f"{phase}.drops": (
            [
                *(None, 50, "50", (-1,), (2, 1), (1, 1), ("1",), (True,), (float("nan"),), {}),
                *((1e7,), tuple(range(101))),
            ],
            "up to 100 epochs in ascending order, such as (150, 225)",
        )
        for phase in PHASES
    },
}

# Of restoration, the fields that classification does not have.
PHOTOGRAPHS = {
    "task.name": (RESTORATION, [*WORDS, "classify"], BAD["task.name"][1]),
    "task.patch": ([1, 96], [*INTEGERS, 0, -8], "an integer >= 1 and <= 10000"),
    "task.channels": ([1, 3], [None, 2, 0, "3", 3.0, True], "one of 1, 3"),
    "task.loss": (["l1", "l2"], [*WORDS, "L1", "mse"], "one of l1, l2"),
    "task.steps_per_epoch": ([1, 10**6], [*INTEGERS, 0], COUNT),
    "task.tile": (
        [None, 1, 256],
        [*INTEGERS[1:], 0, -1],
        "an integer >= 1 and <= 10000, or None to run test images whole",
    ),
    "task.overlap": (
        [None, 0, 48],
        [*(v for v in INTEGERS if v is not None), -1],
        "an integer >= 0 and <= 10000, or None for as far as the network sees",
    ),
    "data.name": (
        ["photographs", "photo_folder"],
        [*WORDS, "digits"],
        "one of photographs, photo_folder",
    ),
    **{
        f"data.{name}": (
            [None, "somewhere", Path("somewhere")],
            [3, ["somewhere"]],
            "a path, or None for embedded photographs",
        )
        for name in ("dir", "test_dir")
    },
    "data.cache": (
        [None, "somewhere"],
        [3, ["somewhere"]],
        "a path, or None for the user's cache folder",
    ),
    **{
        name: (GOOD[name], *BAD[name])
        for name in ("data.streamed", "data.workers", "data.validation")
    },
}
OF_TASK = {
    "super_resolution": {
        **PHOTOGRAPHS,
        "task.name": (RESTORATION[:1], *PHOTOGRAPHS["task.name"][1:]),
        "task.scale": ([2, 3, 4], [None, 5, 1, 0, "2", 2.0, [2], True], "one of 2, 3, 4"),
        "task.psnr": (["y", "rgb"], [None, "rgbx", "Y", "", 1, ["y"]], "one of y, rgb"),
    },
    "denoising": {
        **PHOTOGRAPHS,
        "task.name": (RESTORATION[1:], *PHOTOGRAPHS["task.name"][1:]),
        "task.shave": ([0, 1, 4], [*INTEGERS, -1], "an integer >= 0 and <= 10000"),
        "task.sigma": ([0, 25.0, 70], [*NUMBERS, -1], "a number >= 0 and <= 1e+30"),
    },
}


def fields_of(task):
    """The names of all fields of a task's default configuration."""
    return {*flatten(default(task).to_dict())}


def test_the_tables_of_good_and_bad_values_have_every_field():
    def described(task, groups):
        return {name for name in fields_of(task) if name.startswith(groups) or not groups}

    models = described("classification", ("model",))
    assert GOOD.keys() == BAD.keys() == described("classification", ()) - models
    for task, table in OF_TASK.items():
        assert table.keys() == described(task, ("task.", "data."))
        others = fields_of(task) - described(task, ("task.", "data.", "model."))
        assert others == GOOD.keys() - described("classification", ("task.", "data."))


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in GOOD.items() for value in values]
)
def test_a_possible_value_passes(field, value):
    check(changed(field, value))


@pytest.mark.parametrize("method", ["random", "l1_norm", "scratch"])
@pytest.mark.parametrize("source", ["somewhere", Path("somewhere")])
def test_a_method_that_starts_from_a_run_passes_with_one(method, source):
    config = changed("method", method)
    config.source = source
    check(config)


@pytest.mark.parametrize("field", BAD)
def test_an_impossible_value_is_refused_in_one_line_with_what_is_possible(field):
    values, possible = BAD[field]
    for value in values:
        message = refusal(changed(field, value))
        assert message == f"config.{field}: expected {possible}; got {shown(value)}"


@pytest.mark.parametrize(
    ("task", "field", "value"),
    [
        (task, field, value)
        for task, table in OF_TASK.items()
        for field, (values, _, _) in table.items()
        for value in values
    ],
)
def test_a_possible_value_of_a_restoration_passes(task, field, value):
    check(changed(field, value, task))


@pytest.mark.parametrize(
    ("task", "field"), [(task, field) for task, table in OF_TASK.items() for field in table]
)
def test_an_impossible_value_of_a_restoration_is_refused_with_what_is_possible(task, field):
    _, values, possible = OF_TASK[task][field]
    for value in values:
        message = refusal(changed(field, value, task))
        assert message == f"config.{field}: expected {possible}; got {value!r}"


@pytest.mark.parametrize("group", ["task", "data", "checkpoint", "mesh", "optimizer", *PHASES])
def test_a_value_in_place_of_a_group_is_refused_with_the_groups_fields(group):
    fields = ", ".join(sorted(default()[group]))
    assert refusal(changed(group, 3)) == f"config.{group}: expected fields {fields}; got 3"


def test_something_that_is_no_configuration_is_refused():
    assert refusal({"seed": 0}).startswith("config: expected fields baseline, batch_size, ")


# Values that do not go together


@pytest.mark.parametrize(
    ("task", "families", "name", "other"),
    [
        ("denoising", "dncnn, unet", "srresnet", "super_resolution"),
        ("denoising", "dncnn, unet", "resnet", "classification"),
        ("super_resolution", "edsr, srresnet", "unet", "denoising"),
        (
            "classification",
            "densenet, mobilenet_v1, mobilenet_v2, resnet, vgg",
            "edsr",
            "super_resolution",
        ),
    ],
)
def test_a_network_for_another_task_is_refused_with_those_for_this_one(task, families, name, other):
    assert refusal(changed("model.name", name, task)) == (
        f"config.model.name: expected one of {families}, which are for {task}; "
        f"got {name!r}, which is for {other}"
    )


def test_more_examples_in_an_epoch_than_can_be_ordered_are_refused():
    config = changed("task.steps_per_epoch", 1_000_000, "denoising")
    config.batch_size = 268
    check(config)
    config.batch_size = 269
    assert refusal(config) == (
        "config.task.steps_per_epoch: expected at most 997901, for 268435456 examples of 269 a "
        "step; got 1000000"
    )


# Names


@pytest.mark.parametrize(
    ("field", "near"),
    [("tarqet", "target"), ("search.strenght", "strength"), ("data.dri", "dir")],
)
def test_an_unknown_field_is_refused_with_the_known_ones_and_the_nearest(field, near):
    group = default()
    for part in field.split(".")[:-1]:
        group = group[part]
    message = refusal(changed(field, 0.5))
    name = field.split(".")[-1]
    assert message == (
        f"config.{field}: unknown field: expected one of {', '.join(sorted(group))}; "
        f"got {name!r}; did you mean {near!r}?"
    )


@pytest.mark.parametrize(
    ("task", "field", "near"),
    [
        ("denoising", "task.sigm", "sigma"),
        ("super_resolution", "task.scales", "scale"),
        ("super_resolution", "data.test_dirs", "test_dir"),
        ("denoising", "data.testdir", "test_dir"),
    ],
)
def test_an_unknown_field_of_a_restoration_is_refused_with_the_nearest(task, field, near):
    message = refusal(changed(field, 0.5, task))
    assert message.startswith(f"config.{field}: unknown field: expected one of ")
    assert message.endswith(f"; did you mean {near!r}?")


@pytest.mark.parametrize(
    ("task", "field"), [("denoising", "task.scale"), ("super_resolution", "task.sigma")]
)
def test_a_field_of_another_task_is_refused(task, field):
    assert refusal(changed(field, 2, task)).startswith(f"config.{field}: unknown field: ")


@pytest.mark.parametrize(
    ("task", "near"),
    [
        ("denoise", "denoising"),
        ("superresolution", "super_resolution"),
        ("classify", "classification"),
        ("x", None),
    ],
)
def test_the_default_of_an_unknown_task_is_refused_with_the_known_and_the_nearest(task, near):
    with pytest.raises(ConfigError) as caught:
        default(task)
    message = f"task: expected one of classification, denoising, super_resolution; got {task!r}"
    assert str(caught.value) == message + (f"; did you mean {near!r}?" if near else "")


@pytest.mark.parametrize(
    ("task", "field"),
    [
        *(
            ("classification", field)
            for field in ("seed", "model", "data.dir", "search", "converge.drops", "task")
        ),
        ("classification", "task.name"),
        ("denoising", "task.sigma"),
        ("super_resolution", "data.test_dir"),
    ],
)
def test_a_missing_field_is_named(task, field):
    values = default(task).to_dict()
    *groups, name = field.split(".")
    group = values
    for part in groups:
        group = group[part]
    del group[name]
    assert refusal(ConfigDict(values)) == f"config.{field}: missing"


# Values of any kind, one or more at once


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["sgd", "adam", "dhp", "baseline", "digits", "float32", "bfloat16"]),
    st.lists(st.floats(), max_size=3),
    st.tuples(st.floats(0, 10), st.floats(10, 300)),
    st.builds(dict),
)


@given(st.dictionaries(st.sampled_from([*BAD, "model", "search", "extra", "search.x"]), VALUES))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_configuration_passes_or_a_changed_field_is_named(changes):
    values = default().to_dict()
    for field, value in sorted(changes.items()):
        *groups, name = field.split(".")
        group = values
        for part in groups:
            group = group[part] if isinstance(group, dict) else {}
        if isinstance(group, dict):
            group[name] = value
    try:
        check(ConfigDict(copy.deepcopy(values)))
    except ConfigError as error:
        named = re.match(r"config\.([\w.]+): ", str(error)).group(1)
        assert any(named == field or named.startswith(f"{field}.") for field in changes)
    else:
        possible = [check_one(field, value) for field, value in changes.items()]
        assert all(possible)


def check_one(field, value):
    """Whether the default configuration with this one field replaced passes."""
    try:
        check(changed(field, value))
    except ConfigError:
        return False
    return True


# What a command line gives


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"config.target": "0.38", "config.search.epochs": "3"},
        {"config.search.strength": "1e-3", "config.model.depth": "56"},
        {"config.search.drops": "(1, 2)", "config.data.dir": "", "config.method": "baseline"},
        {"config.search": "{'epochs': 3}"},
        {"config.budget.latency": "0.6", "config.data.streamed": "true", "config.data.flip": "0"},
    ],
)
def test_overrides_of_fields_pass(overrides):
    check_overrides(default(), overrides)


def test_overrides_of_the_fields_of_a_task_pass():
    given = {"config.task.sigma": "25", "config.task.tile": "256", "config.data.test_dir": "here"}
    check_overrides(default("denoising"), given)
    check_overrides(default("super_resolution"), {"config.task.psnr": "rgb"})


@pytest.mark.parametrize(
    ("task", "name", "text", "message"),
    [
        (
            "denoising",
            "config.task.sigma",
            "abc",
            "config.task.sigma: expected a number >= 0 and <= 1e+30; got 'abc'",
        ),
        (
            "denoising",
            "config.task.steps_per_epoch",
            "1e3",
            "config.task.steps_per_epoch: expected an integer >= 1 and <= 1000000; got '1e3'",
        ),
        (
            "super_resolution",
            "config.task.scale",
            "x4",
            "config.task.scale: expected one of 2, 3, 4; got 'x4'",
        ),
        (
            "denoising",
            "config.task.sgima",
            "1",
            "config.task.sgima: unknown field: expected one of channels, loss, name, overlap, "
            "patch, shave, sigma, steps_per_epoch, tile; got 'sgima'; did you mean 'sigma'?",
        ),
        (
            "classification",
            "config.task.sigma",
            "1",
            "config.task.sigma: unknown field: expected one of label_smoothing, name; got 'sigma'",
        ),
    ],
)
def test_a_wrong_override_of_a_field_of_a_task_is_refused(task, name, text, message):
    with pytest.raises(ConfigError) as caught:
        check_overrides(default(task), {name: text})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.target", "half", "config.target: expected a number > 0 and <= 1; got 'half'"),
        ("config.batch_size", "1.5", f"config.batch_size: expected {COUNT}; got '1.5'"),
        ("config.search.epochs", "", f"config.search.epochs: expected {EPOCHS}; got ''"),
        ("config.search.epochs", "0.1", f"config.search.epochs: expected {EPOCHS}; got '0.1'"),
        (
            "config.optimizer",
            "adamw",
            "config.optimizer: expected a field of it, such as --config.optimizer.name=<value>; "
            "got 'adamw'",
        ),
        (
            "config.converge.distillation",
            "0.9",
            "config.converge.distillation: expected a field of it, such as "
            "--config.converge.distillation.weight=<value>; got '0.9'",
        ),
        ("config.model.depth", "x", "config.model.depth: expected an integer; got 'x'"),
        ("config.model.width", "x", "config.model.width: expected a number; got 'x'"),
        ("config.target", None, "config.target: expected --config.target=<value>; got none"),
        (
            "config.budget.latency",
            "abc",
            "config.budget.latency: expected a number > 0 and <= 1; got 'abc'",
        ),
        (
            "config.data.streamed",
            "maybe",
            "config.data.streamed: expected True or False; got 'maybe'",
        ),
        ("config.data.flip", "2", "config.data.flip: expected True or False; got '2'"),
        (
            "config.data.workers",
            "few",
            "config.data.workers: expected an integer >= 0 and <= 1024; got 'few'",
        ),
        (
            "config.serch.epochs",
            "3",
            "config.serch: unknown field: expected one of baseline, batch_size, budget, "
            "checkpoint, converge, data, dtype, log_every, mesh, method, model, multiple_of, "
            "nonfinite, optimizer, per_flop, precision, search, seed, source, target, targets, "
            "task; got 'serch'; did you mean 'search'?",
        ),
        (
            "config.data.dri",
            "3",
            "config.data.dri: unknown field: expected one of archive, channels, crop_padding, "
            "cutout, dir, flip, image_size, mixup, name, streamed, validation, workers; "
            "got 'dri'; did you mean 'dir'?",
        ),
        (
            "config.target.x",
            "3",
            "config.target.x: config.target has no fields, its value is 0.5",
        ),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(name, text, message):
    with pytest.raises(ConfigError) as caught:
        check_overrides(default(), {"config.seed": "1", name: text})
    assert str(caught.value) == message


@pytest.mark.parametrize("task", TASKS)
def test_the_table_of_fields_is_the_default_configuration_and_says_what_each_is(task):
    fields = dict(config_fields.flat_fields(config_fields.fields_of(task)))
    config = default(task)
    assert fields.keys() == {"model", *(f for f in fields_of(task) if not f.startswith("model."))}
    for name, field in fields.items():
        *groups, last = name.split(".")
        group = functools.reduce(operator.getitem, groups, config)
        assert field.rule.allows(group[last]), name
        assert field.text == field.text.strip() != "", name
        assert "\n" not in field.text
        if field.default is None:
            assert group.get_type(last) is field.kind, name


def test_no_default_of_a_task_is_shared_between_two_configurations():
    one, other = default(), default()
    one.model.depth = 56
    one.data.dir = "somewhere"
    one.multiple_of = 8
    assert other.to_dict() == default().to_dict()
    assert (other.model.depth, other.data.dir, other.multiple_of) == (20, None, 1)


@pytest.mark.parametrize("task", RESTORATION)
def test_every_default_of_a_recipe_is_one_of_a_field(task):
    fields = dict(config_fields.flat_fields(config_fields.fields_of(task)))
    assert config_fields.RECIPES[task].keys() <= fields.keys()


@pytest.mark.parametrize("group", ["optimizer", "search", "model", "data"])
def test_a_value_for_a_group_of_fields_is_refused_in_one_line(group):
    with pytest.raises(ConfigError, match=rf"^config.{group}: expected a field of it") as caught:
        check_overrides(default(), {f"config.{group}": "adamw"})
    assert str(caught.value).endswith("got 'adamw'")
