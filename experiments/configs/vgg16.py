"""VGG-16 with BatchNorm on CIFAR-10 at half the FLOPs.

The network that most pruning papers compare on; the paper of this method does not have it. The
schedule is that of ResNet-20. At 32x32 it has 313.8 M FLOPs and 14.7 M params. Here the FLOPs never
exceed the target.

    python experiments/main.py --config=experiments/configs/vgg16.py
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default()
    config.model = {"name": "vgg", "depth": 16, "width": 1.0}
    config.target = 0.5
    config.search.update(strength=2e-4, stop_limit=0.02, drops=(50.0,))
    return config
