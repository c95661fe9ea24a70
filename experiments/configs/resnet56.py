"""ResNet-56 on CIFAR-10 at half the FLOPs.

Reproduces DHP-50: test error 6.42 % at 50.96 % of the FLOPs and 58.42 % of the params; the unpruned
network has 7.05 % (table 1 of the paper). Here the FLOPs are at most 50 %, exactly counted.

    python experiments/main.py --config=experiments/configs/resnet56.py
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default()
    config.model.depth = 56
    config.target = 0.5
    config.search.update(strength=3e-4, stop_limit=0.01, drops=(20.0, 50.0))
    return config
