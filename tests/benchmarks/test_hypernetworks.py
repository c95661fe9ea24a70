"""Kinds of hypernetworks in `benchmarks/hypernetworks.py`: exact pruning, initial kernels."""

from pathlib import Path
import sys

from flax import nnx
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.latent import walk
from dhp_jax.core.surgery import prune as cut

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import hypernetworks


def is_like_another(kind):
    """The paper's with other embeddings, and what is told by two other kinds together."""
    both = kind.name.startswith("shared") and "tanh" in kind.name
    return both or (kind.name.startswith("paper's") and "8" not in kind.name)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.name, marks=[pytest.mark.slow] * is_like_another(kind))
        for kind in hypernetworks.KINDS
    ],
)
def test_every_kind_begins_alike_and_prunes_to_slices_of_its_kernels(kind, fast_compilation):
    model = hypernetworks.build(kind, 0, 8)
    keep = {
        name: np.arange(z.size) % 2 < 1 if z.prunable else np.ones(z.size, bool)
        for name, z in dhp.latents(model).items()
    }
    small = {path: layer for path, _, layer in walk(cut(model, keep))}
    masks = {z: keep[name] for name, z in dhp.latents(model).items()}
    compared = 0
    for path, _, layer in walk(model):
        if isinstance(layer, dhp.HyperConv):
            kernel = np.asarray(layer.kernel())
            fan_in = kernel.size // kernel.shape[-1]
            rel = 1.0 if kind.name.startswith("paper's") else 1e-3  # the paper's as they are drawn
            assert kernel.std() == pytest.approx(fan_in**-0.5, rel=rel)
            rows, columns = layer.z_in.keep(masks), layer.z_out.keep(masks)
            expected = kernel[:, :, rows][..., columns]
            assert isinstance(small[path], nnx.Conv)
            np.testing.assert_array_equal(small[path].kernel[...], expected)
            compared += expected.shape != kernel.shape
    assert compared > 5


def test_a_shared_embedding_is_one_of_all_layers():
    (kind,) = (k for k in hypernetworks.KINDS if k.name == "shared embedding of 10")
    model = hypernetworks.build(kind, 0, 8)
    embeddings = {id(layer.w1) for layer in hypernetworks.hypernetworks(model)}
    assert len(embeddings) == 1


def test_the_table_has_a_line_for_each_kind():
    run = {"numbers a weight": 2.0, "search": 100, "flops after the search": 0.52, "params": 0.5}
    runs = [run | {"error": error} for error in (0.01, 0.03)]
    rows = [{"kind": "tanh", "step": [1.0, 1.2, 1.1], "runs": runs}]
    line = hypernetworks.as_table(rows).splitlines()[-1]
    assert line == "| tanh | 2.0 | 1.10 | 100 | 52 % | 50 % | 2.00 % (1.00 to 3.00) |"
