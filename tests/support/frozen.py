"""What later versions of the library keep, as JSON values; `fixtures/make.py` has written them."""

import contextlib
import importlib.util
import inspect
import io
import os
from pathlib import Path
import re
import runpy
import sys
from unittest import mock

from flax import nnx
import jax.numpy as jnp
from networks import run
import numpy as np

import dhp_jax as dhp
from dhp_jax import config as dhp_config

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests/fixtures"
RUN_CONFIG = FIXTURES / "run_config.py"
MODULES = ("dhp_jax.export", "dhp_jax.predict", "dhp_jax.report")
TASKS = ("classification", "super_resolution", "denoising")
FLAG = re.compile(r"^  (?:-\w, )?--(\[no\])?([\w-]+)(.*(?:\n    .*)*)", re.MULTILINE)
CHOICES = re.compile(r"^ \{([^}]*)\}")
VALUE = re.compile(r"^ [A-Z_]+\b")
UNTOLD = [["args", "VAR_POSITIONAL", False], ["kwargs", "VAR_KEYWORD", False]]


class Net(nnx.Module):
    """A network of one's own: an addition, a concatenation; 6x6 images of 2 channels, 3 scores."""

    def __init__(self, rngs):
        image = dhp.Latent(2, prunable=False, rngs=rngs)
        a, b = dhp.Latent(6, rngs=rngs, min_channels=2), dhp.Latent(5, rngs=rngs, min_channels=1)
        self.first = dhp.HyperConv(image, a, (3, 3), use_bias=False, rngs=rngs)
        self.norm = dhp.BatchNorm(a, rngs=rngs)
        self.second = dhp.HyperConv(a, a, (3, 3), rngs=rngs)
        self.third = dhp.HyperConv(dhp.concat(a, a), b, (1, 1), 2, rngs=rngs)
        self.classifier = dhp.Linear(b, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        y = x + self.second(x)
        return self.classifier(nnx.relu(self.third(jnp.concatenate([x, y], -1))).mean((1, 2)))


def load_main():
    """The function `main` of experiments/main.py; it takes the arguments and returns the code."""
    spec = importlib.util.spec_from_file_location("experiments_main", ROOT / "experiments/main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(ROOT / "experiments/main.py"), *arguments])


# Names, flags and fields


def parameters(called):
    """Each parameter of a function or class: its name, kind, and whether it may be left out."""
    function = called.__init__ if isinstance(called, type) else called
    found = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return [[p.name, p.kind.name, p.default is not p.empty] for p in found]


def signatures():
    """The parameters of all public functions and classes, and of all families of networks."""
    public = {name: getattr(dhp, name) for name in dhp.__all__}
    public |= {f"models.{name}": family for name, family in dhp.models.FAMILIES.items()}
    public["models.build"] = dhp.models.build
    found = {name: parameters(each) for name, each in public.items() if callable(each)}
    return {name: given for name, given in found.items() if given != UNTOLD}


def help_of(command):
    """What `--help` of experiments/main.py prints, or of a module that is run."""
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}),
        mock.patch.object(sys, "argv", [command, "--help"]),
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.suppress(SystemExit),
    ):
        if command in MODULES:
            runpy.run_module(command, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / command), run_name="__main__")
    return printed.getvalue()


def flags_in(text):
    """Of each flag in a text of help: whether it takes a value, its choices, whether it has help.

    What takes a value is told by argparse alone.
    """
    found = {}
    for negated, name, rest in FLAG.findall(text):
        choices = CHOICES.match(rest)
        words = rest.removeprefix(":")
        words = VALUE.sub("", CHOICES.sub("", words)).strip()
        found[f"--{name}"] = {
            "switch": bool(negated) or not (choices or VALUE.match(rest) or rest.startswith(":")),
            "choices": choices[1].split(",") if choices else [],
            "help": bool(words),
        }
    return found


def flags():
    """The flags of every command."""
    commands = ("experiments/main.py", *MODULES)
    return {command: flags_in(help_of(command)) for command in commands}


def fields(task):
    """The default and the type of each field of a configuration by its full name."""

    def walk(config, prefix):
        for name in config:
            kind = config.get_type(name).__name__
            if kind == "ConfigDict":
                yield from walk(config[name], f"{prefix}{name}.")
            else:
                value = config[name]
                value = list(value) if isinstance(value, tuple) else value
                yield f"{prefix}{name}", {"default": value, "type": kind}

    return dict(walk(dhp_config.default(task), ""))


# Networks


def fixed_input(shape):
    """Two examples of numbers in [-1, 1), all of which float32 holds exactly."""
    numbers = np.arange(2 * np.prod(shape)) * 2_654_435_761 % 2**32 // 2**12
    return ((numbers - 2**19) / 2**19).astype(np.float32).reshape(2, *shape)


def facts(model, shape):
    """What a network computes, costs and consists of."""
    cost = dhp.measure_cost(model, shape)
    latents = dhp.latents(model)
    found = {
        "input_shape": list(shape),
        "outputs": run(model, fixed_input(shape))[0].tolist(),
        "cost": {name: getattr(cost, name) for name in ("flops", "params", "activations")},
        "latents": {name: [z.size, z.prunable, z.min_channels] for name, z in latents.items()},
    }
    if latents:
        masks = dhp.survivors(model, 0.5)
        found["survivors"] = {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}
    return found
