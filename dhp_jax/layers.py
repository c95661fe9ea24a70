"""Layers on latents: each computes with its plain `flax.nnx` counterpart, and can turn into it.

A layer takes the arguments of its counterpart, with latents where that takes channel counts. Its
forward pass *is* the counterpart's: `plain()` builds the ordinary layer, `plain(keep)` the same one
restricted to surviving channels.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from dhp_jax.hypernet import EMBEDDING, HypernetArrays, hyper_kernel, init_hypernet
from dhp_jax.latent import Axis, Latent, check_axis, walk

Keep = Mapping[Latent, np.ndarray]
NO_RNGS: Any = SimpleNamespace(params=lambda: None)  # for layers whose initial values are given


@runtime_checkable
class Prunable(Protocol):
    """A layer that pruning replaces; write `plain` to make a layer of your own prunable."""

    def plain(self, keep: Keep | None = None) -> nnx.Module: ...


class HyperConv(nnx.Module):
    """A convolution whose kernel a hypernetwork generates from two latents.

    Args:
      z_in: axis of the input channels.
      z_out: axis of the output channels.
      kernel_size: spatial size, `(3, 3)` for a 3 by 3 kernel.
      strides, padding, input_dilation, kernel_dilation, use_bias, dtype, param_dtype, precision:
        as in `nnx.Conv`. `dtype` is that of the computation; the hypernetwork stays in
        `param_dtype`.
      embedding: size `m` of the embedding of each pair of channels.
      rngs: the `params` stream draws the initial values.

    Raises:
      ValueError: `z_in` or `z_out` is no axis; when called, an input with another channel count.

    Example:
      >>> conv = dhp.HyperConv(z_in, z_out, (3, 3), strides=2, padding=1, rngs=rngs)
      >>> y = conv(x)                          # (n, h, w, in) -> (n, h', w', out)

    Reference: DHP (arXiv 2003.13683), section 3.1.
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
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        embedding: int = EMBEDDING,
        rngs: nnx.Rngs,
    ):
        check_axis("HyperConv: z_in", z_in)
        check_axis("HyperConv: z_out", z_out)
        self.z_in, self.z_out = z_in, z_out
        self.kernel_size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.strides = strides
        self.padding = padding
        self.input_dilation = input_dilation
        self.kernel_dilation = kernel_dilation
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        arrays = init_hypernet(rngs.params(), self.kernel_size, z_in.size, z_out.size, embedding)
        for name, array in arrays._asdict().items():
            setattr(self, name, nnx.Param(jnp.asarray(array, param_dtype)))
        self.bias = nnx.Param(jnp.zeros(z_out.size, param_dtype)) if use_bias else nnx.data(None)

    def kernel(self) -> Float[Array, "*k in out"]:
        """The generated kernel."""
        arrays = {name: getattr(self, name)[...] for name in HypernetArrays._fields}
        return hyper_kernel(self.z_in, self.z_out, **arrays).astype(self.param_dtype)

    def plain(self, keep: Keep | None = None) -> nnx.Conv:
        """The `nnx.Conv` with the generated kernel, restricted to the channels in `keep`."""
        kept_in, kept_out = self.z_in.keep(keep), self.z_out.keep(keep)
        kernel = _slice(_slice(self.kernel(), kept_in, -2), kept_out, -1)
        return nnx.Conv(
            kernel.shape[-2],
            kernel.shape[-1],
            self.kernel_size,
            self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=_given(kernel),
            bias_init=_given(_select(self.bias, kept_out)),
            rngs=NO_RNGS,
        )

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        _check_channels(self, x, self.z_in)
        return self.plain()(x)


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
            bias_init=_given(_select(self.bias, kept)),
            scale_init=_given(_select(self.scale, kept)),
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            use_fast_variance=self.use_fast_variance,
            promote_dtype=self.promote_dtype,
            rngs=NO_RNGS,
        )
        norm.mean[...] = _select(self.mean, kept)
        norm.var[...] = _select(self.var, kept)
        return norm

    def __call__(self, x: Float[Array, "*batch c"], *args: Any, **kwargs: Any):
        _check_channels(self, x, self.z, self.axis)
        return super().__call__(x, *args, **kwargs)


class Linear(nnx.Linear):
    """`nnx.Linear` whose input is the channels of an axis; its outputs are never pruned.

    Args:
      z_in: the axis of the input features.
      out_features: number of outputs.
      **options: as in `nnx.Linear`.

    Raises:
      ValueError: `z_in` is no axis; when called, an input with another feature count.

    Example:
      >>> classifier = dhp.Linear(z, 10, rngs=rngs)
    """

    def __init__(self, z_in: Axis, out_features: int, **options: Any):
        check_axis("Linear: z_in", z_in)
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
            kernel_init=_given(_select(self.kernel, kept)),
            bias_init=_given(None if self.bias is None else self.bias[...]),
            dot_general=self.dot_general,
            promote_dtype=self.promote_dtype,
            preferred_element_type=self.preferred_element_type,
            rngs=NO_RNGS,
        )

    def __call__(self, x: Float[Array, "*batch in"], *args: Any, **kwargs: Any):
        _check_channels(self, x, self.z_in)
        return super().__call__(x, *args, **kwargs)


def reinitialize(model: nnx.Module, *, rngs: nnx.Rngs) -> None:
    """Gives an ordinary network fresh kernels, as if it had never had hypernetworks.

    Kernels of `nnx.Conv` and `nnx.Linear` are drawn from He's normal distribution (variance
    `2 / fan_in`), their biases are zero; all else stays.

    Args:
      model: a pruned or ordinary network; changed in place.
      rngs: the `params` stream draws the kernels.

    Reference: He et al., Delving deep into rectifiers, 2015, equation 10.
    """
    for _, _, layer in walk(model):
        if isinstance(layer, nnx.Conv | nnx.Linear):
            kernel = layer.kernel[...]
            layer.kernel[...] = _he_normal(rngs.params(), kernel.shape, kernel.dtype)
            if layer.bias is not None:
                layer.bias[...] = jnp.zeros_like(layer.bias[...])


_he_normal = jax.jit(nnx.initializers.he_normal(), static_argnums=(1, 2))


def _select(variable: nnx.Variable | None, mask: np.ndarray) -> jax.Array | None:
    return None if variable is None else _slice(variable[...], mask, 0)


def _slice(array: jax.Array, mask: np.ndarray, axis: int) -> jax.Array:
    """The entries of an axis that a mask keeps."""
    if mask.all():
        return array
    if isinstance(array, jax.core.Tracer):
        return jnp.take(array, np.flatnonzero(mask), axis)
    # On the host: each of the many different shapes would otherwise be compiled for.
    return jnp.asarray(np.compress(mask, np.asarray(array), axis))


def _given(array: Any) -> Callable[..., Any]:
    """An initializer that returns what is already there."""
    return lambda *args, **kwargs: array


def _check_channels(layer: nnx.Module, x: jax.Array, axis: Axis, position: int = -1) -> None:
    if x.ndim == 0 or x.shape[position] != axis.size:
        raise ValueError(
            f"{type(layer).__name__}: x: expected {axis.size} channels on axis {position}, "
            f"got shape {x.shape}"
        )
