"""Families of networks: how they are built, and which axes of a ResNet are one."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from networks import SMALL, arrays, images, run, thin_resnet
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.core.latent import walk
from dhp_jax.core.layers import Hyper
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.surgery import prune as cut
from dhp_jax.models.resnet import Block

BLOCKS = {8: 3, 14: 6, 20: 9, 32: 15, 44: 21, 56: 27, 110: 36, 164: 54}


def build(depth=20, **arguments):
    return dhp.models.build("resnet", depth=depth, rngs=nnx.Rngs(0), **arguments)


@functools.cache
def abstract(**arguments):
    """A network of shapes alone; tests leave it as it is."""
    return dhp.models.build_abstract("resnet", **{"depth": 20, **arguments})


def output(model, shape):
    graphdef, state = nnx.split(model)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda state, x: nnx.merge(graphdef, state, copy=True)(x), state, x)


# Building


@pytest.mark.parametrize(("name", "near"), [("resnt", "'resnet'"), ("ResNet", "'resnet'")])
def test_an_unknown_family_is_refused_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"expected one of .*resnet.*; got {name!r}.*{near}"):
        dhp.models.build(name, rngs=nnx.Rngs(0))


def test_an_unknown_argument_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="got 'num_clases'; did you mean 'num_classes'"):
        build(num_clases=10)
    with pytest.raises(ValueError, match="got 'self'"):
        build(self=1)


def test_a_missing_argument_is_refused():
    with pytest.raises(ValueError, match="depth: expected a value, got none"):
        dhp.models.build("resnet", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("depth", [0, 17, 49, 21, "56", None, 20.5])
def test_a_depth_that_is_not_of_the_family_is_refused(depth):
    with pytest.raises(ValueError, match=r"^depth: expected one of \(8, 14, 20, .*\) .* got "):
        build(depth)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_classes", 0),
        ("num_classes", 2.5),
        ("num_classes", "ten"),
        ("width", 0),
        ("width", -1.0),
        ("width", "wide"),
        ("width", float("nan")),
        ("min_channels", 0),
        ("dtype", "float17"),
    ],
)
def test_an_argument_that_makes_no_network_is_refused(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: expected .*, got {value!r}$"):
        build(**{argument: value})


@pytest.mark.parametrize("channels", [0, -3, 1.5])
def test_a_channel_count_that_is_not_positive_is_refused(channels):
    with pytest.raises(ValueError, match=f"expected a positive integer, got {channels!r}$"):
        build(channels=channels)


def test_a_built_network_tells_how_it_was_made():
    assert architecture_of(abstract(depth=32, width=0.5)).arguments == {"depth": 32, "width": 0.5}
    for dtype in ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")):
        made = architecture_of(abstract(dtype=dtype))
        assert (made.family, made.survivors) == ("resnet", None)
        assert made.arguments == {"depth": 20, "dtype": "bfloat16"}
    assert architecture_of(nnx.Dict()).family is None


def test_seeds_make_the_same_block_and_other_seeds_another():
    def drawn(seed):
        rngs = nnx.Rngs(seed)
        z_in, hidden, z_out = (dhp.Latent(size, rngs=rngs) for size in (4, 5, 6))
        return arrays(Block(z_in, [hidden], z_out, (3, 3), 2, dtype=None, rngs=rngs))

    first, again, other = drawn(0), drawn(0), drawn(1)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        if name.split(".")[-1] in ("vector", "w1", "w2"):
            assert np.std(array) > 0
            assert not np.any(array == other[name])


# ResNets


@pytest.mark.parametrize(
    "depth", [pytest.param(d, marks=[pytest.mark.slow] * (d in (44, 56, 164))) for d in BLOCKS]
)
def test_every_depth_is_built_with_its_blocks_and_convolutions(depth):
    model = abstract(depth=depth)
    assert len(model.blocks) == BLOCKS[depth]
    convs = [m for _, m in nnx.iter_modules(model) if isinstance(m, dhp.HyperConv)]
    projections = [block for block in model.blocks if block.projection is not None]
    # The depth counts the classifier and, of the convolutions, all but projections.
    assert len(convs) - len(projections) + 1 == depth
    assert len(projections) == (3 if depth > 56 else 2)
    sizes = [z.size for z in model.stages]
    assert sizes == ([64, 128, 256] if depth > 56 else [16, 32, 64])
    assert model.classifier.in_features == sizes[-1]


@pytest.mark.parametrize(
    ("width", "stages"),
    [(1.0, (16, 32, 64)), (2, (32, 64, 128)), (0.3, (5, 10, 19)), (0.01, (1, 1, 1))],
)
def test_the_width_multiplies_every_stage(width, stages):
    model = abstract(width=width)
    assert tuple(z.size for z in model.stages) == stages
    for stage, size in enumerate(stages):
        assert {model.blocks[3 * stage + i].hidden[0].size for i in range(3)} == {size}
    assert model.image.size == 3


@pytest.mark.parametrize(
    ("arguments", "shape", "expected"),
    [
        ({}, (2, 32, 32, 3), (2, 10)),
        ({"num_classes": 1}, (1, 8, 8, 3), (1, 1)),
        ({"num_classes": 200, "channels": 1}, (3, 28, 28, 1), (3, 200)),
        ({"channels": 5, "depth": 14}, (1, 33, 17, 5), (1, 10)),
        ({}, (1, 1, 1, 3), (1, 10)),
    ],
)
def test_any_number_of_classes_channels_and_pixels_is_taken(arguments, shape, expected):
    scores = output(abstract(**arguments), shape)
    assert scores.shape == expected
    assert scores.dtype == jnp.float32


def test_feature_maps_halve_in_the_second_and_third_stage():
    model = abstract()
    cost = dhp.measure_cost(model, (32, 32, 3))
    positions = [
        layer.flops_terms[0].factor // 9
        for layer in cost.layers
        if layer.kind == "HyperConv" and "layers" in layer.path
    ]
    assert positions == [32 * 32] * 6 + [16 * 16] * 6 + [8 * 8] * 6


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 8, 8, 1), (1, 3, 8, 8), (1, 2, 8, 8, 3)])
def test_images_of_another_rank_or_channel_count_are_refused(shape):
    with pytest.raises(ValueError, match=r"^images: expected shape \(batch, height, width, 3\), g"):
        output(abstract(), shape)


@pytest.mark.parametrize("depth", [20, 110])
def test_all_that_is_added_in_a_stage_is_one_latent(depth):
    model = abstract(depth=depth)
    per_stage = len(model.blocks) // 3
    read = [model.stem.conv.z_out]
    for number, block in enumerate(model.blocks):
        z = model.stages[number // per_stage]
        assert block.layers[-1].conv.z_out is z
        assert block.layers[-1].norm.z is z
        assert block.layers[0].conv.z_in is read[-1]
        if block.projection is not None:
            assert block.projection.conv.z_out is z
            assert block.projection.conv.z_in is read[-1]
            assert block.projection.conv.kernel_size == (1, 1)
        else:
            assert read[-1] is z
        for hidden, before, after in zip(
            block.hidden, block.layers[:-1], block.layers[1:], strict=True
        ):
            assert before.conv.z_out is before.norm.z is after.conv.z_in is hidden
        read.append(z)
    assert model.classifier.z_in is model.stages[2]
    assert (model.stem.conv.z_out is model.stages[0]) == (depth == 20)


@pytest.mark.parametrize("depth", [20, pytest.param(110, marks=pytest.mark.slow)])
def test_only_the_image_and_the_last_stage_are_not_prunable(depth):
    model = abstract(depth=depth, min_channels=3)
    fixed = [z for z in dhp.latents(model).values() if not z.prunable]
    assert fixed == [model.image, model.stages[2]]
    assert {z.min_channels for z in dhp.latents(model).values()} == {3}


def test_images_channels_and_classes_survive_any_threshold():
    small = cut(thin_resnet(), dhp.survivors(thin_resnet(), threshold=1e3))
    assert small.stem.conv.kernel.shape == (3, 3, 3, 1)
    assert small.blocks[1].layers[0].conv.kernel.shape == (3, 3, 1, 1)
    assert small.blocks[2].layers[1].conv.kernel.shape == (3, 3, 1, 16)
    assert small.classifier.kernel.shape == (16, 10)
    assert np.all(np.isfinite(run(small, images(2, 8, 8, 3))[0]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_activations_are_of_the_dtype_and_parameters_stay_float32(dtype):
    model = abstract(dtype=dtype)
    assert output(model, (1, 8, 8, 3)).dtype == jnp.dtype(dtype or "float32")
    stored = {v.get_value().dtype for _, v in nnx.to_flat_state(nnx.state(model))}
    assert stored == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", sorted(dhp.models.FAMILIES))
def test_every_hypernetwork_of_a_family_has_the_embedding_that_is_asked_for(name):
    given = SMALL[name] | ({"scale": 2} if name in ("srresnet", "edsr") else {})
    for embedding in (2, 8):
        asked = {"embedding": embedding} if embedding != 8 else {}  # the paper's is the default
        model = dhp.models.build_abstract(name, **given, **asked)
        sizes = {m.w1.shape[0] for _, _, m in walk(model) if isinstance(m, Hyper)}
        assert sizes == {embedding}
    with pytest.raises(ValueError, match=r"^embedding: expected a positive integer, got 0"):
        dhp.models.build_abstract(name, **given, embedding=0)
