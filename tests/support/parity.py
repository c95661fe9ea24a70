"""Search steps of the library in float64, on the networks and batches of benchmarks/parity.py.

Run in a process of its own, as JAX computes in float64 throughout or nowhere. Prints JSON: the
losses, latents and survivors of each network; with names of `MUTATIONS`, of the ResNet, once with
each mutation.
"""

import contextlib
import json
import math
import sys
from unittest import mock
import zlib

from flax import nnx
import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import dhp_jax as dhp  # noqa: E402
from dhp_jax.core import hypernet, latent, layers  # noqa: E402
from dhp_jax.models import blocks, mobilenet, resnet  # noqa: E402
from dhp_jax.models.mobilenet import MobileNetV2  # noqa: E402
from dhp_jax.train import optimizer as train_optimizer  # noqa: E402
from dhp_jax.train.optimizer import optimizer, shrink_latents  # noqa: E402
from dhp_jax.train.schedules import drop_schedule  # noqa: E402
from dhp_jax.train.state import start  # noqa: E402
from dhp_jax.train.step import make_step  # noqa: E402

FLOOR, THRESHOLD, DECAY, MOMENTUM = 3, 0.3, 1e-2, 0.9
STEPS, DROP, BATCH, CLASSES = 8, 6, 4, 4


def drawn(network, name, shape):
    seed = zlib.crc32(f"{network}/{name}".encode())
    return np.random.RandomState(seed).uniform(-1, 1, shape)


class SmallMobileNetV2(MobileNetV2):
    features_size = 24


def build(name):
    """The network in float64, with the initial values of its layers' numbers; latents by name."""
    given = {"min_channels": FLOOR, "dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    if name == "resnet":
        model = dhp.models.build(name, depth=8, width=0.5, num_classes=CLASSES, **given)
    elif name == "unet":
        model = dhp.models.build(name, depth=2, features=6, **given)
    else:
        mobilenet.STEM, mobilenet.V2_GROUPS = 8, ((8, 1, 1, 1), (12, 2, 2, 3))
        model = SmallMobileNetV2(num_classes=CLASSES, **given)
    return model, fill(name, model)


def fill(network, model):
    """Sets all arrays of a network, in place; returns its latents by the names of the fixture."""
    by_path = {path: module for path, _, module in latent.walk(model)}
    convs, norms, named = 0, 0, {}

    def put(layer, array, name, scale, shift=0.0):
        variable = getattr(layer, array)
        values = shift + scale * drawn(network, name, variable.shape)
        setattr(layer, array, type(variable)(jnp.asarray(values), **variable.get_metadata()))

    for cost in dhp.measure_cost(model, SHAPES[network]).layers:
        layer = by_path[cost.path]
        if hasattr(layer, "param_dtype"):
            layer.param_dtype = layer.dtype = jnp.float64
        if isinstance(layer, layers.Hyper):
            for side, axis in (("in", layer.kernel_axis()), ("out", layer.z_out)):
                for z in axis.multiplicity():
                    if all(z is not other for other in named.values()):
                        put(z, "vector", f"{side}{convs}", 1.0)
                        named[f"{side}{convs}"] = z
            m, size_in, _ = layer.w1.shape
            scale = math.sqrt(3 / (m * size_in * math.prod(layer.kernel_size)))
            scales = {"w1": math.sqrt(3), "w2": scale, "b0": 0.1, "b1": 0.1, "b2": 0.1 * scale}
            for array, factor in scales.items():
                put(layer, array, f"conv{convs}.{array}", factor)
            if layer.bias is not None:
                put(layer, "bias", f"conv{convs}.bias", 0.1)
            convs += 1
        elif isinstance(layer, nnx.BatchNorm):
            put(layer, "scale", f"norm{norms}.scale", 0.2, 1.0)
            put(layer, "bias", f"norm{norms}.bias", 0.2)
            for statistic in (layer.mean, layer.var):
                statistic.set_value(statistic[...].astype(jnp.float64))
            norms += 1
        elif isinstance(layer, nnx.Linear):
            put(layer, "kernel", "linear.kernel", 0.3)
            put(layer, "bias", "linear.bias", 0.1)
    return named


SHAPES = {"resnet": (8, 8, 3), "mobilenet_v2": (16, 16, 3), "unet": (8, 8, 1)}


class InFloat64:
    """The task of a network: its losses are not rounded."""

    def __init__(self, network):
        self.network = network

    def batch(self, step):
        height, width, channels = SHAPES[self.network]
        shape = (BATCH, channels, height, width)  # as PyTorch has it
        inputs = drawn(self.network, f"inputs{step}", shape).transpose(0, 2, 3, 1)
        if self.network == "unet":
            clean = drawn(self.network, f"clean{step}", shape).transpose(0, 2, 3, 1)
            return jnp.asarray(clean + 0.3 * inputs), jnp.asarray(clean)
        labels = np.floor(CLASSES / 2 * (1 + drawn(self.network, f"labels{step}", (BATCH,))))
        return jnp.asarray(inputs), jnp.asarray(labels.astype(np.int64))

    def augmented(self, key, examples):
        return examples

    def loss(self, outputs, targets):
        if self.network == "unet":
            return jnp.mean(jnp.abs(outputs - targets), axis=(1, 2, 3))
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)

    def score(self, outputs, targets):
        return jnp.zeros(len(outputs))


def searched(network):
    """What benchmarks/parity.py finds, by the library."""
    model, named = build(network)
    paths = {id(z): path for path, z in dhp.latents(model).items()}
    names = {name: paths[id(z)] for name, z in named.items()}
    task, adam = InFloat64(network), network == "unet"
    rate, strength = (0.01, 6.0) if adam else (0.05, 1.2)
    schedule = drop_schedule(rate, (1,), DROP)

    def make_optimizer(params):
        step = optimizer("adam" if adam else "sgd", schedule, momentum=MOMENTUM, weight_decay=DECAY)
        shrink = shrink_latents(params, strength=strength, schedule=schedule, threshold=THRESHOLD)
        return optax.chain(step, shrink)

    graphdef, tx, state = start(model, make_optimizer)
    step = jax.jit(make_step(graphdef, tx, task, BATCH))
    losses = []
    for number in range(STEPS):
        state = state._replace(measures=state.measures._replace(loss=jnp.zeros(())))
        state = step(state, task.batch(number), jax.random.key(0))
        losses.append(float(state.measures.loss) / BATCH)
    model = nnx.merge(graphdef, *state.params, state.rest)
    vectors = {path: z.value() for path, z in dhp.latents(model).items()}
    masks = dhp.survivors(model, THRESHOLD)
    model.eval()
    inputs, targets = task.batch(STEPS)
    return {
        "losses": losses,
        "tested": float(jnp.mean(task.loss(nnx.jit(lambda m, x: m(x))(model, inputs), targets))),
        "latents": {name: vectors[path].tolist() for name, path in names.items()},
        "survivors": {name: np.flatnonzero(masks[path]).tolist() for name, path in names.items()},
    }


# Faults that the comparison must find


def replaced(owner, name, value):
    return mock.patch.object(owner, name, value)


def other_strength():
    shrink = shrink_latents

    def stronger(params, *, strength, **options):
        return shrink(params, strength=1.001 * strength, **options)

    return replaced(sys.modules[__name__], "shrink_latents", stronger)


def no_decay_on_latents():
    def without(rate, _):
        def mask(params):
            return latent.map_variables(lambda v: not isinstance(v, dhp.LatentVector), params)

        return optax.masked(DECAYED(rate), mask)

    return replaced(train_optimizer.optax, "add_decayed_weights", without)


DECAYED = optax.add_decayed_weights


def floor_reached():
    prox = train_optimizer.prox_l1

    def looser(strength, schedule, where):  # >= for >: one below the floor counts as above it
        floor = next(cell.cell_contents for cell in where.__closure__
                     if isinstance(cell.cell_contents, int))  # fmt: skip
        return prox(strength, schedule, where=lambda z: jnp.sum(jnp.abs(z) >= THRESHOLD) >= floor)

    return replaced(train_optimizer, "prox_l1", looser)


def batch_norm(**other):
    def make(z, *, momentum, epsilon, **options):
        given = {"momentum": momentum, "epsilon": epsilon} | other
        return layers.BatchNorm(z, **given, **options)

    return replaced(blocks, "BatchNorm", make)


def same_padding():
    def make(*arguments, padding, **options):
        return layers.HyperConv(*arguments, padding="SAME", **options)

    return replaced(blocks, "HyperConv", make)


def prunable_last_stage():
    def make(size, *, prunable=True, **options):
        return latent.Latent(size, prunable=prunable or size == 32, **options)

    return replaced(resnet, "Latent", make)


def stem_of_its_own():
    return replaced(resnet, "BOTTLENECK", Stem(resnet.BOTTLENECK))


class Stem(dict):
    """Says once of depth 8, where the stem's axis is chosen, that its blocks are bottlenecks."""

    asked = 0

    def __contains__(self, depth):
        self.asked += 1
        return self.asked == 3 or super().__contains__(depth)


def inexact_gradient():
    exact = hypernet._gradients

    def inexact(inputs, grad_kernel, parts):
        grads = exact(inputs, grad_kernel, parts)
        return (1 + 1e-4) * grads[0], *grads[1:]

    return replaced(hypernet, "_gradients", inexact)


MUTATIONS = {
    "none": contextlib.nullcontext,
    "strength": other_strength,
    "decay": no_decay_on_latents,
    "floor": floor_reached,
    "momentum": lambda: batch_norm(momentum=0.99),
    "eps": lambda: batch_norm(epsilon=1.01e-5),
    "padding": same_padding,
    "last_stage": prunable_last_stage,
    "stem": stem_of_its_own,
    "gradient": inexact_gradient,
}


def main(names):
    found = {}
    for name in names:
        with MUTATIONS[name]():
            jax.clear_caches()
            found[name] = searched("resnet")
    if not names:
        found = {network: searched(network) for network in SHAPES}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
