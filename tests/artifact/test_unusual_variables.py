"""Networks of unusual variables come back as they were, or are refused by name."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import dhp_jax as dhp
from dhp_jax.artifact.description import ArtifactError
from dhp_jax.artifact.weights import read_weights, take_weights

X = jnp.ones((1, 3))


class Doubled(nnx.Param):
    """Reads as twice what is stored."""

    def get_value(self, **options):
        return 2 * super().get_value(**options)


class Net(nnx.Module):
    """A kernel in a variable of some type."""

    def __init__(self, rngs, kind=Doubled):
        self.kernel = kind(jnp.ones((3, 2)))

    def __call__(self, x):
        return x @ self.kernel.get_value()


def test_a_variable_that_reads_itself_is_saved_as_it_is_stored(tmp_path):
    net = Net(nnx.Rngs(0))
    dhp.save(tmp_path / "net", net)
    np.testing.assert_array_equal(dhp.load(tmp_path / "net", build=Net)(X), [[6, 6]])
    other = Net(nnx.Rngs(0))
    take_weights(other, read_weights(tmp_path / "net"))
    np.testing.assert_array_equal(other(X), net(X))


class Normalised(nnx.Module):
    """A convolution whose kernel reads itself, and BatchNorm behind it."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (1, 1), rngs=rngs)
        self.conv.kernel = Doubled(self.conv.kernel.get_value())
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


def test_a_kernel_that_reads_itself_is_not_folded():
    net = Normalised(nnx.Rngs(0))
    net.norm.mean[...] = jnp.arange(4.0)
    net.eval()
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    np.testing.assert_allclose(dhp.fold(net, (5, 5, 3))(x), net(x), rtol=1e-5, atol=1e-5)


class Buffers(nnx.Module):
    """Arrays of no variable: of the module, and in lists and mappings that it holds."""

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
        self.shift = nnx.data({"shift": jnp.arange(6.0), "scales": [jnp.arange(1.0, 7.0)]})

    def __call__(self, x):
        x = nnx.relu(self.first(x)) * self.shift["scales"][0] + self.shift["shift"]
        return self.last(x)


def test_arrays_in_mappings_are_cut_and_come_back(tmp_path):
    net = dhp.with_latents(Buffers(nnx.Rngs(0)), (3,), min_channels=1)
    small = dhp.prune(net, {"first": np.arange(6) % 2 == 0})
    for network in (net, small):
        dhp.save(tmp_path / "net", network)
        loaded = dhp.load(tmp_path / "net", build=Buffers)
        np.testing.assert_array_equal(loaded(X), network(X))
    np.testing.assert_array_equal(loaded.shift["shift"], [0, 2, 4])


class Holding(nnx.Module):
    """Holds something in a variable."""

    def __init__(self, value):
        self.held = nnx.Variable(value)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (3, "got int$"),
        ((jnp.ones(1), jnp.ones(1)), "got tuple$"),
        (None, "got NoneType$"),
        (jnp.ones(2, jnp.float8_e4m3fn), "got float8_e4m3fn$"),
    ],
)
def test_what_no_file_holds_is_refused_by_its_name(tmp_path, value, told):
    with pytest.raises(ValueError, match=f"^model: array 'held': expected an array of .*, {told}"):
        dhp.save(tmp_path / "net", Holding(value))
    assert not list(tmp_path.iterdir())


class Counting(Net):
    """Has room for what its last call has left."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.seen = nnx.Intermediate(jnp.zeros(()))


def test_intermediates_are_made_anew(tmp_path):
    net = Counting(nnx.Rngs(0))
    dhp.save(tmp_path / "net", net)
    np.testing.assert_array_equal(dhp.load(tmp_path / "net", build=Counting)(X), net(X))


def test_what_this_jax_would_round_is_refused(tmp_path):
    net = Net(nnx.Rngs(0), nnx.Param)
    net.kernel = nnx.Param(np.full((3, 2), 1e300))  # of float64
    dhp.save(tmp_path / "net", net)
    with pytest.raises(
        ArtifactError, match="array 'kernel' is of float64; expected jax_enable_x64"
    ):
        dhp.load(tmp_path / "net", build=lambda rngs: Net(rngs, nnx.Param))


def test_weights_of_an_unknown_type_are_told(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"kernel": np.asarray(jnp.ones((3, 2), jnp.float8_e4m3fn))}, path)
    with pytest.raises(ArtifactError, match=r"array 'kernel': expected one of .*, got 'F8_E4M3'$"):
        read_weights(path)


@pytest.mark.parametrize(
    ("notes", "told"),
    [
        ({"task": 3}, "task: expected a text, got 3"),
        ({"mean": [1, 2], "input_shape": [3]}, "mean: expected a list of 3 numbers"),
        (
            {"mean": [0.5], "std": [0.25]},
            "std: expected a standard deviation of pixels of 0 .. 255",
        ),
        ({"std": [0.0]}, "std: expected a list of numbers in"),
        ({"resize": 2, "input_shape": [4, 4, 3]}, "resize: expected an integer of 4 .."),
    ],
)
def test_notes_that_commands_could_not_read_are_refused_before_they_are_saved(
    tmp_path, notes, told
):
    shape = notes.pop("input_shape", None)
    with pytest.raises(ValueError, match=f"^{told}"):
        dhp.save(tmp_path / "net", Net(nnx.Rngs(0)), input_shape=shape and tuple(shape), **notes)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dhp_jax.artifact.writing.put", full)
    with pytest.raises(OSError, match="No space left"):
        dhp.save(tmp_path / "net", Net(nnx.Rngs(0)))
    assert not list(tmp_path.iterdir())
