"""Foreign architectures: what can go, what stays and why, and that what is left is right."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
from miniatures import MINIATURES, inputs_of
import numpy as np
import pytest
from restricted import difference, gone_of, in_float64, proved_cut, randomised, restricted

import dhp_jax as dhp
from dhp_jax.tracing import discover

FEW = ("ResNetD", "VisionTransformer", "UNet")  # test_nnx_layers.py has recurrent layers
few_miniatures = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FEW)) for n in MINIATURES]
)


def contractions(jaxpr, times=1):
    """FLOPs of a program by an own walk: loops multiply what is in them."""
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            summed = params["dimension_numbers"][0][0]
            over = math.prod(eqn.invars[0].aval.shape[k] for k in summed)
            total += times * math.prod(eqn.outvars[0].aval.shape) * over
        elif name == "conv_general_dilated":
            kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
            filters = kernel[params["dimension_numbers"][1][0]]
            total += times * math.prod(out) * math.prod(kernel) // filters
        for value in params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                runs = params["length"] if name == "scan" else 1
                total += contractions(inner, times * runs)
    return total


def flops_by_hand(model, inputs):
    model.eval()
    graphdef, state = nnx.split(model)

    def forward(state, *inputs):
        return nnx.merge(graphdef, state, copy=True)(*inputs)

    return contractions(jax.make_jaxpr(forward)(state, *inputs).jaxpr)


def untold(found):
    """Axes of arrays that neither can go nor have a reason to stay."""
    names = found.analysis.names
    told = {place for places in found.fixed().values() for place in places}
    told |= {(names[number], k) for family in found.families for number, k in family.places}
    every = zip(names, found.analysis.arrays, strict=True)
    axes = {(n, k) for n, axes in every for k, axis in enumerate(axes) if axis is not None}
    return axes - told


@few_miniatures
def test_a_miniature_is_pruned_to_the_right_numbers(name, fast_compilation):
    given = MINIATURES[name]
    double = name not in ("Gru", "Lstm")  # whose carry is float32 whatever the arrays are
    with jax.enable_x64(double):
        model = randomised(given.build(nnx.Rngs(0)))
        model.eval()
        inputs = inputs_of(given, jnp.float64 if double else jnp.float32)
        if double:
            model = in_float64(model)
        found = discover(model, inputs)
        assert len(found.families) >= given.families
        reasons = [*found.fixed(), *(why for _, why in found.frozen)]
        assert any(given.stays in why for why in reasons)
        assert any(".py:" in why for why in reasons)
        assert not found.analysis.flow.unknown
        assert untold(found) == set()
        assert "" not in found.fixed()
        rng = np.random.default_rng(0)
        masks = {f.name: rng.random(f.size) < 0.6 for f in found.families}
        for mask in masks.values():
            mask[rng.choice(len(mask), 2, replace=False)] = [True, False]
        small = proved_cut(found, masks)
        gone = gone_of(found, masks)
        expected = jax.jit(lambda *x: restricted(found.analysis, gone, x))(*inputs)
        graphdef, state = nnx.split(small)
        outputs = jax.jit(lambda s, *x: nnx.merge(graphdef, s, copy=True)(*x))(state, *inputs)
        wide = all(x.dtype == jnp.float64 for x in jax.tree.leaves(outputs))
        assert wide or name in ("Decoder", "Gru", "Lstm")  # compute in float32 whatever they have
        assert difference(outputs, expected) < (1e-12 if wide else 1e-6)


@few_miniatures
def test_a_miniature_of_latents_is_what_it_was_is_counted_and_comes_back(
    name, tmp_path, fast_compilation
):
    given = MINIATURES[name]
    model, inputs = given.build(nnx.Rngs(0)), inputs_of(given)
    model.eval()
    net = dhp.with_latents(model, given.inputs, min_channels=2)
    run = jax.jit(lambda graphdef, state, *x: nnx.merge(graphdef, state)(*x), static_argnums=0)
    same = zip(*(jax.tree.leaves(run(*nnx.split(m), *inputs)) for m in (model, net)), strict=True)
    assert all(np.array_equal(one, other) for one, other in same)
    rng = np.random.default_rng(1)
    keep = {}
    for latent, z in dhp.latents(net).items():
        keep[latent] = rng.permutation(z.size) < max(2, z.size // 2)
    small = dhp.prune(net, keep)
    cost = dhp.measure_cost(net, given.inputs)
    counts = {latent: int(mask.sum()) for latent, mask in keep.items()}
    found = dhp.measure_cost(small, given.inputs)
    assert cost.amounts(counts) == found.amounts({})
    one = [x if not isinstance(x, tuple) else jnp.zeros((1, *x)) for x in given.inputs]
    norms = sum(layer.flops for layer in found.layers if layer.kind == "BatchNorm")
    assert found.flops - norms == flops_by_hand(small, one)
    assert found.params == sum(x.size for x in jax.tree.leaves(nnx.state(small, nnx.Param)))
    small.eval()
    dhp.save(tmp_path / "small", small)
    loaded = dhp.load(tmp_path / "small", build=given.build)
    same = zip(
        *(jax.tree.leaves(run(*nnx.split(m), *inputs)) for m in (small, loaded)), strict=True
    )
    assert all(np.array_equal(one, other) for one, other in same)
