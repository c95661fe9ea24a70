"""A small DnCNN against Gaussian noise of sigma 70, on photographs that scikit-image ships, at 60 %."""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default("denoising")
    config.log_every = 25
    config.batch_size = 16
    config.task.update(patch=40, steps_per_epoch=150)
    config.model.update(depth=9, width=0.375)
    config.target = 0.6
    config.search.update(epochs=4, learning_rate=1e-3, drops=(), strength=1.0)
    config.converge.update(epochs=8, learning_rate=1e-3, drops=(6.0,))
    config.baseline.update(epochs=10, learning_rate=1e-3, drops=(8.0,))
    return config
