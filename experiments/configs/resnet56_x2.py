"""ResNet-56 of twice the width on CIFAR-10, searched down to the FLOPs of width 1.

After DHP-24-2 of the paper, which starts MobileNets twice as wide (table 2); for ResNets nothing is
published. Shares in the run's own report are those of the wide network: 25 % of its FLOPs are
99 % of those of ResNet-56 of width 1.

    python experiments/main.py --config=experiments/configs/resnet56_x2.py
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default()
    config.model.update(depth=56, width=2.0)
    config.target = 0.25
    config.search.update(strength=3e-4, stop_limit=0.01, drops=(20.0, 50.0))
    return config
