"""Outputs in float64 by PyTorch of small networks with the names that the paper's code gives them.

Tests of `dhp_jax.import_torch` compare those of the networks that it makes with them. Nothing of
the library is imported. Names of tensors follow from the structure of modules. Values follow from
names and shapes, so that the fixture holds shapes and outputs only.

    python benchmarks/released.py --out=tests/fixtures/released.json
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import itertools
import json
import math
from pathlib import Path
import zlib

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

EMBEDDING, CLASSES, BATCH = 8, 5, 2


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of a tensor, which follow from its name and shape alone."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    last = name.rpartition(".")[2]
    if last == "running_var" or (last == "weight" and len(shape) == 1):
        return 0.6 + 0.3 * drawn
    fan_in = {"weight": math.prod(shape[1:]), "weight2": shape[0] * math.prod(shape[2:])}
    if last in fan_in:
        return math.sqrt(3 / fan_in[last]) * drawn
    return drawn if "latent_vector" in last or last == "weight1" else 0.2 * drawn


# Networks with hypernetworks, and what pruning leaves of them

Latents = tuple[nn.Parameter, ...]


class Mode:
    """Whether layers have hypernetworks, and how many channels each latent has lost."""

    pruned = False
    made = 0


def latent(size: int, prunable: bool = True) -> nn.Parameter:
    Mode.made += 1
    lost = Mode.made % 3 if Mode.pruned and prunable else 0
    return nn.Parameter(torch.zeros(max(1, size - lost)))


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class Layer(nn.Module):
    """A convolution from latents to a latent, then BatchNorm and an activation."""

    def __init__(
        self,
        ins: Latents,
        out: nn.Parameter,
        size: int,
        stride: int = 1,
        *,
        bias: bool = False,
        norm: bool = True,
        act: nn.Module | None = None,
        depthwise: bool = False,
        up: bool = False,
        repeats: int = 1,
    ):
        super().__init__()
        width = len(out) * repeats
        rows = 1 if depthwise else sum(map(len, ins))
        self.ins, self.outs = ins, (out,)  # tuples, which modules do not register
        self.size, self.stride, self.up, self.repeats = size, stride, up, repeats
        self.groups = width if depthwise else 1
        if Mode.pruned:
            self.weight = zeros(*((rows, width) if up else (width, rows)), size, size)
        else:
            if repeats == 1:
                self.latent_vector = zeros(1) if depthwise else out
            self.weight1, self.bias1 = (zeros(rows, width, EMBEDDING) for _ in range(2))
            self.weight2 = zeros(rows, width, size**2, EMBEDDING)
            self.bias0, self.bias2 = zeros(rows, width), zeros(rows, width, size**2)
        self.bias = zeros(width) if bias else None
        self.bn_main = nn.BatchNorm2d(width) if norm else None
        self.relu = act

    def kernel(self) -> Tensor:
        if hasattr(self, "weight"):
            return self.weight
        out = self.outs[0].repeat_interleave(self.repeats)
        ins = torch.cat(self.ins) if self.groups == 1 else self.latent_vector
        embedded = (torch.outer(ins, out) + self.bias0)[..., None] * self.weight1 + self.bias1
        kernel = torch.einsum("iokm,iom->iok", self.weight2, embedded) + self.bias2
        kernel = kernel.unflatten(2, (self.size, self.size))
        return kernel if self.up else kernel.transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = functional.conv_transpose2d(x, self.kernel(), self.bias, self.stride)
        else:
            options = self.stride, self.size // 2, 1, self.groups
            x = functional.conv2d(x, self.kernel(), self.bias, *options)
        x = x if self.bn_main is None else self.bn_main(x)
        return x if self.relu is None else self.relu(x)


class ResBlockDHP(nn.Module):
    """A residual block through axes, with convolutions of some sizes."""

    def __init__(self, axes: list[nn.Parameter], sizes: tuple[int, ...], stride: int):
        super().__init__()
        strided = sizes.index(3)
        for n, ((a, b), size) in enumerate(zip(itertools.pairwise(axes), sizes, strict=True)):
            act = None if n + 1 == len(sizes) else nn.ReLU()
            layer = Layer((a,), b, size, stride if n == strided else 1, act=act)
            setattr(self, f"layer{n + 1}", layer)
        same = stride == 1 and axes[0] is axes[-1]
        self.downsample = None if same else Layer((axes[0],), axes[-1], 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for name, layer in self.named_children():
            if name.startswith("layer"):
                x = layer(x)
        return torch.relu(x + shortcut)


class ResNetDHP(nn.Module):
    """A CIFAR ResNet; bottleneck blocks have an expansion."""

    def __init__(self, width: int, counts: tuple[int, ...], expansion: int = 1):
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.latent_vector_stage0 = latent(3, prunable=False)
        stages = [latent(w * expansion, w != widths[-1]) for w in widths]
        for n, z in enumerate(stages):
            setattr(self, f"latent_vector_stage{n + 1}", z)
        z = stages[0] if expansion == 1 else latent(width)
        sizes = (3, 3) if expansion == 1 else (1, 3, 1)
        self.features = nn.ModuleList([Layer((self.latent_vector_stage0,), z, 3, act=nn.ReLU())])
        for n, (w, z_stage, count) in enumerate(zip(widths, stages, counts, strict=True)):
            for i in range(count):
                axes = [z, *(latent(w) for _ in sizes[1:]), z_stage]
                self.features.append(ResBlockDHP(axes, sizes, 2 if n > 0 and i == 0 else 1))
                z = z_stage
        self.classifier = nn.Linear(len(z), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.features:
            x = layer(x)
        return self.classifier(x.mean((2, 3)))


class SeparableDHP(nn.Module):
    """A depthwise convolution and a 1x1 one."""

    def __init__(self, z_in: nn.Parameter, z_out: nn.Parameter, stride: int):
        super().__init__()
        self.layer1 = Layer((z_in,), z_in, 3, stride, depthwise=True, act=nn.ReLU())
        self.layer2 = Layer((z_in,), z_out, 1, act=nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(x))


# Fewer blocks than there are: channels and stride; expansion, channels, blocks and stride.
V1 = [(64, 1), (128, 2), (128, 1), (256, 2), (1024, 1)]
V2 = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2)]
NARROW = 8  # MobileNets have an eighth of their channels


class MobileNetV1DHP(nn.Module):
    """A MobileNetV1 of fewer blocks."""

    def __init__(self):
        super().__init__()
        self.latent_vector_stage0 = latent(3, prunable=False)
        z = latent(32 // NARROW)
        stem = Layer((self.latent_vector_stage0,), z, 3, 2, act=nn.ReLU())
        self.features = nn.ModuleList([stem])
        for width, stride in V1:
            z_out = latent(width // NARROW)
            self.features.append(SeparableDHP(z, z_out, stride))
            z = z_out
        self.linear = nn.Sequential(nn.Dropout(0.2), nn.Linear(len(z), CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.features:
            x = layer(x)
        return self.linear(x.mean((2, 3)))


class InvertedDHP(nn.Module):
    """The block of MobileNetV2."""

    def __init__(self, z: nn.Parameter, hidden: nn.Parameter, z_out: nn.Parameter, stride: int):
        super().__init__()
        layers = [] if hidden is z else [Layer((z,), hidden, 1, act=nn.ReLU())]
        layers.append(Layer((hidden,), hidden, 3, stride, depthwise=True, act=nn.ReLU()))
        self.layers = nn.ModuleList([*layers, Layer((hidden,), z_out, 1)])
        self.same = stride == 1 and z is z_out

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        return x + y if self.same else y


class MobileNetV2DHP(nn.Module):
    """A MobileNetV2 of fewer blocks."""

    def __init__(self):
        super().__init__()
        outs = [latent(width // NARROW) for _, width, _, _ in V2]
        image, z = latent(3, prunable=False), latent(32 // NARROW)
        self.latent_vectors = nn.ParameterList([image, *outs])
        self.features = nn.ModuleList([Layer((image,), z, 3, 2, act=nn.ReLU())])
        width = 32 // NARROW  # before pruning
        for (expansion, wide, count, first), z_out in zip(V2, outs, strict=True):
            for i in range(count):
                hidden = z if expansion == 1 else latent(expansion * width)
                self.features.append(InvertedDHP(z, hidden, z_out, first if i == 0 else 1))
                z, width = z_out, wide // NARROW
        last = latent(1280 // NARROW)
        self.features.append(Layer((z,), last, 1, act=nn.ReLU()))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(len(last), CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.features:
            x = layer(x)
        return self.classifier(x.mean((2, 3)))


class RestoreBlockDHP(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, z: nn.Parameter, norm: bool, act: nn.Module):
        super().__init__()
        hidden = latent(8)
        self.layer1 = Layer((z,), hidden, 3, bias=True, norm=norm, act=act)
        self.layer2 = Layer((hidden,), z, 3, bias=True, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer2(self.layer1(x))


class UpsamplerDHP(nn.Module):
    """Twice a convolution, a pixel shuffle and, if there is one, an activation."""

    def __init__(self, z: nn.Parameter, act: nn.Module | None):
        super().__init__()
        for n in (1, 2):
            layer = Layer((z,), z, 3, bias=True, norm=False, repeats=4)
            setattr(self, f"upsampler{n}", layer)
            if act is not None:
                setattr(self, f"relu{n}", act)

    def forward(self, x: Tensor) -> Tensor:
        for n in (1, 2):
            x = functional.pixel_shuffle(getattr(self, f"upsampler{n}")(x), 2)
            x = getattr(self, f"relu{n}", nn.Identity())(x)
        return x


class SuperDHP(nn.Module):
    """SRResNet, or EDSR as it computes after pruning."""

    def __init__(self, edsr: bool):
        super().__init__()
        self.latent_vector_stage0 = latent(3, prunable=False)
        self.latent_vector_stage1 = z = latent(8)
        act = nn.ReLU if edsr else nn.PReLU
        if edsr:
            self.sub_mean = nn.Conv2d(3, 3, 1)
        self.head = Layer(
            (self.latent_vector_stage0,), z, 3 if edsr else 9,
            bias=True, norm=False, act=None if edsr else act(),
        )  # fmt: skip
        self.body = nn.ModuleList(RestoreBlockDHP(z, not edsr, act()) for _ in range(2))
        self.body.append(Layer((z,), z, 3, bias=True, norm=not edsr))
        tail = Layer((z,), latent(3, prunable=False), 3, bias=True, norm=False)
        self.tail = nn.ModuleList([UpsamplerDHP(z, None if edsr else act()), tail])
        if edsr:
            self.add_mean = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        shallow = x = self.head(getattr(self, "sub_mean", nn.Identity())(x))
        for layer in self.body:
            x = layer(x)
        x = self.tail[1](self.tail[0](x + shallow))
        return getattr(self, "add_mean", nn.Identity())(x)


class DnCNNDHP(nn.Module):
    """A DnCNN of four convolutions, without activation behind the first."""

    def __init__(self):
        super().__init__()
        self.latent_vector = latent(1, prunable=False)
        axes = [latent(6) for _ in range(3)]
        self.head = Layer((self.latent_vector,), axes[0], 3, bias=True, norm=False)
        self.body = nn.ModuleList(
            Layer((a,), b, 3, bias=True, act=nn.ReLU()) for a, b in itertools.pairwise(axes)
        )
        out = latent(1, prunable=False)
        self.tail = Layer((axes[-1],), out, 3, bias=True, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        for layer in self.body:
            y = layer(y)
        return x + self.tail(y)


class PairDHP(nn.Module):
    """Two convolutions, behind an up-convolution if it has an input."""

    def __init__(self, ins: Latents, width: int, up_from: nn.Parameter | None = None):
        super().__init__()
        options = {"bias": True, "norm": False}
        if up_from is not None:
            z_up = latent(width)
            self.upconv = Layer((up_from,), z_up, 2, 2, up=True, **options)
            ins = (z_up, *ins)
        hidden, out = latent(width), latent(width)
        self.conv1 = Layer(ins, hidden, 3, act=nn.ReLU(), **options)
        self.conv2 = Layer((hidden,), out, 3, act=nn.ReLU(), **options)
        self.out = (out,)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x if skip is None else torch.cat([self.upconv(x), skip], 1)
        return self.conv2(self.conv1(x))


class UNetDHP(nn.Module):
    """A U-Net of three resolutions."""

    def __init__(self, widths: tuple[int, ...] = (4, 8, 16)):
        super().__init__()
        self.latent_vector = z = latent(1, prunable=False)
        self.down_convs, self.up_convs = nn.ModuleList(), nn.ModuleList()
        for width in widths:
            self.down_convs.append(PairDHP((z,), width))
            (z,) = self.down_convs[-1].out
        for width, level in list(zip(widths, self.down_convs, strict=True))[-2::-1]:
            self.up_convs.append(PairDHP(level.out, width, up_from=z))
            (z,) = self.up_convs[-1].out
        self.conv_final = Layer((z,), latent(1, prunable=False), 1, bias=True, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        return run_unet(self, x)


def run_unet(net: nn.Module, x: Tensor) -> Tensor:
    skips = []
    for level in net.down_convs:
        x = level(functional.max_pool2d(x, 2) if skips else x)
        skips.append(x)
    for level, skip in zip(net.up_convs, skips[-2::-1], strict=True):
        x = level(x, skip)
    return net.conv_final(x)


# Ordinary networks


class Residual(nn.Module):
    """A block with its layers in `body`."""

    def __init__(self, *layers: nn.Module, downsample: nn.Module | None = None, act: bool = False):
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.downsample, self.act = downsample, act

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.body(x) + shortcut
        return torch.relu(x) if self.act else x


def conv_norm(a: int, b: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(a, b, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(b)]


class Classifier(nn.Module):
    """Features, a mean over pixels, and a linear layer of a given name."""

    def __init__(self, *features: nn.Module, width: int, name: str, dropout: bool = False):
        super().__init__()
        self.features, self.name = nn.Sequential(*features), name
        linear = nn.Linear(width, CLASSES)
        setattr(self, name, nn.Sequential(nn.Dropout(0.2), linear) if dropout else linear)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(self.features(x).mean((2, 3)))


def resnet(width: int) -> nn.Module:
    features, a = [nn.Sequential(*conv_norm(3, width, 3), nn.ReLU())], width
    for n in range(3):
        b, stride = width * 2**n, 2 if n else 1
        layers = [*conv_norm(a, b, 3, stride), nn.ReLU(), *conv_norm(b, b, 3)]
        down = nn.Sequential(*conv_norm(a, b, 1, stride)) if n else None
        features.append(nn.Sequential(Residual(*layers, downsample=down, act=True)))
        a = b
    return Classifier(*features, width=a, name="classifier")


class Torchvision(nn.Module):
    """A block of torchvision's ResNets; the whole network with `blocks`."""

    def __init__(self, a: int, hidden: int, b: int, sizes: tuple[int, ...], stride: int):
        super().__init__()
        axes, strided = [a, *[hidden] * (len(sizes) - 1), b], sizes.index(3)
        for n, ((c, d), size) in enumerate(zip(itertools.pairwise(axes), sizes, strict=True)):
            conv, norm = conv_norm(c, d, size, stride if n == strided else 1)
            setattr(self, f"conv{n + 1}", conv)
            setattr(self, f"bn{n + 1}", norm)
        same = stride == 1 and a == b
        self.downsample = None if same else nn.Sequential(*conv_norm(a, b, 1, stride))
        self.count = len(sizes)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for n in range(1, self.count + 1):
            x = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(x))
            x = torch.relu(x) if n < self.count else x
        return torch.relu(x + shortcut)


class TorchvisionResNet(nn.Module):
    """A ResNet for ImageNet, as torchvision has it."""

    def __init__(self, width: int, counts: tuple[int, ...], expansion: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        a, sizes = width, (3, 3) if expansion == 1 else (1, 3, 1)
        for n, count in enumerate(counts):
            hidden, stage = width * 2**n, nn.Sequential()
            for i in range(count):
                stride = 2 if n and i == 0 else 1
                stage.append(Torchvision(a, hidden, hidden * expansion, sizes, stride))
                a = hidden * expansion
            setattr(self, f"layer{n + 1}", stage)
        self.fc = nn.Linear(a, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for n in range(1, 5):
            x = getattr(self, f"layer{n}")(x)
        return self.fc(x.mean((2, 3)))


def vgg() -> nn.Module:
    features, a = [], 3
    for width in (8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"):
        if width == "M":
            features.append(nn.MaxPool2d(2))
            continue
        features.append(nn.Sequential(*conv_norm(a, width, 3), nn.ReLU()))
        a = width
    return Classifier(*features, width=a, name="classifier")


def relu6(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.ReLU6())


class Convs(nn.Module):
    """Layers in `conv`, added to their input if `same`."""

    def __init__(self, *layers: nn.Module, same: bool = False):
        super().__init__()
        self.conv, self.same = nn.Sequential(*layers), same

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.same else self.conv(x)


def mobilenet_v1() -> nn.Module:
    a = 32 // NARROW
    features = [relu6(*conv_norm(3, a, 3, 2))]
    for width, stride in V1:
        b = width // NARROW
        depthwise = relu6(*conv_norm(a, a, 3, stride, groups=a))
        features.append(Convs(depthwise, relu6(*conv_norm(a, b, 1))))
        a = b
    return Classifier(*features, width=a, name="linear", dropout=True)


def mobilenet_v2() -> nn.Module:
    a = 32 // NARROW
    features = [relu6(*conv_norm(3, a, 3, 2))]
    for expansion, width, count, first in V2:
        for i in range(count):
            b, hidden, stride = width // NARROW, a * expansion, first if i == 0 else 1
            layers = [] if expansion == 1 else [relu6(*conv_norm(a, hidden, 1))]
            layers.append(relu6(*conv_norm(hidden, hidden, 3, stride, groups=hidden)))
            features.append(Convs(*layers, *conv_norm(hidden, b, 1), same=i > 0))
            a = b
    features.append(relu6(*conv_norm(a, 1280 // NARROW, 1)))
    return Classifier(*features, width=1280 // NARROW, name="classifier", dropout=True)


class Super(nn.Module):
    """SRResNet or EDSR."""

    def __init__(self, edsr: bool):
        super().__init__()
        conv = lambda a, b, size=3: nn.Conv2d(a, b, size, padding=size // 2)  # noqa: E731
        norm = [] if edsr else [nn.BatchNorm2d(8)]
        act = nn.ReLU if edsr else nn.PReLU

        def block() -> nn.Module:
            norms = [] if edsr else [nn.BatchNorm2d(8)], [] if edsr else [nn.BatchNorm2d(8)]
            return Residual(conv(8, 8), *norms[0], act(), conv(8, 8), *norms[1])

        slope = nn.PReLU()  # of both stages
        if edsr:
            self.sub_mean = nn.Conv2d(3, 3, 1)
        self.head = nn.Sequential(conv(3, 8, 3 if edsr else 9), *([] if edsr else [act()]))
        self.body = nn.Sequential(block(), block(), conv(8, 8), *norm)
        act_up = [] if edsr else [slope]
        first, second = ([conv(8, 32), nn.PixelShuffle(2), *act_up] for _ in range(2))
        upsampler = nn.Sequential(*first, *second)
        self.tail = nn.Sequential(upsampler, conv(8, 3))
        if edsr:
            self.add_mean = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(getattr(self, "sub_mean", nn.Identity())(x))
        return getattr(self, "add_mean", nn.Identity())(self.tail(x + self.body(x)))


class Body(nn.Module):
    """Layers in `body`."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class DnCNN(nn.Module):
    """A DnCNN of four convolutions."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(
            *(Body(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(2))
        )
        self.tail = nn.Sequential(nn.Conv2d(6, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(self.body(self.head(x)))


class Pair(nn.Module):
    """Two convolutions, behind an up-convolution if `up`."""

    def __init__(self, a: int, b: int, up: bool = False):
        super().__init__()
        if up:
            self.upconv = nn.ConvTranspose2d(a, b, 2, 2)
            a = 2 * b
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x if skip is None else torch.cat([self.upconv(x), skip], 1)
        return torch.relu(self.conv2(torch.relu(self.conv1(x))))


class UNet(nn.Module):
    """A U-Net of three resolutions."""

    def __init__(self):
        super().__init__()
        self.down_convs = nn.ModuleList(Pair(a, b) for a, b in ((1, 4), (4, 8), (8, 16)))
        self.up_convs = nn.ModuleList(Pair(a, b, up=True) for a, b in ((16, 8), (8, 4)))
        self.conv_final = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return run_unet(self, x)


# What is computed

CIFAR, IMAGENET, TINY = (3, 8, 8), (3, 40, 40), (3, 32, 32)
CASES: dict[str, tuple[str, dict, Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": ("resnet", {"depth": 8, "width": 0.5}, lambda: resnet(8), CIFAR),
    "resnet dhp": ("resnet", {"depth": 8, "width": 0.5}, lambda: ResNetDHP(8, (1, 1, 1)), CIFAR),
    "bottleneck dhp": (
        *("resnet", {"depth": 110, "width": 0.25}),
        *(lambda: ResNetDHP(4, (2, 1, 1), 4), CIFAR),
    ),
    "torchvision 18": (
        *("resnet", {"depth": 18, "width": 0.125}),
        *(lambda: TorchvisionResNet(8, (2, 2, 2, 2), 1), IMAGENET),
    ),
    "torchvision 50": (
        *("resnet", {"depth": 50, "width": 0.0625}),
        *(lambda: TorchvisionResNet(4, (2, 1, 1, 1), 4), IMAGENET),
    ),
    "vgg": ("vgg", {"depth": 11, "width": 0.125}, vgg, TINY),
    "mobilenet_v1": ("mobilenet_v1", {"width": 0.125}, mobilenet_v1, TINY),
    "mobilenet_v1 dhp": ("mobilenet_v1", {"width": 0.125}, MobileNetV1DHP, TINY),
    "mobilenet_v2": ("mobilenet_v2", {"width": 0.125}, mobilenet_v2, TINY),
    "mobilenet_v2 dhp": ("mobilenet_v2", {"width": 0.125}, MobileNetV2DHP, TINY),
    "srresnet": (
        *("srresnet", {"scale": 4, "blocks": 2, "features": 8}),
        *(lambda: Super(edsr=False), (3, 2, 3)),
    ),
    "srresnet dhp": (
        *("srresnet", {"scale": 4, "blocks": 2, "features": 8}),
        *(lambda: SuperDHP(edsr=False), (3, 2, 3)),
    ),
    "edsr": (
        *("edsr", {"scale": 4, "blocks": 2, "features": 8}),
        *(lambda: Super(edsr=True), (3, 2, 3)),
    ),
    "edsr dhp": (
        *("edsr", {"scale": 4, "blocks": 2, "features": 8}),
        *(lambda: SuperDHP(edsr=True), (3, 2, 3)),
    ),
    "dncnn": ("dncnn", {"depth": 4, "features": 6}, DnCNN, (1, 5, 6)),
    "dncnn dhp": ("dncnn", {"depth": 4, "features": 6}, DnCNNDHP, (1, 5, 6)),
    "unet": ("unet", {"depth": 3, "features": 4}, UNet, (1, 8, 8)),
    "unet dhp": ("unet", {"depth": 3, "features": 4}, UNetDHP, (1, 8, 8)),
}


@contextlib.contextmanager
def pruning(pruned: bool) -> Iterator[None]:
    Mode.pruned, Mode.made = pruned, 0
    yield
    Mode.pruned = False


def computed(name: str, pruned: bool) -> dict:
    """The tensors of a network, and its outputs."""
    family, arguments, make, shape = CASES[name]
    with pruning(pruned):
        net = make().double().eval()
    own = [*net.named_parameters(), *net.named_buffers()]  # each once, by its first name
    first = {id(tensor): tensor_name for tensor_name, tensor in own}
    with torch.no_grad():
        for tensor_name, tensor in own:
            if tensor.dtype == torch.float64:
                tensor.copy_(torch.from_numpy(values(tensor_name, tuple(tensor.shape))))
        classifies = net(torch.zeros(1, *shape).double()).ndim == 2
        x = torch.from_numpy(100 * values("images", (BATCH if classifies else 1, *shape)))
        outputs = net(x)
    if classifies:
        arguments = {**arguments, "num_classes": CLASSES}
    tensors = {}
    for tensor_name, tensor in net.state_dict(keep_vars=True).items():
        if tensor.dtype == torch.float64:
            other = first[id(tensor)]
            tensors[tensor_name] = list(tensor.shape) if other == tensor_name else other
    return {
        "family": family,
        "arguments": arguments,
        "tensors": tensors,
        "images": list(x.shape),
        "outputs": [float(f"{value:.7g}") for value in outputs.flatten().tolist()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    out = parser.parse_args().out
    found = {}
    for name in CASES:
        if not name.startswith("edsr dhp"):  # whose search network computes something else
            found[name] = computed(name, pruned=False)
        if name.endswith("dhp"):
            found[f"{name} pruned"] = computed(name, pruned=True)
    lines = (f" {json.dumps(name)}: {json.dumps(case)}" for name, case in found.items())
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
