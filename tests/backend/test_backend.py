"""What makes networks fast on a platform computes the same numbers as what it replaces."""

import functools
import gc
import re
from unittest import mock

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import lax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
from networks import RNGS, filled
import numpy as np
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.backend import hypernets
from dhp_jax.backend.cpu_conv import LAYOUT, convolution
from dhp_jax.backend.hypernets import pack_axes
from dhp_jax.backend.inference import tune
from dhp_jax.backend.platform import compiler_options
from dhp_jax.core.hypernet import hyper_kernels
from dhp_jax.core.latent import walk
from dhp_jax.core.surgery import prune as cut
from dhp_jax.tasks import Classification, classification, evaluate
from dhp_jax.train.state import start
from dhp_jax.train.step import compile_step, make_step, on_resident_data

SIDES = st.integers(5, 9)
PADS = st.integers(-1, 3)


@st.composite
def convolutions(draw):
    """Shapes of an input and a kernel, and the arguments of a convolution of them."""
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    per_group = draw(st.integers(1, 3))
    out_per_group = draw(st.integers(1, 3))
    pad = st.tuples(PADS, PADS)
    arguments = {
        "window_strides": draw(st.tuples(*[st.integers(1, 3)] * 2)),
        "padding": draw(st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(pad, pad))),
        "rhs_dilation": draw(st.one_of(st.none(), st.tuples(*[st.integers(1, 2)] * 2))),
        "dimension_numbers": LAYOUT,
        "feature_group_count": groups,
    }
    x = (draw(st.integers(1, 3)), draw(SIDES), draw(SIDES), groups * per_group)
    kernel = (*draw(st.tuples(*[st.integers(1, 3)] * 2)), per_group, groups * out_per_group)
    return x, kernel, arguments


def with_gradients(convolve, x, kernel, seed):
    """The output, and the gradients for a drawn gradient of the output."""

    @jax.jit
    def of(x, kernel):
        y, pull = jax.vjp(convolve, x, kernel)
        return y, *pull(drawn(y.shape, seed))

    return of(x, kernel)


def drawn(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(convolutions(), st.integers(0, 99))
def test_a_convolution_and_its_gradients_equal_those_of_lax(case, seed):
    x, kernel, arguments = case
    x, kernel = drawn(x, seed), drawn(kernel, seed + 1)
    expected = functools.partial(lax.conv_general_dilated, **arguments)
    if 0 in jax.eval_shape(expected, x, kernel).shape:
        return
    ours = with_gradients(functools.partial(convolution, **arguments), x, kernel, seed)
    for a, b in zip(ours, with_gradients(expected, x, kernel, seed), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "kernel", "stride", "paired"),
    [
        (8, (3, 3, 5, 2), 1, {4, 10}),  # channels of a pair: of the output, of the input's gradient
        (8, (3, 3, 4, 24), 1, {48, 8}),
        (8, (3, 3, 4, 25), 1, {8}),
        (8, (3, 3, 25, 4), 1, {8}),
        (8, (1, 5, 3, 7), 1, {14, 6}),
        (8, (3, 2, 3, 7), 2, {14}),
        (7, (3, 3, 3, 7), 2, {14}),
        (7, (3, 3, 3, 7), 1, set()),
        (8, (3, 3, 3, 1), 1, {6}),
        (8, (3, 1, 3, 3), 1, set()),
    ],
)
def test_few_channels_are_computed_in_pairs_of_columns(width, kernel, stride, paired):
    x, kernel = drawn((2, 6, width, kernel[2]), 0), drawn(kernel, 1)
    ours = functools.partial(convolution, window_strides=(1, stride), padding="SAME")
    theirs = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, stride),
        padding="SAME",
        dimension_numbers=LAYOUT,
    )
    for a, b in zip(*(with_gradients(f, x, kernel, 2) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

    def output_and_input_gradient(x):
        y, pull = jax.vjp(lambda x: ours(x, kernel), x)
        return pull(y)

    program = jax.make_jaxpr(output_and_input_gradient)(x)
    channels = {
        eqn.outvars[0].aval.shape[-1]
        for eqn in equations(program.jaxpr)
        if eqn.primitive is lax.conv_general_dilated_p
        and eqn.params["window_strides"] == (1, 2 * stride)
    }
    assert channels == paired


def equations(jaxpr):
    """All equations of a program, those of functions within it too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize(
    ("x", "kernel", "arguments"),
    [
        (
            (2, 7, 3),
            (3, 3, 4),
            {"window_strides": (1,), "dimension_numbers": ("NHC", "HIO", "NHC")},
        ),
        ((2, 6, 7, 3), (3, 3, 3, 4), {"window_strides": (1, 1), "lhs_dilation": (2, 1)}),
        ((4, 6, 7, 3), (3, 3, 3, 4), {"window_strides": (1, 1), "batch_group_count": 2}),
        (
            (2, 3, 6, 7),
            (4, 3, 3, 3),
            {"window_strides": (1, 1), "dimension_numbers": ("NCHW", "OIHW", "NCHW")},
        ),
    ],
)
def test_what_it_knows_nothing_better_for_goes_to_lax(x, kernel, arguments):
    arguments = {"padding": "SAME", "dimension_numbers": LAYOUT} | arguments
    if "lhs_dilation" in arguments:
        arguments["padding"] = ((1, 1), (1, 1))
    x, kernel = drawn(x, 0), drawn(kernel, 1)
    ours = with_gradients(functools.partial(convolution, **arguments), x, kernel, 2)
    theirs = with_gradients(functools.partial(lax.conv_general_dilated, **arguments), x, kernel, 2)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_result_in_another_dtype_is_computed_by_lax(groups):
    x, kernel = drawn((2, 5, 5, 4), 0), drawn((3, 3, 4 // groups, 4), 1)
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    y = convolution(
        x,
        kernel,
        (1, 1),
        "SAME",
        feature_group_count=groups,
        preferred_element_type=jnp.float32,
    )
    assert y.dtype == jnp.float32


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_rounded_once(groups, dtype):
    """Against the same numbers in float32: the error is that of the result's dtype."""
    arguments = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": groups}
    x, kernel = drawn((3, 7, 7, 4), 0), drawn((3, 3, 4 // groups, 4), 1)
    x, kernel = x.astype(dtype), kernel.astype(dtype)

    def rounded(dtype):
        convolve = functools.partial(convolution, **arguments)
        y, pull = jax.vjp(convolve, x.astype(dtype), kernel.astype(dtype))
        return y, *pull(drawn(y.shape, 2).astype(jnp.bfloat16).astype(dtype))

    for low, exact in zip(rounded(dtype), rounded(jnp.float32), strict=True):
        assert low.dtype == dtype
        allowed = 1.01 * float(jnp.finfo(dtype).eps) * np.abs(exact) / 2 + 1e-3
        assert np.all(np.abs(np.float32(low) - exact) <= allowed)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_can_be_sharded_by_hand(groups):
    arguments = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": groups}
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    each = jax.sharding.PartitionSpec("batch")
    x, kernel = drawn((2, 5, 5, 4), 0), drawn((3, 3, 4 // groups, 4), 1)

    def loss(kernel, x, mapped):
        convolve = functools.partial(convolution, **arguments)
        if mapped:
            specs = (each, jax.sharding.PartitionSpec())
            convolve = jax.shard_map(convolve, mesh=mesh, in_specs=specs, out_specs=each)
        return jnp.sum(jnp.sin(convolve(x, kernel)))

    ours, theirs = (jax.grad(loss)(kernel, x, mapped) for mapped in (True, False))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_has_gradients_of_single_examples_and_second_derivatives(groups):
    arguments = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": groups}
    x, kernel = drawn((3, 5, 5, 4), 0), drawn((3, 3, 4 // groups, 4), 1)

    def both(of):
        ours = functools.partial(convolution, **arguments)
        theirs = functools.partial(lax.conv_general_dilated, dimension_numbers=LAYOUT, **arguments)
        np.testing.assert_allclose(of(ours), of(theirs), rtol=1e-3, atol=1e-3)

    def loss(convolve, kernel, x):
        return jnp.sum(jnp.sin(convolve(x[None], kernel)))

    def of_each(convolve):
        return jax.vmap(jax.grad(functools.partial(loss, convolve)), (None, 0))(kernel, x)

    def of_gradient(convolve):
        gradient = jax.grad(functools.partial(loss, convolve))
        return jax.grad(lambda kernel: jnp.sum(gradient(kernel, x[0]) ** 2))(kernel)

    both(of_each)
    both(of_gradient)


class Network(nnx.Module):
    """Every kind of layer that is tuned: all kinds of convolutions, biases, norms."""

    def __init__(self, rngs):
        image = dhp.Latent(3, prunable=False, rngs=rngs)
        groups, channels = dhp.Latent(3, rngs=rngs), dhp.Latent(6, rngs=rngs)
        wide = dhp.repeat(groups, 2)
        self.layers = nnx.List(
            [
                dhp.HyperConv(image, wide, (3, 3), 2, rngs=rngs),
                dhp.BatchNorm(wide, momentum=0.9, rngs=rngs),
                dhp.HyperConv(wide, wide, (3, 3), feature_group_count=3, rngs=rngs),
                dhp.BatchNorm(wide, use_bias=False, use_scale=False, rngs=rngs),
                dhp.HyperConv(wide, channels, (1, 1), use_bias=False, rngs=rngs),
                dhp.HyperConv(channels, channels, (3, 3), feature_group_count=6, rngs=rngs),
                dhp.Bias(channels, rngs=rngs),
                dhp.BatchNorm(channels, rngs=rngs),
            ]
        )

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


def losses_and_gradients(model, x, tuned):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest):
        model = nnx.merge(graphdef, params, rest, copy=True)
        y = (tune(model) if tuned else model)(x)
        return jnp.sum(jnp.sin(y)), (y, nnx.state(model, nnx.Not(nnx.Param)))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, rest)


@pytest.mark.parametrize("pruned", [False, True])
def test_a_tuned_network_trains_like_the_original(pruned):
    model = filled(Network)
    if pruned:
        model = cut(model, dhp.survivors(model, threshold=0.5))
    model.train()
    x = drawn((4, 8, 8, 3), 0)
    ours, theirs = (losses_and_gradients(model, x, tuned) for tuned in (True, False))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


class Alike(nnx.Module):
    """Convolutions of one shape, others, and one that generates its kernel in its own way."""

    def __init__(self, rngs):
        image = dhp.Latent(3, prunable=False, rngs=rngs)
        first, second = (dhp.Latent(6, rngs=rngs) for _ in range(2))
        axes = [(image, first), (first, second), (second, first), (first, first), (first, second)]
        kinds = [dhp.HyperConv] * 4 + [Doubled]
        self.layers = nnx.List(
            [kind(*ends, (3, 3), rngs=rngs) for kind, ends in zip(kinds, axes, strict=True)]
        )

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x) / 64)
        return x


class Doubled(dhp.HyperConv):
    def kernel(self):
        return 2 * super().kernel()


def test_a_gpu_generates_small_kernels_of_one_shape_together(monkeypatch):
    model, x, together = filled(Alike), drawn((4, 8, 8, 3), 0), []

    def counted(inputs):
        together.append(len(inputs))
        return hyper_kernels(inputs)

    monkeypatch.setattr(hypernets, "hyper_kernels", counted)
    theirs = losses_and_gradients(model, x, tuned=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ours = losses_and_gradients(model, x, tuned=True)
    assert together == [3]
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
    monkeypatch.setattr(hypernets, "MAX_SMALL_SIZE", 9 * 8 * 6 * 6 - 1)
    losses_and_gradients(model, x, tuned=True)
    assert together == [3]


def test_layers_on_axes_that_consist_of_others_are_generated_together(monkeypatch):
    class Dense(nnx.Module):
        def __init__(self, rngs):
            z = dhp.Latent(6, rngs=rngs)
            both = dhp.concat(dhp.repeat(dhp.Latent(3, rngs=rngs), 2), z)
            self.layers = nnx.List([dhp.HyperConv(both, z, (3, 3), rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            for layer in self.layers:
                x = jnp.tanh(layer(jnp.concatenate([x, x], axis=-1)) / 64)
            return x

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    made = mock.Mock(wraps=hyper_kernels)
    monkeypatch.setattr(hypernets, "hyper_kernels", made)
    losses_and_gradients(filled(Dense), drawn((4, 8, 8, 6), 0), tuned=True)
    (inputs,), _ = made.call_args
    assert len(inputs) == 2


class Chain(nnx.Module):
    """An ordinary network with convolutions of one shape."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.layers = nnx.List([nnx.Conv(6, 6, (3, 3), rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_arrays_of_traced_networks_are_generated_as_those_of_declared_ones(monkeypatch, platform):
    net = dhp.with_latents(Chain(nnx.Rngs(0)), (8, 8, 3), embedding=2, rngs=nnx.Rngs(1))
    x = drawn((4, 8, 8, 3), 0)
    (value, _), theirs = losses_and_gradients(net, x, tuned=False)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    made = mock.Mock(wraps=hyper_kernels)
    monkeypatch.setattr(hypernets, "hyper_kernels", made)
    packed = pack_axes(net)
    assert packed.layers[0].kernel.w2[...].ndim == (4 if platform == "tpu" else 5)
    (found, _), ours = losses_and_gradients(packed, x, tuned=True)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one.reshape(other.shape), other, rtol=1e-4, atol=1e-5)
    assert [len(call.args[0]) for call in made.call_args_list] == [3] * (platform == "gpu")


def test_a_tpu_has_both_channel_axes_of_ordinary_hypernetworks_as_one(monkeypatch):
    model, x = filled(Alike), drawn((4, 8, 8, 3), 0)
    expected, before = model(x), jax.tree.map(jnp.shape, nnx.state(model))
    assert pack_axes(model) is model
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    found = pack_axes(model)
    assert [layer.w2[...].ndim for layer in found.layers] == [4, 4, 4, 4, 5]
    np.testing.assert_allclose(found(x), expected, rtol=1e-4, atol=1e-4)
    assert jax.tree.map(jnp.shape, nnx.state(model)) == before
    assert [layer.w2[...].ndim for layer in pack_axes(found).layers] == [4, 4, 4, 4, 5]


class Square(nnx.Module):
    """Three convolutions of one shape."""

    def __init__(self, rngs):
        self.z = dhp.Latent(6, rngs=rngs)
        self.layers = nnx.List([dhp.HyperConv(self.z, self.z, (3, 3), rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x) / 64)
        return x


class Scaled(Square):
    """Changes a latent before its layers are called."""

    def __call__(self, x):
        self.z.vector.set_value(2 * self.z.vector[...])
        return super().__call__(x)


class Zeroed(Square):
    """One layer was given a function for its kernel."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.layers[1].kernel = lambda: jnp.zeros((3, 3, 6, 6))


class Penalised(Square):
    """Takes the gradient of a layer on its way."""

    def __call__(self, x):
        slope = nnx.grad(lambda layer, x: jnp.mean(layer(x) ** 2))(self.layers[0], x)
        return super().__call__(x) + jnp.mean(slope["w1"][...] ** 2)


class Repeated(Square):
    """Calls a layer in a loop and one that is computed again for the backward pass."""

    def __call__(self, x):
        loop = nnx.scan(
            lambda layer, x, _: jnp.tanh(layer(x) / 64),
            in_axes=(None, nnx.Carry, 0),
            out_axes=nnx.Carry,
        )
        x = loop(self.layers[0], x, jnp.arange(2))
        return nnx.remat(lambda layer, x: layer(x) / 64)(self.layers[1], x)


class Stacked(nnx.Module):
    """Two stages of layers that lie on each other, as a scan takes them."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stage(rngs):
            z, wide = dhp.Latent(6, rngs=rngs), dhp.Latent(4, rngs=rngs)
            both = dhp.concat(z, wide)
            axes = [(z, wide), (both, z), (z, wide), (both, z)]
            return nnx.List([dhp.HyperConv(*ends, (3, 3), rngs=rngs) for ends in axes])

        self.stages = nnx.List([stage(rngs) for _ in range(2)])

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(layers, x):
            for widen, narrow in zip(layers[::2], layers[1::2], strict=True):
                x = jnp.tanh(narrow(jnp.concatenate([x, widen(x)], axis=-1)) / 64)
            return x

        for stage in self.stages:
            x = through(stage, x)
        return x


class Exchanged(Square):
    """Gives its layers other axes before they are called."""

    def __init__(self, rngs):
        super().__init__(rngs)
        half = dhp.Latent(3, rngs=rngs)
        self.doubled, self.others = dhp.repeat(half, 2), dhp.concat(half, half)
        for layer in self.layers:
            layer.z_in = self.others
        self.layers[0].z_in = self.z

    def __call__(self, x):
        self.layers[0].z_out = self.others
        self.layers[1].z_in = self.doubled
        return super().__call__(x)


class Gain(dhp.Axis):
    """Another axis with a factor for each channel."""

    def __init__(self, base):
        self.base, self.size, self.factors = base, base.size, nnx.Param(jnp.ones(base.size))

    def value(self):
        return self.base.value() * self.factors[...]

    def multiplicity(self):
        return self.base.multiplicity()

    def keep(self, masks):
        return self.base.keep(masks)


class Amplified(Square):
    """Has an axis with a parameter of its own, which it changes before its layers are called."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.gain = Gain(self.z)
        for layer in self.layers:
            layer.z_in = self.gain

    def __call__(self, x):
        self.gain.factors.set_value(3 * self.gain.factors[...])
        return super().__call__(x)


class Counting(dhp.Latent):
    """Another value whenever it is asked for, as noise is."""

    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.asked = nnx.BatchStat(jnp.zeros(()))

    def value(self):
        self.asked.set_value(self.asked[...] + 1)
        return super().value() + jnp.sin(self.asked[...])


class Shaken(Square):
    """Has a latent that changes when it is looked at."""

    def __init__(self, rngs):
        super().__init__(rngs)
        counting = Counting(6, rngs=rngs)
        for layer in self.layers:
            layer.z_in = counting


class Bounded(dhp.HyperConv):
    """The arrays of its hypernetwork are those of another one's range."""

    def arrays(self):
        return jax.tree.map(jnp.tanh, super().arrays())


class Limited(Square):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.layers = nnx.List([Bounded(self.z, self.z, (3, 3), rngs=rngs) for _ in range(2)])


class Tied(Square):
    """Two layers have one array between them."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.layers[1].w2 = self.layers[0].w2


PECULIAR = [
    *(Scaled, Zeroed, Penalised, Repeated, Stacked, Exchanged),
    *(Amplified, Shaken, Limited, Tied),
]


@pytest.mark.parametrize("kind", PECULIAR)
def test_networks_that_do_more_than_call_their_layers_compute_the_same(kind, monkeypatch):
    """On a GPU and on a TPU."""
    model, x = filled(kind), drawn((4, 8, 8, 6), 0)
    (expected, (theirs, rest)), grads = losses_and_gradients(model, x, tuned=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    on_gpu = losses_and_gradients(model, x, tuned=True)
    whole = ((expected, (theirs, rest)), grads)
    assert jax.tree.structure(on_gpu) == jax.tree.structure(whole)
    for a, b in zip(jax.tree.leaves(on_gpu), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    (found, (ours, _)), packed_grads = losses_and_gradients(pack_axes(model), x, tuned=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=2e-3, atol=2e-3)


def test_no_kernel_made_for_a_gpu_outlives_its_network(monkeypatch):
    class Jitted(Square):
        def __call__(self, x):
            return nnx.jit(lambda layers, x: layers[1](layers[0](x)))(self.layers, x)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    losses_and_gradients(filled(Jitted), drawn((4, 8, 8, 6), 0), tuned=True)
    gc.collect()
    assert not hypernets._MADE


def test_between_gradients_made_together_and_what_follows_is_a_barrier(monkeypatch):
    model, x = filled(Square), drawn((4, 8, 8, 6), 0)
    graphdef, params = nnx.split(model)

    def program():
        loss = lambda params: jnp.sum(tune(nnx.merge(graphdef, params, copy=True))(x))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(params))

    assert "optimization_barrier" not in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert program().count("optimization_barrier") == 1


def test_a_batch_norm_in_low_precision_keeps_its_statistics_in_float32():
    model = nnx.BatchNorm(5, dtype=jnp.bfloat16, momentum=0.9, rngs=nnx.Rngs(0))
    x = drawn((16, 3, 3, 5), 0)
    expected = model(x)
    statistics = model.mean[...], model.var[...]
    again = nnx.BatchNorm(5, dtype=jnp.bfloat16, momentum=0.9, rngs=nnx.Rngs(0))
    y = tune(again)(x)
    assert y.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y), np.float32(expected), atol=0.02)
    for a, b in zip((again.mean[...], again.var[...]), statistics, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_tuning_leaves_other_functions_and_norms_over_devices_alone():
    def other(*args, **kwargs):
        return lax.conv_general_dilated(*args, **kwargs)

    conv = nnx.Conv(3, 4, (3, 3), conv_general_dilated=other, rngs=nnx.Rngs(0))
    assert tune(conv).conv_general_dilated is other
    norm = nnx.BatchNorm(3, axis_name="devices", rngs=nnx.Rngs(0))
    assert type(tune(norm)) is nnx.BatchNorm


def test_a_masked_or_oddly_laid_out_norm_is_computed_by_flax():
    x = drawn((2, 3, 4, 4), 0)
    for options, arguments in (({"axis": 1}, {}), ({}, {"mask": x[..., :1] > 0})):
        a, b = (
            nnx.BatchNorm(x.shape[options.get("axis", -1)], rngs=nnx.Rngs(0), **options)
            for _ in "ab"
        )
        np.testing.assert_array_equal(tune(a)(x, **arguments), b(x, **arguments))


def test_inference_is_the_forward_pass_in_evaluation_mode_of_the_network_as_it_was():
    model = filled(Network)
    model.train()
    x = drawn((2, 8, 8, 3), 0)
    run = dhp.inference(model)
    assert not model.layers[1].use_running_average
    model.layers[1].mean[...] += 1
    changed = dhp.inference(model)(x)
    model.layers[1].mean[...] -= 1
    model.eval()
    np.testing.assert_allclose(run(x), model(x), rtol=1e-4, atol=1e-4)
    assert not np.allclose(changed, model(x), rtol=1e-4, atol=1e-4)
    small = cut(model, dhp.survivors(model, threshold=0.5))
    np.testing.assert_allclose(dhp.inference(small)(x), small(x), rtol=1e-4, atol=1e-4)


def test_inference_can_be_transformed():
    model = filled(Network)
    run = dhp.inference(model)
    x = drawn((2, 8, 8, 3), 0)
    model.eval()
    np.testing.assert_allclose(jax.jit(run)(x), model(x), rtol=1e-4, atol=1e-4)
    ours, theirs = (jax.grad(lambda x, f=f: jnp.sum(f(x)))(x) for f in (run, model))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    assert jax.jvp(run, (x,), (x,))[1].shape == run(x).shape


def test_inference_of_a_network_that_counts_its_calls_can_be_transformed():
    class Counting(nnx.Module):
        def __init__(self):
            self.calls = nnx.Variable(jnp.zeros(()))

        def __call__(self, x):
            self.calls[...] += 1
            return x * self.calls[...]

    model = Counting()
    run = dhp.inference(model)
    assert [float(each(2.0)) for each in (run, jax.jit(run), jax.grad(run), run)] == [2, 2, 1, 2]
    assert model.calls[...] == 0


def test_a_norm_over_an_axis_still_checks_its_input():
    norm = dhp.BatchNorm(dhp.Latent(3, prunable=False, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected 3 channels"):
        tune(norm)(jnp.ones((2, 4, 4, 1)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA:CPU")
def test_training_steps_and_evaluation_are_tuned(monkeypatch):
    model = filled(lambda _: dhp.models.build("resnet", depth=8, width=0.25, rngs=RNGS))
    task = Classification((0.0,) * 3, (1.0,) * 3, crop_padding=0, flip=False)
    data = np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32)
    graphdef, optimizer, state = start(model, lambda params: optax.sgd(0.1))
    arrays, structure = jax.tree.flatten(state)
    step = on_resident_data(make_step(graphdef, optimizer, task, batch_size=4), task, batch_size=4)
    step = compile_step(step, structure)
    lowered = step.lower(arrays, data, jnp.arange(4), 0, jax.random.key(0)).as_text()
    convolutions = sum(isinstance(m, dhp.HyperConv) for _, _, m in walk(model))
    assert lowered.count("call @_convolve") == 2 * convolutions  # forward and backward
    gradients = lowered.count("call @_kernel_gradient")  # one for each kind of convolution
    assert 0 < gradients == lowered.count("func.func private @_kernel_gradient") < convolutions
    tuned = []
    monkeypatch.setattr(classification, "tune", lambda model: tuned.append(model) or model)
    evaluate(model, task, data)
    assert len(tuned) == 1


def test_options_are_those_of_the_platform(monkeypatch):
    options = compiler_options()
    assert bool(options) == (jax.default_backend() == "cpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiler_options.__wrapped__() == {}
    conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    assert tune(conv).conv_general_dilated is lax.conv_general_dilated


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA:CPU")
def test_options_that_this_xla_does_not_know_are_left_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("no such option")

    monkeypatch.setattr(jax, "jit", refuse)
    assert compiler_options.__wrapped__() == {}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA:CPU")
@pytest.mark.usefixtures("compiled_as_for_users")
def test_a_kernel_gradient_is_a_computation_of_its_own():
    """Within the whole, its operands would be computed again: time quadratic in the depth."""
    x, kernel = drawn((2, 6, 6, 3), 0), drawn((3, 3, 3, 3), 1)

    def loss(kernel):
        h = x
        for _ in range(3):
            h = h + nnx.relu(convolution(h, kernel, (1, 1), "SAME"))
        return jnp.sum(h)

    compiled = jax.jit(jax.grad(loss)).lower(kernel).compile().as_text()
    assert len(re.findall(r" call\(.*kernel_gradient", compiled)) == 3
