"""DenseNet-12-40 on CIFAR-10 at 38 % of the FLOPs.

Reproduces DHP-38: test error 6.06 % at 39.80 % of the FLOPs and 63.76 % of the params; the unpruned
network has 5.26 % (table 1 of the paper). With `--config.target=0.28` it is after DHP-28: 6.51 % at
29.52 % of the FLOPs and 26.01 % of the params. Here the FLOPs never exceed the target. The schedule
is that of ResNet-110, for want of a published one; the momentum is Nesterov's.

    python experiments/main.py --config=experiments/configs/densenet40.py
    python experiments/main.py --config=experiments/configs/densenet40.py --config.target=0.28 \\
        --workdir=runs/densenet40_28
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default()
    config.model = {"name": "densenet", "depth": 40, "growth": 12}
    config.optimizer.nesterov = True
    config.target = 0.38
    config.search.update(strength=1e-4, stop_limit=0.02, drops=(50.0,))
    return config
