"""The hypernetwork: two latent vectors in, a convolution kernel out.

Nothing is shared between the (input channel, output channel) pairs, so removing an entry of a
latent vector removes exactly one slice of the kernel. That is the whole pruning mechanism.
"""

import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from dhp_jax.core.initializers import uniform
from dhp_jax.core.latent import Axis

EMBEDDING = 8  # m in the paper
MAX_FUSED_SIZE = 2**20  # numbers of an array whose sums are left to the compiler
MAX_TERMS = 128  # of a sum that is written out


class HypernetArrays(NamedTuple):
    """The trainable arrays of one hypernetwork; the two channel axes are the last ones."""

    b0: Float[Array, "in out"]
    w1: Float[Array, "m in out"]
    b1: Float[Array, "m in out"]
    w2: Float[Array, "*k m in out"]
    b2: Float[Array, "*k in out"]


class KernelGenerator(nnx.Module):
    """Base of what makes a kernel of its two axes; its attributes are the hypernetwork's arrays.

    `kernel_size` is that of the other axes of the kernel, and `param_dtype` the kernel's dtype.
    """

    kernel_size: tuple[int, ...]
    param_dtype: Any

    def kernel_axes(self) -> tuple[Axis, Axis]:
        """The axes of the kernel's input and output channels."""
        raise NotImplementedError

    def arrays(self) -> HypernetArrays:
        """The arrays of the hypernetwork."""
        return HypernetArrays(*(getattr(self, name)[...] for name in HypernetArrays._fields))

    def kernel(self) -> Float[Array, "*k in out"]:
        """The generated kernel."""
        kernel = hyper_kernel(*self.kernel_axes(), **self.arrays()._asdict())
        return kernel.astype(self.param_dtype)


HyperInputs = tuple[Float[Array, " in"], Float[Array, " out"], HypernetArrays]


def hyper_kernel(
    z_in: Float[Array, " in"] | Axis,
    z_out: Float[Array, " out"] | Axis,
    *,
    w1: Float[Array, "m in out"],
    b0: Float[Array, "in out"],
    b1: Float[Array, "m in out"],
    w2: Float[Array, "kh kw m in out"],
    b2: Float[Array, "kh kw in out"],
) -> Float[Array, "kh kw in out"]:
    """Generates a convolution kernel from the latent vectors of its two channel axes.

    For every pair (i, o) of an input and an output channel, on its own:

        Z[i, o]    = z_in[i] z_out[o] + b0[i, o]                (latent layer)
        E[:, i, o] = Z[i, o] w1[:, i, o] + b1[:, i, o]          (embedding layer)
        K[.., i, o] = sum over m of w2[.., m, i, o] E[m, i, o] + b2[.., i, o]   (explicit layer)

    Args:
      z_in: latent vector of the input channels, or its `Latent`.
      z_out: latent vector of the output channels, or its `Latent`.
      w1, b0, b1, w2, b2: the hypernetwork's arrays; `m` is the embedding size. Any number of
        spatial axes may come first in `w2` and `b2`. All may have the two channel axes as one,
        `in * out`.

    Returns:
      The kernel, in the layout that `nnx.Conv` expects.

    The backward pass is written by hand, so there is no forward-mode derivative (`jax.jvp`).

    Raises:
      ValueError: an array's shape does not fit the latent vectors.

    Example:
      >>> from dhp_jax.core.hypernet import init_hypernet
      >>> arrays = init_hypernet(jax.random.key(0), (3, 3), 16, 32)
      >>> dhp.hyper_kernel(jnp.ones(16), jnp.ones(32), **arrays._asdict()).shape
      (3, 3, 16, 32)

    Reference: DHP (arXiv 2003.13683), equations 1 to 4.
    """
    z_in, z_out = (z.value() if isinstance(z, Axis) else jnp.asarray(z) for z in (z_in, z_out))
    pair = (*z_in.shape, *z_out.shape)
    if b0.shape == (math.prod(pair),):
        pair = b0.shape
    at = w2.ndim - len(pair) - 1
    spatial, m = w2.shape[: max(0, at)], w2.shape[at] if at >= 0 else 0
    expected = {
        "b0": (b0, pair),
        "w1": (w1, (m, *pair)),
        "b1": (b1, (m, *pair)),
        "w2": (w2, (*spatial, m, *pair)),
        "b2": (b2, (*spatial, *pair)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(
                f"hyper_kernel: {name}: expected shape {shape} for latent vectors of shapes "
                f"{z_in.shape} and {z_out.shape}, got {array.shape}"
            )
    arrays = HypernetArrays(b0, w1, b1, w2, b2)
    generate = _generate_jitted if isinstance(w2, jax.core.Tracer) else _generate_apart
    return generate(z_in, z_out, arrays)


def _embedding(z_in: Array, z_out: Array, arrays: HypernetArrays) -> tuple[Array, Array]:
    pairs = (z_in[:, None] * z_out[None, :]).reshape(arrays.b0.shape) + arrays.b0
    return pairs, pairs * arrays.w1 + arrays.b1


def _kernel(z_in: Array, z_out: Array, arrays: HypernetArrays) -> Array:
    _, embedding = _embedding(z_in, z_out, arrays)
    kernel = _sum_of_products(arrays.w2, embedding, (-1 - arrays.b0.ndim,)) + arrays.b2
    taps = arrays.b2.shape[: arrays.b2.ndim - arrays.b0.ndim]
    return kernel.reshape(*taps, *z_in.shape, *z_out.shape)


class _Parts(NamedTuple):
    """Intermediate values that the gradients of a hypernetwork are computed from."""

    pairs: Array
    embedding: Array
    grad_embedding: Array
    grad_pairs: Array
    grad_in: Array
    grad_out: Array


def _parts(z_in: Array, z_out: Array, arrays: HypernetArrays, grad_kernel: Array) -> _Parts:
    pairs, embedding = _embedding(z_in, z_out, arrays)
    taps = tuple(range(arrays.w2.ndim - 1 - arrays.b0.ndim))
    grad_embedding = _sum_of_products(arrays.w2, _for_each_m(grad_kernel, arrays), taps)
    grad_pairs = _sum_of_products(grad_embedding, arrays.w1, (0,))
    # Sums, not matrix products: accelerators round the inputs of those.
    apart = grad_pairs.reshape(*z_in.shape, *z_out.shape)
    grad_in = jnp.sum(apart * z_out, axis=1)
    grad_out = jnp.sum(apart * z_in[:, None], axis=0)
    return _Parts(pairs, embedding, grad_embedding, grad_pairs, grad_in, grad_out)


def _for_each_m(grad_kernel: Array, arrays: HypernetArrays) -> Array:
    return jnp.expand_dims(grad_kernel.reshape(arrays.b2.shape), -1 - arrays.b0.ndim)


def _gradients(inputs: HyperInputs, grad_kernel: Array, parts: _Parts) -> HyperInputs:
    arrays = HypernetArrays(
        b0=parts.grad_pairs,
        w1=parts.grad_embedding * parts.pairs,
        b1=parts.grad_embedding,
        w2=parts.embedding * _for_each_m(grad_kernel, inputs[-1]),
        b2=grad_kernel.reshape(inputs[-1].b2.shape),
    )
    grads = parts.grad_in, parts.grad_out, arrays
    return jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, inputs)


# Backward passes keep the inputs alone: the embedding is cheaper to compute again than to store.
_generate = jax.custom_vjp(_kernel)


@functools.partial(jax.jit, inline=True)  # of hypernetworks that are alike it is traced once
def _generate_backward(inputs: HyperInputs, grad_kernel: Array) -> HyperInputs:
    return _gradients(inputs, grad_kernel, _parts(*inputs, grad_kernel))


_generate.defvjp(lambda *inputs: (_kernel(*inputs), inputs), _generate_backward)


_generate_jitted = jax.jit(_generate, inline=True)


@jax.jit
def _generate_apart(z_in: Array, z_out: Array, arrays: HypernetArrays) -> Array:
    """The same of arrays that are constants of a program, as of a network that it closes over.

    XLA:CPU (jaxlib 0.10.2) computes a kernel of about a million such numbers wrongly when it folds
    it as a constant.
    """
    return _generate(*jax.lax.optimization_barrier((z_in, z_out, arrays)))


@jax.custom_vjp
def hyper_kernels(inputs: list[HyperInputs]) -> list[Float[Array, "*k in out"]]:
    """Kernels of several hypernetworks of one shape, computed together.

    The numbers are those of `hyper_kernel`, up to rounding. A GPU starts a fraction of the
    programs, which counts where arrays are small; embeddings and their gradients are in memory for
    a while.
    """
    return list(jnp.unstack(jax.vmap(_kernel)(*_stack(inputs))))


def _together_backward(inputs: list[HyperInputs], grads: list[Array]) -> tuple[list[HyperInputs]]:
    grads = jnp.stack(grads)
    parts = jax.vmap(_parts)(*_stack(inputs), grads)
    # As one with the optimizer's steps, each array would be copied for the gradients of others
    # before it is overwritten.
    parts, grads = jax.lax.optimization_barrier((parts, grads))
    each = zip(inputs, jnp.unstack(grads), zip(*map(jnp.unstack, parts), strict=True), strict=True)
    return ([_gradients(given, grad, _Parts(*own)) for given, grad, own in each],)


def _stack(inputs: list[HyperInputs]) -> HyperInputs:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *inputs)


hyper_kernels.defvjp(lambda inputs: (hyper_kernels(inputs), inputs), _together_backward)


def _sum_of_products(a: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """`sum(a * b, axes)`, on CPU of large arrays term by term: one pass, nothing else in memory.

    XLA:CPU does not always fuse a reduction with what it sums. Written out, that takes longer to
    compile, which small arrays are not worth.
    """
    a, b = jnp.broadcast_arrays(a, b)
    axes = tuple(axis % a.ndim for axis in axes)
    one = tuple(size if axis in axes else 1 for axis, size in enumerate(a.shape))
    if jax.default_backend() != "cpu" or a.size <= MAX_FUSED_SIZE or math.prod(one) > MAX_TERMS:
        return jnp.sum(a * b, axes)
    places = [
        tuple(i if axis in axes else slice(None) for axis, i in enumerate(place))
        for place in np.ndindex(one)
    ]
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return sum((a[place] * b[place]).astype(wide) for place in places).astype(a.dtype)


def init_hypernet(
    key: Key[Array, ""],
    kernel_size: tuple[int, ...],
    size_in: int,
    size_out: int,
    m: int = EMBEDDING,
) -> HypernetArrays:
    """Initial arrays of a hypernetwork in float32, of `size_in` channels per group.

    `w1 ~ U(-sqrt 3, sqrt 3)`, `w2 ~ U(-a, a)` with `a = sqrt(3 / (m c k^2))`, and biases zero. With
    latents from N(0, 1) the generated kernel then has variance `1 / (c k^2)`.
    """
    pair = (size_in, size_out)
    taps = math.prod(kernel_size)
    draws = uniform(key, m * (1 + taps) * size_in * size_out).reshape(-1, *pair)
    zeros = jnp.zeros if isinstance(draws, jax.core.Tracer) else np.zeros  # np: nothing to compile
    arrays = HypernetArrays(
        b0=zeros(pair, jnp.float32),
        w1=draws[:m] * math.sqrt(3),
        b1=zeros((m, *pair), jnp.float32),
        w2=draws[m:].reshape(*kernel_size, m, *pair) * math.sqrt(3 / (m * size_in * taps)),
        b2=zeros((*kernel_size, *pair), jnp.float32),
    )
    # Given a dtype, JAX has nothing to compile for a NumPy array.
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), arrays)
