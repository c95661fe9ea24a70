"""Several sizes from one search: each is what a run of its target alone would leave."""

import json
import shutil

import pytest
from runs import Interrupter, Stop, check_same_end
from test_pipeline import tiny

import dhp_jax as dhp
from dhp_jax import pipeline
from dhp_jax.artifact.reading import read_description
from dhp_jax.pipeline import execution, targets
from dhp_jax.workdir import target_dirs

SIZES = (0.8, 0.5)
FIELDS = {"search.strength": 0.1, "search.epochs": 3, "converge.epochs": 1}


def several(**changes):
    return tiny(**FIELDS, **{"targets": SIZES, "checkpoint.seconds": 0, **changes})


class Steps(Interrupter):
    """The phases in turn, and how many of its steps each had taken before."""

    def __init__(self):
        self.phases = []

    def begin(self, phase, steps, done, records):
        self.phases.append((phase, done))

    def step(self, count):
        pass


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Two networks from one search, and the phases with the step that each began at."""
    folder = tmp_path_factory.mktemp("sizes")
    config, steps = several(), Steps()
    runs = targets.prepare(config, folder, [steps])
    targets.execute(runs, folder)
    return folder, steps.phases


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of the smaller target."""
    folder = tmp_path_factory.mktemp("alone")
    pipeline.execute(pipeline.prepare(tiny(**FIELDS, target=0.5), folder))
    return folder


@pytest.mark.slow
def test_each_size_is_what_a_run_of_it_alone_leaves(sizes, alone):
    check_same_end(sizes[0] / "0.5", alone)


@pytest.mark.slow
def test_the_search_of_a_smaller_target_goes_on_from_that_of_the_larger(sizes):
    folder, phases = sizes
    assert [phase for phase, _ in phases] == ["search", "converge", "search", "converge"]
    met = read_description(folder / "0.8/search")["notes"]["phase"]["steps"]
    began = [done for _, done in phases]
    assert began[0] == began[1] == began[3] == 0
    assert 0 < began[2] < met


@pytest.mark.slow
def test_every_size_keeps_its_target(sizes):
    folder, _ = sizes
    whole = dhp.measure_cost(dhp.load(folder / "0.5/search"), (8, 8, 1)).flops
    for size in SIZES:
        left = dhp.measure_cost(dhp.load(folder / f"{size:g}/model"), (8, 8, 1)).flops / whole
        assert size - 0.05 < left <= size


@pytest.mark.slow
def test_the_page_of_all_sizes_has_each_against_flops_params_and_speed_up(sizes):
    page = (sizes[0] / "compare.html").read_text()
    for text in ("0.8", "against FLOPs", "against params", "against speed-up, batch 64"):
        assert text in page


@pytest.mark.slow
def test_runs_that_were_stopped_in_a_later_search_end_with_the_same_bits(sizes, tmp_path):
    shutil.copytree(sizes[0] / "0.8", tmp_path / "0.8")
    runs = targets.prepare(several(), tmp_path, [Interrupter("search", 3)])
    with pytest.raises(Stop):
        targets.execute(runs, tmp_path)
    assert not (tmp_path / "0.5/search").exists()
    targets.execute(targets.prepare(several(), tmp_path), tmp_path)
    for size in ("0.8", "0.5"):
        check_same_end(tmp_path / size, sizes[0] / size)


def test_a_target_out_of_reach_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"^config.targets: flops: 0.01 cannot be reached"):
        targets.prepare(several(targets=(0.5, 0.01)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_directory_of_a_single_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^workdir: .* holds a run of a single target; give "):
        targets.prepare(several(), tmp_path)


def test_targets_that_differ_little_have_different_directories(tmp_path):
    runs = targets.prepare(several(targets=(0.7500001, 0.75)), tmp_path)
    assert [run.workdir.name for run in runs] == ["0.7500001", "0.75"]


def test_the_targets_are_noted_before_work_is_done(tmp_path, monkeypatch):
    runs = targets.prepare(several(), tmp_path / "run")

    def stopped(run, **options):
        raise Stop

    monkeypatch.setattr(execution, "execute", stopped)
    with pytest.raises(Stop):
        targets.execute(runs, tmp_path / "run")
    assert json.loads((tmp_path / "run" / target_dirs.TARGETS).read_text()) == [0.8, 0.5]


def test_several_targets_are_no_single_run(tmp_path):
    with pytest.raises(ValueError, match=r"^config.targets: expected None for a single run, "):
        pipeline.prepare(several(), tmp_path / "run")


def test_a_baseline_has_no_targets(tmp_path):
    (run,) = targets.prepare(several(method="baseline"), tmp_path)
    assert run.workdir == tmp_path
