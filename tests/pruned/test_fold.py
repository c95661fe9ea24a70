"""BatchNorm and biases are folded where that is exact, and nowhere else."""

import json
import logging
from unittest import mock

from flax import linen, nnx
import jax
import jax.numpy as jnp
from networks import MIXED_INPUT, RNGS, Mixed, PlainMixed, arrays, drawn_masks, filled, images, run
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.latent import walk
from dhp_jax.core.layers import ChannelBias
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.surgery import prune as cut
from dhp_jax.models import mobilenet, resnet
from dhp_jax.pruned.fold import Identity

pytestmark = pytest.mark.usefixtures("fast_compilation")
FAMILIES = {  # arguments, input, layers that are folded, layers of these kinds that stay
    "resnet": ({"depth": 20, "width": 0.25}, (8, 8, 3), 9, 0),
    "vgg": ({"depth": 11, "width": 0.05}, (8, 8, 3), 8, 0),
    "densenet": ({"depth": 7, "growth": 4}, (8, 8, 3), 0, 6),
    "mobilenet_v1": ({"width": 0.1}, (16, 16, 3), 7, 0),
    "mobilenet_v2": ({"width": 0.1}, (16, 16, 3), 10, 0),
    "unet": ({"depth": 2, "features": 4, "batch_norm": True}, (8, 8, 1), 3, 0),
    "srresnet": ({"scale": 2, "blocks": 1, "features": 8}, (6, 6, 3), 6, 0),
    "edsr": ({"scale": 2, "blocks": 1, "features": 8}, (6, 6, 3), 1, 0),
    "dncnn": ({"depth": 4, "features": 6}, (8, 8, 1), 4, 0),
}
SLOW = ("resnet", "vgg", "mobilenet_v1", "dncnn")  # whose kinds of layers the others have too
X = images(2, 6, 6, 3)


@pytest.fixture
def short():
    """Deep families of few blocks, which compile quickly."""
    with (
        mock.patch.dict(resnet.BLOCKS, {20: (1, 1, 1)}),
        mock.patch.object(mobilenet, "V1_BLOCKS", mobilenet.V1_BLOCKS[:2]),
        mock.patch.object(mobilenet, "V2_GROUPS", mobilenet.V2_GROUPS[:2]),
    ):
        yield


def kinds(model):
    return [type(module).__name__ for _, _, module in walk(model)]


def left(model):
    return sum(kind in ("BatchNorm", "ChannelBias") for kind in kinds(model))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES]
)
def test_a_folded_network_computes_the_same(short, tmp_path, name):
    arguments, shape, folded_layers, layers_left = FAMILIES[name]
    model = filled(lambda _: dhp.models.build(name, rngs=RNGS, **arguments))
    small = cut(model, drawn_masks(model, 0))
    before = arrays(small)
    folded = dhp.fold(small, shape)
    assert (kinds(folded).count("Identity"), left(folded)) == (folded_layers, layers_left)
    x = images(2, *shape)
    expected = run(small, x)[0]
    np.testing.assert_allclose(run(folded, x)[0], expected, atol=1e-5 * np.abs(expected).max())
    assert arrays(small).keys() == before.keys()
    for path, array in arrays(small).items():
        np.testing.assert_array_equal(array, before[path])
    dhp.save(tmp_path, folded)
    loaded = dhp.load(tmp_path)
    np.testing.assert_array_equal(run(loaded, x)[0], run(folded, x)[0])


def test_folding_is_that_of_the_formula():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, epsilon=1e-3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.conv(x))

    model = filled(Net)
    folded = dhp.fold(model, (6, 6, 3))
    conv, norm = model.conv, model.norm
    slope = norm.scale[...] / np.sqrt(norm.var[...] + 1e-3)
    np.testing.assert_allclose(folded.conv.kernel, conv.kernel[...] * slope, rtol=1e-6)
    shift = norm.bias[...] + (conv.bias[...] - norm.mean[...]) * slope
    np.testing.assert_allclose(folded.conv.bias, shift, rtol=1e-5, atol=1e-6)
    assert isinstance(folded.norm, Identity)


def test_a_network_of_ones_own_is_folded_and_saved(tmp_path):
    model = filled(Mixed)
    small = cut(model, drawn_masks(model, 0))
    folded, x = dhp.fold(small, MIXED_INPUT), images(2, *MIXED_INPUT)
    assert (kinds(folded).count("Identity"), left(folded)) == (2, 0)
    np.testing.assert_allclose(run(folded, x)[0], run(small, x)[0], rtol=1e-4, atol=1e-5)
    dhp.save(tmp_path, folded)
    loaded = dhp.load(tmp_path, build=Mixed)
    np.testing.assert_array_equal(run(loaded, x)[0], run(folded, x)[0])
    ordinary = filled(lambda rngs: PlainMixed(7, 5, 6, rngs))
    assert kinds(dhp.fold(ordinary, MIXED_INPUT)).count("Identity") == 2


class TwoWays(nnx.Module):
    """Two layers that each read what the same one computes."""

    def __init__(self, rngs):
        self.stem, self.stem_norm = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.shift = ChannelBias(4, rngs=rngs)
        self.a, self.a_norm = nnx.Conv(4, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.b, self.b_norm = nnx.Conv(4, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def first(self, x):
        x = self.stem_norm(self.stem(x))
        return self.a_norm(self.a(nnx.relu(x))) + x

    def second(self, x):
        return self.b_norm(self.b(self.shift(self.stem_norm(self.stem(x)))))

    def __call__(self, x):
        return self.first(x) + self.second(x)


def test_what_is_folded_for_one_call_and_then_for_another_is_saved_as_both(tmp_path):
    model = filled(TwoWays)
    model.eval()
    once = dhp.fold(model, (6, 6, 3), call=TwoWays.first)
    folded = dhp.fold(once, (6, 6, 3), call=TwoWays.second)
    chains = {tuple(chain) for chain in architecture_of(folded).folded}
    assert chains == {("stem", "stem_norm", "shift"), ("a", "a_norm"), ("b", "b_norm")}
    second = TwoWays.second(model, X), TwoWays.second(folded, X)
    np.testing.assert_allclose(*second, rtol=1e-4, atol=1e-5)
    dhp.save(tmp_path, folded)
    loaded = dhp.load(tmp_path, build=TwoWays)
    np.testing.assert_array_equal(run(loaded, X)[0], run(folded, X)[0])
    assert architecture_of(loaded).folded == architecture_of(folded).folded


class Parts(nnx.Module):
    """A convolution, BatchNorm, and a forward pass that a test gives."""

    def __init__(self, forward, rngs, **options):
        self.conv = nnx.Conv(3, 3, (3, 3), use_bias=False, **options, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.forward = nnx.static(forward)

    def __call__(self, x):
        return self.forward(self, x)


def both(m, x):
    y = m.conv(x)
    return y + m.norm(y)


def remembers_nothing_of_its_norm(m, x):
    return m.norm(m.conv(x)) + (1.0 if isinstance(m.norm, nnx.BatchNorm) else 0.0)


@pytest.mark.parametrize("average", [True, None, False])
def test_batch_norm_that_is_told_to_use_its_statistics_is_folded(average):
    def forward(m, x, average=average):
        return m.norm(m.conv(x), use_running_average=average)

    model = filled(lambda rngs: Parts(forward, rngs))
    folded = dhp.fold(model, (6, 6, 3))
    assert (left(folded), kinds(folded).count("Identity")) == (
        (1, 0) if average is False else (0, 1)
    )
    found, expected = (run(m, X)[0] for m in (folded, model))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


FORWARD = {
    "between": lambda m, x: m.norm(nnx.relu(m.conv(x))),
    "before": lambda m, x: m.conv(m.norm(x)),
    "output_read_twice": both,
    "output_returned": lambda m, x: jnp.concatenate([m.conv(x), m.norm(m.conv(x))]),
    "norm_called_twice": lambda m, x: m.norm(m.norm(m.conv(x))),
    "conv_called_twice": lambda m, x: m.norm(m.conv(m.conv(x))),
    "kernel_read": lambda m, x: m.norm(m.conv(x)) + jnp.sum(m.conv.kernel[...]),
    "scale_read": lambda m, x: m.norm(m.conv(x)) + jnp.sum(m.norm.scale[...]),
    "statistics_of_the_batch": lambda m, x: m.norm(m.conv(x), use_running_average=False),
    "shifted": lambda m, x: m.norm(m.conv(x) + x),
    "reshaped": lambda m, x: m.norm(m.conv(x).swapaxes(1, 2)),
    "jit": lambda m, x: nnx.jit(lambda m, x: m.norm(m.conv(x)))(m, x),
    "vmap": lambda m, x: m.norm(jax.vmap(m.conv)(x)),
}


@pytest.mark.parametrize("name", FORWARD)
def test_what_is_not_exact_is_not_folded(name):
    model = filled(lambda rngs: Parts(FORWARD[name], rngs))
    folded = dhp.fold(model, (6, 6, 3))
    assert left(folded) == 1
    assert not kinds(folded).count("Identity")
    found, expected = (run(m, X)[0] for m in (folded, model))
    np.testing.assert_array_equal(found, expected)


def test_layers_that_share_a_kernel_are_not_folded():
    class Tied(Parts):
        def __init__(self, rngs):
            super().__init__(lambda m, x: m.other(m.norm(m.conv(x))), rngs)
            self.other = nnx.Conv(3, 3, (3, 3), use_bias=False, rngs=rngs)
            self.other.kernel = self.conv.kernel

    assert left(dhp.fold(filled(Tied), (6, 6, 3))) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": jnp.bfloat16},  # BatchNorm gives float32
        {"conv_general_dilated": lambda *a, **k: jax.lax.conv_general_dilated(*a, **k) ** 2},
    ],
)
def test_convolutions_that_compute_otherwise_are_not_folded(options):
    model = filled(lambda rngs: Parts(lambda m, x: m.norm(m.conv(x)), rngs, **options))
    assert left(dhp.fold(model, (6, 6, 3))) == 1


def test_a_convolution_class_of_ones_own_is_not_folded():
    class Squared(nnx.Conv):
        def __call__(self, x):
            return super().__call__(x) ** 2

    model = filled(lambda rngs: Parts(lambda m, x: m.norm(m.conv(x)), rngs))
    model.conv.__class__ = Squared
    assert left(dhp.fold(model, (6, 6, 3))) == 1


def test_a_forward_pass_that_asks_what_layers_it_has_is_not_folded(caplog):
    model = filled(lambda rngs: Parts(remembers_nothing_of_its_norm, rngs))
    with caplog.at_level(logging.WARNING):
        folded = dhp.fold(model, (6, 6, 3))
    assert left(folded) == 1
    assert "the forward pass depends on what layers it has" in caplog.text
    np.testing.assert_array_equal(run(folded, X)[0], run(model, X)[0])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_numbers_that_a_narrow_dtype_cannot_hold_are_not_folded(caplog):
    class Narrow(nnx.Module):
        def __init__(self, rngs):
            float16 = {"dtype": jnp.float16, "rngs": rngs}
            self.linear = nnx.Linear(3, 4, param_dtype=jnp.float16, **float16)
            self.norm = nnx.BatchNorm(4, **float16)
            self.norm.mean[...], self.norm.var[...] = jnp.full(4, 500.0), jnp.zeros(4)

        def __call__(self, x):
            return self.norm(self.linear(x))

    model = Narrow(nnx.Rngs(0))
    model.eval()
    np.testing.assert_array_equal(dhp.fold(model, (3,))(jnp.ones((1, 3))), model(jnp.ones((1, 3))))
    assert "'linear.bias' has numbers beyond float16" in caplog.text


def test_arrays_that_are_narrower_than_what_is_computed_are_folded_without_rounding(tmp_path):
    def build(rngs):
        return Parts(lambda m, x: m.norm(m.conv(x)), rngs, param_dtype=jnp.bfloat16)

    model = filled(build)
    folded = dhp.fold(model, (6, 6, 3))
    assert left(folded) == 0
    np.testing.assert_allclose(run(folded, X)[0], run(model, X)[0], rtol=1e-5, atol=1e-5)
    dhp.save(tmp_path, folded)
    loaded = dhp.load(tmp_path, build=build)
    np.testing.assert_array_equal(run(loaded, X)[0], run(folded, X)[0])


class Linen(linen.Module):
    """BatchNorm of which some can be folded; the last is given what two layers add up to."""

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.relu(linen.BatchNorm(not train)(linen.Conv(4, (3, 3), use_bias=False)(x)))
        y = linen.ConvTranspose(4, (3, 3))(x)
        y = linen.BatchNorm(use_scale=False, epsilon=0.1)(y, use_running_average=not train)
        return linen.BatchNorm()(x + linen.Dense(4)(y), not train)


class Around(nnx.Module):
    def __init__(self, rngs):
        variables = Linen().init(rngs.params(), jnp.ones((1, 6, 6, 3)))
        self.body = dhp.FromLinen(Linen(), variables, training={"train": True})

    def __call__(self, x):
        return self.body(x)


@pytest.mark.parametrize("around", [False, True])
def test_networks_of_linen_are_folded_and_saved(tmp_path, around):
    def build(rngs):
        return Around(rngs) if around else Around(rngs).body

    model = filled(build)
    before = arrays(model)
    folded = dhp.fold(model, (6, 6, 3))
    body = folded.body if around else folded
    assert set(body.variables()["batch_stats"]) == {"BatchNorm_2"}
    assert sorted(body.variables()["params"]["Conv_0"]) == ["bias", "kernel"]
    expected = run(model, X)[0]
    np.testing.assert_allclose(run(folded, X)[0], expected, rtol=1e-4, atol=1e-5)
    assert arrays(model).keys() == before.keys()
    dhp.save(tmp_path, folded)
    loaded = dhp.load(tmp_path, build=build)
    np.testing.assert_array_equal(run(loaded, X)[0], run(folded, X)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"mask": np.ones((3, 3, 3, 4))},
        {"conv_general_dilated": lambda *a, **k: jax.lax.conv_general_dilated(*a, **k) ** 2},
    ],
)
def test_convolutions_of_linen_that_compute_otherwise_are_not_folded(options):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(True)(linen.Conv(4, (3, 3), **options)(x))

    variables = Net().init(jax.random.key(0), X)
    folded = dhp.fold(dhp.FromLinen(Net(), variables, training={}), (6, 6, 3))
    assert "batch_stats" in folded.variables()


def test_a_shape_that_the_network_does_not_take_is_told_in_one_line():
    with pytest.raises(ValueError, match=r"^input_shape: the model does not take \(6, 6, 2\)") as e:
        dhp.fold(filled(lambda rngs: Parts(lambda m, x: m.conv(x), rngs)), (6, 6, 2))
    assert "\n" not in str(e.value)


def test_transposed_convolutions_and_linear_layers_are_folded():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.ConvTranspose(3, 5, (2, 2), (2, 2), rngs=rngs)
            self.norms = nnx.List([nnx.BatchNorm(n, rngs=rngs) for n in (5, 7)])
            self.linear = nnx.Linear(5, 7, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.norms[1](self.linear(self.norms[0](self.up(x))))

    model = filled(Net)
    folded = dhp.fold(model, (6, 6, 3))
    assert left(folded) == 0
    np.testing.assert_allclose(run(folded, X)[0], run(model, X)[0], rtol=1e-4, atol=1e-5)


def test_what_is_no_network_without_latents_or_no_shape_is_not_folded():
    with pytest.raises(ValueError, match=r"^model: .* without latents, got 4; dhp.prune\(model\)"):
        dhp.fold(filled(Mixed), MIXED_INPUT)
    with pytest.raises(ValueError, match=r"^input_shape: expected positive integers, .* got 4$"):
        dhp.fold(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), 4)
    with pytest.raises(ValueError, match=r"^model: expected an nnx.Module, got \{\}$"):
        dhp.fold({}, (4,))


@pytest.mark.parametrize(
    ("folded", "message"),
    [
        ([["left"]], "folded: expected lists of two or more names of layers, got"),
        ([["left", "nowhere"]], "folded: 'nowhere': expected a BatchNorm or ChannelBias"),
        ([["left_norm", "left"]], "folded: 'left_norm': expected a Conv or ConvTranspose"),
        ([["left", "left_norm", "left_norm"]], "folded: 'left_norm': expected a BatchNorm or"),
        ([["left", 3]], "folded: expected lists of two or more names"),
    ],
)
def test_a_file_that_names_other_layers_as_folded_is_refused(tmp_path, folded, message):
    model = filled(Mixed)
    dhp.save(tmp_path, dhp.fold(dhp.prune(model), MIXED_INPUT))
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "folded": folded}))
    with pytest.raises(ValueError, match=message):
        dhp.load(tmp_path, build=Mixed)
