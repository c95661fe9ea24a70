"""MobileNetV2 of twice the width on Tiny-ImageNet at 24 % of its FLOPs.

Reproduces DHP-24-2: test error 43.82 % at 99.09 % of the FLOPs and 72.72 % of the params of
MobileNetV2 of width 1, which has 44.75 % (table 2 of the paper). Shares in the run's own report are
those of the wide network. The classifier keeps at least 45 % of its inputs.

    python experiments/main.py --config=experiments/configs/mobilenet_v2_x2.py \\
        --config.data.archive=tiny-imagenet-200.zip
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default()
    config.data.name = "tiny_imagenet"
    config.model = {
        "name": "mobilenet_v2",
        "width": 2.0,
        "prune_classifier": True,
        "classifier_keep": 0.45,
        "dropout": 0.2,
    }
    config.target = 0.24
    config.search.update(strength=1e-4, threshold=5e-3, stop_limit=0.02, drops=(50.0, 70.0))
    for phase in (config.converge, config.baseline):
        phase.update(epochs=220, drops=(200.0, 205.0, 210.0, 215.0))
    return config
