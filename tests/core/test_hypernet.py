"""The hypernetwork: its kernel, its gradients, what it keeps for them, and how it begins."""

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax.ad_checkpoint import print_saved_residuals
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core import hypernet
from dhp_jax.core.hypernet import HypernetArrays, hyper_kernel, hyper_kernels, init_hypernet

SHAPES = [
    ((3, 3), 4, 5, 8),
    ((1, 1), 3, 2, 8),
    ((3, 3), 1, 1, 1),
    ((5,), 2, 3, 4),
    ((2, 1, 3), 2, 2, 3),
]
# Of two of them each derivative is compiled; the others are slow, not lost.
few_shapes = pytest.mark.parametrize(
    "shape",
    [
        pytest.param(s, marks=[pytest.mark.slow] * (s[1:] not in ((4, 5, 8), (1, 1, 1))))
        for s in SHAPES
    ],
)


def drawn(kernel_size, size_in, size_out, m, seed=0):
    """Latent vectors and arrays, none of them zero."""
    rng = np.random.default_rng(seed)
    pair = (size_in, size_out)
    shapes = HypernetArrays(
        b0=pair, w1=(m, *pair), b1=(m, *pair), w2=(*kernel_size, m, *pair), b2=(*kernel_size, *pair)
    )
    z_in, z_out, *arrays = (
        jnp.asarray(rng.normal(size=shape).astype(np.float32))
        for shape in ((size_in,), (size_out,), *shapes)
    )
    return z_in, z_out, HypernetArrays(*arrays)


def exactly_computed(array):
    """Rounded to quarters: kernels are computed without rounding, in whatever order."""
    return jnp.round(4 * array) / 4


def by_loops(z_in, z_out, arrays):
    """The kernel, one number after another in double precision."""
    z_in, z_out, b0, w1, b1, w2, b2 = (np.asarray(a, np.float64) for a in (z_in, z_out, *arrays))
    kernel = np.empty(b2.shape)
    for i in range(len(z_in)):
        for o in range(len(z_out)):
            embedding = (z_in[i] * z_out[o] + b0[i, o]) * w1[:, i, o] + b1[:, i, o]
            for position in np.ndindex(b2.shape[:-2]):
                kernel[(*position, i, o)] = (
                    w2[(*position, slice(None), i, o)] @ embedding + b2[(*position, i, o)]
                )
    return kernel


def straightforward(z_in, z_out, arrays):
    """The kernel without a custom derivative."""
    embedding = (jnp.outer(z_in, z_out) + arrays.b0) * arrays.w1 + arrays.b1
    return jnp.einsum("...mio,mio->...io", arrays.w2, embedding) + arrays.b2


def generated(z_in, z_out, arrays):
    return hyper_kernel(z_in, z_out, **arrays._asdict())


def with_gradients(function):
    """The output, and what a gradient of the output is pulled back to."""

    def both(inputs, grad):
        kernel, pull = jax.vjp(function, *inputs)
        return kernel, pull(grad)

    return both


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_that_of_three_loops(shape):
    inputs = drawn(*shape)
    kernel = generated(*inputs)
    assert kernel.shape == (*shape[0], shape[1], shape[2])
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(kernel, by_loops(*inputs), rtol=1e-5, atol=1e-5)


def test_axes_stand_for_their_latent_vectors():
    a, b = dhp.Latent(2, rngs=nnx.Rngs(0)), dhp.Latent(3, rngs=nnx.Rngs(1))
    _, _, arrays = drawn((1, 1), 5, 6, 2)
    kernel = hyper_kernel(dhp.concat(a, b), dhp.repeat(b, 2), **arrays._asdict())
    z_in, z_out = np.concatenate([a.value(), b.value()]), np.repeat(b.value(), 2)
    np.testing.assert_allclose(kernel, by_loops(z_in, z_out, arrays), rtol=1e-5, atol=1e-5)


@few_shapes
def test_gradients_are_those_of_automatic_differentiation(shape):
    inputs = drawn(*shape)
    weight = jnp.asarray(np.random.default_rng(9).normal(size=inputs[2].b2.shape), jnp.float32)

    def gradients(kernel_of):
        loss = lambda *inputs: jnp.sum(jnp.sin(kernel_of(*inputs)) * weight)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)

    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4),
        gradients(generated),
        gradients(straightforward),
    )


def test_gradients_are_those_of_finite_differences():
    check_grads(generated, drawn((2, 2), 2, 3, 4), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@few_shapes
def test_arrays_with_both_channel_axes_as_one_give_the_same_kernel_and_gradients(shape):
    z_in, z_out, arrays = drawn(*shape)
    as_one = jax.tree.map(lambda array: array.reshape(*array.shape[:-2], -1), arrays)
    grad, both = drawn(*shape, seed=4)[-1].b2, jax.jit(with_gradients(generated))
    expected, gradients = both((z_in, z_out, arrays), grad)
    found, gradients_as_one = both((z_in, z_out, as_one), grad)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for a, b, x in zip(
        *map(jax.tree.leaves, (gradients_as_one, gradients)),
        jax.tree.leaves((z_in, z_out, as_one)),
        strict=True,
    ):
        assert a.shape == x.shape
        np.testing.assert_allclose(a, b.reshape(a.shape), rtol=1e-4, atol=1e-4)


@few_shapes
def test_kernels_and_gradients_made_together_are_those_of_each(shape):
    several = [drawn(*shape, seed=seed) for seed in range(3)]
    several[2] = (several[0][0], *several[2][1:])  # a latent that two of them share
    grads = [drawn(*shape, seed=seed)[-1].b2 for seed in (7, 8, 9)]
    kernels, pull = jax.vjp(jax.jit(hyper_kernels), several)
    (found,) = pull(grads)
    assert jax.tree.structure(found) == jax.tree.structure(several)
    for inputs, kernel, own, grad in zip(several, kernels, found, grads, strict=True):
        expected, pull = jax.vjp(generated, *inputs)
        np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(pull(grad)), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_have_the_dtypes_of_what_they_are_gradients_of():
    z_in, z_out, arrays = drawn((1, 1), 2, 3, 4)
    arrays = jax.tree.map(lambda array: array.astype(jnp.bfloat16), arrays)
    grads = jax.grad(lambda *inputs: generated(*inputs).sum(), argnums=(0, 1, 2))(
        z_in, z_out, arrays
    )
    jax.tree.map(
        lambda grad, x: None if grad.dtype == x.dtype else pytest.fail(str(grad.dtype)),
        grads,
        (z_in, z_out, arrays),
    )


def test_nothing_but_the_inputs_is_kept_for_the_backward_pass(capsys):
    inputs = drawn((3, 3), 4, 5, 8)

    def kept_besides_inputs(kernel_of):
        print_saved_residuals(kernel_of, *inputs)
        lines = capsys.readouterr().out.splitlines()
        assert lines
        return [line for line in lines if "from the argument" not in line]

    assert kept_besides_inputs(generated) == []
    embedding = "f32[8,4,5]"
    assert any(embedding in line for line in kept_besides_inputs(straightforward))
    together = lambda *inputs: hyper_kernels([inputs, inputs])  # noqa: E731
    for kernel_of in (generated, together):
        _, pullback = jax.vjp(kernel_of, *inputs)
        kept = {id(array): array.size for array in jax.tree.leaves(pullback)}
        assert sum(kept.values()) <= sum(array.size for array in jax.tree.leaves(inputs))


@given(st.integers(0, 2**6 - 1), st.integers(0, 2**7 - 1), st.sampled_from([(1, 1), (3, 3)]))
@settings(deadline=None, derandomize=True, max_examples=15)
def test_removing_an_entry_of_a_latent_removes_one_slice_bit_for_bit(bits_in, bits_out, size):
    z_in, z_out, arrays = jax.tree.map(exactly_computed, drawn(size, 6, 7, 8))
    kept_in = np.flatnonzero([bits_in >> i & 1 or i == 0 for i in range(6)])
    kept_out = np.flatnonzero([bits_out >> o & 1 or o == 6 for o in range(7)])
    less = jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a)[..., kept_in, :][..., kept_out]), arrays
    )
    smaller = generated(z_in[kept_in], z_out[kept_out], less)
    full = np.asarray(generated(z_in, z_out, arrays))
    np.testing.assert_array_equal(smaller, full[..., kept_in, :][..., kept_out])


# The beginning


@pytest.mark.parametrize(("size", "taps", "size_in", "m"), [((3, 3), 9, 16, 8), ((1, 1), 1, 5, 3)])
def test_weights_begin_uniform_within_their_bounds_and_biases_at_zero(size, taps, size_in, m):
    arrays = init_hypernet(jax.random.key(0), size, size_in, 40, m)
    assert arrays.w2.shape == (*size, m, size_in, 40)
    assert arrays.w1.shape == (m, size_in, 40)
    for array, bound in ((arrays.w1, np.sqrt(3)), (arrays.w2, np.sqrt(3 / (m * size_in * taps)))):
        assert np.max(np.abs(array)) <= bound * (1 + 1e-6)
        assert np.max(array) > 0.95 * bound
        assert np.min(array) < -0.95 * bound
        np.testing.assert_allclose(np.std(array), bound / np.sqrt(3), rtol=0.08)
    for bias, shape in (
        (arrays.b0, (size_in, 40)),
        (arrays.b1, (m, size_in, 40)),
        (arrays.b2, (*size, size_in, 40)),
    ):
        np.testing.assert_array_equal(bias, np.zeros(shape))
    assert {array.dtype for array in arrays} == {jnp.dtype("float32")}


def test_the_two_weights_are_drawn_apart():
    arrays = init_hypernet(jax.random.key(0), (1, 1), 20, 20, 8)
    w1, w2 = (np.ravel(array) for array in (arrays.w1, arrays.w2))
    assert abs(np.corrcoef(w1, w2)[0, 1]) < 0.06


@pytest.mark.parametrize(("size", "size_in", "size_out"), [((3, 3), 32, 300), ((1, 1), 64, 300)])
def test_the_generated_kernel_begins_with_variance_one_over_c_k_squared(size, size_in, size_out):
    """Averaged over latents, of which a network draws only one each."""
    rng = np.random.default_rng(1)
    arrays = init_hypernet(jax.random.key(2), size, size_in, size_out)
    z_out = jnp.asarray(rng.normal(size=size_out), jnp.float32)
    z_in = jnp.ones(size_in)
    kernel = np.asarray(generated(z_in, z_out / jnp.sqrt(jnp.mean(z_out**2)), arrays))
    expected = 1 / (size_in * np.prod(size))
    np.testing.assert_allclose(np.var(kernel), expected, rtol=0.1)
    assert abs(kernel.mean()) < 0.05 * np.sqrt(expected)


# Errors


@pytest.mark.parametrize("name", HypernetArrays._fields)
def test_an_array_that_does_not_fit_the_latents_is_named(name):
    z_in, z_out, arrays = drawn((3, 3), 4, 5, 8)
    wrong = arrays._asdict()
    wrong[name] = wrong[name][..., :-1]
    with pytest.raises(ValueError, match=f"^hyper_kernel: {name}: expected shape .*, got "):
        hyper_kernel(z_in, z_out, **wrong)


def test_an_embedding_of_another_size_is_refused():
    z_in, z_out, arrays = drawn((3, 3), 4, 5, 8)
    with pytest.raises(ValueError, match=r"w1: expected shape \(8, 4, 5\) .*, got \(7, 4, 5\)"):
        generated(z_in, z_out, arrays._replace(w1=arrays.w1[1:]))


def test_latents_in_the_wrong_order_are_refused():
    z_in, z_out, arrays = drawn((3, 3), 4, 5, 8)
    with pytest.raises(ValueError, match=r"b0: expected shape \(5, 4\) .*, got \(4, 5\)"):
        generated(z_out, z_in, arrays)


def test_a_latent_vector_of_rank_two_is_refused():
    z_in, z_out, arrays = drawn((3, 3), 4, 5, 8)
    with pytest.raises(ValueError, match="hyper_kernel: b0: expected shape"):
        generated(z_in.reshape(2, 2), z_out, arrays)


@few_shapes
def test_sums_written_out_equal_reductions(monkeypatch, shape):
    """As they are for large arrays."""
    inputs, grad = drawn(*shape), drawn(*shape, seed=1)[-1].b2
    results = []
    for small in (0, 10**9):
        monkeypatch.setattr(hypernet, "MAX_FUSED_SIZE", small)
        results.append(jax.tree.leaves(jax.jit(with_gradients(hypernet._generate))(inputs, grad)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_network_that_a_program_closes_over_is_computed_as_one_that_it_is_given():
    """XLA:CPU (jaxlib 0.10.2) folds kernels of a million numbers wrongly, in a network as large."""
    model = dhp.models.build("unet", rngs=nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)
    x = jax.random.normal(jax.random.key(0), (1, 32, 32, 1))
    given = jax.jit(lambda state, x: nnx.merge(graphdef, state, copy=True)(x))(state, x)
    closed_over = jax.jit(lambda x: model(x))(x)
    np.testing.assert_allclose(closed_over, given, atol=1e-5 * float(jnp.abs(given).max()))
