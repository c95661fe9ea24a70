"""Configurations of any kind: each prepares a run, or one line names a field that was changed."""

import copy
from decimal import Decimal
from fractions import Fraction
import functools
import importlib.util
import inspect
import math
from pathlib import Path
import re
import resource
import sys
import tempfile
import time

from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_dict
from networks import SMALL
import numpy as np
import pytest

from dhp_jax import config as dhp_config
from dhp_jax.config.methods import METHODS, TAUGHT
from dhp_jax.data.labelled import digits
from dhp_jax.errors import ConfigError, shown
from dhp_jax.models import mobilenet, registry
from dhp_jax.models.arguments import MAX_CHANNELS
from dhp_jax.models.registry import task_of
from dhp_jax.pipeline import command, preparation
from dhp_jax.pipeline.preparation import PHASES, prepare
from dhp_jax.train import schedules
from dhp_jax.train.optimizer import optimizer

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "experiments/configs"

# The smallest network of each family.
FLOATING = "float64"
# Values of any kind. No field takes all of them, and most take none.
NUMBERS = [
    *(0, 1, 2, 3, 7, 8, 64, -1, -(10**18), 2**31 - 1, 2**31, 2**32, 2**63, 10**18, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 5e-324, 1e-30, 1e30, 1e38, 1e308),
    *(math.nan, math.inf, -math.inf),
]
OTHERS = [
    *(None, True, False, "", "1", "None", "nan", "dhp", FLOATING, "resnet", "x" * 100_000),
    *("two\nlines", "\0", "ünï", "\u2028", "~nobody/here", "nowhere", ".", b"bytes", 1j),
    *((), (1,), (2, 1), (1, 2), (1e308,), (math.nan,), ((1,),), tuple(range(10_000)), [], [1]),
    *([[1]], [None], {}, {"name": "resnet"}, {"name": {"name": 1}}, {1: 2}, [{"x": {"y": 1}}]),
    *(np.float32(0.5), np.float64(0.5), np.int64(3), np.bool_(True), np.zeros((2, 3)), np.zeros(0)),
    *(Decimal(1), Fraction(1, 2), Path("nowhere"), Path("x" * 300), Path("~nobody"), int, len),
    10**5000,  # which Python does not print
    functools.reduce(lambda inner, _: [inner], range(500), 1),
]
ANY = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(OTHERS),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.floats(0, 300), max_size=3).map(tuple),
    st.dictionaries(st.text(st.characters(exclude_characters="."), max_size=5), st.integers()),
)
BUDGETS = [f"budget.{name}" for name in ("flops", "params", "activations", "latency")]
# Values that suit a field, so that what is right is not refused either.
GOOD = {
    "seed": [0, 2**32 - 1],
    "method": [*METHODS],
    "source": [None, ".", "nowhere"],
    "target": [0.5, 0.9, 1],
    **{name: [None, 0.9, 1] for name in BUDGETS},
    "budget.batch": [None, 1, 64],
    "targets": [None],
    "multiple_of": [1, 2, 4, "auto", "*:2", "stages.*:2"],
    "batch_size": [1, 64],
    "dtype": ["float32", "bfloat16"],
    "nonfinite": ["stop", "skip"],
    "task.name": ["classification", "super_resolution", "denoising"],
    "task.scale": [2, 3, 4],
    "task.patch": [24, 48, 96],
    "task.channels": [1, 3],
    "task.psnr": ["y", "rgb"],
    "task.tile": [None, 128, 256],
    "task.overlap": [None, 0, 16],
    "data.name": ["digits", "photographs", "image_folder", "photo_folder"],
    "data.dir": [None, ".", Path()],
    "data.test_dir": [None, "."],
    "data.flip": [None, True, False],
    "data.validation": [0, 0.1, 0.5],
    "data.crop_padding": [None, 0, 2],
    "data.cutout": [0, 4],
    "data.mixup": [0, 0.2],
    "task.label_smoothing": [0, 0.1],
    "optimizer.name": ["sgd", "adam", "adamw"],
    "optimizer.momentum": [0, 0.9],
    "optimizer.nesterov": [False, True],
    "optimizer.decayed": ["all", "kernels"],
    "optimizer.clip": [None, 1.0],
    "optimizer.average": [0, 0.9],
    "search.stop_limit": [0, 0.02],
    "search.min_channels": [1, 2, 4],
    "search.keep": [0, 0.1],
    **{f"{phase}.distillation": [{"weight": 0.5, "temperature": 2.0}] for phase in TAUGHT},
    **{f"{phase}.schedule": [*schedules.NAMES] for phase in PHASES},
    "model.name": [*SMALL],
    "model.width": [0.0625, 0.25, 1.0],
    "model.depth": [7, 11, 20],
    "model.blocks": [1, 2],
    "model.groups": [1, 2],
    "model.prune_upsampler": [True, False],
    "model.prune_classifier": [True, False],
    "model.classifier_keep": [0, 0.4, 1.0],
    "model.dropout": [0, 0.2],
    "model.embedding": [2, 8],
    "model.stem_stride": [1, 2],
}
COUNTS = [1, 2, 100]  # suit every other number

FLOORS = ("search.min_channels", "search.keep")

# Fields that a message may be about although others were changed, which they are measured by.
MEASURED_BY = {
    "source": ("method",),
    "target": ("model", *FLOORS, "multiple_of", "task", "data"),
    "budget": ("target", "model", *FLOORS, "multiple_of", "task", "data"),
    "multiple_of": ("model",),
    "batch_size": ("data.validation",),
    "task.steps_per_epoch": ("batch_size",),
    "task.patch": ("task.scale",),
    **{f"{phase}.distillation": ("method",) for phase in TAUGHT},
    "per_flop": ("method",),
    "task.tile": ("task.overlap", "model"),
    "task": ("task.name",),
    "optimizer.nesterov": ("optimizer.name",),
    **{f"{phase}.warmup": (f"{phase}.epochs",) for phase in PHASES},
    "data": (
        "task.name",
        "task.patch",
        "task.channels",
        "task.shave",
        "data.name",
        "data.dir",
        "data.test_dir",
        "data.validation",
    ),
    "model": ("task.name", "model.name", "model.depth", "model.groups"),
}


def values_of(family):
    """The configuration of a run of a family's smallest network, on data that are embedded."""
    task = task_of(family)
    values = dhp_config.default(task).to_dict()
    values["model"] = {"name": family, **SMALL[family]}
    values["target"] = 0.95
    values["search"]["min_channels"] = 1
    if task == "classification":
        values["data"]["name"] = "digits"
    else:
        values["task"].update(patch=24, steps_per_epoch=2)
    return values


@functools.cache
def fields_of(family):
    """Every field of a family's configuration, every group of them, and what is no field."""
    arguments = inspect.signature(registry.FAMILIES[family].__init__).parameters
    flat = [
        f"{name}.{inner}" if inner else name
        for name, value in values_of(family).items()
        for inner in (["", *value] if isinstance(value, dict) else [""])
    ]
    return sorted({*flat, *(f"model.{argument}" for argument in arguments), "extra", "data.extra"})


def place(values, field):
    """The group that a field is in, if it is still there, and the field's name in it."""
    *groups, name = field.split(".")
    for group in groups:
        values = values.get(group) if isinstance(values, dict) else None
    return (values if isinstance(values, dict) else None), name


def suiting(field):
    """Values of which one at least suits a field."""
    return GOOD.get(field, COUNTS)


@st.composite
def configurations(draw):
    """A configuration of which some fields were changed, and the names of these."""
    family = draw(st.sampled_from(sorted(registry.FAMILIES)))
    values = copy.deepcopy(values_of(family))
    changed = []
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 2, 3]))):
        field = draw(st.sampled_from(fields_of(family)))
        group, name = place(values, field)
        if group is None:
            continue
        how = draw(st.sampled_from(["any"] * 5 + ["suiting"] * 3 + ["drop", "misspell"]))
        changed.append(field)
        if how == "any":
            group[name] = draw(ANY)
        elif how == "suiting":
            group[name] = draw(st.sampled_from(suiting(field)))
        else:
            value = group.pop(name, None)
            if how == "misspell":
                misspelt = draw(st.sampled_from([name + "s", name[1:], name.upper(), name + "é"]))
                group[misspelt] = value
                changed.append(".".join([*field.split(".")[:-1], misspelt]))
    return ConfigDict(values), changed


@pytest.fixture(scope="module")
def cached():
    """Networks of shapes alone, and what is found out about them, are made only once."""
    build, known = registry.build_abstract, {}

    def build_abstract(name, **arguments):
        key = name, *sorted((argument, shown(value)) for argument, value in arguments.items())
        if key not in known:
            known[key] = build(name, **arguments)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "build_abstract", build_abstract)
        for name in ("measure_cost", "check_axes"):
            patch.setattr(preparation, name, functools.cache(getattr(preparation, name)))
        patch.setattr(
            preparation, "_check_latency", lambda *arguments: None
        )  # it compiles networks
        patch.setattr(digits, "load", functools.cache(digits.load))
        patch.setattr(mobilenet, "V1_BLOCKS", mobilenet.V1_BLOCKS[:3])  # the shape of all others
        patch.setattr(mobilenet, "V2_GROUPS", mobilenet.V2_GROUPS[:3])
        yield


def peak_memory():
    """The most memory that this process has ever had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def named(message):
    """The field that a message is about."""
    found = re.match(r"config\.([\w.]*\w)", message)
    assert found, message
    return found[1]


def within(field, group):
    """Whether a field is a group, or in it."""
    return f"{field}.".startswith(f"{group}.")


def about(field, changed):
    """Whether a message about a field is one about a field that was changed."""
    causes = [c for group, causes in MEASURED_BY.items() if within(field, group) for c in causes]
    return any(
        within(field, name) or any(within(name, cause) or within(cause, name) for cause in causes)
        for name in changed
    )


def check_usable(run):
    """What is prepared can be trained: its schedules and optimizers are numbers."""
    config = run.config
    steps = run.setup.epoch // config.batch_size
    assert steps >= 1
    for phase in ("search", "converge", "baseline"):
        schedule = preparation.schedule_of(run, phase)
        settings = config.optimizer
        optimizer(
            settings.name,
            schedule,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        assert math.isfinite(np.float32(config[phase].learning_rate))
    assert task_of(config.model.name) == config.task.name


def check_prepared_or_refused(config, changed):
    """A configuration prepares a run, or one line names a field that was changed."""
    started, memory = time.process_time(), peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = prepare(config, Path(folder) / "run")
        except ValueError as error:
            message = str(error)
            assert len(message.splitlines()) == 1, message
            assert about(named(message), changed), (message, changed)
            assert len(message) < 2000
            assert not (Path(folder) / "run").exists()
        else:
            check_usable(run)
    assert time.process_time() - started < 30
    assert peak_memory() - memory < 2**30


@pytest.mark.usefixtures("cached")
@given(configurations())
@settings(derandomize=True, deadline=None, max_examples=12)
def test_a_configuration_prepares_a_run_or_one_line_names_a_field_that_was_changed(example):
    check_prepared_or_refused(*example)


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
@given(configurations())
@settings(derandomize=True, deadline=None, max_examples=800)
def test_many_configurations_prepare_a_run_or_one_line_names_a_field_that_was_changed(example):
    check_prepared_or_refused(*example)


# The arguments of networks


def refusal(family, **arguments):
    with pytest.raises(ValueError, match=": expected ") as caught:
        registry.build_abstract(family, **arguments)
    return str(caught.value)


def may_suit(argument, kind, value):
    """Whether a value is of an argument's type, above 0 (a share may be 0), and not huge."""
    if value is None:
        return argument == "group_width"
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    number = isinstance(value, int if kind is int else int | float)
    return number and (
        0 < value < 10**6 or (argument in ("classifier_keep", "dropout") and value == 0)
    )


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize(
    "values",
    [[*NUMBERS, *OTHERS][::7], pytest.param([*NUMBERS, *OTHERS], marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_every_argument_of_a_family_refuses_other_types_and_what_no_machine_can_hold(
    family, values
):
    parameters = dict(inspect.signature(registry.FAMILIES[family].__init__).parameters)
    del parameters["self"], parameters["rngs"], parameters["dtype"]
    arguments = SMALL[family] | ({"scale": 2} if "scale" in parameters else {})
    for argument, parameter in parameters.items():
        kind = int if parameter.annotation == int | None else parameter.annotation
        for value in values:
            if not may_suit(argument, kind, value):
                message = refusal(family, **arguments | {argument: value})
                assert re.fullmatch(rf"{argument}: expected .+", message), (message, value)


def test_a_dtype_that_is_none_of_floating_point_numbers_is_refused():
    for value in [*NUMBERS, *OTHERS]:
        if value is None or isinstance(value, np.floating) or value is FLOATING:
            continue
        message = refusal("dncnn", **SMALL["dncnn"], dtype=value)
        assert re.fullmatch("dtype: expected a name such as 'bfloat16', got .+", message)


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("resnet", {"depth": 20, "width": MAX_CHANNELS / 64}),
        ("resnet", {"depth": 50, "groups": 32, "group_width": 128}),
        ("densenet", {"depth": 7, "growth": MAX_CHANNELS // 5}),
        ("vgg", {"width": MAX_CHANNELS / 512}),
        ("mobilenet_v1", {"width": MAX_CHANNELS / 1024}),
        ("mobilenet_v2", {"width": MAX_CHANNELS / 1280}),
        ("srresnet", {"scale": 3, "blocks": 1, "features": MAX_CHANNELS}),
        ("edsr", {"scale": 4, "blocks": 1, "features": MAX_CHANNELS}),
        ("dncnn", {"depth": 3, "features": MAX_CHANNELS}),
        ("unet", {"depth": 8, "features": MAX_CHANNELS // 128}),
    ],
)
def test_the_widest_network_of_a_family_is_built_abstractly_in_seconds_and_a_wider_one_refused(
    family, arguments
):
    started, memory = time.process_time(), peak_memory()
    registry.build_abstract(family, **arguments)
    assert time.process_time() - started < 30
    assert peak_memory() - memory < 2**30
    with pytest.raises(
        ValueError, match=r"^width: expected at most [\d.e+]+, for layers of no more"
    ):
        registry.build_abstract(family, **arguments | {"width": 1.01 * arguments.get("width", 1)})


# Configurations that no table of fields describes


@pytest.mark.parametrize(
    "field", ["data.dir", "seed", "task", "task.name", "model.width", "search.extra"]
)
def test_a_placeholder_that_has_no_value_yet_is_refused(field):
    values = values_of("resnet")
    group, name = place(values, field)
    group[name] = config_dict.required_placeholder(str)
    with pytest.raises(ConfigError, match=rf"^config\.{field}: expected a value; got none$"):
        dhp_config.check(ConfigDict(values))


@pytest.mark.parametrize("value", [None, 3, "", [], {}, {"seed": 0}, np.zeros((2, 2)), object()])
def test_what_is_no_configuration_is_refused(value):
    with pytest.raises(
        ConfigError, match=r"^config: expected fields baseline, [^\n]*; got [^\n]+$"
    ):
        dhp_config.check(value)


@pytest.mark.parametrize("group", ["", "model", "search", "model.inner"])
@pytest.mark.parametrize("name", ["", "two\nlines", "\u2028", " ", 1, ("a",)])
def test_a_name_of_any_kind_is_refused_in_one_line(group, name):
    values = values_of("vgg")
    inner = values
    for part in group.split(".") if group else ():
        inner = inner.setdefault(part, {})
    inner[name] = 3
    with pytest.raises(ConfigError) as caught, tempfile.TemporaryDirectory() as folder:
        prepare(ConfigDict(values), Path(folder) / "run")
    assert re.match(rf"config{group and '.' + group.split('.')[0]}[.:]", str(caught.value))
    assert len(str(caught.value).splitlines()) == 1


# Command lines


@pytest.fixture(scope="module")
def parse():
    spec = importlib.util.spec_from_file_location("experiments_main", ROOT / "experiments/main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: command.parse(["main.py", *arguments], module.define)


TEXTS = st.one_of(
    st.sampled_from([*map(str, NUMBERS), *(value for value in OTHERS if isinstance(value, str))]),
    st.sampled_from(["(1,2)", "(1,", "[1]", "{}", "{'epochs': 3}", "(" * 500, "1" * 4000, "\\"]),
    st.sampled_from(["True", "false", "no", "1e400", "0x10", "1_0", " 1", "--", "a=b", "'"]),
    st.text(max_size=20),
    st.none(),
)
UNKNOWN = st.one_of(
    st.sampled_from(["seed.x", "search.epochs[0]", "search..epochs", "", ".", "data.dirs"]),
    st.text(st.characters(exclude_characters="="), max_size=8),
)


@st.composite
def command_lines(draw):
    """A configuration's file, and texts for some of its fields and for what is none."""
    name, family = draw(
        st.sampled_from([("digits_resnet20", "resnet"), ("photographs_dncnn", "dncnn")])
    )
    overrides = {}
    for how in draw(st.lists(st.sampled_from(["any", "suiting", "unknown"]), max_size=3)):
        field = draw(UNKNOWN if how == "unknown" else st.sampled_from(fields_of(family)))
        text = draw(st.sampled_from(suiting(field)).map(str) if how == "suiting" else TEXTS)
        overrides[field] = text
    return CONFIGS / f"{name}.py", overrides


def mentioned(field, message):
    """Whether a message is about a field, what is in it, or the first part of it that is none."""
    parts = "".join(f"config.{field}".split()).split(".")
    names = [".".join(parts[:end]) for end in range(2, len(parts) + 1)]
    starts = (f"flag--{names[-1]}", f"Flag--{names[-1]}", *(f"{name}:" for name in names))
    return "".join(message.split()).startswith(starts)


def check_parsed_or_refused(parse, path, overrides):
    """A command line is parsed, or one line names a field that was given."""
    given = [
        f"--config.{field}" + ("" if text is None else f"={text}")
        for field, text in overrides.items()
    ]
    try:
        dhp_config.check(parse(f"--config={path}", *given).config)
    except (ValueError, flags.Error) as error:
        message = " ".join(str(error).split())  # as `main` prints it
        known = any(mentioned(field, message) for field in overrides)
        assert known or about(named(message), overrides), message


@given(command_lines())
@settings(derandomize=True, deadline=None, max_examples=20)
def test_a_command_line_is_parsed_or_one_line_names_a_field_that_was_given(parse, example):
    check_parsed_or_refused(parse, *example)


@pytest.mark.slow
@given(command_lines())
@settings(derandomize=True, deadline=None, max_examples=400)
def test_many_command_lines_are_parsed_or_one_line_names_a_field_that_was_given(parse, example):
    check_parsed_or_refused(parse, *example)
