"""What the paper's code and torchvision call the layers of our families."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from flax import nnx


class Row(NamedTuple):
    """A layer of ours, with its BatchNorm if it has one, and what released networks call it.

    Attributes:
      path: of the layer in our network.
      dhp: its name in a network with hypernetworks, and in what they leave.
      unpruned: its name in an ordinary network.
      norm: name of its BatchNorm in an ordinary network.
    """

    path: str
    dhp: str
    unpruned: str
    norm: str = ""


class Released(NamedTuple):
    """How the released code writes a family.

    Attributes:
      rows: the layers of one of our networks.
      image: name of the latent of the image; "" if there is no search network of the family.
      dhp: arguments of our family that make it the network that was searched and pruned.
      unpruned: the same of the ordinary network.
      unlike: why a search network cannot be read, if it computes something else.
    """

    rows: Callable[[nnx.Module], Iterator[Row]]
    image: str
    dhp: Mapping[str, Any] = {}
    unpruned: Mapping[str, Any] = {}
    unlike: str = ""


def _resnet(model: Any) -> Iterator[Row]:
    torchvision = model.max_pool
    if torchvision:
        yield Row("stem", "", "conv1", "bn1")
    else:
        yield Row("stem", "features.0", "features.0.0", "features.0.1")
    place, last = 0, None
    for n, block in enumerate(model.blocks):
        z_stage = block.layers[-1].conv.z_out
        place, last = (place + 1 if z_stage is last else 0), z_stage
        stage = 1 + next(s for s, z in enumerate(model.stages) if z is z_stage)
        dhp = f"features.{n + 1}"
        whole = f"layer{stage}.{place}" if torchvision else f"features.{stage}.{place}"
        for j in range(len(block.layers)):
            conv, norm = f"body.{3 * j}", f"body.{3 * j + 1}"
            if torchvision:
                conv, norm = f"conv{j + 1}", f"bn{j + 1}"
            path = f"blocks.{n}.layers.{j}"
            yield Row(path, f"{dhp}.layer{j + 1}", f"{whole}.{conv}", f"{whole}.{norm}")
        if block.projection is not None:
            names = (f"{whole}.downsample.{j}" for j in range(2))
            yield Row(f"blocks.{n}.projection", f"{dhp}.downsample", *names)
    yield Row("classifier", "classifier", "fc" if torchvision else "classifier")


def _vgg(model: Any) -> Iterator[Row]:
    place = 0
    for s, stage in enumerate(model.stages):
        for i in range(len(stage)):
            yield Row(f"stages.{s}.{i}", "", f"features.{place}.0", f"features.{place}.1")
            place += 1
        place += 1  # the max pool
    yield Row("classifier", "", "classifier")


def _mobilenet_v1(model: Any) -> Iterator[Row]:
    yield Row("stem", "features.0", "features.0.0", "features.0.1")
    for n in range(len(model.layers)):
        block, part = divmod(n, 2)
        dhp, whole = f"features.{block + 1}.layer{part + 1}", f"features.{block + 1}.conv.{part}"
        yield Row(f"layers.{n}", dhp, f"{whole}.0", f"{whole}.1")
    yield Row("classifier", "linear.1", "linear.1")


def _mobilenet_v2(model: Any) -> Iterator[Row]:
    yield Row("stem", "features.0", "features.0.0", "features.0.1")
    for n, block in enumerate(model.layers):
        name, path = f"features.{n + 1}", f"layers.{n}"
        if n == len(model.layers) - 1:
            yield Row(path, name, f"{name}.0", f"{name}.1")
            break
        last = len(block.layers) - 1
        for j in range(last):
            whole = f"{name}.conv.{j}"
            yield Row(f"{path}.layers.{j}", f"{name}.layers.{j}", f"{whole}.0", f"{whole}.1")
        names = f"{name}.conv.{last}", f"{name}.conv.{last + 1}"
        yield Row(f"{path}.layers.{last}", f"{name}.layers.{last}", *names)
    yield Row("classifier", "classifier.1", "classifier.1")


def _srresnet(model: Any) -> Iterator[Row]:
    yield Row("head", "head", "head.0")
    yield Row("activation", "head.relu", "head.1")
    for i in range(len(model.blocks)):
        name, path = f"body.{i}", f"blocks.{i}"
        yield Row(f"{path}.first", f"{name}.layer1", f"{name}.body.0", f"{name}.body.1")
        yield Row(f"{path}.activation", f"{name}.layer1.relu", f"{name}.body.2")
        yield Row(f"{path}.second", f"{name}.layer2", f"{name}.body.3", f"{name}.body.4")
    last = len(model.blocks)
    yield Row("last", f"body.{last}", f"body.{last}", f"body.{last + 1}")
    for s in range(len(model.upsampler.convs)):
        yield Row(f"upsampler.convs.{s}", f"tail.0.upsampler{s + 1}", f"tail.0.{3 * s}")
        yield Row("upsampler.activation", f"tail.0.relu{s + 1}", f"tail.0.{3 * s + 2}")
    yield Row("tail", "tail.1", "tail.1")


def _edsr(model: Any) -> Iterator[Row]:
    yield Row("head", "head", "head.0")
    yield Row("center", "sub_mean", "sub_mean")
    yield Row("restore", "add_mean", "add_mean")
    for i in range(len(model.blocks)):
        yield Row(f"blocks.{i}.first", f"body.{i}.layer1", f"body.{i}.body.0")
        yield Row(f"blocks.{i}.second", f"body.{i}.layer2", f"body.{i}.body.2")
    last = f"body.{len(model.blocks)}"
    yield Row("last", last, last)
    yield Row("bias", last, last)
    for s in range(len(model.upsampler.convs)):
        yield Row(f"upsampler.convs.{s}", f"tail.0.upsampler{s + 1}", f"tail.0.{2 * s}")
    yield Row("tail", "tail.1", "tail.1")


def _dncnn(model: Any) -> Iterator[Row]:
    yield Row("head", "head", "head.0")
    for i in range(len(model.middle)):
        yield Row(f"middle.{i}", f"body.{i}", f"body.{i}.body.0", f"body.{i}.body.1")
    yield Row("tail", "tail", "tail.0")


def _unet(model: Any) -> Iterator[Row]:
    def double(path: str, name: str) -> Iterator[Row]:
        for part, number in (("first", 1), ("second", 2)):
            yield Row(f"{path}.{part}", f"{name}.conv{number}", f"{name}.conv{number}")

    for i in range(len(model.down)):
        yield from double(f"down.{i}", f"down_convs.{i}")
    for i in range(len(model.up)):
        yield Row(f"up.{i}.up", f"up_convs.{i}.upconv", f"up_convs.{i}.upconv")
        yield from double(f"up.{i}.convs", f"up_convs.{i}")
    yield Row("tail", "conv_final", "conv_final")


_RELU6 = {"relu6": True}
RELEASED: Mapping[str, Released] = {
    "resnet": Released(_resnet, "latent_vector_stage0"),
    "vgg": Released(_vgg, ""),
    "mobilenet_v1": Released(_mobilenet_v1, "latent_vector_stage0", unpruned=_RELU6),
    "mobilenet_v2": Released(_mobilenet_v2, "latent_vectors.0", unpruned=_RELU6),
    "srresnet": Released(_srresnet, "latent_vector_stage0"),
    "edsr": Released(
        _edsr,
        "latent_vector_stage0",
        unlike="all of its blocks read the head's output, and here each reads the one before",
    ),
    "dncnn": Released(_dncnn, "latent_vector", dhp={"head_activation": False}),
    "unet": Released(_unet, "latent_vector"),
}
