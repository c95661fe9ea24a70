"""Networks as a user of the library has them, to be named in a configuration."""

from flax import linen, nnx
import jax.numpy as jnp

import dhp_jax as dhp


class Plain(nnx.Module):
    """Convolutions, BatchNorm, LayerNorm, attention over pixels and a hidden layer."""

    def __init__(self, size=8, *, num_classes, channels, rngs):
        self.stem = nnx.Conv(channels, size, (3, 3), strides=4, rngs=rngs)
        self.norm = nnx.BatchNorm(size, momentum=0.9, rngs=rngs)
        self.inner = nnx.LayerNorm(size, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, size, qkv_features=8, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(size, 2 * size, rngs=rngs)
        self.head = nnx.Linear(2 * size, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = x.reshape(len(x), -1, x.shape[-1])
        x = x + self.attention(self.inner(x))
        return self.head(nnx.relu(self.hidden(x.mean(1))))


class Sowing(nnx.Module):
    """A convolution, BatchNorm and dropout; a call leaves its features in it."""

    def __init__(self, *, num_classes, channels, rngs):
        self.stem = nnx.Conv(channels, 8, (3, 3), strides=4, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(8, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x))).mean((1, 2))
        self.sow(nnx.Intermediate, "features", x)
        return self.head(self.dropout(x))


class OnLatents(nnx.Module):
    """Two convolutions on latents."""

    def __init__(self, *, num_classes, channels, min_channels, rngs):
        image = dhp.Latent(channels, prunable=False, rngs=rngs)
        self.z1, self.z2 = (dhp.Latent(8, min_channels=min_channels, rngs=rngs) for _ in range(2))
        self.first = dhp.HyperConv(image, self.z1, (3, 3), strides=4, rngs=rngs)
        self.second = dhp.HyperConv(self.z1, self.z2, (3, 3), rngs=rngs)
        self.head = dhp.Linear(self.z2, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))).mean((1, 2)))


def of_two_each(num_classes, channels, rngs):
    return OnLatents(num_classes=num_classes, channels=channels, min_channels=2, rngs=rngs)


class InLinen(linen.Module):
    """The same kind of network in flax.linen."""

    num_classes: int

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Conv(8, (3, 3), strides=4, name="stem")(x)
        x = linen.relu(linen.BatchNorm(not train, momentum=0.9)(x))
        x = linen.relu(linen.Dense(16, name="hidden")(x.mean((1, 2))))
        return linen.Dense(self.num_classes)(linen.Dropout(0.1, deterministic=not train)(x))


def of_linen(num_classes, channels, rngs):
    module = InLinen(num_classes)
    variables = module.init(rngs.params(), jnp.ones((1, 8, 8, channels)))
    return dhp.FromLinen(module, variables, training={"train": True}, rngs=rngs)


def without_rngs(num_classes):
    return num_classes


def a_number(rngs):
    return 3


def of_three_classes(rngs):
    return Plain(num_classes=3, channels=1, rngs=rngs)


def failing(rngs):
    raise KeyError("no such layer")


class Restorer(nnx.Module):
    """Convolutions that restore images, and a pixel shuffle where they enlarge."""

    def __init__(self, size=6, *, channels, scale=1, rngs):
        self.scale = scale
        self.head = nnx.Conv(channels, size, (3, 3), rngs=rngs)
        self.body = nnx.Conv(size, size, (3, 3), rngs=rngs)
        self.tail = nnx.Conv(size, channels * scale**2, (3, 3), rngs=rngs)

    def __call__(self, x):
        n, h, w, c = x.shape
        x = nnx.relu(self.head(x))
        x = self.tail(x + nnx.relu(self.body(x)))
        x = x.reshape(n, h, w, c, self.scale, self.scale).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(n, h * self.scale, w * self.scale, c)


class RestorerOnLatents(Restorer):
    """The same on latents."""

    def __init__(self, size=6, *, channels, scale=1, min_channels, rngs):
        self.scale = scale
        image = dhp.Latent(channels, prunable=False, rngs=rngs)
        self.trunk = dhp.Latent(size, min_channels=min_channels, rngs=rngs)
        self.head = dhp.HyperConv(image, self.trunk, (3, 3), rngs=rngs)
        self.body = dhp.HyperConv(self.trunk, self.trunk, (3, 3), rngs=rngs)
        self.tail = dhp.HyperConv(self.trunk, dhp.repeat(image, scale**2), (3, 3), rngs=rngs)
