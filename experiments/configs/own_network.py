"""A network of one's own, in plain Flax, on digits: pruned to half of its FLOPs.

To prune yours, give it by its name, as it is: it need not know of pruning. Its function or class
gets `rngs`, and by name what it takes of `config.model`, `num_classes`, `channels`, `dtype` and
`min_channels`. With trained weights no search from scratch is needed:

    python experiments/main.py --config=experiments/configs/own_network.py --config.method=baseline
    python experiments/main.py --config=experiments/configs/own_network.py --config.method=fade \
        --config.source=runs/own_network-baseline
    python experiments/main.py --config=experiments/configs/own_network.py \
        --config.model.name=networks:Net --config.model.weights=net.safetensors \
        --config.method=group_norm

The baseline has 2.00 % error on 500 test images (seed 0). At half the FLOPs `dhp` has 2.80 %,
`fade` 1.80 % and `group_norm` 2.20 %. Intervals of 95 % reach from 0.9 to 4.6 %: the differences
mean nothing. A run takes up to 30 s of CPU time.
"""

from flax import nnx

from dhp_jax import config as dhp_config


class Network(nnx.Module):
    """A small residual network of ordinary layers."""

    def __init__(self, width=1.0, *, num_classes, channels, rngs):
        size, wide = round(24 * width), round(48 * width)
        self.stem = nnx.Conv(channels, size, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(size, momentum=0.9, rngs=rngs)
        self.first = nnx.Conv(size, wide, (3, 3), rngs=rngs)
        self.second = nnx.Conv(wide, size, (3, 3), rngs=rngs)
        self.hidden = nnx.Conv(size, wide, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(wide, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.relu(x + self.second(nnx.relu(self.first(x))))
        return self.head(nnx.relu(self.hidden(x)).mean((1, 2)))


def get_config():
    config = dhp_config.default()
    config.model = {"name": "dhp_jax.configs.own_network:Network"}
    config.data.name = "digits"
    config.log_every = 20
    config.search.update(epochs=30, strength=0.12, learning_rate=0.02, drops=())
    config.converge.update(epochs=20, learning_rate=0.05, drops=(10.0, 16.0))
    config.baseline.update(epochs=30, learning_rate=0.05, drops=(15.0, 24.0))
    return config
