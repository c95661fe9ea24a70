"""Convolutions and their gradients as XLA:CPU computes them fast."""

from collections.abc import Sequence
import contextlib
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
import jax.numpy as jnp
from jaxtyping import Array, Float

LAYOUT = ("NHWC", "HWIO", "NHWC")
MAX_TAPS = 49  # of a depthwise kernel that is written out
MAX_PAIRED = 24  # channels of a kernel whose outputs are computed in pairs
Pads = tuple[tuple[int, int], ...]


def convolution(
    lhs: Float[Array, "n *spatial in"],
    rhs: Float[Array, "*k in_per_group out"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = LAYOUT,
    feature_group_count: int = 1,
    precision: Any = None,
    **options: Any,
) -> Float[Array, "n *spatial out"]:
    """`jax.lax.conv_general_dilated`, fast on XLA:CPU; same arguments, numbers up to rounding.

    Arguments for which it knows nothing better go to the original: other than two spatial axes,
    other layouts, dilated inputs, two dtypes, any further option, explicit sharding, `shard_map`.
    """
    plain = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
        **options,
    )
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    channels_last = lhs.ndim == 4 and numbers == lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, LAYOUT
    )
    if (
        not channels_last
        or lhs.dtype != rhs.dtype
        or any(d != 1 for d in lhs_dilation or ())
        or any(value is not None for value in options.values())
        or any(_is_sharded_by_hand(x) for x in (lhs, rhs))
    ):
        return plain(lhs, rhs)
    strides, dilation = tuple(window_strides), tuple(rhs_dilation or (1, 1))
    size = tuple((k - 1) * d + 1 for k, d in zip(rhs.shape[:2], dilation, strict=True))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], size, strides, padding)
    pads = tuple(tuple(map(int, pad)) for pad in padding)
    depthwise = feature_group_count > 1 and lhs.shape[-1] == rhs.shape[-1] == feature_group_count
    if depthwise and math.prod(rhs.shape[:2]) <= MAX_TAPS:
        return _depthwise(lhs, rhs, strides, pads, dilation)
    how = _How(strides, pads, dilation, feature_group_count, precision)
    return _convolve(lhs, rhs, how)


class _How(NamedTuple):
    """What a convolution is besides its operands."""

    strides: tuple[int, ...]
    pads: Pads
    dilation: tuple[int, ...]
    groups: int
    precision: Any

    def of(self, x: Array, kernel: Array) -> Array:
        """The convolution, without a gradient of its own."""
        return lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.pads,
            rhs_dilation=self.dilation,
            dimension_numbers=LAYOUT,
            feature_group_count=self.groups,
            precision=self.precision,
        )


def _is_sharded_by_hand(x: Array) -> bool:
    """Whether an array is sharded explicitly, as on explicit meshes or in `shard_map`."""
    kind = jax.typeof(x)
    varying = getattr(kind, "vma", None) or getattr(kind, "manual_axis_type", None)
    return bool(getattr(varying, "varying", varying)) or any(kind.sharding.spec)


@functools.partial(jax.jit, static_argnums=2)  # layers that are alike are traced once
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, how: _How) -> Array:
    return _in_pairs(x, kernel, how)


def _in_pairs(x: Array, kernel: Array, how: _How) -> Array:
    """The convolution; with few output channels, two columns of the output at once.

    Eigen multiplies blocks of 24 output channels and 4 pixels. A kernel of few channels leaves most
    of a block empty. So it is laid down twice, one stride apart, with zeros around: a kernel of
    twice the channels and twice the stride. An odd number of input channels is read one by one; a
    channel of zeros makes it even.
    """
    columns, inputs, channels = kernel.shape[1:]
    stride = how.strides[1]
    width = (x.shape[2] + sum(how.pads[1]) - columns) // stride + 1
    few = 1 < channels <= MAX_PAIRED and columns > 1
    if not few or how.groups > 1 or how.dilation != (1, 1) or width < 2 or width % 2:
        return how.of(x, kernel)
    odd = (0, inputs % 2)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), odd))
    ends = ((0, stride), (stride, 0))
    pair = [jnp.pad(kernel, ((0, 0), end, odd, (0, 0))) for end in ends]
    y = how._replace(strides=(how.strides[0], 2 * stride)).of(x, jnp.concatenate(pair, 3))
    return y.reshape(*y.shape[:2], width, channels)


def _input_gradient(x: Array, kernel: Array, grad: Array, how: _How) -> Array:
    """The input's gradient: a convolution too, of the gradient with the kernel turned around."""
    pads = []
    for n, m, k, (low, _) in zip(
        x.shape[1:3], grad.shape[1:3], kernel.shape[:2], how.pads, strict=True
    ):
        pads.append((k - 1 - low, n - m + low))
    plain = how.groups == 1 and how.strides == how.dilation == (1, 1) and min(map(min, pads)) >= 0
    if not plain or kernel.shape[2] > MAX_PAIRED:
        return jax.vjp(lambda x: how.of(x, kernel), x)[1](grad)[0]
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return _in_pairs(grad, turned, how._replace(pads=tuple(pads)))


def _backward(how: _How, inputs: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = inputs
    grad_x = _input_gradient(x, kernel, grad, how)
    given = kernel.shape[:2], how.strides, how.pads, how.dilation
    # A computation of its own: within the whole, XLA would compute x again from what it was made
    # of, for every residual block before this one.
    with separate_computation():
        if how.groups == 1:
            grad_kernel = _kernel_gradient(x, grad, *given)
        else:
            grad_kernel = _grouped_kernel_gradient(x, grad, how.groups, *given)
    return grad_x, grad_kernel.astype(kernel.dtype)


_convolve.__wrapped__.defvjp(
    lambda x, kernel, how: (_in_pairs(x, kernel, how), (x, kernel)),
    _backward,
)


def separate_computation() -> contextlib.AbstractContextManager:
    """A context in which XLA:CPU keeps jitted functions apart and computes their results once.

    With several devices it does nothing: XLA:CPU mixes up what such computations send each other.
    """
    if jax.device_count() > 1:
        return contextlib.nullcontext()
    return set_xla_metadata(inlineable="false")


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _kernel_gradient(
    x: Array, grad: Array, taps: tuple[int, int], strides, pads: Pads, dilation
) -> Array:
    """The kernel's gradient as a convolution over the batch.

    In the one layout that XLA:CPU has a fast routine for; it would not change the layout here.
    """
    ends = []
    for n, m, k, s, d, (low, _) in zip(
        x.shape[1:3], grad.shape[1:3], taps, strides, dilation, pads, strict=True
    ):
        ends.append((low, (k - 1) * d + (m - 1) * s + 1 - n - low))
    result = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        grad.transpose(1, 2, 0, 3),
        window_strides=dilation,
        padding=ends,
        rhs_dilation=strides,
        dimension_numbers=LAYOUT,
    )
    return result.transpose(1, 2, 0, 3)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _grouped_kernel_gradient(
    x: Array, grad: Array, groups: int, taps: tuple[int, int], strides, pads: Pads, dilation
) -> Array:
    """The kernel's gradient, as one matrix product for each tap and group."""
    rows, columns = x.shape[-1] // groups, grad.shape[-1] // groups
    grad_groups = grad.reshape(-1, groups, columns)
    by_tap = [
        jnp.einsum("pgi,pgo->igo", part.reshape(-1, groups, rows), grad_groups)
        for part in _shift_taps(x, taps, strides, pads, dilation, grad.shape[1:3])
    ]
    return jnp.stack(by_tap).reshape(*taps, rows, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise(x: Array, kernel: Array, strides, pads: Pads, dilation) -> Array:
    """A depthwise convolution as a sum over the taps of its kernel: one pass over the output."""
    taps = kernel.shape[:2]
    size = tuple(
        (n + sum(pad) - (k - 1) * d - 1) // s + 1
        for n, pad, k, d, s in zip(x.shape[1:3], pads, taps, dilation, strides, strict=True)
    )
    parts = _shift_taps(x, taps, strides, pads, dilation, size)
    weights = widen(kernel).reshape(-1, kernel.shape[-1])
    result = sum(widen(part) * weight for part, weight in zip(parts, weights, strict=True))
    return result.astype(x.dtype)


def _depthwise_forward(x, kernel, strides, pads, dilation):
    return _depthwise(x, kernel, strides, pads, dilation), (x, kernel)


def _depthwise_backward(strides, pads, dilation, inputs, grad):
    x, kernel = inputs
    taps = kernel.shape[:2]
    # The input's gradient is a depthwise convolution too: of the gradient, spread out by the
    # strides, with the kernel turned around.
    spread = _pad(grad, [(0, 0, stride - 1) for stride in strides])
    turned = []
    for n, m, k, d, (low, _) in zip(
        x.shape[1:3], spread.shape[1:3], taps, dilation, pads, strict=True
    ):
        before = (k - 1) * d - low
        turned.append((before, n + (k - 1) * d - m - before))
    grad_x = _depthwise(spread, kernel[::-1, ::-1], (1, 1), tuple(turned), dilation)
    with separate_computation():  # within the whole, XLA would keep what each tap saw of x till now
        sums = _depthwise_sums(x, grad, taps, strides, pads, dilation)
    return grad_x, sums.reshape(kernel.shape).astype(kernel.dtype)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _depthwise_sums(
    x: Array, grad: Array, taps: tuple[int, int], strides, pads: Pads, dilation
) -> Array:
    """The gradient of a depthwise kernel, `(taps, c)`."""
    parts = _shift_taps(x, taps, strides, pads, dilation, grad.shape[1:3])
    return jnp.stack([jnp.sum(widen(part) * widen(grad), (0, 1, 2)) for part in parts])


def _shift_taps(
    x: Array, taps: tuple[int, int], strides, pads: Pads, dilation, size: tuple[int, int]
) -> list[Array]:
    """The part of the padded input that each tap of a kernel reads, `(n, *size, c)` each."""
    padded = _pad(x, [(low, high, 0) for low, high in pads])
    (rows, columns), (down, right) = size, strides
    return [
        padded[
            :,
            i * dilation[0] : i * dilation[0] + (rows - 1) * down + 1 : down,
            j * dilation[1] : j * dilation[1] + (columns - 1) * right + 1 : right,
        ]
        for i in range(taps[0])
        for j in range(taps[1])
    ]


def _pad(x: Array, pads: Sequence[tuple[int, int, int]]) -> Array:
    """The image with zeros before, after and between its rows and columns."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


def widen(x: Array) -> Array:
    """Converts to the dtype that sums are computed in, float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
