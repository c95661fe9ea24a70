"""ResNet-110 (bottleneck blocks) on CIFAR-10 at 62 % of the FLOPs.

Reproduces DHP-62: test error 5.37 % at 63.66 % of the FLOPs and 63.2 % of the params; the unpruned
network has 5.31 % (table 1 of the paper). With `--config.target=0.2` it is after DHP-20: 6.61 % at
21.63 % of the FLOPs and 22.40 % of the params. Here the FLOPs never exceed the target.

    python experiments/main.py --config=experiments/configs/resnet110.py
    python experiments/main.py --config=experiments/configs/resnet110.py --config.target=0.2 \\
        --workdir=runs/resnet110_20
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default()
    config.model.depth = 110
    config.target = 0.62
    config.search.update(strength=1e-4, stop_limit=0.02, drops=(50.0,))
    return config
