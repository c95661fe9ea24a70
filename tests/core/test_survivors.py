"""Which entries of latents survive a threshold."""

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
import jax
import jax.numpy as jnp
from networks import Mixed, check_same, filled, keep_all, thin_resnet
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.survivors import survivor_counts, survivor_mask
from dhp_jax.train.records import latent_history

MAGNITUDES = st.floats(0, 2, width=16)


def test_the_history_of_a_search_counts_prunable_latents_only():
    model = filled(Mixed)
    found = jax.jit(lambda: latent_history(model, 0.5))()
    prunable = {name: z for name, z in dhp.latents(model).items() if z.prunable}
    masks = dhp.survivors(model, 0.5)
    assert found["survivors"].tolist() == [masks[name].sum() for name in prunable]
    magnitudes = np.sort(np.concatenate([np.abs(z.value()) for z in prunable.values()]))
    assert found["magnitudes"].shape == (11,)
    assert np.asarray(found["magnitudes"])[[0, 10]].tolist() == magnitudes[[0, -1]].tolist()
    assert latent_history(dhp.prune(model), 0.5) == {}


@given(
    npst.arrays(np.float32, st.sampled_from([1, 2, 11]), elements=st.floats(-2, 2, width=16)),
    MAGNITUDES,
    st.sampled_from([1, 2, 5, 11, 14]),
)
@settings(deadline=None, derandomize=True, max_examples=30)
def test_survivors_are_those_of_the_definition(vector, threshold, min_channels):
    magnitude = np.abs(vector)
    largest = sorted(range(len(vector)), key=lambda i: (-magnitude[i], i))[:min_channels]
    expected = magnitude >= np.float32(threshold)
    expected[largest] = True
    found = np.asarray(survivor_mask(jnp.asarray(vector), threshold, min_channels))
    np.testing.assert_array_equal(found, expected)
    assert found.sum() >= min(min_channels, len(vector))
    assert found[magnitude >= threshold].all()


def test_a_latent_that_is_not_finite_has_no_survivors():
    model = thin_resnet()
    name, z = next((name, z) for name, z in dhp.latents(model).items() if z.prunable)
    z.vector.set_value(z.vector[...].at[1].set(jnp.nan))
    with pytest.raises(ValueError, match=f"finite latents, got NaN or infinity in '{name}'"):
        dhp.survivors(model)


@pytest.mark.parametrize("left", range(6))
def test_of_channels_that_are_all_gone_no_more_survive_than_have_to(left):
    class Alone(nnx.Module):
        def __init__(self, rngs):
            self.z = dhp.Latent(16, rngs=rngs)

    model = filled(Alone)
    model.z.vector.set_value(jnp.where(jnp.arange(16) >= 16 - left, 1.0, 0.0))
    kept = dhp.survivors(model)["z"]
    assert kept[16 - left :].all()
    assert kept.sum() == survivor_counts(model, 5e-3)["z"] == max(4, left)


def test_survivors_are_the_same_inside_jit():
    vector = jnp.asarray(np.random.default_rng(0).normal(size=30), jnp.float32)
    jitted = jax.jit(survivor_mask, static_argnums=2)(vector, 0.7, 4)
    np.testing.assert_array_equal(jitted, np.abs(vector) >= np.float32(0.7))


def test_latents_that_are_not_prunable_keep_everything():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fixed = dhp.Latent(6, prunable=False, rngs=rngs)
            self.free = dhp.Latent(6, min_channels=2, rngs=rngs)

    model = filled(Net)
    masks = dhp.survivors(model, threshold=100.0)
    magnitude = np.abs(model.free.value())
    np.testing.assert_array_equal(masks["fixed"], np.ones(6, bool))
    np.testing.assert_array_equal(masks["free"], magnitude >= np.sort(magnitude)[-2])
    check_same(dhp.survivors(model, threshold=0), keep_all(model))


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_a_threshold_that_is_negative_is_refused(threshold):
    with pytest.raises(ValueError, match=f"^threshold: expected a number >= 0, got {threshold}$"):
        dhp.survivors(filled(Mixed), threshold)
