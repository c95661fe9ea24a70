"""A pruned network is pruned again, and is trained for other classes."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from networks import MIXED_INPUT, RNGS, Mixed, arrays, drawn_masks, filled, images, run
import numpy as np
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.artifact.reading import read_description
from dhp_jax.core.hypernet import HypernetArrays
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.surgery import prune as cut
from dhp_jax.models import mobilenet

pytestmark = pytest.mark.usefixtures("fast_compilation")
NETWORKS = {
    "dense": ("densenet", {"depth": 7, "growth": 4}, (8, 8, 3)),
    "groups": ("mobilenet_v1", {"width": 0.125}, (16, 16, 3)),
    "concat": ("unet", {"depth": 2, "features": 6}, (8, 8, 1)),
    "shuffle": ("srresnet", {"scale": 2, "blocks": 1, "features": 8}, (6, 6, 3)),
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """MobileNets of two blocks, which compile quickly."""
    monkeypatch.setattr(mobilenet, "V1_BLOCKS", mobilenet.V1_BLOCKS[:2])
    monkeypatch.setattr(mobilenet.MobileNetV1, "features_size", 80)


@functools.cache
def cut_once(name, seed):
    family, arguments, shape = NETWORKS[name]
    arguments = {"min_channels": 1, **arguments}
    model = filled(lambda _: dhp.models.build(family, rngs=RNGS, **arguments))
    return cut(model, drawn_masks(model, seed)), shape


def pruned(name, seed=0):
    small, shape = cut_once(name, seed)
    return nnx.clone(small), shape


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_network_with_latents_again_computes_the_same(name):
    small, shape = pruned(name)
    before = arrays(small)
    again = dhp.with_latents(small, rngs=nnx.Rngs(1))
    sizes = {latent: len(kept) for latent, kept in architecture_of(small).survivors.items()}
    assert {latent: z.size for latent, z in dhp.latents(again).items()} == sizes
    assert dhp.measure_cost(again, shape).flops == dhp.measure_cost(small, shape).flops
    ordinary = dhp.prune(again)
    for path, array in arrays(ordinary).items():
        np.testing.assert_allclose(array, before[path], atol=1e-6)
    x = images(2, *shape)
    expected = run(small, x)[0]
    scale = np.abs(expected).max()
    for same in (again, ordinary):
        np.testing.assert_allclose(run(same, x)[0], expected, atol=2e-5 * scale)
    dhp.check_axes(again, shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_pruned_twice_is_saved_with_the_survivors_of_both(tmp_path, name):
    small, shape = pruned(name)
    again = dhp.with_latents(small, rngs=nnx.Rngs(1))
    masks = drawn_masks(again, 1)
    smaller = cut(again, masks)
    first = architecture_of(small).survivors
    for latent, kept in architecture_of(smaller).survivors.items():
        assert list(kept) == [first[latent][i] for i in np.flatnonzero(masks[latent])]
    assert dhp.measure_cost(smaller, shape).flops < dhp.measure_cost(small, shape).flops
    dhp.save(tmp_path, smaller)
    loaded, x = dhp.load(tmp_path), images(2, *shape)
    np.testing.assert_array_equal(run(loaded, x)[0], run(smaller, x)[0])


def test_a_network_with_latents_again_is_saved_and_goes_on(tmp_path):
    small, shape = pruned("dense")
    again = dhp.with_latents(small, rngs=nnx.Rngs(1))
    dhp.save(tmp_path, again)
    loaded, x = dhp.load(tmp_path), images(2, *shape)
    np.testing.assert_array_equal(run(loaded, x)[0], run(again, x)[0])
    masks = drawn_masks(again, 1)
    once, other = cut(loaded, masks), cut(again, masks)
    assert architecture_of(once) == architecture_of(other)


def test_gradients_reach_latents_and_hypernetworks_again():
    model = filled(Mixed)
    small = cut(model, drawn_masks(model, 0))
    again = dhp.with_latents(small, rngs=nnx.Rngs(1), build=Mixed)
    graphdef, params, rest = nnx.split(again, nnx.Param, ...)

    @jax.jit
    def gradient(params):
        def loss(params):
            scores = nnx.merge(graphdef, params, rest, copy=True)(images(4, *MIXED_INPUT))
            return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(4)).mean()

        return jax.grad(loss)(params)

    for path, leaf in nnx.to_flat_state(gradient(params)):
        assert np.abs(np.asarray(leaf.get_value())).max() > 0, path


def test_a_network_of_ones_own_is_given_latents_with_the_function_that_builds_it():
    model = filled(Mixed)
    small = cut(model, drawn_masks(model, 0))
    again = dhp.with_latents(small, rngs=nnx.Rngs(1), build=Mixed)
    x = images(2, *MIXED_INPUT)
    np.testing.assert_allclose(run(again, x)[0], run(small, x)[0], atol=2e-4)


def test_survivors_of_a_network_with_latents_again_are_at_least_so_many():
    small, _ = pruned("dense")
    again = dhp.with_latents(small, rngs=nnx.Rngs(1), min_channels=3)
    assert {min(3, z.size) == z.min_channels for z in dhp.latents(again).values()} == {True}
    with pytest.raises(ValueError, match=r"^min_channels: expected a positive integer, got 0$"):
        dhp.with_latents(small, rngs=nnx.Rngs(1), min_channels=0)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (None, {"call": run}, "call: expected None without inputs, got <function run"),
        (None, {"embedding": 8}, "embedding: expected None without inputs, got 8"),
        (None, {"rngs": 3}, "rngs: expected nnx.Rngs for a network that was pruned, got 3"),
        ((8, 8, 3), {"build": Mixed}, "build: expected None with inputs, got <class"),
        ((8, 8, 3), {"rngs": 0}, "rngs: expected nnx.Rngs or None, got 0"),
    ],
)
def test_arguments_that_have_no_use_are_refused(inputs, options, message):
    small, _ = pruned("dense")
    with pytest.raises(ValueError, match=f"^{message}"):
        dhp.with_latents(small, inputs, **{"rngs": nnx.Rngs(1)} | options)


class Tied(nnx.Module):
    """Two convolutions share a hypernetwork, and two linear layers a kernel."""

    def __init__(self, rngs, inner=False):
        image, z = dhp.Latent(3, prunable=False, rngs=rngs), dhp.Latent(8, rngs=rngs)
        between = dhp.Latent(8, rngs=rngs) if inner else z
        self.stem = dhp.HyperConv(image, z, (3, 3), rngs=rngs)
        self.first = dhp.HyperConv(z, between, (3, 3), rngs=rngs)
        self.second = dhp.HyperConv(between, z, (3, 3), rngs=rngs)
        for name in HypernetArrays._fields:
            setattr(self.second, name, getattr(self.first, name))
        self.mean, self.most = (dhp.Linear(z, 2, rngs=rngs) for _ in range(2))
        self.most.kernel = self.mean.kernel

    def __call__(self, x):
        x = self.second(nnx.relu(self.first(nnx.relu(self.stem(x)))))
        return self.mean(x.mean((1, 2))) + self.most(x.max((1, 2)))


def test_layers_that_share_arrays_are_pruned_again(tmp_path):
    model = filled(Tied)
    small = cut(model, drawn_masks(model, 0))
    again = dhp.with_latents(small, rngs=nnx.Rngs(1), build=Tied)
    assert again.first.w2 is again.second.w2
    assert again.mean.kernel is again.most.kernel
    x = images(2, *MIXED_INPUT)
    np.testing.assert_allclose(run(again, x)[0], run(small, x)[0], atol=2e-4)
    smaller = cut(again, drawn_masks(again, 1))
    assert smaller.first.kernel is smaller.second.kernel
    dhp.save(tmp_path, again)
    loaded = dhp.load(tmp_path, build=Tied)
    np.testing.assert_array_equal(run(loaded, x)[0], run(again, x)[0])


def test_layers_that_share_arrays_of_other_channels_are_not_given_latents_again():
    build = functools.partial(Tied, inner=True)
    model = filled(build)
    masks = {name: np.ones(z.size, bool) for name, z in dhp.latents(model).items()}
    masks["first.z_out"][:2] = False
    with pytest.raises(ValueError, match=r"^model: expected layers that share arrays to keep the"):
        dhp.with_latents(cut(model, masks), rngs=nnx.Rngs(1), build=build)


class Masked(nnx.Module):
    """A layer of one's own that can be pruned."""

    def __init__(self, rngs):
        self.z = dhp.Latent(4, rngs=rngs)

    def plain(self, keep=None):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(0))


class WithMasked(nnx.Module):
    def __init__(self, rngs):
        self.layer = Masked(rngs)


@pytest.mark.parametrize(
    ("make", "build", "message"),
    [
        (lambda: filled(Mixed), Mixed, "^model: expected a pruned network, without latents"),
        (lambda: dhp.prune(filled(Mixed)), None, "^build: expected a function for a network of"),
        (lambda: pruned("dense")[0], Mixed, "^build: expected none for a network of family 'den"),
        (
            lambda: dhp.prune(WithMasked(nnx.Rngs(0))),
            WithMasked,
            "^model: Masked is a layer that cannot be cut down$",
        ),
    ],
)
def test_what_cannot_be_given_latents_again_is_refused(make, build, message):
    with pytest.raises(ValueError, match=message):
        dhp.with_latents(make(), rngs=nnx.Rngs(0), build=build)


def test_a_network_of_ones_own_is_given_latents_by_its_inputs():
    with pytest.raises(ValueError, match=r"^inputs: expected the shape of one .*, \(32, 32, 3\)\)"):
        dhp.with_latents(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("with_latents", [False, True])
def test_other_classes_leave_all_but_the_classifier(tmp_path, with_latents):
    model, shape = pruned("dense")
    if with_latents:
        model = dhp.with_latents(model, rngs=nnx.Rngs(1))
    model.classifier.precision = "highest"
    other = dhp.with_classes(model, np.int32(7), rngs=nnx.Rngs(2))
    assert other.classifier.precision == "highest"
    x = images(2, *shape)
    assert run(other, x)[0].shape == (2, 7)
    assert run(model, x)[0].shape == (2, 10)
    before = arrays(model)
    for path, array in arrays(other).items():
        if "classifier.kernel" in path or "classifier.bias" in path:
            assert array.shape[-1] == 7
        else:
            np.testing.assert_array_equal(array, before[path])
    dhp.save(tmp_path, other, input_shape=shape)
    loaded = dhp.load(tmp_path)
    np.testing.assert_array_equal(run(loaded, x)[0], run(other, x)[0])
    assert read_description(tmp_path)["arguments"]["num_classes"] == 7


@pytest.mark.parametrize(
    ("make", "classes", "message"),
    [
        (lambda: pruned("concat")[0], 5, "^layer: .* no family .*got None and family 'unet'$"),
        (lambda: filled(Mixed), 5, "^layer: .* no family .*got None and family None$"),
        (lambda: pruned("dense")[0], 0, "^num_classes: expected a positive integer, got 0$"),
    ],
)
def test_what_has_no_classes_is_given_none(make, classes, message):
    with pytest.raises(ValueError, match=message):
        dhp.with_classes(make(), classes, rngs=nnx.Rngs(0))
