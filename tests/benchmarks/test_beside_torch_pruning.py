"""What `benchmarks/beside_torch_pruning.py` cuts, tests and tells."""

import argparse
import json
from pathlib import Path
import sys

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import beside_torch_pruning as beside
import from_trained_programs
import from_trained_rows
import torch_resnet


def test_the_tables_tell_errors_budgets_and_times(tmp_path):
    about = {"date": "today", "command": "python", "commit": "abc", "hardware": "cpu"}
    rows = [{"name": "begin", "versions": {"torch": "2"}, **about}]
    rows += [
        {"name": name, "target": 0.25, "seed": seed, "error": error, "flops": flops}
        for name, found in (("group", [(18.0, 0.249)]), ("fade", [(16.0, 0.2), (17.0, 0.25)]))
        for seed, (error, flops) in enumerate(found)
    ]
    ms = {"ours": {"median": 1.5, "low": 1.0, "high": 2.0}}
    rows.append({"name": "forward pass", "share": 0.25, "batch": 4, "ms": ms})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.publish(argparse.Namespace(table=tmp_path / "rows.jsonl", out=tmp_path))
    lines = (tmp_path / f"{beside.NAME}.md").read_text().splitlines()
    assert "| 25% | group | 24.90 % | 18.00 % | 1 |" in lines
    expected = "| 25% | fade | 22.50 % (20.00 to 25.00) | 16.50 % (16.00 to 17.00) | 2 |"
    assert expected in lines
    assert "| 25% | 4 | ours | 1.50 (1.00 to 2.00) |" in lines
    assert json.loads((tmp_path / f"{beside.NAME}.json").read_text())["rows"] == rows


@pytest.mark.slow
@pytest.mark.parametrize("way", beside.COMPARED)
def test_what_torch_pruning_leaves_is_counted_and_tested_as_ours(tmp_path, way):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_pruning")
    options = argparse.Namespace(out=tmp_path, minutes=1.0, data=None, rehearse=True, commit="")
    bench = from_trained_rows.Bench(options, from_trained_rows.REHEARSAL)
    bench.trained = bench.net.fresh(0)
    whole = torch_resnet.network(torch, bench.trained)
    assert beside.widths(bench.net, whole) == bench.net.sizes
    full = bench.plan(bench.net.full(1)).mask
    ours = bench.evaluate(bench.begin(bench.trained), full)["error"]
    assert beside.torch_error(torch, torch.device("cpu"), bench, whole) == pytest.approx(ours)
    model, shares = beside.pruned_by_torch(torch, bench, 0.4, beside.COMPARED[way])
    assert 0.3 < shares["flops"] <= 0.4
    counts = beside.widths(bench.net, model)
    least = min(counts[name] / size for name, size in bench.net.sizes.items() if size > 10)
    assert least > 0.25 - 1 / 16 or "at most" not in way
    left, all_ = (flops_by_hand(torch, network) for network in (model, whole))
    assert left / all_ == pytest.approx(shares["flops"], rel=1e-6)


def flops_by_hand(torch, model):
    """For one image: multiplications of convolutions and linear layers, two a BatchNorm's pixel."""
    found = []

    def count(layer, inputs, output):
        pixels = output.numel() // output.shape[1]
        norm = isinstance(layer, torch.nn.BatchNorm2d)
        found.append(2 * output.numel() if norm else layer.weight.numel() * pixels)

    kinds = torch.nn.Conv2d | torch.nn.Linear | torch.nn.BatchNorm2d
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    model.eval()(torch.zeros(1, 3, *from_trained_programs.SHAPE[:2]))
    for hook in hooks:
        hook.remove()
    return sum(found)
