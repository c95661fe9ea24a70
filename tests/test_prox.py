"""Proximal steps: the closed form, optax's conventions, and the problems they are made to solve."""

import re

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax._src.base import NO_PARAMS_MSG
import pytest

import dhp_jax as dhp
from dhp_jax.prox import ProxState, shrink_norm, soft_threshold

PROPERTY = settings(deadline=None, derandomize=True, max_examples=15)
# A few, because each is compiled.
SHAPES = st.sampled_from([(), (1,), (5,), (0, 3), (2, 4), (3, 1, 2)])
REAL = [jnp.float32, jnp.bfloat16, jnp.float16]


def closed_form(t, amount):
    """`sign(t) max(|t| - amount, 0)` in double precision."""
    t = np.asarray(t).astype(np.complex128 if np.iscomplexobj(t) else np.float64)
    size = np.abs(t)
    return np.where(size > amount, t * (1 - amount / np.where(size > 0, size, 1)), 0)


def closed_form_of_groups(t, amount, axis=None):
    t = np.asarray(t).astype(np.complex128 if np.iscomplexobj(t) else np.float64)
    norm = np.sqrt(np.sum(np.abs(t) ** 2, axis=axis, keepdims=True))
    return np.where(norm > amount, t * (1 - amount / np.where(norm > 0, norm, 1)), 0)


def stepped(transform, params, updates, state=None):
    """The parameters after one step of a transformation."""
    state = transform.init(params) if state is None else state
    updates, _ = transform.update(updates, state, params)
    return optax.apply_updates(params, updates)


def stepped_at_once(transform, params, updates):
    """The same as one program, which is compiled sooner than its operations one by one."""
    return jax.jit(lambda params, updates: stepped(transform, params, updates))(params, updates)


@st.composite
def steps(draw, dtypes=(*REAL, jnp.complex64)):
    """Parameters and updates of one shape, a strength and a learning rate."""
    shape = draw(SHAPES)
    dtype, update_dtype = draw(st.sampled_from([(p, u) for p in dtypes for u in dtypes]))
    number = st.floats(-8, 8, width=16, allow_subnormal=False)

    def array(dtype):
        real = draw(npst.arrays(np.float32, shape, elements=number))
        if dtype == jnp.complex64:
            return jnp.asarray(real + 1j * draw(npst.arrays(np.float32, shape, elements=number)))
        return jnp.asarray(real.astype(dtype))

    update_dtype = dtype if jnp.complex64 in (dtype, update_dtype) else update_dtype
    nonnegative = st.floats(0, 3, width=16)
    return array(dtype), array(update_dtype), draw(nonnegative), draw(nonnegative)


def check_step(found, params, updates, expected, target_size):
    """The values to rounding, the parameter's shape and dtype."""
    assert found.shape == params.shape
    assert found.dtype == params.dtype
    precision = max(float(jnp.finfo(x.dtype).eps) for x in (params, updates))
    scale = np.abs(np.asarray(params, np.complex128)) + np.abs(np.asarray(updates, np.complex128))
    error = np.abs(np.asarray(found, np.complex128) - expected)
    assert np.all(error <= 8 * precision * (scale + target_size))


# The closed form


@given(steps())
@PROPERTY
def test_prox_l1_is_the_closed_form_for_any_shape_dtype_and_strength(step):
    params, updates, strength, rate = step
    found = stepped_at_once(dhp.prox_l1(strength, rate), params, updates)
    target = np.asarray(params + updates)
    check_step(found, params, updates, closed_form(target, strength * rate), strength * rate)
    amount = np.asarray(strength * rate).astype(np.abs(target).dtype)
    assert np.all(np.asarray(found)[np.abs(target) <= amount] == 0)


@given(steps())
@PROPERTY
def test_prox_l2_is_the_closed_form_for_any_shape_dtype_and_strength(step):
    params, updates, strength, rate = step
    found = stepped_at_once(dhp.prox_l2(strength, rate), params, updates)
    target = np.asarray(params + updates)
    expected = closed_form_of_groups(target, strength * rate)
    norm = np.sqrt(np.sum(np.abs(target.astype(np.complex128)) ** 2))
    check_step(found, params, updates, expected, max(strength * rate, norm))


@given(
    npst.arrays(np.float32, (2, 3, 4), elements=st.floats(-4, 4, width=16)),
    st.floats(0, 6, width=16),
    st.sampled_from([None, 0, -1, (0, 1), (0, 2), (0, 1, 2)]),
)
@PROPERTY
def test_prox_l2_groups_over_the_given_axes(params, strength, axis):
    params = jnp.asarray(params)
    found = stepped_at_once(dhp.prox_l2(strength, axis=axis), params, jnp.zeros_like(params))
    np.testing.assert_allclose(found, closed_form_of_groups(params, strength, axis), atol=1e-5)


def test_prox_l2_removes_output_channels_of_a_kernel_as_a_whole():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype(np.float32)
    kernel[..., [1, 4]] *= 0.1
    found = stepped(dhp.prox_l2(2.0, axis=(0, 1, 2)), jnp.asarray(kernel), jnp.zeros(kernel.shape))
    for channel in range(6):
        norm = np.linalg.norm(kernel[..., channel].astype(np.float64))
        expected = kernel[..., channel] * max(1 - 2.0 / norm, 0)
        np.testing.assert_allclose(found[..., channel], expected, rtol=1e-5, atol=1e-7)
    assert [bool(np.any(found[..., c])) for c in range(6)] == [True, False, True, True, False, True]


def test_an_amount_of_infinity_removes_everything_and_of_zero_nothing():
    params = jnp.array([1.5, -2.0, 0.0])
    for shrink in (soft_threshold, shrink_norm):
        np.testing.assert_array_equal(shrink(params, np.inf), np.zeros(3))
    for transform in (dhp.prox_l1, dhp.prox_l2):
        np.testing.assert_array_equal(stepped(transform(0), params, jnp.ones(3)), params + 1)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_shrink_norm_neither_overflows_nor_vanishes(scale):
    x = jnp.array([3.0, -4.0], jnp.float32) * scale
    np.testing.assert_allclose(shrink_norm(x, 2.5 * scale), [1.5 * scale, -2.0 * scale], rtol=1e-6)
    np.testing.assert_array_equal(shrink_norm(x, 5.5 * scale), [0, 0])


def test_amounts_may_differ_by_entry_and_group():
    x = jnp.array([[3.0, 4.0], [0.6, -0.8]])
    np.testing.assert_allclose(
        soft_threshold(x, jnp.array([[1.0], [0.7]])), [[2, 3], [0, -0.1]], atol=1e-7
    )
    np.testing.assert_allclose(
        shrink_norm(x, jnp.array([[2.5], [1.5]]), axis=1), [[1.5, 2], [0, 0]], atol=1e-7
    )


@given(steps(REAL))
@PROPERTY
def test_thresholded_entries_become_exactly_zero_whatever_the_dtypes(step):
    params, updates, _, _ = step
    found = stepped_at_once(dhp.prox_l1(100.0), params, updates)
    np.testing.assert_array_equal(np.asarray(found), np.zeros(params.shape))


def test_updates_keep_their_dtype_unless_the_parameter_is_wider():
    transform = dhp.prox_l1(0.1)
    for param, update, expected in [
        (jnp.float32, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float16, jnp.float16),
    ]:
        updates, _ = transform.update(jnp.ones(2, update), transform.init(None), jnp.ones(2, param))
        assert updates.dtype == expected


def test_where_leaves_entries_alone():
    params = jnp.array([-2.0, 0.5, 3.0])
    transform = dhp.prox_l1(1.0, where=lambda t: t > 0)
    np.testing.assert_array_equal(stepped(transform, params, jnp.zeros(3)), [-2, 0, 2])


def test_where_sees_the_parameters_that_the_step_leads_to():
    transform = dhp.prox_l1(1.0, where=lambda t: jnp.sum(jnp.abs(t) >= 1) > 1)
    updates = jnp.array([0.0, 1.0])
    np.testing.assert_array_equal(stepped(transform, jnp.array([2.0, 0.5]), updates), [1, 0.5])
    np.testing.assert_array_equal(stepped(transform, jnp.array([2.0, -0.5]), updates), [2, 0.5])


def test_every_leaf_or_branch_may_have_a_strength_of_its_own():
    params = {"a": jnp.array([3.0, -0.5]), "b": {"c": jnp.array([2.0]), "d": jnp.array([-4.0])}}
    still = jax.tree.map(jnp.zeros_like, params)
    by_leaf = {"a": 1.0, "b": {"c": optax.linear_schedule(0.0, 8.0, 8), "d": 2}}
    transform = dhp.prox_l1(by_leaf, 0.5)
    state = transform.init(params)
    for count in range(3):
        updates, state = transform.update(still, state, params)
        found = optax.apply_updates(params, updates)
        np.testing.assert_allclose(found["a"], closed_form(params["a"], 0.5))
        np.testing.assert_allclose(found["b"]["c"], closed_form(params["b"]["c"], 0.5 * count))
        np.testing.assert_allclose(found["b"]["d"], closed_form(params["b"]["d"], 1.0))
    found = stepped(dhp.prox_l2({"a": 0.0, "b": 1.5}), params, still)
    np.testing.assert_array_equal(found["a"], params["a"])
    np.testing.assert_allclose(found["b"]["c"], [0.5])
    np.testing.assert_allclose(found["b"]["d"], [-2.5])


def test_a_tree_of_strengths_follows_a_mask_within_masked_and_nnx():
    rngs = nnx.Rngs(0)
    z1, z2 = (dhp.Latent(6, prunable=bool(i), rngs=rngs) for i in range(2))
    layer = dhp.HyperConv(z1, z2, (3, 3), rngs=rngs)
    before = {"z_in": np.array(z1.value()), "z_out": np.array(z2.value())}
    mask = dhp.prunable_latents(nnx.state(layer, nnx.Param))
    strengths = jax.tree.map(lambda prunable: 0.25 if prunable else 3.0, mask)
    for transform in (
        dhp.prox_l1(jax.tree.map(lambda prunable: 0.25 * prunable, mask)),
        optax.masked(dhp.prox_l1(strengths), mask),
    ):
        copy = nnx.clone(layer)
        optimizer = nnx.Optimizer(copy, transform, wrt=nnx.Param)
        optimizer.update(copy, jax.tree.map(jnp.zeros_like, nnx.state(copy, nnx.Param)))
        np.testing.assert_array_equal(copy.z_in.value(), before["z_in"])
        expected = closed_form(before["z_out"], 0.25)
        np.testing.assert_allclose(copy.z_out.value(), expected, atol=1e-7)
        np.testing.assert_array_equal(copy.w1[...], layer.w1[...])


# Precision


@pytest.mark.parametrize(
    ("transform", "told"),
    [
        (dhp.prox_l1(1e-3), "2 of 4 entries are not moved by steps of 0.001"),
        (dhp.prox_l1(1e-3, where=lambda p: p > 0), "1 of 4 entries are not moved by steps"),
        (dhp.prox_l1({"a": 0.5, "z": 1e-3}), "2 of 4 entries are not moved by steps of 0.001"),
        (dhp.prox_l2(1e-3), "3 of 4 entries are not moved by steps of 0.001"),
        (dhp.prox_l1(optax.constant_schedule(1e-3)), "steps of less than 1/512 of an entry are"),
    ],
)
def test_bfloat16_entries_that_rounding_keeps_in_place_are_told(transform, told):
    params = {"a": jnp.ones(2), "z": jnp.array([1.0, -2.0, 0.125, 0.0], jnp.bfloat16)}
    message = rf"^prox_l\d: params\['z'\] is bfloat16: {re.escape(told)}.*; keep it in float32$"
    with pytest.warns(UserWarning, match=message) as caught:
        state = transform.init(params)
    assert [warning.filename for warning in caught] == [__file__]
    if "of 4" in told:  # and it is true
        still = jax.tree.map(jnp.zeros_like, params)
        after = optax.apply_updates(params, transform.update(still, state, params)[0])["z"]
        where = (params["z"] > 0) if "1 of 4" in told else (params["z"] != 0)
        assert int(told[0]) == int(((after == params["z"]) & where).sum())


@pytest.mark.filterwarnings("error")
def test_steps_that_move_every_entry_are_not_warned_of():
    params = {"z": jnp.array([1.0, -2.0, 0.0], jnp.bfloat16), "n": jnp.ones(2, jnp.int32)}
    dhp.prox_l1(0.1).init(params)
    dhp.prox_l1(1e-12).init({"z": jnp.ones(3), "none": None})
    dhp.prox_l1(0.0).init(params)


def test_the_warning_comes_under_jit_too():
    with pytest.warns(UserWarning, match="steps of less than 1/512 of an entry are lost"):
        jax.jit(dhp.prox_l1(1e-3).init)(jnp.ones(3, jnp.bfloat16))


# Schedules and state


def test_the_state_is_empty_without_a_schedule():
    for transform in (dhp.prox_l1(0.1, 0.2), dhp.prox_l2(0.1)):
        state = transform.init(jnp.ones(3))
        assert state == optax.EmptyState()
        assert transform.update(jnp.ones(3), state, jnp.ones(3))[1] == optax.EmptyState()


@pytest.mark.parametrize("make", [dhp.prox_l1, dhp.prox_l2])
def test_the_state_counts_steps_with_a_schedule(make):
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    for transform in (make(schedule), make(1.0, schedule), make(schedule, schedule)):
        state = transform.init(jnp.ones(3))
        assert isinstance(state, ProxState)
        for step in range(3):
            assert state.count.dtype == jnp.int32
            assert int(state.count) == step
            _, state = transform.update(jnp.ones(3), state, jnp.ones(3))


@given(st.lists(st.floats(0, 2, width=16), min_size=3, max_size=3), st.booleans(), st.booleans())
@settings(deadline=None, derandomize=True, max_examples=10)
def test_every_step_uses_the_schedules_value_at_its_count(values, strength_too, rate_too):
    table = jnp.asarray(values)
    transform = dhp.prox_l1(
        (lambda count: table[count]) if strength_too else 0.5,
        (lambda count: 1 + table[count]) if rate_too else 0.25,
    )
    params = jnp.array([-3.0, 1.0, 0.2])
    expected, state = np.asarray(params, np.float64), transform.init(params)
    for value in values:
        updates, state = transform.update(jnp.ones(3), state, params)
        params = optax.apply_updates(params, updates)
        amount = (value if strength_too else 0.5) * (1 + value if rate_too else 0.25)
        expected = closed_form(expected + 1, amount)
        np.testing.assert_allclose(params, expected, atol=1e-5)


def test_a_schedule_is_counted_as_by_sgd():
    """With one schedule for both, gradient and threshold of a step have the same step size."""
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.1, 2: 0.1})
    transform = optax.chain(optax.sgd(schedule), dhp.prox_l1(0.5, schedule))
    params = jnp.array([10.0, -10.0, 0.3])
    expected = np.asarray(params, np.float64)
    gradient = np.array([1.0, 1.0, 0.0])
    state = transform.init(params)
    for rate in (1.0, 0.1, 0.01, 0.01):
        updates, state = transform.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        expected = closed_form(expected - rate * gradient, 0.5 * rate)
        np.testing.assert_allclose(params, expected, atol=1e-5)
    assert params[2] == 0


# Errors


@pytest.mark.parametrize("make", [dhp.prox_l1, dhp.prox_l2])
def test_missing_params_raise_the_error_of_optax(make):
    for transform in (make(0.1), make(optax.constant_schedule(0.1))):
        with pytest.raises(ValueError, match="params") as raised:
            transform.update(jnp.ones(3), transform.init(jnp.ones(3)))
        assert str(raised.value) == NO_PARAMS_MSG


@pytest.mark.parametrize("make", [dhp.prox_l1, dhp.prox_l2])
@pytest.mark.parametrize(
    "value", ["0.5", None, {}, True, 1j, np.array([1j]), np.array(["a"]), jnp.array([True])]
)
def test_what_is_neither_number_nor_schedule_is_refused(make, value):
    for name in ("strength", "learning_rate"):
        with pytest.raises(
            ValueError, match="expected a finite number >= 0 or a schedule"
        ) as raised:
            make(**{"strength": 1.0, name: value})
        assert str(raised.value).startswith(f"{make.__name__}: {name}: ")


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        ({"a": 1.0, "b": -1.0}, "prox_l1: strength['b']: expected a finite number >= 0, got -1.0"),
        (["0.5"], "prox_l1: strength[0]: expected a finite number >= 0 or a schedule, got '0.5'"),
    ],
)
def test_a_wrong_number_in_a_tree_of_strengths_is_named(strength, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dhp.prox_l1(strength)


@pytest.mark.parametrize("strength", [{"a": 1.0}, {"a": {"c": 1.0}, "b": 1.0}, [1.0, 1.0]])
def test_a_tree_of_strengths_that_does_not_fit_the_parameters_is_refused(strength):
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"^prox_l1: strength: expected a number, or a tree.*\S$"):
        dhp.prox_l1(strength).update(params, optax.EmptyState(), params)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool])
@pytest.mark.parametrize("transform", [dhp.prox_l1(1.0), dhp.prox_l2(1.0)])
def test_integers_are_refused_by_the_name_of_their_leaf(transform, dtype):
    params = {"w": jnp.ones(2), "n": jnp.ones(2, dtype)}
    state = transform.init(params)
    message = rf"^prox_\w+: params\['n'\]: expected floating-point numbers, got {dtype.dtype}$"
    with pytest.raises(ValueError, match=message):
        transform.update(params, state, params)


@pytest.mark.parametrize("axis", [(0, 1, 2), 2, -3, (0, 0), "rows", 0.5])
def test_axes_that_a_parameter_lacks_are_refused_by_the_name_of_its_leaf(axis):
    transform = optax.masked(dhp.prox_l2(1.0, axis=axis), {"w": True, "b": False})
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    message = f"prox_l2: axis: expected axes of params['w'] of shape (2, 3), got {axis!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        transform.init(params)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        transform.update(params, optax.MaskedState(optax.EmptyState()), params)


STRENGTHS = jnp.array([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("transform", "shape", "message"),
    [
        (
            dhp.prox_l1(STRENGTHS),
            (1,),
            "strength * learning_rate: expected a shape that broadcasts",
        ),
        (dhp.prox_l1(STRENGTHS), (), "strength * learning_rate: expected a shape that broadcasts"),
        (dhp.prox_l1(lambda _: STRENGTHS), (3, 5), "strength * learning_rate: expected a shape"),
        (
            dhp.prox_l2(STRENGTHS),
            (3,),
            "strength * learning_rate: expected a shape that broadcasts",
        ),
        (dhp.prox_l2(STRENGTHS, axis=1), (2, 3), "strength * learning_rate: expected a shape that"),
        (
            dhp.prox_l1(0.1, where=lambda p: jnp.ones((3, 1), bool)),
            (1,),
            "where: expected a shape that broadcasts into (1,) for params['w'], got (3, 1)",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_arrays_that_do_not_fit_a_parameter_are_refused(transform, shape, message, dtype):
    params = {"w": jnp.ones(shape, dtype)}
    with pytest.raises(ValueError, match=rf"^prox_l[12]: {re.escape(message)}.*$"):
        transform.update(params, transform.init(params), params)


def test_strengths_of_groups_have_the_shape_of_their_norms():
    params = jnp.array([[3.0, 4.0], [6.0, 8.0]])
    transform = dhp.prox_l2(jnp.array([[1.0], [5.0]]), axis=1)
    updates, _ = transform.update(jnp.zeros((2, 2)), transform.init(params), params)
    np.testing.assert_allclose(params + updates, [[2.4, 3.2], [3.0, 4.0]], rtol=1e-6)


@pytest.mark.parametrize("axis", [None, 1])
def test_numbers_that_are_not_finite_are_not_pruned(axis):
    x = jnp.array([[3.0, jnp.nan], [6.0, 8.0]])
    found = np.asarray(shrink_norm(x, 100.0, axis))
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(np.isnan(found[1]), axis is None)
    assert np.isnan(shrink_norm(jnp.ones(2), jnp.nan)).all()
    np.testing.assert_array_equal(shrink_norm(jnp.array([1.0, jnp.inf]), 0.5), [1.0, jnp.inf])


def test_a_condition_that_is_no_function_is_refused():
    with pytest.raises(ValueError, match=r"^prox_l1: where: expected a function or None, got 3$"):
        dhp.prox_l1(1.0, where=3)


@pytest.mark.parametrize("make", [dhp.prox_l1, dhp.prox_l2])
@pytest.mark.parametrize(
    "value",
    [
        *(-1, -0.5, float("nan"), float("inf"), np.float32(-1), np.int64(-2)),
        *(jnp.array(-0.5), np.array([0.1, -0.1]), jnp.array([0.1, jnp.inf])),
    ],
)
def test_numbers_that_are_negative_or_not_finite_are_refused(make, value):
    expected = f"expected a finite number >= 0, got {value!r}"
    with pytest.raises(ValueError, match="strength") as raised:
        make(value)
    assert str(raised.value) == f"{make.__name__}: strength: {expected}"
    with pytest.raises(ValueError, match="learning_rate") as raised:
        make(1.0, value)
    assert str(raised.value) == f"{make.__name__}: learning_rate: {expected}"


# Company: what optax does with transformations


@pytest.mark.parametrize("make", [dhp.prox_l1, dhp.prox_l2])
def test_leaves_without_an_update_are_skipped(make):
    params = {"a": jnp.array([0.5]), "b": None, "c": jnp.array([2.0]), "d": {"e": jnp.ones(2)}}
    updates = {"a": jnp.array([0.1]), "b": None, "c": None, "d": None}
    found, _ = make(1.0).update(updates, optax.EmptyState(), params)
    assert found["b"] is None
    assert found["c"] is None
    assert found["d"] is None
    np.testing.assert_array_equal(optax.apply_updates(params["a"], found["a"]), [0])


def test_masked_leaves_are_left_alone():
    params = {"latent": jnp.array([0.5, -3.0]), "weight": jnp.array([0.5, -3.0])}
    updates = {"latent": jnp.array([0.25, 0.5]), "weight": jnp.array([0.25, 0.5])}
    transform = optax.masked(dhp.prox_l1(1.0), {"latent": True, "weight": False})
    found = stepped(transform, params, updates)
    np.testing.assert_array_equal(found["latent"], [0, -1.5])
    np.testing.assert_array_equal(found["weight"], [0.75, -2.5])


def test_masked_nodes_pass_through():
    node = optax.MaskedNode()
    found, _ = dhp.prox_l1(1.0).update(
        {"a": jnp.array([1.0]), "b": node}, optax.EmptyState(), {"a": jnp.array([2.0]), "b": node}
    )
    assert found["b"] == node
    np.testing.assert_array_equal(found["a"], [0])  # 2 + 1, less the threshold 1, is where it was


def test_partition_gives_every_leaf_its_own_step():
    schedule = optax.constant_schedule(0.5)
    transform = optax.partition(
        {"latent": optax.chain(optax.sgd(0.5), dhp.prox_l1(1.0, schedule)), "rest": optax.sgd(0.1)},
        {"z": "latent", "w": "rest"},
    )
    params = {"z": jnp.array([1.0, -3.0]), "w": jnp.array([1.0, -3.0])}
    grads = {"z": jnp.array([1.0, 1.0]), "w": jnp.array([1.0, 1.0])}
    state, update = transform.init(params), jax.jit(transform.update)
    for _ in range(2):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["z"], [0, -3], atol=1e-6)
    np.testing.assert_allclose(params["w"], [0.8, -3.2], rtol=1e-6)


def test_injected_hyperparameters_can_be_changed_between_steps():
    transform = optax.inject_hyperparams(dhp.prox_l1, static_args="where")(0.5, learning_rate=1.0)
    params = jnp.array([2.0, -0.25])
    state = transform.init(params)
    updates, state = transform.update(jnp.zeros(2), state, params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates), [1.5, 0])
    state.hyperparams["strength"] = jnp.asarray(1.75)
    updates, state = jax.jit(transform.update)(jnp.zeros(2), state, params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates), [0.25, 0])


def test_an_injected_schedule_is_followed():
    transform = optax.inject_hyperparams(dhp.prox_l2)(lambda count: 1.0 + count)
    params = jnp.array([6.0, 8.0])
    state = transform.init(params)
    for strength in (1.0, 2.0, 3.0):
        updates, state = transform.update(jnp.zeros(2), state, params)
        expected = [6 - 0.6 * strength, 8 - 0.8 * strength]
        np.testing.assert_allclose(optax.apply_updates(params, updates), expected, rtol=1e-6)


def test_unknown_extra_arguments_are_tolerated():
    transform = optax.chain(optax.sgd(0.1), dhp.prox_l1(1.0))
    params = jnp.array([1.0, 3.0])
    updates, _ = transform.update(
        jnp.zeros(2), transform.init(params), params, value=1.0, grad=jnp.ones(2)
    )
    np.testing.assert_array_equal(optax.apply_updates(params, updates), [0, 2])


@pytest.mark.parametrize("make", [dhp.prox_l1, dhp.prox_l2])
def test_jit_changes_nothing(make):
    rng = np.random.default_rng(0)
    params, updates = (jnp.asarray(rng.normal(size=50).astype(np.float32)) for _ in range(2))
    transform = make(0.9, optax.constant_schedule(1.1))
    state = transform.init(params)
    eager, jitted = (
        optax.apply_updates(params, update(updates, state, params)[0])
        for update in (transform.update, jax.jit(transform.update))
    )
    np.testing.assert_allclose(jitted, eager, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(jitted) == 0, np.asarray(eager) == 0)


@pytest.mark.parametrize("make", [dhp.prox_l1, dhp.prox_l2])
def test_vmap_is_the_step_of_every_row(make):
    rng = np.random.default_rng(1)
    params, updates = (jnp.asarray(rng.normal(size=(4, 5)).astype(np.float32)) for _ in range(2))
    transform = make(optax.linear_schedule(1.0, 0.0, 4))
    states = ProxState(jnp.arange(4))
    rows, states = jax.vmap(transform.update)(updates, states, params)
    np.testing.assert_array_equal(states.count, [1, 2, 3, 4])
    for row in range(4):
        expected, _ = transform.update(updates[row], ProxState(jnp.asarray(row)), params[row])
        np.testing.assert_allclose(rows[row], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "base",
    [
        optax.sgd(0.3),
        optax.sgd(0.3, momentum=0.9),
        optax.adam(0.3),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.3, momentum=0.9, nesterov=True)),
    ],
)
def test_at_the_end_of_a_chain_it_thresholds_what_the_step_leads_to(base):
    transform = optax.chain(base, dhp.prox_l1(strength=0.5, learning_rate=0.3))
    params = {"z": jnp.array([1.0, 0.5, -0.2, 0.0]), "w": jnp.array([[2.0, -0.1]])}
    state, base_state = transform.init(params), base.init(params)
    for step in range(3):
        grads = jax.tree.map(lambda p, step=step: jnp.sin(3 * p + step), params)
        updates, state = transform.update(grads, state, params)
        base_updates, base_state = base.update(grads, base_state, params)
        expected = jax.tree.map(lambda p, u: closed_form(p + u, 0.15), params, base_updates)
        params = optax.apply_updates(params, updates)
        jax.tree.map(lambda p, e: np.testing.assert_allclose(p, e, atol=1e-6), params, expected)


def test_nnx_optimizer_shrinks_latents_only():
    model = nnx.Dict(z=dhp.LatentVector(jnp.array([0.1, 2.0])), w=nnx.Param(jnp.array([0.1, 2.0])))
    transform = dhp.prox_l1(1.0, 0.5)
    optimizer = nnx.Optimizer(model, transform, wrt=dhp.LatentVector)
    optimizer.update(model, nnx.State({"z": dhp.LatentVector(jnp.zeros(2))}))
    np.testing.assert_array_equal(model.z[...], [0, 1.5])
    np.testing.assert_array_equal(model.w[...], np.array([0.1, 2.0], np.float32))


# Problems with known solutions


def problem(rows, columns, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns))
    truth = rng.normal(size=columns) * (rng.random(columns) < 0.4)
    return x, x @ truth + 0.1 * rng.normal(size=rows)


def proximal_gradient(x, y, transform, steps):
    """Minimises `||y - x w||^2 / (2 rows)` plus what the transformation adds."""
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    @jax.jit
    def solve(w):
        def step(carry, _):
            w, state = carry
            gradient = x.T @ (x @ w - y) / len(y)
            updates, state = transform.update(gradient, state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, transform.init(w)), length=steps)[0][0]

    return np.asarray(solve(jnp.zeros(x.shape[1])))


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.5])
def test_ista_solves_the_lasso_as_scikit_learn_does(alpha):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = problem(80, 20, seed=3)
    rate = float(len(y) / np.linalg.norm(x, 2) ** 2)
    transform = optax.chain(optax.sgd(rate), dhp.prox_l1(alpha, rate))
    found = proximal_gradient(x, y, transform, 2000)
    expected = linear_model.Lasso(alpha=alpha, fit_intercept=False, tol=1e-10).fit(x, y).coef_
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(found == 0, expected == 0)


def test_group_lasso_is_solved_as_by_numpy_and_is_optimal():
    x, y = problem(60, 12, seed=5)
    rate = float(len(y) / np.linalg.norm(x, 2) ** 2)
    strength = 0.9
    groups = [slice(3 * g, 3 * g + 3) for g in range(4)]

    def gradient(w):
        return x.T @ (x @ w - y) / len(y)

    expected = np.zeros(12)
    for _ in range(4000):
        moved = expected - rate * gradient(expected)
        for group in groups:
            norm = np.linalg.norm(moved[group])
            expected[group] = max(0, 1 - strength * rate / norm) * moved[group]

    transform = optax.chain(optax.sgd(rate), dhp.prox_l2(strength, rate, axis=1))
    grouped = jnp.asarray(x.reshape(60, 4, 3), jnp.float32)
    w, target = jnp.zeros((4, 3)), jnp.asarray(y, jnp.float32)

    @jax.jit
    def solve(w):
        def step(_, w):
            residual = jnp.einsum("ngk,gk->n", grouped, w) - target
            grads = jnp.einsum("ngk,n->gk", grouped, residual) / len(y)
            updates, _ = transform.update(grads, transform.init(w), w)
            return optax.apply_updates(w, updates)

        return jax.lax.fori_loop(0, 4000, step, w)

    found = np.asarray(solve(w), np.float64).reshape(-1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    gone = [bool(np.all(found[group] == 0)) for group in groups]
    assert any(gone)
    assert not all(gone)
    for group, is_gone in zip(groups, gone, strict=True):  # the conditions of optimality
        slope = gradient(found)[group]
        if is_gone:
            assert np.linalg.norm(slope) <= strength + 1e-4
        else:
            along = found[group] / np.linalg.norm(found[group])
            np.testing.assert_allclose(slope, -strength * along, atol=1e-3)
