"""Reads networks of PyTorch: of the paper's code, and ResNets of torchvision.

python -m dhp_jax.import_torch net.pt --family=resnet depth=56 --out=resnet56/
python -m dhp_jax.import_torch net.pt --family=unet --input-shape=128,128,1
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
import json
import math
from pathlib import Path
import sys
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from dhp_jax import cli
from dhp_jax.artifact.description import check_notes
from dhp_jax.artifact.writing import may_hold, save
from dhp_jax.core.convolutions import Hyper, HyperConvTranspose
from dhp_jax.core.latent import Latent, Repeat, latents, modules_by_path
from dhp_jax.core.layers import ChannelBias
from dhp_jax.core.state import path_name
from dhp_jax.core.surgery import prune
from dhp_jax.errors import ArgumentError, FieldError, first_line, shown
from dhp_jax.models import registry
from dhp_jax.models.released import RELEASED, Row

Tensors = Mapping[str, Float[np.ndarray, "..."]]  # of a file, by their names


class TensorError(FieldError):
    """A tensor of a file that is missing, left over, or not what the network needs."""


class Array(NamedTuple):
    """An array of a layer: its name in PyTorch, and the order of PyTorch's axes in ours."""

    tensor: str
    axes: tuple[int, ...] = (0,)


_BIAS = {"bias": Array("bias")}
ARRAYS: Mapping[type[nnx.Module], Mapping[str, Array]] = {
    Hyper: {
        "b0": Array("bias0", (0, 1)),
        "w1": Array("weight1", (2, 0, 1)),
        "b1": Array("bias1", (2, 0, 1)),
        "w2": Array("weight2", (2, 3, 0, 1)),  # all taps of a kernel are one axis
        "b2": Array("bias2", (2, 0, 1)),
        **_BIAS,
    },
    nnx.Conv: {"kernel": Array("weight", (2, 3, 1, 0)), **_BIAS},
    nnx.ConvTranspose: {"kernel": Array("weight", (2, 3, 0, 1)), **_BIAS},
    nnx.Linear: {"kernel": Array("weight", (1, 0)), **_BIAS},
    nnx.BatchNorm: {
        "scale": Array("weight"),
        "bias": Array("bias"),
        "mean": Array("running_mean"),
        "var": Array("running_var"),
    },
    nnx.PReLU: {"negative_slope": Array("weight")},
    ChannelBias: _BIAS,
    Latent: {"vector": Array("latent_vector")},
}


def network_of(family: str, tensors: Tensors, **arguments: Any) -> nnx.Module:
    """The network of a checkpoint of PyTorch.

    Three kinds are known, by the names of their tensors: an ordinary network, one with
    hypernetworks, and what pruning one has left. The last two are those of the paper's code. Which
    channels were pruned is in no file, so the survivors that are noted are the first ones.

    Args:
      family: one of `RELEASED`.
      tensors: of the checkpoint, by name.
      **arguments: of `dhp.models.build`, those of the unpruned network.

    Returns:
      An ordinary network, or one of latents, in evaluation mode.

    Raises:
      TensorError: a `ValueError`; a tensor is missing, left over or of another shape.
      ValueError: an unknown family or argument, or a network that the family cannot be.

    Example:
      >>> small = dhp_jax.import_torch.network_of("resnet", tensors, depth=56)
    """
    if family not in RELEASED:
        raise ArgumentError.unknown("family", family, RELEASED)
    released = RELEASED[family]
    whole = registry.build_abstract(family, **arguments)
    name = next(released.rows(whole)).dhp  # of the first layer
    searched = f"{name}.weight1" in tensors
    dhp = searched or f"{name}.weight" in tensors
    if searched and released.unlike:
        why = f"expected a pruned {family}, got a search network: {released.unlike}"
        raise ArgumentError("family", detail=why)
    own = released.dhp if dhp else released.unpruned
    if own.keys() - arguments.keys():
        whole = registry.build_abstract(family, **{**own, **arguments})
    rows = list(released.rows(whole))
    names = list(_modules(whole, rows, dhp))
    if searched:
        model = whole
        names += _latents(whole, names, released.image)
    else:
        masks = _first_channels(whole, names, tensors)
        model = nnx.merge(*nnx.eval_shape(lambda net: nnx.split(prune(net, masks)), whole))
    _fill(model, names, tensors)
    model.eval()
    return model


def _modules(model: nnx.Module, rows: list[Row], dhp: bool) -> Iterator[tuple[str, str]]:
    """Paths of modules that hold arrays, each with the name in PyTorch."""
    at = modules_by_path(model)
    for row in rows:
        name = row.dhp if dhp else row.unpruned
        if f"{row.path}.conv" not in at:
            yield row.path, name
            continue
        yield f"{row.path}.conv", name
        if f"{row.path}.bias" in at:
            yield f"{row.path}.bias", name
        yield f"{row.path}.norm", f"{name}.bn_main" if dhp else row.norm


def _latents(
    model: nnx.Module, names: list[tuple[str, str]], image: str
) -> Iterator[tuple[str, str]]:
    """Paths of latents; the name of each, without the last part, is that of a convolution."""
    at = modules_by_path(model)
    paths = {id(module): path for path, module in at.items()}
    yield paths[id(at["image"])], image
    for path, name in names:
        layer = at[path]
        if isinstance(layer, Hyper) and not isinstance(layer.z_out, Repeat):
            yield paths[id(getattr(layer, "z_group", layer.z_out))], name


def _first_channels(
    model: nnx.Module, names: list[tuple[str, str]], tensors: Tensors
) -> dict[str, np.ndarray]:
    """Masks that keep as many entries of each latent as convolutions of the file have outputs."""
    at = modules_by_path(model)
    found = {id(z): name for name, z in latents(model).items()}
    masks: dict[str, np.ndarray] = {}
    for path, name in names:
        layer = at[path]
        if not isinstance(layer, Hyper) or hasattr(layer, "z_group"):
            continue
        weight = _tensor(tensors, f"{name}.weight")
        outputs = weight.shape[isinstance(layer, HyperConvTranspose)] if weight.ndim == 4 else 0
        axis, times = layer.z_out, 1
        if isinstance(axis, Repeat):
            axis, times = axis.base, axis.times
        if not (1 <= outputs <= axis.size * times and outputs % times == 0) or (
            not axis.prunable and outputs != axis.size * times
        ):
            most = f"{'up to ' * axis.prunable}{axis.size * times} output channels"
            raise TensorError(f"{name}.weight", most, f"shape {weight.shape}")
        masks.setdefault(found[id(axis)], np.arange(axis.size) < outputs // times)
    rest = {name: np.ones(z.size, bool) for name, z in latents(model).items()}
    return rest | masks  # of the image, and of the channels of a group


def _fill(model: nnx.Module, names: list[tuple[str, str]], tensors: Tensors) -> None:
    """Sets the arrays of an abstract network, in place.

    Raises:
      TensorError: tensors are not just those that the network needs.
    """
    at = modules_by_path(model)
    firsts: dict[tuple[str, str], str] = {}  # the tensor that each array was first set from
    unused = set(tensors)
    for path, name in names:
        layer = at[path]
        arrays = next(arrays for kind, arrays in ARRAYS.items() if isinstance(layer, kind))
        turned = isinstance(layer, nnx.ConvTranspose | HyperConvTranspose)
        for attribute, array in arrays.items():
            variable = getattr(layer, attribute)
            if variable is None:
                continue
            of_image = isinstance(layer, Latent) and path == "image"
            key = name if of_image else f"{name}.{array.tensor}"
            values = _converted(key, _tensor(tensors, key), variable.shape, array.axes, turned)
            first = firsts.setdefault((path, attribute), key)
            if first != key and not np.array_equal(np.asarray(variable[...]), values):
                raise TensorError(key, f"the numbers of {first}, with which it is one", "others")
            unused.discard(key)
            variable.set_value(jnp.asarray(values))
    ignored = ("num_batches_tracked", "latent_vector")
    for key in sorted(unused):
        if not any(part in key for part in ignored):
            raise TensorError(key, f"no such tensor in this {type(model).__name__}", "one")
    for location, leaf in nnx.to_flat_state(nnx.state(model)):
        if isinstance(leaf.get_value(), jax.ShapeDtypeStruct):
            raise TensorError(path_name(location), "a tensor for this array", "none")


def _converted(
    key: str, tensor: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...], turned: bool
) -> np.ndarray:
    """A tensor, of the name `key`, in our order of axes, with the shape of our array.

    Where it is turned, the kernel is so by 180 degrees: PyTorch's transposed convolutions scatter,
    and ours gather.
    """
    taps = len(shape) - len(axes)  # more axes than PyTorch has: it has one for all taps
    merged = (math.prod(shape[: taps + 1]), *shape[taps + 1 :]) if shape else (1,)
    expected = tuple(merged[axes.index(axis)] for axis in range(len(axes)))
    if tensor.shape != expected:
        raise TensorError(key, f"shape {expected}", f"shape {tensor.shape}")
    values = np.asarray(tensor, np.float32).transpose(axes).reshape(shape)
    return values[::-1, ::-1] if turned and len(shape) >= 4 else values


def _tensor(tensors: Tensors, key: str) -> np.ndarray:
    if key not in tensors:
        there = ", ".join(sorted(tensors)[:3])
        raise TensorError(key, "a tensor of this name", f"{len(tensors)} others, such as {there}")
    return np.asarray(tensors[key])


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file that `torch.save` wrote, by name; nothing in it is run.

    Raises:
      ValueError: PyTorch is not installed, or cannot read tensors from the file.
    """
    try:
        import torch
    except ImportError:
        raise ValueError('torch is not installed; run: pip install "dhp_jax[torch]"') from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever its readers raise for other files
        why = first_line(error)
        raise ValueError(f"{path}: expected tensors that torch.save wrote; got {why}") from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    try:
        return {name.removeprefix("module."): t.float().numpy() for name, t in found.items()}
    except AttributeError:
        what = type(found).__name__
        raise ValueError(f"{path}: expected a state_dict, tensors by name; got a {what}") from None


def main(arguments: Sequence[str]) -> None:
    """Parses the arguments, saves the network and tells what it is."""
    parser = cli.Parser(prog="python -m dhp_jax.import_torch", description=__doc__)
    parser.add_argument("file", type=Path, help="that torch.save wrote")
    parser.add_argument("arguments", nargs="*", help="of the family, such as depth=56")
    families = f"one of {', '.join(RELEASED)}"
    parser.add_argument("--family", choices=RELEASED, required=True, metavar="NAME", help=families)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="named as the file by default")
    parser.add_argument(
        "--input-shape", type=cli.shape_of, metavar="H,W,C", help="128,128,3: notes FLOPs too"
    )
    parser.add_argument(
        "--mean",
        type=cli.numbers_of,
        metavar="R,G,B",
        help="of a classifier's pixels: 125.3,123,113.9",
    )
    parser.add_argument(
        "--std",
        type=cli.numbers_of,
        metavar="R,G,B",
        help="of them: 63,62.1,66.7; predict needs both",
    )
    parser.add_argument(
        "--peak", type=float, metavar="P", help="their largest value, as 1; 255 by default"
    )
    options = parser.parse_intermixed_args(arguments)
    out = options.out or options.file.with_suffix("")
    if not may_hold(out):
        raise ValueError(f"--out: expected no or an empty folder, or a saved network; got {out}")
    given = dict(map(_argument, options.arguments))
    noted = _noted(options)
    model = network_of(options.family, read(options.file), **given)
    save(out, model, input_shape=options.input_shape, **noted)
    kind = f"a search network of {len(latents(model))} latents" if latents(model) else "a network"
    print(f"{out}: {kind} of the family {options.family}")


def _noted(options: Namespace) -> dict[str, Any]:
    """What is saved with the network."""
    noted: dict[str, Any] = {"imported_from": options.file.name}
    mean, std = options.mean, options.std
    if mean is None and std is None:
        return noted
    if mean is None or std is None:
        raise ValueError("--mean, --std: expected both or none; got one of them")
    channels = options.input_shape[-1] if options.input_shape else len(mean)
    for name, values, least in (("mean", mean, -math.inf), ("std", std, 0)):
        if len(values) != channels or min(values) <= least:
            what = f"{channels} {'positive ' * (name == 'std')}numbers, one for each channel"
            raise ValueError(f"--{name}: expected {what}; got {shown(values)}")
    noted |= {"mean": list(mean), "std": list(std)}
    if options.peak is not None:
        noted["peak"] = options.peak
    check_notes(noted)
    return noted


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"arguments: expected name=value, such as depth=56; got {shown(text)}")
    try:
        return name, json.loads(value.lower())
    except ValueError:
        return name, value


if __name__ == "__main__":
    sys.exit(cli.run(main))
