"""What holds for every family: costs, refusals, axes, and that pruning is exact."""

import contextlib
import inspect
import re
from unittest import mock

from families import CLASSIFIERS, FAMILIES, abstract, kept_by, network, output, plain, pruned
from flax import nnx
import jax.numpy as jnp
from networks import arrays, run, short
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.activations import ReLU
from dhp_jax.core.layers import Hyper
from dhp_jax.core.provenance import architecture_of
from dhp_jax.models.edsr import Constant

pytestmark = pytest.mark.usefixtures("fast_compilation")
every_family = pytest.mark.parametrize("name", FAMILIES)
# One of each kind of block; what holds of the others, too, is slow, not lost.
# That of depthwise convolutions is test_gates.py's, by zeros in gates.
KINDS = ("resnext50", "densenet", "edsr", "unet")
few_families = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in KINDS)) for n in FAMILIES]
)
# Of this the others tell little more: runs check the axes of residual networks, and
# test_relatent.py those of networks with concatenations, groups and shuffles.
one_family = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "unet")) for n in FAMILIES]
)
# What evaluation reads, training reads too or compares: so it is slow, not lost.
modes = pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.slow)])

IMAGENET, CIFAR, TINY = (224, 224, 3), (32, 32, 3), (64, 64, 3)
RESNEXT = {"depth": 50, "groups": 32, "group_width": 4, "num_classes": 1000}

COSTS = [  # family, arguments, input, FLOPs, params, latents
    ("resnet", {"depth": 18, "num_classes": 1000}, IMAGENET, 1_819_040_768, 11_689_512, 13),
    ("resnet", {"depth": 34, "num_classes": 1000}, IMAGENET, 3_671_237_632, 21_797_672, 21),
    ("resnet", {"depth": 50, "num_classes": 1000}, IMAGENET, 4_111_412_224, 25_557_032, 38),
    ("resnet", {"depth": 101, "num_classes": 1000}, IMAGENET, 7_833_869_312, 44_549_160, 72),
    ("resnet", RESNEXT, IMAGENET, 4_259_280_896, 25_028_904, 38),
    ("densenet", {}, CIFAR, 287_709_648, 1_059_298, 40),
    ("vgg", {"depth": 11}, CIFAR, 153_072_640, 9_228_362, 9),
    ("vgg", {"depth": 13}, CIFAR, 228_766_720, 9_413_066, 11),
    ("vgg", {}, CIFAR, 313_754_624, 14_724_042, 14),
    ("vgg", {"depth": 19}, CIFAR, 398_742_528, 20_035_018, 17),
    ("mobilenet_v1", {}, TINY, 47_372_288, 3_411_976, 28),
    ("mobilenet_v2", {}, TINY, 91_499_520, 2_480_072, 43),
]


@every_family
def test_a_family_knows_an_image_that_it_takes(name):
    family, arguments, _ = FAMILIES[name]
    with short():
        model = dhp.models.build_abstract(family, **arguments)
    assert output(model, (2, *architecture_of(model).example)).shape[0] == 2


DEEP = (34, 101, 11, 13, 19)  # of families with another depth in the table


@pytest.mark.parametrize(
    ("family", "arguments", "shape", "flops", "params", "latents"),
    [pytest.param(*row, marks=[pytest.mark.slow] * (row[1].get("depth") in DEEP)) for row in COSTS],
)
def test_networks_cost_exactly_what_is_published(
    family, arguments, shape, flops, params, latents, caplog
):
    model = abstract(family, **arguments)
    cost = dhp.measure_cost(model, shape)
    assert (cost.flops, cost.params, len(dhp.latents(model))) == (flops, params, latents)
    assert caplog.records == []


# Arguments


POSITIVE = "a positive integer"
REFUSED = {  # argument: values, what is expected
    "num_classes": ((0, 2.5), POSITIVE),
    "features": ((0, -64, 2.5, True, "64"), POSITIVE),
    "channels": ((0, -1, 1.5), POSITIVE),
    "width": ((0, -1, "wide", float("nan"), float("inf")), "a positive number"),
    "min_channels": ((0, 2.5), POSITIVE),
    "blocks": ((0, -1, 1.5), POSITIVE),
    "growth": ((0,), POSITIVE),
    "scale": ((5, 1, 0, "4", 4.0, True, None, [4]), "one of 2, 3, 4"),
    "stem_stride": ((3, True), "one of 1, 2"),
    "prune_upsampler": (("no", 1, None), "True or False"),
    "prune_classifier": ((1,), "True or False"),
    "classifier_keep": ((1.1, "all"), "a share in [0, 1]"),
    "initial_scale": ((0, "1"), "a positive number"),
}
NEEDED = {"resnet": {"depth": 20}, "srresnet": {"scale": 4}, "edsr": {"scale": 4}}


@pytest.mark.parametrize("family", dhp.models.FAMILIES)
def test_an_argument_that_makes_no_network_is_refused(family):
    taken = inspect.signature(dhp.models.FAMILIES[family].__init__).parameters
    for argument in taken.keys() & REFUSED.keys():
        values, expected = REFUSED[argument]
        for value in values:
            arguments = NEEDED.get(family, {}) | {argument: value}
            message = re.escape(f"{argument}: expected {expected}, got {value!r}")
            with pytest.raises(ValueError, match=f"^{message}$"):
                dhp.models.build(family, rngs=nnx.Rngs(0), **arguments)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("resnet", {"depth": 19}, r"depth: expected one of .* or \(18, 34\) \(basic .*, got 19$"),
        ("resnet", {"depth": 50, "groups": 0}, "groups: expected a positive integer, got 0$"),
        ("resnet", {"depth": 50, "groups": 32}, "group_width: expected a positive .*, got None$"),
        ("resnet", {"depth": 50, "group_width": 4}, "group_width: expected None with .*, got 4$"),
        (
            "resnet",
            {"depth": 34, "groups": 32, "group_width": 4},
            r"groups: expected 1 at depth 34 \(basic blocks\), got 32$",
        ),
        ("densenet", {"depth": 41}, r"depth: expected 3 n \+ 4, such as 40 or 100, got 41$"),
        ("densenet", {"depth": 4}, r"depth: expected 3 n \+ 4, such as 40 or 100, got 4$"),
        ("densenet", {"depth": 40.0}, r"depth: expected a positive integer, got 40.0$"),
        ("vgg", {"depth": 12}, "depth: expected one of 11, 13, 16, 19, got 12$"),
        ("dncnn", {"depth": 2}, "depth: expected at least 3, got 2$"),
        ("dncnn", {"depth": 1}, "depth: expected at least 3, got 1$"),
        ("dncnn", {"depth": 0}, "depth: expected a positive integer, got 0$"),
        ("dncnn", {"depth": 5.0}, "depth: expected a positive integer, got 5.0$"),
        ("unet", {"depth": 9}, "depth: expected at most 8, got 9$"),
        ("unet", {"depth": -5}, "depth: expected a positive integer, got -5$"),
        ("srresnet", {}, "scale: expected a value, got none$"),
        ("edsr", {}, "scale: expected a value, got none$"),
        ("unet", {"scale": 2}, "scale: unknown argument.*got 'scale'"),
        ("edsr", {"scale": 2, "depth": 8}, "depth: unknown argument.*got 'depth'"),
    ],
)
def test_an_argument_that_is_not_of_the_family_is_refused(family, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dhp.models.build(family, rngs=nnx.Rngs(0), **arguments)


# Which axes are one


@one_family
def test_axes_that_meet_are_one_latent(name):
    model, x, _ = network(name)
    dhp.check_axes(model, x.shape[1:])


# What they compute


def check_close(actual, expected, atol=1e-3):
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=atol * min(1, np.std(expected)))


def check_results(found, expected, kept=lambda path, stat: stat):
    """Outputs are close, and so are the BatchNorm statistics of what was kept."""
    (outputs, statistics), (expected_outputs, expected_statistics) = found, expected
    assert np.std(expected_outputs) > 0.1
    check_close(outputs, expected_outputs)
    assert statistics.keys() == expected_statistics.keys()
    for path, stat in expected_statistics.items():
        np.testing.assert_allclose(statistics[path], kept(path, stat), rtol=1e-3, atol=1e-3)


@one_family
@modes
def test_keeping_everything_changes_nothing(name, train):
    model, x, _ = network(name)
    check_results(run(plain(name), x, train=train), run(model, x, train=train))


def silenced(name):
    """The whole network with zeros for all that makes a removed channel differ from zero."""
    model, _, _ = network(name)
    kept, whole = kept_by(name), nnx.clone(plain(name))
    layers = dict(nnx.iter_modules(whole))
    masks = {z: kept(z) for z in dhp.latents(model).values()}
    for path, layer in nnx.iter_modules(model):
        axis = getattr(layer, "z_out", None) or getattr(layer, "z", None)
        if axis is not None:
            for array in ("kernel", "bias", "scale"):
                variable = getattr(layers[path], array, None)
                if variable is not None:
                    variable[...] = variable[...] * axis.keep(masks)
    return whole


@few_families
@modes
def test_a_pruned_network_computes_what_the_whole_one_does_with_channels_at_zero(name, train):
    """A channel is gone where nothing makes it differ from zero, and nothing brings it back."""
    model, x, _ = network(name)
    masks = {z: kept_by(name)(z) for z in dhp.latents(model).values()}
    norms = {path: m.z for path, m in nnx.iter_modules(model) if isinstance(m, dhp.BatchNorm)}
    check_results(
        run(pruned(name), x, train=train),
        run(silenced(name), x, train=train),
        lambda path, stat: stat[norms[path[:-1]].keep(masks)],
    )


@every_family
def test_activations_are_of_the_dtype_and_parameters_stay_float32(name):
    family, arguments, shape = FAMILIES[name]
    with short():
        model = dhp.models.build_abstract(family, **arguments, dtype="bfloat16")
    # The pixels of restored images are float32.
    assert output(model, (1, *shape)).dtype == ("bfloat16" if name in CLASSIFIERS else "float32")
    stored = {v.get_value().dtype for _, v in nnx.to_flat_state(nnx.state(model))}
    assert stored == {jnp.dtype("float32")}


# What is left


def counted(model, shape):
    """FLOPs and params from the arrays that are there and the shapes of what layers return."""
    flops, activated = [], {}

    def last_call(layer, y):
        activated[id(layer)] = y.size
        return 0

    def counting(kind, cost):
        call = kind.__call__

        def counted_call(layer, x):
            y = call(layer, x)
            flops.append(cost(layer, y))
            return y

        return mock.patch.object(kind, "__call__", counted_call)

    def every_pair_at_every_output(conv, y):
        return conv.kernel[...].size * y.shape[1] * y.shape[2]

    with contextlib.ExitStack() as stack:
        for kind, cost in (
            (nnx.Conv, every_pair_at_every_output),
            (nnx.ConvTranspose, every_pair_at_every_output),
            (nnx.BatchNorm, lambda norm, y: 2 * y.size),
            (ReLU, last_call),
            (nnx.PReLU, last_call),
            (nnx.Linear, lambda linear, y: linear.kernel[...].size),
        ):
            stack.enter_context(counting(kind, cost))
        output(model, (1, *shape))
    stored = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, Constant)))
    return sum(flops) + sum(activated.values()), sum(v.get_value().size for _, v in stored)


@every_family
def test_what_is_counted_is_what_is_there(name):
    model, x, masks = network(name)
    shape = x.shape[1:]
    whole, small = dhp.measure_cost(model, shape), dhp.measure_cost(pruned(name), shape)
    predicted = whole.amounts({latent: int(mask.sum()) for latent, mask in masks.items()})
    assert (small.flops, small.params) == (predicted["flops"], predicted["params"])
    assert (small.flops, small.params) == counted(pruned(name), shape)
    assert small.flops < (0.6 if name in CLASSIFIERS else 0.8) * whole.flops


@every_family
def test_no_latent_and_no_hypernetwork_is_left(name):
    small = pruned(name)
    assert dhp.latents(small) == {}
    on_latents = dhp.Axis | Hyper | dhp.BatchNorm | dhp.Bias | dhp.Linear
    for path, node in nnx.iter_graph(small):
        assert not isinstance(node, on_latents), path
        if isinstance(node, nnx.Variable):
            assert type(node) in (nnx.Param, nnx.BatchStat, Constant), path
    last = {path.split(".")[-1] for path in arrays(small)}
    assert last <= {"kernel", "bias", "scale", "mean", "var", "negative_slope"}


@every_family
def test_a_pruned_network_is_saved_and_loaded_bit_for_bit(name, tmp_path):
    dhp.save(tmp_path / "network", pruned(name))
    with short():
        loaded, expected = arrays(dhp.load(tmp_path / "network")), arrays(pruned(name))
    assert loaded.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(loaded[path], array, err_msg=path)
