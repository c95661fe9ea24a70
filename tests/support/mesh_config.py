"""A DenseNet-7 on digits in few steps, in which rounding has no time to grow."""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default()
    config.data.name = "digits"
    config.data.crop_padding = 1
    config.model.update(name="densenet", depth=7)
    config.model.growth = 8
    config.batch_size = 240
    config.log_every = 1
    config.checkpoint.seconds = 0.0
    config.search.update(epochs=3, learning_rate=1e-3, strength=20.0, drops=())
    config.converge.update(epochs=2, learning_rate=1e-3, drops=())
    return config
