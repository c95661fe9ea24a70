"""A ResNet of the library as a network of PyTorch, and the recipe of from_trained.py there.

It needs `pip install torch`, which is no package of the library.
"""

from collections.abc import Iterable, Iterator, Mapping
import functools
from pathlib import Path

from from_trained_programs import (
    MOMENTUM,
    SHAPE,
    TEMPERATURE,
    WEIGHT_DECAY,
    Batches,
    Network,
    Plan,
    Run,
)
from from_trained_rows import SEGMENTS_KEPT, Bench, Trainer
import jax
import numpy as np

ONLY_SUMS = [False, True, True]


@functools.cache
def batch_norm(torch):
    """A class of BatchNorm2d whose training on a CPU is sooner for few channels.

    It takes the pixels of a row with their channels as one axis, which is long enough for the
    vector units of the CPU. The variance is that of the library, without Bessel's correction.
    """
    backward_of = torch.ops.aten.native_batch_norm_backward

    class Normalise(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, eps):
            # Running statistics in float32 have those of the batch in float32 too.
            unused = weight.new_zeros(2, x.shape[3] * x.shape[1])
            found = torch.batch_norm_update_stats(rows_of(x), *unused, 0.0)
            means, variances = (of_columns(values, x) for values in found)
            mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
            scale = torch.rsqrt(var + eps)
            ctx.save_for_backward(x, weight, mean, scale)
            ctx.mark_non_differentiable(mean, var)
            return linear(x, weight * scale, bias - mean * weight * scale), mean, var

        @staticmethod
        def backward(ctx, by_y, by_mean, by_var):
            del by_mean, by_var
            x, weight, mean, scale = ctx.saved_tensors
            ones, means = torch.ones_like(mean).repeat(x.shape[3]), mean.repeat(x.shape[3])
            _, *sums = backward_of(
                rows_of(by_y), rows_of(x), None, means, ones, None, None, False, 0.0, ONLY_SUMS
            )
            of_weight, of_bias = (of_columns(values, x).sum(0) for values in sums)
            of_weight, count = of_weight * scale, x.numel() // x.shape[1]
            factor = weight * scale
            slope = -factor * scale * of_weight / count
            # In place this sum takes twice as long.
            by_x = linear(x, slope, -factor * of_bias / count - slope * mean) + linear(
                by_y, factor, torch.zeros_like(factor)
            )
            return by_x, of_weight, of_bias, None

    def rows_of(x):
        """A view of shape `(batch * height, width * channels)`."""
        n, c, h, w = x.shape
        x = x.contiguous(memory_format=torch.channels_last)
        return x.permute(0, 2, 3, 1).view(n * h, w * c)

    def of_columns(values, x):
        """Values of the columns of rows of an array like `x`, of shape `(width, channels)`."""
        return values.view(x.shape[3], x.shape[1])

    def linear(x, scale, bias):
        """`scale x + bias` for each channel."""
        n, c, h, w = x.shape
        scale, bias = scale.repeat(w), bias.repeat(w)
        ones, zeros = torch.ones_like(scale), torch.zeros_like(scale)
        rows = torch.nn.functional.batch_norm(rows_of(x), zeros, ones, scale, bias, eps=0.0)
        return rows.view(n, h, w, c).permute(0, 3, 1, 2)

    class BatchNorm2d(torch.nn.BatchNorm2d):
        def forward(self, x):
            if not self.training or x.device.type != "cpu":
                return super().forward(x)
            y, mean, var = Normalise.apply(x, self.weight, self.bias, self.eps)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
            return y

    return BatchNorm2d


def network(torch, arrays: Mapping[str, np.ndarray]):
    """The PyTorch network with the arrays of a ResNet of ours, by their names."""
    nn = torch.nn

    def tensor(name):
        return torch.from_numpy(np.array(arrays[name], np.float32))

    def layer(path, stride):
        kernel = tensor(f"{path}.conv.kernel").permute(3, 2, 0, 1)
        out, into, size, _ = kernel.shape
        conv = nn.Conv2d(into, out, size, stride, padding=size // 2, bias=False)
        norm = batch_norm(torch)(out, momentum=0.1)
        conv.weight.data = kernel.contiguous()
        for name, of_ours in (("weight", "scale"), ("bias", "bias")):
            getattr(norm, name).data = tensor(f"{path}.norm.{of_ours}")
        norm.running_mean, norm.running_var = (tensor(f"{path}.norm.{x}") for x in ("mean", "var"))
        return nn.Sequential(conv, norm)

    class Block(nn.Module):
        def __init__(self, path):
            super().__init__()
            projected = f"{path}.projection.conv.kernel" in arrays
            self.stride = 2 if projected else 1
            self.first, self.second = (
                layer(f"{path}.layers.0", self.stride),
                layer(f"{path}.layers.1", 1),
            )
            self.projection = layer(f"{path}.projection", 1) if projected else nn.Identity()

        def forward(self, x):
            # The stride is here: a 1x1 convolution with a stride, of fewer than 8 channels, writes
            # past its memory in the backward pass of PyTorch 2.13 with AVX2.
            of_stride = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
            return torch.relu(self.projection(of_stride) + self.second(torch.relu(self.first(x))))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            count = sum(f"blocks.{i}.layers.0.conv.kernel" in arrays for i in range(len(arrays)))
            self.stem = layer("stem", 1)
            self.blocks = nn.Sequential(*(Block(f"blocks.{i}") for i in range(count)))
            kernel = tensor("classifier.kernel")
            self.classifier = nn.Linear(*kernel.shape)
            self.classifier.weight.data = kernel.T.contiguous()
            self.classifier.bias.data = tensor("classifier.bias")

        def forward(self, x):
            x = self.blocks(torch.relu(self.stem(x)))
            return self.classifier(x.mean((2, 3)))

    return ResNet().to(memory_format=torch.channels_last)


def layers_of(model) -> dict:
    """The convolutions of a PyTorch network, each with its BatchNorm, by the names of ours."""
    found = {"stem": model.stem}
    for i, block in enumerate(model.blocks):
        parts = {"layers.0": block.first, "layers.1": block.second, "projection": block.projection}
        for name, part in parts.items():
            if hasattr(part, "__getitem__"):
                found[f"blocks.{i}.{name}"] = part
    return found


def torch_inputs(torch, device, images):
    """A batch of ours as PyTorch lays it out."""
    x = torch.from_numpy(np.array(images, np.float32)).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last).to(device)


def train(
    torch,
    device,
    bench: Bench,
    model,
    stream: Iterator[Batches],
    *,
    bfloat16: bool,
    kept: Path | None = None,
    distillation: float = 0.0,
) -> float:
    """Carries out the updates, and returns the last loss.

    Args:
      torch: the module.
      device: where.
      bench: what rows share.
      model: of PyTorch, on that device; it is changed.
      stream: the batches, a segment at a time.
      bfloat16: whether convolutions compute in it.
      kept: a file that is written now and then, and from which a row that was stopped goes on.
      distillation: share of the loss that compares with the trained network.
    """
    teacher = network(torch, bench.trained).eval().to(device) if distillation else None
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=0.0,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        nesterov=True,
    )
    done, loss = 0, np.nan
    if kept is not None and kept.exists():
        state = torch.load(kept)
        done, loss = state["segments"], state["loss"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    model.train()
    for segment, batches in enumerate(stream, 1):
        if segment <= done:
            continue
        for at in range(bench.size.segment):
            batch = jax.tree.map(lambda x, at=at: x[at], batches)
            images, labels = bench.programs.inputs(batch)
            optimizer.param_groups[0]["lr"] = float(batch.rate)
            x = torch_inputs(torch, device, images)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                logits = model(x).float()
            labels = torch.from_numpy(np.array(labels, np.int64)).to(device)
            total = torch.nn.functional.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    taught = teacher(x).float()
                apart = distillation_loss(torch, logits, taught)
                total = (1 - distillation) * total + distillation * apart
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
        loss = float(total.detach())
        if kept is not None and segment % SEGMENTS_KEPT == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            part = kept.with_suffix(".part")
            torch.save({"segments": segment, "loss": loss, **state}, part)
            part.replace(kept)
            print(f"{segment} segments, loss {loss:.3f}", flush=True)
    return loss


def distillation_loss(torch, logits, taught):
    """The mean of the library's `distillation_loss`."""
    learnt, target = (torch.log_softmax(x / TEMPERATURE, 1) for x in (logits, taught))
    apart = torch.nn.functional.kl_div(learnt, target, reduction="batchmean", log_target=True)
    return TEMPERATURE**2 * apart


def arrays_of(model, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Weights and statistics of a PyTorch network, by the names that ours have for them."""
    found = {
        "classifier.kernel": model.classifier.weight.T,
        "classifier.bias": model.classifier.bias,
    }
    for path, (conv, norm) in layers_of(model).items():
        found[f"{path}.conv.kernel"] = conv.weight.permute(2, 3, 1, 0)
        found[f"{path}.norm.scale"], found[f"{path}.norm.bias"] = norm.weight, norm.bias
        found[f"{path}.norm.mean"], found[f"{path}.norm.var"] = norm.running_mean, norm.running_var
    return {name: found[name].detach().cpu().numpy().copy() for name in names}


def trainer(torch, *, bfloat16: bool) -> Trainer:
    """PyTorch, on the CPU, for what a cut of ours has left."""

    def train_left(
        bench: Bench, run: Run, plan: Plan, stream: Iterator[Batches], kept: Path
    ) -> tuple[Run, float]:
        model = network(torch, jax.tree.map(np.asarray, {**run.weights, **run.statistics}))
        share, device = float(plan.distillation), torch.device("cpu")
        loss = train(
            torch, device, bench, model, stream, bfloat16=bfloat16, kept=kept, distillation=share
        )
        return bench.begin(arrays_of(model, bench.net.arrays())), loss

    dtype = "bfloat16" if bfloat16 else "float32"
    return Trainer(f"torch {torch.__version__}, {dtype}", train_left)


def check_same(torch, bench: Bench) -> None:
    """Raises unless the PyTorch network computes what ours does."""
    x = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
    plain = Network(bench.size.depth, np.float32).model(bench.trained)
    plain.eval()
    with torch.no_grad():
        theirs = network(torch, bench.trained).eval()(torch_inputs(torch, "cpu", x)).numpy()
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(theirs, np.asarray(plain(x)), rtol=1e-3, atol=1e-3)
