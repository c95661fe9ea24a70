"""Networks on disk: what is saved is what is loaded; see test_untrusted.py for what is refused."""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
import re
import warnings

from flax import linen, nnx
import jax
from jax.experimental.layout import Format, Layout
import jax.numpy as jnp
from networks import MIXED_INPUT, Mixed, arrays, drawn_masks, filled, images, run, thin_resnet
import numpy as np
import optax
import pytest
from runs import contents
from safetensors.numpy import load_file

import dhp_jax as dhp
from dhp_jax.artifact import description as artifact_description
from dhp_jax.artifact import writing
from dhp_jax.artifact.arrays import ARRAYS, DESCRIPTION
from dhp_jax.artifact.description import OPTIONAL, ArtifactError
from dhp_jax.artifact.reading import exists, read_description, verify
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.surgery import prune as cut

pytestmark = pytest.mark.usefixtures("fast_compilation")
X = images(3, 8, 8, 3)


def check_same_network(found, expected, x=X):
    found_arrays, expected_arrays = arrays(found), arrays(expected)
    assert found_arrays.keys() == expected_arrays.keys()
    for name, array in expected_arrays.items():
        assert found_arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found_arrays[name], array)
    assert type(found) is type(expected)
    np.testing.assert_array_equal(run(found, x)[0], run(expected, x)[0])


def pruned_resnet(**arguments):
    model = thin_resnet(**arguments)
    return cut(model, drawn_masks(model, 0))


# Round trips


@pytest.mark.parametrize("make", [thin_resnet, pruned_resnet])
@pytest.mark.parametrize("arguments", [{}, {"dtype": "bfloat16", "num_classes": 7, "width": 0.3}])
def test_a_network_of_a_family_is_loaded_bit_for_bit(tmp_path, make, arguments):
    model = make(**arguments)
    dhp.save(tmp_path / "out", model)
    loaded = dhp.load(tmp_path / "out")
    check_same_network(loaded, model)
    assert architecture_of(loaded) == architecture_of(model)
    assert dhp.latents(loaded).keys() == dhp.latents(model).keys()
    for name, z in dhp.latents(model).items():
        again = dhp.latents(loaded)[name]
        assert (again.prunable, again.min_channels) == (z.prunable, z.min_channels)


@pytest.mark.parametrize("pruned", [False, True])
def test_a_network_of_ones_own_is_loaded_with_the_function_that_builds_it(tmp_path, pruned):
    model = filled(Mixed)
    model = cut(model, drawn_masks(model, 0)) if pruned else model
    dhp.save(tmp_path, model)
    for build in (Mixed, lambda *, rngs: Mixed(rngs)):
        check_same_network(dhp.load(tmp_path, build=build), model, images(2, *MIXED_INPUT))


def test_a_loaded_network_can_be_saved_and_loaded_again(tmp_path):
    small = pruned_resnet()
    dhp.save(tmp_path / "first", small)
    dhp.save(tmp_path / "second", dhp.load(tmp_path / "first"))
    check_same_network(dhp.load(tmp_path / "second"), small)
    for name in (DESCRIPTION, ARRAYS):
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


class Noisy(nnx.Module):
    """Dropout and a constant array besides a layer on a latent."""

    def __init__(self, rngs):
        self.shift = nnx.data(np.arange(6.0, dtype=np.float32))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.linear = dhp.Linear(dhp.Latent(6, rngs=rngs), 4, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.dropout(x + self.shift))


def test_random_generators_and_constant_arrays_are_kept(tmp_path):
    model = Noisy(nnx.Rngs(params=0, dropout=5))
    model.shift = model.shift + 1
    x = images(2, 6)
    model.train()
    model(x)  # advances the generator
    dhp.save(tmp_path, model)
    loaded = dhp.load(tmp_path, build=Noisy)
    np.testing.assert_array_equal(loaded.shift, np.arange(6) + 1)
    loaded.train()
    for _ in range(2):
        found, expected = loaded(x), model(x)
        np.testing.assert_array_equal(found, expected)
    loaded.eval()
    model.eval()
    np.testing.assert_array_equal(loaded(x), model(x))
    assert np.any(np.asarray(loaded(x)) != expected)  # dropout had an effect


class Gained(Mixed):
    """A class with a new field; what it is, is given with `functools.partial`."""

    def __init__(self, rngs, make):
        super().__init__(rngs)
        self.gained = make(rngs)

    def __call__(self, x):
        return super().__call__(self.gained(x))


@pytest.mark.parametrize("renewed", [False, True])
def test_a_class_that_has_gained_dropout_reads_what_was_saved_before(tmp_path, renewed):
    model = filled(Mixed)
    small = cut(model, drawn_masks(model, 0))
    if renewed:
        small = dhp.with_latents(small, rngs=nnx.Rngs(1), build=Mixed)
    dhp.save(tmp_path, small)
    build = functools.partial(Gained, make=lambda rngs: nnx.Dropout(0.5, rngs=rngs))
    loaded, x = dhp.load(tmp_path, build=build), images(2, *MIXED_INPUT)
    np.testing.assert_array_equal(run(loaded, x)[0], run(small, x)[0])
    fresh = build(nnx.Rngs(0)).gained
    fresh.train()
    loaded.train()
    for _ in range(2):
        np.testing.assert_array_equal(loaded.gained(x), fresh(x))
    dhp.save(tmp_path, loaded)  # from now on its random state is kept
    count = dhp.load(tmp_path, build=build).gained.rngs.count
    np.testing.assert_array_equal(count[...], fresh.rngs.count[...])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda rngs: nnx.LayerNorm(3, rngs=rngs), "gained.bias"),
        (lambda rngs: nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.PReLU()), "gained.layers.1."),
    ],
)
def test_a_class_that_has_gained_weights_is_refused(tmp_path, make, name):
    dhp.save(tmp_path, dhp.prune(filled(Mixed)))
    with pytest.raises(ArtifactError, match=rf"lacks array '{name}.*; the class .* has gained arr"):
        dhp.load(tmp_path, build=functools.partial(Gained, make=make))


def test_a_network_that_was_cast_is_loaded_as_it_was_saved(tmp_path):
    small = dhp.prune(thin_resnet())
    state = nnx.state(small, nnx.Param)
    nnx.update(small, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    dhp.save(tmp_path / "small", small)
    loaded = dhp.load(tmp_path / "small")
    assert jax.tree.leaves(nnx.state(loaded, nnx.Param))[0].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(small))


def test_a_network_in_bfloat16_is_loaded_bit_for_bit(tmp_path):
    def build(rngs):
        axes = (dhp.Latent(size, rngs=rngs) for size in (3, 5))
        return dhp.HyperConv(*axes, (3, 3), param_dtype=jnp.bfloat16, rngs=rngs)

    model = filled(build)
    dhp.save(tmp_path, model)
    check_same_network(dhp.load(tmp_path, build=build), model)


def test_arrays_whose_memory_is_not_row_major_are_saved_as_they_are(tmp_path):
    model = filled(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    kernel = np.asarray(model.kernel[...])
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    column_major = jax.device_put(kernel, Format(Layout((1, 0)), device))
    assert not np.asarray(column_major).flags.c_contiguous
    model.kernel.set_value(column_major)
    dhp.save(tmp_path, model)
    np.testing.assert_array_equal(load_file(tmp_path / ARRAYS)["kernel"], kernel)


def test_a_loaded_network_is_in_evaluation_mode(tmp_path):
    model = filled(Mixed)
    model.train()
    dhp.save(tmp_path, model)
    loaded = dhp.load(tmp_path, build=Mixed)
    assert loaded.join_norm.use_running_average
    before = arrays(loaded)
    loaded(images(3, *MIXED_INPUT))
    for name, array in arrays(loaded).items():
        np.testing.assert_array_equal(array, before[name])


def trained(model, x):
    """Losses of two steps of gradient descent, and the arrays after them."""
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, rest):
        def loss(params):
            merged = nnx.merge(graphdef, params, rest, copy=True)
            errors = optax.softmax_cross_entropy_with_integer_labels(merged(x), jnp.arange(len(x)))
            return errors.mean(), nnx.state(merged, nnx.BatchStat)

        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), rest

    losses = []
    for _ in range(2):
        value, params, rest = step(params, rest)
        losses.append(float(value))
    return losses, arrays(nnx.merge(graphdef, params, rest))


def test_a_loaded_network_trains_as_the_saved_one_would(tmp_path):
    model, x = filled(Mixed), images(3, *MIXED_INPUT)
    model = cut(model, drawn_masks(model, 0))
    dhp.save(tmp_path, model)
    losses, found = trained(dhp.load(tmp_path, build=Mixed), x)
    expected_losses, expected = trained(model, x)
    assert losses == expected_losses
    assert losses[1] < losses[0]
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


# What lies in the folder


def test_the_folder_holds_json_and_safetensors_only(tmp_path):
    model = filled(Mixed)
    dhp.save(tmp_path / "a" / "b", cut(model, drawn_masks(model, 0)), test_error=8.46)
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == [ARRAYS, DESCRIPTION]
    assert [path.name for path in folder.parent.iterdir()] == ["b"]
    description = json.loads((folder / DESCRIPTION).read_text())
    assert (description["format"], description["version"]) == ("dhp_jax", 1)
    assert description["notes"] == {"test_error": 8.46}
    digest = hashlib.sha256((folder / ARRAYS).read_bytes()).hexdigest()
    assert description["sha256"] == digest
    stored = load_file(folder / ARRAYS)
    assert description["arrays"] == {
        name: {"shape": list(array.shape), "dtype": str(array.dtype)}
        for name, array in stored.items()
    }
    header = (folder / ARRAYS).read_bytes()[8:]
    assert header.startswith(b"{")  # no pickle, whose first byte is 0x80


def test_the_description_tells_what_survived(tmp_path):
    model = filled(Mixed)
    masks = drawn_masks(model, 0)
    dhp.save(tmp_path, cut(model, masks))
    description = read_description(tmp_path)
    kept = {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}
    assert description["survivors"] == kept
    assert description["family"] is None


def test_a_network_that_is_there_is_replaced(tmp_path):
    first, second = filled(Mixed, 0), filled(Mixed, 1)
    for model in (first, second):
        dhp.save(tmp_path / "out", model)
    check_same_network(dhp.load(tmp_path / "out", build=Mixed), second, images(1, *MIXED_INPUT))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("model", [None, Mixed, {"a": 1}])
def test_only_networks_are_saved(tmp_path, model):
    with pytest.raises(ValueError, match=r"^model: expected an nnx\.Module, got "):
        dhp.save(tmp_path / "out", model)
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_a_network_is_told_by_its_name(tmp_path):
    told = r"^path: expected a folder, as in save\(path, model\), got Mixed$"
    with pytest.raises(ValueError, match=told):
        dhp.save(filled(Mixed), tmp_path / "out")


def nothing(rngs):
    """Forgets to return what it makes."""


def wrong(rngs):
    raise KeyError


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (5, "got 5: 'int' object is not callable"),
        (os.getcwd, "got <built-in function getcwd>: "),
        (nothing, "got <function nothing at .*>: it returns None$"),
        (wrong, "got <function wrong at .*>: KeyError$"),
    ],
)
def test_what_builds_no_network_is_told_in_one_line(tmp_path, build, message):
    dhp.save(tmp_path, Bare())
    with pytest.raises(artifact_description.ArtifactError, match=message) as caught:
        dhp.load(tmp_path, build=build)
    assert str(caught.value).startswith("build: expected a function build(rngs) that makes the ")
    assert "\n" not in str(caught.value)


class Bare(nnx.Module):
    def __init__(self):
        self.factor = nnx.Param(jnp.ones(1))


def test_the_network_in_a_runs_folder_is_pointed_to(tmp_path):
    dhp.save(tmp_path / "model", Bare())
    with pytest.raises(artifact_description.ArtifactError) as caught:
        dhp.load(tmp_path)
    assert str(caught.value).endswith(f", got {tmp_path}; {tmp_path / 'model'} is one")


@pytest.mark.parametrize("fails", ["write", "rename", "note"])
def test_a_save_that_fails_leaves_the_network_that_was_there(tmp_path, monkeypatch, fails):
    model = filled(Mixed)
    dhp.save(tmp_path / "out", model)
    rename = Path.rename

    def full(path, *args):
        if fails == "write" or path.name.endswith(".unfinished"):
            raise OSError("No space left on device")
        return rename(path, *args)

    if fails != "note":
        monkeypatch.setattr(*(writing, "write") if fails == "write" else (Path, "rename"), full)
        with pytest.raises(OSError, match="No space left"):
            dhp.save(tmp_path / "out", filled(Mixed, 1))
        with pytest.raises(OSError, match="No space left"):
            dhp.save(tmp_path / "other", filled(Mixed, 1))
        monkeypatch.undo()
    else:
        with pytest.raises(TypeError, match=r"^error: expected a JSON value, .*; got <object"):
            dhp.save(tmp_path / "out", filled(Mixed, 1), error=object())
    assert not (tmp_path / "other").exists()
    check_same_network(dhp.load(tmp_path / "out", build=Mixed), model, images(1, *MIXED_INPUT))
    dhp.save(tmp_path / "out", model)  # what was left unfinished is no obstacle
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_what_is_saved_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(path, target):
        events.append(target.name)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    dhp.save(tmp_path / "out", filled(Mixed))
    named = events.index("out")
    for path in (tmp_path / "out" / DESCRIPTION, tmp_path / "out" / ARRAYS, tmp_path / "out"):
        assert path.stat().st_ino in events[:named]
    assert events[named + 1 :] == [tmp_path.stat().st_ino]


def test_a_folder_or_file_that_is_no_network_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(
            FileExistsError, match=f"^path: expected .*, got {re.escape(str(path))}$"
        ):
            dhp.save(path, filled(Mixed))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_shape_of_numpys_integers_is_noted(tmp_path):
    model = thin_resnet()
    small = cut(model, drawn_masks(model, 0))
    dhp.save(tmp_path, small, input_shape=tuple(np.array([8, 8, 3])))
    assert read_description(tmp_path)["notes"] == {"input_shape": [8, 8, 3]}


def test_a_folder_in_the_home_folder_is_found_by_all(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = thin_resnet()
    dhp.save("~/small", cut(model, drawn_masks(model, 0)))
    assert exists("~/small")
    assert verify("~/small") == read_description("~/small")
    dhp.load("~/small")


def test_the_description_tells_cost_and_versions(tmp_path):
    model = thin_resnet()
    small = cut(model, drawn_masks(model, 0))
    dhp.save(tmp_path, small, input_shape=(8, 8, 3), test_error=8.46)
    description = read_description(tmp_path)
    cost = dhp.measure_cost(small, (8, 8, 3))
    assert description["cost"] == {"flops": cost.flops, "params": cost.params}
    assert description["notes"] == {"test_error": 8.46, "input_shape": [8, 8, 3]}
    provenance = description["provenance"]
    assert provenance["dhp_jax"] == dhp.__version__
    assert provenance["jax"] == jax.__version__


# What was saved by other versions


def test_a_folder_without_the_fields_that_came_later_is_loaded(tmp_path):
    small = pruned_resnet()
    dhp.save(tmp_path, small)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    for field in OPTIONAL:
        description.pop(field, None)
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    check_same_network(dhp.load(tmp_path), small)


def test_a_network_is_loaded_after_its_family_has_gained_an_argument(tmp_path, monkeypatch):
    small = pruned_resnet()
    dhp.save(tmp_path, small)

    class Later(type(small)):
        def __init__(self, depth, *, width=1.0, min_channels=4, slope=0.0, rngs):
            super().__init__(depth, width=width, min_channels=min_channels, rngs=rngs)
            self.slope = slope
            self.history = nnx.List([])

        def __call__(self, x):
            return super().__call__(x) + self.slope

    monkeypatch.setitem(dhp.models.FAMILIES, "resnet", Later)
    loaded = dhp.load(tmp_path)
    assert isinstance(loaded, Later)
    np.testing.assert_array_equal(run(loaded, X)[0], run(small, X)[0])
    assert "slope" not in architecture_of(loaded).arguments


def test_a_network_of_ones_own_is_loaded_after_its_class_has_gained_an_attribute(tmp_path):
    small = cut(filled(Mixed), drawn_masks(filled(Mixed), 0))
    dhp.save(tmp_path, small)

    class Later(Mixed):
        def __init__(self, rngs, calls=0):
            super().__init__(rngs)
            self.calls = calls

    loaded, x = dhp.load(tmp_path, build=Later), images(2, *MIXED_INPUT)
    np.testing.assert_array_equal(run(loaded, x)[0], run(small, x)[0])


class Configured(nnx.Module):
    """A convolution and a head; what they compute depends on settings that are no arrays."""

    def __init__(self, rngs, act=jax.nn.relu, strides=1, options=None, epsilon=1e-5, dtype=None):
        self.act, self.options = act, options
        self.conv = nnx.Conv(3, 8, (3, 3), strides=strides, rngs=rngs)
        self.norm = nnx.BatchNorm(8, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.act(self.norm(self.conv(x))).mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class Options:
    slope: float = 0.1


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"act": jax.nn.gelu}, "act of the network was relu, is gelu"),
        ({}, {"strides": 2}, "strides of 'conv' was 1, is 2"),
        ({}, {"epsilon": 0.1}, "epsilon of 'norm' was 1e-05, is 0.1"),
        ({"dtype": jnp.bfloat16}, {}, "dtype of 'norm' was bfloat16, is None"),
        (
            {"options": Options()},
            {"options": Options(0.2)},
            "options.slope of the network was 0.1, is 0.2",
        ),
        (
            {"act": functools.partial(jax.nn.leaky_relu, negative_slope=0.3)},
            {"act": functools.partial(jax.nn.leaky_relu, negative_slope=0.4)},
            "negative_slope=0.3), is partial(",
        ),
    ],
)
def test_a_setting_that_is_not_as_it_was_saved_is_told(tmp_path, before, after, told):
    dhp.save(tmp_path, Configured(nnx.Rngs(0), **before))
    with pytest.warns(UserWarning, match=re.escape(told)) as warned:
        dhp.load(tmp_path, build=lambda rngs: Configured(rngs, **after))
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = dhp.load(tmp_path, build=lambda rngs: Configured(rngs, **before))
    dhp.save(tmp_path, again)


class LinenNet(linen.Module):
    act: Callable = linen.relu

    @linen.compact
    def __call__(self, x):
        return linen.Dense(5)(self.act(linen.Conv(8, (3, 3))(x)).mean((1, 2)))


def test_a_setting_of_a_module_of_linen_is_told(tmp_path):
    variables = LinenNet().init(jax.random.key(0), X)
    dhp.save(tmp_path, dhp.FromLinen(LinenNet(), variables))
    with pytest.warns(UserWarning, match=r"fixed\.module\.act of the network was relu, is silu"):
        dhp.load(tmp_path, build=lambda rngs: dhp.FromLinen(LinenNet(linen.silu), variables))


# What is not saved


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_what_a_call_has_left_is_not_saved(tmp_path):
    class Sowing(nnx.Linear):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "seen", x)
            return super().__call__(x)

    model, x = Sowing(2, 3, rngs=nnx.Rngs(0)), jnp.ones((1, 2))
    expected = model(x)
    dhp.save(tmp_path, model)
    loaded = dhp.load(tmp_path, build=lambda rngs: Sowing(2, 3, rngs=rngs))
    np.testing.assert_array_equal(loaded(x), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_network_of_numbers_that_are_not_finite_is_not_saved(tmp_path, value):
    model = filled(Mixed)
    dhp.save(tmp_path / "out", model)
    before = contents(tmp_path)
    broken = filled(Mixed)
    broken.join.b2[...] = broken.join.b2[...].at[0, 0, 0, 0].set(value)
    message = "^model: array 'join.b2': expected finite numbers, got NaN or infinity$"
    for name in ("out", "other"):
        with pytest.raises(ValueError, match=message):
            dhp.save(tmp_path / name, broken)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"loss": float("nan")}, "NaN is no number$"),
        ({"losses": {1: 0.5, "1": 0.25}}, "the name '1' comes twice in an object$"),
        ({"count": 10**30}, "an integer of 31 digits$"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, notes, message):
    (name,) = notes
    with pytest.raises(ArtifactError, match=f"^path: note '{name}' is not JSON: {message}"):
        dhp.save(tmp_path / "out", filled(Mixed), **notes)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_was_being_replaced_when_the_process_ended_is_named(tmp_path, monkeypatch):
    small, path, rename = cut(filled(Mixed)), tmp_path / "small", Path.rename

    def ended(part, target):
        if target == path:
            raise KeyboardInterrupt
        return rename(part, target)

    dhp.save(path, small)
    monkeypatch.setattr(Path, "rename", ended)
    with pytest.raises(KeyboardInterrupt):
        dhp.save(path, small)
    with pytest.raises(ArtifactError, match=r"got .*small; .*/\.small\.replaced is one$"):
        dhp.load(path)
    before = dhp.load(tmp_path / ".small.replaced", build=Mixed)
    for name, array in arrays(small).items():
        np.testing.assert_array_equal(arrays(before)[name], array)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"got \.$"):
        dhp.load(".")
