"""Every awkward topology has the families that it should, and is pruned to the right numbers."""

from awkward import CASES
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from restricted import difference, gone_of, in_float64, proved_cut, randomised, restricted, zeroed

from dhp_jax.tracing import discover

# Between other layers test_nnx_layers.py has them, too.
SLOW = ("Norms", "GroupNormed", "Lstm", "ConvTransposed")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
)
def test_what_survives_computes_what_the_whole_network_without_the_rest_does(
    name, fast_compilation
):
    case = CASES[name]
    double = name != "Lstm"  # whose carry is float32 whatever its arrays are
    branches = name in ("Transformed", "WidthOutOfABranch")  # to look into
    compiled = (lambda f: f) if branches else jax.jit
    with jax.enable_x64(double):
        model, inputs = randomised(case.build(nnx.Rngs(0))), case.inputs()
        if double:
            model, inputs = in_float64(model), jax.tree.map(_wide, inputs)
        found = discover(model, tuple(inputs))
        assert sorted(family.size for family in found.families) == case.sizes
        assert not found.analysis.flow.unknown
        if not case.sizes:
            return  # nothing can be cut
        rng = np.random.default_rng(1)
        masks = {family.name: rng.random(family.size) < 0.6 for family in found.families}
        for mask in masks.values():
            mask[rng.choice(len(mask), 2, replace=False)] = [True, False]
        small = proved_cut(found, masks)
        graphdef, state = nnx.split(small)
        run = compiled(lambda s, *x: nnx.merge(graphdef, s, copy=True)(*x))
        outputs, gone = run(state, *inputs), gone_of(found, masks)
        wide = all(x.dtype == jnp.float64 for x in jax.tree.leaves(outputs))
        assert wide or name in ("TiedEmbedding", "Lstm")  # compute in float32 whatever they have
        allowed = 1e-12 if wide else 1e-6
        expected = compiled(lambda *x: restricted(found.analysis, gone, x))(*inputs)
        assert difference(outputs, expected) < allowed
        if not any(f.renormalises or f.summed or f.chosen for f in found.families):
            expected = compiled(lambda *x: zeroed(found.analysis, gone, x))(*inputs)
            assert difference(outputs, expected) < allowed


def _wide(x):
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
