"""A small DnCNN against noise of sigma 70 on scikit-image's photographs, at 60 % of the FLOPs."""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default("denoising")
    config.log_every = 25
    config.batch_size = 16
    config.task.update(patch=40, steps_per_epoch=100)
    config.model.update(depth=9, width=0.375)
    config.target = 0.6
    config.search.update(epochs=4, learning_rate=5e-3, drops=(), strength=0.4)
    config.converge.update(epochs=7, learning_rate=5e-3, drops=(3.5, 6.0))
    config.baseline.update(epochs=9, learning_rate=5e-3, drops=(5.5, 8.0))
    return config
