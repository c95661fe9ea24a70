"""Networks of PyTorch, whose outputs benchmarks/released.py has computed, are read as they are."""

import contextlib
import functools
import importlib
import json
import math
from pathlib import Path
import sys
from unittest import mock
import zlib

from flax import nnx
import jax.numpy as jnp
from networks import short
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax import cli, import_torch
from dhp_jax.artifact.weights import read_weights, take_weights
from dhp_jax.import_torch import network_of
from dhp_jax.models import resnet

pytestmark = pytest.mark.usefixtures("fast_compilation")
FIXTURE = Path(__file__).parent / "fixtures/released.json"
CASES = json.loads(FIXTURE.read_text())


def values(name, shape):
    """Numbers of a tensor, as the script draws them."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    last = name.rpartition(".")[2]
    if last == "running_var" or (last == "weight" and len(shape) == 1):
        return 0.6 + 0.3 * drawn
    if last == "weight":
        return math.sqrt(3 / math.prod(shape[1:])) * drawn
    if last == "weight2":
        return math.sqrt(3 / (shape[0] * math.prod(shape[2:]))) * drawn
    return drawn if "latent_vector" in last or last == "weight1" else 0.2 * drawn


def tensors_of(case):
    shapes = case["tensors"]
    owners = {name: shape if isinstance(shape, str) else name for name, shape in shapes.items()}
    return {name: values(owner, shapes[owner]) for name, owner in owners.items()}


@functools.cache
def imported(name):
    return network(CASES[name])


def network(case, tensors=None, **arguments):
    """What is made of a case's tensors; deep networks have as few blocks as those of the script."""
    with short(), mock.patch.dict(resnet.BLOCKS, {110: (2, 1, 1)}):
        tensors = tensors_of(case) if tensors is None else tensors
        return network_of(case["family"], tensors, **case["arguments"], **arguments)


def outputs(model, case):
    """Those of the network, in the order of PyTorch's axes."""
    images = 100 * values("images", case["images"]).transpose(0, 2, 3, 1)
    found = np.asarray(nnx.jit(lambda net, x: net(x))(model, jnp.asarray(images, jnp.float32)))
    return (found if found.ndim == 2 else found.transpose(0, 3, 1, 2)).ravel()


def is_like(model, case):
    expected = np.asarray(case["outputs"])
    return np.allclose(outputs(model, case), expected, rtol=1e-4, atol=1e-4 * np.std(expected))


# What is read pruned is read as it is whole, too.
WHOLE = [name for name in CASES if f"{name} pruned" in CASES]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in WHOLE)) for name in CASES]
)
def test_outputs_are_those_of_pytorch(name):
    assert is_like(imported(name), CASES[name])
    latents = dhp.latents(imported(name))
    assert bool(latents) == any(key.endswith("weight1") for key in CASES[name]["tensors"])


def test_a_search_network_searches_on_and_is_pruned():
    case = CASES["unet dhp"]
    model = imported("unet dhp")
    vectors = {name: np.asarray(z.value()) for name, z in dhp.latents(model).items()}
    known = {tuple(np.float32(values(name, shape))) for name, shape in case["tensors"].items()
             if "latent_vector" in name}  # fmt: skip
    assert {tuple(vector) for vector in vectors.values()} == known
    masks = dhp.survivors(model, threshold=0.3)
    assert sum(mask.sum() for mask in masks.values()) < sum(map(len, vectors.values()))
    whole = dhp.prune(model)
    assert is_like(whole, case)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("dncnn dhp pruned", {"head_activation": True}), ("mobilenet_v2", {"relu6": False})],
)
def test_activations_that_differ_between_networks_of_the_paper_matter(name, arguments):
    case = CASES[name]
    other = network(case, **arguments)
    assert not is_like(other, case)


# Files


@pytest.fixture
def save_tensors(tmp_path):
    """Saves a case's tensors as PyTorch does."""
    torch = pytest.importorskip("torch")

    def save(name, wrapped=lambda tensors: tensors):
        tensors = {key: torch.from_numpy(a) for key, a in tensors_of(CASES[name]).items()}
        torch.save(wrapped(tensors), tmp_path / "net.pt")
        return tmp_path / "net.pt"

    return save


def command(file, case):
    arguments = [f"{name}={value}" for name, value in case["arguments"].items()]
    return [str(file), f"--family={case['family']}", *arguments]


@pytest.mark.parametrize("name", ["dncnn", "unet dhp", "resnet dhp pruned"])
def test_the_command_saves_a_network_that_load_reads(name, tmp_path, monkeypatch, capsys):
    case = CASES[name]
    monkeypatch.setattr(import_torch, "read", lambda path: tensors_of(case))
    shape = (*case["images"][2:], case["images"][1])
    given = f"--input-shape={','.join(map(str, shape))}"
    mean, std = [1.5, 2, 3][: shape[-1]], [4, 5, 6][: shape[-1]]
    pixels = [f"--{name}={','.join(map(str, of))}" for name, of in (("mean", mean), ("std", std))]
    import_torch.main([*command(tmp_path / "net.pt", case), given, *pixels])
    assert case["family"] in capsys.readouterr().out
    model = dhp.load(tmp_path / "net")
    assert is_like(model, case)
    description = json.loads((tmp_path / "net/model.json").read_text())
    noted = {"imported_from": "net.pt", "mean": mean, "std": std}
    assert description["notes"] == {**noted, "input_shape": list(shape)}
    assert description["cost"]["params"] == dhp.measure_cost(model, shape).params


def test_other_arguments_of_the_command_are_refused(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net/notes.txt").touch()
    file = str(tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"^--out: expected no or an empty folder, or a saved"):
        import_torch.main([file, "--family=dncnn"])
    with pytest.raises(ValueError, match=r"^arguments: expected name=value, such as depth=56; got"):
        import_torch.main([file, "--family=dncnn", "depth", f"--out={tmp_path / 'other'}"])


def test_a_run_may_start_from_an_ordinary_network(tmp_path):
    case = CASES["dncnn"]
    dhp.save(tmp_path / "net", imported("dncnn"))
    model = dhp.prune(dhp.models.build("dncnn", **case["arguments"], rngs=nnx.Rngs(0)))
    take_weights(model, read_weights(tmp_path / "net"))  # as config.model.weights does
    model.eval()
    assert is_like(model, case)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mean=1,2,3"], "--mean, --std: expected both or none; got one of them"),
        (["--mean=1,2,3", "--std=1,2"], "--std: expected 3 positive numbers, one for each channel"),
        (["--mean=1", "--std=0"], "--std: expected 1 positive numbers, one for each channel; got"),
        (
            ["--mean=1,2", "--std=1,2", "--input-shape=8,8,3"],
            "--mean: expected 3 numbers, one for each channel; got (1.0, 2.0)",
        ),
        (
            ["--mean=1,x", "--std=1,2"],
            "--mean: expected numbers, such as 125.3,123.0,113.9; got '1",
        ),
        (["--mean=nan", "--std=1"], "--mean: expected numbers, such as 125.3,123.0,113.9; got 'n"),
        (["--input-shape=8,0"], "--input-shape: expected positive whole numbers, such as 32,32,3"),
    ],
)
def test_flags_that_nothing_can_be_made_of_are_refused_before_the_file_is_read(
    given, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["import_torch", str(tmp_path / "none.pt"), *given])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--family=resnet", "depth=8"])
    with contextlib.suppress(SystemExit):
        assert cli.run(import_torch.main) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["import_torch", "predict", "export.__main__", "report.__main__"]
)
def test_help_of_a_command_has_no_more_than_80_columns(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        importlib.import_module(f"dhp_jax.{command}").main(["--help"])
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    "wrapped",
    [dict, lambda t: {"state_dict": t}, lambda t: {f"module.{k}": v for k, v in t.items()}],
    ids=["tensors", "state_dict", "parallel"],
)
def test_tensors_of_a_file_are_those_that_pytorch_saved(save_tensors, wrapped):
    read = import_torch.read(save_tensors("dncnn", wrapped))
    expected = tensors_of(CASES["dncnn"])
    assert read.keys() == expected.keys()
    for name, tensor in read.items():
        np.testing.assert_array_equal(tensor, np.float32(expected[name]))


@pytest.mark.parametrize("content", [3, {"a": 3}, Path("x")], ids=["number", "numbers", "object"])
def test_a_file_of_something_else_is_refused(save_tensors, content):
    with pytest.raises(ValueError, match=r"net\.pt: expected (a state_dict|tensors)"):
        import_torch.read(save_tensors("dncnn", lambda _: content))


def test_without_pytorch_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r'^torch is not installed; run: pip install "dhp_jax\[to'):
        import_torch.read(tmp_path / "net.pt")


# What is refused


def changed(name, **tensors):
    case = CASES[name]
    given = tensors_of(case) | tensors
    given = {key: tensor for key, tensor in given.items() if tensor is not None}
    return lambda: network(case, given)


ONE = np.ones(1)
REFUSED = {
    "missing": (
        changed("dncnn", **{"body.1.body.0.weight": None}),
        r"^body\.1\.body\.0\.weight: expected a tensor of this name; got 15 others, such as bod",
    ),
    "shape": (
        changed("dncnn", **{"body.0.body.1.running_var": np.ones(5)}),
        r"^body\.0\.body\.1\.running_var: expected shape \(6,\); got shape \(5,\)$",
    ),
    "axes that are one": (
        changed("resnet", **{"features.1.0.body.3.weight": np.ones((7, 8, 3, 3))}),
        r"^features\.1\.0\.body\.3\.weight: expected shape \(8, 8, 3, 3\); got shape \(7,",
    ),
    "too many channels": (
        changed("dncnn", **{"head.0.weight": np.ones((9, 1, 3, 3))}),
        r"^head\.0\.weight: expected up to 6 output channels; got shape \(9, 1, 3, 3\)$",
    ),
    "an axis that is never pruned": (
        changed("resnet", **{"features.3.0.body.3.weight": np.ones((31, 32, 3, 3))}),
        r"^features\.3\.0\.body\.3\.weight: expected 32 output channels; got shape \(31, 32",
    ),
    "pixel shuffle": (
        changed("srresnet dhp pruned", **{"tail.0.upsampler1.weight": np.ones((27, 7, 3, 3))}),
        r"^tail\.0\.upsampler1\.weight: expected up to 32 output channels; got shape",
    ),
    "left over": (
        changed("dncnn", **{"body.2.body.0.weight": np.ones((6, 6, 3, 3))}),
        r"^body\.2\.body\.0\.weight: expected no such tensor in this DnCNN; got one$",
    ),
    "one number twice": (
        changed("srresnet", **{"tail.0.5.weight": np.asarray([0.7])}),
        r"^tail\.0\.5\.weight: expected the numbers of tail\.0\.2\.weight, with which it is one",
    ),
    "one latent twice": (
        changed("resnet dhp", **{"features.1.layer2.latent_vector": np.ones(8)}),
        r"^features\.1\.layer2\.latent_vector: expected the numbers of features\.0\.latent_v",
    ),
    "search of EDSR": (
        changed("edsr dhp pruned", **{"head.weight1": ONE}),
        r"^family: expected a pruned edsr, got a search network: all of its blocks read",
    ),
    "another family": (
        lambda: network_of("unet", tensors_of(CASES["dncnn"])),
        r"^down_convs\.0\.conv1\.weight: expected a tensor of this name; got 16 others",
    ),
    "unknown family": (
        lambda: network_of("densenet", {}),
        r"^family: expected one of dncnn, .*; got 'densenet'",
    ),
    "no depth": (lambda: network_of("resnet", {}), r"^depth: expected a value, got none$"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_other_tensors_are_refused_with_one_line(make, message):
    with pytest.raises(ValueError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    broken = changed("dncnn", **{"head.0.bias": np.full(6, np.nan)})()
    with pytest.raises(ValueError, match=r"^model: array 'head\.bias': expected finite numbers"):
        dhp.save(tmp_path / "net", broken)
