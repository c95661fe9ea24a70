"""ResNet-20 on scikit-learn's 1,797 handwritten digits (8x8) at half the FLOPs."""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default()
    config.data.name = "digits"
    config.log_every = 20
    config.search.update(epochs=30, strength=4e-3, drops=())
    config.converge.update(epochs=30, drops=(15.0, 23.0))
    config.baseline.update(epochs=50, drops=(25.0, 38.0))
    return config
