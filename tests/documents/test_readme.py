"""The README's code runs as printed and does what the text says."""

from pathlib import Path
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

import dhp_jax as dhp
from dhp_jax.budgets import before_and_after, latency

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_quick_start_prunes_a_network_of_the_reader_in_30_lines(in_tmp_path, capsys):
    code = next(block for block in BLOCKS if "class Net" in block)
    assert len(code.strip().splitlines()) <= 30
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    model, optimizer = names["model"], names["optimizer"]
    latents = {name: z.value() for name, z in dhp.latents(model).items()}
    still = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    optimizer.update(model, still)  # a step without a gradient: what moves is shrunk
    for name, z in dhp.latents(model).items():
        amount = 0.5 * 1e-3 if z.prunable else 0.0
        expected = np.sign(latents[name]) * np.maximum(np.abs(latents[name]) - amount, 0)
        np.testing.assert_allclose(z.value(), expected, atol=1e-7)
    small = names["small"]
    before, after = (dhp.measure_cost(network, (8, 8, 1)) for network in (model, small))
    assert 0.45 * before.flops < after.flops <= 0.5 * before.flops
    assert f"{before.flops:,} -> {after.flops:,}" in capsys.readouterr().out
    assert dhp.measure_cost(dhp.load("small", build=names["Net"]), (8, 8, 1)) == after
    assert not dhp.latents(small)


def test_the_network_that_a_reader_has_is_pruned_in_three_lines(in_tmp_path, capsys, monkeypatch):
    code = next(block for block in BLOCKS if "dhp.with_latents" in block)
    assert len(code.strip().splitlines()) <= 6  # with the import, the summary, and saving
    monkeypatch.setattr(latency, "ROUNDS", 3)
    monkeypatch.setattr(before_and_after, "time_other_widths", lambda *_: {})
    declared = dhp.models.build("vgg", depth=11, width=0.1, channels=1, rngs=nnx.Rngs(0))
    names = {"model": dhp.prune(declared)}
    exec(compile(code, "README.md", "exec"), names)
    before, after = (dhp.measure_cost(names[name], (8, 8, 1)) for name in ("model", "small"))
    assert 0.45 * before.flops < after.flops <= 0.5 * before.flops
    assert re.search(r"^time +\d\.\d\d of the time before", capsys.readouterr().out, re.M)
    assert type(names["small"]) is type(names["model"])
    loaded = dhp.load("small", build=lambda _: dhp.prune(declared))
    assert dhp.measure_cost(loaded, (8, 8, 1)) == after


def test_the_figures_of_that_network_are_those_of_the_guide():
    rows = re.findall(r"^\| (?:before|after) \| (\S+) \| (\S+) \| (\S+) % \|$", README, re.M)
    guide = (ROOT / "docs/any_network.md").read_text()
    costs = re.findall(r"^([\d,]+) FLOPs, ([\d,]+) params", guide, re.M)
    accuracies = re.findall(r"^(?:.* )?accuracy ([\d.]+)%$", guide, re.M)
    assert rows == [(*cost, share) for cost, share in zip(costs, accuracies, strict=True)]
    assert len(rows) == 2


def test_a_picture_is_wide_enough_to_be_read_and_no_taller_than_a_screen():
    pictures = re.findall(r"!\[[^]]+\]\((\S+\.png)\)", README)
    assert len(pictures) == 2
    for path in pictures:
        width, height = Image.open(ROOT / path).size
        assert 800 <= width <= 1280, path
        assert height <= 800, path
