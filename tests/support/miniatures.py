"""Small networks in the style of what people bring along, with what can be pruned of each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np


class Miniature(NamedTuple):
    build: Callable[[nnx.Rngs], nnx.Module]
    inputs: tuple[Any, ...]
    families: int  # at least so many
    stays: str  # words of a reason for which something stays


MINIATURES: dict[str, Miniature] = {}
IMAGES = ((16, 16, 3),)


def miniature(families: int, stays: str = "output", inputs: tuple[Any, ...] = IMAGES) -> Callable:
    def register(build: type[nnx.Module]) -> type[nnx.Module]:
        MINIATURES[build.__name__] = Miniature(build, inputs, families, stays)
        return build

    return register


def conv(into, out, size=3, stride=1, *, rngs, **options):
    return nnx.Conv(into, out, (size, size), stride, padding=size // 2, rngs=rngs, **options)


class ConvNorm(nnx.Module):
    def __init__(self, into, out, size=3, stride=1, *, rngs, **options):
        self.conv = conv(into, out, size, stride, rngs=rngs, use_bias=False, **options)
        self.norm = nnx.BatchNorm(out, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class Residual(nnx.Module):
    """A basic block whose shortcut is the identity, padded (option A), or pooled (option D)."""

    def __init__(self, into, out, stride, option, *, rngs):
        self.first = ConvNorm(into, out, stride=stride, rngs=rngs)
        self.second = ConvNorm(out, out, rngs=rngs)
        self.stride, self.option, self.more = stride, option, out - into
        self.project = ConvNorm(into, out, 1, rngs=rngs) if option == "D" else None

    def __call__(self, x):
        y = self.second(nnx.relu(self.first(x)))
        if self.option == "A":
            more = self.more
            x = x[:, :: self.stride, :: self.stride]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
        elif self.option == "D":
            x = self.project(nnx.avg_pool(x, (2, 2), (2, 2)))
        return nnx.relu(x + y)


class _ResNet(nnx.Module):
    option = "A"

    def __init__(self, rngs):
        self.stem = ConvNorm(3, 8, rngs=rngs)
        self.blocks = nnx.List(
            [
                Residual(8, 8, 1, "", rngs=rngs),
                Residual(8, 16, 2, self.option, rngs=rngs),
                Residual(16, 16, 1, "", rngs=rngs),
            ]
        )
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


@miniature(4)
class ResNetA(_ResNet):
    option = "A"


@miniature(5)
class ResNetD(_ResNet):
    option = "D"


@miniature(4)
class DenseNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = conv(3, 8, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(8 + 6 * i, rngs=rngs) for i in range(3)])
        self.layers = nnx.List([conv(8 + 6 * i, 6, rngs=rngs) for i in range(3)])
        self.transition = conv(26, 10, 1, rngs=rngs)
        self.head = nnx.Linear(10, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = jnp.concatenate([x, layer(nnx.relu(norm(x)))], -1)
        x = nnx.avg_pool(nnx.relu(self.transition(x)), (2, 2), (2, 2))
        return self.head(x.mean((1, 2)))


class Excite(nnx.Module):
    def __init__(self, size, hidden, *, rngs):
        self.reduce, self.expand = (
            conv(size, hidden, 1, rngs=rngs),
            conv(hidden, size, 1, rngs=rngs),
        )

    def __call__(self, x):
        gate = self.expand(nnx.silu(self.reduce(x.mean((1, 2), keepdims=True))))
        return x * nnx.sigmoid(gate)


class Inverted(nnx.Module):
    def __init__(self, into, hidden, out, size, act, *, rngs):
        self.act = act
        self.expand = ConvNorm(into, hidden, 1, rngs=rngs)
        self.depthwise = ConvNorm(hidden, hidden, size, rngs=rngs, feature_group_count=hidden)
        self.excite = Excite(hidden, 4, rngs=rngs)
        self.project = ConvNorm(hidden, out, 1, rngs=rngs)
        self.adds = into == out

    def __call__(self, x):
        y = self.act(self.depthwise(self.act(self.expand(x))))
        y = self.project(self.excite(y))
        return x + y if self.adds else y


@miniature(6)
class EfficientNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = ConvNorm(3, 8, stride=2, rngs=rngs)
        self.a = Inverted(8, 16, 8, 3, nnx.silu, rngs=rngs)
        self.b = Inverted(8, 16, 12, 5, nnx.silu, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.b(self.a(nnx.silu(self.stem(x)))).mean((1, 2)))


@miniature(6)
class MobileNetV3(nnx.Module):
    def __init__(self, rngs):
        self.stem = ConvNorm(3, 8, stride=2, rngs=rngs)
        self.a = Inverted(8, 16, 8, 3, nnx.relu, rngs=rngs)
        self.b = Inverted(8, 24, 12, 5, nnx.hard_swish, rngs=rngs)
        self.last, self.head = nnx.Linear(12, 20, rngs=rngs), nnx.Linear(20, 5, rngs=rngs)

    def __call__(self, x):
        x = self.b(self.a(nnx.hard_swish(self.stem(x))))
        return self.head(nnx.hard_swish(self.last(x.mean((1, 2)))))


@miniature(3)
class ConvNeXt(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (4, 4), 4, padding="VALID", rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.depthwise = nnx.List(
            [conv(8, 8, 7, rngs=rngs, feature_group_count=8) for _ in range(2)]
        )
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(2)])
        self.up = nnx.List([nnx.Linear(8, 16, rngs=rngs) for _ in range(2)])
        self.down = nnx.List([nnx.Linear(16, 8, rngs=rngs) for _ in range(2)])
        self.scale = nnx.List([nnx.Param(jnp.full(8, 0.1)) for _ in range(2)])
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.stem(x))
        for i in range(2):
            y = self.up[i](self.norms[i](self.depthwise[i](x)))
            x = x + self.scale[i][...] * self.down[i](nnx.gelu(y))
        return self.head(x.mean((1, 2)))


class Mlp(nnx.Module):
    def __init__(self, size, hidden, *, rngs):
        self.up, self.down = (
            nnx.Linear(size, hidden, rngs=rngs),
            nnx.Linear(hidden, size, rngs=rngs),
        )

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


@miniature(1, "reshape")
class VisionTransformer(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 16, (4, 4), 4, padding="VALID", rngs=rngs)
        self.token = nnx.Param(0.1 * jax.random.normal(rngs.params(), (1, 1, 16)))
        self.places = nnx.Param(0.1 * jax.random.normal(rngs.params(), (1, 17, 16)))
        self.norms = nnx.List([nnx.LayerNorm(16, rngs=rngs) for _ in range(3)])
        self.qkv, self.out = nnx.Linear(16, 48, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
        self.mlp, self.head = Mlp(16, 24, rngs=rngs), nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(x.shape[0], 16, -1)
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, self.token.shape[-1]))
        x = jnp.concatenate([token, x], 1) + self.places[...]
        q, k, v = jnp.moveaxis(self.qkv(self.norms[0](x)).reshape(*x.shape[:2], 3, 2, 8), 2, 0)
        weights = nnx.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(8.0), -1)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], 16)
        x = x + self.out(y)
        return self.head(self.norms[2](x + self.mlp(self.norms[1](x)))[:, 0])


@miniature(1, "reshape")
class ShiftedWindows(nnx.Module):
    """Attention within windows that a roll shifts, then patches merged, as in Swin."""

    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 8, (2, 2), 2, padding="VALID", rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(2)])
        self.qkv, self.out = nnx.Linear(8, 24, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.mlp = Mlp(8, 12, rngs=rngs)
        self.merge, self.head = nnx.Linear(32, 12, rngs=rngs), nnx.Linear(12, 5, rngs=rngs)

    def attention(self, x):
        x = jnp.roll(x, (-2, -2), (1, 2))
        n = x.shape[0]
        x = x.reshape(n, 2, 4, 2, 4, 8).swapaxes(2, 3).reshape(n * 4, 16, 8)
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(n * 4, 16, 3, 2, 4), 2, 0)
        weights = nnx.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0, -1)
        x = self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(n * 4, 16, 8))
        x = x.reshape(n, 2, 2, 4, 4, 8).swapaxes(2, 3).reshape(n, 8, 8, 8)
        return jnp.roll(x, (2, 2), (1, 2))

    def __call__(self, x):
        x = self.patches(x)
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.head(nnx.gelu(self.merge(jnp.concatenate(corners, -1))).mean((1, 2)))


@miniature(4, "add meets an axis that stays at")
class UNet(nnx.Module):
    def __init__(self, rngs):
        self.down, self.deep = ConvNorm(3, 8, rngs=rngs), ConvNorm(8, 12, rngs=rngs)
        self.up = nnx.ConvTranspose(12, 8, (2, 2), (2, 2), rngs=rngs)
        self.join, self.out = ConvNorm(16, 10, rngs=rngs), conv(10, 3, 1, rngs=rngs)

    def __call__(self, x):
        skip = nnx.relu(self.down(x))
        deep = nnx.relu(self.deep(nnx.max_pool(skip, (2, 2), (2, 2))))
        joined = jnp.concatenate([skip, self.up(deep)], -1)
        return x + self.out(nnx.relu(self.join(joined)))


def rotated(x, angles):
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1)


TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)


@miniature(1, "gather takes entries", (TOKENS,))
class Decoder(nnx.Module):
    """A language model with grouped queries, rotary embedding, a gated MLP and tied embedding."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(20, 16, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(16, rngs=rngs) for _ in range(3)])
        self.query = nnx.LinearGeneral(16, (4, 4), use_bias=False, rngs=rngs)
        self.key = nnx.LinearGeneral(16, (2, 4), use_bias=False, rngs=rngs)
        self.value = nnx.LinearGeneral(16, (2, 4), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((4, 4), 16, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.gate, self.up = (nnx.Linear(16, 24, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(24, 16, use_bias=False, rngs=rngs)

    def attention(self, x):
        steps = jnp.arange(x.shape[1])[:, None]
        angles = steps * jnp.asarray([1.0, 0.1])
        q, k, v = rotated(self.query(x), angles), rotated(self.key(x), angles), self.value(x)
        q = q.reshape(*q.shape[:2], 2, 2, 4)
        scores = jnp.einsum("bqgrd,bkgd->bgrqk", q, k) * 0.5
        scores = jnp.where(steps >= steps.T, scores, -1e9)
        y = jnp.einsum("bgrqk,bkgd->bqgrd", nnx.softmax(scores, -1), v)
        return self.out(y.reshape(*y.shape[:2], 4, 4))

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norms[0](x))
        y = self.norms[1](x)
        x = x + self.down(nnx.silu(self.gate(y)) * self.up(y))
        return self.embed.attend(self.norms[2](x))


@miniature(1, "", ((7, 5),))
class Gru(nnx.Module):
    def __init__(self, rngs):
        self.into = nnx.Linear(5, 8, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(8, 12, rngs=rngs))
        self.hidden, self.head = nnx.Linear(12, 10, rngs=rngs), nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        x = self.rnn(nnx.relu(self.into(x)))[:, -1]
        return self.head(nnx.relu(self.hidden(x)))


@miniature(1, "", ((7, 5),))
class Lstm(nnx.Module):
    def __init__(self, rngs):
        self.into = nnx.Linear(5, 8, rngs=rngs)
        self.rnn = nnx.RNN(nnx.LSTMCell(8, 12, rngs=rngs))
        self.hidden, self.head = nnx.Linear(12, 10, rngs=rngs), nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        x = self.rnn(nnx.relu(self.into(x)))[:, -1]
        return self.head(nnx.relu(self.hidden(x)))


@miniature(4)
class Detector(nnx.Module):
    """A pyramid of two levels, whose heads are shared by the levels."""

    def __init__(self, rngs):
        self.low, self.high = ConvNorm(3, 8, rngs=rngs), ConvNorm(8, 12, stride=2, rngs=rngs)
        self.laterals = nnx.List([conv(8, 10, 1, rngs=rngs), conv(12, 10, 1, rngs=rngs)])
        self.tower = conv(10, 10, rngs=rngs)
        self.classes, self.boxes = conv(10, 4, rngs=rngs), conv(10, 4, rngs=rngs)

    def __call__(self, x):
        low = nnx.relu(self.low(x))
        high = nnx.relu(self.high(low))
        top = self.laterals[1](high)
        below = self.laterals[0](low) + jnp.repeat(jnp.repeat(top, 2, 1), 2, 2)
        levels = [nnx.relu(self.tower(level)) for level in (below, top)]
        return {
            "classes": [self.classes(level) for level in levels],
            "boxes": [nnx.relu(self.boxes(level)) for level in levels],
        }


@miniature(3)
class Vae(nnx.Module):
    """Its noise is an input; mean and spread are halves of one layer."""

    def __init__(self, rngs):
        self.encode, self.code = conv(3, 8, stride=2, rngs=rngs), nnx.Linear(8, 12, rngs=rngs)
        self.decode, self.out = nnx.Linear(6, 8, rngs=rngs), conv(8, 3, rngs=rngs)

    def __call__(self, x):
        code = self.code(nnx.relu(self.encode(x)))
        mean, spread = jnp.split(code, 2, -1)
        y = nnx.relu(self.decode(mean + jnp.exp(0.5 * spread)))
        return self.out(jax.image.resize(y, (*x.shape[:3], y.shape[-1]), "nearest"))


def inputs_of(miniature: Miniature, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """Numbers for the inputs of a miniature, two examples."""
    rng, made = np.random.default_rng(0), []
    for given in miniature.inputs:
        if isinstance(given, tuple):
            made.append(jnp.asarray(rng.normal(size=(2, *given)), dtype))
        else:
            made.append(jnp.asarray(rng.integers(0, 20, given.shape), given.dtype))
    return tuple(made)
