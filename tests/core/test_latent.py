"""Channel axes: their values, multiplicities, survivors and names."""

import os
from pathlib import Path
import subprocess
import sys

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.latent import modules_in, walk


def latent(size, seed=0, **options):
    return dhp.Latent(size, rngs=nnx.Rngs(seed), **options)


A, B, C = latent(3, 1), latent(1, 2), latent(4, 3)


# A latent


def test_a_latent_is_drawn_from_the_standard_normal_distribution():
    values = np.asarray(latent(4000).value())
    assert values.dtype == np.float32
    assert abs(values.mean()) < 0.06
    assert abs(values.std() - 1) < 0.04
    assert abs(np.mean(np.abs(values) < 1) - 0.6827) < 0.03


def test_latents_of_one_generator_differ_and_of_equal_seeds_are_equal():
    rngs = nnx.Rngs(7)
    first, second = (np.asarray(dhp.Latent(3, rngs=rngs).value()) for _ in range(2))
    assert not np.any(first == second)
    np.testing.assert_array_equal(first, latent(3, 7).value())


X64 = """
import sys
from flax import nnx
import jax
import numpy as np
import dhp_jax as dhp

made, read = sys.argv[1:]
model = dhp.models.build("resnet", depth=8, width=0.25, rngs=nnx.Rngs(0))
dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))}
assert dtypes == {"float32"}, dtypes
x = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
dhp.save(made, model)
if read != "none":
    model.eval()
    other = dhp.load(read)
    for mine, its in zip(dhp.latents(model).values(), dhp.latents(other).values(), strict=True):
        np.testing.assert_array_equal(mine.value(), its.value())
    np.testing.assert_allclose(other(x), model(x), rtol=1e-3, atol=1e-5)
    dhp.with_latents(dhp.prune(model), rngs=nnx.Rngs(1))
"""


def test_networks_are_float32_under_x64_and_load_across_the_setting(tmp_path, monkeypatch):
    def exec_here(made, read):
        monkeypatch.setattr(sys, "argv", ["", str(made), str(read)])
        exec(X64, {})

    exec_here(tmp_path / "a", "none")
    done = subprocess.run(
        [sys.executable, "-c", X64, tmp_path / "b", tmp_path / "a"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    exec_here(tmp_path / "c", tmp_path / "b")


def test_min_channels_are_at_most_the_size():
    assert latent(3).min_channels == 3
    assert latent(16).min_channels == 4
    assert latent(16, min_channels=20).min_channels == 16


def test_the_variable_tells_an_optimizer_whether_and_how_far_it_may_shrink():
    vectors = [latent(8, prunable=False), latent(8, min_channels=2)]
    state = nnx.state(nnx.List(vectors), dhp.LatentVector)
    told = [leaf.get_metadata() for _, leaf in nnx.to_flat_state(state)]
    assert [(t["prunable"], t["min_channels"]) for t in told] == [(False, 4), (True, 2)]


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "3", None])
def test_a_latent_refuses_a_size_that_is_not_a_positive_integer(size):
    with pytest.raises(ValueError, match=f"^size: expected a positive integer, got {size!r}$"):
        latent(size)


@pytest.mark.parametrize("count", [0, -4, 1.0, False])
def test_a_latent_refuses_min_channels_that_are_not_a_positive_integer(count):
    with pytest.raises(ValueError, match=f"^min_channels: .* got {count!r}$"):
        latent(8, min_channels=count)


def test_a_latent_takes_a_numpy_integer_as_its_size():
    assert latent(np.int64(5)).value().shape == (5,)


# Concat and repeat


def test_concat_is_the_parts_one_after_another():
    expected = np.concatenate([A.value(), B.value(), C.value()])
    axis = dhp.concat(A, B, C)
    np.testing.assert_array_equal(axis.value(), expected)
    assert axis.size == 8
    assert axis.multiplicity() == {A: 1, B: 1, C: 1}


def test_repeat_stands_for_neighbouring_channels():
    axis = dhp.repeat(A, 4)
    np.testing.assert_array_equal(axis.value(), np.repeat(A.value(), 4))
    np.testing.assert_array_equal(
        axis.keep({A: np.array([True, False, True])}), [1] * 4 + [0] * 4 + [1] * 4
    )
    assert axis.multiplicity() == {A: 4}


def test_one_latent_may_stand_twice_in_an_axis():
    axis = dhp.concat(A, B, A)
    np.testing.assert_array_equal(axis.value(), np.concatenate([A.value(), B.value(), A.value()]))
    assert axis.multiplicity() == {A: 2, B: 1}
    masks = {A: np.array([False, True, True]), B: np.array([True])}
    np.testing.assert_array_equal(axis.keep(masks), [0, 1, 1, 1, 0, 1, 1])


def test_keep_without_masks_keeps_everything():
    np.testing.assert_array_equal(dhp.concat(A, dhp.repeat(B, 2)).keep(None), np.ones(5, bool))


def test_the_flattened_channels_of_a_feature_map_are_a_concat_of_one_axis():
    feature_map = np.tile(np.asarray(A.value()), (1, 2, 5, 1))  # every pixel holds the latent
    axis = dhp.concat(*[A] * 10)
    np.testing.assert_array_equal(axis.value(), feature_map.reshape(1, -1)[0])


def test_a_pixel_shuffle_drops_whole_channels_with_a_repeated_axis():
    keep = np.array([True, False, True])
    x = np.arange(2 * 2 * 12.0).reshape(2, 2, 12)

    def shuffled(x):
        h, w, c = x.shape
        return x.reshape(h, w, c // 4, 2, 2).transpose(0, 3, 1, 4, 2).reshape(2 * h, 2 * w, c // 4)

    sliced_first = shuffled(x[..., dhp.repeat(A, 4).keep({A: keep})])
    np.testing.assert_array_equal(sliced_first, shuffled(x)[..., keep])


# An axis and the same axis made of NumPy arrays, by which latent each channel belongs to.
def _concat(parts):
    return dhp.concat(*[axis for axis, _ in parts]), np.concatenate([made for _, made in parts])


def _repeat(pair):
    (axis, made), times = pair
    return dhp.repeat(axis, times), np.repeat(made, times)


AXES = st.recursive(
    st.sampled_from(
        [(z, np.array([(n, i) for i in range(z.size)], "i,i")) for n, z in enumerate((A, B, C))]
    ),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(_concat)
        | st.tuples(inner, st.integers(1, 3)).map(_repeat)
    ),
    max_leaves=4,
)


@given(AXES, st.integers(0, 2**8 - 1))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_every_nested_axis_agrees_with_numpy(pair, bits):
    axis, channels = pair
    bits = np.array([bits >> i & 1 for i in range(8)], bool)
    masks = dict(zip((A, B, C), np.split(bits, [3, 4]), strict=True))
    by_number = [np.asarray(z.value()) for z in (A, B, C)]
    np.testing.assert_array_equal(axis.value(), [by_number[n][i] for n, i in channels])
    survives = [list(masks.values())[n][i] for n, i in channels]
    np.testing.assert_array_equal(axis.keep(masks), survives)
    assert axis.size == len(channels)
    counted = sum(times * masks[z].sum() for z, times in axis.multiplicity().items())
    assert counted == sum(survives)


def test_gradients_of_a_nested_axis_sum_over_the_channels_an_entry_stands_for():
    axis = dhp.concat(dhp.repeat(A, 2), C, A)
    weights = np.arange(1.0, 14.0, dtype=np.float32)
    grads = nnx.grad(lambda axis: jnp.sum(axis.value() * weights))(axis)
    found = {leaf.get_value().size: leaf.get_value() for _, leaf in nnx.to_flat_state(grads)}
    np.testing.assert_array_equal(found[3], weights[:6].reshape(3, 2).sum(1) + weights[10:])
    np.testing.assert_array_equal(found[4], weights[6:10])


def test_concat_refuses_to_be_empty():
    with pytest.raises(ValueError, match=r"^concat: expected at least one axis, got none$"):
        dhp.concat()


def test_concat_names_the_argument_that_is_no_axis():
    with pytest.raises(ValueError, match=r"^concat: argument 1: expected a Latent.*, got 64$"):
        dhp.concat(A, 64)


def test_repeat_refuses_what_is_no_axis():
    with pytest.raises(ValueError, match=r"^repeat: argument axis: expected a Latent.*, got 3$"):
        dhp.repeat(3, 2)


@pytest.mark.parametrize("times", [0, -1, 1.5, True])
def test_repeat_refuses_times_that_are_not_a_positive_integer(times):
    with pytest.raises(ValueError, match=f"^times: expected a positive integer, got {times!r}$"):
        dhp.repeat(A, times)


# Names and filters


class Net(nnx.Module):
    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


def test_a_latent_is_named_by_its_shortest_path():
    z = latent(2)
    model = Net(deep=Net(deeper=Net(z=z)), shallow=Net(z=z))
    assert dhp.latents(model) == {"shallow.z": z}


def test_equally_short_paths_come_in_natural_order():
    zs = [latent(2, seed) for seed in range(11)]
    model = Net(blocks=nnx.List([Net(z=z, also=zs[10]) for z in zs[:10]] + [Net(z=zs[10])]))
    names = {z: name for name, z in dhp.latents(model).items()}
    assert names[zs[10]] == "blocks.0.also"
    assert names[zs[9]] == "blocks.9.z"
    numbered = Net(layer10=Net(z=A), layer9=Net(z=A), layer2=Net(z=B))
    assert dhp.latents(numbered) == {"layer2.z": B, "layer9.z": A}


def test_latents_come_breadth_first():
    model = Net(a=Net(inner=Net(z=A)), b=Net(z=B), c=C)
    assert list(dhp.latents(model).items()) == [("c", C), ("b.z", B), ("a.inner.z", A)]


def test_latents_inside_axes_are_found():
    model = Net(conv=dhp.concat(A, dhp.repeat(B, 2)))
    assert dhp.latents(model) == {"conv.parts.0": A, "conv.parts.1.base": B}


@pytest.mark.parametrize(
    ("container", "names"),
    [
        (nnx.List([A, B]), ["m.0", "m.1"]),
        (nnx.Dict(y=A, x=B), ["m.x", "m.y"]),
        (nnx.Sequential(A, B), ["m.layers.0", "m.layers.1"]),
        (nnx.data([A, B]), ["m.0", "m.1"]),
        (nnx.data({"y": (A, 3), "x": [nnx.relu, B]}), ["m.x.1", "m.y.0"]),
    ],
)
def test_latents_in_every_kind_of_container_are_found(container, names):
    found = dhp.latents(Net(m=container))
    assert list(found) == names
    assert set(found.values()) == {A, B}


def test_walk_yields_a_shared_module_once_with_its_parent():
    shared = Net(z=A)
    model = Net(one=shared, two=Net(three=shared))
    assert [(path, parent) for path, parent, _ in walk(model)] == [
        ("", None),
        ("one", model),
        ("two", model),
        ("one.z", shared),
    ]


def test_walk_ends_where_modules_refer_to_each_other():
    one, two = Net(), Net()
    one.other, two.other = two, one
    assert [path for path, _, _ in walk(one)] == ["", "other"]


def test_modules_in_looks_into_containers_only():
    assert dict(modules_in([A, {"x": (B,)}, "text", 3], "p")) == {"p.0": A, "p.1.x.0": B}


def test_latent_vectors_are_a_filter_that_separates_them_from_weights():
    z_in, z_out = latent(2, 5), latent(3, 6)
    conv = dhp.HyperConv(z_in, z_out, (1, 1), rngs=nnx.Rngs(0))
    model = Net(conv=conv, norm=dhp.BatchNorm(z_out, rngs=nnx.Rngs(0)))
    _, vectors, weights, rest = nnx.split(model, dhp.LatentVector, nnx.Param, ...)
    np.testing.assert_array_equal(
        np.concatenate(jax.tree.leaves(vectors)), np.concatenate([z_in.value(), z_out.value()])
    )
    assert {path[-1] for path, _ in nnx.to_flat_state(weights)} == {
        *("b0", "w1", "b1", "w2", "b2", "bias", "scale")
    }
    assert {path[-1] for path, _ in nnx.to_flat_state(rest)} == {"mean", "var"}


# What is printed


def test_an_axis_and_a_layer_on_it_are_one_line():
    rngs = nnx.Rngs(0)
    image, z = dhp.Latent(3, prunable=False, rngs=rngs), dhp.Latent(64, rngs=rngs)
    assert repr(image) == "Latent(3, prunable=False)"
    assert repr(dhp.repeat(z, 4)) == "Repeat(Latent(64), 4)"
    assert repr(dhp.concat(image, z)) == "Concat(Latent(3, prunable=False), Latent(64), size=67)"
    many = dhp.concat(*[z] * 49)
    assert repr(many) == "Concat(Latent(64), Latent(64), Latent(64), more=46, size=3136)"
    for layer, text in (
        (dhp.HyperConv(z, z, (3, 3), rngs=rngs), "HyperConv(Latent(64), Latent(64), (3, 3))"),
        (
            dhp.HyperConv(z, z, 3, 2, feature_group_count=64, rngs=rngs),
            "HyperConv(Latent(64), Latent(64), (3,), strides=2, feature_group_count=64)",
        ),
        (
            dhp.HyperConvTranspose(z, image, (2, 2), rngs=rngs),
            "HyperConvTranspose(Latent(64), Latent(3, prunable=False), (2, 2))",
        ),
        (dhp.BatchNorm(z, rngs=rngs), "BatchNorm(Latent(64))"),
        (dhp.GroupNorm(z, 64, rngs=rngs), "GroupNorm(Latent(64), num_groups=64)"),
        (dhp.Bias(z, rngs=rngs), "Bias(Latent(64))"),
        (dhp.Linear(z, z, rngs=rngs), "HyperLinear(Latent(64), Latent(64))"),
        (dhp.Linear(z, 10, rngs=rngs), "Linear(Latent(64), 10)"),
    ):
        assert repr(layer) == text


@pytest.mark.parametrize(
    "name",
    ["unet", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet", "vgg", "densenet"))],
)
def test_a_network_of_a_family_fits_a_screen_whole_and_pruned(name):
    depth = {"vgg": 11, "densenet": 7, "unet": 3}.get(name, 56)

    def model():
        return dhp.models.build(name, depth=depth, rngs=nnx.Rngs(0))

    whole, small = nnx.eval_shape(model), nnx.eval_shape(lambda: dhp.prune(model()))
    count = len(dhp.latents(whole))
    for network, left in ((whole, f"{count} latents"), (small, "no latents")):
        first, *lines, last = repr(network).splitlines()
        assert first == f"{type(whole).__name__}(  # {left}"
        assert f"  depth={depth}," in [line.rstrip(",") + "," for line in lines]
        assert last == ")"
        assert len(lines) < 20
        assert max(map(len, lines)) <= 80


def test_a_network_of_ones_own_is_a_line_for_each_layer():
    class Net(nnx.Module):
        def __init__(self, rngs):
            z = dhp.Latent(8, rngs=rngs)
            self.conv, self.norm = dhp.HyperConv(z, z, (3, 3), rngs=rngs), nnx.Dict(a=z)

    lines = repr(Net(nnx.Rngs(0))).splitlines()
    assert lines[1] == "  conv=HyperConv(Latent(8), Latent(8), (3, 3)),"
    assert len(lines) == 6
    pruned = repr(dhp.prune(Net(nnx.Rngs(0)))).splitlines()
    assert pruned[-2] == "  dhp_architecture=Architecture(of one's own, pruned)"
