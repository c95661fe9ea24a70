"""New or copied weights for pruned networks."""

import math

from flax import nnx
import jax.numpy as jnp

from dhp_jax.core.initializers import truncated_normal
from dhp_jax.core.latent import modules_by_path, walk
from dhp_jax.core.layers import Hyper


def reinitialize(model: nnx.Module, *, rngs: nnx.Rngs) -> None:
    """Gives an ordinary network fresh kernels, as if it had never had hypernetworks; in place.

    Kernels of convolutions and `nnx.Linear` are drawn from a normal distribution of variance
    `gain / fan_in`, cut off at two standard deviations, their biases are zero; all else stays, and
    so do kernels that are not trained (that are no `nnx.Param`). The gain is the network's
    `initial_gain`, or He's 2 where it has none; 1/3 is PyTorch's default.

    Reference: He et al., Delving deep into rectifiers, 2015, equation 10.
    """
    gain = getattr(model, "initial_gain", 2.0)
    for _, _, layer in walk(model):
        ordinary = isinstance(layer, nnx.Conv | nnx.ConvTranspose | nnx.Linear)
        if ordinary and isinstance(layer.kernel, nnx.Param):
            kernel = layer.kernel[...]
            deviation = math.sqrt(gain / math.prod(kernel.shape[:-1]))
            drawn = deviation * truncated_normal(rngs.params(), kernel.size).reshape(kernel.shape)
            layer.kernel[...] = jnp.asarray(drawn, kernel.dtype)
            if layer.bias is not None:
                layer.bias[...] = jnp.zeros_like(layer.bias[...])


def carry_kernels(model: nnx.Module, fresh: nnx.Module) -> None:
    """Copies the arrays of an ordinary network into its network of latents, kernels bit for bit.

    The hypernetworks generate them whatever the latents are: only their last biases are not zero.
    `fresh` is changed in place.
    """
    for _, _, layer in walk(fresh):
        if isinstance(layer, Hyper):
            for variable in (layer.w2, layer.b2):
                variable.set_value(jnp.zeros_like(variable[...]))
    take_arrays(model, fresh)


def take_arrays(model: nnx.Module, fresh: nnx.Module) -> None:
    """Adjusts a network of latents so that it has the kernels and arrays of an ordinary one."""
    plain = modules_by_path(model)
    kernels: dict[int, nnx.Variable] = {}  # by what makes up for the difference to each
    for path, _, layer in walk(fresh):
        if isinstance(layer, Hyper):
            variable = plain[path].kernel
            if kernels.setdefault(id(layer.b2), variable) is not variable:
                raise ValueError(
                    "model: expected one kernel of layers that share the arrays of a "
                    f"hypernetwork; that of {path!r} is its own"
                )
            kernel = variable[...]
            layer.b2.set_value(layer.b2[...] + (kernel - layer.kernel()).astype(layer.b2.dtype))
    stored = nnx.to_flat_state(nnx.state(model))
    places = dict(nnx.to_flat_state(nnx.state(fresh)))
    taken = [(name, leaf) for name, leaf in stored if name in places]
    if len(taken) != len(stored) - len({id(variable) for variable in kernels.values()}):
        raise ValueError("model: its arrays are not those of the network that build makes, pruned")
    nnx.update(fresh, nnx.from_flat_state(taken))
