"""The one program of `benchmarks/from_trained.py` computes what pruned networks compute."""

import argparse
import dataclasses
import functools
import importlib
import json
from pathlib import Path
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.state import path_name
from dhp_jax.core.surgery import prune as cut
from dhp_jax.pruned.fresh_weights import carry_kernels

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import from_trained
import from_trained_programs
import from_trained_rows

IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def net():
    return from_trained_programs.Network(8, jnp.float32)


@pytest.fixture(scope="module")
def arrays(net):
    """Weights and statistics of which none is at its initial value."""
    rng = np.random.default_rng(1)
    return {
        name: (x + rng.uniform(0.05, 0.3, x.shape)).astype(np.float32)
        for name, x in net.fresh(0).items()
    }


def test_the_trained_network_is_one_of_the_library():
    path = Path(from_trained.__file__).parent / "results" / "from_trained_resnet20.safetensors"
    assert path.stat().st_size < 2e6
    found = from_trained.stored(path)
    build = functools.partial(dhp.models.build, "resnet", depth=20)
    whole = nnx.eval_shape(lambda: dhp.prune(build(rngs=nnx.Rngs(0))))
    flat = nnx.to_flat_state(nnx.state(whole))
    expected = {path_name(path): v.get_value().shape for path, v in flat}
    assert {name: x.shape for name, x in found.items()} == expected
    assert all(np.isfinite(x).all() for x in found.values())


@pytest.fixture(scope="module")
def pruned(net, arrays):
    """A network that the library has pruned, and the masks of prunable latents."""
    model = nnx.clone(net.latents)
    carry_kernels(net.model(arrays), model)
    scores = dhp.random_scores(model, 3)
    masks = from_trained_rows.choose(net, scores, 0.4)
    whole = {name: np.ones(size, bool) for name, size in net.sizes.items()}
    return cut(model, whole | masks), masks


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_closed_gates_compute_what_the_pruned_network_computes(net, arrays, pruned, training):
    small, masks = nnx.clone(pruned[0]), pruned[1]
    gates = {name: jnp.asarray(mask, jnp.float32) for name, mask in masks.items()}
    gated = net.model({**arrays, **net.gated(arrays, gates)})
    for model in (small, gated):
        model.train() if training else model.eval()
    np.testing.assert_allclose(gated(IMAGES), small(IMAGES), rtol=1e-4, atol=1e-4)
    assert np.abs(gated(IMAGES) - net.model(arrays)(IMAGES)).max() > 0.01


@pytest.mark.slow
def test_what_is_left_gets_the_gradients_of_the_pruned_network(net, arrays, pruned):
    small, masks = nnx.clone(pruned[0]), pruned[1]
    gates = {name: jnp.asarray(mask, jnp.float32) for name, mask in masks.items()}
    weights = {name: x for name, x in arrays.items() if net.is_weight(name)}
    statistics = {name: x for name, x in arrays.items() if name not in weights}

    def of_gated(weights):
        model = net.model({**net.gated(weights, gates), **statistics})
        model.train()
        return jnp.mean(model(IMAGES) ** 2)

    small.train()
    wanted = nnx.grad(lambda model: jnp.mean(model(IMAGES) ** 2))(small)
    wanted = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(wanted)}
    got = jax.grad(of_gated)(weights)
    hidden, stage = masks["blocks.1.hidden.0"], masks["stages.1"]
    name = "blocks.1.layers.1.conv.kernel"
    cut = np.asarray(got[name])[:, :, hidden][..., stage]
    np.testing.assert_allclose(cut, wanted[name], rtol=2e-3, atol=1e-5)
    assert not np.asarray(got[name])[:, :, ~hidden].any()
    assert not np.asarray(got[name])[..., ~stage].any()


@pytest.mark.slow
def test_the_search_leaves_a_network_within_its_budget_whose_gates_are_closed(tmp_path, arrays):
    options = argparse.Namespace(out=tmp_path, minutes=1.0, data=None, rehearse=True, commit="")
    bench = from_trained_rows.Bench(options, from_trained_rows.REHEARSAL)
    net, bench.trained = bench.net, arrays
    way = dataclasses.replace(from_trained_rows.FADE, distillation=0.5)
    schedule = from_trained_rows.cosine(0.05, 9, 1)
    stream = bench.batches(0, schedule(np.arange(9)))
    run, mask = from_trained_rows.faded(bench, way, 0.5, schedule, stream)
    counts = net.sizes | {name: int(kept.sum()) for name, kept in mask.items()}
    assert 0.4 < net.cost.shares(counts)["flops"] <= 0.5
    closed = net.gated(run.weights, {name: jnp.asarray(kept) for name, kept in mask.items()})
    for name, weights in run.weights.items():
        np.testing.assert_array_equal(closed[name], weights)  # what is gone is zero already
        assert np.abs(np.asarray(weights) - arrays[name]).max() > 0, name
    assert len(list(stream)) == 2  # of 9 updates, 7 are the search's


@pytest.mark.slow
@pytest.mark.parametrize("throughout", [False, True])
def test_a_search_that_is_all_distillation_does_not_see_the_labels(tmp_path, arrays, throughout):
    found = []
    for shift in (0, 3):
        options = argparse.Namespace(out=tmp_path, minutes=1.0, data=None, rehearse=True, commit="")
        bench = from_trained_rows.Bench(options, from_trained_rows.REHEARSAL)
        images, labels = bench.train
        bench.train, bench.trained = (images, (labels + shift) % 10), arrays
        bench.programs = from_trained_programs.programs(bench.net, bench.train, bench.test, 8)
        begin = bench.begin(arrays)
        bench.teacher = begin.weights, begin.z, begin.statistics
        way = dataclasses.replace(
            from_trained_rows.FADE, distillation=1.0, throughout=throughout, stages=1, search=2
        )
        schedule = from_trained_rows.cosine(0.05, 9, 1)
        stream = bench.batches(0, schedule(np.arange(9)))
        run, _ = from_trained_rows.faded(bench, way, 0.5, schedule, stream)
        found.append(jax.tree.map(np.asarray, run.weights))
    same = [np.array_equal(*each) for each in zip(*map(jax.tree.leaves, found), strict=True)]
    assert all(same) is throughout


@pytest.mark.slow
def test_what_a_cpu_trains_after_a_cut_is_what_closed_gates_train(tmp_path, arrays):
    options = argparse.Namespace(out=tmp_path, minutes=1.0, data=None, rehearse=True, commit="")
    bench = from_trained_rows.Bench(options, from_trained_rows.REHEARSAL)
    masks = from_trained_rows.choose(bench.net, dhp.random_scores(bench.net.latents, 3), 0.4)
    way = dataclasses.replace(from_trained_rows.ONE["random"], distillation=0.5)
    found = []
    for each, run, mask in (
        (bench, bench.begin(arrays), masks),
        (*bench.cut_down(bench.begin(arrays), masks), {}),
    ):
        plan = each.plan(mask, way)
        for batches in each.batches(0, [0.05, 0.02, 0.01]):
            run, loss = each.step(run, plan, batches)
        found.append((float(loss), each.evaluate(run, plan.mask)["test_loss"]))
    np.testing.assert_allclose(*found, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_pytorch_carries_out_the_same_updates_after_a_cut(tmp_path, arrays, share):
    torch = pytest.importorskip("torch")
    torch_resnet = importlib.import_module("torch_resnet")
    options = argparse.Namespace(out=tmp_path, minutes=1.0, data=None, rehearse=True, commit="")
    bench = from_trained_rows.Bench(options, from_trained_rows.REHEARSAL)
    bench.trained = arrays
    begin = bench.begin(arrays)
    bench.teacher = begin.weights, begin.z, begin.statistics
    torch_resnet.check_same(torch, bench)
    masks = from_trained_rows.choose(bench.net, dhp.random_scores(bench.net.latents, 3), 0.4)
    small, run = bench.cut_down(begin, masks)
    plan = small.plan({}, dataclasses.replace(from_trained_rows.FADE, distillation=share))
    ours, theirs = (
        train(small, run, plan, small.batches(0, [0.05, 0.02, 0.01]), tmp_path / "state")
        for train in (from_trained_rows.trained, torch_resnet.trainer(torch, bfloat16=False).train)
    )
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3)
    for name, x in (ours[0].weights | ours[0].statistics).items():
        y = (theirs[0].weights | theirs[0].statistics)[name]
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-4, err_msg=name)


def test_a_row_that_does_not_exist_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["", "--rehearse", f"--out={tmp_path / 'new'}", "--ways", "l3"]
    )
    with pytest.raises(SystemExit):
        from_trained.main()
    assert "--ways: expected some of 'fade', 'l1', " in (told := capsys.readouterr().err)
    assert told.endswith("; got 'l3'\n")
    assert not (tmp_path / "new").exists()


def test_fresh_weights_have_the_widths_that_the_search_has_found(tmp_path, net):
    bench = argparse.Namespace(out=tmp_path, net=net)
    row = {"name": "fade", "target": 0.5, "seed": 1, "widths": {"stages.0": 5, "stages.1": 7}}
    (tmp_path / "rows.jsonl").write_text(f'{{"name": "begin"}}\n{json.dumps(row)}\n')
    found = from_trained_rows.cut(bench, from_trained_rows.FRESH[0], 0.5, 1)
    assert {name: int(mask.sum()) for name, mask in found.items()} == row["widths"]
    assert found["stages.0"].shape == (net.sizes["stages.0"],)
    with pytest.raises(ValueError, match=r"expected a row 'fade' at 0\.25 with seed 1"):
        from_trained_rows.cut(bench, from_trained_rows.FRESH[0], 0.25, 1)


def test_a_row_that_was_stopped_goes_on_where_it_was(tmp_path):
    taken = []

    def step(run, plan, batch):
        if batch in plan:
            raise KeyboardInterrupt
        taken.append(batch)
        return {"w": run["w"] * 0.9 + batch}, jnp.float32(batch)

    bench, kept = argparse.Namespace(step=step), tmp_path / "row.npz"
    begin, batches = {"w": jnp.ones(3)}, range(100)
    whole, loss = from_trained_rows.trained(bench, begin, (), iter(batches), tmp_path / "whole.npz")
    taken.clear()
    with pytest.raises(KeyboardInterrupt):
        from_trained_rows.trained(bench, begin, (90,), iter(batches), kept)
    again = from_trained_rows.trained(bench, begin, (), iter(batches), kept)
    np.testing.assert_array_equal(again[0]["w"], whole["w"])
    assert again[1] == loss == 99
    assert taken == [*range(90), *range(80, 100)]


def test_a_training_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(from_trained_rows, "SEGMENTS_KEPT", 1)
    taken = []

    def step(run, plan, rate):
        if stop and len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(rate)
        return {"w": run["w"] - rate}, jnp.float32(1)

    bench = argparse.Namespace(
        size=from_trained_rows.REHEARSAL,
        out=tmp_path,
        train=(None, range(64)),
        net=argparse.Namespace(full=lambda value: value),
        begin=lambda start: {"w": jnp.full(3, start)},
        plan=lambda mask: (),
        batches=lambda seed, rates: iter(np.asarray(rates)),
        step=step,
    )
    stop = True
    with pytest.raises(KeyboardInterrupt):
        from_trained_rows.train(bench, 5.0, 0.1, 0, 1)
    stop = False
    again = from_trained_rows.train(bench, 5.0, 0.1, 0, 1)
    assert len(taken) == 8
    np.testing.assert_allclose(again["w"], 5 - sum(taken), rtol=1e-6)


def test_generated_kernels_are_those_of_an_embedding_of_1(net, arrays):
    rng = np.random.default_rng(2)
    z = {name: jnp.asarray(rng.normal(size=net.sizes[name]), jnp.float32) for name in net.prunable}
    one, both = (net.gated(arrays, z, factor) for factor in (0.0, 1.0))
    name, hidden, stage = "blocks.0.layers.1.conv.kernel", "blocks.0.hidden.0", "stages.0"
    rows = arrays[name] * np.asarray(z[hidden])[:, None]
    np.testing.assert_allclose(one[name], rows, rtol=1e-6)
    np.testing.assert_allclose(both[name], rows * np.asarray(z[stage]), rtol=1e-5)


def test_every_way_is_within_its_budget(net, arrays):
    model = from_trained_programs.of_latents(net, arrays)
    for by, flops in [("l1", 0.5), ("group", 0.25), ("fpgm", 0.25)]:
        masks = from_trained_rows.choose(net, from_trained_rows.BY_WEIGHTS[by](model), flops)
        counts = net.sizes | {name: int(mask.sum()) for name, mask in masks.items()}
        assert 0.98 * flops < net.cost.shares(counts)["flops"] <= flops


def test_the_table_tells_means_ranges_and_paired_differences():
    same = {"target": 0.5, "params": 0.6, "after_cut": None, "way": {"fresh": False}}
    rows = [
        {"name": name, "seed": seed, "error": error, "updates": updates, **same}
        for name, updates, errors in (
            ("fade", 980, (8.0, 9.0)),
            ("l1", 980, (8.5, 10.0)),
            ("fade", 3920, (7.0,)),
        )
        for seed, error in enumerate(errors)
    ]
    lines = from_trained.tables([{"name": "begin"}, *rows]).splitlines()
    assert lines[0] == "## 50% of the FLOPs"
    assert lines[-3:] == [
        "| fade | 60% |  | 8.50 % (8.00 to 9.00) | +0.00 (+0.00 to +0.00) | 2 |",
        "| l1 | 60% |  | 9.25 % (8.50 to 10.00) | +0.75 (+0.50 to +1.00) | 2 |",
        "| fade, 3,920 updates | 60% |  | 7.00 % | -1.00 | 1 |",
    ]


def test_the_last_table_tells_commits_of_rows_of_one_kind_together():
    same = {"target": 0.5, "params": 0.6, "after_cut": None, "way": {"fresh": False}, "error": 8.0}
    same |= {"updates": 980}
    rows = [
        {"name": "fade", "seed": 0, "commit": "a1", **same},
        {"name": "fade", "seed": 1, "commit": "b2", "trained_by": "torch", **same},
        {"name": "fade", "seed": 2, "commit": "a1", **same},
        {"name": "l1", "seed": 0, "commit": "", **same},
    ]
    table = from_trained.tables(rows).split("## How rows were measured\n\n")[1]
    assert table.splitlines()[2:] == [
        "| fade | 50% | 0, 2 | the library, float32 | a1 |",
        "| fade | 50% | 1 | torch | b2 |",
    ]


@pytest.mark.parametrize(
    "page", ["from_trained", "from_trained_cpu", "from_trained_explored", "from_trained_searches"]
)
def test_a_page_has_the_table_of_its_rows(page):
    path = Path(from_trained.__file__).parent / "results" / page
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert from_trained.tables(rows) in path.with_suffix(".md").read_text()
