"""A small EDSR, enlarging scikit-image's photographs by 2, at 60 % of the FLOPs."""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default("super_resolution")
    config.log_every = 25
    config.batch_size = 8
    config.task.update(scale=2, patch=64, steps_per_epoch=150)
    config.model = {
        "name": "edsr",
        "blocks": 4,
        "width": 0.25,
        "initial_scale": 0.58,
        "prune_upsampler": True,
    }
    config.target = 0.6
    config.search.update(epochs=3, learning_rate=1e-3, drops=(), strength=1.0)
    config.converge.update(epochs=6, learning_rate=1e-3, drops=(4.5,))
    config.baseline.update(epochs=8, learning_rate=1e-3, drops=(6.5,))
    return config
