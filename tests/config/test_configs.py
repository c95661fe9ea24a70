"""Every configuration in experiments/configs: two steps of each phase at a tiny width."""

import ast
import contextlib
from pathlib import Path
import runpy

from networks import short
import numpy as np
from PIL import Image
import pytest

import dhp_jax as dhp
from dhp_jax import config as dhp_config
from dhp_jax.config.methods import PHASES
from dhp_jax.pipeline.execution import execute
from dhp_jax.pipeline.preparation import prepare

CONFIGS = sorted((Path(__file__).parents[2] / "experiments/configs").glob("*.py"))
# As deep as they are, for their short networks would be the same as another's.
WHOLE = (
    *("resnet56", "resnet56_38", "resnet56_x2", "resnet110", "resnet164"),
    *("mobilenet_v1_x2", "mobilenet_v2_x2"),
)
SIZES = {"digits": 8, "cifar10": 32, "tiny_imagenet": 64}
SHORT = {
    "resnet": {"depth": 8},
    "vgg": {"depth": 11},
    "densenet": {"depth": 10, "growth": 4},
    "srresnet": {"blocks": 2},
    "edsr": {"blocks": 2, "width": 0.05},
    "dncnn": {"depth": 5},
    "unet": {"depth": 3},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random images: folders of 4 training and 2 test images of two labels, or of photographs."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)

    def draw(path, *shape):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)

    for size in (32, 64):
        for split, count in (("train", 2), ("test", 1)):
            for label in ("cat", "dog"):
                for i in range(count):
                    draw(root / f"{size}/{split}/{label}/{i}.png", size, size, 3)
    for i in range(2):
        draw(root / f"photographs/{i}.png", 40, 32, 3)
    return root


def tiny(path, folders):
    """A configuration as it is in its file, but for width, data and lengths."""
    config = runpy.run_path(str(path))["get_config"]()
    dhp_config.check(config)
    if config.task.name == "classification":
        size = SIZES[config.data.name]
        if size == 8:
            config.batch_size = 640  # of 1,297 digits
        else:
            config.data.update(name="image_folder", dir=str(folders / str(size)))
            config.batch_size = 2
    else:
        photographs = str(folders / "photographs")
        config.data.update(name="photo_folder", dir=photographs, test_dir=photographs)
        config.task.update(patch=16, steps_per_epoch=2)
        config.batch_size = 2
    config.model.update(width=0.1)
    if path.stem not in WHOLE:
        config.model.update(SHORT.get(config.model.name, {}))
    if config.model.name == "densenet":
        del config.model["width"]
    config.search.update(epochs=1, min_channels=1, learning_rate=1e-3)
    config.converge.update(epochs=1, learning_rate=1e-3)
    config.update(target=0.9, multiple_of=1)
    if config.model.get("weights"):
        config.search.epochs = 4  # a step for each part of its search
        config.model.weights = None
        plain = config.copy_and_resolve_references()
        plain.method = "baseline"
        trained = prepare(plain, folders / "trained").blueprint.ordinary()
        config.model.weights = str(folders / "trained/network")
        dhp.save(config.model.weights, trained)
    return config


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_searches_prunes_and_converges(path, folders, tmp_path):
    config = tiny(path, folders)
    with contextlib.nullcontext() if path.stem in WHOLE else short():
        summary = execute(prepare(config, tmp_path / "run"))
        model = dhp.load(tmp_path / "run" / "model")
    steps = {name: phase["steps"] for name, phase in summary["phases"].items()}
    assert steps == {"search": 2, "converge": 2}
    assert 0.5 < summary["flops"]["ratio"] <= 0.9
    assert dhp.latents(model) == {}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_drop_of_a_configuration_comes_before_the_end_of_its_phase(path):
    config = runpy.run_path(str(path))["get_config"]()
    for phase in PHASES:
        assert all(drop < config[phase].epochs for drop in config[phase].drops)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_says_what_it_is_after_and_how_to_run_it(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert "FLOPs" in text
    if not path.stem.startswith(("digits", "photographs")):
        assert f"--config=experiments/configs/{path.name}" in text
