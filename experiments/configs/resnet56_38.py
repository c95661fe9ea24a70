"""ResNet-56 on CIFAR-10 at 38 % of the FLOPs.

Reproduces DHP-38: test error 7.06 % at 39.07 % of the FLOPs and 41.10 % of the params; the unpruned
network has 7.05 % (table 1 of the paper). Here the FLOPs are at most 38 %, exactly counted.

    python experiments/main.py --config=experiments/configs/resnet56_38.py
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default()
    config.model.depth = 56
    config.target = 0.38
    config.search.update(strength=3e-4, stop_limit=0.02, drops=(25.0, 50.0))
    return config
