"""Awkward topologies, each with the sizes of the families that pruning may use."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    build: Callable[[nnx.Rngs], nnx.Module]
    sizes: list[int]  # of the families, sorted
    inputs: Callable[[], tuple[Any, ...]]


CASES: dict[str, Case] = {}


def images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def case(sizes: list[int], inputs: Callable[[], tuple[Any, ...]] | None = None) -> Callable:
    def register(build: type[nnx.Module]) -> type[nnx.Module]:
        CASES[build.__name__] = Case(build, sizes, inputs or (lambda: (images(2, 8, 8, 3),)))
        return build

    return register


def conv(into: int, out: int, size: int = 3, **options: Any) -> nnx.Conv:
    return nnx.Conv(into, out, (size, size), **options)


def linear(into: int, out: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(into, out, rngs=rngs)


@case([6, 8])
class Flatten(nnx.Module):
    # Each channel is 64 features in a row of stride 6.
    def __init__(self, rngs):
        self.a, self.b, self.c = conv(3, 6, rngs=rngs), linear(64 * 6, 8, rngs), linear(8, 4, rngs)

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        return self.c(nnx.relu(self.b(x.reshape(len(x), -1))))


@case([6])
class FlattenFixed(nnx.Module):
    # The code names the width of what is flattened, which therefore stays.
    def __init__(self, rngs):
        self.a, self.b, self.c, self.d = (
            conv(3, 6, rngs=rngs),
            conv(6, 6, rngs=rngs),
            linear(64 * 6, 4, rngs),
            0,
        )

    def __call__(self, x):
        return self.c(self.b(nnx.relu(self.a(x))).reshape(len(x), 64 * 6))


@case([4, 6])
class ChannelShuffle(nnx.Module):
    # 12 channels in 2 groups: channel j of one group goes with j of the other.
    def __init__(self, rngs):
        self.a, self.b, self.c = conv(3, 12, rngs=rngs), conv(12, 4, rngs=rngs), linear(4, 4, rngs)

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, 2, c // 2).swapaxes(3, 4).reshape(b, h, w, c)
        return self.c(nnx.relu(self.b(x)).mean((1, 2)))


@case([4, 4, 4, 6])
class SplitConcat(nnx.Module):
    # 12 split in [4, 4, 4] by numbers in the code... of equal parts, so that any width divides.
    def __init__(self, rngs):
        self.a = conv(3, 4, rngs=rngs)
        self.b, self.c = conv(3, 4, rngs=rngs), conv(8, 6, rngs=rngs)
        self.d = conv(4 + 6, 4, rngs=rngs)
        self.e = linear(4, 3, rngs)

    def __call__(self, x):
        p, q = nnx.relu(self.a(x)), nnx.relu(self.b(x))
        r = self.c(jnp.concatenate([p, q], -1))
        return self.e(nnx.relu(self.d(jnp.concatenate([p, r], -1))).mean((1, 2)))


@case([6])
class HalfSplit(nnx.Module):
    # Halves by the width: entries go in pairs (i, i + 6), for both halves are multiplied.
    def __init__(self, rngs):
        self.a, self.c = conv(3, 12, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        p, q = jnp.split(self.a(x), 2, -1)
        return self.c((p * nnx.sigmoid(q)).mean((1, 2)))


@case([7])
class FixedSplit(nnx.Module):
    # Split at 5, a number in the code: the first 5 stay, the rest may lose some.
    def __init__(self, rngs):
        self.a, self.c, self.d = conv(3, 12, rngs=rngs), linear(5, 3, rngs), linear(7, 3, rngs)

    def __call__(self, x):
        p, q = jnp.split(self.a(x).mean((1, 2)), [5], -1)
        return self.c(p) + self.d(q)


@case([2, 8])
class SqueezeExcite(nnx.Module):
    def __init__(self, rngs):
        self.a, self.r, self.e, self.c = (
            conv(3, 8, rngs=rngs),
            linear(8, 2, rngs),
            linear(2, 8, rngs),
            linear(8, 3, rngs),
        )

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        s = nnx.sigmoid(self.e(nnx.relu(self.r(x.mean((1, 2))))))
        return self.c((x * s[:, None, None]).mean((1, 2)))


@case([4, 8])
class OptionA(nnx.Module):
    # 8 channels, padded to 16 in the middle: the 8 go with channels 4..11; the others may not go.
    def __init__(self, rngs):
        self.a, self.b, self.m, self.c = (
            conv(3, 8, rngs=rngs),
            conv(8, 4, strides=2, rngs=rngs),
            conv(4, 16, rngs=rngs),
            linear(16, 3, rngs),
        )

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        y = self.m(nnx.relu(self.b(x)))
        x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (4, 4)))
        return self.c(nnx.relu(x + y).mean((1, 2)))


@case([8, 8])
class OptionAShape(nnx.Module):
    # Padded at the end to the width of the other branch: both parts may go.
    def __init__(self, rngs):
        self.a, self.m, self.c = conv(3, 8, rngs=rngs), conv(8, 16, rngs=rngs), linear(16, 3, rngs)

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        y = self.m(x)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, y.shape[-1] - x.shape[-1])))
        return self.c(nnx.relu(x + y).mean((1, 2)))


@case([5])
class DepthwiseTwice(nnx.Module):
    # Multiplier 2: channel i with outputs 2 i and 2 i + 1.
    def __init__(self, rngs):
        self.a, self.d, self.c = (
            conv(3, 5, rngs=rngs),
            conv(5, 10, feature_group_count=5, rngs=rngs),
            linear(10, 3, rngs),
        )

    def __call__(self, x):
        return self.c(nnx.relu(self.d(nnx.relu(self.a(x)))).mean((1, 2)))


@case([4])
class Grouped(nnx.Module):
    # 4 groups of 3 in and 2 out.
    def __init__(self, rngs):
        self.a, self.d, self.c = (
            conv(3, 12, rngs=rngs),
            conv(12, 8, feature_group_count=4, rngs=rngs),
            linear(8, 3, rngs),
        )

    def __call__(self, x):
        return self.c(nnx.relu(self.d(nnx.relu(self.a(x)))).mean((1, 2)))


@case([2])
class GroupedShuffledGrouped(nnx.Module):
    # ShuffleNet v1: 2 groups of 4, shuffled, 4 groups of 2. Of these, each loses as many filters.
    def __init__(self, rngs):
        self.a, self.d, self.e, self.c = (
            conv(3, 8, rngs=rngs),
            conv(8, 8, feature_group_count=2, rngs=rngs),
            conv(8, 8, feature_group_count=4, rngs=rngs),
            linear(8, 3, rngs),
        )

    def __call__(self, x):
        x = self.d(self.a(x))
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, 2, c // 2).swapaxes(3, 4).reshape(b, h, w, c)
        return self.c(self.e(x).mean((1, 2)))


@case([4, 5])
class PixelShuffle(nnx.Module):
    # 20 channels: 5 of 4 in a row (torch's order).
    def __init__(self, rngs):
        self.a, self.b, self.c, self.d = (
            conv(3, 4, rngs=rngs),
            conv(4, 20, rngs=rngs),
            conv(5, 3, rngs=rngs),
            0,
        )

    def __call__(self, x):
        x = self.b(nnx.relu(self.a(x)))
        b, h, w, c = x.shape
        x = (
            x.reshape(b, h, w, c // 4, 2, 2)
            .transpose(0, 1, 4, 2, 5, 3)
            .reshape(b, 2 * h, 2 * w, c // 4)
        )
        return self.c(nnx.relu(x))


@case([4, 5])
class DepthToSpace(nnx.Module):
    # TensorFlow's order: 4 of 5.
    def __init__(self, rngs):
        self.a, self.b, self.c = (
            conv(3, 4, rngs=rngs),
            conv(4, 20, rngs=rngs),
            conv(5, 3, rngs=rngs),
        )

    def __call__(self, x):
        x = self.b(nnx.relu(self.a(x)))
        b, h, w, c = x.shape
        x = (
            x.reshape(b, h, w, 2, 2, c // 4)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(b, 2 * h, 2 * w, c // 4)
        )
        return self.c(nnx.relu(x))


@case([6, 6])
class SpaceToDepth(nnx.Module):
    # Patch merging as in Swin: each channel 4 times.
    def __init__(self, rngs):
        self.a, self.b, self.c = conv(3, 6, rngs=rngs), linear(24, 6, rngs), linear(6, 3, rngs)

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        x = jnp.concatenate(
            [x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]], -1
        )
        return self.c(nnx.relu(self.b(x)).mean((1, 2)))


@case([6])
class TwoHeads(nnx.Module):
    # A dict of outputs, and one of them the features of `b`, which therefore stay.
    def __init__(self, rngs):
        self.a, self.b, self.c, self.d = (
            conv(3, 6, rngs=rngs),
            conv(6, 5, rngs=rngs),
            linear(6, 3, rngs),
            linear(5, 2, rngs),
        )

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        y = self.b(x)
        return {"boxes": self.c(x.mean((1, 2))), "features": y, "label": self.d(y.mean((1, 2)))}


@case([6])
class SharedTwice(nnx.Module):
    # One layer called twice: its inputs and outputs are one axis.
    def __init__(self, rngs):
        self.a, self.s, self.c = conv(3, 6, rngs=rngs), conv(6, 6, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        x = self.s(nnx.relu(self.s(nnx.relu(self.a(x)))))
        return self.c(x.mean((1, 2)))


@case([3, 5, 8, 12], lambda: (images(2, 7, 12),))
class EinsumAttention(nnx.Module):
    # By einsum, scale a number: heads, dimensions of q and k, of v; and both in the order given.
    def __init__(self, rngs):
        def r(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / 3)

        self.inp = linear(12, 12, rngs)
        self.q, self.k, self.v, self.o = r(12, 3, 8), r(12, 3, 8), r(12, 3, 5), r(3, 5, 12)
        self.out = linear(12, 4, rngs)

    def __call__(self, x):
        x = self.inp(x)
        q, k, v = (jnp.einsum("btd,dhe->bthe", x, w[...]) for w in (self.q, self.k, self.v))
        a = nnx.softmax(jnp.einsum("bthe,bshe->bhts", q, k) * 0.35, -1)
        return self.out(x + jnp.einsum("bhts,bshe,hed->btd", a, v, self.o[...]))


@case([8], lambda: (images(2, 7, 12),))
class HeadsByReshape(nnx.Module):
    # Reshape(b, t, 3, -1): head dims may go, heads not; scale is a number.
    def __init__(self, rngs):
        self.q, self.k, self.v, self.o = (
            linear(12, 24, rngs),
            linear(12, 24, rngs),
            linear(12, 24, rngs),
            linear(24, 4, rngs),
        )

    def __call__(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).reshape(b, t, 3, -1) for f in (self.q, self.k, self.v))
        a = nnx.softmax(jnp.einsum("bthe,bshe->bhts", q, k) * 0.35, -1)
        return self.o(jnp.einsum("bhts,bshe->bthe", a, v * q).reshape(b, t, -1))


@case([], lambda: (images(2, 8, 12),))
class SwallowedByTime(nnx.Module):
    # Reshape(b, -1, 3, 8): a narrower q makes fewer steps of time, and no error.
    def __init__(self, rngs):
        self.q, self.o = linear(12, 24, rngs), linear(8, 4, rngs)

    def __call__(self, x):
        return self.o(self.q(x).reshape(len(x), -1, 3, 8)).mean((1, 2))


@case([6, 8])
class Norms(nnx.Module):
    def __init__(self, rngs):
        self.a, self.n, self.b, self.g, self.c = (
            conv(3, 6, rngs=rngs),
            nnx.LayerNorm(6, rngs=rngs),
            conv(6, 8, rngs=rngs),
            nnx.RMSNorm(8, rngs=rngs),
            linear(8, 3, rngs),
        )

    def __call__(self, x):
        return self.c(self.g(nnx.relu(self.b(self.n(self.a(x))))).mean((1, 2)))


@case([3, 4])
class GroupNormed(nnx.Module):
    # 4 groups of 3: whole groups (exact), or the same channel of every group (renormalises).
    def __init__(self, rngs):
        self.a, self.n, self.c = (
            conv(3, 12, rngs=rngs),
            nnx.GroupNorm(12, 4, rngs=rngs),
            linear(12, 3, rngs),
        )

    def __call__(self, x):
        return self.c(nnx.relu(self.n(self.a(x))).mean((1, 2)))


@case([6])
class HalvesApart(nnx.Module):
    # Halves by the width that meet nowhere: any i of one with any j of the other, so pairs.
    def __init__(self, rngs):
        self.a, self.c, self.d = conv(3, 12, rngs=rngs), linear(6, 3, rngs), linear(6, 3, rngs)

    def __call__(self, x):
        p, q = jnp.split(self.a(x).mean((1, 2)), 2, -1)
        return self.c(nnx.relu(p)) + self.d(q)


@case([])
class ConstantOnChannels(nnx.Module):
    def __init__(self, rngs):
        self.a, self.c = conv(3, 6, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        return self.c((self.a(x) * np.arange(1.0, 7.0, dtype=np.float32)).mean((1, 2)))


@case([])
class RampOnChannels(nnx.Module):
    # Fits every width, and means something else at each.
    def __init__(self, rngs):
        self.a, self.c = conv(3, 6, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        x = self.a(x)
        return self.c((x * jnp.linspace(0.5, 1, x.shape[-1])).mean((1, 2)))


@case([])
class WidthInANumber(nnx.Module):
    # Fits every width, and scales otherwise at each.
    def __init__(self, rngs):
        self.a, self.c = conv(3, 6, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        x = self.a(x)
        return self.c((x * x.shape[-1] ** -0.5).mean((1, 2)))


@case([])
class WidthInAnIf(nnx.Module):
    def __init__(self, rngs):
        self.a, self.c = conv(3, 6, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        x = self.a(x)
        x = nnx.relu(x) if x.shape[-1] == 6 else x
        return self.c(x.mean((1, 2)))


@case([6])
class SoftmaxOfChannels(nnx.Module):
    def __init__(self, rngs):
        self.a, self.c = conv(3, 6, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        return self.c((nnx.softmax(self.a(x), -1)).mean((1, 2)))


@case([6])
class SelectiveKernels(nnx.Module):
    # Softmax over two branches, not over channels.
    def __init__(self, rngs):
        self.a, self.b, self.f, self.c = (
            conv(3, 6, rngs=rngs),
            conv(3, 6, rngs=rngs),
            linear(6, 12, rngs),
            linear(6, 3, rngs),
        )

    def __call__(self, x):
        u = jnp.stack([self.a(x), self.b(x)], 1)
        s = u.sum(1).mean((1, 2))
        w = nnx.softmax(self.f(s).reshape(len(x), 2, -1), 1)
        return self.c((u * w[:, :, None, None]).sum(1).mean((1, 2)))


@case([6])
class Cbam(nnx.Module):
    # Largest channel at each pixel.
    def __init__(self, rngs):
        self.a, self.s, self.c = conv(3, 6, rngs=rngs), conv(2, 1, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        x = self.a(x)
        s = nnx.sigmoid(self.s(jnp.stack([x.mean(-1), x.max(-1)], -1)))
        return self.c((x * s).mean((1, 2)))


@case([9], lambda: (jnp.arange(10).reshape(2, 5),))
class TiedEmbedding(nnx.Module):
    # The vocabulary stays (it is looked up and put out), the features may go.
    def __init__(self, rngs):
        self.e, self.l = nnx.Embed(11, 9, rngs=rngs), linear(9, 9, rngs)

    def __call__(self, ids):
        x = self.e(ids)
        return self.e.attend(x + self.l(x))


@case([6, 8])
class RawArrays(nnx.Module):
    # Arrays of layers that are never called, as in Swin.
    def __init__(self, rngs):
        self.a, self.l, self.g, self.c = (
            linear(3, 6, rngs),
            linear(6, 8, rngs),
            nnx.Param(jnp.ones(8)),
            linear(8, 3, rngs),
        )

    def __call__(self, x):
        x = x.mean((1, 2)) @ self.a.kernel[...]
        return self.c(nnx.relu(x @ self.l.kernel[...] + self.l.bias[...]) * self.g[...])


@case([6])
class InterleavedGlu(nnx.Module):
    # X[..., ::2] * sigmoid(x[..., 1::2]): neighbours go together.
    def __init__(self, rngs):
        self.a, self.c = conv(3, 12, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        x = self.a(x)
        return self.c((x[..., ::2] * nnx.sigmoid(x[..., 1::2])).mean((1, 2)))


@case([])
class ShiftSome(nnx.Module):
    # The first eighth of the channels is shifted: which those are depends on the width.
    def __init__(self, rngs):
        self.a, self.c = conv(3, 16, rngs=rngs), linear(16, 3, rngs)

    def __call__(self, x):
        x = self.a(x)
        f = x.shape[-1] // 8
        return self.c(jnp.concatenate([jnp.roll(x[..., :f], 1, 1), x[..., f:]], -1).mean((1, 2)))


@case([5, 6])
class WeightStandardised(nnx.Module):
    # A norm of the kernel over its own input channels.
    def __init__(self, rngs):
        self.a, self.k, self.c = (
            conv(3, 6, rngs=rngs),
            nnx.Param(jax.random.normal(rngs.params(), (3, 3, 6, 5))),
            linear(5, 3, rngs),
        )

    def __call__(self, x):
        k = self.k[...]
        k = (k - k.mean((0, 1, 2))) / jnp.sqrt(k.var((0, 1, 2)) + 1e-5)
        x = jax.lax.conv_general_dilated(
            nnx.relu(self.a(x)), k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return self.c(x.mean((1, 2)))


@case([7], lambda: (images(2, 10),))
class TiedAutoencoder(nnx.Module):
    # A kernel and its transpose.
    def __init__(self, rngs):
        self.e, self.b = linear(10, 7, rngs), nnx.Param(jnp.zeros(10))

    def __call__(self, x):
        return nnx.relu(self.e(x)) @ self.e.kernel[...].T + self.b[...]


@case([5, 6])
class Film(nnx.Module):
    def __init__(self, rngs):
        self.a, self.h, self.f, self.c = (
            conv(3, 6, rngs=rngs),
            linear(3, 5, rngs),
            linear(5, 12, rngs),
            linear(6, 3, rngs),
        )

    def __call__(self, x):
        g, b = jnp.split(self.f(nnx.relu(self.h(x.mean((1, 2)))))[:, None, None], 2, -1)
        return self.c((self.a(x) * (1 + g) + b).mean((1, 2)))


@case([6])
class BilinearPooling(nnx.Module):
    # Position (i, j) of the features is the product of channels i and j.
    def __init__(self, rngs):
        self.a, self.c = conv(3, 6, rngs=rngs), linear(36, 3, rngs)

    def __call__(self, x):
        x = self.a(x)
        return self.c(jnp.einsum("bhwc,bhwd->bcd", x, x).reshape(len(x), -1))


@case([7], lambda: (images(2, 9, 5),))
class Lstm(nnx.Module):
    def __init__(self, rngs):
        self.r, self.c = nnx.RNN(nnx.LSTMCell(5, 7, rngs=rngs)), linear(7, 3, rngs)

    def __call__(self, x):
        return self.c(self.r(x)[:, -1])


@case([6, 8])
class Transformed(nnx.Module):
    # Within nnx.jit, nnx.remat and lax.cond.
    def __init__(self, rngs):
        self.a, self.b, self.c = conv(3, 6, rngs=rngs), conv(6, 8, rngs=rngs), linear(8, 3, rngs)

    def __call__(self, x):
        x = nnx.jit(lambda m, x: nnx.relu(m(x)))(self.a, x)
        x = nnx.remat(lambda m, x: nnx.relu(m(x)))(self.b, x)
        return jax.lax.cond(x.sum() > 0, lambda x: x, lambda x: 2 * x, self.c(x.mean((1, 2))))


@case([7], lambda: (images(2, 5),))
class Ensemble(nnx.Module):
    # Nnx.vmap over members: members are summed, so they may go, as hidden features may.
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(axis_size=3)
        def make(rngs):
            return linear(5, 7, rngs)

        self.m, self.c = make(rngs), linear(7, 2, rngs)

    def __call__(self, x):
        y = nnx.vmap(lambda m, x: nnx.relu(m(x)), in_axes=(0, None))(self.m, x)
        return self.c(y.sum(0))


@case([6, 6])
class ChannelsFirst(nnx.Module):
    def __init__(self, rngs):
        self.a, self.n, self.c, self.d = (
            conv(3, 6, rngs=rngs),
            nnx.BatchNorm(6, axis=1, use_running_average=True, rngs=rngs),
            linear(6, 6, rngs),
            linear(6, 3, rngs),
        )

    def __call__(self, x):
        x = nnx.relu(self.n(jnp.moveaxis(self.a(x), -1, 1)))
        return self.d(nnx.relu(self.c(x.mean((2, 3)))))


@case([6])
class MaskFromWidth(nnx.Module):
    # Zeros_like of the features beside them: no equation, but as many of both.
    def __init__(self, rngs):
        self.a, self.c = conv(3, 6, rngs=rngs), linear(12, 3, rngs)

    def __call__(self, x):
        x = self.a(x)
        return self.c(jnp.concatenate([x, jnp.zeros_like(x)], -1).mean((1, 2)))


@case([6])
class ConvTransposed(nnx.Module):
    def __init__(self, rngs):
        self.a, self.u = (
            conv(3, 6, rngs=rngs),
            nnx.ConvTranspose(6, 3, (2, 2), strides=(2, 2), rngs=rngs),
        )

    def __call__(self, x):
        return self.u(nnx.relu(self.a(x)))


@case([2, 2, 3, 4], lambda: (images(2, 5, 3),))
class SizesBeside(nnx.Module):
    # Of heads that share keys, in numbers; of groups, in a layer without arrays.
    def __init__(self, rngs):
        self.norm = nnx.GroupNorm(12, 3, use_scale=False, use_bias=False, rngs=rngs)
        self.a, self.q, self.o = linear(3, 12, rngs), linear(12, 8, rngs), linear(8, 3, rngs)
        self.k, self.v = linear(12, 4, rngs), linear(12, 4, rngs)
        self.heads, self.shared = 4, 2

    def __call__(self, x):
        x = self.norm(self.a(x))
        split = lambda y, heads: y.reshape(*y.shape[:2], heads, -1)  # noqa: E731
        q, k, v = (
            split(self.q(x), self.heads),
            *(split(f(x), self.shared) for f in (self.k, self.v)),
        )
        k, v = (jnp.repeat(y, self.heads // self.shared, axis=2) for y in (k, v))
        y = jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k)), v)
        return self.o(y.reshape(*y.shape[:2], -1))


@dataclasses.dataclass(frozen=True)
class Widths:
    width: int = 12
    heads: int = 3
    blocks: int = 3
    patch: tuple[int, int] = (3, 12)


class ConfiguredAttention(nnx.Module):
    def __init__(self, config, rngs):
        self.config = config
        self.q, self.k, self.v = (linear(8, config.width, rngs) for _ in "qkv")
        self.o = linear(config.width, 8, rngs)

    def __call__(self, x):
        heads = self.config.heads
        split = lambda y: y.reshape(*y.shape[:2], heads, self.config.width // heads)  # noqa: E731
        q, k, v = (split(layer(x)) for layer in (self.q, self.k, self.v))
        weights = nnx.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return x + self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1))


@case([3, 3, 3, 8], lambda: (images(2, 5, 3),))
class SizesInAConfig(nnx.Module):
    # That all blocks share; as many blocks as heads, which is no size of an axis.
    def __init__(self, rngs, config=Widths()):
        self.config = config
        self.a, self.b = linear(3, 8, rngs), linear(8, 3, rngs)
        self.blocks = nnx.List([ConfiguredAttention(config, rngs) for _ in range(config.blocks)])

    def __call__(self, x):
        x = self.a(x)
        for block in range(self.config.blocks):
            x = self.blocks[block](x)
        return self.b(x)


@case([6, 8])
class Spectral(nnx.Module):
    # Of the lowest frequencies only, over pixels; then blurred, one kernel for each channel.
    def __init__(self, rngs):
        self.a, self.c = linear(3, 6, rngs), linear(8, 3, rngs)
        shape = (3, 3, 6, 8)
        self.re, self.im = (nnx.Param(jax.random.normal(rngs(), shape)) for _ in range(2))

    def __call__(self, x):
        low = jnp.fft.rfft2(self.a(x), axes=(1, 2))[:, :3, :3]
        y = jnp.einsum("bhwi,hwio->bhwo", low, self.re[...] + 1j * self.im[...])
        y = jnp.zeros((len(x), 8, 5, y.shape[-1]), y.dtype).at[:, :3, :3].set(y)
        y = jnp.fft.irfft2(y, axes=(1, 2))
        blur = jnp.tile(jnp.full((3, 3, 1, 1), 1 / 9, y.dtype), (1, 1, 1, y.shape[-1]))
        y = jax.lax.conv_general_dilated(
            y,
            *(blur, (2, 2), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=y.shape[-1],
        )
        return self.c(nnx.relu(y))


@case([6, 8], lambda: (images(5, 3), jnp.array([[0, 1], [2, 1], [4, 0]])))
class Messages(nnx.Module):
    # Between nodes of a graph; the largest two of each channel at the end.
    def __init__(self, rngs):
        self.a, self.m, self.c = linear(3, 6, rngs), linear(12, 8, rngs), linear(28, 3, rngs)

    def __call__(self, x, edges):
        x = nnx.relu(self.a(x))
        sent = nnx.relu(self.m(jnp.concatenate([x[edges[:, 0]], x[edges[:, 1]]], -1)))
        got = jax.ops.segment_sum(sent, edges[:, 1], num_segments=len(x))
        most, _ = jax.lax.top_k(jnp.concatenate([x, got], -1).T, 2)
        return self.c(most.reshape(-1))


@case([8], lambda: (images(2, 4, 4, 3),))
class OneAfterTheOther(nnx.Module):
    # Nnx.scan over stacked layers.
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(axis_size=3)
        def make(rngs):
            return linear(8, 8, rngs)

        self.a, self.m, self.c = linear(3, 8, rngs), make(rngs), linear(8, 2, rngs)

    def __call__(self, x):
        f = nnx.scan(lambda x, m: (x + nnx.relu(m(x)), None), in_axes=(nnx.Carry, 0))
        return self.c(f(self.a(x), self.m)[0])


@case([])
class WidthOutOfABranch(nnx.Module):
    # A number that fits every width comes out of a branch.
    def __init__(self, rngs):
        self.a, self.c = conv(3, 6, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        x = self.a(x)
        width = jnp.asarray(x.shape[-1], x.dtype)
        scale = jax.lax.cond(x.sum() > 0, lambda: jnp.sqrt(width), lambda: width)
        return self.c((x * scale).mean((1, 2)))


@case([])
class WidthOutOfALoop(nnx.Module):
    # And out of the steps of a loop.
    def __init__(self, rngs):
        self.a, self.c = conv(3, 6, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        x = self.a(x)
        width = jnp.asarray(x.shape[-1], x.dtype)
        _, scales = jax.lax.scan(lambda carry, _: (carry, jnp.sqrt(width)), 0.0, length=2)
        return self.c((x * scales.sum()).mean((1, 2)))


@case([])
class WidthInAnUpdate(nnx.Module):
    # And into a function that is applied to one pixel.
    def __init__(self, rngs):
        self.a, self.c = conv(3, 6, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        x = self.a(x)
        width = float(x.shape[-1])
        return self.c(x.at[:, 0, 0].apply(lambda pixel: pixel / width).mean((1, 2)))


@case([6])
class DepthwiseOfOneKernel(nnx.Module):
    # Two layers of one variable, which both have a number of groups.
    def __init__(self, rngs):
        self.a, self.c = conv(3, 6, rngs=rngs), linear(6, 3, rngs)
        self.first, self.second = (conv(6, 6, feature_group_count=6, rngs=rngs) for _ in range(2))
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        x = self.second(nnx.relu(self.first(nnx.relu(self.a(x)))))
        return self.c(x.mean((1, 2)))


@case([6])
class Printing(nnx.Module):
    # Numbers that are shown compute nothing, also where they are the width.
    def __init__(self, rngs):
        self.a, self.c = conv(3, 6, rngs=rngs), linear(6, 3, rngs)

    def __call__(self, x):
        x = self.a(x)
        jax.debug.print("{mean} of {width}", mean=x.mean(), width=jnp.sqrt(x.shape[-1]))
        jax.debug.callback(lambda x: None, x)
        return self.c(x.mean((1, 2)))


@case([6])
class PartsOfAWidth(nnx.Module):
    # As many parts as there are channels, of which the code takes the first and the last one.
    def __init__(self, rngs):
        self.a, self.b = linear(3, 6, rngs), linear(6, 8, rngs)
        self.c = linear(8, 3, rngs)

    def __call__(self, x):
        x = nnx.relu(self.b(nnx.relu(self.a(x.mean((1, 2))))))
        first, *_, last = jnp.split(x, x.shape[-1], -1)
        return self.c(x) + first * last


@case([2, 4, 6, 7])
class Unstacked(nnx.Module):
    # Queries, keys and values of one kernel, taken apart; gates of two kernels that are stacked.
    def __init__(self, rngs):
        def draw(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / 2)

        self.a, self.c = linear(3, 6, rngs), linear(7, 3, rngs)
        self.qkv, self.out = draw(6, 3, 2, 4), draw(2, 4, 6)
        self.gate, self.up = draw(6, 7), draw(6, 7)

    def __call__(self, x):
        x = self.a(x.mean(1))
        q, k, v = jnp.unstack(jnp.einsum("btd,dshk->btshk", x, self.qkv[...]), axis=2)
        weights = nnx.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k) / 2)
        values = jnp.einsum("bhqs,bshk->bqhk", weights, v)
        x = x + jnp.einsum("bqhk,hkd->bqd", values, self.out[...])
        both = x @ jnp.stack([self.gate[...], self.up[...]])[:, None]
        gate, up = jnp.unstack(both)
        return self.c(nnx.silu(gate) * up).mean(1)


@case([3, 5, 6, 7])
class KernelOfEach(nnx.Module):
    # Each example has a kernel of its own: mixed of several, or scaled by a style.
    def __init__(self, rngs):
        def draw(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / 4)

        self.a, self.route = conv(3, 6, rngs=rngs), linear(6, 3, rngs)
        self.mixed, self.style, self.scaled = draw(3, 3, 3, 6, 5), linear(6, 5, rngs), draw(5, 7)
        self.c = linear(7, 3, rngs)

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        of_image = x.mean((1, 2))
        kernels = jnp.einsum("be,eijmo->bijmo", nnx.sigmoid(self.route(of_image)), self.mixed[...])
        style, shared = self.style(of_image), jnp.ones((len(x), 1, 1, 1))

        def each(x, kernel, style, shared):
            x = nnx.relu(_convolved(x[None], kernel)) * shared
            return _convolved(x, (self.scaled[...] * style[:, None])[None, None])[0]

        return self.c(nnx.relu(jax.vmap(each)(x, kernels, style, shared)).mean((1, 2)))


def _convolved(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


@case([3, 6])
class EnsembleOfConvolutions(nnx.Module):
    # Under nnx.vmap, on one input: the second ones are groups of one convolution.
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(axis_size=3)
        def make(rngs):
            return nnx.Sequential(conv(3, 6, rngs=rngs), nnx.relu, conv(6, 2, rngs=rngs))

        self.members = make(rngs)

    def __call__(self, x):
        each = nnx.vmap(lambda member, x: nnx.relu(member(x)), in_axes=(0, None))
        return each(self.members, x).sum(0)


@case([5, 6], lambda: (images(2, 6, 6, 3),))
class GradientOfAnEnergy(nnx.Module):
    # Which jax.grad computes in the forward pass, through a maximum in windows.
    def __init__(self, rngs):
        self.a, self.b = conv(3, 6, rngs=rngs), conv(6, 5, rngs=rngs)
        self.c = linear(5, 1, rngs)

    def energy(self, x):
        x = nnx.max_pool(nnx.tanh(self.a(x)), (2, 2), (2, 2))
        return self.c(nnx.tanh(self.b(x))).sum()

    def __call__(self, x):
        return x - jax.grad(self.energy)(x)


@case([6], lambda: (images(5, 3),))
class ComputedForNothing(nnx.Module):
    # Of the width of channels, and dropped.
    def __init__(self, rngs):
        self.a, self.b = linear(3, 6, rngs), linear(6, 2, rngs)

    def __call__(self, x):
        @jax.jit
        def hidden(x):
            x = nnx.relu(self.a(x))
            jnp.zeros(x.shape[1:]) + 1
            return x

        x = hidden(x)
        jnp.ones((2, x.shape[-1])).sum(0)
        return self.b(x)


@case([6], lambda: (images(2, 5, 3),))
class StateLikeTheInput(nnx.Module):
    # Of a loop, which begins with zeros of the width of another layer, so both are one.
    def __init__(self, rngs):
        self.a, self.b, self.c = linear(3, 6, rngs), linear(6, 6, rngs), linear(6, 2, rngs)

    def __call__(self, x):
        x = self.a(x)
        decay = lambda state, x: (nnx.tanh(state / 2 + x), None)  # noqa: E731
        state, _ = jax.lax.scan(decay, jnp.zeros_like(x[:, 0]), self.b(x).swapaxes(0, 1))
        return self.c(state)


@case([6, 7])
class RowsOfExperts(nnx.Module):
    # Rows go in groups, each through the matrices of its expert.
    def __init__(self, rngs):
        def draw(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / 2)

        self.a, self.first, self.second = linear(3, 6, rngs), draw(2, 6, 7), draw(2, 7, 6)
        self.c = linear(6, 3, rngs)

    def __call__(self, x):
        x = self.a(x.mean(1).reshape(-1, 3))
        hidden = nnx.relu(jax.lax.ragged_dot(x, self.first[...], jnp.array([5, 11])))
        return self.c(x + jax.lax.ragged_dot(hidden, self.second[...], jnp.array([5, 11])))


@case([6, 7], lambda: (jnp.asarray(np.random.default_rng(0).integers(9, size=(3, 4))),))
class RowOfEach(nnx.Module):
    # Under jax.vmap each example looks up rows, and writes and reads one of a buffer.
    def __init__(self, rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (9, 6)))
        self.b, self.c = linear(6, 7, rngs), linear(7, 2, rngs)

    def __call__(self, tokens):
        def each(tokens, row):
            x = jax.vmap(lambda token: jax.lax.dynamic_index_in_dim(self.table[...], token))(tokens)
            x = nnx.relu(self.b(x[:, 0]))
            written = jax.lax.dynamic_update_slice(x, 2 * x[:1], (row, 0))
            return self.c(jax.lax.dynamic_slice(written, (row + 1, 0), (2, x.shape[-1])).sum(0))

        return jax.vmap(each)(tokens, tokens[:, 0] % 3)


@case([2, 2, 4])
class MaskOfEachChannel(nnx.Module):
    # It is broadcast along heads, or channels, unless one of them is left.
    def __init__(self, rngs):
        self.into, self.out = (
            nnx.Param(jax.random.normal(rngs.params(), shape)) for shape in ((3, 2, 4), (2, 4, 2))
        )
        self.c = linear(2, 3, rngs)

    def __call__(self, x):
        x = x.mean(1)
        heads = jnp.tensordot(x, self.into[...], 1)
        heads = jnp.where(x[..., :1, None] > 0, heads, heads / 2)
        heads = jax.lax.dot_general(heads, self.out[...], (((2, 3), (0, 1)), ((), ())))
        return self.c(jnp.where(x[..., :1] > 0, heads, heads / 2))
