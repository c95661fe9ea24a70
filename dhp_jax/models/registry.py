"""Families of networks, by name."""

import inspect
from types import SimpleNamespace
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from dhp_jax.core.provenance import Architecture, set_architecture
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.models.densenet import DenseNet
from dhp_jax.models.dncnn import DnCNN
from dhp_jax.models.edsr import EDSR
from dhp_jax.models.mobilenet import MobileNetV1, MobileNetV2
from dhp_jax.models.resnet import ResNet
from dhp_jax.models.srresnet import SRResNet
from dhp_jax.models.unet import UNet
from dhp_jax.models.vgg import VGG

FAMILIES: dict[str, type[nnx.Module]] = {
    "resnet": ResNet,
    "densenet": DenseNet,
    "vgg": VGG,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "srresnet": SRResNet,
    "edsr": EDSR,
    "dncnn": DnCNN,
    "unet": UNet,
}


def build(name: str, *, rngs: nnx.Rngs, **arguments: Any) -> nnx.Module:
    """Builds a network of latents; every convolution has a hypernetwork.

    Args:
      name: the family, one of `FAMILIES`.
      rngs: the `params` stream draws the initial values.
      **arguments: of the family's class, for instance `depth=56, num_classes=10, width=1.0`.
        `dtype` may be a name such as "bfloat16".

    Returns:
      The network.

    Raises:
      ValueError: an unknown family or argument, or an argument's value that the family refuses.

    Example:
      >>> model = dhp.models.build("resnet", depth=56, num_classes=10, rngs=nnx.Rngs(0))
    """
    _check_arguments(name, arguments)
    given = dict(arguments)
    if given.get("dtype") is not None:
        given["dtype"] = _dtype(given["dtype"])
        arguments = {**arguments, "dtype": given["dtype"].name}
    model = FAMILIES[name](**given, rngs=rngs)
    said = {argument: _parameters(name)[argument].default for argument in absent(name)}
    set_architecture(model, Architecture(name, {**said, **arguments}))
    return model


def absent(name: str) -> dict[str, Any]:
    """What a file means that lacks an argument of a family, because it is older than that."""
    return dict(getattr(FAMILIES[name], "absent", {}))


def task_of(name: str) -> str:
    """The task of a family: one that takes `num_classes` classifies, one of `scale` enlarges."""
    taken = _parameters(name)
    if "num_classes" in taken:
        return "classification"
    return "super_resolution" if "scale" in taken else "denoising"


def build_abstract(name: str, **arguments: Any) -> nnx.Module:
    """The network that `build` would make, of shapes and dtypes only; nothing is computed.

    Args:
      name: the family, one of `FAMILIES`.
      **arguments: as of `build`.

    Returns:
      A network whose arrays are `jax.ShapeDtypeStruct`s, to be measured and checked.

    Raises:
      ValueError: as `build` does.

    Example:
      >>> model = dhp.models.build_abstract("resnet", depth=56)
      >>> dhp.measure_cost(model, (32, 32, 3)).flops
      126837376
    """
    _check_arguments(name, arguments)
    # Not `nnx.Rngs`: counting its draws under a trace takes seconds in a deep network.
    constant: Any = SimpleNamespace(params=lambda: jax.random.key(0))
    return nnx.eval_shape(lambda: build(name, rngs=constant, **arguments))


def _check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """Raises a `ValueError` for an unknown family, or for arguments it does not take or lacks."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise ArgumentError.unknown("name", name, FAMILIES)
    parameters = _parameters(name)
    for argument in arguments:
        if argument not in parameters:
            raise ArgumentError.unknown(argument, argument, parameters, "unknown argument: ")
    for argument, parameter in parameters.items():
        if parameter.default is parameter.empty and argument not in arguments:
            raise ArgumentError(argument, detail="expected a value, got none")


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(FAMILIES[name].__init__).parameters)
    del parameters["self"], parameters["rngs"]
    return parameters


def _dtype(given: Any) -> jnp.dtype:
    try:
        dtype = jnp.dtype(given)
    except Exception:  # whatever NumPy raises for what is none
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ArgumentError("dtype", "a name such as 'bfloat16'", shown(given))
    return dtype
