"""The compiled forward pass, and the layers that are fast on the platform at hand."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
from jax import lax
from jaxtyping import Array

from dhp_jax.backend.cpu_conv import convolution
from dhp_jax.backend.hypernets import generate_together
from dhp_jax.backend.norm import add_bias_once, normalize_batch
from dhp_jax.backend.platform import compiler_options
from dhp_jax.core.latent import check_module, walk
from dhp_jax.core.layers import BatchNorm, Bias, ChannelBias
from dhp_jax.core.surgery import override


def inference(model: nnx.Module, call: Callable[..., Any] | None = None) -> Callable[..., Array]:
    """The compiled forward pass of a network in evaluation mode, fast on the platform at hand.

    Args:
      model: a network, with or without latents; left as it was. Later changes are not seen, but its
        arrays are shared: copy it before donating them.
      call: a function of the model and the inputs, where that is not `model(*inputs)`.

    Returns:
      A function of the inputs, batches of arrays, compiled for every new shape. Within other
      transformations, such as `jax.grad` or an outer `jax.jit`, it is the ordinary forward pass.

    Example:
      >>> run = dhp.inference(small)
      >>> y = run(x)                           # (n, h, w, c) -> what the network returns
    """
    check_module(model)
    call = call or _call
    model = nnx.clone(model)
    model.eval()
    graphdef, state = nnx.split(model)
    arrays, structure = jax.tree.flatten(state)  # a list is taken apart faster, at every call

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def compiled(arrays: list[Array], *inputs: Any) -> Any:
        return call(tune(nnx.merge(graphdef, jax.tree.unflatten(structure, arrays))), *inputs)

    def run(*inputs: Any) -> Any:
        # The options of a compiler are for functions that are not in others.
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs)):
            return call(nnx.merge(graphdef, state, copy=True), *inputs)
        return compiled(arrays, *inputs)

    return run


def _call(model: nnx.Module, *inputs: Any) -> Any:
    return model(*inputs)


def tune(model: nnx.Module) -> nnx.Module:
    """Makes a network's layers compute in the way that is fastest here; in place, same numbers.

    For models that were merged within a jitted function; returns the model. Convolutions that were
    given a function of their own keep it. What is tuned for CPU has no forward-mode derivative. The
    platform is that of `jax.default_backend()`.
    """
    on_cpu = jax.default_backend() == "cpu"
    if jax.default_backend() == "gpu":
        generate_together(model)
    for _, _, layer in walk(model):
        if type(layer) in (nnx.BatchNorm, BatchNorm) and layer.axis_name is None:
            override(layer, __call__=normalize_batch)
        if on_cpu and type(layer) in (ChannelBias, Bias):
            override(layer, __call__=add_bias_once)
        is_convolution = getattr(layer, "conv_general_dilated", None) is lax.conv_general_dilated
        if on_cpu and is_convolution:
            layer.conv_general_dilated = convolution
    return model
