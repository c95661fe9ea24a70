"""Baselines at equal cost: each runs to its end, keeps the budget, and starts from what it says."""

import functools
import itertools
import json
import re
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import (
    CONFIG,
    Interrupter,
    Stop,
    carry_out,
    check_same_end,
    description,
    leave_source,
    of_digits,
    summary_text,
)

import dhp_jax as dhp
from dhp_jax import config as dhp_config
from dhp_jax.budgets import latency
from dhp_jax.budgets.counted import survivors_within
from dhp_jax.config.methods import METHODS
from dhp_jax.core.latent import walk
from dhp_jax.core.provenance import architecture_of
from dhp_jax.data.labelled import digits
from dhp_jax.errors import ConfigError, NonFiniteError
from dhp_jax.pipeline import networks, phases, preparation, targets
from dhp_jax.pipeline.smaller import RunStart
from dhp_jax.pipeline.targets import execute
from dhp_jax.pipeline.training_batches import batches
from dhp_jax.pruned.gates import ungate
from dhp_jax.report import write as report_write
from dhp_jax.report.format import start_text
from dhp_jax.train.phase import Outcome, Progress
from dhp_jax.workdir import metrics as workdir_metrics
from dhp_jax.workdir import reader, source_run
from dhp_jax.workdir.identity import read_field
from dhp_jax.workdir.summary import beside

SHAPE = (8, 8, 1)
ARGUMENTS = {"depth": 8, "width": 0.25, "num_classes": 10, "channels": 1, "min_channels": 1}
OTHERS = ("uniform", "random", "l1_norm", "scratch")
BY_WEIGHTS = ("l2_norm", "group_norm", "norm_scale", "fpgm")


OF_SECONDS = [  # whole runs; those of the other methods take long to compile
    "l1_norm",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("uniform", "random", "scratch")),
]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """What is needed of a finished run of the unpruned network."""
    workdir = tmp_path_factory.mktemp("sources") / "run-baseline"
    leave_source(workdir, "baseline")
    return workdir


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What is needed of a finished run that has searched."""
    workdir = tmp_path_factory.mktemp("sources") / "run"
    leave_source(workdir, "dhp")
    return workdir


@pytest.fixture(scope="module")
def sources(baseline, found):
    """The run that each method starts from."""
    of_baseline = dict.fromkeys(("random", "l1_norm", "taylor", "fade", *BY_WEIGHTS), baseline)
    return {"uniform": None, "scratch": found} | of_baseline


@pytest.fixture(scope="module")
def finished_by(sources, tmp_path_factory):
    """The directory of a finished run by method."""
    folder = tmp_path_factory.mktemp("methods")

    @functools.cache
    def of(method):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report_write, "latency", lambda result: None)
            carry_out(folder / method, method=method, source=path(sources[method]))
        return folder / method

    return of


@pytest.fixture(scope="module")
def pruned(sources, finished_by, tmp_path_factory):
    """The directory of a run of each method that has come to its pruned network."""
    folder, runs = tmp_path_factory.mktemp("pruned"), {"l1_norm": finished_by("l1_norm")}
    for method in set(OTHERS) - set(runs):
        runs[method] = folder / method
        interrupter = Interrupter("converge", 0)
        with pytest.raises(Stop):
            carry_out(runs[method], [interrupter], method=method, source=path(sources[method]))
    return runs


def path(folder):
    return folder and str(folder)


def kernels(model):
    """The kernels of convolutions and linear layers by path."""
    layers = ((name, layer) for name, _, layer in walk(model))
    plain = nnx.Conv | nnx.Linear
    return {
        name: np.asarray(layer.kernel[...]) for name, layer in layers if isinstance(layer, plain)
    }


def survivors(workdir):
    return description(workdir / "pruned")["survivors"]


def masks(workdir, whole):
    """The survivors of a run as masks for a network of latents."""
    kept = survivors(workdir)
    return {n: np.isin(np.arange(z.size), kept[n]) for n, z in dhp.latents(whole).items()}


@pytest.mark.parametrize("method", OTHERS)
def test_each_method_keeps_the_budget(pruned, method):
    cost = dhp.measure_cost(dhp.models.build_abstract("resnet", **ARGUMENTS), SHAPE)
    left = dhp.measure_cost(dhp.load(pruned[method] / "pruned"), SHAPE).flops / cost.flops
    assert 0.49 < left <= 0.5
    noted = description(pruned[method] / "pruned")["notes"]
    assert ("renewed" in noted) is (method in ("random", "l1_norm"))
    assert noted["budget"]["predicted"]["flops"] == left
    assert ("test" in noted) is not METHODS[method].fresh


@pytest.mark.parametrize("method", OF_SECONDS)
def test_each_method_runs_to_its_end(finished_by, method):
    workdir = finished_by(method)
    summary = json.loads((workdir / reader.SUMMARY).read_text())
    assert summary["method"] == method
    assert 0.49 < summary["flops"]["ratio"] <= 0.5
    assert list(summary["phases"]) == ["converge"]
    renewed = method in ("random", "l1_norm")
    assert ("renewed" in summary["test"]) is renewed
    assert ("with renewed statistics" in (workdir / "report.html").read_text()) is renewed
    assert ("with renewed statistics" in summary_text(summary)) is renewed
    assert summary["phases"]["converge"]["epochs"] == 1
    assert {r["phase"] for r in workdir_metrics.read(workdir / workdir_metrics.RECORDS)} == {
        "converge"
    }
    networks = sorted(folder.parent.name for folder in workdir.glob("*/model.json"))
    assert networks == ["best", "model", "pruned"]
    assert description(workdir / "model")["survivors"] == survivors(workdir)


@pytest.mark.parametrize("method", ["random", "l1_norm"])
def test_the_weights_that_go_on_are_those_of_the_trained_network_bit_for_bit(
    pruned, baseline, method
):
    trained, small = dhp.load(baseline / "model"), dhp.load(pruned[method] / "pruned")
    kept = survivors(pruned[method])
    before, after = kernels(trained), kernels(small)
    name, inside = "blocks.1.layers.0.conv", "blocks.1.hidden.0"
    rows, columns = kept["stages.0"], kept[inside]
    assert len(columns) < trained.blocks[1].layers[0].conv.out_features
    assert np.array_equal(after[name], before[name][:, :, rows][..., columns])
    norm, whole = (model.blocks[1].layers[0].norm for model in (small, trained))
    for stored in ("scale", "bias"):
        value, full = (np.asarray(getattr(layer, stored)[...]) for layer in (norm, whole))
        assert np.array_equal(value, full[columns]), stored
    assert (
        description(pruned[method] / "pruned")["notes"]["made_from"]
        == (description(baseline / "model")["sha256"])
    )


def test_what_survives_by_norm_are_the_largest_filters_of_the_trained_network(pruned, baseline):
    trained, kept = dhp.load(baseline / "model"), survivors(pruned["l1_norm"])
    for number, block in enumerate(trained.blocks):
        kernel = np.abs(np.asarray(block.layers[0].conv.kernel[...], np.float64))
        order = np.argsort(-kernel.sum((0, 1, 2)))
        indices = kept[f"blocks.{number}.hidden.0"]
        assert sorted(indices) == sorted(order[: len(indices)])
    assert kept != survivors(pruned["random"])


def test_a_test_right_after_the_cut_that_is_not_finite_is_told(baseline, tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "evaluate", lambda *_, **__: {"loss": float("inf"), "error": 0.9})
    run = prepare(tmp_path / "run", method="l1_norm", source=str(baseline))
    work, began = phases.Work(run, lambda: False, run.setup.read), source_run.read(run.config)
    with pytest.raises(NonFiniteError, match=r"^converge: the test loss right after pruning is"):
        phases.prune_to_budget(work, began.sha256)
    assert not (tmp_path / "run/pruned").exists()


def test_statistics_are_renewed_on_training_data_after_the_cut(pruned):
    workdir = pruned["random"]
    run = prepare(workdir, method="random", source=read_field(workdir, "source"))
    small = dhp.load(workdir / "pruned")
    found = [(n.mean[...], n.var[...]) for _, n in nnx.iter_modules(small) if is_norm(n)]
    images = [inputs for inputs, _ in batches(run, run.setup.read("train"), 10**6)]
    assert len(images) == run.setup.epoch // run.config.batch_size
    dhp.renew_statistics(small, images)
    again = [(n.mean[...], n.var[...]) for _, n in nnx.iter_modules(small) if is_norm(n)]
    for one, other in zip(found, again, strict=True):
        for stored, expected in zip(one, other, strict=True):
            np.testing.assert_allclose(stored, expected, rtol=1e-5)
    noted = description(workdir / "pruned")["notes"]
    assert noted["renewed"]["loss"] < noted["test"]["loss"]


def is_norm(layer):
    return isinstance(layer, nnx.BatchNorm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "per_flop"), [("taylor", 0.0), ("taylor", 1.0), ("taylor_magnitude", 0.0)]
)
def test_taylor_keeps_what_costs_the_loss_most(sources, baseline, tmp_path, method, per_flop):
    given = {"method": method, "source": path(baseline), "per_flop": per_flop}
    with pytest.raises(Stop):
        carry_out(tmp_path / "run", [Interrupter("converge", 0)], **given)
    run = prepare(tmp_path / "run", **given)
    model = dhp.with_latents(dhp.load(baseline / "model"), rngs=nnx.Rngs(0))
    model.train()

    def loss(network, batch):
        logits = jax.nn.log_softmax(network(batch[0]))
        return -logits[jnp.arange(len(logits)), batch[1]].mean()

    images = batches(run, run.setup.read("train"), 2048)
    scores = dhp.taylor_scores(model, loss, images, squared=method == "taylor")
    scores = dhp.per_cost(scores, dhp.measure_cost(model, SHAPE), power=per_flop)
    kept = architecture_of(dhp.prune_to(model, SHAPE, flops=0.5, by=scores)).survivors
    assert survivors(tmp_path / "run") == {name: list(found) for name, found in kept.items()}


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
def test_a_network_that_learns_from_its_source_ends_with_the_same_bits_without_it(
    sources, baseline, tmp_path
):
    source = shutil.copytree(baseline, tmp_path / "baseline")
    given = {"method": "l1_norm", "checkpoint.seconds": 0, "optimizer.average": 0.9}
    given |= {"converge.distillation.weight": 0.5, "converge.distillation.temperature": 2.0}
    carry_out(tmp_path / "whole", source=path(source), **given)
    with pytest.raises(Stop):
        carry_out(tmp_path / "run", [Interrupter("converge", 8)], source=path(source), **given)
    shutil.rmtree(source)
    carry_out(tmp_path / "run", source=path(source), **given)
    check_same_end(tmp_path / "run", tmp_path / "whole")
    digests = [description(run)["sha256"] for run in (tmp_path / "run/teacher", baseline / "model")]
    assert digests[0] == digests[1]


SCORES = {"l2_norm": dhp.l2_scores, "group_norm": dhp.group_scores}
SCORES |= {"norm_scale": dhp.scale_scores, "fpgm": dhp.fpgm_scores}


@pytest.mark.parametrize(
    "method", ["l2_norm", *(pytest.param(name, marks=pytest.mark.slow) for name in BY_WEIGHTS[1:])]
)
def test_methods_by_weights_keep_what_their_criterion_says(sources, baseline, tmp_path, method):
    run = prepare(tmp_path / "run", method=method, source=path(sources[method]))
    small, *_ = METHODS[method].smaller(RunStart(run, run.setup.read))
    model = dhp.with_latents(dhp.load(baseline / "model"), rngs=nnx.Rngs(0))
    expected = dhp.prune_to(model, SHAPE, flops=0.5, by=SCORES[method](model))
    assert architecture_of(small).survivors == architecture_of(expected).survivors


@pytest.fixture(scope="module")
def faded(sources, tmp_path_factory):
    """The directory of a run whose search has begun with trained weights."""
    workdir = tmp_path_factory.mktemp("faded") / "run"
    fields = {"search.threshold": 2.0}  # has no effect
    carry_out(workdir, method="fade", source=path(sources["fade"]), **fields)
    return workdir


@pytest.mark.slow
def test_a_search_from_trained_weights_meets_its_budget_and_its_cut_loses_nothing(faded, baseline):
    summary = json.loads((faded / reader.SUMMARY).read_text())
    assert list(summary["phases"]) == ["search", "converge"]
    assert 0.45 < summary["flops"]["ratio"] <= 0.5
    searched, cut = description(faded / "search"), description(faded / "pruned")
    assert searched["notes"]["made_from"] == description(baseline / "model")["sha256"]
    assert searched["notes"]["phase"]["met_budget"]
    assert cut["notes"]["made_from"] == searched["sha256"]
    model = dhp.load(faded / "search")
    values = np.concatenate([z.value() for z in dhp.latents(model).values()])
    assert set(values.tolist()) == {0.0, 1.0}
    small = dhp.load(faded / "pruned")
    for network in (model, small):
        network.eval()
    images = np.random.default_rng(0).normal(size=(16, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(small(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_statistics_are_renewed_where_a_search_as_in_the_paper_begins_with_trained_weights(
    baseline, tmp_path, given
):
    weights = str(baseline / "model") if given else None
    run = prepare(tmp_path / "run", **{"model.weights": weights})
    searched = run.blueprint.build()
    digest = networks.save(run, "search", searched, made_from="")
    phases.prune_to_budget(phases.Work(run, lambda: False, run.setup.read), digest)
    noted = description(run.workdir / "pruned")["notes"]
    assert ("renewed" in noted) is given
    if given:
        assert noted["renewed"]["loss"] < noted["test"]["loss"]


@pytest.mark.parametrize("multiple_of", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_statistics_are_renewed_where_a_cut_takes_more_than_has_faded(
    baseline, tmp_path, multiple_of
):
    fields = {"method": "fade", "source": str(baseline), "multiple_of": multiple_of}
    run = prepare(tmp_path / "run", **fields)
    trained = dhp.load(baseline / "model")
    net = run.blueprint.gated(trained)
    scores = dhp.random_scores(net, 0)
    kept = survivors_within(net, run.cost, scores=scores, flops=0.5)
    assert any(mask.sum() % 2 for mask in kept.values())
    for name, z in dhp.latents(net).items():
        z.vector.set_value(jnp.asarray(kept[name], jnp.float32))
    searched = ungate(net, run.blueprint.build())
    digest = networks.save(run, "search", searched, made_from=source_run.read(run.config).sha256)
    phases.prune_to_budget(phases.Work(run, lambda: False, run.setup.read), digest)
    small = dhp.load(run.workdir / "pruned")
    assert ("renewed" in description(run.workdir / "pruned")["notes"]) is (multiple_of == 2)
    widths = [layer.out_features for _, layer in nnx.iter_modules(small) if is_conv(layer)]
    assert any(width % 2 for width in widths) is (multiple_of == 1)
    means = [np.asarray(n.mean[...]) for _, n in nnx.iter_modules(small) if is_norm(n)]
    before = [np.asarray(n.mean[...]) for _, n in nnx.iter_modules(trained) if is_norm(n)]
    same = [np.isin(one, other).all() for one, other in zip(means, before, strict=True)]
    assert all(same) is (multiple_of == 1)


def is_conv(layer):
    return isinstance(layer, nnx.Conv)


def test_a_search_from_trained_weights_has_the_dtype_and_the_floors_of_its_own_run(
    baseline, tmp_path
):
    fields = {"dtype": "bfloat16", "search.min_channels": 2, "search.keep": 0.5}
    run = prepare(tmp_path / "run", method="fade", source=str(baseline), **fields)
    trained = dhp.load(baseline / "model")
    net, before = run.blueprint.gated(trained), kernels(trained)
    floors = {z.min_channels / z.size for z in dhp.latents(net).values() if z.prunable}
    assert floors == {0.5}
    convolutions = [(name, layer) for name, _, layer in walk(net) if name.endswith(".conv")]
    assert len(convolutions) == 9
    for name, layer in convolutions:
        assert layer.dtype == jnp.bfloat16
        np.testing.assert_array_equal(layer.kernel(), before[name])


@pytest.mark.slow
def test_a_search_from_trained_weights_ends_with_multiples(sources, tmp_path):
    fields = {"method": "fade", "source": path(sources["fade"]), "multiple_of": 2}
    with pytest.raises(Stop):
        carry_out(tmp_path, [Interrupter("converge", 0)], **fields)
    searched, cut = dhp.load(tmp_path / "search"), description(tmp_path / "pruned")
    for name, z in dhp.latents(searched).items():
        open_ = int((z.value() != 0).sum())
        assert open_ == len(cut["survivors"][name])
        assert open_ == z.size or open_ % 2 == 0
    assert "renewed" not in cut["notes"]
    assert cut["notes"]["budget"]["predicted"]["flops"] <= 0.5


@pytest.mark.slow
def test_what_has_not_faded_when_a_search_ends_is_zero(sources, monkeypatch, tmp_path):
    def too_slow(*arguments, steps, **others):
        return dhp.fade_to_budget(*arguments, steps=2 * steps, **others)

    monkeypatch.setattr(phases, "fade_to_budget", too_slow)
    fields = {"method": "fade", "source": path(sources["fade"]), "search.max_steps": 20}
    with pytest.raises(Stop):
        carry_out(tmp_path, [Interrupter("converge", 0)], **fields)
    searched = dhp.load(tmp_path / "search")
    values = np.concatenate([z.value() for z in dhp.latents(searched).values()])
    assert set(values.tolist()) == {0.0, 1.0}


def test_a_search_from_trained_weights_wants_a_step_for_each_of_its_parts(sources, tmp_path):
    fields = {"method": "fade", "source": path(sources["fade"]), "search.max_steps": 6}
    message = r"^config.search.max_steps: expected more than 6 steps .*fade; got 6, which is 6$"
    with pytest.raises(ConfigError, match=message):
        carry_out(tmp_path / "run", **fields)


@pytest.mark.slow
def test_a_search_from_trained_weights_that_is_stopped_ends_with_the_same_bits(
    faded, sources, tmp_path
):
    fields = {"method": "fade", "source": path(sources["fade"]), "checkpoint.seconds": 0}
    fields["search.threshold"] = 2.0  # as there
    for phase, step in (("search", 25), ("converge", 3)):
        with pytest.raises(Stop):
            carry_out(tmp_path / "run", [Interrupter(phase, step)], **fields)
    carry_out(tmp_path / "run", **fields)
    check_same_end(tmp_path / "run", faded)


def test_the_network_of_scratch_is_the_one_that_was_found_with_other_weights(pruned, found):
    assert survivors(pruned["scratch"]) == survivors(found)
    folders = found, pruned["scratch"]
    searched, fresh = (kernels(dhp.load(folder / "pruned")) for folder in folders)
    assert searched.keys() == fresh.keys()
    for name, kernel in fresh.items():
        assert kernel.shape == searched[name].shape
        assert not np.array_equal(kernel, searched[name])


def test_scratch_takes_what_a_search_from_trained_weights_has_found(found, tmp_path):
    source = shutil.copytree(found, tmp_path / "faded")
    as_found = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(as_found | {"method": "fade"}))
    workdir = tmp_path / "run"
    fields = {"method": "scratch", "source": str(source)}
    with pytest.raises(Stop):
        carry_out(workdir, [Interrupter("converge", 0)], **fields)
    assert survivors(workdir) == survivors(found)
    assert description(workdir / "pruned")["notes"]["origin"]["method"] == "fade"


@pytest.mark.parametrize("method", ["uniform", "scratch"])
def test_fresh_weights_are_drawn_as_those_of_a_baseline(pruned, method):
    fresh = dhp.load(pruned[method] / "pruned")
    drawn = kernels(fresh)
    scaled = [k.ravel() * np.sqrt(np.prod(k.shape[:-1]) / 2) for k in drawn.values()]
    scaled = np.concatenate(scaled)  # of variance 1, cut off at two deviations before scaling
    assert np.std(scaled) == pytest.approx(1, abs=0.03)
    assert np.abs(scaled).max() == pytest.approx(2 / 0.8796, abs=0.01)
    norms = [layer for _, _, layer in walk(fresh) if isinstance(layer, nnx.BatchNorm)]
    for norm in norms:
        for name, value in (("scale", 1), ("bias", 0), ("mean", 0), ("var", 1)):
            assert np.all(np.asarray(getattr(norm, name)[...]) == value)


@pytest.mark.slow
def test_gradient_keeps_the_channels_whose_latents_the_loss_is_most_sensitive_to(tmp_path):
    whole = {"batch_size": 1297, "search.batches": 1, "data.crop_padding": 0}
    with pytest.raises(Stop):  # all images are one batch, so their order does not matter
        carry_out(tmp_path, [Interrupter("converge", 0)], method="gradient", **whole)
    images, labels = digits.load().read("train")
    images = (images - images.mean()) / images.std()
    model = dhp.models.build("resnet", **ARGUMENTS, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    @jax.grad
    def gradient(state):
        scores = nnx.merge(graphdef, state, copy=True)(jnp.asarray(images, jnp.float32))
        return -jnp.mean(nnx.log_softmax(scores)[np.arange(1297), labels])

    slopes = dhp.latents(nnx.merge(graphdef, jax.jit(gradient)(state)))
    by = {name: np.abs(z.value()) for name, z in slopes.items() if z.prunable}
    small = dhp.prune_to(model, SHAPE, flops=0.5, by=by)
    kept = architecture_of(small).survivors
    assert survivors(tmp_path) == {name: list(indices) for name, indices in kept.items()}
    noted = description(tmp_path / "pruned")["notes"]
    assert noted["budget"]["predicted"]["flops"] <= 0.5
    assert "test" not in noted


def test_uniform_widths_are_one_share_to_within_a_channel(pruned):
    whole = dhp.models.build_abstract("resnet", **ARGUMENTS)
    bounds = [
        ((mask.sum() - 1) / z.size, (mask.sum() + 1) / z.size)
        for (_, z), mask in zip(
            dhp.latents(whole).items(), masks(pruned["uniform"], whole).values(), strict=True
        )
        if z.prunable
    ]
    assert max(low for low, _ in bounds) < min(high for _, high in bounds)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("random", "the weights of run-baseline, trained for 1 epoch, 20 updates"),
        ("l1_norm", "the weights of run-baseline, trained for 1 epoch, 20 updates"),
        (
            "scratch",
            "the channels kept by run, a search of 1 epoch, 20 updates; fresh weights",
        ),
        ("uniform", "fresh weights"),
    ],
)
def test_what_a_run_started_from_is_told(pruned, method, told):
    origin = reader.read(pruned[method]).origin
    assert start_text({"method": method, "origin": origin, "model": {}}) == told
    if method != "uniform":
        phase = "search" if method == "scratch" else "baseline"
        assert (origin["method"], origin["phase"]) == (METHODS[method].source, phase)


@pytest.mark.parametrize("method", OF_SECONDS)
def test_the_page_of_a_method_has_no_search_and_does_not_call_it_dhp(finished_by, method):
    workdir = finished_by(method)
    page = (workdir / report_write.PAGE).read_text()
    before, after = METHODS[method].lead.split("{left}")
    assert re.search(rf"{before}[\d.]+ % of the FLOPs and [\d.]+ % of the params{after}: ", page)
    assert "Channels kept" in page
    for absent in ("How the latents died", "while searching", "after the search", "DHP"):
        assert absent not in page
    plots = {plot.name for plot in (workdir / report_write.PLOTS).iterdir()}
    assert plots == {"channels.png", "error.png", "loss.png"}
    summary = json.loads((workdir / reader.SUMMARY).read_text())
    assert f"Trained from {start_text(summary)}." in page
    assert start_text(summary) in " ".join(summary_text(summary).split())


def test_the_unpruned_network_is_looked_for_in_the_source_of_a_run_or_beside_it(
    tmp_path, monkeypatch
):
    for method, workdir in (("dhp", "runs/x"), ("uniform", "runs/x-uniform")):
        config = {"method": method, "source": None}
        assert beside(workdir, config) == "runs/x-baseline"
        assert beside(f"{workdir}/0.5", config) == "runs/x-baseline"
    monkeypatch.setenv("HOME", str(tmp_path))
    config = {"method": "random", "source": "~/trained"}
    assert beside("runs/x-random", config) == "runs/x-baseline"
    (tmp_path / "trained").mkdir()
    assert beside("runs/x-random", config) == str(tmp_path / "trained")


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
def test_a_run_by_norm_that_died_in_converge_ends_with_the_same_bits(
    finished_by, sources, tmp_path
):
    fields = {"method": "l1_norm", "source": path(sources["l1_norm"]), "checkpoint.seconds": 0}
    with pytest.raises(Stop):
        carry_out(tmp_path / "run", [Interrupter("converge", 7)], **fields)
    assert not (tmp_path / "run/model").exists()
    carry_out(tmp_path / "run", **fields)
    check_same_end(tmp_path / "run", finished_by("l1_norm"))


@pytest.mark.slow
@pytest.mark.usefixtures("without_pages")
def test_a_network_whose_description_is_damaged_is_made_again_with_the_same_bits(
    finished_by, sources, tmp_path
):
    workdir = shutil.copytree(finished_by("l1_norm"), tmp_path / "run")
    text = workdir / "pruned/model.json"
    text.write_bytes(text.read_bytes()[:-100])
    carry_out(workdir, method="l1_norm", source=path(sources["l1_norm"]))
    check_same_end(workdir, finished_by("l1_norm"))


@pytest.mark.slow
def test_a_run_that_has_taken_its_network_goes_on_without_its_source(
    finished_by, baseline, tmp_path
):
    source = shutil.copytree(baseline, tmp_path / "source")
    fields = {"method": "l1_norm", "source": str(source)}
    with pytest.raises(Stop):
        carry_out(tmp_path / "run", [Interrupter("converge", 0)], **fields)
    settings = json.loads((source / "config.json").read_text())
    settings["baseline"]["epochs"] = 2  # no longer finished
    (source / "config.json").write_text(json.dumps(settings))
    prepare(tmp_path / "run", **fields)
    shutil.rmtree(source)
    carry_out(tmp_path / "run", **fields)
    expected = finished_by("l1_norm")
    for name in ("pruned", "model"):
        digests = {description(run / name)["sha256"] for run in (tmp_path / "run", expected)}
        assert len(digests) == 1, name
    (tmp_path / "run/pruned/model.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^config.source: expected the directory of a finished"):
        prepare(tmp_path / "run", **fields)


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
@pytest.mark.parametrize("method", OTHERS)
def test_a_damaged_network_just_after_pruning_is_made_again_with_the_same_bits(
    finished_by, sources, tmp_path, method
):
    workdir = shutil.copytree(finished_by(method), tmp_path / "run")
    arrays = workdir / "pruned/arrays.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-100])
    carry_out(workdir, method=method, source=path(sources[method]))
    check_same_end(workdir, finished_by(method))


@pytest.mark.slow
def test_several_targets_of_a_method_are_a_run_each(tmp_path):
    config = of_digits(method="uniform", targets=(0.8, 0.5))
    runs = targets.prepare(config, tmp_path)
    execute(runs, tmp_path)
    left = [json.loads((run.workdir / reader.SUMMARY).read_text())["flops"] for run in runs]
    assert 0.75 < left[0]["ratio"] <= 0.8
    assert 0.45 < left[1]["ratio"] <= 0.5


# Sources that do not suit


def prepare(workdir, **fields):
    return preparation.prepare(of_digits(**fields), workdir)


def refusal(tmp_path, **fields):
    """The one line that a run is refused with, before its directory is made."""
    with pytest.raises(ConfigError) as caught:
        prepare(tmp_path / "refused", **fields)
    assert not (tmp_path / "refused").exists()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "needed"),
    [("random", "baseline"), ("l1_norm", "baseline"), ("scratch", "dhp or fade")],
)
def test_a_method_that_starts_from_a_run_is_refused_without_one(
    tmp_path, sources, found, baseline, method, needed
):
    expected = (
        f"config.source: expected the directory of a finished run with config.method={needed}, "
        f"for config.method={method}; "
    )
    told = f"{expected}got None"
    if needed == "baseline":
        told = told.replace(", for", ", or config.model.weights in its place, for")
    assert refusal(tmp_path, method=method) == told
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        told = refusal(tmp_path, method=method, source=str(tmp_path / folder))
        assert told.startswith(f"{expected}got '{tmp_path / folder}' (")
    other = found if needed == "baseline" else baseline
    told = refusal(tmp_path, method=method, source=str(other))
    has = "dhp" if needed == "baseline" else "baseline"
    assert told == f"{expected}that in '{other}' has config.method={has}"
    for lost in ("model", "model/arrays.safetensors"):
        copy = shutil.copytree(sources[method], tmp_path / f"without-{lost.count('/')}")
        shutil.rmtree(copy / lost) if (copy / lost).is_dir() else (copy / lost).unlink()
        told = refusal(tmp_path, method=method, source=str(copy))
        assert told == f"{expected}that in '{copy}' is not finished"


@pytest.mark.parametrize("method", ["dhp", "baseline", "uniform"])
def test_a_method_that_starts_from_no_run_is_refused_one(tmp_path, method):
    told = refusal(tmp_path, method=method, source=".")
    assert told == (
        f"config.source: expected None, for config.method={method} starts from no other run; "
        "got '.'"
    )


@pytest.mark.parametrize(
    ("method", "field", "value", "there"),
    [
        ("l1_norm", "model.width", 0.5, "0.25"),
        ("random", "model.depth", 32, "8"),
        ("random", "data.flip", True, "None"),
        ("scratch", "model.width", 0.5, "0.25"),
        ("scratch", "target", 0.4, "0.5"),
        ("scratch", "budget.params", 0.9, "None"),
        ("scratch", "multiple_of", 2, "1"),
        ("scratch", "search.min_channels", 2, "1"),
    ],
)
def test_a_source_of_another_kind_is_refused(tmp_path, sources, method, field, value, there):
    source = str(sources[method])
    told = refusal(tmp_path, method=method, source=source, **{field: value})
    assert told == (
        f"config.source: expected a run with config.{field}={value!r}, as here; "
        f"that in {source!r} has {there}"
    )


def changed(tmp_path, source, file, change):
    """A copy of a run with another value in one of its JSON files."""
    copy = shutil.copytree(source, tmp_path / "changed")
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    return str(copy)


def test_a_source_may_have_had_another_recipe(tmp_path, baseline):
    recipe = {"task.label_smoothing": 0.1, "data.cutout": 2, "data.mixup": 0.2}
    recipe |= {"optimizer.name": "adamw", "converge.schedule": "cosine"}
    run = prepare(tmp_path / "run", method="l1_norm", source=str(baseline), **recipe)
    assert run.setup.task.label_smoothing == 0.1
    assert (run.setup.task.cutout, run.setup.task.mixup) == (2, 0.2)


def test_a_source_that_was_given_more_epochs_is_not_finished(tmp_path, baseline):
    copy = changed(tmp_path, baseline, "config.json", lambda c: c["baseline"].update(epochs=2))
    assert refusal(tmp_path, method="random", source=copy).endswith(" is not finished")


def test_a_source_on_other_images_is_refused(tmp_path, baseline):
    copy = changed(tmp_path, baseline, "data.json", lambda d: d["checksums"].update(train=1))
    told = refusal(tmp_path, method="l1_norm", source=copy)
    assert told.startswith("config.source: expected a run on the same images; that in ")


def test_a_source_without_a_note_of_its_data_is_refused(tmp_path, baseline):
    copy = shutil.copytree(baseline, tmp_path / "without")
    (copy / "data.json").unlink()
    told = refusal(tmp_path, method="l1_norm", source=str(copy))
    assert told.startswith("config.source: expected the directory of a finished run with ")
    assert "data.json" in told


@pytest.mark.parametrize(
    ("method", "name", "value", "expected"),
    [("l1_norm", "width", 0.5, "0.25"), ("scratch", "family", "vgg", "'resnet'")],
)
def test_a_source_of_another_network_than_it_says_is_refused(
    tmp_path, sources, method, name, value, expected
):
    def change(content):
        (content if name == "family" else content["arguments"])[name] = value

    file = f"{METHODS[METHODS[method].source].network}/model.json"
    copy = changed(tmp_path, sources[method], file, change)
    told = refusal(tmp_path, method=method, source=copy)
    assert told.startswith(f"config.source: expected a network of {name}={expected}, as here; ")


def test_a_method_that_takes_the_channels_of_a_run_takes_no_targets(tmp_path, found):
    config = of_digits(method="scratch", source=str(found), targets=(0.8, 0.5))
    with pytest.raises(ConfigError) as caught:
        targets.prepare(config, tmp_path / "refused")
    assert str(caught.value) == (
        "config.targets: expected None with config.method='scratch', whose source has a single "
        "target; got (0.8, 0.5)"
    )


def test_nothing_is_measured_where_nothing_is_chosen(tmp_path, found, monkeypatch):
    source = changed(tmp_path, found, "config.json", lambda c: c["budget"].update(latency=0.01))
    monkeypatch.setattr(latency, "clock", None)
    prepare(tmp_path / "run", method="scratch", source=source, **{"budget.latency": 0.01})


@pytest.mark.parametrize(("name", "told"), [("0.5", "run/0.5"), ("other", "other")])
def test_a_source_of_several_sizes_is_told_with_its_run(tmp_path, found, name, told):
    there = shutil.copytree(found, tmp_path / "run" / name)
    assert source_run.read(of_digits(method="scratch", source=str(there))).origin["run"] == told


def test_a_source_that_is_damaged_is_refused(tmp_path, baseline):
    copy = shutil.copytree(baseline, tmp_path / "damaged")
    arrays = copy / "model/arrays.safetensors"
    content = bytearray(arrays.read_bytes())
    content[-1] ^= 1
    arrays.write_bytes(content)
    told = refusal(tmp_path, method="random", source=str(copy))
    assert "is not what was saved" in told


def test_a_run_that_has_begun_keeps_its_source_which_may_move(tmp_path, pruned, baseline):
    workdir = shutil.copytree(pruned["l1_norm"], tmp_path / "run")
    moved, another = (shutil.copytree(baseline, tmp_path / name) for name in ("moved", "another"))
    prepare(workdir, method="l1_norm", source=str(moved))
    trained_further(another)
    with pytest.raises(ConfigError, match=r"^config.source: expected the network that the run in"):
        prepare(workdir, method="l1_norm", source=str(another))


@pytest.mark.parametrize("field", ["config.source", "config.model.weights"])
def test_a_run_that_is_within_its_first_phase_is_refused_other_weights(tmp_path, baseline, field):
    source, fields = shutil.copytree(baseline, tmp_path / "source"), {"method": "fade"}
    config = of_digits(**fields, source=None if field.endswith("weights") else str(source))
    if field.endswith("weights"):
        config.model.weights = str(source / "model")
    preparation.prepare(config, tmp_path / "run")
    (tmp_path / "run/checkpoints/search/7").mkdir(parents=True)
    trained_further(source)
    with pytest.raises(ConfigError, match=rf"^{field}: expected the network that the run in "):
        preparation.prepare(config, tmp_path / "run")


@pytest.mark.slow
def test_a_search_that_has_ended_needs_its_source_no_more(tmp_path, baseline, monkeypatch):
    source = shutil.copytree(baseline, tmp_path / "source")
    run = prepare(tmp_path / "run", method="fade", source=str(source))
    digest = description(source / "model")["sha256"]
    work = phases.Work(run, lambda: False, run.setup.read)
    monkeypatch.setattr(
        phases, "_train", lambda work, name, net, *of: Outcome(net, net, Progress(met_budget=True))
    )
    monkeypatch.setattr(phases, "_test", lambda work, small: {})
    searched = phases.search(work, digest)
    shutil.rmtree(source)
    phases.prune_to_budget(work, searched)
    noted = description(tmp_path / "run/pruned")["notes"]["origin"]
    assert noted == dict(source_run.read(of_digits(method="fade", source=str(baseline))).origin) | {
        "run": noted["run"]
    }


@pytest.mark.slow
def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, baseline, monkeypatch):
    source = shutil.copytree(baseline, tmp_path / "source")
    run = prepare(tmp_path / "run", method="fade", source=str(source))
    digest = description(source / "model")["sha256"]
    trained_further(source)
    monkeypatch.setattr(phases, "_train", pytest.fail)
    with pytest.raises(ConfigError, match=r"^config.source: expected the network that the run in "):
        phases.search(phases.Work(run, lambda: False, run.setup.read), digest)


def trained_further(source):
    other = dhp.load(source / "model")
    other.classifier.bias[...] = other.classifier.bias[...] + 1
    notes = description(source / "model")["notes"]
    notes.pop("input_shape")
    dhp.save(source / "model", other, input_shape=SHAPE, **notes)


def test_every_method_is_documented_and_carried_out():
    assert {name for name in METHODS if METHODS[name].smaller is None} == {"baseline"}
    guide = (CONFIG.parents[2] / "docs/methods.md").read_text()
    for method in METHODS:
        assert f"`{method}`" in guide
    phases = {*itertools.chain(*(method.phases for method in METHODS.values()))}
    assert phases == set(preparation.PHASES)
    assert dhp_config.default().source is None


@pytest.mark.slow
def test_each_of_several_targets_is_searched_from_the_trained_weights(sources, tmp_path):
    fields = {"method": "fade", "source": path(sources["fade"]), "targets": (0.7, 0.5)}
    fields |= {"converge.epochs": 1, "search.epochs": 1}
    runs = targets.prepare(of_digits(**fields), tmp_path / "run")
    summaries = targets.execute(runs, tmp_path / "run")
    ratios = [summary["flops"]["ratio"] for summary in summaries]
    assert 0.6 < ratios[0] <= 0.7
    assert 0.4 < ratios[1] <= 0.5
    for run in runs:
        searched = description(run.workdir / "search")["notes"]
        assert searched["phase"]["met_budget"]
        assert searched["phase"]["steps"] <= 22
