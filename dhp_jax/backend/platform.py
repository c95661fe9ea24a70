"""What makes XLA run convolutional networks fast on the platform at hand.

XLA:CPU needs three things (docs/measurements/cpu.md has the figures): convolutions that use all
cores, kernel gradients whose operands it does not compute again, and another form for depthwise
convolutions and the gradients of grouped ones. On a GPU small hypernetworks are computed together,
and everywhere BatchNorm keeps less for the backward pass. All else is what XLA does by itself.
"""

import functools

import jax


@functools.cache
def compiler_options() -> dict[str, str]:
    """Options for `jax.jit` with which networks of convolutions run fast; empty for most platforms.

    On CPU they leave convolutions to Eigen: XLA's default (jaxlib 0.10) runs most of them on one
    core, and those of odd widths, as pruning makes them, at half the speed.

    Returns:
      What to pass as `jax.jit(..., compiler_options=)`. Like all such options they are for
      functions that are not called in other jitted functions.

    Example:
      >>> step = jax.jit(step, compiler_options=dhp.compiler_options())
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # a version of XLA that has no such option
        return {}
    return options


def steps_per_dispatch() -> int:
    """How many training steps the device is given at once.

    One on CPU, where a convolution within a loop is many times slower: XLA runs it on one core, and
    not as Eigen would. Elsewhere as many as keep the host from holding up the device, and let a run
    that is told to stop do so in seconds.
    """
    return 1 if jax.default_backend() == "cpu" else 32
