"""Search steps of the method in float64 by PyTorch, which tests compare those of the library with.

Written from the method's description, on functions of PyTorch and its optimizers. Nothing of the
library is imported. Networks are tiny: a ResNet-8, a MobileNetV2 of two groups, a U-Net of two
resolutions. Initial values follow from names, so that the fixture holds results only.

    python benchmarks/parity.py --out=tests/fixtures/parity.json
"""

import argparse
from dataclasses import dataclass
import json
import math
from pathlib import Path
import zlib

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

EMBEDDING, FLOOR, THRESHOLD, DECAY, MOMENTUM = 8, 3, 0.3, 1e-2, 0.9
EPS, KEPT = 1e-5, 0.9  # of BatchNorm; how much of a running statistic stays
STEPS, DROP, BATCH, CLASSES = 8, 6, 4, 4  # the learning rate falls after DROP steps


def drawn(network: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers from U(-1, 1) that follow from names alone."""
    seed = zlib.crc32(f"{network}/{name}".encode())
    return np.random.RandomState(seed).uniform(-1, 1, shape)


@dataclass(eq=False)
class Latent:
    """An axis; `name` is given by the first convolution that uses it."""

    size: int
    prunable: bool = True
    floor: int = FLOOR
    name: str = ""


class Network:
    """Arrays of a network, made at their first use, and the layers that use them.

    Layers are numbered in the order of execution.
    """

    def __init__(self, name: str):
        self.name, self.leaves, self.latents, self.running = name, {}, {}, {}
        self.training = True

    def begin(self) -> None:
        self.convs = self.norms = 0

    def leaf(self, name: str, shape: tuple[int, ...], scale: float, shift: float = 0.0) -> Tensor:
        if name not in self.leaves:
            values = torch.from_numpy(shift + scale * drawn(self.name, name, shape))
            self.leaves[name] = values.requires_grad_()
        return self.leaves[name]

    def vector(self, axis: list[Latent], name: str) -> Tensor:
        for latent in axis:
            if not latent.name:
                latent.name = name
                self.latents[name] = latent
        return torch.cat([self.leaf(z.name, (z.size,), 1.0) for z in axis])

    def conv(
        self,
        x: Tensor,
        z_in: list[Latent],
        z_out: Latent,
        size: int,
        stride: int = 1,
        *,
        bias: bool = False,
        depthwise: bool = False,
        up: bool = False,
    ) -> Tensor:
        n = self.convs
        self.convs += 1
        if depthwise:
            z_in = [self.group(n)]
        a, b = self.vector(z_in, f"in{n}"), self.vector([z_out], f"out{n}")
        pair, taps = (len(a), len(b)), (size, size)
        scale = math.sqrt(3 / (EMBEDDING * len(a) * size * size))
        w1 = self.leaf(f"conv{n}.w1", (EMBEDDING, *pair), math.sqrt(3))
        w2 = self.leaf(f"conv{n}.w2", (*taps, EMBEDDING, *pair), scale)
        b0 = self.leaf(f"conv{n}.b0", pair, 0.1)
        b1 = self.leaf(f"conv{n}.b1", (EMBEDDING, *pair), 0.1)
        b2 = self.leaf(f"conv{n}.b2", (*taps, *pair), 0.1 * scale)
        embedding = (torch.outer(a, b) + b0) * w1 + b1
        kernel = torch.einsum("hwmio,mio->hwio", w2, embedding) + b2
        offset = self.leaf(f"conv{n}.bias", (len(b),), 0.1) if bias else None
        if up:  # the other way round, as PyTorch's scatters and does not gather
            turned = kernel.flip(0, 1).permute(2, 3, 0, 1)
            return functional.conv_transpose2d(x, turned, offset, stride)
        kernel = kernel.permute(3, 2, 0, 1)
        groups = len(b) if depthwise else 1
        return functional.conv2d(x, kernel, offset, stride, size // 2, groups=groups)

    def group(self, n: int) -> Latent:
        return self.latents.get(f"in{n}") or Latent(1, prunable=False)

    def norm(self, x: Tensor) -> Tensor:
        n, size = self.norms, x.shape[1]
        self.norms += 1
        scale = self.leaf(f"norm{n}.scale", (size,), 0.2, 1.0)
        offset = self.leaf(f"norm{n}.bias", (size,), 0.2)
        mean, var = self.running.get(n, (torch.zeros(size).double(), torch.ones(size).double()))
        if self.training:
            old = mean, var
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            self.running[n] = tuple(
                KEPT * o + (1 - KEPT) * s.detach() for o, s in zip(old, (mean, var), strict=True)
            )
        shape = (1, size, 1, 1)
        normal = (x - mean.reshape(shape)) / torch.sqrt(var.reshape(shape) + EPS)
        return normal * scale.reshape(shape) + offset.reshape(shape)

    def classify(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        weight = self.leaf("linear.kernel", (x.shape[1], CLASSES), 0.3)
        return x @ weight + self.leaf("linear.bias", (CLASSES,), 0.1)


class ResNet(Network):
    """A ResNet-8: stages of 8, 16 and 32 channels of one block each; the last is not pruned."""

    shape = (3, 8, 8)

    def __init__(self):
        super().__init__("resnet")
        self.image = Latent(3, prunable=False)
        self.stages = [Latent(8), Latent(16), Latent(32, prunable=False)]
        self.hidden = [Latent(8), Latent(16), Latent(32)]

    def __call__(self, x: Tensor) -> Tensor:
        self.begin()
        z = self.stages[0]
        x = torch.relu(self.norm(self.conv(x, [self.image], z, 3)))
        for stage, (z_out, hidden) in enumerate(zip(self.stages, self.hidden, strict=True)):
            stride = 2 if stage else 1
            shortcut = self.norm(self.conv(x, [z], z_out, 1, stride)) if stage else x
            y = torch.relu(self.norm(self.conv(x, [z], hidden, 3, stride)))
            x = torch.relu(self.norm(self.conv(y, [hidden], z_out, 3)) + shortcut)
            z = z_out
        return self.classify(x)


class MobileNetV2(Network):
    """A MobileNetV2 with ReLU: a block without expansion, two of stride 2 and 1 with it."""

    shape = (3, 16, 16)

    def __init__(self):
        super().__init__("mobilenet_v2")
        self.image, self.stem, self.narrow = Latent(3, prunable=False), Latent(8), Latent(8)
        self.wide, self.expansions = Latent(12), [Latent(24), Latent(36)]
        self.features = Latent(24, floor=10)  # 40 % of them

    def layer(self, x: Tensor, *given: object, **options: bool) -> Tensor:
        return torch.relu(self.norm(self.conv(x, *given, **options)))

    def __call__(self, x: Tensor) -> Tensor:
        self.begin()
        x = self.layer(x, [self.image], self.stem, 3, 2)
        x = self.layer(x, [self.stem], self.stem, 3, depthwise=True)
        x = self.norm(self.conv(x, [self.stem], self.narrow, 1))
        z = self.narrow
        for i, hidden in enumerate(self.expansions):
            y = self.layer(x, [z], hidden, 1)
            y = self.layer(y, [hidden], hidden, 3, 1 if i else 2, depthwise=True)
            y = self.norm(self.conv(y, [hidden], self.wide, 1))
            x, z = x + y if i else y, self.wide
        return self.classify(self.layer(x, [z], self.features, 1))


class UNet(Network):
    """A U-Net of two resolutions, of 6 and 12 features, with biases and without BatchNorm."""

    shape = (1, 8, 8)

    def __init__(self):
        super().__init__("unet")
        self.image, self.output = (Latent(1, prunable=False) for _ in range(2))
        self.axes = [Latent(size) for size in (6, 6, 12, 12, 6, 6, 6)]

    def layer(self, x: Tensor, z_in: list[Latent], z_out: Latent) -> Tensor:
        return torch.relu(self.conv(x, z_in, z_out, 3, bias=True))

    def __call__(self, x: Tensor) -> Tensor:
        self.begin()
        a, b, c, d, up, e, f = self.axes
        skip = self.layer(self.layer(x, [self.image], a), [a], b)
        x = functional.max_pool2d(skip, 2)
        x = self.layer(self.layer(x, [b], c), [c], d)
        x = self.conv(x, [d], up, 2, 2, bias=True, up=True)
        x = torch.cat([x, skip], 1)
        x = self.layer(self.layer(x, [up, b], e), [e], f)
        return self.conv(x, [f], self.output, 1, bias=True)


def batch(network: Network, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step."""
    inputs = drawn(network.name, f"inputs{step}", (BATCH, *network.shape))
    if isinstance(network, UNet):
        clean = drawn(network.name, f"clean{step}", (BATCH, *network.shape))
        return torch.from_numpy(clean + 0.3 * inputs), torch.from_numpy(clean)
    labels = np.floor(CLASSES / 2 * (1 + drawn(network.name, f"labels{step}", (BATCH,))))
    return torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64))


def loss(network: Network, step: int) -> Tensor:
    inputs, targets = batch(network, step)
    distance = functional.l1_loss if isinstance(network, UNet) else functional.cross_entropy
    return distance(network(inputs), targets)


def searched(network: Network) -> dict:
    """Losses of a search and its latents after it."""
    loss(network, 0)  # makes the arrays; what BatchNorm keeps begins anew
    network.running.clear()
    adam = isinstance(network, UNet)
    rate, strength = (0.01, 6.0) if adam else (0.05, 1.2)
    leaves = network.leaves.values()
    if adam:
        optimizer = torch.optim.Adam(leaves, rate, weight_decay=DECAY)
    else:
        optimizer = torch.optim.SGD(leaves, rate, momentum=MOMENTUM, weight_decay=DECAY)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate if step < DROP else rate / 10
        optimizer.zero_grad()
        value = loss(network, step)
        value.backward()
        optimizer.step()
        losses.append(value.item())
        shrink(network, strength * optimizer.param_groups[0]["lr"])
    network.training = False
    with torch.no_grad():
        tested = loss(network, STEPS).item()
    vectors = {name: network.leaves[name].detach() for name in network.latents}
    return {
        "losses": losses,
        "tested": tested,
        "latents": {name: vector.tolist() for name, vector in vectors.items()},
        "survivors": {
            name: survivors(vectors[name], latent).tolist()
            for name, latent in network.latents.items()
        },
    }


@torch.no_grad()
def shrink(network: Network, amount: float) -> None:
    for name, latent in network.latents.items():
        z = network.leaves[name]
        if latent.prunable and (z.abs() >= THRESHOLD).sum() > latent.floor:
            z.copy_(z.sign() * (z.abs() - amount).clamp(min=0))


def survivors(vector: Tensor, latent: Latent) -> Tensor:
    if not latent.prunable:
        return torch.arange(latent.size)
    magnitude = vector.abs()
    least = min(THRESHOLD, magnitude.sort(descending=True).values[latent.floor - 1].item())
    return torch.nonzero(magnitude >= least)[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    out = parser.parse_args().out
    found = {network.name: searched(network) for network in (ResNet(), MobileNetV2(), UNet())}
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
