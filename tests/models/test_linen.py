"""Networks of flax.linen: computed as flax.linen does, pruned, trained and handed back."""

import functools
import re

from flax import errors, nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dhp_jax as dhp

SHAPE = (8, 8, 3)


class Block(nn.Module):
    """A residual block with a depthwise convolution, attributes told in `setup`."""

    channels: int

    def setup(self):
        self.depthwise = nn.Conv(self.channels, (3, 3), feature_group_count=self.channels)
        self.norm = nn.BatchNorm(momentum=0.9)
        self.out = nn.Conv(self.channels, (1, 1))
        self.scale = self.param("scale", nn.initializers.ones, (self.channels,))

    def __call__(self, x, train):
        y = self.norm(self.depthwise(x), use_running_average=not train)
        return x + self.scale * self.out(nn.relu(y))


class Net(nn.Module):
    """Convolutions, attention over pixels, and a head; with no sizes told from outside."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(
            nn.GroupNorm(num_groups=None, group_size=4)(nn.Conv(16, (3, 3), name="stem")(x))
        )
        x = nn.remat(Block, static_argnums=(2,))(16, name="block")(x, train)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(nn.Conv(24, (3, 3), strides=2)(x)))
        x = x.reshape(len(x), -1, x.shape[-1])
        x = x + nn.MultiHeadDotProductAttention(6, name="attention")(x)
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(nn.Dense(32)(x)))
        return nn.Dense(5)(x.mean(1) + self.param("shift", nn.initializers.zeros, (32,)))


def filled(module, seed=0):
    """Its variables, none of them as they begin."""
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, *SHAPE)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.1, 0.6, x.shape), x.dtype), abstract)


def images(count=4, seed=1):
    return jax.random.normal(jax.random.key(seed), (count, *SHAPE))


def network(**options):
    module = Net(**options)
    variables = filled(module)
    return module, variables, dhp.FromLinen(module, variables, training={"train": True})


def pruned(net, flops=0.5):
    traced = dhp.with_latents(net, SHAPE, min_channels=1)
    return dhp.prune_to(traced, flops=flops, by=dhp.l1_scores(traced))


@functools.cache
def halved():
    """A pruned network that several tests share and leave as it is."""
    return pruned(network()[2])


def test_it_computes_what_the_module_does_and_hands_its_variables_back():
    module, variables, net = network()
    x = images()
    np.testing.assert_array_equal(net(x), module.apply(variables, x))
    assert jax.tree.all(jax.tree.map(np.array_equal, net.variables(), variables))
    net.train()
    y, changed = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(net(x), y)
    assert jax.tree.all(jax.tree.map(np.array_equal, net.variables(), {**variables, **changed}))
    net.eval()
    np.testing.assert_array_equal(net(x, train=False), module.apply({**variables, **changed}, x))


def test_a_call_of_every_kind_of_axis_is_pruned():
    shapes = jax.tree.map(jnp.shape, halved().variables()["params"])
    assert shapes["Conv_0"]["kernel"][-1] < 24  # what the attention makes of it too
    stem = shapes["stem"]["kernel"][-1]
    heads = shapes["attention"]["query"]["kernel"][1]
    assert stem % 4 == 0
    assert stem < 16
    assert shapes["block"]["depthwise"]["kernel"] == (3, 3, 1, stem)
    assert shapes["block"]["scale"] == (stem,)
    assert shapes["attention"]["out"]["kernel"][0] == heads
    assert shapes["Dense_0"]["kernel"][1] < 32
    assert shapes["Dense_1"]["bias"] == (5,)


def test_the_pruned_network_is_the_whole_one_in_which_what_is_gone_is_zero():
    module, variables, net = network()
    traced = dhp.with_latents(net, SHAPE, min_channels=1)
    masks = {name: np.ones(z.size, bool) for name, z in dhp.latents(traced).items()}
    masks["stem"][2] = masks["attention.query"][1] = masks["Dense_0"][[0, 5, 31]] = False
    small = dhp.prune(traced, masks)
    groups = np.repeat(masks["stem"], 4)
    params = variables["params"]
    whole = {
        ("stem",): groups,
        ("GroupNorm_0",): groups,
        ("block",): groups,
        ("attention", "out", "kernel"): masks["attention.query"][:, None, None],
        ("Dense_0",): masks["Dense_0"],
        ("shift",): masks["Dense_0"],
    }
    for path, mask in whole.items():
        node = functools.reduce(dict.__getitem__, path[:-1], params)
        node[path[-1]] = jax.tree.map(lambda x, mask=mask: x * mask, node[path[-1]])
    x = images()
    found, expected = nnx.jit(lambda net, x: net(x))(small, x), jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert small.variables()["params"]["attention"]["query"]["kernel"].shape == (24, 5, 4)


@pytest.mark.parametrize("train", [False, True])
def test_pruned_variables_are_taken_by_the_module_itself(train):
    module, small, x = Net(), nnx.clone(halved()), images()
    with pytest.raises(errors.ScopeParamShapeError):
        module.apply(small.variables(), x)
    with dhp.pruned_linen():
        y = module.apply(small.variables(), x, train=train, mutable=["batch_stats"])[0]
    small.train() if train else small.eval()
    np.testing.assert_array_equal(small(x), y)


def test_a_pruned_network_is_trained_with_its_statistics_and_random_keys():
    module, variables, _ = network(rate=0.5)
    net = dhp.FromLinen(module, variables, training={"train": True}, rngs=nnx.Rngs(0))
    small = pruned(net)
    small.train()
    before = small.variables()
    optimizer = nnx.Optimizer(small, optax.adam(1e-2), wrt=nnx.Param)
    x, labels = images(32), jnp.arange(32) % 5

    @nnx.jit
    def step(small, optimizer):
        def loss(small):
            return optax.softmax_cross_entropy_with_integer_labels(small(x), labels).mean()

        value, grads = nnx.value_and_grad(loss)(small)
        optimizer.update(small, grads)
        return value

    losses = [float(step(small, optimizer)) for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    after = small.variables()
    same = jax.tree.leaves(
        jax.tree.map(np.array_equal, before["batch_stats"], after["batch_stats"])
    )
    assert not any(same)
    small.eval()
    np.testing.assert_array_equal(small(x), small(x))


def test_it_is_searched_with_gates_and_scored_by_gradients():
    net = network()[2]
    traced = dhp.with_gates(dhp.with_latents(net, SHAPE, min_channels=1), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(traced(images()), net(images()))

    def loss(model, x):
        return jnp.square(model(x)).mean()

    scores = dhp.taylor_scores(traced, loss, [images()])
    assert scores.keys() == {n for n, z in dhp.latents(traced).items() if z.prunable}
    assert all(np.all(values > 0) for values in scores.values())


def test_its_convolutions_are_those_that_are_fast_here():
    net = network()[2]
    net.eval()
    x, seen = images(), []

    def convolve(*args, **options):
        seen.append(args[1].shape)
        return jax.lax.conv_general_dilated(*args, **options)

    expected = net(x)
    net.conv_general_dilated = convolve  # as what tunes a network sets it
    np.testing.assert_array_equal(net(x), expected)
    assert seen == [(3, 3, 3, 16), (3, 3, 1, 16), (1, 1, 16, 16), (3, 3, 16, 24)]
    np.testing.assert_allclose(dhp.inference(network()[2])(x), expected, rtol=1e-4, atol=1e-4)


class Coder(nn.Module):
    def setup(self):
        self.encoder = [nn.Dense(12), nn.Dense(3)]
        self.decoder = nn.Dense(6)
        self.dropout = nn.Dropout(0.5)

    def encode(self, x):
        return self.encoder[1](nn.relu(self.encoder[0](x)))

    def noisy(self, x, train):
        return self.encode(self.dropout(x, deterministic=not train))

    def __call__(self, x, train):
        return self.decoder(nn.relu(self.noisy(x, train)))


@pytest.mark.parametrize("method", ["encode", "noisy", Coder.noisy])
def test_another_method_is_called_with_what_it_takes(method):
    module, x = Coder(), jax.random.normal(jax.random.key(0), (4, 6))
    variables = module.init(jax.random.key(0), x, train=False)
    modes = {"training": {"train": True}, "evaluation": {"train": False}}
    net = dhp.FromLinen(module, variables, **modes, rngs=nnx.Rngs(0))
    call = functools.partial(dhp.FromLinen.__call__, method=method)
    traced = dhp.with_latents(net, (6,), call=call)
    assert {name: z.size for name, z in dhp.latents(traced).items()} == {"encoder_0": 12}
    small = dhp.prune_to(traced, flops=0.5, by=dhp.l1_scores(traced))
    with dhp.pruned_linen():
        expected = module.apply(small.variables(), x, method="encode")
    np.testing.assert_array_equal(small(x, method=method), expected)
    small.train()
    assert np.array_equal(small(x, method=method), expected) is (method == "encode")


class Normalised(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(not train, name="norm", axis_name=self.axis_name)
        return nn.Dense(2)(norm(norm(x) + 1))


def test_statistics_are_renewed_with_all_that_a_layer_sees():
    module = Normalised()
    x = np.random.default_rng(0).normal(3, 2, (64, 6)).astype(np.float32) + np.arange(6)
    variables = module.init(jax.random.key(0), x)
    net = dhp.FromLinen(module, variables, training={"train": True})
    dhp.renew_statistics(net, [x])
    first = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + 1
    seen = np.concatenate([x, first]).astype(np.float64)
    norm = net.variables()["batch_stats"]["norm"]
    np.testing.assert_allclose(norm["mean"], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(norm["var"], seen.var(0), rtol=1e-3)
    assert net.deterministic


def test_it_is_saved_and_loaded_and_summarised(tmp_path):
    module, _, net = network()
    small = halved()
    dhp.save(tmp_path / "small", small)

    def build(rngs):
        fresh = module.init(rngs.params(), jnp.ones((1, *SHAPE)))
        return dhp.FromLinen(module, fresh, training={"train": True})

    loaded = dhp.load(tmp_path / "small", build=build)
    np.testing.assert_array_equal(loaded(images()), small(images()))
    lines = str(dhp.summary(dhp.with_latents(net, SHAPE, min_channels=1), small)).splitlines()
    assert any(line.startswith("block.depthwise ") for line in lines)
    assert not any(line.startswith(("operation", "FromLinen")) for line in lines)
    assert any(re.match(r"block.norm +16 -> \d+ +0 ", line) for line in lines)
    assert any(re.match(r"shift +32 -> \d+ +0 ", line) for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": "resnet"}, "module: expected a module of flax.linen, got 'resnet'"),
        ({"variables": {}}, "variables: expected what module.init returns, with its 'params'"),
        ({"training": None}, "training: expected keyword arguments of the call in training"),
        (
            {"variables": {"params": {"train": {"kernel": np.ones(2)}}}},
            "variables: expected paths that begin with other names .* got train.kernel",
        ),
        (
            {"variables": {"params": {"a": np.ones(2)}, "cache": {"a": np.ones(2)}}},
            "variables: expected collections whose arrays have paths of their own, got a",
        ),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    module, variables, _ = network()
    given = {"module": module, "variables": variables, "training": {"train": True}}
    with pytest.raises(ValueError, match=message):
        dhp.FromLinen(**given | change)


def test_statistics_are_those_of_all_devices_where_there_are_some():
    module = Normalised(axis_name="batch")
    x = jax.random.normal(jax.random.key(0), (2, 32, 6)) + jnp.arange(2)[:, None, None]
    variables = module.init(jax.random.key(0), x[0])
    net = dhp.FromLinen(module, variables, training={"train": True})
    net.train()

    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.Param: None, ...: None}), 0), axis_name="batch")
    def call(net, x):
        return net(x)

    of_all, alone = call(net, x), net(x[0])
    line = "axis_name: expected one of the axes that are bound, 'bach', for Normalised in training"
    with pytest.raises(ValueError, match=f"^{line}, got 'batch'"):
        jax.vmap(lambda x: nnx.clone(net)(x), axis_name="bach")(x)
    tested = nnx.clone(net)
    tested.eval()
    jax.vmap(tested, axis_name="bach")(x)
    jax.vmap(lambda x: nnx.clone(net)(x))(x)
    whole = dhp.FromLinen(Normalised(), variables, training={"train": True})
    whole.train()
    np.testing.assert_allclose(of_all.reshape(64, 2), whole(x.reshape(64, 6)), atol=1e-4)
    np.testing.assert_allclose(alone, whole(x[0]), atol=1e-4)


class Standardised(nn.Conv):
    """A convolution of standardised kernels, as BiT networks have."""

    def param(self, name, *args, **kwargs):
        x = super().param(name, *args, **kwargs)
        return (x - x.mean((0, 1, 2))) / x.std((0, 1, 2)) if name == "kernel" else x


class Layers(nn.Module):
    """Layers that change their parameters, or keep sizes beside them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(Standardised(8, (3, 3))(x))
        x = nn.relu(nn.WeightNorm(nn.Conv(10, (3, 3)))(x))
        x = nn.relu(nn.Einsum((10, 12), "abcd,de->abce")(x))
        x = nn.relu(nn.ConvTranspose(6, (2, 2), strides=(2, 2))(x))
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.relu(nn.Dense(14, kernel_init=kernel_init)(x))
        return nn.Dense(3)(x.mean((1, 2)))


def test_layers_that_change_their_parameters_or_keep_sizes_are_pruned():
    module, x = Layers(), images()
    variables = module.init(jax.random.key(0), x)
    net = dhp.FromLinen(module, variables)
    np.testing.assert_array_equal(net(x), module.apply(variables, x))
    traced = dhp.with_latents(net, SHAPE, min_channels=1)
    assert sorted(z.size for z in dhp.latents(traced).values() if z.prunable) == [6, 8, 10, 12, 14]
    small = dhp.prune_to(traced, flops=0.5, by=dhp.l1_scores(traced))
    with dhp.pruned_linen():
        np.testing.assert_array_equal(small(x), module.apply(small.variables(), x))


class Recurrent(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(self.cell(12))(nn.Dense(8)(x))[:, -1])


@pytest.mark.parametrize(
    "cell",
    [
        nn.OptimizedLSTMCell,
        *(
            pytest.param(cell, marks=pytest.mark.slow)
            for cell in (nn.GRUCell, nn.LSTMCell, nn.MGUCell)
        ),
    ],
)
def test_the_carry_of_a_recurrent_layer_is_pruned_with_it(cell):
    module, x = Recurrent(cell), jax.random.normal(jax.random.key(0), (2, 5, 6))
    net = dhp.FromLinen(module, module.init(jax.random.key(0), x))
    traced = dhp.with_latents(net, (5, 6), min_channels=1)
    assert sorted(z.size for z in dhp.latents(traced).values() if z.prunable) == [8, 12]
    small = dhp.prune_to(traced, flops=0.5, by=dhp.l1_scores(traced))
    with dhp.pruned_linen():
        np.testing.assert_array_equal(small(x), module.apply(small.variables(), x))


class Fixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(nn.Conv(12, (3, 3))(x)).reshape(len(x), -1, 12)
        return nn.Dense(3)(x.mean(1))


def test_what_the_code_fixes_stays_and_its_line_is_told():
    module = Fixed()
    variables = module.init(jax.random.key(0), jnp.ones((1, *SHAPE)))
    traced = dhp.with_latents(dhp.FromLinen(module, variables), SHAPE)
    assert {name: z.size for name, z in dhp.latents(traced).items() if z.prunable} == {"Conv_0": 8}
    assert "models/test_linen.py:" in str(dhp.explain(traced))


def test_the_bridge_of_flax_is_refused_with_what_to_take():
    bridged = nnx.bridge.lazy_init(nnx.bridge.ToNNX(Fixed(), rngs=nnx.Rngs(0)), images())
    with pytest.raises(ValueError, match=r"^model: expected dhp.FromLinen\(module, variables\)"):
        dhp.with_latents(bridged, SHAPE)
