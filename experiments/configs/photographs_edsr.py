"""A small EDSR, super-resolution by 2, on photographs that scikit-image ships, at 60 % of the FLOPs."""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default("super_resolution")
    config.log_every = 25
    config.batch_size = 8
    config.task.update(scale=2, patch=64, steps_per_epoch=150)
    config.model = {"name": "edsr", "blocks": 4, "width": 0.25}
    config.target = 0.6
    config.search.update(epochs=4, learning_rate=1e-3, drops=(), strength=1.0)
    config.converge.update(epochs=8, learning_rate=1e-3, drops=(6.0,))
    config.baseline.update(epochs=10, learning_rate=1e-3, drops=(8.0,))
    return config
