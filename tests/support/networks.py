"""Tiny networks, drawn values and a jitted forward pass that several test modules share."""

import contextlib
import functools
from types import SimpleNamespace
from unittest import mock

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import dhp_jax as dhp
from dhp_jax.models import mobilenet, resnet

RNGS = SimpleNamespace(params=lambda: jax.random.key(0))  # `nnx.Rngs` takes seconds to trace


class Mixed(nnx.Module):
    """A concatenation, an addition, a flattening: 4x4 images of 3 channels to 5 scores."""

    def __init__(self, rngs):
        image = dhp.Latent(3, prunable=False, rngs=rngs)
        a, b, c = (dhp.Latent(size, min_channels=2, rngs=rngs) for size in (7, 5, 6))
        self.left = dhp.HyperConv(image, a, (3, 3), use_bias=False, rngs=rngs)
        self.left_norm = dhp.BatchNorm(a, momentum=0.9, rngs=rngs)
        self.right = dhp.HyperConv(image, b, (1, 1), rngs=rngs)
        self.join = dhp.HyperConv(dhp.concat(a, b), c, (3, 3), 2, padding=1, rngs=rngs)
        self.join_norm = dhp.BatchNorm(c, momentum=0.9, rngs=rngs)
        self.refine = dhp.HyperConv(c, c, (3, 3), rngs=rngs)
        self.classifier = dhp.Linear(dhp.concat(*[c] * 4), 5, rngs=rngs)

    def __call__(self, x, mask=lambda name, h: h):
        a = mask("a", nnx.relu(self.left_norm(self.left(x))))
        b = mask("b", nnx.relu(self.right(x)))
        c = mask("c", nnx.relu(self.join_norm(self.join(jnp.concatenate([a, b], -1)))))
        c = mask("c", c + self.refine(c))
        return self.classifier(c.reshape(len(c), -1))


@contextlib.contextmanager
def short():
    """Deep networks are built with fewer blocks, some of every kind; so they compile quickly."""
    with (
        mock.patch.dict(resnet.BLOCKS, {50: (2, 1, 1, 1)}),
        mock.patch.object(mobilenet, "V1_BLOCKS", mobilenet.V1_BLOCKS[:4]),
        mock.patch.object(mobilenet, "V2_GROUPS", mobilenet.V2_GROUPS[:3]),
    ):
        yield


class Net(nnx.Module):
    """Layers by name and a function that calls them."""

    def __init__(self, forward, **layers):
        self.forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, x):
        return self.forward(self, x)


def image_and(*sizes, rngs, **options):
    """An image latent of 3 channels and prunable ones of the given sizes."""
    image = dhp.Latent(3, prunable=False, rngs=rngs)
    return image, *(dhp.Latent(size, min_channels=1, rngs=rngs, **options) for size in sizes)


def conv(z_in, z_out, rngs, kernel=1, **options):
    return dhp.HyperConv(z_in, z_out, (kernel, kernel), rngs=rngs, **options)


MIXED_LATENTS = {"image": "left.z_in", "a": "left.z_out", "b": "right.z_out", "c": "join.z_out"}
MIXED_INPUT = (4, 4, 3)


class PlainMixed(nnx.Module):
    """`Mixed` of the given widths, written with ordinary layers."""

    def __init__(self, a, b, c, rngs):
        self.left = nnx.Conv(3, a, (3, 3), use_bias=False, rngs=rngs)
        self.left_norm = nnx.BatchNorm(a, momentum=0.9, rngs=rngs)
        self.right = nnx.Conv(3, b, (1, 1), rngs=rngs)
        self.join = nnx.Conv(a + b, c, (3, 3), 2, padding=1, rngs=rngs)
        self.join_norm = nnx.BatchNorm(c, momentum=0.9, rngs=rngs)
        self.refine = nnx.Conv(c, c, (3, 3), rngs=rngs)
        self.classifier = nnx.Linear(4 * c, 5, rngs=rngs)

    __call__ = Mixed.__call__


class OneKey(nnx.Rngs):
    """Gives one key again and again, where nothing is drawn by it."""

    def params(self):
        return jax.random.key(0)


def filled(make, seed=0):
    """The module `make(rngs)`, its arrays drawn by NumPy: nothing is compiled.

    Those of a class are drawn once, and each call gives a copy.
    """
    return nnx.clone(_filled_once(make, seed)) if isinstance(make, type) else _filled(make, seed)


@functools.lru_cache
def _filled_once(make, seed):
    return _filled(make, seed)


def _filled(make, seed):
    model = nnx.eval_shape(lambda: make(OneKey(0)))
    rng = np.random.default_rng(seed)

    def draw(variable):
        like = variable.get_value()
        if isinstance(variable, nnx.BatchStat):
            drawn = rng.uniform(0.5, 1.5, like.shape)
        else:
            drawn = 0.4 * rng.normal(size=like.shape)
        return variable.replace(jnp.asarray(drawn.astype(like.dtype)))

    flat = [(path, draw(variable)) for path, variable in nnx.to_flat_state(nnx.state(model))]
    nnx.update(model, nnx.from_flat_state(flat))
    return model


def thin_resnet(**arguments):
    """A quarter of a ResNet-8, or of another depth, with drawn values."""
    return nnx.clone(_thin_resnet(**{"depth": 8, "width": 0.25, "min_channels": 1, **arguments}))


@functools.lru_cache
def _thin_resnet(**arguments):
    return filled(lambda _: dhp.models.build("resnet", rngs=RNGS, **arguments))


def images(*shape, seed=0):
    """Images from N(0, 1)."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def drawn_masks(model, seed):
    """A mask for every latent that drops about half of its entries, but never all."""
    rng = np.random.default_rng(seed)
    masks = {}
    for name, z in dhp.latents(model).items():
        masks[name] = rng.random(z.size) < 0.5 if z.prunable else np.ones(z.size, bool)
        masks[name][rng.integers(z.size)] = True
    return masks


def keep_all(model):
    """The masks that keep everything."""
    return {name: np.ones(z.size, bool) for name, z in dhp.latents(model).items()}


def run(model, x, *, train=False, mask=None):
    """Scores, and BatchNorm statistics after them by path, of a jitted forward pass."""
    model.train() if train else model.eval()
    graphdef, state = nnx.split(model)
    scores, statistics = _forward(graphdef, state, x, mask)
    flat = nnx.to_flat_state(statistics)
    return np.asarray(scores), {path: np.asarray(stat.get_value()) for path, stat in flat}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _forward(graphdef, state, x, mask):
    model = nnx.merge(graphdef, state, copy=True)
    scores = model(x) if mask is None else model(x, mask)
    return scores, nnx.state(model, nnx.BatchStat)


def arrays(model):
    """Every array of a model by its path."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(stored.get_value()) for path, stored in flat}


def check_same(found, expected):
    """Arrays of two models, or statistics by path, are the same bit for bit."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=str(name))


# Arguments with which each family is small.
SMALL = {
    "resnet": {"depth": 8, "width": 0.25},
    "densenet": {"depth": 7, "growth": 4},
    "vgg": {"depth": 11, "width": 0.0625},
    "mobilenet_v1": {"width": 0.0625},
    "mobilenet_v2": {"width": 0.0625},
    "srresnet": {"blocks": 1, "features": 8, "width": 1.0, "prune_upsampler": True},
    "edsr": {"blocks": 1, "features": 8, "width": 1.0, "initial_scale": 0.58},
    "dncnn": {"depth": 3, "features": 8, "width": 1.0},
    "unet": {"depth": 2, "features": 8, "width": 1.0},
}
