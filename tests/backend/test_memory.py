"""The memory of a call stays with the process for the next one."""

import subprocess
import sys

import pytest

CALLS = 40
PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np
import dhp_jax as dhp

kept = dhp.keep_memory() if sys.argv[1] == "kept" else None
twice = jax.jit(lambda x, w: (jnp.sin(x @ w) @ w).max())  # two temporary arrays of 64 MB
given, others = (jnp.ones((2**19, 32)), jnp.ones((32, 32))), []
for _ in range(3):
    twice(*given).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF)
for _ in range({calls}):
    twice(*given).block_until_ready()
    others.append(np.ones(1000))  # what lives longer lies between blocks
after = resource.getrusage(resource.RUSAGE_SELF)
print(kept, after.ru_minflt - before.ru_minflt, after.ru_maxrss - before.ru_maxrss)
"""


def measured(how: str) -> tuple[str, int, int]:
    """What `keep_memory` has returned, the page faults of the calls, and what they added, in kB."""
    command = [sys.executable, "-c", PROGRAM.format(calls=CALLS), how]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    kept, faults, added = run.stdout.split()
    return kept, int(faults), int(added)


@pytest.mark.slow
def test_calls_use_the_memory_of_those_before():
    _, faults_by_default, _ = measured("default")
    kept, faults, added = measured("kept")
    if kept != "True":
        pytest.skip("another platform or C library")
    assert faults_by_default > CALLS * 1000  # 64 MB and more of each call, in pages of 4 kB
    assert faults < 0.3 * faults_by_default
    assert added < 800_000  # what lives longer may part a few blocks of 64 MB, not one a call
