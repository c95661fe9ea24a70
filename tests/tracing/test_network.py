"""A network that nobody wrote for pruning, as one of latents: from its weights to files."""

from collections import namedtuple
import functools
import importlib
import importlib.util
import sys
import warnings

from awkward import SizesInAConfig, Widths
from flax import linen, nnx
import jax
import jax.numpy as jnp
from networks import filled
import numpy as np
import optax
from PIL import Image
import pytest
from restricted import randomised

import dhp_jax as dhp
from dhp_jax import predict
from dhp_jax.core.latent import walk
from dhp_jax.export import export
from dhp_jax.pruned.fold import Identity

needs_stablehlo = pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None, reason="flatbuffers is not installed"
)


class Net(nnx.Module):
    """A residual network with a hidden layer."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.first, self.second = (nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(2))
        self.hidden, self.head = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = (x + self.second(nnx.relu(self.first(x)))).mean((1, 2))
        return self.head(nnx.relu(self.hidden(x)))


SHAPE = (8, 8, 3)
Pair = namedtuple("Pair", "left right")
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, *SHAPE)), jnp.float32)


@functools.cache
def made():
    return randomised(Net(nnx.Rngs(0)))


def plain():
    model = nnx.clone(made())
    model.eval()
    return model


def compiled(model, x):
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s, copy=True)(x))(state, x))


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"embedding": 8}, marks=pytest.mark.slow), {"embedding": 1}]
)
def test_before_training_it_computes_what_the_network_does_to_the_bit(options):
    model = plain()
    net = dhp.with_latents(model, SHAPE, **options)
    np.testing.assert_array_equal(net(X), model(X))
    np.testing.assert_array_equal(compiled(net, X), compiled(model, X))
    assert type(net) is Net
    assert {name: z.size for name, z in dhp.latents(net).items()} == {
        "stem": 8,
        "first": 8,
        "hidden": 16,
    }


def test_latents_and_scores_take_no_other_array_of_the_size_of_a_kernel():
    def buffers(network):
        leaves = jax.tree.leaves(nnx.state(network, nnx.Param))
        return {x.unsafe_buffer_pointer() for x in leaves if x.ndim > 1}

    model = plain()
    net = dhp.with_latents(model, SHAPE)
    assert buffers(net) == buffers(model) == buffers(dhp.prune(net))


def test_without_a_latent_there_is_nothing_left_of_what_it_rules():
    net = dhp.with_latents(plain(), SHAPE)
    z = dhp.latents(net)["first"]
    z.vector.set_value(z.vector[...].at[3].set(0))
    assert (np.asarray(net.first.kernel[...])[..., 3] == 0).all()
    assert (np.asarray(net.second.kernel[...])[:, :, 3] == 0).all()
    assert np.abs(np.asarray(net.first.kernel[...])[..., 2]).min() > 0


def test_latents_are_float32_whatever_jax_is_set_to():
    model = nnx.Sequential(nnx.Linear(3, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 2, rngs=nnx.Rngs(1)))
    with jax.enable_x64(True):
        net = dhp.with_latents(model, (3,))
        for each in (net, dhp.with_gates(net, rngs=nnx.Rngs(0))):
            assert [z.value().dtype for z in dhp.latents(each).values()] == [jnp.float32]


def noisy(model, x, key):
    return model.last(nnx.relu(model.first(x))) + jax.random.normal(key, (2,))


@pytest.mark.parametrize("call", [None, lambda model, *inputs: noisy(model, *inputs)])
def test_a_network_of_random_keys_comes_back_from_a_file_and_is_pruned(tmp_path, call):
    class Noisy(nnx.Module):
        __call__ = noisy

        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

    inputs = jnp.ones((1, 3)), jax.random.key(0)
    options = {"min_channels": np.int64(2), "call": call}
    net = dhp.with_latents(Noisy(nnx.Rngs(0)), inputs, **options)
    dhp.save(tmp_path, net)
    loaded = dhp.load(tmp_path, build=Noisy, call=call)
    np.testing.assert_array_equal(loaded(*inputs), net(*inputs))
    assert dhp.prune_to(loaded, flops=0.4).first.out_features == 2
    told = "What stays:\n  other axes: the file that it is from tells no reasons\n"
    assert told in str(dhp.explain(loaded))
    assert "last.bias[0]" in str(dhp.explain(net))
    if call is not None:
        unknown = dhp.load(tmp_path, build=Noisy)
        with pytest.raises(ValueError, match=r"give load the call that with_latents had"):
            dhp.prune_to(unknown, inputs, flops=0.4)
        with pytest.raises(ValueError, match=r"^inputs: expected the shape of one example"):
            dhp.summary(unknown, unknown)


def test_training_reaches_latents_and_weights_and_the_proximal_step_shrinks_latents_alone():
    net = dhp.with_latents(plain(), SHAPE, embedding=2)
    net.train()
    mask = dhp.prunable_latents(nnx.state(net, nnx.Param))
    shrink = optax.masked(dhp.prox_l1(strength=1.0, learning_rate=0.1), mask)
    optimizer = nnx.Optimizer(net, optax.chain(optax.sgd(1e-3), shrink), wrt=nnx.Param)
    before = {path: np.asarray(x.get_value()) for path, x in nnx.to_flat_state(nnx.state(net))}
    grads = nnx.jit(nnx.grad(lambda net: (net(X) ** 2).mean()))(net)
    latents = [x for _, x in nnx.to_flat_state(grads) if isinstance(x, dhp.LatentVector)]
    assert len(latents) == 3
    assert all(np.abs(np.asarray(x.get_value())).sum() > 0 for x in latents)
    nnx.jit(lambda optimizer, net, grads: optimizer.update(net, grads))(optimizer, net, grads)
    for path, leaf in nnx.to_flat_state(nnx.state(net)):
        after = np.asarray(leaf.get_value())
        if isinstance(leaf, dhp.LatentVector):
            assert (after < before[path] - 0.05).all()
        elif path[-1] in ("w2", "mean"):
            assert not np.array_equal(after, before[path])


def test_what_is_pruned_is_the_network_without_what_is_gone_and_comes_back_from_a_file(tmp_path):
    model = plain()
    net = dhp.with_latents(model, SHAPE)
    small = dhp.prune_to(net, flops=0.5, by=dhp.l1_scores(net), keep={"hidden": 0.75})
    small.eval()
    assert (small.hidden.in_features, small.hidden.out_features) == (small.stem.out_features, 16)
    whole, left = dhp.measure_cost(model, SHAPE), dhp.measure_cost(small, SHAPE)
    assert 0.4 < left.flops / whole.flops <= 0.5
    dhp.save(tmp_path / "small", small, input_shape=SHAPE)
    np.testing.assert_array_equal(dhp.load(tmp_path / "small", build=Net)(X), small(X))
    dhp.save(tmp_path / "net", net)
    loaded = dhp.load(tmp_path / "net", build=Net)
    np.testing.assert_array_equal(loaded(X), net(X))
    again = dhp.prune_to(loaded, flops=0.5, by=dhp.l1_scores(loaded), keep={"hidden": 0.75})
    again.eval()
    np.testing.assert_array_equal(again(X), small(X))
    twice = dhp.prune_to(dhp.with_latents(small, SHAPE, min_channels=2), flops=0.5)
    twice.eval()
    dhp.save(tmp_path / "twice", twice)
    np.testing.assert_array_equal(dhp.load(tmp_path / "twice", build=Net)(X), twice(X))


def test_costs_of_survivors_are_those_of_the_smaller_network():
    net = dhp.with_latents(plain(), SHAPE)
    cost = dhp.measure_cost(net, SHAPE)
    rng = np.random.default_rng(0)
    for _ in range(3):
        keep = {
            n: rng.permutation(z.size) < rng.integers(4, z.size)
            for n, z in dhp.latents(net).items()
        }
        small = dhp.prune(net, keep)
        found = dhp.measure_cost(small, SHAPE)
        counts = {name: int(mask.sum()) for name, mask in keep.items()}
        assert cost.amounts(counts) == found.amounts({})
        a, b, c = (counts[name] for name in ("stem", "first", "hidden"))
        flops = 64 * (9 * (3 * a + 2 * a * b) + 2 * a) + a * c + 4 * c
        assert found.flops == flops
        assert found.params == sum(x.size for x in jax.tree.leaves(nnx.state(small, nnx.Param)))
        assert int(jax.jit(lambda c: cost.amounts(c)["flops"])(counts)) == flops


def test_an_axis_whose_positions_are_products_counts_the_factor_that_may_go_alone():
    class Descriptors(nnx.Module):  # as many as centres times features; of both only one may go
        def __init__(self, rngs):
            self.a, self.centres = nnx.Linear(4, 12, rngs=rngs), nnx.Linear(12, 5, rngs=rngs)
            self.head = nnx.Linear(60, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.a(x))
            pairs = jnp.einsum("btk,btd->bkd", nnx.sigmoid(self.centres(x)), x)
            return self.head(pairs.reshape(len(x), -1))

    net = dhp.with_latents(randomised(Descriptors(nnx.Rngs(0))), (6, 4))
    assert {name: z.size for name, z in dhp.latents(net).items()} == {"a": 12}
    small = dhp.prune(net, {"a": np.arange(12) % 2 > 0})
    flops = dhp.measure_cost(net, (6, 4)).amounts({"a": 6})["flops"]
    assert flops == dhp.measure_cost(small, (6, 4)).flops == 6 * (4 * 6 + 2 * 6 * 5) + 30 * 3


def test_the_plain_form_of_a_family_is_pruned_as_its_declared_latents_are():
    declared = filled(
        lambda rngs: dhp.models.build("resnet", depth=8, width=0.5, num_classes=10, rngs=rngs)
    )
    ordinary = dhp.prune(declared)
    net = dhp.with_latents(ordinary, (16, 16, 3))
    ours, theirs = list(dhp.l1_scores(net).values()), list(dhp.l1_scores(declared).values())
    for score in theirs:  # the declared last stage stays
        assert any(len(o) == len(score) and np.allclose(o, score, rtol=1e-6) for o in ours)
    assert len(ours) == len(theirs) + 1
    found = dhp.measure_cost(net, (16, 16, 3))
    expected = dhp.measure_cost(declared, (16, 16, 3))
    assert (found.flops, found.params) == (expected.flops, expected.params)
    last = {"blocks.2.projection.conv": 1.0}
    small = dhp.prune_to(net, flops=0.5, by=dhp.l1_scores(net), keep=last)
    other = dhp.prune_to(declared, (16, 16, 3), flops=0.5, by=dhp.l1_scores(declared))
    of_both = (jax.tree.leaves(nnx.state(network)) for network in (small, other))
    for ours, theirs in zip(*of_both, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_stays_is_told_with_its_reason():
    told = str(dhp.explain(dhp.with_latents(plain(), SHAPE)))
    assert "  stem: 8 entries, with first, hidden, norm" in told
    assert "conv_general_dilated meets an axis that stays at" in told  # the image's channels
    assert "  the windows of kernels: 3" in told.splitlines()
    assert max(map(len, told.splitlines())) <= 80
    assert "it is an output of the network" in told
    assert "test_network.py:" in told


class Transformer(nnx.Module):
    """Patches, attention between LayerNorms, and classes: nothing of it can be folded."""

    def __init__(self, rngs, classes=4):
        self.patches = nnx.Conv(3, 8, (4, 4), strides=4, rngs=rngs)
        self.before, self.after = (nnx.LayerNorm(8, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(2, 8, qkv_features=8, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(8, 24, rngs=rngs)
        self.head = nnx.Linear(24, classes, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        x = x + self.attention(self.before(x))
        return self.head(nnx.gelu(self.hidden(self.after(x).mean(1))))


def net_of(build):
    model = randomised(build(nnx.Rngs(0)))
    model.eval()
    return dhp.with_latents(model, SHAPE, min_channels=2)


@pytest.fixture(scope="module", params=[pytest.param(Net, marks=pytest.mark.slow), Transformer])
def kind(request):
    """A network with BatchNorm, and one with LayerNorm and attention, of latents and pruned."""
    net = net_of(request.param)
    small = dhp.prune_to(net, flops=0.6, by=dhp.l1_scores(net))
    small.eval()
    return request.param, net, small


def test_what_is_folded_computes_the_same_and_comes_back_from_a_file(kind, tmp_path):
    build, _, small = kind
    folded = dhp.fold(small, SHAPE)
    np.testing.assert_allclose(folded(X), small(X), rtol=1e-4, atol=1e-4)
    assert (build is Net) == (
        "norm" in {path for path, _, m in walk(folded) if m.__class__ is Identity}
    )
    dhp.save(tmp_path / "folded", folded, input_shape=SHAPE)
    np.testing.assert_array_equal(dhp.load(tmp_path / "folded", build=build)(X), folded(X))


@pytest.mark.parametrize(
    "format",
    [
        "safetensors",
        pytest.param("stablehlo", marks=needs_stablehlo),
        pytest.param("onnx", marks=pytest.mark.onnx),
    ],
)
def test_a_pruned_network_is_exported_and_computes_the_same_there(kind, tmp_path, format):
    build, _, small = kind
    made = export(
        small,
        tmp_path / "small",
        SHAPE,
        format=format,
        build=build if format == "safetensors" else None,
    )
    assert max(made.differences.values()) <= 1e-3 * max(1, made.largest)
    assert made.folded == (build is Net)


def test_commands_use_a_pruned_network_whose_function_the_user_names(kind, tmp_path, capsys):
    build, _, small = kind
    notes = {"task": "classification", "mean": [120.0] * 3, "std": [60.0] * 3}
    dhp.save(tmp_path / "small", small, input_shape=SHAPE, **notes)
    image = np.random.default_rng(1).integers(0, 256, SHAPE, np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    arguments = [str(tmp_path / "small"), str(tmp_path / "image.png"), "--top=1"]
    with pytest.raises(ValueError, match=r"expected load\(path, build=...\).*--build=module"):
        predict.main(arguments)
    predict.main([*arguments, f"--build={build.__module__}:{build.__name__}"])
    shares = nnx.softmax(small((image[None].astype(np.float32) - 120) / 60))[0]
    expected = f"{int(shares.argmax())} {float(shares.max()):.1%}"
    assert capsys.readouterr().out.strip().endswith(expected)


def test_other_classes_are_learnt_by_what_is_left_and_by_a_network_of_latents(kind, tmp_path):
    build, net, small = kind
    for model in (net, small):
        six = dhp.with_classes(model, 6, rngs=nnx.Rngs(1), layer="head")
        assert (six(X).shape, model(X).shape) == ((4, 6), (4, 4))
        dhp.save(tmp_path / "six", six)
        loaded = dhp.load(tmp_path / "six", build=lambda rngs: sized(build, 6, rngs))
        np.testing.assert_array_equal(loaded(X), six(X))
    six = dhp.with_classes(net, 6, rngs=nnx.Rngs(1), layer="head")
    keep = {name: np.arange(z.size) < z.size // 2 for name, z in dhp.latents(six).items()}
    half = dhp.prune(six, keep)
    assert (half(X).shape, half.head.in_features) == ((4, 6), net.head.in_features // 2)
    with pytest.raises(ValueError, match=r"^layer: expected one of .*head.*; got 'tail'"):
        dhp.with_classes(net, 6, rngs=nnx.Rngs(1), layer="tail")
    with pytest.raises(ValueError, match=r"^layer: expected the path of the linear layer"):
        dhp.with_classes(small, 6, rngs=nnx.Rngs(1))


def sized(build, classes, rngs):
    model = build(rngs)
    model.head = nnx.Linear(model.head.in_features, classes, rngs=rngs)
    return model


@pytest.mark.parametrize("m", [None, 1, 8])
def test_the_memory_of_both_forms_is_told(m):
    net = dhp.with_latents(plain(), SHAPE, embedding=m)
    sizes = [(9, 24), (9, 64), (9, 64), (1, 128), (1, 64)]  # taps, and pairs of channels
    there = sum(taps * pairs for taps, pairs in sizes)
    told = " ".join(str(dhp.explain(net)).split())
    least = f"{there:,} numbers ({4 * there / 1e6:.3g} MB)"
    if m is None:
        assert f"5 arrays, of {least}, are times latents." in told
        return
    trained = sum(pairs * (1 + 2 * m + m * taps + taps) for taps, pairs in sizes)
    assert f"5 arrays are generated from {trained:,} numbers ({4 * trained / 1e6:.3g} MB)" in told
    assert f"in place of {least.replace(' numbers', '')}, which embedding=None takes." in told


def test_a_network_of_which_nothing_can_go_is_refused_with_the_place():
    class Fixed(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.b(self.a(x) * jnp.arange(1.0, 7.0))

    with pytest.raises(ValueError, match=r"^model: nothing of it can be pruned.*test_network.py:"):
        dhp.with_latents(Fixed(nnx.Rngs(0)), (4,))


def test_a_reason_names_the_line_that_calls_a_library_and_none_in_it(tmp_path, monkeypatch):
    (tmp_path / "einops").mkdir()
    source = "import jax.numpy as jnp\n\n\ndef ordered(x):\n    return jnp.sort(x)\n"
    (tmp_path / "einops" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "einops", raising=False)
    einops = importlib.import_module("einops")
    monkeypatch.setitem(sys.modules, "einops", einops)

    class Ordered(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.b(einops.ordered(self.a(x)))

    with pytest.raises(ValueError, match=r"sort orders it at tracing/test_network.py:"):
        dhp.with_latents(Ordered(nnx.Rngs(0)), (4,))


@functools.cache
def traced():
    """A network that several tests share and leave as it is."""
    return dhp.with_latents(plain(), SHAPE)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"no": 0.5}, r"^keep: expected one of first, hidden, stem; got 'no'"),
        ({"stem": 2}, r"^keep\['stem'\]: expected a share in \(0, 1\], got 2"),
        (["stem"], r"^keep: expected shares by latent, such as .*, got \['stem'\]"),
    ],
)
def test_least_shares_that_are_none_are_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        dhp.prune_to(traced(), flops=0.9, keep=keep)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((8, 8.0, 3), {}, r"^inputs: expected the shape of one example, .*; got \(8, 8.0, 3\)$"),
        (8, {}, r"^inputs: expected the shape of one example, .*; got 8$"),
        (
            (None, 8, 8, 3),
            {},
            r"^inputs: expected the shape of one .*; got \(None, 8, 8, 3\)$",
        ),
        ([Pair(X, X)], {}, "^inputs: expected .*, of which call= may make others; got a Pair$"),
        (SHAPE, {"embedding": 0}, "^embedding: expected a positive integer, got 0$"),
        (SHAPE, {"embedding": "no"}, "^embedding: expected a positive integer, got 'no'$"),
    ],
)
def test_inputs_and_options_that_are_none_are_refused(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        dhp.with_latents(plain(), inputs, **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (linen.Dense(3), r"^model: expected .* dhp.FromLinen\(module, variables\), got Dense\("),
        (jnp.tanh, r"^model: expected .* dhp.FromFunction\(function, params\), got "),
        (Net, "^model: expected an nnx.Module, got <class"),
    ],
)
def test_what_is_another_network_is_told_the_way(model, message):
    with pytest.raises(ValueError, match=message):
        dhp.with_latents(model, SHAPE)


def test_for_a_network_that_wants_more_arguments_a_call_is_told():
    class Trained(Net):
        def __call__(self, x, *, train):
            return super().__call__(x)

    model = Trained(nnx.Rngs(0))
    told = r"^inputs: the model does not take \(8, 8, 3\): .* 'train'; give a call that does"
    with pytest.raises(ValueError, match=told):
        dhp.with_latents(model, SHAPE)
    assert dhp.latents(dhp.with_latents(model, SHAPE, call=lambda model, x: model(x, train=False)))


def test_channels_over_which_a_softmax_or_maximum_goes_may_go_and_that_is_told():
    class Gated(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)

        def __call__(self, x):
            x = self.a(x)
            return self.b(nnx.softmax(x, -1) * x.max(-1, keepdims=True))

    model = randomised(Gated(nnx.Rngs(0)))
    net = dhp.with_latents(model, (3,), min_channels=2)
    told = str(dhp.explain(net))
    assert "a: a maximum or softmax goes over it at tracing/test_network.py:" in told
    keep = np.arange(6) % 3 > 0
    small = dhp.prune(net, {"a": keep})
    x = np.asarray(X[:, 0, 0], np.float64)
    left = (x @ np.asarray(model.a.kernel[...]) + np.asarray(model.a.bias[...]))[:, keep]
    powers = np.exp(left)
    y = powers / powers.sum(1, keepdims=True) * left.max(1, keepdims=True)
    expected = y @ np.asarray(model.b.kernel[...])[keep] + np.asarray(model.b.bias[...])
    np.testing.assert_allclose(small(x), expected, rtol=1e-4, atol=1e-5)


def test_numbers_that_evaluation_draws_over_channels_are_told_to_be_others_after_pruning():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b, self.rngs = (
                nnx.Linear(3, 6, rngs=rngs),
                nnx.Linear(6, 2, rngs=rngs),
                rngs,
            )

        def __call__(self, x):
            x = self.a(x)
            return self.b(x + jax.random.normal(self.rngs.noise(), x.shape))

    told = " ".join(str(dhp.explain(dhp.with_latents(Noisy(nnx.Rngs(0, noise=1)), (3,)))).split())
    assert "a: random numbers are drawn over it in evaluation at tracing/test_network.py:" in told


def test_heads_that_share_keys_are_numbers_that_go_with_them_and_come_back_from_a_file(tmp_path):
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.q, self.k = nnx.Linear(3, 12, rngs=rngs), nnx.Linear(3, 6, rngs=rngs)
            self.o, self.heads, self.shared = nnx.Linear(12, 2, rngs=rngs), 6, 3

        def __call__(self, x):
            q, k = self.q(x).reshape(len(x), self.heads, -1), self.k(x)
            k = k.reshape(len(x), self.shared, -1).repeat(self.heads // self.shared, axis=1)
            return self.o((q * k).reshape(len(x), -1))

    model = randomised(Shared(nnx.Rngs(0)))
    dhp.save(tmp_path / "net", dhp.with_latents(model, (3,), min_channels=1))
    net = dhp.load(tmp_path / "net", build=Shared)
    small = dhp.prune(net, {"q": np.array([True, False, True])})
    assert (small.heads, small.shared, small.q.out_features) == (4, 2, 8)
    x = X[:, 0, 0]
    products = np.asarray(model.q(x)) * np.asarray(model.k(x)).reshape(4, 3, 2).repeat(
        2, 1
    ).reshape(4, 12)
    kept = np.isin(np.arange(12) // 4, (0, 2))
    expected = products[:, kept] @ np.asarray(model.o.kernel)[kept] + np.asarray(model.o.bias)
    np.testing.assert_allclose(small(x), expected, rtol=1e-4, atol=1e-5)


def test_a_size_that_a_tuple_holds_is_cut_and_comes_back_from_a_file(tmp_path):
    class Windows(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
            self.shape = (2, 6)

        def __call__(self, x):
            x = self.a(x).reshape(-1, *self.shape)
            return self.b(x.sum(1))

    model, x = randomised(Windows(nnx.Rngs(0))), X[:, 0, 0]
    dhp.save(tmp_path / "net", dhp.with_latents(model, [X[:, 0, 0]], min_channels=1))
    net = dhp.load(tmp_path / "net", build=Windows)
    small = dhp.prune(net, {"a": np.arange(6) < 4})
    assert small.shape == (2, 4)
    model.b.kernel[...] = model.b.kernel[...] * (np.arange(6) < 4)[:, None]
    np.testing.assert_allclose(small(x), model(x), rtol=1e-5)
    dhp.save(tmp_path / "small", small)
    np.testing.assert_array_equal(dhp.load(tmp_path / "small", build=Windows)(x), small(x))


def test_sizes_in_a_configuration_are_cut_in_each_layer_and_come_back_from_a_file(tmp_path):
    net = dhp.with_latents(SizesInAConfig(nnx.Rngs(0)), (5, 3), min_channels=1)
    left = {name: np.ones(z.size, bool) for name, z in dhp.latents(net).items()}
    left["blocks.0.q"][1] = left["blocks.2.q"][0] = False
    small, x = dhp.prune(net, left), X[:, :5, 0]
    assert [block.config.heads for block in small.blocks] == [2, 3, 2]
    assert [block.config.width for block in small.blocks] == [8, 12, 8]
    assert net.config == small.config == Widths()
    dhp.save(tmp_path / "small", small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = dhp.load(tmp_path / "small", build=SizesInAConfig)
    np.testing.assert_array_equal(loaded(x), small(x))


def test_of_numbers_that_are_alike_the_one_that_counts_is_cut():
    class Heads(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 16, rngs=rngs), nnx.Linear(16, 2, rngs=rngs)
            self.heads, self.numbers = 4, 4

        def __call__(self, x):
            x = self.a(x).reshape(len(x), self.heads, self.numbers)
            return self.b(nnx.relu(x / jnp.sqrt(self.numbers)).reshape(len(x), -1))

    net = dhp.with_latents(Heads(nnx.Rngs(0)), (3,), min_channels=1)
    small = dhp.prune(net, {"a": np.arange(4) < 3})
    assert (small.heads, small.numbers, small.a.out_features) == (3, 4, 12)


def test_arrays_without_a_variable_are_cut_and_come_back_from_a_file(tmp_path):
    class Scaled(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
            self.scales = nnx.List([jnp.arange(1.0, 9.0)])

        def __call__(self, x):
            return self.b(self.a(x) * self.scales[0])

    model = randomised(Scaled(nnx.Rngs(0)))
    model.scales[0] = model.scales[0] + 1
    net = dhp.with_latents(model, (3,))
    small = dhp.prune(net, {"a": np.arange(8) % 2 > 0})
    np.testing.assert_array_equal(small.scales[0], [3, 5, 7, 9])
    for each in (model, net, small):
        dhp.save(tmp_path / "net", each)
        loaded = dhp.load(tmp_path / "net", build=Scaled)
        np.testing.assert_array_equal(loaded(X[0, :, 0]), each(X[0, :, 0]))


def test_kernels_that_are_not_generated_are_told_with_the_cause():
    class Waves(nnx.Module):
        def __init__(self, rngs):
            options = {"dtype": jnp.complex64, "param_dtype": jnp.complex64, "rngs": rngs}
            self.a, self.b = nnx.Linear(3, 6, **options), nnx.Linear(6, 5, **options)
            self.c = nnx.SpectralNorm(nnx.Linear(5, 8, rngs=rngs), update_stats=False, rngs=rngs)
            self.d = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.d(nnx.relu(self.c(jnp.abs(self.b(jnp.tanh(self.a(x)))))))

    notes = dhp.explain(dhp.with_latents(Waves(nnx.Rngs(0)), (3,))).notes
    assert notes[-2:] == [
        "Cut, but not generated, for its numbers are complex64: a.kernel, b.kernel.",
        "Cut, but not generated, for the code reads or sets it: c.layer_instance.kernel.",
    ]


def test_channels_of_which_all_pairs_are_features_stay_and_that_is_told():
    class Pooled(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)
            self.c = nnx.Linear(25, 2, rngs=rngs)

        def __call__(self, x):
            x = self.b(nnx.relu(self.a(x)))
            return self.c(jnp.einsum("bc,bd->bcd", x, x).reshape(len(x), -1))

    net = dhp.with_latents(Pooled(nnx.Rngs(0)), (3,))
    assert {name: z.size for name, z in dhp.latents(net).items()} == {"a": 6}
    told = " ".join(str(dhp.explain(net)).split())
    assert "b.kernel[1], c.kernel[0]: positions of an axis are products of entries" in told
    assert "because of dot_general at tracing/test_network.py:" in told
