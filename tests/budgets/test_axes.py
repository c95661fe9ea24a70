"""Axes that meet in a forward pass must be one latent."""

import itertools
import re
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
from networks import (
    MIXED_INPUT,
    Mixed,
    Net,
    conv,
    filled,
    image_and,
    images,
    keep_all,
    thin_resnet,
)
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.export import export
from dhp_jax.tracing import inputs as told
from dhp_jax.tracing.programs import default_call

pytestmark = pytest.mark.usefixtures("fast_compilation")


def added(size_b, forward=lambda net, x: net.a(x) + net.b(x), *, fixed=False):
    """A network that adds two axes which are not one latent."""

    def make(rngs):
        image, a = image_and(8, rngs=rngs)
        b = dhp.Latent(size_b, prunable=not fixed, rngs=rngs)
        return Net(forward, a=conv(image, a, rngs), b=conv(image, b, rngs))

    return filled(make)


def test_an_addition_of_two_latents_is_found_and_both_are_named():
    with pytest.raises(ValueError, match="axes that meet are not the same latent") as raised:
        dhp.check_axes(added(8), (4, 4, 3))
    assert "'a.z_out' (8 channels) or 'b.z_out' (8 channels)" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_addition_to_a_latent_that_is_not_prunable_is_found():
    with pytest.raises(
        ValueError, match=r"pruning 'a\.z_out' \(8 channels\) alone breaks"
    ) as raised:
        dhp.check_axes(added(8, fixed=True), (4, 4, 3))
    assert "fixed width, such as latent 'b.z_out' or a number in its code;" in str(raised.value)


def test_an_addition_to_an_ordinary_layer_is_found():
    def make(rngs):
        image, a = image_and(8, rngs=rngs)
        ordinary = nnx.Conv(3, 8, (1, 1), rngs=rngs)
        return Net(lambda net, x: net.a(x) + net.b(x), a=conv(image, a, rngs), b=ordinary)

    with pytest.raises(
        ValueError, match=r"pruning 'a\.z_out' \(8 channels\) alone breaks"
    ) as raised:
        dhp.check_axes(filled(make), (4, 4, 3))
    assert "fixed width, such as 'b' (Conv) or a number in its code;" in str(raised.value)


def test_a_parameter_that_was_forgotten_is_found_before_a_budget_is_refused():
    def make(rngs):
        image, a = image_and(8, rngs=rngs)
        net = Net(lambda net, x: net.a(x) * net.scale[...], a=conv(image, a, rngs))
        net.scale = nnx.Param(jnp.ones(8))
        return net

    with pytest.raises(ValueError, match=r"fixed width, such as 'scale' \(Param\) or a number"):
        dhp.prune_to(filled(make), (4, 4, 3), flops=0.01)


def test_a_class_is_no_network():
    for use in (
        dhp.check_axes,
        dhp.measure_cost,
        dhp.with_latents,
        lambda net, _: dhp.inference(net),
    ):
        with pytest.raises(ValueError, match=r"^model: expected an nnx.Module, got <class"):
            use(Net, (4, 4, 3))


def test_an_axis_that_lacks_a_part_of_a_concatenation_is_found():
    def make(rngs):
        image, a, b, c = image_and(4, 4, 8, rngs=rngs)

        def forward(net, x):
            return net.join(jnp.concatenate([net.a(x), net.b(x)], -1))

        return Net(forward, a=conv(image, a, rngs), b=conv(image, b, rngs), join=conv(c, c, rngs))

    with pytest.raises(ValueError, match="axes that meet are not the same latent") as raised:
        dhp.check_axes(filled(make), (4, 4, 3))
    for name in ("a.z_out", "b.z_out", "join.z_in"):
        assert repr(name) in str(raised.value)


def test_one_wrong_addition_among_many_latents_is_found_wherever_it_is():
    def make(rngs, wrong):
        image, *zs = image_and(*[5] * 6, rngs=rngs)
        layers = nnx.List([conv(z, z, rngs) for z in zs])
        stems = nnx.List([conv(image, z, rngs) for z in zs])

        def forward(net, x):
            ys = [layer(stem(x)) for stem, layer in zip(net.stems, net.layers, strict=True)]
            return ys[wrong[0]] + ys[wrong[1]]

        return Net(forward, stems=stems, layers=layers)

    for wrong in ((0, 5), (2, 4)):
        model = filled(lambda rngs, wrong=wrong: make(rngs, wrong))
        with pytest.raises(ValueError, match="axes that meet") as raised:
            dhp.check_axes(model, (4, 4, 3))
        assert re.findall(r"'(.*?)' \(5", str(raised.value)) == [f"layers.{n}.z_in" for n in wrong]


def chained(number, calls):
    """Convolutions one after the other, whose forward passes are noted."""

    def make(rngs):
        image, *zs = image_and(*[16] * number, rngs=rngs)

        def forward(net, x):
            calls.append(x)
            for layer in net.layers:
                x = layer(x)
            return x

        pairs = zip([image, *zs], [*zs, image], strict=True)
        return Net(forward, layers=nnx.List([conv(a, b, rngs) for a, b in pairs]))

    return filled(make)


def test_right_axes_are_told_by_as_many_forward_passes_for_any_number_of_latents():
    numbers = []
    for latents in (2, 10):
        calls = []
        dhp.check_axes(chained(latents, calls), (4, 4, 3))
        numbers.append(len(calls))
    assert numbers[0] == numbers[1] <= 5


def test_prune_to_traces_the_whole_network_for_its_axes_once():
    numbers, calls = [], []
    model = chained(3, calls)
    keep = {name: np.arange(z.size) < z.size - z.prunable for name, z in dhp.latents(model).items()}
    for use in (
        lambda: dhp.measure_cost(model, (4, 4, 3)),
        lambda: dhp.check_axes(model, (4, 4, 3)),
        lambda: dhp.prune(model, keep, (4, 4, 3)),
        lambda: dhp.prune_to(model, (4, 4, 3), flops=0.6),
    ):
        calls.clear()
        use()
        numbers.append(len(calls))
    cost, axes, proof, all_of_it = numbers
    assert all_of_it < cost + axes + proof


def test_a_wrong_addition_of_small_latents_is_found_whatever_survivors_are_tried():
    def make(rngs, wrong):
        image, *zs = image_and(*[3] * 3, rngs=rngs)

        def forward(net, x):
            ys = [layer(x) for layer in net.layers]
            return ys[wrong[0]] + ys[wrong[1]]

        return Net(forward, layers=nnx.List([conv(image, z, rngs) for z in zs]))

    for wrong in itertools.combinations(range(3), 2):
        model = filled(lambda rngs, wrong=wrong: make(rngs, wrong))
        with pytest.raises(ValueError, match=r"^model: .* which axes are one"):
            dhp.check_axes(model, (4, 4, 3), call=lambda model, x: model(x))
        with pytest.raises(ValueError, match="axes that meet are not the same latent"):
            dhp.check_axes(model, (4, 4, 3))


def test_right_axes_are_accepted():
    dhp.check_axes(filled(Mixed), MIXED_INPUT)
    model = thin_resnet()
    dhp.check_axes(model, (8, 8, 3))
    dhp.check_axes(dhp.prune(model, keep_all(model)), (8, 8, 3))


def test_prune_to_checks_the_axes_first():
    with pytest.raises(ValueError, match="axes that meet are not the same latent"):
        dhp.prune_to(added(8), (4, 4, 3), flops=0.8)


class Reversed(nnx.Module):
    """Channels that meet themselves in another order, which fits every width."""

    def __init__(self, rngs):
        image, self.z = image_and(8, rngs=rngs)
        self.conv, self.head = conv(image, self.z, rngs), dhp.Linear(self.z, 2, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x)
        return self.head(x + x[..., ::-1])


def test_prune_proves_the_survivors():
    model = Reversed(nnx.Rngs(0))
    keep = {name: np.ones(z.size, bool) for name, z in dhp.latents(model).items()}
    keep["z"] = np.isin(np.arange(8), (0, 7, 2, 5))
    assert dhp.prune(model, keep, (4, 4, 3)).conv.out_features == 4  # pairs that meet
    keep["z"] = np.arange(8) < 4
    with pytest.raises(ValueError, match=r"^model: its latents do not say which .*test_axes.py:"):
        dhp.prune(model, keep, (4, 4, 3))
    with pytest.raises(ValueError, match=r"^keep: has no mask for latent 'z'"):
        dhp.prune(model, {k: v for k, v in keep.items() if k != "z"}, (4, 4, 3))
    several = [jax.ShapeDtypeStruct((1, 4, 4, 3), "float32")]
    with pytest.raises(ValueError, match=r"^model: its latents do not say which .*test_axes.py:"):
        dhp.prune(model, keep, several, call=lambda model, x: 2 * model(x))


class Backwards(Reversed):
    """A class of its own: inputs are known by the class and the arrays of a network."""


@pytest.mark.parametrize(
    "tell",
    [
        lambda model: dhp.measure_cost(model, (4, 4, 3)),
        lambda model: dhp.prune(model, dhp.survivors(model, threshold=0.0), (4, 4, 3)),
    ],
    ids=["measure_cost", "prune"],
)
def test_prune_asks_for_the_inputs_unless_it_was_told_them(tell, monkeypatch):
    monkeypatch.setattr(told, "_KNOWN", {})
    model = Backwards(nnx.Rngs(0))
    keep = {name: np.ones(z.size, bool) for name, z in dhp.latents(model).items()}
    assert dhp.prune(model, keep).conv.out_features == 8  # nothing is gone
    keep["z"] = np.isin(np.arange(8), (0, 7, 2, 5))
    with pytest.raises(ValueError, match=r"^input_shape: expected the shape of one example.* None"):
        dhp.prune(model, keep)
    tell(model)
    graphdef, state = nnx.split(model)
    trained = nnx.merge(graphdef, jax.tree.map(lambda x: 2 * x, state))
    trained.eval()
    assert dhp.prune(trained, keep).conv.out_features == 4  # pairs that meet
    keep["z"] = np.arange(8) < 4
    with pytest.raises(ValueError, match=r"^model: its latents do not say which .*test_axes.py:"):
        dhp.prune(trained, keep)


def test_the_inputs_of_a_few_networks_are_remembered(monkeypatch):
    monkeypatch.setattr(told, "_KNOWN", {})
    monkeypatch.setattr(told, "_MOST_KNOWN", 2)
    models = [added(size) for size in (5, 6, 7)]
    for model in models:
        told.remember_inputs(model, np.ones((1, 4, 4, 3)), default_call)
    assert [told.known_inputs(model) is not None for model in models] == [False, True, True]
    (inputs,) = told.known_inputs(models[2])
    assert type(inputs) is jax.ShapeDtypeStruct


class WithDecoder(Reversed):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.y = dhp.Latent(8, rngs=rngs)
        self.decode = dhp.HyperConv(self.z, self.y, (1, 1), rngs=rngs)
        self.last = dhp.Linear(self.y, 3, rngs=rngs)

    def __call__(self, x):
        x = self.decode(self.conv(x))
        return self.last(x + x[..., ::-1])


def test_inputs_that_were_told_of_a_part_or_of_another_network_prove_nothing(monkeypatch):
    monkeypatch.setattr(told, "_KNOWN", {})
    model = WithDecoder(nnx.Rngs(0))
    keep = {name: np.ones(z.size, bool) for name, z in dhp.latents(model).items()}
    keep["y"] = np.arange(8) < 4
    dhp.measure_cost(model, (4, 4, 3), call=lambda model, x: model.conv(x))
    with pytest.raises(ValueError, match=r"^input_shape: expected the shape of one example"):
        dhp.prune(model, keep)
    told.remember_inputs(model, (4, 4, 5), default_call)
    with pytest.raises(ValueError, match=r"^input_shape: expected the shape of one example"):
        dhp.prune(model, keep)


@pytest.mark.parametrize("shape", ["image", 3, (4, 4.0, 3)])
def test_inputs_that_are_none_are_refused_by_their_name(shape):
    model = Reversed(nnx.Rngs(0))
    keep = {name: np.ones(z.size, bool) for name, z in dhp.latents(model).items()}
    with pytest.raises(ValueError, match=r"^input_shape: expected positive integers, such as \("):
        dhp.prune(model, keep, shape)


def test_a_compiled_function_prunes_too():
    model = Reversed(nnx.Rngs(0))
    keep = {name: np.ones(z.size, bool) for name, z in dhp.latents(model).items()}
    keep["z"] = np.isin(np.arange(8), (0, 7, 2, 5))
    x = images(2, 4, 4, 3)
    expected = dhp.prune(model, keep, (4, 4, 3))(x)
    found = nnx.jit(lambda model, x: dhp.prune(model, keep, (4, 4, 3))(x))(model, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class Shuffled(Reversed):
    def __call__(self, x):
        x = self.conv(x)
        n, h, w, c = x.shape
        return self.head(x.reshape(n, h, w, 2, c // 2).swapaxes(3, 4).reshape(x.shape))


def test_a_shuffle_of_channels_is_told_with_its_line():
    model = Shuffled(nnx.Rngs(0))
    keep = {name: np.ones(z.size, bool) for name, z in dhp.latents(model).items()}
    keep["z"] = np.isin(np.arange(8), (0, 3, 5, 6))
    with pytest.raises(ValueError, match=r"^model: .*because of reshape to .*/test_axes.py:\d+$"):
        dhp.prune(model, keep, (4, 4, 3))
    with pytest.raises(ValueError, match=r"^model: .*cannot reshape array of .*/test_axes.py:\d+$"):
        dhp.check_axes(model, (4, 4, 3))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 4, 5), r": the model does not take \(4, 4, 5\): .* at .*/networks.py:\d+$"),
        (
            (3, 4, 4),
            r": the model does not take \(3, 4, 4\): .*; the shape of an image is \(height,",
        ),
        ((2, 4, 4, 3), r": expected .* without the batch axis, for convolutions of 2 axes; got "),
    ],
)
def test_a_shape_of_other_channels_of_channels_first_or_with_a_batch_axis_is_refused(
    shape, message, tmp_path
):
    plain = dhp.prune(filled(Mixed))
    for made in (
        lambda: dhp.check_axes(filled(Mixed), shape),
        lambda: dhp.measure_cost(plain, shape),
        lambda: dhp.with_latents(nnx.clone(plain), shape),
    ):
        with pytest.raises(ValueError, match=f"^(input_shape|inputs){message}"):
            made()
    message = message if len(shape) == 3 else ": the model does not take "  # it may be of frames
    with pytest.raises(ValueError, match=f"^input_shape{message}"):
        export(plain, tmp_path / "out", shape, format="safetensors", build=Mixed)
    assert not list(tmp_path.iterdir())


def test_a_pixel_shuffle_is_accepted_and_pruned_to_whole_channels():
    def make(rngs):
        image, z = image_and(5, rngs=rngs)

        def forward(net, x):
            y = net.up(x)
            n, h, w, c = y.shape
            y = y.reshape(n, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
            return net.last(y.reshape(n, 2 * h, 2 * w, c // 4))

        up, last = conv(image, dhp.repeat(z, 4), rngs), conv(z, image, rngs)
        return Net(forward, up=up, last=last)

    model, x = filled(make), images(1, 3, 3, 3)
    dhp.check_axes(model, (3, 3, 3))
    mask = np.array([1, 0, 1, 0, 1], bool)
    small = dhp.prune(model, {"last.z_in": mask, "last.z_out": np.ones(3, bool)})
    kernel = np.asarray(model.last.kernel()) * mask[:, None]
    whole = dhp.prune(model, keep_all(model))
    whole.last.kernel[...] = kernel
    np.testing.assert_allclose(small(x), whole(x), rtol=1e-5, atol=1e-5)


def test_a_network_that_is_called_otherwise_is_pruned_to_a_budget_and_told_of():
    class Encoder(WithDecoder):
        def __call__(self, x):
            raise NotImplementedError

        def encode(self, x, *, times):
            return self.last(self.decode(self.conv(x))) * times

    def call(model, x):
        return model.encode(x, times=2)

    model = filled(Encoder)
    dhp.check_axes(model, (4, 4, 3), call=call)
    small = dhp.prune_to(model, (4, 4, 3), flops=0.6, call=call)
    told = dhp.summary(model, small, (4, 4, 3), call=call)
    assert 0.4 < told.after.flops / told.before.flops <= 0.6
    assert call(small, images(2, 4, 4, 3)).shape[-1] == 3
    with warnings.catch_warnings():  # which of the two is faster is not the point
        warnings.simplefilter("ignore")
        timed = dhp.prune_to(model, (4, 4, 3), flops=0.6, call=call, batch=1)
    assert nnx.to_pure_dict(nnx.state(timed)).keys() == nnx.to_pure_dict(nnx.state(small)).keys()
