"""Runs on networks of one's own, that no family is of: by the names of their functions."""

import functools
import json
import re

from flax import nnx
import jax.numpy as jnp
from networks import filled, short
import numpy as np
from own_networks import InLinen, Plain, Sowing, of_linen
from PIL import Image
import pytest
from runs import (
    FIELDS,
    Interrupter,
    Stop,
    check_same_end,
    contents,
    description,
    leave_pages_alone,
    of_digits,
    summary_text,
)
from safetensors.numpy import load_file, save_file
from test_restoration_runs import SIZES, draw, tiny

import dhp_jax as dhp
from dhp_jax.artifact.description import ArtifactError
from dhp_jax.config.methods import METHODS
from dhp_jax.errors import ArgumentError, ConfigError
from dhp_jax.models import registry
from dhp_jax.pipeline import command, phases, targets
from dhp_jax.pipeline.blueprint import begin
from dhp_jax.pipeline.execution import execute
from dhp_jax.pipeline.flags import define
from dhp_jax.pipeline.preparation import name_method, prepare
from dhp_jax.predict import main as predict
from dhp_jax.report.__main__ import main as report
from dhp_jax.tasks import evaluate

SHAPE = (8, 8, 1)
X = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
PLAIN, LATENT = "own_networks:Plain", "own_networks:OnLatents"
SOWING = "own_networks:Sowing"
LINEN = "own_networks:of_linen"
build = functools.partial(Plain, num_classes=10, channels=1)


def config_of(name=PLAIN, model=None, **fields):
    own = {k: v for k, v in FIELDS.items() if not k.startswith("model.")}
    config = of_digits()
    config.update_from_flattened_dict(own | {"batch_size": 640, "search.epochs": 1} | fields)
    config.model = {"name": name, **(model or {})}
    return config


def carry_out(workdir, name=PLAIN, model=None, observers=(), **fields):
    return execute(prepare(config_of(name, model, **fields), workdir, observers))


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    """No function is known but those that a test names."""
    monkeypatch.setattr(registry, "OWN", {})


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """What is needed of a finished run of the unpruned network, which has learnt nothing."""
    workdir = tmp_path_factory.mktemp("own") / "baseline"
    net = prepare(config_of(method="baseline"), workdir).blueprint.baseline()
    noted = {"phase": {"epochs": 1, "steps": 2, "met_budget": False}, "made_from": ""}
    dhp.save(workdir / "model", net, input_shape=SHAPE, **noted)
    return workdir


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The directory of a finished run, without plots."""
    workdir = tmp_path_factory.mktemp("own") / "dhp"
    with pytest.MonkeyPatch.context() as patch:
        leave_pages_alone(patch)
        carry_out(workdir)
    return workdir


def computed(model):
    return np.asarray(dhp.inference(model)(X))


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize(
    "method", ["l1_norm", *(pytest.param(m, marks=pytest.mark.slow) for m in ("taylor", "fade"))]
)
def test_a_method_that_starts_from_trained_weights_does_so(baseline, tmp_path, method):
    fields = {"search.epochs": 7, "converge.distillation.weight": 0.5 * (method != "l1_norm")}
    summary = carry_out(tmp_path / "run", method=method, source=str(baseline), **fields)
    assert (tmp_path / "run/teacher/model.json").exists() is (method != "l1_norm")
    assert 0.3 < summary["flops"]["ratio"] <= 0.5  # a head of the attention is a fifth of it
    assert summary["origin"]["run"] == "baseline"
    trained, small = (dhp.load(path) for path in (baseline / "model", tmp_path / "run/pruned"))
    kept = description(tmp_path / "run/pruned")["survivors"]
    if method != "fade":
        whole = np.asarray(trained.stem.kernel[...])
        np.testing.assert_array_equal(small.stem.kernel[...], whole[..., kept["stem"]])
    net = dhp.with_latents(trained, SHAPE, min_channels=1)
    assert kept.keys() == dhp.latents(net).keys()


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_search_that_learns_only_from_its_source_does_not_see_the_targets(
    baseline, tmp_path, weight
):
    given = {"method": "fade", "source": str(baseline), "search.epochs": 7, "converge.max_steps": 1}
    found = []
    for smoothing in (0.0, 0.5):
        workdir = tmp_path / str(smoothing)
        fields = {"search.distillation.weight": weight, "task.label_smoothing": smoothing}
        carry_out(workdir, **given, **fields)
        found.append(description(workdir / "search")["sha256"])
        taught = description(workdir / "teacher")["sha256"]
        assert taught == description(baseline / "model")["sha256"]
    assert (found[0] == found[1]) is (weight == 1.0)


@pytest.mark.usefixtures("without_pages")
def test_a_search_leaves_networks_and_a_report_and_another_takes_its_channels(searched, tmp_path):
    summary = json.loads((searched / "summary.json").read_text())
    registry.add_own(PLAIN)
    small, net = dhp.load(searched / "model"), dhp.load(searched / "search")
    found = dhp.measure_cost(small, SHAPE)
    assert (found.flops, found.params) == (summary["flops"]["after"], summary["params"]["after"])
    assert summary["flops"]["before"] == dhp.measure_cost(build(rngs=nnx.Rngs(0)), SHAPE).flops
    assert dhp.latents(net)
    assert not dhp.latents(small)
    page = (searched / "report.html").read_text()
    assert "Plain on digits" in page
    assert "/model&#34;, build=Plain)" in page
    assert f"--build={PLAIN}" in page
    fields = {"method": "scratch", "source": str(searched)}
    again = carry_out(tmp_path / "scratch", **fields)
    assert again["flops"] == summary["flops"]
    names = (searched / "pruned", tmp_path / "scratch/pruned")
    assert description(names[0])["survivors"] == description(names[1])["survivors"]


@pytest.mark.usefixtures("without_pages")
def test_a_finished_run_that_is_started_again_stays_as_it_is(searched):
    before = contents(searched)
    carry_out(searched)
    after = contents(searched)
    kept = [path for path in before if path.suffix in (".safetensors", ".jsonl")]
    assert kept
    assert all(before[path] == after[path] for path in kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", [PLAIN, LATENT])
def test_a_run_that_was_stopped_in_each_phase_ends_with_the_same_bits(searched, tmp_path, name):
    once = searched if name == PLAIN else tmp_path / "once"
    if name != PLAIN:
        carry_out(once, name)
    for phase in ("search", "converge"):
        often = {"observers": [Interrupter(phase, 1)], "checkpoint.seconds": 0}
        with pytest.raises(Stop):
            carry_out(tmp_path / "run", name, **often)
    carry_out(tmp_path / "run", name)
    check_same_end(tmp_path / "run", once)


@pytest.mark.slow
def test_several_sizes_of_one_search_are_those_of_a_run_of_each(searched, tmp_path):
    config = config_of(targets=(0.8, 0.5))
    large, small = targets.execute(targets.prepare(config, tmp_path), tmp_path)
    assert small["flops"]["ratio"] <= 0.5 < large["flops"]["ratio"] <= 0.8
    check_same_end(tmp_path / "0.5", searched)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "name"), [("denoising", "Restorer"), ("super_resolution", "RestorerOnLatents")]
)
def test_a_network_that_restores_images_is_pruned_and_restores_those_of_a_command(
    task, name, tmp_path, compiled_once
):
    for i, size in enumerate(SIZES):
        for split in ("train", "test"):
            draw(tmp_path / split / f"{i}.png", *size, i)
    config = tiny(task, tmp_path)
    config.model = {"name": f"own_networks:{name}"}
    summary = execute(prepare(config, tmp_path / "run"))
    assert summary["flops"]["ratio"] <= config.target
    small = dhp.load(tmp_path / "run/model")
    assert small.head.out_features < 6
    image = Image.open(tmp_path / "test/1.png").convert("L" if task == "denoising" else "RGB")
    image.save(tmp_path / "image.png")
    paths = [str(tmp_path / "run"), str(tmp_path / "image.png"), f"--out={tmp_path / 'out'}"]
    predict([*paths, f"--build=own_networks:{name}"])
    restored = np.asarray(Image.open(next((tmp_path / "out").iterdir())), np.float32)
    given = np.asarray(image, np.float32).reshape(1, *SIZES[1], -1)
    expected = np.clip(np.asarray(dhp.inference(small)(given))[0].squeeze(), 0, 255)
    assert restored.shape == expected.shape
    assert np.abs(restored - expected).max() <= 0.51


def test_a_module_that_a_file_names_is_imported_only_if_the_user_names_it(
    searched, capsys, monkeypatch
):
    with pytest.raises(ArtifactError, match=r"holds a network of 'own_networks:Plain'; expected l"):
        dhp.load(searched / "model")
    given = dhp.load(searched / "model", build=Plain)  # of the arguments that the run has noted
    leave_pages_alone(monkeypatch)
    report([str(searched), f"--build={PLAIN}"])
    np.testing.assert_array_equal(computed(dhp.load(searched / "model")), computed(given))
    capsys.readouterr()


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
def test_a_network_on_latents_goes_the_way_of_a_family(tmp_path):
    summary = carry_out(tmp_path / "run", LATENT)
    assert 0.4 < summary["flops"]["ratio"] <= 0.5
    small = dhp.load(tmp_path / "run/model")
    assert small.first.out_features == len(description(tmp_path / "run/model")["survivors"]["z1"])
    plan = prepare(config_of(LATENT, method="baseline"), tmp_path / "base").blueprint
    trained = plan.baseline()
    for made in (plan.of_trained(trained), plan.gated(trained)):
        assert dhp.latents(made).keys() == {"z1", "z2"} | {n for n in dhp.latents(made) if "." in n}
        np.testing.assert_allclose(computed(made), computed(trained), atol=1e-5)


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize(
    "method", ["l1_norm", *(pytest.param(m, marks=pytest.mark.slow) for m in ("fade", "dhp"))]
)
def test_a_network_of_flax_linen_goes_the_way_of_others(tmp_path, capsys, method):
    whole = of_linen(10, 1, nnx.Rngs(3))
    dhp.save(tmp_path / "net", whole)
    weights = {"weights": str(tmp_path / "net")}
    summary = carry_out(tmp_path / "run", LINEN, weights, method=method, **{"search.epochs": 7})
    assert 0.4 < summary["flops"]["ratio"] <= 0.5
    small = dhp.load(tmp_path / "run/model")
    module, x = InLinen(10), jnp.asarray(X)
    with dhp.pruned_linen():
        expected = module.apply(small.variables(), x)
    np.testing.assert_allclose(computed(small), expected, rtol=1e-4, atol=1e-5)
    before, after = (net.variables()["batch_stats"]["BatchNorm_0"] for net in (whole, small))
    kept = description(tmp_path / "run/pruned")["survivors"]["stem"]
    assert not np.array_equal(after["mean"], before["mean"][np.array(kept)])
    Image.new("L", (8, 8), 128).save(tmp_path / "image.png")
    capsys.readouterr()
    predict([str(tmp_path / "run"), str(tmp_path / "image.png"), f"--build={LINEN}"])
    assert re.search(r"image.png: \d [\d.]+%", capsys.readouterr().out)


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize(
    "method", ["baseline", *(pytest.param(m, marks=pytest.mark.slow) for m in ("dhp", "fade"))]
)
def test_a_network_whose_calls_leave_something_in_it_goes_the_way_of_others(tmp_path, method):
    dhp.save(tmp_path / "net", Sowing(num_classes=10, channels=1, rngs=nnx.Rngs(3)))
    model, fields = {"weights": str(tmp_path / "net")}, {"search.epochs": 7, "method": method}
    once = carry_out(tmp_path / "once", SOWING, model, **fields)
    if method != "baseline":
        assert once["flops"]["ratio"] <= 0.5
    for phase in METHODS[method].phases:
        often = {"observers": [Interrupter(phase, 1)], "checkpoint.seconds": 0}
        with pytest.raises(Stop):
            carry_out(tmp_path / "run", SOWING, model, **often, **fields)
    carry_out(tmp_path / "run", SOWING, model, **fields)
    check_same_end(tmp_path / "run", tmp_path / "once")


@pytest.mark.parametrize("name", [PLAIN, LATENT])
def test_fresh_weights_are_those_that_a_baseline_begins_with(tmp_path, name):
    run = prepare(config_of(name, method="uniform"), tmp_path / "run")
    phases.prune_to_budget(phases.Work(run, lambda: False, run.setup.read), "")
    small, whole = dhp.load(tmp_path / "run/pruned"), run.blueprint.baseline()
    kept = description(tmp_path / "run/pruned")["survivors"]
    if name == PLAIN:
        np.testing.assert_array_equal(
            small.stem.kernel[...], np.asarray(whole.stem.kernel[...])[..., kept["stem"]]
        )
        np.testing.assert_array_equal(
            small.head.kernel[...], np.asarray(whole.head.kernel[...])[kept["hidden"]]
        )
    else:  # drawn anew, for the network that is left
        for net in (small, whole):
            kernel = np.asarray(net.second.kernel[...])
            expected = np.sqrt(2 / np.prod(kernel.shape[:-1]))
            assert np.std(kernel) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_trained_weights_are_where_a_run_begins(tmp_path, kind, monkeypatch):
    leave_pages_alone(monkeypatch)
    model = build(rngs=nnx.Rngs(3))
    dhp.save(tmp_path / "net", model)
    arrays = load_file(tmp_path / "net/arrays.safetensors")
    save_file({k: v.astype(np.float16) for k, v in arrays.items()}, tmp_path / "half.safetensors")
    path = tmp_path / ("net" if kind == "folder" else "half.safetensors")
    config = config_of(model={"weights": str(path)}, method="l1_norm")
    run = prepare(config, tmp_path / "run")
    expected = arrays["hidden.kernel"]
    if kind == "file":
        expected = expected.astype(np.float16).astype(np.float32)
    for made in (run.blueprint.baseline(), run.blueprint.ordinary()):
        np.testing.assert_array_equal(made.hidden.kernel[...], expected)
    if kind == "folder":
        np.testing.assert_array_equal(run.blueprint.build()(X), model(X))
        summary = execute(run)
        kept = description(tmp_path / "run/pruned")["survivors"]["hidden"]
        left = dhp.load(tmp_path / "run/pruned").hidden
        np.testing.assert_array_equal(left.bias[...], arrays["hidden.bias"][kept])
        assert summary["origin"] is None
        given = build(rngs=nnx.Rngs(3))
        found = evaluate(given, run.setup.task, run.setup.read("test"), batch_size=64)
        assert summary["test"]["given"]["error"] == found["error"]
        assert "test error, given" in summary_text(summary)
        assert "given weights" in (tmp_path / "run/report.html").read_text()
        assert f"the weights in {path}" in (tmp_path / "run/report.html").read_text()


def test_weights_are_found_from_the_current_folder_also_when_a_run_goes_on(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    for seed, folder in ((3, tmp_path / "mine"), (4, tmp_path / "other")):
        dhp.save(folder / "net", build(rngs=nnx.Rngs(seed)))

    def prepared(weights):
        return prepare(config_of(model={"weights": weights}, method="baseline"), tmp_path / "run")

    monkeypatch.chdir(tmp_path)
    digest = prepared("mine/net").blueprint.digest
    dhp.save(tmp_path / "run/best", build(rngs=nnx.Rngs(3)))  # as of a run that has learnt
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"^config.model.weights: mine/net cannot be read: "):
        prepared("mine/net")
    assert prepared("../mine/net").blueprint.digest == digest
    assert prepared(str(tmp_path / "mine/net")).blueprint.digest == digest
    with pytest.raises(ValueError, match=r"^config.model.weights: expected the network that the "):
        prepared("../other/net")
    with pytest.raises(ValueError, match=r"config.model.weights is '.*/net' there and None here"):
        prepared(None)


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
def test_what_a_search_from_given_weights_leaves_may_learn_from_the_network_that_has_them(tmp_path):
    given = Sowing(num_classes=10, channels=1, rngs=nnx.Rngs(3))
    dhp.save(tmp_path / "net", given)
    fields = {"method": "dhp", "converge.distillation.weight": 0.5}
    carry_out(tmp_path / "run", SOWING, {"weights": str(tmp_path / "net")}, **fields)
    teacher = dhp.load(tmp_path / "run/teacher")
    given.eval()
    np.testing.assert_array_equal(computed(teacher), computed(given))


@pytest.mark.parametrize(
    "method",
    ["dhp", *(pytest.param(m, marks=pytest.mark.slow) for m in ("fade", "l1_norm", "baseline"))],
)
def test_a_family_starts_from_weights_too(tmp_path, method):
    arguments = {"depth": 8, "width": 0.25, "num_classes": 10, "channels": 1}
    trained = dhp.prune(dhp.models.build("resnet", **arguments, rngs=nnx.Rngs(5)))
    dhp.save(tmp_path / "net", trained)
    model = {"depth": 8, "width": 0.25, "weights": str(tmp_path / "net")}
    config = config_of("resnet", model, method=method, **{"search.epochs": 4})
    plan = prepare(config, tmp_path / method).blueprint
    networks = [plan.baseline(), plan.build(), plan.of_trained(plan.ordinary())]
    for made in (*networks, plan.gated(plan.ordinary())):
        made.eval()
        np.testing.assert_allclose(computed(made), computed(trained), atol=1e-5)


def test_the_shipped_configuration_takes_any_network_by_its_name():
    line = ["main.py", "--config=own_network", f"--config.model.name={PLAIN}"]
    assert begin(command.parse(line, define).config).name == PLAIN


def test_weights_are_given_on_the_command_line_whatever_the_file_has():
    line = ["main.py", "--config=own_network", "--config.model.weights"]
    config = command.parse([*line[:2], f"{line[2]}=net.safetensors"], define).config
    assert config.model.weights == "net.safetensors"
    assert command.parse([*line[:2], f"{line[2]}=None"], define).config.model.weights is None
    with pytest.raises(ValueError, match=r"^config.model.weights: expected --config.model.weights"):
        command.parse(line, define)


@pytest.mark.parametrize("relu6", [False, True])
def test_weights_of_a_family_are_of_a_network_that_computes_the_same(tmp_path, short_ones, relu6):
    arguments = {"width": 0.125, "num_classes": 10, "channels": 1}
    given = {**arguments, "stem_stride": 1, "relu6": True, "dropout": 0.2}
    trained = dhp.prune(filled(lambda rngs: dhp.models.build("mobilenet_v1", **given, rngs=rngs)))
    dhp.save(tmp_path / "net", trained)
    model = {"width": 0.125, "stem_stride": 1, "weights": str(tmp_path / "net"), "relu6": relu6}
    config = config_of("mobilenet_v1", model, method="l1_norm")
    if relu6:
        prepare(config, tmp_path / "run")
        return
    message = r"^config\.model\.relu6: expected True, as the network in .*net has it, got False$"
    with pytest.raises(ValueError, match=message):
        prepare(config, tmp_path / "run")


@pytest.fixture
def short_ones():
    with short():
        yield


WRONG = [
    (
        "nowhere:Net",
        {},
        r"model.name: expected module:function.*got 'nowhere:Net': No module named",
    ),
    ("own_networks:Nte", {}, r"model.name: expected module:function.*no attribute 'Nte'"),
    ("own_networks:without_rngs", {}, r"model.name: expected a function that takes rngs; got"),
    (
        "own_networks:a_number",
        {},
        r"model.name: expected a function that returns an nnx.Module, got 3",
    ),
    ("own_networks:of_three_classes", {}, r"model.name: expected outputs of shape \(1, 10\)"),
    ("own_networks:failing", {}, r"model.name: own_networks:failing: KeyError: 'no such layer'"),
    (PLAIN, {"szie": 8}, r"model.szie: unknown argument: expected one of .*did you mean 'size'"),
    (
        PLAIN,
        {"size": 2**21},
        r"model.size: expected null, true, false, a number of at most 1048576",
    ),
    (PLAIN, {"num_classes": 8}, r"model.num_classes: follows from config.data.name"),
    (LATENT, {"embedding": 1}, r"model.embedding: expected none, for the latents of .*, got 1$"),
    (PLAIN, {"weights": "nowhere"}, r"model.weights: nowhere cannot be read"),
]


@pytest.mark.parametrize(("name", "model", "message"), WRONG)
def test_a_network_that_is_none_is_refused_in_one_line(tmp_path, name, model, message):
    with pytest.raises(ValueError, match=f"^config.{message}") as error:
        prepare(config_of(name, model), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_latents_of_a_network_that_takes_no_floor_keep_what_a_run_asks_for(tmp_path):
    for least, expected in ((6, 6), (1, 2), (9, 8)):
        fields = {"search.min_channels": least, "target": 1.0}
        run = prepare(config_of("own_networks:of_two_each", **fields), tmp_path / str(least))
        trained = run.blueprint.ordinary()
        for net in (run.blueprint.build(), run.blueprint.gated(trained)):
            floors = {z.min_channels for z in dhp.latents(net).values() if z.prunable}
            assert floors == {expected}


@pytest.mark.parametrize("name", [PLAIN, LATENT])
def test_a_network_that_a_criterion_cannot_rank_is_refused_before_any_work(tmp_path, name):
    registry.add_own(name)
    sizes = {"num_classes": 10, "channels": 1, **({"min_channels": 1} if name == LATENT else {})}
    model = registry.build(name, **sizes, rngs=nnx.Rngs(3))
    dhp.save(tmp_path / "net", dhp.prune(model))
    config = config_of(name, {"weights": str(tmp_path / "net")}, method="norm_scale")
    latent = "attention.query" if name == PLAIN else "z1"
    message = (
        "^config.method: norm_scale cannot prune this network: expected a normalisation that "
        f"scales the channels of every prunable latent; '{re.escape(latent)}' has none$"
    )
    with pytest.raises(ConfigError, match=message):
        prepare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_that_a_method_refuses_in_a_run_is_told_in_one_line():
    with (
        pytest.raises(
            ConfigError, match=r"^config.method: fade cannot prune.*: expected 1, got 2$"
        ),
        name_method(config_of(method="fade")),
    ):
        raise ArgumentError("model", "1", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.kernel": None}, r"'head.kernel'.*: expected float32 of shape \(16, 10\); got none"),
        ({"head.bias": np.zeros(9)}, r"'head.bias'.* \(10,\); got float64 of shape \(9,\)"),
        ({"head.bias": np.zeros(10, int)}, r"'head.bias'.* \(10,\); got int64 of shape \(10,\)"),
        ({"head.bias": np.full(10, np.nan)}, r"'head.bias'.*: expected finite numbers"),
        ({"head.bias": np.full(10, 1e39)}, r"'head.bias'.*: expected finite numbers of float32"),
        ({"tail.bias": np.zeros(3)}, r"'tail.bias'.*: expected no such array"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_weights_that_are_of_another_network_are_refused(tmp_path, change, message):
    flat = nnx.to_flat_state(nnx.state(build(rngs=nnx.Rngs(0)), nnx.Not(nnx.RngState)))
    arrays = {".".join(place): np.asarray(x.get_value()) for place, x in flat} | change
    arrays = {name: x for name, x in arrays.items() if x is not None}
    save_file(arrays, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=f"^config.model.weights: array {message}"):
        prepare(config_of(model={"weights": str(tmp_path / "net.safetensors")}), tmp_path / "run")


def test_weights_and_a_source_are_one_too_many(tmp_path):
    fields = {"method": "l1_norm", "source": str(tmp_path)}
    with pytest.raises(ValueError, match=r"^config.model.weights: expected None.*config.source"):
        prepare(config_of(model={"weights": "net"}, **fields), tmp_path / "run")
    with pytest.raises(ValueError, match=r"^config.model.weights: expected None.*fresh weights"):
        prepare(config_of(model={"weights": "net"}, method="uniform"), tmp_path / "run")
