"""What makes XLA run convolutional networks fast on the platform at hand.

XLA:CPU needs three things (docs/architecture.md has the measurements): convolutions that use all
cores, kernel gradients whose operands it does not compute again, and another form for depthwise
convolutions and the gradients of grouped ones. On a GPU small hypernetworks are computed together,
and everywhere BatchNorm keeps less for the backward pass. All else is what XLA does by itself.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
import contextlib
import functools
import math
from typing import Any
import weakref

from flax import nnx
from flax.nnx.nn import dtypes
import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhp_jax.hypernet import HypernetArrays, hyper_kernels
from dhp_jax.latent import Axis, Concat, Latent, Repeat, walk
from dhp_jax.layers import BatchNorm, Bias, ChannelBias, Hyper

LAYOUT = ("NHWC", "HWIO", "NHWC")
MOST_TAPS = 49  # of a depthwise kernel that is written out
MOST_TOGETHER = 2**20  # numbers of an array that is small work for a GPU
Pads = tuple[tuple[int, int], ...]


@functools.cache
def compiler_options() -> dict[str, str]:
    """Options for `jax.jit` with which networks of convolutions run fast; empty for most platforms.

    On CPU they leave convolutions to Eigen: XLA's default (jaxlib 0.10) runs most of them on one
    core, and those of odd widths, as pruning makes them, at half the speed.

    Returns:
      What to pass as `jax.jit(..., compiler_options=)`. Like all such options they are for
      functions that are not called in other jitted functions.

    Example:
      >>> step = jax.jit(step, compiler_options=dhp.compiler_options())
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # a version of XLA that has no such option
        return {}
    return options


def steps_per_dispatch() -> int:
    """How many training steps the device is given at once.

    One on CPU, where a convolution within a loop is many times slower: XLA runs it on one core, and
    not as Eigen would. Elsewhere as many as keep the host from holding up the device, and let a run
    that is told to stop do so in seconds.
    """
    return 1 if jax.default_backend() == "cpu" else 32


def packed(model: nnx.Module) -> nnx.Module:
    """A network with its arrays in the form in which the platform's memory holds them best.

    A TPU pads the last axis of an array to 128 numbers, and arrays of 16 channels take 8 times the
    memory, and the time to read it. There the arrays of hypernetworks have both channel axes as
    one, but for layers that share some of them, or generate their kernel in a way of their own.

    Args:
      model: any network; left as it was.

    Returns:
      The same network elsewhere; on a TPU a copy, which computes the same.
    """
    if jax.default_backend() != "tpu":
        return model
    model = nnx.clone(model)
    layers = [layer for _, _, layer in walk(model) if isinstance(layer, Hyper)]
    of_each = [[getattr(layer, name) for name in HypernetArrays._fields] for layer in layers]
    uses = Counter(id(variable) for variables in of_each for variable in variables)
    for layer, variables in zip(layers, of_each, strict=True):
        is_shared = any(uses[id(variable)] > 1 for variable in variables)
        if _is_ordinary(layer) and not is_shared and layer.b0[...].ndim == 2:
            for variable in variables:
                x = variable[...]
                variable.set_value(x.reshape(*x.shape[:-2], -1))
    return model


def inference(model: nnx.Module) -> Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]]:
    """The compiled forward pass of a network in evaluation mode, fast on the platform at hand.

    Args:
      model: a network, with or without latents; left as it was. Later changes are not seen, but its
        arrays are shared: copy it before donating them.

    Returns:
      A function of a batch of inputs, compiled for every new shape. Within other transformations,
      such as `jax.grad` or an outer `jax.jit`, it is the ordinary forward pass.

    Example:
      >>> run = dhp.inference(small)
      >>> y = run(x)                           # (n, h, w, c) -> what the network returns
    """
    model = nnx.clone(model)
    model.eval()
    graphdef, state = nnx.split(model)
    arrays, structure = jax.tree.flatten(state)  # a list is taken apart faster, at every call

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def compiled(arrays: list[Array], x: Array) -> Array:
        return tune(nnx.merge(graphdef, jax.tree.unflatten(structure, arrays)))(x)

    def run(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        if isinstance(x, jax.core.Tracer):  # options are for functions that are not in others
            return nnx.merge(graphdef, state)(x)
        return compiled(arrays, x)

    return run


def tune(model: nnx.Module) -> nnx.Module:
    """Makes a network's layers compute in the way that is fastest here; in place, same numbers.

    For models that were merged within a jitted function. Convolutions that were given a function of
    their own keep it. What is tuned for CPU has no forward-mode derivative. The platform is that of
    `jax.default_backend()`.

    Args:
      model: any network.

    Returns:
      The same object.
    """
    on_cpu = jax.default_backend() == "cpu"
    if jax.default_backend() == "gpu":
        generate_together(model)
    for _, _, layer in walk(model):
        if type(layer) in QUICK and layer.axis_name is None:
            layer.__class__ = QUICK[type(layer)]
        if on_cpu and type(layer) in QUICK_ON_CPU:
            layer.__class__ = QUICK_ON_CPU[type(layer)]
        is_convolution = getattr(layer, "conv_general_dilated", None) is lax.conv_general_dilated
        if on_cpu and is_convolution:
            layer.conv_general_dilated = convolution
    return model


def generate_together(model: nnx.Module) -> None:
    """Has small kernels of one shape generated in one computation; in place, same numbers.

    What that saves is the start of many programs a step, which takes a GPU longer than the work in
    them. A layer that is called with other parameters or axes than those it has now, as within a
    transformation of its own or after noise was added to a latent, generates its kernel then, as
    ever; so does one with a latent or an arithmetic of its own.

    Args:
      model: merged within a jitted function.
    """
    alike = defaultdict(list)
    for _, _, layer in walk(model):
        if isinstance(layer, Hyper) and _is_ordinary(layer) and _is_small(layer):
            inputs = layer.kernel_axis().value(), layer.z_out.value(), layer.arrays()
            shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(inputs))
            alike[shapes].append((layer, inputs))
    for group in alike.values():
        if len(group) > 1:
            layers, inputs = zip(*group, strict=True)
            for layer, kernel in zip(layers, hyper_kernels(list(inputs)), strict=True):
                _MADE[layer] = _sources(layer), kernel.astype(layer.param_dtype)
                layer.__class__ = _with_made(type(layer))


def _is_ordinary(layer: Hyper) -> bool:
    """Whether the kernel follows from the layer's arrays and ordinary latents, in the usual way."""
    own = any(
        getattr(type(layer), name) is not getattr(Hyper, name) or name in vars(layer)
        for name in ("kernel", "arrays")
    )
    return not own and all(type(axis) in (Latent, Concat, Repeat) for axis in _axes(layer))


def _is_small(layer: Hyper) -> bool:
    """Whether the work of a hypernetwork, if it is a single one and not stacked, is small."""
    w2 = layer.w2[...]
    return w2.ndim == len(layer.kernel_size) + 3 and w2.size <= MOST_TOGETHER


def _axes(layer: Hyper) -> list[Axis]:
    """The axes of the kernel, each with those that it consists of."""
    parts = (part for axis in (layer.kernel_axis(), layer.z_out) for _, _, part in walk(axis))
    return [part for part in parts if isinstance(part, Axis)]


def _sources(layer: Hyper) -> list[Any]:
    """All objects that an ordinary kernel follows from."""
    axes = _axes(layer)
    vectors = [axis.value() for axis in axes if isinstance(axis, Latent)]
    return [*axes, *vectors, *layer.arrays()]


# Kernels that were generated together, and what from, while their network is traced.
_MADE: weakref.WeakKeyDictionary[Hyper, tuple[list[Any], Array]] = weakref.WeakKeyDictionary()


@functools.cache
def _with_made(kind: type[Hyper]) -> type[Hyper]:
    def kernel(self: Hyper) -> Array:
        if self in _MADE:  # and not a copy within a transformation
            (before, made), now = _MADE[self], _sources(self)
            if len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True)):
                return made
        return kind.kernel(self)

    return type(kind.__name__, (kind,), {"kernel": kernel})


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
    if depthwise and math.prod(rhs.shape[:2]) <= MOST_TAPS:
        return _depthwise(lhs, rhs, strides, pads, dilation)
    differentiable = jax.custom_vjp(plain)
    differentiable.defvjp(
        lambda x, kernel: (plain(x, kernel), (x, kernel)),
        functools.partial(_backward, plain, strides, pads, dilation, feature_group_count),
    )
    return differentiable(lhs, rhs)


def _is_sharded_by_hand(x: Array) -> bool:
    """Whether the type of an array says how it is sharded: explicit meshes, `shard_map`."""
    kind = jax.typeof(x)
    varying = getattr(kind, "vma", None) or getattr(kind, "manual_axis_type", None)
    return bool(getattr(varying, "varying", varying)) or any(kind.sharding.spec)


def _backward(plain, strides, pads, dilation, groups, inputs, grad):
    x, kernel = inputs
    (grad_x,) = jax.vjp(lambda x: plain(x, kernel), x)[1](grad)
    taps = kernel.shape[:2]
    # A computation of its own: within the whole, XLA would compute x again from what it was made
    # of, for every residual block before this one.
    with _not_inlined():
        if groups == 1:
            grad_kernel = _kernel_gradient(x, grad, taps, strides, pads, dilation)
        else:
            grad_kernel = _grouped_kernel_gradient(x, grad, groups, taps, strides, pads, dilation)
    return grad_x, grad_kernel.astype(kernel.dtype)


def _not_inlined() -> contextlib.AbstractContextManager:
    """With several devices nothing: XLA:CPU mixes up what such computations send each other."""
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
    """The kernel's gradient, one matrix product a tap and group."""
    rows, columns = x.shape[-1] // groups, grad.shape[-1] // groups
    grad_groups = grad.reshape(-1, groups, columns)
    by_tap = [
        jnp.einsum("pgi,pgo->igo", part.reshape(-1, groups, rows), grad_groups)
        for part in _shifted(x, taps, strides, pads, dilation, grad.shape[1:3])
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
    parts = _shifted(x, taps, strides, pads, dilation, size)
    weights = _wide(kernel).reshape(-1, kernel.shape[-1])
    result = sum(_wide(part) * weight for part, weight in zip(parts, weights, strict=True))
    return result.astype(x.dtype)


def _depthwise_forward(x, kernel, strides, pads, dilation):
    return _depthwise(x, kernel, strides, pads, dilation), (x, kernel)


def _depthwise_backward(strides, pads, dilation, inputs, grad):
    x, kernel = inputs
    taps = kernel.shape[:2]
    # The input's gradient is a depthwise convolution too: of the gradient, spread out by the
    # strides, with the kernel turned around.
    spread = _padded(grad, [(0, 0, stride - 1) for stride in strides])
    turned = []
    for n, m, k, d, (low, _) in zip(
        x.shape[1:3], spread.shape[1:3], taps, dilation, pads, strict=True
    ):
        before = (k - 1) * d - low
        turned.append((before, n + (k - 1) * d - m - before))
    grad_x = _depthwise(spread, kernel[::-1, ::-1], (1, 1), tuple(turned), dilation)
    with _not_inlined():  # within the whole, XLA would keep what each tap saw of x till now
        sums = _depthwise_sums(x, grad, taps, strides, pads, dilation)
    return grad_x, sums.reshape(kernel.shape).astype(kernel.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _depthwise_sums(
    x: Array, grad: Array, taps: tuple[int, int], strides, pads: Pads, dilation
) -> Array:
    """The gradient of a depthwise kernel, `(taps, c)`."""
    parts = _shifted(x, taps, strides, pads, dilation, grad.shape[1:3])
    return jnp.stack([jnp.sum(_wide(part) * _wide(grad), (0, 1, 2)) for part in parts])


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _shifted(
    x: Array, taps: tuple[int, int], strides, pads: Pads, dilation, size: tuple[int, int]
) -> list[Array]:
    """What each tap of a kernel sees of the padded input, `(n, *size, c)` each."""
    padded = _padded(x, [(low, high, 0) for low, high in pads])
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


def _padded(x: Array, pads: Sequence[tuple[int, int, int]]) -> Array:
    """The image with zeros before, after and between its rows and columns."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


def _wide(x: Array) -> Array:
    """In the dtype that sums are computed in: float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class _QuickBatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` that is quick to trace.

    Assigning statistics by `[...] =` asks for their sharding, which takes time in proportion to the
    computation traced so far, `set_value` does not.
    """

    def __call__(self, x: Array, use_running_average: bool | None = None, **options: Any) -> Array:
        if use_running_average is None:
            use_running_average = self.use_running_average
        ordinary = (
            self.axis in (-1, x.ndim - 1)
            and self.use_fast_variance
            and self.promote_dtype is dtypes.promote_dtype
            and not options
        )
        if use_running_average is not False or not ordinary:
            return super().__call__(x, use_running_average, **options)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        given = (x, self.mean[...], self.var[...], scale, bias)
        x, _, _, scale, bias = self.promote_dtype(given, dtype=self.dtype)
        wide = _wide(x)
        axes = tuple(range(x.ndim - 1))
        mean = jnp.mean(wide, axes)
        var = jnp.maximum(0, jnp.mean(wide * wide, axes) - mean * mean)
        for statistic, value in ((self.mean, mean), (self.var, var)):
            old = statistic[...]
            new = self.momentum * old + (1 - self.momentum) * value
            statistic.set_value(new.astype(old.dtype))
        slope = lax.rsqrt(var + self.epsilon)
        if scale is not None:
            slope = slope * scale
        # Written so, the backward pass keeps x alone, and takes two sums over the batch: what
        # several devices exchange is the statistics and the gradients of scale and bias.
        shift = -mean * slope
        return (x * slope + (shift if bias is None else shift + bias)).astype(x.dtype)


class _QuickHyperBatchNorm(BatchNorm, _QuickBatchNorm):
    """The same over the channels of an axis, which it checks."""


class _QuickBias(ChannelBias):
    """`ChannelBias` whose sum is computed once.

    XLA:CPU would keep it for BatchNorm, and what it is a sum of too, to add the bias again.
    """

    def __call__(self, x: Array) -> Array:
        with _not_inlined():
            return _shift(x, self.bias[...].astype(x.dtype))


class _QuickHyperBias(Bias, _QuickBias):
    """The same over the channels of an axis, which it checks."""


_shift = jax.jit(jnp.add)
QUICK = {nnx.BatchNorm: _QuickBatchNorm, BatchNorm: _QuickHyperBatchNorm}
QUICK_ON_CPU = {ChannelBias: _QuickBias, Bias: _QuickHyperBias}
