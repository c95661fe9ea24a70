"""Runs from a configuration to the end: what they leave, and that they can be stopped anywhere."""

import dataclasses
import json
import logging
import re
import shutil
from types import SimpleNamespace

from flax import nnx
import jax
import jax.numpy as jnp
from networks import arrays
import numpy as np
import pytest
from runs import (
    NETWORKS,
    WARNINGS,
    Interrupter,
    Stop,
    check_same_end,
    leave_no_pages,
    leave_pages_alone,
    of_digits,
    without_times,
)

import dhp_jax as dhp
from dhp_jax import data
from dhp_jax.artifact import reading as artifact_reading
from dhp_jax.budgets.chosen import Time
from dhp_jax.errors import ConfigError
from dhp_jax.models import registry
from dhp_jax.pipeline import preparation, smaller
from dhp_jax.pipeline.execution import execute
from dhp_jax.pipeline.preparation import prepare
from dhp_jax.report import text
from dhp_jax.report import write as report_write
from dhp_jax.train.phase import Stopped
from dhp_jax.workdir import identity
from dhp_jax.workdir import metrics as workdir_metrics

SHAPE = (8, 8, 1)


def flops_and_params(found):
    """Of amounts or shares by name."""
    return found["flops"], found["params"]


def tiny(**changes):
    """The configuration of the run that all test modules share, with other values of fields."""
    return of_digits(**changes)


def contents(folder):
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def description(workdir, name):
    return json.loads((workdir / name / "model.json").read_text())


@pytest.fixture(scope="module")
def finished(finished):
    """The directory and the summary of the run that all test modules share."""
    return SimpleNamespace(workdir=finished, summary=summary_of(finished))


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


# What a run leaves


def test_preparing_a_run_writes_its_configuration_only(tmp_path):
    prepare(tiny(), tmp_path / "run")
    before = contents(tmp_path / "run")
    assert before.keys() == {"config.json", "data.json", ".lock"}
    stored = json.loads(before["config.json"])
    assert stored == json.loads(tiny().to_json_best_effort())
    assert stored["search"]["strength"] == 0.3


def test_a_run_leaves_all_that_it_promises(finished):
    names = {path.name for path in finished.workdir.iterdir()}
    assert names == {
        *NETWORKS,
        *("config.json", "metrics.jsonl", "tensorboard", "summary.json", "layers.md", "plots"),
        "report.html",
        *("checkpoints", "data.json", "log.txt", ".lock"),
    }
    for name in NETWORKS:
        files = {path.name for path in (finished.workdir / name).iterdir()}
        assert files == {"model.json", "arrays.safetensors"}
    plots = {path.name for path in (finished.workdir / "plots").iterdir()}
    assert plots == {
        *("channels.png", "error.png", "latents.png", "loss.png", "magnitudes.png"),
        *("ratio.png", "survivors.png"),
    }
    assert {path.name for path in (finished.workdir / "tensorboard").iterdir()} == {
        "search",
        "converge",
    }


def test_the_pruned_network_uses_the_budget_and_no_removed_channel_fits_in_what_is_left(finished):
    full = dhp.load(finished.workdir / "search")
    cost = dhp.measure_cost(full, SHAPE)
    left = dhp.measure_cost(dhp.load(finished.workdir / "model"), SHAPE)
    assert finished.summary["flops"]["ratio"] == left.flops / cost.flops <= 0.5
    survivors = description(finished.workdir, "model")["survivors"]
    counts = {name: len(indices) for name, indices in survivors.items()}
    assert flops_and_params(cost.amounts(counts)) == (left.flops, left.params)
    pruned = 0
    for name, latent in dhp.latents(full).items():
        if counts[name] < latent.size:
            assert cost.shares({**counts, name: counts[name] + 1})["flops"] > 0.5
            pruned += 1
    assert pruned > 3


def test_every_network_is_pruned_alike_and_the_last_two_are_ordinary(finished):
    described = {name: description(finished.workdir, name) for name in NETWORKS}
    assert described["search"]["survivors"] is None
    for name in ("pruned", "best", "model"):
        assert described[name]["survivors"] == described["pruned"]["survivors"]
        model = dhp.load(finished.workdir / name)
        assert not dhp.latents(model)
        assert isinstance(model.blocks[0].layers[0].conv, nnx.Conv)


def errors_by_hand(workdir, name):
    """The share of wrong labels of a network on disk."""
    source = data.load("digits")
    images, labels = source.read("test")
    model = dhp.load(workdir / name)
    logits = model((jnp.asarray(images, jnp.float32) - source.mean[0]) / source.std[0])
    return np.mean(np.argmax(np.asarray(logits), -1) != labels)


def test_the_networks_on_disk_have_the_errors_of_the_summary(finished):
    reported = finished.summary["test"]
    for name, error in (
        ("search", "after_search"),
        ("pruned", "after_pruning"),
        ("best", "best"),
        ("model", "last"),
    ):
        found = errors_by_hand(finished.workdir, name)
        assert found == pytest.approx(reported[error]["error"], abs=1e-6), name


def test_the_records_of_a_search_tell_how_its_latents_died(finished):
    records = workdir_metrics.read(finished.workdir / workdir_metrics.RECORDS)
    history = [r for r in records if "survivors" in r]
    assert history == [r for r in records if r["phase"] == "search"]
    searched = dhp.load(finished.workdir / "search")
    prunable = {name: z for name, z in dhp.latents(searched).items() if z.prunable}
    masks = dhp.survivors(searched, threshold=5e-3)
    assert history[-1]["survivors"] == [masks[name].sum() for name in prunable]
    assert all(left >= 1 for record in history for left in record["survivors"])  # min_channels
    magnitudes = np.abs(np.concatenate([np.asarray(z.value()) for z in prunable.values()]))
    deciles = np.quantile(magnitudes, np.linspace(0, 1, 11))
    np.testing.assert_allclose(history[-1]["magnitudes"], deciles, rtol=6e-4, atol=1e-7)
    assert sum(history[-1]["survivors"]) < sum(history[0]["survivors"])


def test_the_records_are_of_both_phases_and_agree_with_the_summary(finished):
    records = workdir_metrics.read(finished.workdir / workdir_metrics.RECORDS)
    search = [r for r in records if r["phase"] == "search"]
    converge = [r for r in records if r["phase"] == "converge"]
    assert records == search + converge
    assert [r["step"] for r in converge] == [10, 20]
    assert [r["learning_rate"] for r in converge] == pytest.approx([0.1, 0.01])
    assert [r["flops_ratio"] <= 0.52 for r in search] == [False] * (len(search) - 1) + [True]
    phases = finished.summary["phases"]
    assert phases["search"]["met_budget"]
    assert phases["search"]["steps"] == search[-1]["step"]
    assert phases["search"]["last"]["error"] == search[-1]["test_error"]
    tested = [r["test_error"] for r in converge if "test_error" in r]
    assert phases["converge"]["epochs"] == len(tested) == 1
    assert phases["converge"]["last"]["error"] == tested[-1]
    assert phases["converge"]["best"]["error"] == min(tested)


# Stopped and started again


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize(
    "lost",
    [["model"], ["model", "best"], ["model", "best", "pruned"]],
    ids=lambda lost: "-".join(lost),
)
@pytest.mark.slow
def test_a_run_that_goes_on_after_a_phase_ends_with_the_same_bits(finished, tmp_path, lost):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    for name in lost:
        shutil.rmtree(workdir / name)
    (workdir / "summary.json").unlink()
    execute(prepare(tiny(), workdir))
    check_same_end(workdir, finished.workdir)


@pytest.mark.usefixtures("without_pages")
def test_a_run_that_died_in_each_phase_ends_with_the_same_bits(finished, tmp_path):
    often = {"checkpoint.seconds": 0}
    for phase, step, left in (("search", 11, set()), ("converge", 15, {"search", "pruned"})):
        run = prepare(tiny(**often), tmp_path, [Interrupter(phase, step)])
        with pytest.raises(Stop):
            execute(run)
        records = workdir_metrics.read(tmp_path / workdir_metrics.RECORDS)
        assert [r["step"] for r in records if r["phase"] == phase] == list(range(10, step, 10))
        assert {name for name in NETWORKS if (tmp_path / name).exists()} == left
        assert len(list((tmp_path / "checkpoints" / phase).iterdir())) > 0
    assert execute(prepare(tiny(), tmp_path)) == summary_of(tmp_path)
    check_same_end(tmp_path, finished.workdir)


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["search", "converge"])
def test_a_run_that_is_told_to_stop_goes_on_where_it_was(finished, tmp_path, phase):
    witness = Steps()
    run = prepare(tiny(), tmp_path, [witness])
    with pytest.raises(Stopped, match=f"^{phase}: stopped after step 7$"):
        execute(run, stopping=lambda: witness.taken[-1:] == [(phase, 7)])
    again = Steps()
    execute(prepare(tiny(), tmp_path, [again]))
    assert again.taken[0] == (phase, 8)
    check_same_end(tmp_path, finished.workdir)


class Steps:
    """Which steps were taken."""

    def __init__(self):
        self.taken = []

    def begin(self, phase, steps, done, records):
        self.phase, self.done = phase, done

    def step(self, count):
        assert count == 1  # on CPU
        self.done += 1
        self.taken.append((self.phase, self.done))

    def record(self, values):
        pass

    def end(self):
        pass


# Damage


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize(
    "name",
    ["model", *(pytest.param(n, marks=pytest.mark.slow) for n in ("pruned", "search", "best"))],
)
def test_a_network_that_is_damaged_is_made_again_and_only_that(finished, tmp_path, caplog, name):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    path = workdir / name / "arrays.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    steps = Steps()
    with caplog.at_level(logging.WARNING):
        execute(prepare(tiny(), workdir, [steps]))
    check_same_end(workdir, finished.workdir)
    assert steps.taken == []
    warnings = [r.getMessage() for r in caplog.records if r.name == "dhp_jax.pipeline.networks"]
    assert len(warnings) == 1
    assert str(path.parent) in warnings[0]
    assert warnings[0].endswith("; it is made again")


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize(
    "left", ["a third", *(pytest.param(left, marks=pytest.mark.slow) for left in ("", "zeros"))]
)
def test_records_that_are_gone_come_back_from_checkpoints(finished, tmp_path, left):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    path = workdir / workdir_metrics.RECORDS
    content = path.read_bytes()
    third = content[: len(content) // 3]
    path.write_bytes({"": b"", "a third": third, "zeros": third + bytes(500) + b"\n"}[left])
    execute(prepare(tiny(), workdir))
    assert path.read_bytes() == content


def test_a_death_before_the_configuration_was_written_is_no_obstacle(tmp_path):
    (tmp_path / ".config.json.unfinished").write_text('{"se')
    prepare(tiny(), tmp_path)
    assert (tmp_path / "config.json").is_file()


def test_other_data_are_refused_in_the_middle_of_a_phase(finished, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    for name in NETWORKS:  # as if it had been stopped before the search had left one
        shutil.rmtree(workdir / name)
    run = prepare(tiny(), workdir)
    read = run.setup.read

    def changed(split):
        images, labels = read(split)
        return jax.tree.map(lambda pixels: pixels + 1, images), labels

    other = dataclasses.replace(run.setup, read=changed)
    with pytest.raises(ValueError, match=r"^config\.data: checksum .*; give another --workdir$"):
        execute(dataclasses.replace(run, setup=other))


# More epochs


@pytest.mark.slow
@pytest.mark.usefixtures("without_pages")
def test_a_finished_run_with_more_epochs_goes_on_as_if_it_had_had_them_before(finished, tmp_path):
    longer = tiny(**{"converge.epochs": 2})
    once = shutil.copytree(finished.workdir, tmp_path / "once")
    for name in ("best", "model", "checkpoints/converge"):
        shutil.rmtree(once / name)
    execute(prepare(longer, once))
    workdir, steps = shutil.copytree(finished.workdir, tmp_path / "run"), Steps()
    execute(prepare(longer, workdir, [steps]))
    assert steps.taken == [("converge", n) for n in range(21, 41)]
    check_same_end(workdir, once)
    with pytest.raises(ConfigError, match=r"config\.converge\.epochs is 2 there and 1 here"):
        prepare(tiny(), workdir)


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
def test_more_epochs_that_were_not_reached_can_be_taken_back(finished, tmp_path):
    for config in (tiny(), tiny(**{"converge.epochs": 30})):
        run = prepare(config, tmp_path, [Interrupter("converge", 13)])
        with pytest.raises(Stop):
            execute(run)
    execute(prepare(tiny(), tmp_path))
    check_same_end(tmp_path, finished.workdir)


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
def test_a_search_with_more_epochs_is_pruned_and_converged_again(tmp_path):
    fields = {"search.strength": 0.02, "converge.epochs": 1}
    short, longer = (tiny(**{**fields, "search.epochs": n}) for n in (1, 2))
    execute(prepare(longer, tmp_path / "once"))
    execute(prepare(short, tmp_path / "run"))
    steps = Steps()
    execute(prepare(longer, tmp_path / "run", [steps]))
    taken = [("search", n) for n in range(21, 41)] + [("converge", n) for n in range(1, 21)]
    assert steps.taken == taken
    check_same_end(tmp_path / "run", tmp_path / "once")


@pytest.mark.slow
def test_a_search_with_more_epochs_stopped_in_converge_goes_on_from_there(tmp_path):
    fields = {"search.strength": 0.02, "converge.epochs": 1}
    short, longer = (tiny(**{**fields, "search.epochs": n}) for n in (1, 2))
    execute(prepare(short, tmp_path))
    witness = Steps()
    run = prepare(longer, tmp_path, [witness])
    with pytest.raises(Stopped, match=r"^converge: stopped after step 7$"):
        execute(run, stopping=lambda: witness.taken[-1:] == [("converge", 7)])
    again = Steps()
    execute(prepare(longer, tmp_path, [again]))
    assert again.taken == [("converge", n) for n in range(8, 21)]


@pytest.mark.usefixtures("without_pages")
def test_more_epochs_without_checkpoints_are_refused(finished, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    before = (workdir / "model/arrays.safetensors").read_bytes()
    message = r"^config\.converge\.epochs: expected at most 1, .* are gone; got 3$"
    with pytest.raises(ValueError, match=message):
        execute(prepare(tiny(**{"converge.epochs": 3}), workdir))
    assert (workdir / "model/arrays.safetensors").read_bytes() == before
    execute(prepare(tiny(), workdir))  # it is still what it was


@pytest.mark.slow
def test_a_run_of_less_than_an_epoch_can_be_stopped_anywhere(tmp_path):
    fields = {"search.max_steps": 7, "converge.max_steps": 25, "search.strength": 0.02}
    fields |= {"converge.epochs": 2}
    execute(prepare(tiny(**fields), tmp_path / "once"))
    for phase, step in (("search", 3), ("converge", 22)):
        often = tiny(**fields, **{"checkpoint.seconds": 0.0})
        run = prepare(often, tmp_path / "run", [Interrupter(phase, step)])
        with pytest.raises(Stop):
            execute(run)
    steps = Steps()
    summary = execute(prepare(tiny(**fields), tmp_path / "run", [steps]))
    check_same_end(tmp_path / "run", tmp_path / "once")
    taken = {name: (phase["steps"], phase["epochs"]) for name, phase in summary["phases"].items()}
    assert taken == {"search": (7, 1), "converge": (25, 2)}
    assert steps.taken[-1] == ("converge", 25)
    assert "given more" not in (tmp_path / "run/report.html").read_text()
    again = Steps()
    execute(prepare(tiny(**fields), tmp_path / "run", [again]))
    assert again.taken == []
    with pytest.raises(ValueError, match=r"config\.converge\.max_steps is 25 there and 30 here"):
        prepare(tiny(**fields | {"converge.max_steps": 30}), tmp_path / "run")


@pytest.mark.slow
def test_the_best_epoch_of_a_run_is_that_of_its_validation_data(tmp_path):
    fields = {"method": "baseline", "data.validation": 0.1, "baseline.epochs": 2}
    summary = execute(prepare(tiny(**fields), tmp_path / "once"))
    records = [
        r for r in workdir_metrics.read(tmp_path / "once/metrics.jsonl") if "test_error" in r
    ]
    best = min(records, key=lambda record: record["validation_error"])
    phase = summary["phases"]["baseline"]
    assert (phase["steps"], phase["best_epoch"]) == (2 * (1167 // 64), best["epoch"])
    assert summary["test"]["best"]["error"] == best["test_error"]
    assert (summary["test_examples"], summary["validation"]["examples"]) == (500, 130)
    assert summary["validation"]["best"]["error"] == best["validation_error"]
    source = data.load("digits").hold_out(0.1)
    images, labels = source.read("validation")
    model = dhp.load(tmp_path / "once/best")
    scores = model(jnp.asarray((images - source.mean[0]) / source.std[0], jnp.float32))
    wrong = np.mean(np.argmax(scores, -1) != labels)
    assert wrong == pytest.approx(best["validation_error"], abs=1e-6)
    for told in (text.text("run", summary), (tmp_path / "once/report.html").read_text()):
        assert "chosen on 130 validation examples" in " ".join(told.split())
    often = tiny(**fields, **{"checkpoint.seconds": 0.0})
    with pytest.raises(Stop):
        execute(prepare(often, tmp_path / "run", [Interrupter("baseline", 22)]))
    execute(prepare(tiny(**fields), tmp_path / "run"))
    check_same_end(tmp_path / "run", tmp_path / "once")
    there = r"config\.data\.validation is 0.1 there and 0.2 here"
    with pytest.raises(ConfigError, match=there):
        prepare(tiny(**fields | {"data.validation": 0.2}), tmp_path / "run")
    # A network that has seen the examples that another run holds out is no source of it.
    other = tiny(method="l1_norm", source=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"expected a run with config\.data\.validation=0\.0"):
        prepare(other, tmp_path / "pruned")


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
def test_a_baseline_of_less_than_an_epoch_is_finished(tmp_path):
    quick = {"baseline.epochs": 3, "baseline.max_steps": 5}
    execute(prepare(tiny(method="baseline", **quick), tmp_path / "baseline"))
    started = tiny(method="l1_norm", source=str(tmp_path / "baseline"))
    prepare(started, tmp_path / "run")
    path = tmp_path / "baseline/config.json"
    stored = json.loads(path.read_text())
    del stored["baseline"]["max_steps"]
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="is not finished"):
        prepare(started, tmp_path / "other")


def test_a_finished_run_only_reports(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    for lost in ("summary.json", "layers.md", "plots/error.png"):
        (workdir / lost).unlink()
    run = prepare(tiny(), workdir, [Interrupter(p, 0) for p in ("search", "converge")])
    unread = dataclasses.replace(run.setup, read=lambda split: pytest.fail("data were read"))
    summary = execute(dataclasses.replace(run, setup=unread))
    assert without_times(summary) == without_times(finished.summary)
    before, after = contents(finished.workdir), contents(workdir)
    assert before.keys() == after.keys()
    measured = ("summary.json", "report.html", "log.txt")  # the latency, for it was lost
    for name in before:
        assert name.endswith((".png", *measured)) or before[name] == after[name], name
    monkeypatch.setattr(report_write, "run_charts", lambda run: {})
    monkeypatch.setattr(report_write, "page", lambda run, charts, pictures: "")
    again = execute(dataclasses.replace(run, setup=unread))
    assert again == summary  # measured once


def test_a_directory_of_another_configuration_is_refused_and_left_alone(finished, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    before = contents(workdir)
    message = (
        f"workdir: {workdir} holds a run with another configuration: config.target is 0.5 there "
        "and 0.4 here, config.search.epochs is 2 there and 1 here; give another --workdir"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        prepare(tiny(target=0.4, log_every=7, **{"search.epochs": 1}), workdir)
    assert contents(workdir) == before


def test_a_family_is_built_once_before_the_data_are_looked_at_and_once_after(tmp_path, monkeypatch):
    made, build = [], registry.build_abstract
    monkeypatch.setattr(
        registry, "build_abstract", lambda *a, **k: made.append(k) or build(*a, **k)
    )
    prepare(tiny(), tmp_path)
    assert ["num_classes" in arguments for arguments in made] == [False, True]


def test_a_field_that_is_given_no_more_makes_another_configuration(tmp_path):
    config = tiny()
    prepare(config, tmp_path)
    del config.model.width
    with pytest.raises(ValueError, match=r"config\.model\.width is 0\.25 there and None here"):
        prepare(config, tmp_path)


def test_what_may_change_is_taken(finished, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    changes = {"data.workers": 2, "log_every": 7, "nonfinite": "skip", "mesh.data": 1}
    changes |= {"checkpoint.seconds": 1.0, "checkpoint.grace": 5.0}
    prepare(tiny(**changes), workdir)
    for field, value in changes.items():
        assert identity.read_field(workdir, field) == value


@pytest.mark.parametrize(("field", "before"), [("search.epochs", 2), ("converge.epochs", 1)])
def test_what_may_grow_is_taken_and_stored_once_it_is_reached(finished, tmp_path, field, before):
    path = shutil.copytree(finished.workdir, tmp_path / "run")
    prepare(tiny(**{field: 3}), path)
    assert identity.read_field(path, field) == before
    identity.grow(path, field, 3)
    assert identity.read_field(path, field) == 3


def test_epochs_do_not_grow_where_the_learning_rate_falls_to_zero_in_the_last(tmp_path):
    falls = {"search.schedule": "cosine", "converge.schedule": "cosine", "converge.epochs": 2}
    prepare(tiny(**falls), tmp_path)
    for phase in ("search", "converge"):
        there = f"config.{phase}.epochs is 2 there and 3 here"
        with pytest.raises(ValueError, match=re.escape(there)):
            prepare(tiny(**falls | {f"{phase}.epochs": 3}), tmp_path)
    prepare(tiny(**falls), tmp_path)


def test_a_directory_in_which_another_is_at_work_is_refused(tmp_path):
    message = f"workdir: another process is at work in {tmp_path}; wait until it ends, or give "
    with identity.hold(tmp_path, tiny()):
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}another --workdir$"):
            prepare(tiny(log_every=7), tmp_path)
        assert contents(tmp_path) == before
    prepare(tiny(log_every=7), tmp_path)


@pytest.mark.parametrize("name", ["run[1]", "run*"])
def test_a_directory_whose_name_is_a_pattern_is_refused_for_its_checkpoints_would_be_lost(
    tmp_path, name
):
    with pytest.raises(ValueError, match=r"^workdir: expected a path without [*\[]; got '/"):
        prepare(tiny(), tmp_path / name / "below")
    assert contents(tmp_path) == {}


def test_a_configuration_on_disk_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0,')
    with pytest.raises(ValueError, match=r"^workdir: .*config.json is no configuration: "):
        prepare(tiny(), tmp_path)
    assert contents(tmp_path) == {"config.json": b'{"seed": 0,'}


# A search that does not get there


@pytest.mark.slow
def test_a_search_that_runs_out_of_epochs_says_so_and_is_pruned_to_the_target(tmp_path, caplog):
    config = tiny(**{"search.epochs": 1, "search.strength": 1e-4, "target": 0.4})
    run = prepare(config, tmp_path, [Interrupter("converge", 0)])
    with caplog.at_level(logging.WARNING), pytest.raises(Stop):
        execute(run)
    told, ended = caplog.messages  # before the search, and after it
    assert ended == (
        "search: did not come down to 0.42 of the FLOPs within search.epochs=1; "
        "pruning to 0.4 of the FLOPs anyway"
    )
    assert told.startswith("search: may not come down to 0.42 of the FLOPs: within search.epochs=1")
    # 20 steps of 0.1, each with the proximal step and a decay of 0.1 % by momentum.
    magnitudes = np.concatenate(
        [abs(z.value()) for z in dhp.latents(run.blueprint.build()).values() if z.prunable]
    )
    reach = 5e-3
    for _ in range(run.setup.epoch // config.batch_size):
        reach = (reach + 0.1 * 1e-4) / (1 - 0.1 * 1e-4 / (1 - 0.9))
    assert f"below {reach:.3g} reach" in told
    assert f"{100 * np.mean(magnitudes < reach):.0f} % of all" in told
    phase = description(tmp_path, "search")["notes"]["phase"]
    assert (phase["met_budget"], phase["epochs"]) == (False, 1)
    full, small = (dhp.measure_cost(dhp.load(tmp_path / n), SHAPE) for n in ("search", "pruned"))
    assert 0.38 < small.flops / full.flops <= 0.4


def test_a_search_whose_schedule_suffices_says_nothing(finished):
    assert (finished.workdir.parent / WARNINGS).read_text() == ""


def test_a_run_that_was_begun_before_fields_were_there_has_what_they_meant(tmp_path):
    prepare(tiny(), tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    lost = {"optimizer.nesterov": True, "precision": "highest"}
    lost |= {"search.keep": 0.1, "data.validation": 0.1}
    for field in lost:
        group, _, name = field.rpartition(".")
        del (stored[group] if group else stored)[name]
    path.write_text(json.dumps(stored))
    for field, value in lost.items():
        with pytest.raises(ValueError, match=rf"config\.{field} is (False|'default'|0.0) there"):
            prepare(tiny(**{field: value}), tmp_path)
    prepare(tiny(), tmp_path)


@pytest.mark.slow
def test_every_latent_keeps_its_least_share(tmp_path):
    config = tiny(**{"search.keep": 0.6, "target": 0.55, "search.strength": 1.0})
    run = prepare(config, tmp_path, [Interrupter("converge", 0)])
    with pytest.raises(Stop):
        execute(run)
    kept = description(tmp_path, "pruned")["survivors"]
    sizes = {name: z.size for name, z in dhp.latents(run.blueprint.build()).items()}
    shares = {name: len(kept[name]) / size for name, size in sizes.items()}
    assert min(shares.values()) >= 0.6
    assert any(share < 0.8 for share in shares.values())


def test_a_target_below_what_the_least_shares_need_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^config.target: .*0.5 cannot be reached: "):
        prepare(tiny(**{"search.keep": 0.9}), tmp_path)


# Several budgets, and that of measured time


class Clocks:
    """Clocks whose times follow from the FLOPs, and that never tell the same twice."""

    def __init__(self, floor=0.0):
        self.measured, self.floor = [], floor

    def __call__(self, model, input_shape, batch):
        whole = dhp.measure_cost(model, input_shape).flops

        def timed(small):
            share = dhp.measure_cost(small, input_shape).flops / whole
            self.measured.append((share, batch))
            median = self.floor + (1 - self.floor) * share + 1e-6 * len(self.measured)
            values = {"low": median - 0.01, "median": median, "high": median + 0.01}
            return Time(ratio=values, whole_ms=values, ms=values, rounds=9)

        return timed


def time_by(patch, clocks):
    """Has clocks time networks, before a run and in it."""
    for module in (preparation, smaller):
        patch.setattr(module, "clock", clocks)


QUICK = {"budget.latency": 0.5, "budget.batch": 3, "target": 0.6, "converge.epochs": 1}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A run with four budgets, and how often a network was timed."""
    folder = tmp_path_factory.mktemp("quick")
    clocks = Clocks(floor=0.1)
    config = tiny(**QUICK, **{"budget.params": 0.55, "budget.activations": 0.8})
    with pytest.MonkeyPatch.context() as patch:
        time_by(patch, clocks)
        leave_pages_alone(patch)
        run = prepare(config, folder)
        before = len(clocks.measured)
        summary = execute(run)
    return SimpleNamespace(
        workdir=folder, config=config, summary=summary, clocks=clocks, before=before
    )


def test_all_budgets_of_a_configuration_hold(quick):
    networks = (dhp.load(quick.workdir / name) for name in ("search", "model"))
    full, small = (dhp.measure_cost(network, SHAPE) for network in networks)
    assert small.flops / full.flops <= 0.6
    assert small.params / full.params <= 0.55
    assert small.activations / full.activations <= 0.8
    share, batch = quick.clocks.measured[-1]
    assert share == small.flops / full.flops
    assert batch == 3
    assert 0.1 + 0.9 * share + 0.01 <= 0.5


def test_a_latency_is_looked_at_once_before_work_is_done(quick):
    assert quick.before == 1
    smallest = quick.clocks.measured[0][0]
    assert smallest == min(share for share, _ in quick.clocks.measured)


def test_a_search_ends_when_all_budgets_are_nearly_met(quick):
    phase = description(quick.workdir, "search")["notes"]["phase"]
    search = [
        r
        for r in workdir_metrics.read(quick.workdir / workdir_metrics.RECORDS)
        if r["phase"] == "search"
    ]
    asked = {"flops": 0.5, "params": 0.55, "activations": 0.8}  # FLOPs as the latency

    def met(record):
        return all(record[f"{name}_ratio"] <= share + 0.02 for name, share in asked.items())

    assert phase["met_budget"]
    assert met(search[-1])
    assert not any(met(record) for record in search[:-1])


def test_what_was_predicted_and_measured_is_told(quick):
    told = quick.summary["budgets"]
    assert told.keys() == {"flops", "params", "activations", "latency"}
    for name in ("flops", "params", "activations"):
        assert told[name]["predicted"] == told[name]["counted"] <= told[name]["asked"]
    noted = description(quick.workdir, "pruned")["notes"]["budget"]
    assert told["latency"]["predicted"] == noted["predicted"]["flops"]
    assert told["latency"]["ratio"] == noted["time"]["ratio"]
    assert [row["flops"] for row in noted["time"]["tried"]] == [
        share for share, _ in quick.clocks.measured[quick.before :]
    ]
    page = (quick.workdir / "report.html").read_text()
    ratio = [f"{100 * told['latency']['ratio'][name]:.2f} %" for name in ("median", "low", "high")]
    assert "{} ({} to {})".format(*ratio) in page
    assert "asked for" in page
    assert "50.00 %" in page


def test_every_network_tells_what_was_asked_of_its_run_wherever_it_is_copied_to(quick, tmp_path):
    checksums = json.loads((quick.workdir / "data.json").read_text())["checksums"]
    asked = {
        "method": "dhp",
        "seed": quick.config.seed,
        "target": 0.6,
        "budget": {
            "flops": None, "params": 0.55, "activations": 0.8, "latency": 0.5, "batch": 3,
        },
        "multiple_of": 1,
        "data": {"name": "digits", "checksums": checksums},
    }  # fmt: skip
    assert checksums.keys() == {"train", "test"}
    for name in NETWORKS:
        shutil.copytree(quick.workdir / name, tmp_path / name)
        assert artifact_reading.verify(tmp_path / name)["notes"]["run"] == asked


@pytest.mark.usefixtures("without_pages")
def test_a_run_that_goes_on_measures_nothing_once_its_network_is_pruned(
    quick, tmp_path, monkeypatch
):
    """Clocks tell other times now: what is on disk counts."""
    expected, clocks = contents(quick.workdir / "pruned"), Clocks(floor=0.3)
    time_by(monkeypatch, clocks)
    shutil.copytree(quick.workdir, tmp_path / "run")
    for name in ("best", "model", "checkpoints/converge"):
        shutil.rmtree(tmp_path / "run" / name)
    execute(prepare(quick.config, tmp_path / "run"))
    assert clocks.measured == []
    assert contents(tmp_path / "run/pruned") == expected
    check_same_end(tmp_path / "run", quick.workdir)


def test_a_latency_below_what_is_reachable_is_refused_before_work_is_done(tmp_path, monkeypatch):
    time_by(monkeypatch, Clocks(floor=0.7))
    expected = r"^config.budget.latency: 0.5 cannot be reached: the smallest possible network takes"
    with pytest.raises(ValueError, match=expected):
        prepare(tiny(**QUICK), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    prepare(tiny(**QUICK, method="baseline"), tmp_path / "run")  # which prunes nothing


def test_a_latency_that_is_out_of_reach_after_the_search_ends_the_run_in_one_line(
    quick, tmp_path, monkeypatch
):
    time_by(monkeypatch, Clocks(floor=0.7))
    shutil.copytree(quick.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/pruned")
    with pytest.raises(ValueError, match=r"^config.budget.latency: 0.5 cannot .*/search, for"):
        execute(prepare(quick.config, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"target": 0.01}, "config.target: flops: 0.01 cannot"),
        ({"target": 0.5, "budget.flops": 0.01}, "config.budget.flops: 0.01 cannot"),
        ({"budget.params": 0.001}, "config.budget.params: 0.001 cannot"),
        ({"budget.activations": 0.01}, "config.budget.activations: 0.01 cannot"),
    ],
)
def test_a_budget_out_of_reach_is_told_by_its_field(tmp_path, changes, field):
    with pytest.raises(ValueError, match=f"^{field} be reached: the smallest possible share is 0."):
        prepare(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The baseline


def test_the_baseline_is_an_ordinary_network_and_a_run_reports_its_error(
    finished, tmp_path, monkeypatch
):
    workdir = tmp_path / "baseline"
    summary = execute(prepare(tiny(method="baseline"), workdir))
    assert summary == summary_of(workdir)
    assert description(workdir, "model")["notes"]["run"].keys() == {"method", "seed", "data"}
    assert {path.name for path in workdir.iterdir()} == {
        *("best", "model", "config.json", "metrics.jsonl", "log.txt", "report.html"),
        *("tensorboard", "summary.json", "layers.md", "plots", "checkpoints", "data.json", ".lock"),
    }
    model = dhp.load(workdir / "model")
    assert not dhp.latents(model)
    assert dhp.measure_cost(model, SHAPE).flops == finished.summary["flops"]["before"]
    assert summary["flops"]["ratio"] == 1
    error = errors_by_hand(workdir, "model")
    assert summary["test"]["last"]["error"] == pytest.approx(error, abs=1e-6)
    records = workdir_metrics.read(workdir / workdir_metrics.RECORDS)
    assert {record["phase"] for record in records} == {"baseline"}
    assert records[-1]["test_error"] == summary["test"]["last"]["error"]
    leave_no_pages(monkeypatch)
    run = prepare(tiny(), shutil.copytree(finished.workdir, tmp_path / "run"))
    reported = execute(run, baseline=workdir)
    assert reported["test"]["unpruned"] == summary["test"]["last"]
    assert reported["unpruned_epochs"] == 1
    assert execute(run)["test"]["unpruned"] is None


# What is decided before any work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.depth": 21}, r"^config\.model\.depth: expected one of .* got 21$"),
        ({"search.min_channels": 10**5}, r"^config\.search\.min_channels: expected "),
        (
            {"converge.epochs": 10**6, "batch_size": 1},
            r"^config\.converge\.epochs: expected at most \d+, of 1297 steps each; got 1000000$",
        ),
        (
            {"data.name": "image_folder", "data.dir": "nowhere", "data.image_size": 8},
            r"^config\.data\.dir: ",
        ),
        (
            {"data.dir": "pictures"},
            r"^config\.data\.dir: only cifar10, .* image_folder can .* digits; got 'pictures'$",
        ),
        ({"data.cutout": 9}, r"^config\.data\.cutout: expected at most 8, the side .*; got 9$"),
        ({"data.crop_padding": 9}, r"^config\.data\.crop_padding: expected at most 8, .*; got 9$"),
    ],
)
def test_an_error_names_the_field(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(preparation, "MAX_STEPS", 10**9)
    with pytest.raises(ValueError, match=message):
        prepare(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_network_follows_from_the_seed(tmp_path):
    first, again, other = (
        arrays(prepare(tiny(seed=seed), tmp_path / str(n)).blueprint.build())
        for n, seed in enumerate((7, 7, 8))
    )
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    latent = "blocks.0.hidden.0.vector"
    assert np.any(first[latent] != other[latent])


def test_the_configuration_decides_min_channels_and_dtype_of_the_network(tmp_path):
    run = prepare(tiny(dtype="bfloat16", **{"search.min_channels": 2}), tmp_path)
    model = run.blueprint.build()
    assert all(z.min_channels == min(2, z.size) for z in dhp.latents(model).values())
    assert model.classifier.dtype == jnp.bfloat16
    assert (model.channels, model.classifier.out_features) == (1, 10)


@pytest.mark.parametrize(
    ("argument", "field"),
    [
        ("min_channels", "search.min_channels"),
        ("dtype", "dtype"),
        ("num_classes", "data.name"),
        ("channels", "data.name"),
    ],
)
def test_what_has_a_field_of_its_own_is_refused_among_the_models(tmp_path, argument, field):
    config = tiny()
    config.model[argument] = 3
    message = f"^config.model.{argument}: follows from config.{field}, not given here$"
    with pytest.raises(ValueError, match=message):
        prepare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_widths_are_rounded_as_the_configuration_says(tmp_path):
    run = prepare(tiny(multiple_of=4, target=0.6), tmp_path)
    summary = execute(run)
    assert summary["flops"]["ratio"] <= 0.6
    kept = [len(entries) for entries in description(tmp_path, "model")["survivors"].values()]
    assert all(count % 4 == 0 for count in kept if count > 1)  # 1: gray images
    assert sum(kept) < sum(z.size for z in dhp.latents(run.blueprint.build()).values())


@pytest.mark.slow
def test_both_precisions_follow_the_same_loss_curve(tmp_path):
    """Means of the loss over ten steps each; they fall to a third in the course of the run."""
    curves = {}
    for dtype in ("float32", "bfloat16"):
        changes = {
            "dtype": dtype,
            "model.depth": 20,
            "model.width": 0.5,
            "log_every": 10,
            "baseline.epochs": 4,
        }
        run = prepare(tiny(method="baseline", **changes), tmp_path / dtype)
        execute(run)
        records = workdir_metrics.read(run.workdir / workdir_metrics.RECORDS)
        curves[dtype] = np.array([record["loss"] for record in records])
    assert curves["float32"][-1] < curves["float32"][0] / 3
    np.testing.assert_allclose(curves["bfloat16"], curves["float32"], rtol=0.15, atol=0.1)
