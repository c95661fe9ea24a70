"""Layers whose kernels a hypernetwork generates from the latents of their two axes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax import nnx
from flax.nnx.nn import dtypes
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from dhp_jax.core.hypernet import EMBEDDING, KernelGenerator, init_hypernet
from dhp_jax.core.latent import Axis, Latent, check_axis, in_one_line
from dhp_jax.core.plain import (
    Keep,
    Layer,
    check_channels,
    initializer_of,
    make_like,
    select_entries,
    slice_axes,
)
from dhp_jax.errors import check_integer


class Hyper(KernelGenerator):
    """Base of layers with a generated kernel: holds the hypernetwork and the bias."""

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
        check_integer(f"{kind}: embedding", embedding)
        self.z_in, self.z_out = z_in, z_out
        self.kernel_size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.use_bias, self.dtype, self.param_dtype = use_bias, dtype, param_dtype
        self.precision, self.promote_dtype = precision, promote_dtype
        self.preferred_element_type = preferred_element_type
        rows = self.kernel_axis().size
        arrays = init_hypernet(rngs.params(), self.kernel_size, rows, z_out.size, embedding)
        if initial_scale != 1:
            arrays = arrays._replace(w2=initial_scale * arrays.w2)
        for name, array in arrays._asdict().items():
            setattr(self, name, nnx.Param(jnp.asarray(array, param_dtype)))
        self.bias = nnx.Param(jnp.zeros(z_out.size, param_dtype)) if use_bias else nnx.data(None)

    def __nnx_repr__(self) -> Iterator[Any]:
        named = {name: getattr(self, name, None) for name in ("strides", "feature_group_count")}
        changed = {name: value for name, value in named.items() if value not in (None, 1)}
        taps = (self.kernel_size,) if self.kernel_size else ()
        return in_one_line(self, self.z_in, self.z_out, *taps, **changed)

    def kernel_axis(self) -> Axis:
        """The axis of the kernel's input channels."""
        return self.z_in

    def kernel_axes(self) -> tuple[Axis, Axis]:
        return self.kernel_axis(), self.z_out

    def _plain(self, kind: type[Layer], keep: Keep | None, **sizes: int) -> Layer:
        """The layer of a kind with the generated kernel of the channels in `keep`."""
        kept_in, kept_out = (axis.keep(keep) for axis in self.kernel_axes())
        kernel = slice_axes(self.kernel(), {-2: kept_in, -1: kept_out})
        return make_like(
            kind,
            self,
            in_features=int(self.z_in.keep(keep).sum()),
            out_features=int(kept_out.sum()),
            kernel_init=initializer_of(kernel),
            bias_init=initializer_of(select_entries(self.bias, kept_out)),
            **sizes,
        )

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
      ValueError: `z_in` or `z_out` is no axis, `embedding` no positive integer, groups that do not
        divide the channels or that pruning would tear apart; when called, an input with another
        channel count.

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
        self.strides, self.padding = strides, padding
        self.input_dilation, self.kernel_dilation = input_dilation, kernel_dilation
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
        return self._plain(nnx.Conv, keep, feature_group_count=groups)


class HyperConvTranspose(Hyper):
    """A transposed convolution whose kernel a hypernetwork generates from two latents.

    Args:
      z_in: axis of the input channels.
      z_out: axis of the output channels.
      kernel_size: spatial size, `(2, 2)` for a 2 by 2 kernel.
      strides, padding, kernel_dilation, use_bias, dtype: as in `nnx.ConvTranspose`.
      param_dtype, precision, promote_dtype, preferred_element_type: as in `nnx.ConvTranspose`.
      embedding, initial_scale, rngs: as in `HyperConv`.

    Raises:
      ValueError: as in `HyperConv`, but for groups.

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
        self.strides, self.padding, self.kernel_dilation = strides, padding, kernel_dilation
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
        return self._plain(nnx.ConvTranspose, keep)


class HyperLinear(Hyper):
    """A linear layer whose kernel a hypernetwork generates from two latents.

    Args:
      z_in: axis of the input features.
      z_out: axis of the output features.
      use_bias, dtype, param_dtype, precision, dot_general, promote_dtype, preferred_element_type:
        as in `nnx.Linear`.
      embedding, initial_scale, rngs: as in `HyperConv`.

    Raises:
      ValueError: as in `HyperConv`, but for groups.

    Example:
      >>> hidden = dhp.HyperLinear(z_in, z_out, rngs=rngs)
      >>> y = hidden(x)                        # (n, in) -> (n, out)

    Reference: DHP (arXiv 2003.13683), section 3.1, of a kernel without spatial axes.
    """

    def __init__(
        self,
        z_in: Axis,
        z_out: Axis,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        dot_general: Callable[..., Any] = jax.lax.dot_general,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: Any = None,
        embedding: int = EMBEDDING,
        initial_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.dot_general = dot_general
        super().__init__(
            z_in,
            z_out,
            (),
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

    def plain(self, keep: Keep | None = None) -> nnx.Linear:
        """The `nnx.Linear` with the generated kernel of the features in `keep`."""
        return self._plain(nnx.Linear, keep)


def _check_groups(groups: int, z_in: Axis, z_out: Axis) -> None:
    """Raises unless all channels of a group are one entry of a latent, so that groups go whole."""
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
