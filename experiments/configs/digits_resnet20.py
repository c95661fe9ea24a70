"""ResNet-20 on scikit-learn's 1,797 handwritten digits (8x8 gray images) at half the FLOPs."""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default()
    config.data.name = "digits"
    config.multiple_of = 8  # a CPU computes such widths faster than those in between
    config.log_every = 20
    config.search.update(epochs=50, strength=9e-3, drops=())
    config.converge.update(epochs=70, drops=(35.0, 55.0))
    config.baseline.update(epochs=120, drops=(60.0, 90.0))
    return config
