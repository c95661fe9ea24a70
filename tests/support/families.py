"""A small network of every family, whole and pruned, which tests of families share."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from networks import RNGS, drawn_masks, filled, images, keep_all, short

import dhp_jax as dhp
from dhp_jax.core.surgery import prune as cut

# Family, arguments, input: of odd widths, and of few layers; see `short`.
CLASSIFIERS = {
    "resnext50": (
        "resnet",
        {"depth": 50, "width": 0.11, "groups": 5, "group_width": 20},
        (33, 32, 3),
    ),
    "densenet": ("densenet", {"depth": 10, "growth": 5}, (10, 11, 3)),
    "vgg": ("vgg", {"depth": 11, "width": 0.11}, (33, 32, 3)),
    "mobilenet_v1": ("mobilenet_v1", {"width": 0.17, "num_classes": 7}, (33, 32, 3)),
    "mobilenet_v2": ("mobilenet_v2", {"width": 0.17, "stem_stride": 1}, (16, 16, 3)),
}
RESTORERS = {
    "srresnet": ("srresnet", {"scale": 4, "blocks": 1, "features": 7}, (5, 6, 3)),
    "srresnet, whole up-sampler": (
        "srresnet",
        {"scale": 3, "blocks": 2, "features": 11, "width": 0.5, "prune_upsampler": False},
        (5, 4, 3),
    ),
    "edsr": ("edsr", {"scale": 2, "blocks": 2, "features": 7}, (6, 5, 3)),
    "dncnn": ("dncnn", {"depth": 4, "features": 9}, (9, 8, 1)),
    "unet": ("unet", {"depth": 3, "features": 5}, (10, 13, 1)),
    "unet, BatchNorm": ("unet", {"depth": 3, "features": 5, "batch_norm": True}, (10, 13, 1)),
}
FAMILIES = CLASSIFIERS | RESTORERS


@functools.cache
def abstract(family, **arguments):
    """A network of shapes alone; tests leave it as it is."""
    return dhp.models.build_abstract(family, **arguments)


@functools.cache
def network(name):
    """A small network with drawn values, its images, and masks; tests leave them as they are."""
    family, arguments, shape = FAMILIES[name]
    with short():
        model = filled(lambda _: dhp.models.build(family, rngs=RNGS, **arguments))
    return model, images(6 if name in CLASSIFIERS else 3, *shape), drawn_masks(model, seed=1)


@functools.cache
def plain(name):
    """The unpruned network of ordinary layers."""
    model, _, _ = network(name)
    return cut(model, keep_all(model))


@functools.cache
def pruned(name):
    """The network pruned by its masks."""
    model, _, masks = network(name)
    return cut(model, masks)


def kept_by(name):
    """A function from a latent of `network(name)` to the mask of its survivors."""
    model, _, masks = network(name)
    names = {z: path for path, z in dhp.latents(model).items()}
    return lambda z: masks[names[z]]


def output(model, shape):
    """Shape and dtype of what a network returns; nothing is computed."""
    graphdef, state = nnx.split(model)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda state, x: nnx.merge(graphdef, state, copy=True)(x), state, x)
