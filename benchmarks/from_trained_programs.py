"""A ResNet with gates, what a cut leaves of it, and the programs that train them on CIFAR-10.

On an accelerator one compiled program trains all that a search or a criterion leaves: a network
with gates of 0 computes what `dhp.prune` leaves (tests check it). A CPU trains what `dhp.prune`
leaves, which takes it less time than compiling.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

from cifar10_arrays import SHAPE
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dhp_jax as dhp
from dhp_jax.core.latent import walk
from dhp_jax.core.layers import Hyper
from dhp_jax.core.state import path_name
from dhp_jax.data.labelled.cifar import STATISTICS
from dhp_jax.prox import soft_threshold
from dhp_jax.pruned.fresh_weights import carry_kernels, reinitialize
from dhp_jax.tasks.classification import distillation_loss

BORDER = 4  # pixels of padding, out of which crops are cut
MEAN, DEVIATION = STATISTICS["cifar10"]
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
TEMPERATURE = 4.0  # of the distillation

Array = jax.Array
Arrays = dict[str, jax.Array]


class Run(NamedTuple):
    """What an update changes."""

    weights: Arrays
    z: Arrays
    velocity: tuple[Arrays, Arrays]
    statistics: Arrays


class Plan(NamedTuple):
    """What is the same for all updates of a segment.

    Attributes:
      mask: 1 for the entries of latents that are there, 0 for those that are gone.
      strength: of the l1 norm of each entry.
      rate: of the latents, as a multiple of the learning rate.
      distillation: share of the loss that compares with the teacher.
      both: whether latents multiply the kernels that make their channels, too.
    """

    mask: Arrays
    strength: Arrays
    rate: Array | float = 0.0
    distillation: Array | float = 0.0
    both: Array | float = 0.0


class Batches(NamedTuple):
    """Which images the updates of a segment take, how they are cut out, and the learning rates."""

    order: np.ndarray
    shift: np.ndarray
    flip: np.ndarray
    rate: np.ndarray


class Search(NamedTuple):
    """What an update of the search changes."""

    params: nnx.State
    statistics: nnx.State
    optimizer: Any


class Network:
    """An ordinary network of the library with gates on what layers read, as pure functions.

    Args:
      depth: of the ResNet.
      dtype: of activations and kernels.
    """

    def __init__(self, depth: int, dtype: Any):
        self.latents = dhp.models.build("resnet", depth=depth, dtype=dtype, rngs=nnx.Rngs(0))
        named = dhp.latents(self.latents)
        self.names = {z: name for name, z in named.items()}
        self.prunable = [name for name, z in named.items() if z.prunable]
        self.sizes = {name: z.size for name, z in named.items()}
        self.cost = dhp.measure_cost(self.latents, SHAPE)
        self.layers = {path: layer for path, _, layer in walk(self.latents)}
        self.reads = {}  # the latent that each kernel reads, and that which it makes
        for path, layer in self.layers.items():
            if isinstance(layer, Hyper | dhp.Linear):
                made = self.names[layer.z_out] if isinstance(layer, Hyper) else None
                self.reads[f"{path}.kernel"] = self.names[layer.z_in], made
        self.graphdef, state = nnx.split(dhp.prune(self.latents))
        self.variables = {path_name(p): (p, v) for p, v in nnx.to_flat_state(state)}

    def fresh(self, seed: int) -> dict[str, np.ndarray]:
        """Weights and statistics before any training, on the host."""
        plain = self.model({name: v[...] for name, (_, v) in self.variables.items()})
        reinitialize(plain, rngs=nnx.Rngs(seed))
        return self.on_host(plain)

    def on_host(self, plain: nnx.Module) -> dict[str, np.ndarray]:
        """Weights and statistics of an ordinary network, on the host."""
        return {name: np.asarray(x) for group in self.split(plain) for name, x in group.items()}

    def is_weight(self, name: str) -> bool:
        return isinstance(self.variables[name][1], nnx.Param)

    def split(self, plain: nnx.Module) -> tuple[Arrays, Arrays]:
        """Weights and statistics of an ordinary network."""
        weights, statistics = {}, {}
        for path, variable in nnx.to_flat_state(nnx.state(plain)):
            name = path_name(path)
            (weights if self.is_weight(name) else statistics)[name] = variable[...]
        return weights, statistics

    def model(self, arrays: Arrays) -> nnx.Module:
        """The ordinary network that has these arrays."""
        flat = [
            (path, v.replace(jnp.asarray(arrays[name])))
            for name, (path, v) in self.variables.items()
        ]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat), copy=True)

    def gated(self, weights: Arrays, gates: Arrays, both: Array | float = 0.0) -> Arrays:
        """Weights with the rows of each kernel times the gates of the channels that they read.

        Args:
          weights: of the ordinary network.
          gates: of prunable latents.
          both: 1 if the columns are multiplied by the gates of the channels that they make, too;
            then the kernel is that of a hypernetwork with an embedding of 1 and no biases.
        """
        found = dict(weights)
        for name, (read, made) in self.reads.items():
            if read in gates:
                found[name] = found[name] * gates[read][:, None]
            if made in gates:
                found[name] = found[name] * (1 + both * (gates[made] - 1))
        return found

    def full(self, value: float) -> dict[str, np.ndarray]:
        """A number for each entry of each prunable latent."""
        return {name: np.full(self.sizes[name], value, np.float32) for name in self.prunable}


def of_latents(net: Network, arrays: Arrays) -> nnx.Module:
    """The network of latents with the kernels of an ordinary one."""
    model = nnx.clone(net.latents)
    carry_kernels(net.model(arrays), model)
    return model


class Left(Network):
    """What is left of a network once it is cut: the same functions, with no gates.

    Args:
      whole: the network.
      arrays: its weights and statistics.
      mask: which entries of each prunable latent stay.
    """

    def __init__(self, whole: Network, arrays: Arrays, mask: Mapping[str, np.ndarray]):
        masks = {name: np.ones(size, bool) for name, size in whole.sizes.items()}
        masks |= {name: np.asarray(kept, bool) for name, kept in mask.items()}
        self.reads, self.prunable = {}, []
        self.graphdef, state = nnx.split(dhp.prune(of_latents(whole, arrays), masks))
        self.variables = {path_name(p): (p, v) for p, v in nnx.to_flat_state(state)}

    def arrays(self) -> dict[str, np.ndarray]:
        """Its weights and statistics, on the host."""
        return {name: np.asarray(v[...]) for name, (_, v) in self.variables.items()}


class Programs(NamedTuple):
    """The compiled programs.

    Attributes:
      advance: some updates of a run.
      search: takes the structure of a network with gates, an optimizer, arrays of a teacher, and
        the share of the loss that compares with it; returns some updates.
      inputs: the images and labels of batches, one after another.
      evaluate: errors on the test images.
    """

    advance: Callable
    search: Callable
    inputs: Callable
    evaluate: Callable


def one_after_another(body: Callable) -> Callable:
    """What carries out `body(given, carry, x)` for each x of several, as `jax.lax.scan` does.

    It is one program. On a CPU it is one for each x, for XLA's loops have slow convolutions there.
    """
    if jax.default_backend() != "cpu":
        return jax.jit(
            lambda given, carry, xs: jax.lax.scan(functools.partial(body, given), carry, xs)
        )
    step = jax.jit(body, compiler_options=dhp.compiler_options())

    def loop(given, carry, xs):
        found = []
        for at in range(len(jax.tree.leaves(xs)[0])):
            carry, y = step(given, carry, jax.tree.map(lambda x, at=at: x[at], xs))
            found.append(y)
        return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *found)

    return loop


def programs(
    net: Network, train: tuple, test: tuple, batch: int, teacher: Network | None = None
) -> Programs:
    """The programs for a network and its data.

    Args:
      net: the network.
      train: images and labels.
      test: the same, for the test.
      batch: images a batch.
      teacher: the network that the loss compares with; this one if None.
    """
    border = (BORDER, BORDER)
    pixels = np.pad(train[0], ((0, 0), border, border, (0, 0)))
    data = jax.device_put((pixels, np.asarray(train[1], np.int32)))
    count = len(test[1])
    whole = -(-count // batch) * batch
    tested = (
        np.resize(test[0], (whole, *SHAPE)).reshape(-1, batch, *SHAPE),
        np.resize(test[1], whole).astype(np.int32).reshape(-1, batch),
        (np.arange(whole) < count).reshape(-1, batch),
    )
    tested = jax.device_put(tested)

    def normalised(images):
        return (images.astype(jnp.float32) - jnp.array(MEAN)) / jnp.array(DEVIATION)

    def cut_out(pixels, index, shift, flip):
        def crop(i, at):
            return jax.lax.dynamic_slice(pixels, (i, at[0], at[1], 0), (1, *SHAPE))[0]

        crops = jax.vmap(crop)(index, shift)
        return normalised(jnp.where(flip[:, None, None, None], crops[:, :, ::-1], crops))

    def logits_of(weights, gates, statistics, images, training, both=0.0, net=net):
        model = net.model({**net.gated(weights, gates, both), **statistics})
        model.train() if training else model.eval()
        return model(images).astype(jnp.float32), net.split(model)[1]

    @jax.jit
    def inputs_of(data, batch):
        images = cut_out(data[0], batch.order, batch.shift, batch.flip)
        return images, data[1][batch.order]

    def taught_by(arrays, images, share):
        def of(images):
            return logits_of(*arrays, images, training=False, net=teacher or net)[0]

        def nothing(images):
            return jnp.zeros((len(images), 10))

        return jax.lax.cond(share > 0, of, nothing, images)

    def total_loss(logits, labels, taught, share):
        plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        apart = distillation_loss(logits, taught, TEMPERATURE).mean()
        return (1 - share) * plain + share * apart

    def update(given, run, batch):
        data, plan, teacher = given
        rate = batch.rate
        images, labels = inputs_of(data, batch)
        taught = taught_by(teacher, images, plan.distillation)

        def loss_of(weights, z):
            gates = jax.tree.map(jnp.multiply, z, plan.mask)
            logits, statistics = logits_of(
                weights, gates, run.statistics, images, training=True, both=plan.both
            )
            return total_loss(logits, labels, taught, plan.distillation), statistics

        (loss, statistics), (grads, grads_z) = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(
            run.weights, run.z
        )
        grads = jax.tree.map(lambda g, w: g + WEIGHT_DECAY * w, grads, run.weights)
        after = jax.tree.map(lambda v, g: MOMENTUM * v + g, run.velocity, (grads, grads_z))
        step, step_z = jax.tree.map(lambda v, g: g + MOMENTUM * v, after, (grads, grads_z))
        weights = jax.tree.map(lambda w, s: w - rate * s, run.weights, step)

        def moved(z, s, strength):
            return soft_threshold(z - rate * plan.rate * s, rate * strength)

        z = jax.tree.map(moved, run.z, step_z, plan.strength)
        return Run(weights, z, after, statistics), loss

    updates = one_after_another(update)

    def advance(run, plan, teacher, batches):
        run, losses = updates((data, plan, teacher), run, batches)
        return run, losses.mean()

    def search(graphdef, optimizer, teacher, share):
        @one_after_another
        def steps(given, state, batch):
            data, teacher, share = given
            images, labels = inputs_of(data, batch)
            taught = taught_by(teacher, images, share)

            def loss_of(params):
                model = nnx.merge(graphdef, params, state.statistics, copy=True)
                logits = model(images).astype(jnp.float32)
                loss = total_loss(logits, labels, taught, share)
                return loss, nnx.state(model, nnx.Not(nnx.Param))

            grads, statistics = jax.grad(loss_of, has_aux=True)(state.params)
            updates, changed = optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            return Search(params, statistics, changed), None

        return lambda state, batches: steps((data, teacher, share), state, batches)[0]

    @one_after_another
    def test_errors(given, carry, batch):
        run, gates = given
        images, labels, counts = batch
        logits, _ = logits_of(
            run.weights, gates, run.statistics, normalised(images), training=False
        )
        wrong = (jnp.argmax(logits, -1) != labels) & counts
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels) * counts
        return carry, (wrong, loss)

    def evaluate(run: Run, mask: Arrays) -> dict[str, float]:
        """Errors in percent; of the first and second half of the images as well."""
        gates = jax.tree.map(jnp.multiply, run.z, mask)
        wrong, loss = test_errors((run, gates), None, tested)[1]
        wrong = np.asarray(wrong).reshape(-1)[:count]
        half = count // 2
        return {
            "error": 100 * float(wrong.mean()),
            "error_first_half": 100 * float(wrong[:half].mean()),
            "error_second_half": 100 * float(wrong[half:].mean()),
            "test_loss": float(np.asarray(loss).sum() / count),
        }

    return Programs(advance, search, functools.partial(inputs_of, data), evaluate)
