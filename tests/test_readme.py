"""The README's code runs as printed and does what the text says."""

from pathlib import Path
import re

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_quick_start_prunes_a_network_of_the_reader_in_30_lines(in_tmp_path, capsys):
    import dhp_jax as dhp

    code = next(block for block in BLOCKS if "class Net" in block)
    assert len(code.strip().splitlines()) <= 30
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    before, after, small = names["before"], names["after"], names["small"]
    assert 0.45 * before.flops < after.flops <= 0.5 * before.flops
    assert f"{before.flops:,} -> {after.flops:,}" in capsys.readouterr().out
    assert dhp.measure_cost(dhp.load("small", build=names["Net"]), (8, 8, 1)) == after
    assert not dhp.latents(small)


def test_the_lasso_equals_that_of_scikit_learn(capsys):
    code = next(block for block in BLOCKS if "Lasso" in block)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert abs(names["w"] - names["lasso"].coef_).max() < 1e-4
    assert (names["w"] == 0).sum() == (names["lasso"].coef_ == 0).sum() > 0
    assert "True" in capsys.readouterr().out
