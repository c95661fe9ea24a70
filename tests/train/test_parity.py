"""Search steps in float64 against an implementation in PyTorch, whose results are a fixture.

benchmarks/parity.py has made it, and tests/support/parity.py does the same by the library.
"""

import json
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]
FIXTURE = TESTS / "fixtures/parity.json"
NETWORKS = ("resnet", "mobilenet_v2", "unet")
MUTATIONS = (
    *("strength", "decay", "floor", "momentum", "eps"),
    *("padding", "last_stage", "stem", "gradient"),
)


def run(*mutations):
    """What the library finds, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, TESTS / "support/parity.py", *mutations]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def expected():
    return json.loads(FIXTURE.read_text())


@pytest.fixture(scope="module")
def found():
    """The residual network alone."""
    return {"resnet": run("none")["none"]}


@pytest.fixture(scope="module")
def all_found():
    return run()


def check(found, expected):
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=0, atol=1e-10)
    assert found["tested"] == pytest.approx(expected["tested"], abs=1e-10)
    assert found["latents"].keys() == expected["latents"].keys()
    for name, vector in expected["latents"].items():
        np.testing.assert_allclose(found["latents"][name], vector, rtol=0, atol=1e-10)
    assert found["survivors"] == expected["survivors"]


def test_losses_latents_and_survivors_of_a_search_are_those_of_pytorch(found, expected):
    check(found["resnet"], expected["resnet"])


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_those_of_every_network_are(all_found, expected, network):
    check(all_found[network], expected[network])


def test_the_fixture_looks_at_what_it_should(expected):
    assert FIXTURE.stat().st_size < 200_000
    for network in NETWORKS:
        kept = expected[network]["survivors"]
        sizes = {name: len(vector) for name, vector in expected[network]["latents"].items()}
        assert any(len(kept[name]) == 3 < sizes[name] for name in sizes), "no latent at its floor"
        assert len({round(loss, 6) for loss in expected[network]["losses"]}) == 8


@pytest.fixture(scope="module")
def mutated():
    return run("none", *MUTATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_finds_a_fault(mutated, expected, mutation):
    check(mutated["none"], expected["resnet"])
    with pytest.raises(AssertionError):
        check(mutated[mutation], expected["resnet"])
