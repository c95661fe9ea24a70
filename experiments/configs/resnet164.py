"""ResNet-164 (bottleneck blocks) on CIFAR-10 at half the FLOPs.

Reproduces DHP-50: test error 5.22 % at 51.67 % of the FLOPs and 50.97 % of the params; the unpruned
network has 4.97 % (table 1 of the paper). With `--config.target=0.2` it is after DHP-20: 6.30 % at
21.78 % of the FLOPs and 20.46 % of the params. Here the FLOPs never exceed the target.

    python experiments/main.py --config=experiments/configs/resnet164.py
    python experiments/main.py --config=experiments/configs/resnet164.py --config.target=0.2 \\
        --workdir=runs/resnet164_20
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default()
    config.model.depth = 164
    config.target = 0.5
    config.search.update(strength=1e-4, stop_limit=0.02, drops=(50.0,))
    return config
