"""Layers on latents: each computes with its plain `flax.nnx` counterpart, and can turn into it.

A layer takes the arguments of its counterpart, with latents where that takes channel counts. Its
forward pass *is* the counterpart's: `plain()` builds the ordinary layer, `plain(keep)` the same one
restricted to surviving channels.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

from flax import nnx
from flax.nnx.nn import dtypes
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from dhp_jax.core.hypernet import EMBEDDING, HypernetArrays, hyper_kernel, init_hypernet
from dhp_jax.core.latent import Axis, Latent, check_axis

Keep = Mapping[Latent, np.ndarray]


_zeros = nnx.initializers.zeros_init()


NO_RNGS: Any = SimpleNamespace(params=lambda: None)  # for layers whose initial values are given


@runtime_checkable
class Prunable(Protocol):
    """A layer that pruning replaces; write `plain` to make a layer of your own prunable."""

    def plain(self, keep: Keep | None = None) -> nnx.Module: ...


class Hyper(nnx.Module):
    """What convolutions with a generated kernel have in common: the hypernetwork and the bias."""

    def __init__(
        self,
        z_in: Axis,
        z_out: Axis,
        kernel_size: int | Sequence[int],
        *,
        use_bias: bool,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        promote_dtype: Callable[..., Any],
        preferred_element_type: Any,
        embedding: int,
        initial_scale: float,
        rngs: nnx.Rngs,
    ):
        kind = type(self).__name__
        check_axis(f"{kind}: z_in", z_in)
        check_axis(f"{kind}: z_out", z_out)
        self.z_in, self.z_out = z_in, z_out
        self.kernel_size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        rows = self.kernel_axis().size
        arrays = init_hypernet(rngs.params(), self.kernel_size, rows, z_out.size, embedding)
        if initial_scale != 1:
            arrays = arrays._replace(w2=initial_scale * arrays.w2)
        for name, array in arrays._asdict().items():
            setattr(self, name, nnx.Param(jnp.asarray(array, param_dtype)))
        self.bias = nnx.Param(jnp.zeros(z_out.size, param_dtype)) if use_bias else nnx.data(None)

    def kernel_axis(self) -> Axis:
        """The axis of the kernel's input channels."""
        return self.z_in

    def kernel(self) -> Float[Array, "*k in out"]:
        """The generated kernel."""
        kernel = hyper_kernel(self.kernel_axis(), self.z_out, **self.arrays()._asdict())
        return kernel.astype(self.param_dtype)

    def arrays(self) -> HypernetArrays:
        """The arrays of the hypernetwork."""
        return HypernetArrays(*(getattr(self, name)[...] for name in HypernetArrays._fields))

    def _plain_arguments(self, keep: Keep | None) -> dict[str, Any]:
        """Arguments of the plain layer with the kernel and bias of the channels in `keep`."""
        kept_out = self.z_out.keep(keep)
        kernel = slice_axis(self.kernel(), self.kernel_axis().keep(keep), -2)
        return {
            "in_features": int(self.z_in.keep(keep).sum()),
            "out_features": int(kept_out.sum()),
            "kernel_size": self.kernel_size,
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
            "promote_dtype": self.promote_dtype,
            "preferred_element_type": self.preferred_element_type,
            "kernel_init": _initializer_of(slice_axis(kernel, kept_out, -1)),
            "bias_init": _initializer_of(select_entries(self.bias, kept_out)),
            "rngs": NO_RNGS,
        }

    def plain(self, keep: Keep | None = None) -> nnx.Module:
        raise NotImplementedError

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        check_channels(self, x, self.z_in)
        return self.plain()(x)


class HyperConv(Hyper):
    """A convolution whose kernel a hypernetwork generates from two latents.

    With `feature_group_count` the kernel's input axis, the channels of one group, has a latent of
    its own that is not pruned, and pruning removes whole groups. So all channels of a group must be
    one entry of a latent: a depthwise convolution has the same axis on both sides and
    `feature_group_count=z.size`; groups of 4 channels are `z = repeat(Latent(32), 4)`.

    Args:
      z_in: axis of the input channels.
      z_out: axis of the output channels.
      kernel_size: spatial size, `(3, 3)` for a 3 by 3 kernel.
      strides, padding, input_dilation, kernel_dilation, feature_group_count: as in `nnx.Conv`.
      use_bias, dtype, param_dtype: as in `nnx.Conv`; `dtype` is that of the computation, the
        hypernetwork stays in `param_dtype`.
      precision, conv_general_dilated, promote_dtype, preferred_element_type: as in `nnx.Conv`.
      embedding: size `m` of the embedding of each pair of channels.
      initial_scale: multiplies the kernel before training, whose variance is `1 / fan_in`.
      rngs: the `params` stream draws the initial values.

    Raises:
      ValueError: `z_in` or `z_out` is no axis, groups that do not divide the channels or that
        pruning would tear apart; when called, an input with another channel count.

    Example:
      >>> conv = dhp.HyperConv(z_in, z_out, (3, 3), strides=2, padding=1, rngs=rngs)
      >>> y = conv(x)                          # (n, h, w, in) -> (n, h', w', out)
      >>> depthwise = dhp.HyperConv(z, z, (3, 3), feature_group_count=z.size, rngs=rngs)

    Reference: DHP (arXiv 2003.13683), sections 3.1 and 3.4.
    """

    def __init__(
        self,
        z_in: Axis,
        z_out: Axis,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        padding: Any = "SAME",
        input_dilation: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        conv_general_dilated: Callable[..., Any] = jax.lax.conv_general_dilated,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: Any = None,
        embedding: int = EMBEDDING,
        initial_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.strides = strides
        self.padding = padding
        self.input_dilation = input_dilation
        self.kernel_dilation = kernel_dilation
        self.feature_group_count = feature_group_count
        self.conv_general_dilated = conv_general_dilated
        if feature_group_count != 1:
            _check_groups(feature_group_count, z_in, z_out)
            self.z_group = Latent(z_in.size // feature_group_count, prunable=False, rngs=rngs)
        super().__init__(
            z_in,
            z_out,
            kernel_size,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
            embedding=embedding,
            initial_scale=initial_scale,
            rngs=rngs,
        )

    def kernel_axis(self) -> Axis:
        return self.z_in if self.feature_group_count == 1 else self.z_group

    def plain(self, keep: Keep | None = None) -> nnx.Conv:
        """The `nnx.Conv` with the generated kernel, restricted to the channels in `keep`."""
        groups = self.feature_group_count
        if groups != 1:  # those left; `_check_groups` has seen to it that they are whole
            groups = int(self.z_in.keep(keep).sum()) // self.z_group.size
        return nnx.Conv(
            **self._plain_arguments(keep),
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=groups,
            conv_general_dilated=self.conv_general_dilated,
        )


class HyperConvTranspose(Hyper):
    """A transposed convolution whose kernel a hypernetwork generates from two latents.

    Args:
      z_in: axis of the input channels.
      z_out: axis of the output channels.
      kernel_size: spatial size, `(2, 2)` for a 2 by 2 kernel.
      strides, padding, kernel_dilation, use_bias, dtype: as in `nnx.ConvTranspose`.
      param_dtype, precision, promote_dtype, preferred_element_type: as in `nnx.ConvTranspose`.
      embedding: size `m` of the embedding of each pair of channels.
      initial_scale: multiplies the kernel before training, whose variance is `1 / fan_in`.
      rngs: the `params` stream draws the initial values.

    Raises:
      ValueError: `z_in` or `z_out` is no axis; when called, an input with another channel count.

    Example:
      >>> up = dhp.HyperConvTranspose(z_in, z_out, (2, 2), strides=2, rngs=rngs)
      >>> y = up(x)                            # (n, h, w, in) -> (n, 2 h, 2 w, out)

    Reference: DHP (arXiv 2003.13683), section 3.1.
    """

    def __init__(
        self,
        z_in: Axis,
        z_out: Axis,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        padding: Any = "SAME",
        kernel_dilation: int | Sequence[int] | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: Any = None,
        embedding: int = EMBEDDING,
        initial_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.strides = strides
        self.padding = padding
        self.kernel_dilation = kernel_dilation
        super().__init__(
            z_in,
            z_out,
            kernel_size,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
            embedding=embedding,
            initial_scale=initial_scale,
            rngs=rngs,
        )

    def plain(self, keep: Keep | None = None) -> nnx.ConvTranspose:
        """The `nnx.ConvTranspose` with the generated kernel of the channels in `keep`."""
        return nnx.ConvTranspose(
            **self._plain_arguments(keep),
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
        )


class ChannelBias(nnx.Module):
    """Adds a learned number to each channel: a convolution's bias as a layer of its own.

    Args:
      num_features: number of channels.
      param_dtype: of the bias; it is added in the dtype of the input.
      bias_init: initial values, as in `nnx.Conv`.
      rngs: the `params` stream draws the initial values.
    """

    def __init__(
        self,
        num_features: int,
        *,
        param_dtype: Any = jnp.float32,
        bias_init: Callable[..., Any] = _zeros,
        rngs: nnx.Rngs,
    ):
        self.num_features = num_features
        self.param_dtype = param_dtype
        self.bias = nnx.Param(bias_init(rngs.params(), (num_features,), param_dtype))

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        return x + self.bias[...].astype(x.dtype)


class Bias(ChannelBias):
    """`ChannelBias` over the channels of an axis.

    Args:
      z: the axis of the channels.
      **options: as in `ChannelBias`.

    Raises:
      ValueError: `z` is no axis; when called, an input with another channel count.

    Example:
      >>> shift = dhp.Bias(z, rngs=rngs)
    """

    def __init__(self, z: Axis, **options: Any):
        check_axis("Bias: z", z)
        super().__init__(z.size, **options)
        self.z = z

    def plain(self, keep: Keep | None = None) -> ChannelBias:
        """The `ChannelBias` of the channels in `keep`."""
        kept = self.z.keep(keep)
        given = _initializer_of(select_entries(self.bias, kept))
        return ChannelBias(
            int(kept.sum()), param_dtype=self.param_dtype, bias_init=given, rngs=NO_RNGS
        )

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        check_channels(self, x, self.z)
        return super().__call__(x)


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` over the channels of an axis.

    Args:
      z: the axis of the normalised channels.
      **options: as in `nnx.BatchNorm`.

    Raises:
      ValueError: `z` is no axis; when called, an input with another channel count.

    Example:
      >>> norm = dhp.BatchNorm(z, momentum=0.9, rngs=rngs)
    """

    def __init__(self, z: Axis, **options: Any):
        check_axis("BatchNorm: z", z)
        super().__init__(z.size, **options)
        self.z = z

    def plain(self, keep: Keep | None = None) -> nnx.BatchNorm:
        """The `nnx.BatchNorm` with the scale, bias and statistics of the channels in `keep`."""
        kept = self.z.keep(keep)
        norm = nnx.BatchNorm(
            int(kept.sum()),
            use_running_average=self.use_running_average,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_bias=self.use_bias,
            use_scale=self.use_scale,
            bias_init=_initializer_of(select_entries(self.bias, kept)),
            scale_init=_initializer_of(select_entries(self.scale, kept)),
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            use_fast_variance=self.use_fast_variance,
            promote_dtype=self.promote_dtype,
            rngs=NO_RNGS,
        )
        norm.mean[...] = select_entries(self.mean, kept)
        norm.var[...] = select_entries(self.var, kept)
        return norm

    def __call__(self, x: Float[Array, "*batch c"], *args: Any, **kwargs: Any):
        check_channels(self, x, self.z, self.axis)
        return super().__call__(x, *args, **kwargs)


class Linear(nnx.Linear):
    """`nnx.Linear` whose input is the channels of an axis; its outputs are never pruned.

    Args:
      z_in: the axis of the input features.
      out_features: number of outputs.
      **options: as in `nnx.Linear`.

    Raises:
      ValueError: `z_in` is no axis, or `out_features` is one; when called, an input with another
        feature count.

    Example:
      >>> classifier = dhp.Linear(z, 10, rngs=rngs)
    """

    def __init__(self, z_in: Axis, out_features: int, **options: Any):
        check_axis("Linear: z_in", z_in)
        if isinstance(out_features, Axis):
            raise ValueError(
                "Linear: out_features: expected a number, for outputs are never pruned; got a "
                f"{type(out_features).__name__}: a hidden layer is HyperConv(z_in, z_out, (1, 1))"
            )
        super().__init__(z_in.size, out_features, **options)
        self.z_in = z_in

    def plain(self, keep: Keep | None = None) -> nnx.Linear:
        """The `nnx.Linear` with the rows of the features in `keep`."""
        kept = self.z_in.keep(keep)
        return nnx.Linear(
            int(kept.sum()),
            self.out_features,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=_initializer_of(select_entries(self.kernel, kept)),
            bias_init=_initializer_of(None if self.bias is None else self.bias[...]),
            dot_general=self.dot_general,
            promote_dtype=self.promote_dtype,
            preferred_element_type=self.preferred_element_type,
            rngs=NO_RNGS,
        )

    def __call__(self, x: Float[Array, "*batch in"], *args: Any, **kwargs: Any):
        check_channels(self, x, self.z_in)
        return super().__call__(x, *args, **kwargs)


def select_entries(variable: nnx.Variable | None, mask: np.ndarray) -> jax.Array | None:
    """The entries of a variable's first axis that a mask keeps, if there is one."""
    return None if variable is None else slice_axis(variable[...], mask, 0)


def slice_axis(array: jax.Array, mask: np.ndarray, axis: int) -> jax.Array:
    """The entries of an axis that a mask keeps."""
    if mask.all():
        return array
    if isinstance(array, jax.core.Tracer):
        return jnp.take(array, np.flatnonzero(mask), axis)
    # On the host: each of the many different shapes would otherwise be compiled for.
    return jnp.asarray(np.compress(mask, np.asarray(array), axis))


def _initializer_of(array: Any) -> Callable[..., Any]:
    """An initializer that returns what is already there."""
    return lambda *args, **kwargs: array


def _check_groups(groups: int, z_in: Axis, z_out: Axis) -> None:
    """Raises unless pruning removes whole groups: all channels of one are one entry of a latent."""
    for name, axis in (("z_in", z_in), ("z_out", z_out)):
        check_axis(f"HyperConv: {name}", axis)
        if not isinstance(groups, int) or groups < 1 or axis.size % groups:
            raise ValueError(
                f"HyperConv: feature_group_count: expected a divisor of the {axis.size} channels "
                f"of {name}, got {groups!r}"
            )
    in_groups, out_groups = (np.array_split(np.arange(z.size), groups) for z in (z_in, z_out))
    entries_in, entries_out = z_in.entries(), z_out.entries()
    for number, (ins, outs) in enumerate(zip(in_groups, out_groups, strict=True)):
        entries = {entries_in[i] for i in ins} | {entries_out[o] for o in outs}
        if len(entries) > 1 and any(latent.prunable for latent, _ in entries):
            raise ValueError(
                f"HyperConv: feature_group_count: pruning would tear group {number} of {groups} "
                f"apart: its channels are {len(entries)} entries of latents, expected one; give "
                "groups of n channels the axis repeat(z, n) on both sides"
            )


def check_channels(layer: nnx.Module, x: jax.Array, axis: Axis, position: int = -1) -> None:
    """Raises unless an input has the channels of an axis."""
    if x.ndim == 0 or x.shape[position] != axis.size:
        raise ValueError(
            f"{type(layer).__name__}: x: expected {axis.size} channels on axis {position}, "
            f"got shape {x.shape}"
        )
