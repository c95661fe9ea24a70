"""Families of networks, by name, and functions of the user's own that make networks."""

from collections.abc import Callable, Iterable, Mapping
import inspect
from types import SimpleNamespace
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from dhp_jax.core.provenance import Architecture, set_architecture
from dhp_jax.core.state import value_of
from dhp_jax.errors import ArgumentError, shown
from dhp_jax.models.densenet import DenseNet
from dhp_jax.models.dncnn import DnCNN
from dhp_jax.models.edsr import EDSR
from dhp_jax.models.mobilenet import MobileNetV1, MobileNetV2
from dhp_jax.models.own import imported, is_own
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

SIDES = (32, 32)  # of an image that every family takes, in pixels
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
OWN: dict[str, Callable[..., nnx.Module]] = {}  # by the import names that the user has given


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
    check_arguments(name, arguments)
    given = dict(arguments)
    if given.get("dtype") is not None:
        given["dtype"] = _dtype(given["dtype"])
        arguments = {**arguments, "dtype": given["dtype"].name}
    model = _maker(name)(**given, rngs=rngs)
    if not isinstance(model, nnx.Module):
        raise ArgumentError("name", "a function that returns an nnx.Module", shown(model))
    said = {argument: _parameters(name)[argument].default for argument in absent(name)}
    channels = with_defaults(name, arguments).get("channels") if name in FAMILIES else None
    example = None if channels is None else (*SIDES, channels)
    set_architecture(model, Architecture(name, {**said, **arguments}, example=example))
    return model


def add_own(name: str, argument: str = "build") -> None:
    """Imports a function, so that `build`, `load` and runs can make its network by its name.

    Args:
      name: "module:function", given by the user, never one that a file holds.
      argument: what an error calls it.
    """
    OWN[name] = imported(name, argument)
    if not taken_by(name, ["rngs"]):
        del OWN[name]
        raise ArgumentError(argument, detail=f"expected a function that takes rngs; got {name!r}")


def knows(name: Any) -> bool:
    """Whether `build` makes a network by a name."""
    return isinstance(name, str) and (name in FAMILIES or name in OWN)


def taken_by(name: str, arguments: Iterable[str]) -> list[str]:
    """Those of some arguments that a family or a function of the user's own takes."""
    return taken(_maker(name), arguments)


def taken(maker: Callable[..., nnx.Module], arguments: Iterable[str]) -> list[str]:
    """Those of some arguments that a function or class takes; all where it takes any."""
    known = _signature(maker)
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return [name for name in arguments if anything or name in known]


def absent(name: str) -> dict[str, Any]:
    """What a file means that lacks an argument of a family, because it is older than that."""
    return dict(getattr(_maker(name), "absent", {}))


def with_defaults(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a network, also those that have their default."""
    defaults = {key: p.default for key, p in _parameters(name).items() if p.default is not p.empty}
    return {**defaults, **arguments}


def task_of(name: str) -> str | None:
    """The task of a family: one that takes `num_classes` classifies, one of `scale` enlarges.

    It is `None` for a function of the user's own.
    """
    if is_own(name):
        return None
    parameters = _parameters(name)
    if "num_classes" in parameters:
        return "classification"
    return "super_resolution" if "scale" in parameters else "denoising"


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
    check_arguments(name, arguments)  # out here, for JAX adds lines to errors within a trace
    # Not `nnx.Rngs`: counting its draws under a trace takes seconds in a deep network.
    constant: Any = SimpleNamespace(params=lambda: jax.random.key(0))
    return shapes_of(
        lambda: build(name, rngs=nnx.Rngs(0) if is_own(name) else constant, **arguments)
    )


def shapes_of(make: Callable[[], nnx.Module]) -> nnx.Module:
    """The network that a function makes, of shapes and dtypes only.

    It is computed if it holds an array that is no variable's, which stays, for NNX knows no shape
    as one.
    """

    def checked() -> nnx.Module:
        model = make()
        leaves = [leaf for _, leaf in nnx.to_flat_state(nnx.state(model))]
        nodes = (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Pytree))
        held = (x for node in nodes for x in vars(node).values())  # NNX may miss those of a list
        if not all(isinstance(leaf, nnx.Variable) for leaf in leaves) or any(
            isinstance(x, jax.core.Tracer) for x in held
        ):
            raise _BareArrayError
        return model

    try:
        return nnx.eval_shape(checked)
    except _BareArrayError:
        graphdef, state = nnx.split(make())
        flat = [(path, _abstract(leaf)) for path, leaf in nnx.to_flat_state(state)]
        return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _abstract(leaf: Any) -> Any:
    """A leaf of a state, with a shape in place of a variable's array."""
    if not isinstance(leaf, nnx.Variable):
        return leaf
    return leaf.replace(jax.eval_shape(lambda x: x, value_of(leaf)))


class _BareArrayError(Exception):
    """A network holds an array that is no variable's."""


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for an unknown family, or for arguments it does not take or lacks."""
    if not knows(name):
        raise ArgumentError.unknown("name", name, FAMILIES)
    parameters = _parameters(name)
    known = taken_by(name, arguments)
    for argument in arguments:
        if argument not in known:
            raise ArgumentError.unknown(argument, argument, parameters, "unknown argument: ")
    for argument, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in VARIABLE
        if needed and argument not in arguments:
            raise ArgumentError(argument, detail="expected a value, got none")


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    parameters = _signature(_maker(name))
    parameters.pop("rngs", None)
    return parameters


def _maker(name: str) -> Callable[..., nnx.Module]:
    return FAMILIES[name] if name in FAMILIES else OWN[name]


def _signature(maker: Callable[..., nnx.Module]) -> dict[str, inspect.Parameter]:
    """The parameters of a function or class; none of what does not tell them."""
    try:
        found = inspect.signature(maker.__init__ if inspect.isclass(maker) else maker).parameters
    except (TypeError, ValueError):  # nothing that is called, or a builtin
        return {}
    return dict(list(found.items())[inspect.isclass(maker) :])


def _dtype(given: Any) -> jnp.dtype:
    try:
        dtype = jnp.dtype(given)
    except Exception:  # whatever NumPy raises for what is none
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ArgumentError("dtype", "a name such as 'bfloat16'", shown(given))
    return dtype
