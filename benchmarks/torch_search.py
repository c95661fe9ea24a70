"""The search step in PyTorch, for comparison: written from the method, as one would write it there.

Networks, batches, optimizer and proximal step are those of `zoo.search_step`. A batched matrix
product over the embedding generates the kernel of each convolution; latents are shrunk after every
step of SGD or Adam.
"""

from collections.abc import Callable
import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from zoo import Network

EMBEDDING = 8
CIFAR_WIDTHS = (16, 32, 64)


class HyperConv2d(nn.Module):
    """A convolution whose kernel is generated from the latents of its two axes."""

    def __init__(
        self,
        z_in: nn.Parameter,
        z_out: nn.Parameter,
        size: int,
        stride: int = 1,
        *,
        bias: bool = False,
    ):
        super().__init__()
        out, into, taps = len(z_out), len(z_in), size * size
        self.z_in, self.z_out = z_in, z_out
        self.size, self.stride = size, stride
        bound = math.sqrt(3 / (EMBEDDING * into * taps))
        self.b0 = nn.Parameter(torch.zeros(out, into))
        self.w1 = nn.Parameter(torch.empty(out, into, EMBEDDING).uniform_(-(3**0.5), 3**0.5))
        self.b1 = nn.Parameter(torch.zeros(out, into, EMBEDDING))
        self.w2 = nn.Parameter(torch.empty(out, into, taps, EMBEDDING).uniform_(-bound, bound))
        self.b2 = nn.Parameter(torch.zeros(out, into, taps))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.outer(self.z_out, self.z_in) + self.b0
        embedding = pairs[..., None] * self.w1 + self.b1
        kernel = (self.w2 @ embedding[..., None])[..., 0] + self.b2
        kernel = kernel.reshape(*kernel.shape[:2], self.size, self.size)
        return functional.conv2d(x, kernel, self.bias, stride=self.stride, padding=self.size // 2)


def latent(size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size))


class ConvNorm(nn.Sequential):
    """A convolution, then BatchNorm; arguments as those of `HyperConv2d`."""

    def __init__(self, z_in: nn.Parameter, z_out: nn.Parameter, *shape: int, **options: bool):
        convolution = HyperConv2d(z_in, z_out, *shape, **options)
        super().__init__(convolution, nn.BatchNorm2d(len(z_out)))


class Block(nn.Module):
    """A residual block through the given axes, with convolutions of the given sizes."""

    def __init__(self, axes: list[nn.Parameter], sizes: tuple[int, ...], stride: int):
        super().__init__()
        strided = sizes.index(3)
        self.layers = nn.ModuleList(
            ConvNorm(a, b, size, stride if i == strided else 1)
            for i, ((a, b), size) in enumerate(zip(itertools.pairwise(axes), sizes, strict=True))
        )
        identity = stride == 1 and axes[0] is axes[-1]
        self.projection = None if identity else ConvNorm(axes[0], axes[-1], 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.projection is None else self.projection(x)
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return functional.relu(self.layers[-1](x) + shortcut)


class ResNet(nn.Module):
    """A CIFAR ResNet, of basic blocks or, from depth 110, of bottleneck blocks."""

    def __init__(self, depth: int):
        super().__init__()
        bottleneck = depth >= 110
        sizes, expansion = ((1, 3, 1), 4) if bottleneck else ((3, 3), 1)
        stages = [latent(width * expansion) for width in CIFAR_WIDTHS]
        z = latent(CIFAR_WIDTHS[0]) if bottleneck else stages[0]
        self.stem = ConvNorm(latent(3), z, 3)
        self.blocks = nn.Sequential()
        for stage, (width, z_stage) in enumerate(zip(CIFAR_WIDTHS, stages, strict=True)):
            for i in range((depth - 2) // (9 if bottleneck else 6)):
                axes = [z, *(latent(width) for _ in sizes[1:]), z_stage]
                self.blocks.append(Block(axes, sizes, 2 if stage > 0 and i == 0 else 1))
                z = z_stage
        self.classifier = nn.Linear(len(z), 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(functional.relu(self.stem(x))).mean((2, 3)))


class DnCNN(nn.Module):
    """A denoiser that predicts what to add to a gray image."""

    def __init__(self, depth: int = 17, width: int = 64):
        super().__init__()
        axes = [latent(1), *(latent(width) for _ in range(depth - 1))]
        self.head = HyperConv2d(axes[0], axes[1], 3, bias=True)
        self.body = nn.ModuleList(
            ConvNorm(a, b, 3, bias=True) for a, b in itertools.pairwise(axes[1:])
        )
        self.tail = HyperConv2d(axes[-1], latent(1), 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.head(x))
        for layer in self.body:
            h = functional.relu(layer(h))
        return x + self.tail(h)


def can_build(network: Network) -> bool:
    """Whether there is a PyTorch version of a network."""
    cifar = network.family == "resnet" and network.arguments.keys() == {"depth"}
    return cifar or network.family == "dncnn"


def build(network: Network) -> nn.Module:
    """The network, which `can_build` has found here."""
    return ResNet(**network.arguments) if network.family == "resnet" else DnCNN()


def stepper(network: Network, batch: int, *, compiled: bool = False) -> Callable[[], None]:
    """A function that takes one search step on random data, and waits for it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(network).to(device)
    latents = {
        id(z): z
        for layer in model.modules()
        if isinstance(layer, HyperConv2d)
        for z in (layer.z_in, layer.z_out)
    }
    others = [p for p in model.parameters() if id(p) not in latents]
    groups = [{"params": list(latents.values()), "weight_decay": 0.0}, {"params": others}]
    if network.patch:
        rate, strength = 1e-4, 0.1
        optimizer = torch.optim.Adam(groups, rate)
    else:
        rate, strength = 0.1, 2e-4
        optimizer = torch.optim.SGD(groups, rate, momentum=0.9, weight_decay=1e-4)
    side = network.patch or network.input_shape[0]
    channels = network.input_shape[-1]
    images = torch.randint(0, 256, (batch, channels, side, side), device=device).byte()
    labels = torch.randint(0, 10, (batch,), device=device)

    def inputs_and_targets() -> tuple[Tensor, Tensor]:
        pixels = images.float()
        if network.patch:
            return pixels + 70 * torch.randn_like(pixels), pixels
        padded = functional.pad(pixels, (4, 4, 4, 4))
        rows, columns = (
            torch.randint(0, 9, (batch, 1), device=device) + torch.arange(side, device=device)
            for _ in range(2)
        )
        which = torch.arange(batch, device=device)[:, None, None]
        cropped = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
        mirrored = torch.rand(batch, 1, 1, 1, device=device) < 0.5
        cropped = torch.where(mirrored, cropped.flip(2), cropped)
        return ((cropped - 125) / 63).permute(0, 3, 1, 2), labels

    def compute(inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = model(inputs)
        if network.patch:
            return functional.mse_loss(outputs, targets)
        return functional.cross_entropy(outputs, targets)

    compute = torch.compile(compute) if compiled else compute

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        compute(*inputs_and_targets()).backward()
        optimizer.step()
        with torch.no_grad():
            for z in latents.values():
                z.copy_(z.sign() * (z.abs() - rate * strength).clamp(min=0))
        if device == "cuda":
            torch.cuda.synchronize()

    return step
