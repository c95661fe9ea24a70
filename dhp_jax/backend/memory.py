"""Memory of XLA:CPU that stays with the process."""

import ctypes
import sys

import jax

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of glibc's `mallopt`


def keep_memory() -> bool:
    """Has a process that computes on a CPU keep memory that it has freed; needs glibc.

    XLA takes all temporary arrays of a call as one block. By default, glibc gives so large a block
    back to the kernel, and the next call gets other pages, one page fault each: 26,000 for a step
    of ResNet-20 at batch 64. After this the block comes from the heap, and stays there. A thread
    that is not the first has a heap too small for that, so JAX computes in the thread that calls
    it. These are settings of the process; runs have them.

    Call it before JAX computes anything. Later it has no effect on JAX. The process holds the most
    memory that it has used until it ends.

    Returns:
      Whether memory is kept; `False` on other platforms and with other C libraries.

    Example:
      >>> dhp.keep_memory()
      True

    Source: mallopt(3).
    """
    if sys.platform != "linux":
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() != "cpu":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1))
