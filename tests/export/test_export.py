"""What is exported computes what the network computes, and is tried before anyone else does."""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import conftest
from flax import linen, nnx
import jax
from jax import export as jax_export
import jax.numpy as jnp
from networks import MIXED_INPUT, RNGS, Mixed, drawn_masks, filled, images, run
import numpy as np
import pytest
from runs import commanded

import dhp_jax as dhp
from dhp_jax.artifact.reading import read_description
from dhp_jax.cli import opened
from dhp_jax.core.surgery import prune as cut
from dhp_jax.files import unfinished

exporting = importlib.import_module("dhp_jax.export")
command = importlib.import_module("dhp_jax.export.__main__")
ROOT = Path(__file__).parents[2]
FREE = ("batch", "height", "width")
FAMILIES = {  # arguments, input, and the sizes that are free in StableHLO and in ONNX
    "resnet": ({"depth": 20, "width": 0.25}, (8, 8, 3), FREE, FREE),
    "resnet18": ({"depth": 18, "width": 0.05}, (16, 16, 3), FREE, FREE),
    "vgg": ({"depth": 11, "width": 0.05}, (8, 8, 3), FREE, FREE),
    "densenet": ({"depth": 7, "growth": 4}, (8, 8, 3), FREE, FREE),
    "mobilenet_v1": ({"width": 0.1}, (16, 16, 3), FREE, FREE),
    "mobilenet_v2": ({"width": 0.1, "dtype": "bfloat16"}, (16, 16, 3), FREE, FREE),
    "unet": (
        {"depth": 3, "features": 4, "batch_norm": True},
        (8, 8, 1),
        ("batch", "4*height", "4*width"),
        ("batch", 8, 8),
    ),
    "srresnet": ({"scale": 2, "blocks": 1, "features": 8}, (6, 6, 3), FREE, FREE),
    "edsr": ({"scale": 3, "blocks": 1, "features": 8}, (6, 6, 3), FREE, FREE),
    "dncnn": ({"depth": 4, "features": 6}, (8, 8, 1), FREE, FREE),
}


def needs(format):
    if format == "onnx":
        return pytest.mark.onnx
    missing = [name for name in exporting.NEEDS[format] if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


FORMATS = [pytest.param(name, marks=needs(name)) for name in exporting.NEEDS]


@functools.cache
def cut_once(name):
    arguments, shape, *_ = FAMILIES[name]
    family = name.removesuffix("18")
    model = filled(lambda _: dhp.models.build(family, rngs=RNGS, **arguments))
    return cut(model, drawn_masks(model, 0)), shape


def pruned(name):
    small, shape = cut_once(name)
    return nnx.clone(small), shape


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("unet", "dncnn") else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_every_family_is_exported_for_sizes_as_free_as_it_takes_them(tmp_path, name, format):
    small, shape = pruned(name)
    made = exporting.export(small, tmp_path / "out", shape, format=format)
    free = {
        "stablehlo": FAMILIES[name][2],
        "onnx": FAMILIES[name][3],
        "safetensors": ("batch", *shape[:2]),
    }[format]
    assert made.shape == (*free, shape[-1])
    tried = {"random"} | ({"another size"} if format != "safetensors" else set())
    assert made.differences.keys() == tried
    exact = max(1.0, made.largest) * (0.05 if "v2" in name else 1e-5)
    assert max(made.differences.values()) <= exact
    assert (made.fixed is None) == (format == "safetensors" or free[1] != shape[0])
    assert (made.folded == 0) == (name == "densenet")


@needs("stablehlo")
def test_stablehlo_is_for_three_platforms_and_needs_nothing_of_ours(tmp_path):
    small, shape = pruned("dncnn")
    path = tmp_path / "small.stablehlo"
    exporting.export(small, path, shape, format="stablehlo")
    read = jax_export.deserialize(bytearray(path.read_bytes()))
    assert set(read.platforms) == {"cpu", "cuda", "tpu"}
    x = images(3, 10, 9, 1)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy as np; from jax import export\n"
        f"read = export.deserialize(bytearray(open({str(path)!r}, 'rb').read()))\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, read.call(np.load({str(tmp_path / 'x.npy')!r})))\n"
        "assert not {'dhp_jax', 'flax'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    expected = run(small, x)[0]
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-4, atol=1e-4)


@needs("onnx")
def test_onnx_has_one_convolution_a_layer_and_the_notes(tmp_path):
    import onnx

    small, shape = pruned("dncnn")
    path = tmp_path / "small.onnx"
    notes = {"task": "denoising", "sigma": 70}
    exporting.export(small, path, shape, format="onnx", notes=notes)
    read = onnx.load(path)
    operations = [node.op_type for node in read.graph.node]
    assert operations.count("Conv") == 4
    assert "BatchNormalization" not in operations
    assert {each.key: json.loads(each.value) for each in read.metadata_props} == notes
    onnx.checker.check_model(read)


class Averaging(nnx.Module):
    """The mean of an image that a convolution has halved, in the padding that is Flax's default."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 3, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x):
        return self.conv(x).mean(axis=(1, 2))


@needs("onnx")
def test_onnx_files_divide_a_halved_image_by_its_size_where_that_is_odd(tmp_path):
    made = exporting.export(filled(Averaging), tmp_path / "out", (8, 8, 1), format="onnx")
    assert made.shape == (*FREE, 1)  # tried on 9x10 pixels too
    assert max(made.differences.values()) < 1e-5
    assert made.fixed is None


def test_safetensors_are_a_folded_network_that_load_reads(tmp_path):
    model = filled(Mixed)
    small = cut(model, drawn_masks(model, 0))
    made = exporting.export(
        small, tmp_path / "out", MIXED_INPUT, format="safetensors", build=Mixed, notes={"seed": 3}
    )
    assert (made.folded, made.shape) == (2, ("batch", *MIXED_INPUT))
    x = images(2, *MIXED_INPUT)
    loaded = dhp.load(tmp_path / "out", build=Mixed)
    np.testing.assert_allclose(run(loaded, x)[0], run(small, x)[0], rtol=1e-4, atol=1e-5)
    assert read_description(tmp_path / "out")["notes"] == {"seed": 3}


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch, format):
    small, shape = pruned("dncnn")

    def wrong(model, *arguments, **options):
        model.tail.bias.set_value(model.tail.bias[...] + 1)
        return exporting_writer(model, *arguments, **options)

    exporting_writer = exporting.WRITERS[format]
    monkeypatch.setitem(exporting.WRITERS, format, wrong)
    with pytest.raises(
        exporting.ExportError,
        match=r"^export: outputs on random, of shape \(\d, \S+ \S+ 1\), differ .* up to 1",
    ):
        exporting.export(small, tmp_path / "out", shape, format=format)
    assert list(tmp_path.iterdir()) == []


class Doubling(nnx.Module):
    """The smallest network that can be exported."""

    def __init__(self, rngs):
        self.factor = nnx.Param(jnp.full(1, 2.0))

    def __call__(self, x):
        return self.factor[...] * x


def lay(path, there):
    """Puts something where an export is to be written."""
    if there == "file":
        path.write_bytes(b"an earlier one")
    elif there == "link":
        path.with_name("earlier").write_bytes(b"an earlier one")
        path.symlink_to("earlier")
    elif there == "network":
        dhp.save(path, Doubling(nnx.Rngs(1)), seed=1)
    elif there != "nothing":
        path.mkdir()
        if there == "thesis":
            (path / "thesis.txt").write_text("years of work")


def tree(folder):
    """Every path below a folder, with the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def raising(model, path, *arguments, **options):
    """A writer that fails in the middle."""
    path.write_bytes(b"half")
    raise RuntimeError("the converter fails")


def killed(model, path, *arguments, **options):
    path.mkdir()
    (path / "half").write_bytes(b"half")
    raise KeyboardInterrupt


def computing(factor):
    """A writer of a file that computes multiples of its inputs."""

    def write(model, path, *arguments, **options):
        path.write_bytes(b"whole")
        return lambda x: factor * x

    return write


@pytest.mark.parametrize("there", ["nothing", "empty", "thesis", "network", "file", "link"])
@pytest.mark.parametrize("format", exporting.NEEDS)
def test_a_failed_export_leaves_what_was_there(tmp_path, monkeypatch, format, there):
    monkeypatch.setitem(exporting.NEEDS, format, ())
    lay(tmp_path / "out", there)
    (tmp_path / "beside.txt").write_text("of somebody else")
    before = tree(tmp_path)
    folder = format == "safetensors"
    options = {"format": format, "build": Doubling if folder else None}
    fit = ("nothing", "empty", "network") if folder else ("nothing", "file", "link")
    for write in (raising, killed, computing(3)):
        monkeypatch.setitem(exporting.WRITERS, format, write)
        with pytest.raises((ValueError, KeyboardInterrupt, exporting.ExportError)) as caught:
            exporting.export(Doubling(nnx.Rngs(0)), tmp_path / "out", (2, 2, 3), **options)
        assert (there not in fit) == str(caught.value).startswith("path: expected ")
        assert tree(tmp_path) == before


class Counting(Doubling):
    """Writes a variable in every call, in evaluation mode too."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return super().__call__(x)


@needs("stablehlo")
def test_a_network_that_writes_its_variables_is_exported(tmp_path):
    model = Counting(nnx.Rngs(0))
    made = exporting.export(model, tmp_path / "out", (2, 2, 3), format="stablehlo")
    assert max(made.differences.values()) == 0
    assert model.calls[...] == 0


class Small(nnx.Module):
    """Two outputs, one of them small, as those of a softmax over many classes."""

    dtype = jnp.bfloat16

    def __call__(self, x):
        return x, 0.01 * x


@pytest.mark.parametrize("wrong", [jnp.nan, -0.01])
def test_a_second_output_that_is_wrong_is_seen(tmp_path, monkeypatch, wrong):
    monkeypatch.setitem(exporting.NEEDS, "stablehlo", ())

    def write(model, path, *arguments, **options):
        path.write_bytes(b"whole")
        return lambda x: (x, wrong * x)

    monkeypatch.setitem(exporting.WRITERS, "stablehlo", write)
    inputs = {"two": np.full((1, 2, 2, 3), 2.0, np.float32)}
    with pytest.raises(exporting.ExportError, match=r"^export: outputs on two, "):
        exporting.export(Small(), tmp_path / "out", (2, 2, 3), format="stablehlo", inputs=inputs)


class Noisy(nnx.Module):
    """Noise in evaluation mode too, or only in training."""

    def __init__(self, always):
        self.always, self.training, self.rngs = always, True, nnx.Rngs(0)

    def train(self, **attributes):
        self.training = True

    def eval(self, **attributes):
        self.training = False

    def __call__(self, x):
        drawn = self.always or self.training
        return x + 1j * jax.random.normal(self.rngs.noise(), (3,)) if drawn else x + 1j


def test_a_network_that_draws_random_numbers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(exporting.NEEDS, "stablehlo", ())
    with pytest.raises(
        ValueError, match=r"^model: expected a network that draws no .*got draws of rngs"
    ):
        exporting.export(Noisy(True), tmp_path / "out", (3,), format="stablehlo")
    assert not list(tmp_path.iterdir())


class Recurrent(nnx.Module):
    """Draws a key for a first state that is zero."""

    def __init__(self):
        self.rnn = nnx.RNN(nnx.SimpleCell(3, 2, rngs=nnx.Rngs(0)))

    def __call__(self, x):
        return self.rnn(x)


def test_a_key_from_which_no_output_follows_is_no_draw(tmp_path, monkeypatch):
    monkeypatch.setitem(exporting.NEEDS, "stablehlo", ())

    def write(model, path, *arguments, **options):
        path.write_bytes(b"whole")
        return model

    monkeypatch.setitem(exporting.WRITERS, "stablehlo", write)
    exporting.export(Recurrent(), tmp_path / "out", (4, 3), format="stablehlo")
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [False, True])
def test_imaginary_parts_are_compared_too(tmp_path, monkeypatch, wrong):
    monkeypatch.setitem(exporting.NEEDS, "stablehlo", ())

    def write(model, path, *arguments, **options):
        path.write_bytes(b"whole")
        return lambda x: x - 1j if wrong else x + 1j

    monkeypatch.setitem(exporting.WRITERS, "stablehlo", write)
    with pytest.raises(exporting.ExportError) if wrong else contextlib.nullcontext():
        exporting.export(Noisy(False), tmp_path / "out", (3,), format="stablehlo")
    assert (tmp_path / "out").exists() is not wrong


def exported(tmp_path, monkeypatch, model, run, shape=(3,)):
    """What is said of a file that computes what `run` does."""

    def write(model, path, *arguments, **options):
        path.write_bytes(b"whole")
        return run

    monkeypatch.setitem(exporting.NEEDS, "stablehlo", ())
    monkeypatch.setitem(exporting.WRITERS, "stablehlo", write)
    return exporting.export(model, tmp_path / "out", shape, format="stablehlo")


class Returning(nnx.Module):
    """A network that is a function."""

    def __init__(self, function):
        self.function = nnx.static(function)

    def __call__(self, x):
        return self.function(x)


@pytest.mark.parametrize(("instead", "off"), [(-1e30, 0.0), (-np.inf, 0.1), (-np.inf, 0.0)])
def test_infinite_outputs_are_compared_and_hide_no_others(tmp_path, monkeypatch, instead, off):
    model = Returning(lambda x: jnp.where(jnp.arange(3) < 2, x, -jnp.inf))
    right = (instead, off) == (-np.inf, 0.0)
    with contextlib.nullcontext() if right else pytest.raises(exporting.ExportError):
        made = exported(
            tmp_path, monkeypatch, model, lambda x: jnp.where(jnp.arange(3) < 2, x + off, instead)
        )
        assert made.largest < 10
    assert (tmp_path / "out").exists() is right


def test_an_empty_output_is_no_difference(tmp_path, monkeypatch):
    made = exported(tmp_path, monkeypatch, Returning(lambda x: x[:, :0]), lambda x: x[:, :0])
    assert max(made.differences.values()) == 0


def test_what_is_computed_in_bfloat16_may_round_wherever_that_is(tmp_path, monkeypatch):
    model = Returning(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32))
    made = exported(tmp_path, monkeypatch, model, lambda x: x, (64,))
    assert max(made.differences.values()) > 1e-3 * made.largest
    with pytest.raises(exporting.ExportError):
        exported(tmp_path, monkeypatch, Returning(lambda x: x), lambda x: 1.01 * x)


def test_a_file_that_is_right_for_some_batches_takes_one_example(tmp_path, monkeypatch, caplog):
    made = exported(
        tmp_path, monkeypatch, Returning(lambda x: x), lambda x: x if len(x) < 3 else 2 * x
    )
    assert made.shape == (1, 3)
    assert made.fixed.startswith("outputs on another size, of shape (3, 3), differ")
    assert f"takes one example at a time, for: {made.fixed}" in caplog.text


class Texts(nnx.Module):
    """Scores of tokens, of which some count; a convolution and its BatchNorm can be folded."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(20, 6, rngs=rngs)
        self.conv, self.norm = nnx.Conv(6, 8, (3,), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 20, rngs=rngs)

    def __call__(self, tokens, places, counts):
        x = self.embed(tokens) * jnp.cos(places)[:, None]
        return self.head(nnx.relu(self.norm(self.conv(x)))) * counts[..., None]


def of_texts(n, length=5):
    rng = np.random.default_rng(n)
    counts = rng.integers(2, size=(n, length)).astype(bool)
    return rng.integers(20, size=(n, length)), np.arange(float(length)), counts


@pytest.mark.parametrize("format", FORMATS)
def test_several_inputs_some_of_them_integers(tmp_path, format):
    network, path = filled(Texts), tmp_path / "out"
    made = exporting.export(network, path, of_texts(3), format=format, build=building(format))
    assert made.shape == (("batch", 5), (5,), ("batch", 5))
    assert (made.folded, made.fixed) == (1, None)
    assert "given" in made.differences
    assert max(made.differences.values()) < 1e-5
    network.eval()
    given = of_texts(7)
    found = read_again(path, format)(*given)
    np.testing.assert_allclose(found, network(*given), atol=1e-5)


def building(format):
    return Texts if format == "safetensors" else None


def read_again(path, format):
    """What a file computes, as its reader has it."""
    if format == "safetensors":
        return dhp.load(path, build=Texts)
    if format == "stablehlo":
        return jax_export.deserialize(bytearray(path.read_bytes())).call
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    kinds = {"tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(bool)": bool}
    inputs = [(each.name, kinds[each.type]) for each in session.get_inputs()]
    assert [name for name, _ in inputs] == ["input_0", "input_1", "input_2"]
    return lambda *given: session.run(
        None, {name: x.astype(kind) for (name, kind), x in zip(inputs, given, strict=True)}
    )[0]


def by_name(network, batch):
    return {"scores": network(batch["tokens"], *batch["rest"])}


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_by_name_of_a_call_of_ones_own(tmp_path, format):
    tokens, *rest = of_texts(3)
    batch = {"rest": rest, "tokens": tokens}
    made = exporting.export(
        filled(Texts), tmp_path / "out", batch, format=format, call=by_name, build=building(format)
    )
    assert made.shape == ((5,), ("batch", 5), ("batch", 5))
    assert (made.folded, made.fixed) == (1, None)
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "out", providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        assert names == ["rest.0", "rest.1", "tokens"]
    assert max(made.differences.values()) < 1e-5


@needs("stablehlo")
def test_sizes_are_those_given_where_the_batch_cannot_be_free(tmp_path, caplog):
    network = Returning(lambda x: x.reshape(2, -1) + jnp.arange(6))
    x = np.ones((3, 4), np.int32)
    made = exporting.export(network, tmp_path / "out", x, format="stablehlo")
    assert made.shape == (3, 4)
    assert made.fixed is not None
    assert "takes inputs of these sizes only" in caplog.text
    with pytest.raises(ValueError, match=r"^inputs: expected inputs of \(3, 4\) among them, got"):
        exporting.export(
            network, tmp_path / "out", x, format="stablehlo", inputs={"other": np.ones((4, 4), int)}
        )


@pytest.mark.parametrize("format", FORMATS)
def test_an_input_without_axes(tmp_path, format):
    build = Doubling if format == "safetensors" else None
    x = jnp.float32(3)
    made = exporting.export(Doubling(RNGS), tmp_path / "out", x, format=format, build=build)
    assert (made.shape, made.largest, made.differences["given"]) == ((), 6.0, 0.0)


def test_an_array_that_looks_like_a_batch_and_is_none_fixes_the_sizes(tmp_path, monkeypatch):
    monkeypatch.setitem(exporting.NEEDS, "stablehlo", ())
    of_five = (np.ones((5, 5), np.int32), np.arange(5.0), np.ones((5, 5), bool))
    network = filled(Texts)
    network.eval()

    def write(model, path, arguments, call, notes):
        path.write_bytes(b"whole")
        return network

    monkeypatch.setitem(exporting.WRITERS, "stablehlo", write)
    made = exporting.export(network, tmp_path / "out", of_five, format="stablehlo")
    assert made.shape == ((5, 5), (5,), (5, 5))


@pytest.mark.parametrize(
    ("given", "inputs", "message"),
    [
        (
            (jax.ShapeDtypeStruct((3, 5), np.int32),),
            None,
            r"inputs: .* for int32\[3, 5\] is not ran",
        ),
        (np.ones((3, 5), int), {}, r"inputs: expected inputs like int32\[3, 5\] by name, got {}"),
        (np.ones((3, 5), int), np.ones((3, 5), int), r"inputs: expected .* by name, got array"),
        (np.ones((3, 5), int), {"a": np.ones(3, int)}, r"inputs: .* got 'a': int32\[3\]$"),
        (np.ones((3, 5), int), {"a": np.full((3, 5), "x")}, "inputs: .* by name, got 'a': array"),
        (np.ones((3, 5), "u1"), {"a": np.full((3, 5), 300)}, "inputs: .*uint8.*, got 'a': int32"),
        ({"a": np.ones((3, 5), int)}, {"a": {"b": np.ones((3, 5), int)}}, "inputs: .*, got 'a': "),
        (np.ones((3, 5), int), {"a": np.ones((3, 5))}, r"inputs: .* got 'a': float32\[3, 5\]$"),
        (np.ones((3, 5), int), {"a": (np.ones((3, 5), int),) * 2}, "inputs: .* by name, got"),
        ({}, None, r"input_shape: expected a shape, or arrays of numbers, got {}"),
        (jax.random.key(0), None, r"input_shape: expected a shape, or arrays of numbers, got"),
        ((4,), None, r"input_shape: the model does not take \(4,\): .*integer"),
    ],
)
def test_inputs_of_which_no_file_can_be_made_are_told_in_one_line(tmp_path, given, inputs, message):
    network = nnx.Embed(3, 2, rngs=RNGS)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        exporting.export(
            network, tmp_path / "out", given, format="safetensors", inputs=inputs, build=Small
        )
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [None, (0, 2, 2, 3), (2, 2, 3)])
def test_inputs_that_are_no_batches_are_refused(tmp_path, shape):
    inputs = {} if shape is None else {"a": np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=r"^inputs: expected batches of \(2, 2, 3\) by name, got"):
        exporting.export(
            Small(), tmp_path / "out", (2, 2, 3), format="safetensors", inputs=inputs, build=Small
        )


@pytest.mark.parametrize("there", ["nothing", "file", "link"])
def test_a_file_that_was_tried_replaces_the_earlier_one(tmp_path, monkeypatch, there):
    monkeypatch.setitem(exporting.NEEDS, "stablehlo", ())
    monkeypatch.setitem(exporting.WRITERS, "stablehlo", computing(2))
    lay(tmp_path / "out", there)
    part = unfinished(Path(os.path.realpath(tmp_path / "out")))
    part.mkdir()  # of a process that was killed
    model = Doubling(nnx.Rngs(0))
    made = exporting.export(model, tmp_path / "out", (2, 2, 3), format="stablehlo")
    assert made.path == tmp_path / "out"
    assert made.path.read_bytes() == b"whole"
    assert made.path.is_symlink() == (there == "link")
    assert not part.exists()


class Sorting(nnx.Module):
    """Takes images of one size only."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.linear = nnx.Linear(4 * 36, 5, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x)
        assert x.shape[1] == 6
        return self.linear(x.reshape(-1, 4 * 36))


class Unwritable(nnx.Module):
    def __call__(self, x):
        return jnp.asarray(np.asarray(x))


@needs("stablehlo")
def test_a_network_of_one_batch_size_is_exported_for_one_example(tmp_path):
    small = dhp.prune(filled(Mixed))  # asks for len(x)
    path = tmp_path / "out"
    made = exporting.export(small, path, MIXED_INPUT, format="stablehlo")
    assert made.shape == (1, *MIXED_INPUT)
    assert made.fixed.endswith("so write x.shape[0] for len(x)")
    x = images(1, *MIXED_INPUT)
    found = jax_export.deserialize(bytearray(path.read_bytes())).call(x)
    np.testing.assert_allclose(found, run(small, x)[0], rtol=1e-4, atol=1e-5)


class OfRank(nnx.Module):
    """A network on signals, images or volumes, by the number of its spatial axes."""

    def __init__(self, rank, rngs):
        signal, self.z = dhp.Latent(2, prunable=False, rngs=rngs), dhp.Latent(6, rngs=rngs)
        self.conv = dhp.HyperConv(signal, self.z, (3,) * rank, rngs=rngs)
        self.norm = dhp.BatchNorm(self.z, rngs=rngs)
        self.head = dhp.Linear(dhp.concat(*[self.z] * 4**rank), 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1))


@needs("stablehlo")
@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_networks_of_any_rank_are_folded_and_exported(tmp_path, rank):
    model, shape = filled(lambda rngs: OfRank(rank, rngs)), (4,) * rank + (2,)
    small, path = cut(model, drawn_masks(model, 0)), tmp_path / "out"
    made = exporting.export(small, path, shape, format="stablehlo")
    assert (made.shape, made.folded) == (("batch", *shape), 1)
    x = images(3, *shape)
    expected = run(small, x)[0]
    folded = dhp.fold(small, shape)
    assert type(folded.norm).__name__ == "Identity"
    np.testing.assert_allclose(run(folded, x)[0], expected, rtol=1e-4, atol=1e-5)
    found = jax_export.deserialize(bytearray(path.read_bytes())).call(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class Parted(nnx.Module):
    """A network of several outputs, arranged as it is told to."""

    def __init__(self, arrange, rngs):
        self.conv, self.arrange = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.static(arrange)

    def __call__(self, x):
        y = self.conv(x)
        return self.arrange(y, y.mean((1, 2)))


def _in_dict(image, score):
    return {"score": score, "image": image}


def _in_tuple(image, score):
    return image, score


def _first(image, score):
    return image


def _named_as_others_are(image, score):
    return {"images": image, "a.b": score, "a": {"b": score}}


@pytest.mark.parametrize(
    ("arrange", "names"),
    [
        (_first, ["output"]),
        (_in_tuple, ["output_0", "output_1"]),
        (_in_dict, ["image", "score"]),
        (_named_as_others_are, ["a.b", "a.b_1", "output_images"]),
    ],
)
def test_outputs_are_named_as_the_network_names_them(arrange, names):
    model = Parted(arrange, nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32)
    assert exporting.writers.output_names(model, (x,), lambda model, x: model(x)) == names


@needs("onnx")
def test_onnx_outputs_have_these_names(tmp_path):
    import onnxruntime

    model, path = Parted(_in_dict, nnx.Rngs(0)), tmp_path / "out.onnx"
    exporting.export(model, path, (6, 6, 3), format="onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images(2, 6, 6, 3)
    image, score = session.run(["image", "score"], {"images": np.asarray(x)})
    np.testing.assert_allclose(image, model.conv(x), atol=1e-5)
    np.testing.assert_allclose(score, model.conv(x).mean((1, 2)), atol=1e-5)


@needs("onnx")
def test_an_input_or_output_that_is_returned_again_is_written(tmp_path):
    import onnxruntime

    model, path = Returning(lambda x: (x, 2 * x, *[3 * x] * 2)), tmp_path / "out.onnx"
    made = exporting.export(model, path, (3,), format="onnx")
    assert made.shape == ("batch", 3)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.asarray(images(5, 3))
    for found, factor in zip(session.run(None, {"images": x}), (1, 2, 3, 3), strict=True):
        np.testing.assert_allclose(found, factor * x, rtol=1e-6)


@needs("onnx")
def test_an_onnx_file_is_written_of_a_network_that_writes_its_variables(tmp_path):
    made = exporting.export(Counting(nnx.Rngs(0)), tmp_path / "out", (3,), format="onnx")
    assert made.shape == ("batch", 3)


class Linen(linen.Module):
    """A network whose layers may compute in bfloat16."""

    dtype: Any = None

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Conv(32, (3, 3), use_bias=False, dtype=self.dtype)(x)
        x = linen.relu(linen.BatchNorm(not train, dtype=self.dtype)(x))
        return linen.Dense(3, dtype=self.dtype)(linen.GroupNorm(2, dtype=self.dtype)(x))


@needs("onnx")
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_pruned_networks_of_linen_are_folded_and_written_as_onnx(tmp_path, dtype):
    import onnx

    module, path = Linen(dtype), tmp_path / "out.onnx"
    variables = module.init(jax.random.key(0), jnp.ones((1, 6, 6, 3)))
    model = dhp.FromLinen(module, variables, training={"train": True})
    small = dhp.prune_to(dhp.with_latents(model, (6, 6, 3)), flops=0.6)
    small = filled(lambda _: small)
    made = exporting.export(small, path, (6, 6, 3), format="onnx")
    assert (made.shape, made.folded) == ((*FREE, 3), 1)
    assert max(made.differences.values()) <= (1e-5 if dtype is None else 0.05) * made.largest
    kernels = [w.dims for w in onnx.load(path).graph.initializer if len(w.dims) == 4]
    assert max(max(dims) for dims in kernels) < 32


BY_NAME = "; jax2onnx takes these by name only, as nnx.max_pool(x, window_shape=(2, 2))"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda pooled: pooled(1, 2), BY_NAME),
        (
            lambda pooled: pooled(1, shape=2),
            "; jax2onnx takes these without names only, in their order",
        ),
    ],
)
def test_how_jax2onnx_wants_the_arguments_of_what_it_replaces_is_told(
    tmp_path, monkeypatch, call, told
):
    def write(model, *arguments, **options):
        def pooled(x, *, window):
            return x

        call(pooled)

    monkeypatch.setitem(exporting.NEEDS, "onnx", ())
    monkeypatch.setitem(exporting.WRITERS, "onnx", write)
    with pytest.raises(ValueError, match=r"^model: .* as onnx: TypeError: pooled\(\) ") as caught:
        exporting.export(Doubling(nnx.Rngs(0)), tmp_path / "out", (2, 2, 3), format="onnx")
    assert str(caught.value).endswith(told)


class Pooled(nnx.Module):
    def __init__(self, named, rngs):
        self.conv, self.named = nnx.Conv(3, 4, (3, 3), rngs=rngs), named

    def __call__(self, x):
        window = {"window_shape": (2, 2), "strides": (2, 2)}
        x = self.conv(x)
        return nnx.max_pool(x, **window) if self.named else nnx.max_pool(x, *window.values())


@needs("onnx")
def test_what_jax2onnx_takes_by_name_only_is_told_and_is_written_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"by name only, as nnx.max_pool\(x, window_shape="):
        exporting.export(Pooled(False, nnx.Rngs(0)), tmp_path / "out", (6, 6, 3), format="onnx")
    made = exporting.export(Pooled(True, nnx.Rngs(0)), tmp_path / "out", (6, 6, 3), format="onnx")
    assert made.path.is_file()


@needs("stablehlo")
def test_a_network_of_one_size_is_exported_for_it(tmp_path):
    made = exporting.export(filled(Sorting), tmp_path / "out", (6, 6, 3), format="stablehlo")
    assert made.shape == ("batch", 6, 6, 3)
    assert made.fixed.startswith("AssertionError")


def test_the_command_tells_why_height_and_width_are_fixed(tmp_path, capsys, monkeypatch):
    def write(model, path, *arguments, **options):
        path.write_bytes(b"right for one size")
        return lambda x: (2 if x.shape[1] == 2 else 3) * x

    monkeypatch.setitem(exporting.NEEDS, "onnx", ())
    monkeypatch.setitem(exporting.WRITERS, "onnx", write)
    dhp.save(tmp_path / "own", Doubling(nnx.Rngs(0)), input_shape=(2, 2, 3))
    code, out, _ = told(capsys, tmp_path / "own", "--format=onnx", "--build=test_export:Doubling")
    takes, fixed, _ = out.splitlines()
    assert (code, " takes (batch, 2, 2, 3) in float32" in takes) == (0, True)
    assert fixed.startswith(
        "height and width are fixed, because with free ones: outputs on another size, of shape "
        "(3, 3, 4, 3), differ from the network's by up to "
    )


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Unwritable, {"format": "stablehlo"}, "input_shape: .* on traced array"),
        (lambda: filled(Mixed), {"format": "stablehlo"}, "^model: .*without latents, got 4"),
        (Unwritable, {"format": "tflite"}, "^format: expected one of .*; got 'tflite'$"),
        (Unwritable, {"format": "safetensors"}, "^build: expected the function that builds"),
        (
            Unwritable,
            {"format": "stablehlo", "build": Mixed},
            "^build: expected none for stablehlo",
        ),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(tmp_path, monkeypatch, make, options, message):
    monkeypatch.setitem(exporting.NEEDS, "stablehlo", ())
    with pytest.raises(ValueError, match=message) as caught:
        exporting.export(make(), tmp_path / "out", MIXED_INPUT, **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_format_whose_packages_are_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(exporting.NEEDS, "onnx", ("jax2onnx", "no_such_package"))
    with pytest.raises(ValueError, match=r'needs .*no_such_package.*pip install "dhp_jax\[onnx\]"'):
        exporting.export(filled(Sorting), tmp_path / "out", (6, 6, 3), format="onnx")


@pytest.mark.parametrize(
    ("asked", "outcome"), [("onnx", pytest.fail.Exception), ("not slow", pytest.skip.Exception)]
)
def test_tests_of_onnx_are_never_skipped_where_they_are_asked_for(monkeypatch, asked, outcome):
    monkeypatch.setitem(exporting.NEEDS, "onnx", ("no_such_package",))
    option = SimpleNamespace(markexpr=asked)
    item = SimpleNamespace(
        config=SimpleNamespace(option=option), get_closest_marker={"onnx": pytest.mark.onnx}.get
    )
    with pytest.raises(outcome, match=r"^no_such_package not installed"):
        conftest.pytest_runtest_setup(item)


# The command


def told(capsys, *arguments):
    """The exit code, and what was printed to each stream."""
    return commanded(capsys, command.main, "export", *arguments)


def test_a_run_is_exported_and_tried_on_its_test_images(digits_run, tmp_path, capsys):
    code, out, _ = told(
        capsys, digits_run, "--format=safetensors", "--which=best", f"--out={tmp_path / 'out'}"
    )
    assert code == 0
    assert f"{tmp_path / 'out'}: takes (batch, 8, 8, 1) in float32; 9 layers" in out
    assert "largest difference to the network: " in out
    assert " on 8 test images" in out
    loaded = opened(tmp_path / "out")
    best = opened(digits_run, "best")
    assert {**loaded.notes, "input_shape": [8, 8, 1]} == best.notes
    x = images(2, 8, 8, 1)
    np.testing.assert_allclose(run(loaded.model, x)[0], run(best.model, x)[0], atol=1e-4)


def test_a_folder_without_notes_is_exported_beside_itself(tmp_path, capsys):
    small, shape = pruned("dncnn")
    dhp.save(tmp_path / "small", small)
    arguments = (tmp_path / "small", "--format=safetensors")
    code, _, err = told(capsys, *arguments)
    assert code == 2
    assert err.startswith("error: --input-shape: expected one, for ")
    code, out, _ = told(capsys, *arguments, f"--input-shape={','.join(map(str, shape))}")
    assert code == 0
    assert " on 3 photographs" in out
    assert dhp.load(tmp_path / "small-folded").channels == 1


def test_a_network_of_ones_own_is_exported_with_build(tmp_path, capsys):
    model = filled(Mixed)
    dhp.save(tmp_path / "own", dhp.prune(model), input_shape=MIXED_INPUT)
    arguments = (tmp_path / "own", "--format=safetensors")
    code, out, _ = told(capsys, *arguments, "--build=networks:Mixed")
    assert (code, " 2 layers folded" in out) == (0, True)
    code, _, err = told(capsys, *arguments)
    assert (code, "a class of its own; expected load(path, build=...)" in err) == (2, True)
    code, _, err = told(capsys, *arguments, "--build=networks:Nobody")
    assert (code, "error: build: expected module:function" in err) == (2, True)


def test_the_command_writes_over_nothing_but_earlier_exports(tmp_path, capsys):
    dhp.save(tmp_path / "own", Doubling(nnx.Rngs(0)), input_shape=(2, 2, 3))
    lay(tmp_path / "mine", "thesis")
    before = tree(tmp_path)
    arguments = (tmp_path / "own", "--format=safetensors", "--build=test_export:Doubling")
    code, _, err = told(capsys, *arguments, f"--out={tmp_path / 'mine'}")
    assert (code, err) == (
        2,
        "error: --out: expected no or an empty folder, or one with a network only, got "
        f"{tmp_path / 'mine'}\n",
    )
    code, _, err = told(capsys, *arguments, f"--out={tmp_path / 'own'}")
    assert (code, err) == (
        2,
        f"error: --out: expected another folder than the network's, got {tmp_path / 'own'}\n",
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}", "--format=onnx"], "error: model: expected a folder that dhp.save wrote or a run's"),
        (["{}", "--format=tflite"], "error: argument --format: invalid choice: 'tflite'"),
        (["{}"], "error: the following arguments are required: --format"),
        (["{}", "--format=onnx", "--out=/proc/a"], "error: --out: expected a place that can be wr"),
        (["{}", "--format=onnx", "--input-shape=8,0"], "error: argument --input-shape: expected"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setitem(exporting.NEEDS, "onnx", ())
    code, out, err = told(capsys, *(argument.format(tmp_path) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_command_runs_as_a_module(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "dhp_jax.export", str(tmp_path), "--format=safetensors"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert process.returncode == 2
    assert process.stderr == (
        "error: model: expected a folder that dhp.save wrote or a run's with model/, got "
        f"{tmp_path}\n"
    )


def test_a_network_in_training_mode_is_exported_for_inference(tmp_path):
    small, shape = pruned("dncnn")
    small.train()
    made = exporting.export(small, tmp_path / "out", shape, format="safetensors")
    assert max(made.differences.values()) < 1e-4
    assert small.middle[0].norm.use_running_average is False
