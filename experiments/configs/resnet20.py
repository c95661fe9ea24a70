"""ResNet-20 on CIFAR-10 at half the FLOPs.

Reproduces DHP-50: test error 8.46 % at 51.80 % of the FLOPs and 56.13 % of the params; the unpruned
network has 7.46 % (table 1 of the paper). Here the FLOPs are at most 50 %, exactly counted.

    python experiments/main.py --config=experiments/configs/resnet20.py
    python experiments/main.py --config=experiments/configs/resnet20.py --config.method=baseline
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default()
    config.model.depth = 20
    config.target = 0.5
    config.search.update(strength=2e-4, stop_limit=0.02, drops=(50.0,))
    return config
