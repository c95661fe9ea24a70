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
CIFAR_WIDTHS, CIFAR_SIDE = (16, 32, 64), 32


class HyperConv2d(nn.Module):
    """A convolution whose kernel is generated from the latents of its two axes.

    Each entry of the output's latent stands for `repeats` channels in a row.
    """

    def __init__(
        self,
        z_in: nn.Parameter,
        z_out: nn.Parameter,
        size: int,
        stride: int = 1,
        *,
        bias: bool = False,
        groups: int = 1,
        repeats: int = 1,
    ):
        super().__init__()
        if groups > 1:  # the channels of a group have a latent of their own
            z_in = latent(len(z_in) // groups)
        out, into, taps = len(z_out) * repeats, len(z_in), size * size
        self.z_in, self.z_out, self.repeats = z_in, z_out, repeats
        self.size, self.stride, self.groups = size, stride, groups
        bound = math.sqrt(3 / (EMBEDDING * into * taps))
        self.b0 = nn.Parameter(torch.zeros(out, into))
        self.w1 = nn.Parameter(torch.empty(out, into, EMBEDDING).uniform_(-(3**0.5), 3**0.5))
        self.b1 = nn.Parameter(torch.zeros(out, into, EMBEDDING))
        self.w2 = nn.Parameter(torch.empty(out, into, taps, EMBEDDING).uniform_(-bound, bound))
        self.b2 = nn.Parameter(torch.zeros(out, into, taps))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        z_out = self.z_out.repeat_interleave(self.repeats) if self.repeats > 1 else self.z_out
        pairs = torch.outer(z_out, self.z_in) + self.b0
        embedding = pairs[..., None] * self.w1 + self.b1
        kernel = (self.w2 @ embedding[..., None])[..., 0] + self.b2
        kernel = kernel.reshape(*kernel.shape[:2], self.size, self.size)
        padding = self.size // 2
        return functional.conv2d(x, kernel, self.bias, self.stride, padding, groups=self.groups)


def latent(size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size))


class ConvNorm(nn.Sequential):
    """A convolution, then BatchNorm; arguments as those of `HyperConv2d`."""

    def __init__(self, z_in: nn.Parameter, z_out: nn.Parameter, *shape: int, **options: int):
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


class InvertedResidual(nn.Module):
    """Expansion, unless `hidden` is `z_in`, depthwise convolution, projection without ReLU."""

    def __init__(self, z_in: nn.Parameter, hidden: nn.Parameter, z_out: nn.Parameter, stride: int):
        super().__init__()
        layers = [] if hidden is z_in else [ConvNorm(z_in, hidden, 1), nn.ReLU()]
        layers += [ConvNorm(hidden, hidden, 3, stride, groups=len(hidden)), nn.ReLU()]
        self.layers = nn.Sequential(*layers, ConvNorm(hidden, z_out, 1))
        self.identity = stride == 1 and z_in is z_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.identity else self.layers(x)


class MobileNetV2(nn.Module):
    """A MobileNetV2 with ReLU for images of 64 by 64 pixels."""

    groups = (  # channels, blocks, stride of the first block, expansion
        *((16, 1, 1, 1), (24, 2, 1, 6), (32, 3, 2, 6), (64, 4, 2, 6)),
        *((96, 3, 1, 6), (160, 3, 2, 6), (320, 1, 1, 6)),
    )

    def __init__(self, classes: int = 200):
        super().__init__()
        z, features = latent(32), latent(1280)
        layers = [ConvNorm(latent(3), z, 3, 2), nn.ReLU()]
        for width, blocks, stride, expansion in self.groups:
            z_out = latent(width)
            for i in range(blocks):
                hidden = z if expansion == 1 else latent(expansion * len(z))
                layers.append(InvertedResidual(z, hidden, z_out, stride if i == 0 else 1))
                z = z_out
        self.layers = nn.Sequential(*layers, ConvNorm(z, features, 1), nn.ReLU())
        self.classifier = nn.Linear(len(features), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(x).mean((2, 3)))


class SRResNet(nn.Module):
    """An SRResNet that enlarges by 2 or 4."""

    def __init__(self, scale: int, blocks: int = 16, width: int = 64):
        super().__init__()
        z = latent(width)
        self.head = nn.Sequential(HyperConv2d(latent(3), z, 9, bias=True), nn.PReLU())
        self.blocks = nn.ModuleList()
        for hidden in (latent(width) for _ in range(blocks)):
            first, second = ConvNorm(z, hidden, 3, bias=True), ConvNorm(hidden, z, 3, bias=True)
            self.blocks.append(nn.Sequential(first, nn.PReLU(), second))
        self.last = ConvNorm(z, z, 3, bias=True)
        slope = nn.PReLU()
        stages = [
            (HyperConv2d(z, z, 3, bias=True, repeats=4), nn.PixelShuffle(2), slope)
            for _ in range(scale // 2)
        ]
        self.upsampler = nn.Sequential(*itertools.chain.from_iterable(stages))
        self.tail = HyperConv2d(z, latent(3), 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        shallow = x = self.head(x)
        for block in self.blocks:
            x = x + block(x)
        return self.tail(self.upsampler(self.last(x) + shallow))


MAKERS = {
    ("resnet", ("depth",)): ResNet,
    ("mobilenet_v2", ()): MobileNetV2,
    ("srresnet", ("scale",)): SRResNet,
    ("dncnn", ()): DnCNN,
}


def can_build(network: Network) -> bool:
    """Whether there is a PyTorch version of a network."""
    cifar = network.family != "resnet" or network.input_shape[0] == CIFAR_SIDE
    return cifar and (network.family, tuple(network.arguments)) in MAKERS


def build(network: Network) -> nn.Module:
    """The network, which `can_build` has found here."""
    return MAKERS[network.family, tuple(network.arguments)](**network.arguments)


def stepper(
    network: Network, batch: int, steps: int = 1, *, compiled: bool = False
) -> Callable[[], None]:
    """A function that takes so many search steps on random data, and waits for them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(network).to(device)
    latents = {
        id(z): z
        for layer in model.modules()
        if isinstance(layer, HyperConv2d)
        for z in (layer.z_in, layer.z_out)
    }
    if network.patch:
        rate, strength = 1e-4, 0.1
        optimizer = torch.optim.Adam(model.parameters(), rate)
    else:
        rate, strength = 0.1, 2e-4
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    scale = network.arguments.get("scale", 1)
    side = network.patch or network.input_shape[0]
    channels = network.input_shape[-1]
    images = torch.randint(0, 256, (batch, channels, side, side), device=device).byte()
    labels = torch.randint(0, 10, (batch,), device=device)

    def inputs_and_targets() -> tuple[Tensor, Tensor]:
        pixels = images.float()
        if scale > 1:
            return pixels[..., ::scale, ::scale], pixels
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
            distance = functional.l1_loss if scale > 1 else functional.mse_loss
            return distance(outputs, targets)
        return functional.cross_entropy(outputs, targets)

    if compiled:  # for this shape alone, whatever was compiled before; never eager instead
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        compute = torch.compile(compute, dynamic=False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        compute(*inputs_and_targets()).backward()
        optimizer.step()
        with torch.no_grad():
            for z in latents.values():
                z.copy_(z.sign() * (z.abs() - rate * strength).clamp(min=0))

    def several() -> None:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return several
