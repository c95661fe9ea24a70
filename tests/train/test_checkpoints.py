"""Checkpoints: what is read is what was saved, or is told to be damaged; training goes on from them
with the same bits."""

import contextlib
import dataclasses
import itertools
import logging
import shutil
from unittest import mock

from flax import nnx
import jax
import jax.numpy as jnp
from networks import arrays, filled
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from test_train import BATCH, CLASSES, EXAMPLES, SHAPE, STEPS, THRESHOLD, Witness, climbed, labelled
from test_train import Climb as Tables

import dhp_jax as dhp
from dhp_jax.backend.hypernets import pack_axes
from dhp_jax.core.survivors import survivor_counts
from dhp_jax.data.stream import Stream
from dhp_jax.tasks import Classification, evaluate
from dhp_jax.train.checkpoints import CheckpointError, Checkpoints
from dhp_jax.train.loop import train
from dhp_jax.train.optimizer import optimizer, shrink_latents
from dhp_jax.train.phase import Budget, OriginError, Phase, Stopped, Teacher
from dhp_jax.train.schedules import decay_schedule, drop_schedule
from dhp_jax.train.step import compile_step

pytestmark = pytest.mark.usefixtures("fast_compilation")


class Net(nnx.Module):
    """The least that has latents, a hypernetwork, running statistics and plain parameters."""

    def __init__(self, rngs):
        image, a = dhp.Latent(3, prunable=False, rngs=rngs), dhp.Latent(8, rngs=rngs)
        self.conv = dhp.HyperConv(image, a, (3, 3), use_bias=False, rngs=rngs)
        self.norm = dhp.BatchNorm(a, momentum=0.9, rngs=rngs)
        self.classifier = dhp.Linear(a, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.classifier(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def state(number):
    """A state with arrays of several types, shapes and places in a tree."""
    return (
        {"a": jnp.full((3, 2), number, jnp.float32), "b": [jnp.int32(number), jnp.zeros((0, 4))]},
        {"c": jnp.full((2,), number, jnp.bfloat16), "d": jnp.bool_(True)},
        jax.random.key(number),
        None,
    )


def check_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def like(notes):
    return state(0)


def saved(folder, steps, **options):
    """A folder with checkpoints of some steps, of the state and the notes of that number."""
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state(step), {"number": step}, wait=False)
    checkpoints.close()
    return folder


def newest(folder, **options):
    checkpoints = Checkpoints(folder, **options)
    try:
        return checkpoints.newest(like)
    finally:
        checkpoints.close()


# What is on disk


def test_the_newest_state_comes_back_as_it_was_with_its_notes(tmp_path):
    found, notes = newest(saved(tmp_path / "of/search", [3, 7, 12]))
    assert notes["number"] == 12
    check_same(found, state(12))


def test_where_nothing_was_saved_nothing_is_found_and_nothing_made(tmp_path):
    assert newest(tmp_path / "search") is None
    assert not list(tmp_path.iterdir())


def test_the_last_few_are_kept(tmp_path):
    checkpoints = Checkpoints(saved(tmp_path, range(1, 7), keep=2), keep=2)
    assert checkpoints.steps() == [6, 5]
    checkpoints.close()


def test_a_state_may_change_as_soon_as_it_is_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    array = np.ones(1000, np.float32)
    checkpoints.save(1, (array, {}, array, None), {}, wait=False)
    array[:] = 2
    checkpoints.close()
    again = Checkpoints(tmp_path)
    found, _ = again.newest(lambda notes: (array, {}, array, None))
    again.close()
    np.testing.assert_array_equal(found[0], np.ones(1000))


def test_checkpoints_of_another_source_make_room(tmp_path):
    saved(tmp_path, [10, 20], source="one")
    assert newest(tmp_path, source="one")[1]["number"] == 20
    checkpoints = Checkpoints(tmp_path, source="another")
    assert checkpoints.newest(like) is None
    for step in (5, 20):
        checkpoints.save(step, state(step), {"number": -step}, wait=True)
    assert checkpoints.steps() == [20, 5]
    assert checkpoints.newest(like)[1]["number"] == -20
    checkpoints.close()


def test_a_checkpoint_that_orbax_leaves_out_is_an_error(tmp_path):
    checkpoints = Checkpoints(saved(tmp_path, [10]))
    with pytest.raises(CheckpointError, match=r"step 5 .*; the last whole one is of step 10$"):
        checkpoints.save(5, state(5), {}, wait=True)
    checkpoints.close()


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    checkpoints = Checkpoints(saved(tmp_path, [1]))
    for wrong in (np.nan, -np.inf):
        with pytest.raises(FloatingPointError, match=r"array 'a\.b'"):
            checkpoints.save(2, {"a": {"b": jnp.array([0, wrong])}}, {}, wait=True)
    assert checkpoints.steps() == [1]
    checkpoints.close()


def test_a_step_that_is_there_already_stays(tmp_path):
    checkpoints = Checkpoints(saved(tmp_path, [1]))
    checkpoints.save(1, state(5), {"number": 5}, wait=True)
    assert checkpoints.newest(like)[1]["number"] == 1
    checkpoints.close()


# Damage


def told(caplog):
    """What our own code has to say of it; Orbax complains too."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("dhp_jax")]


def files_of(folder, step):
    return sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())


def test_whichever_file_is_cut_short_a_whole_checkpoint_is_found(tmp_path, caplog):
    whole = saved(tmp_path / "whole", [1, 2])
    fallen_back = 0
    names = [path.relative_to(whole) for path in files_of(whole, 2)]
    assert len(names) > 5
    for number, name in enumerate(names):
        for part in (0, 0.5):
            folder = tmp_path / f"{number}-{part}"
            shutil.copytree(whole, folder)
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: int(part * len(content))])
            with caplog.at_level(logging.WARNING):
                caplog.clear()
                found, notes = newest(folder)
            check_same(found, state(notes["number"]))
            assert notes["number"] in (1, 2)
            if notes["number"] == 1:
                fallen_back += 1
                damaged, going_on = told(caplog)
                assert f"{folder}: the checkpoint of step 2 is damaged: " in damaged
                assert going_on == f"{folder}: going on from step 1"
                assert (folder / "2.damaged").is_dir()
    assert fallen_back > len(names) / 2


def test_a_changed_byte_in_an_array_is_noticed(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 2**32, 5000, np.uint32)
    noise = np.random.default_rng(1)
    checkpoints = Checkpoints(tmp_path / "whole")
    checkpoints.save(1, {"a": numbers}, {}, wait=True)
    checkpoints.close()
    data = max(files_of(tmp_path / "whole", 1), key=lambda path: path.stat().st_size)
    content = data.read_bytes()
    for _ in range(5):
        at = int(noise.integers(len(content)))
        data.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        again = Checkpoints(shutil.copytree(tmp_path / "whole", tmp_path / f"{at}"))
        with contextlib.suppress(CheckpointError):
            found, _ = again.newest(lambda notes: {"a": numbers})
            np.testing.assert_array_equal(found["a"], numbers)
        again.close()


def test_where_all_are_damaged_nothing_starts_anew_unasked(tmp_path, caplog):
    folder = saved(tmp_path / "search", [1, 2])
    for step in (1, 2):
        for path in files_of(folder, step):
            path.write_bytes(b"")
    message = f"^checkpoints: none in {folder} is whole; delete the folder to start its phase anew$"
    for _ in range(2):
        with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match=message):
            newest(folder)
    assert len(told(caplog)) == 2
    shutil.rmtree(folder)
    assert newest(folder) is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, "Too many open files"),
        MemoryError(),
        ValueError("RESOURCE_EXHAUSTED: Error opening file"),
    ],
)
def test_what_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, error):
    folder = saved(tmp_path, [1, 2])

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "restore", fail)
        with pytest.raises(CheckpointError, match=r"^checkpoints: cannot go on from step 2 in "):
            newest(folder)
    assert newest(folder)[1]["number"] == 2


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda s: (*s[:3], {"e": jnp.ones(1)}), "array '3.e' is missing or unexpected"),
        (lambda s: ({"a": s[0]["a"]}, *s[1:]), "array '0.b.0' is missing or unexpected"),
        (
            lambda s: ({**s[0], "a": jnp.zeros((2, 3))}, *s[1:]),
            r"array '0.a': expected float32 of shape \(2, 3\), got float32 of shape \(3, 2\)",
        ),
        (
            lambda s: (s[0], {**s[1], "c": jnp.zeros(2)}, *s[2:]),
            r"array '1.c': expected float32 of shape \(2,\), got bfloat16 of shape \(2,\)",
        ),
    ],
)
def test_a_state_of_other_arrays_is_refused_and_stays(tmp_path, other, reason):
    checkpoints = Checkpoints(saved(tmp_path, [1]))
    message = f"^checkpoints: cannot go on from step 1 in {tmp_path}: UnlikeError: {reason}$"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.newest(lambda notes: other(state(0)))
    assert checkpoints.newest(like)[1]["number"] == 1
    checkpoints.close()


def test_what_was_being_written_when_the_power_went_is_not_there(tmp_path):
    folder = saved(tmp_path, [1])
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
    assert newest(folder)[1]["number"] == 1


def test_a_step_that_was_damaged_is_saved_again_when_training_comes_there(tmp_path):
    for path in files_of(saved(tmp_path, [1, 2]), 2):
        path.write_bytes(b"")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest(like)[1]["number"] == 1
    checkpoints.save(2, state(2), {"number": 2}, wait=True)
    assert checkpoints.newest(like)[1]["number"] == 2
    checkpoints.close()


# A disk that is full


def test_a_checkpoint_that_cannot_be_written_is_an_error_that_names_the_last(tmp_path, monkeypatch):
    checkpoints = Checkpoints(saved(tmp_path, [1]))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(2, state(2), {}, wait=True)
    checkpoints.close()
    assert str(caught.value) == (
        f"checkpoints: cannot write step 2 to {tmp_path}: OSError: [Errno 28] No space left on "
        "device; the last whole one is of step 1"
    )
    monkeypatch.undo()
    assert newest(tmp_path)[1]["number"] == 1


def test_what_cannot_be_written_is_the_same_error_when_checkpoints_are_closed(
    tmp_path, monkeypatch
):
    checkpoints = Checkpoints(saved(tmp_path, [1]))
    checkpoints.save(2, state(2), {}, wait=True)
    close = ocp.CheckpointManager.close

    def full(manager):
        close(manager)
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "close", full)
    with pytest.raises(CheckpointError, match=f"cannot write to {tmp_path}: .*No space left"):
        checkpoints.close()


# When one is due


def test_one_is_due_after_so_many_seconds_and_never_while_one_is_written(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("dhp_jax.train.checkpoints.monotonic", lambda: clock[0])
    checkpoints = Checkpoints(tmp_path, seconds=10)
    busy = [False]
    monkeypatch.setattr(ocp.CheckpointManager, "is_saving_in_progress", lambda self: busy[0])

    def due(at):
        clock[0] = at
        return checkpoints.due()

    assert (due(9.9), due(10)) == (False, True)
    checkpoints.save(1, state(1), {}, wait=False)
    busy[0] = True
    assert not due(30)
    busy[0] = False
    assert not due(11)  # writing it took a second
    assert (due(30.9), due(31)) == (False, True)  # the next one after twenty times as much
    checkpoints.close()


def test_with_no_seconds_between_them_one_is_always_due(tmp_path):
    checkpoints = Checkpoints(tmp_path, seconds=0)
    for step in range(3):
        assert checkpoints.due()
        checkpoints.save(step, state(step), {}, wait=True)
    checkpoints.close()


# Training that goes on


def phase_of(model, budget):
    schedule = drop_schedule(0.1, (2,), STEPS)
    cost = dhp.measure_cost(model, SHAPE)

    def make(params):
        sgd = optimizer("sgd", schedule, momentum=0.9, weight_decay=1e-2)
        shrink = shrink_latents(params, strength=0.3, schedule=schedule, threshold=THRESHOLD)
        return optax.chain(sgd, shrink) if budget else sgd

    limit = Budget(lambda m: cost.shares(survivor_counts(m, THRESHOLD)), {"flops": 0.0})
    return Phase("search", 3, schedule, make, limit if budget else None)


def trained(
    model,
    phase,
    folder=None,
    stop_after=None,
    log_every=2,
    data=None,
    validation=None,
    recipe=None,
    **options,
):
    """The outcome, or None where training was stopped, and what an observer saw."""
    data = labelled(EXAMPLES, 0) if data is None else data
    witness = Witness()
    checkpoints = folder and Checkpoints(folder, seconds=0)

    def stopping():
        return stop_after is not None and witness.events.count("step") >= stop_after

    try:
        outcome = train(
            model,
            phase,
            Classification((128.0,) * 3, (64.0,) * 3, crop_padding=1, flip=True, **(recipe or {})),
            data,
            labelled(11, 1),
            validation,
            examples=data.size if isinstance(data, Stream) else len(data[1]),
            batch_size=BATCH,
            log_every=log_every,
            key=jax.random.key(0),
            observers=[witness],
            checkpoints=checkpoints,
            stopping=stopping,
            **options,
        )
    except Stopped:
        outcome = None
    finally:
        if checkpoints:
            checkpoints.close()
    return outcome, witness


@pytest.fixture(scope="module")
def net():
    return filled(Net)


@pytest.fixture(scope="module", params=["search", "converge"])
def undisturbed(request, net):
    phase = phase_of(net, budget=request.param == "search")
    return phase, *trained(net, phase)


def check_same_outcome(found, expected):
    for name in ("model", "best_model"):
        of_both = (arrays(getattr(outcome, name)) for outcome in (found, expected))
        again, once = of_both
        assert again.keys() == once.keys()
        for path, array in once.items():
            np.testing.assert_array_equal(again[path], array, err_msg=path)
    progress = (dataclasses.replace(outcome.progress, seconds=0) for outcome in (found, expected))
    assert next(progress) == next(progress)


def some(first, *others):
    """One value of a parameter; the others are slow, not lost."""
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]


# The kind of training that a test tells most of.
of_searches = pytest.mark.parametrize("undisturbed", some("search", "converge"), indirect=True)
of_converging = pytest.mark.parametrize("undisturbed", some("converge", "search"), indirect=True)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 5, 10])  # of 5 an epoch, with a record every 2
def test_training_stopped_after_any_step_goes_on_with_the_same_bits(
    net, undisturbed, tmp_path, step
):
    phase, expected, seen = undisturbed
    outcome, before = trained(net, phase, tmp_path, stop_after=step)
    assert outcome is None
    outcome, after = trained(net, phase, tmp_path)
    check_same_outcome(outcome, expected)
    assert before.events.count("step") == step
    assert after.events[0] == ("begin", "search", 15, step, len(before.records))
    assert after.events.count("step") == 15 - step
    assert before.records + after.records == seen.records


@of_searches
def test_training_that_was_stopped_again_and_again_ends_with_the_same_bits(
    net, undisturbed, tmp_path
):
    phase, expected, seen = undisturbed
    outcome, starts, records, seconds = None, 0, [], [0.0]
    while outcome is None:
        outcome, witness = trained(net, phase, tmp_path, stop_after=4)
        begins, steps = witness.events[0], witness.events.count("step")
        assert begins == ("begin", "search", 15, 4 * starts, len(records))
        assert steps == min(4, 15 - 4 * starts)
        starts, records = starts + 1, records + witness.records
        checkpoints = Checkpoints(tmp_path)
        notes = checkpoints.notes(checkpoints.steps()[0])[0]
        checkpoints.close()
        seconds.append(notes["progress"]["seconds"])
    assert starts == 4
    assert records == seen.records
    assert seconds == sorted(set(seconds))  # the time before a stop counts
    assert outcome.progress.seconds > seconds[-2]
    check_same_outcome(outcome, expected)
    outcome, witness = trained(net, phase, tmp_path)  # which has ended
    check_same_outcome(outcome, expected)
    assert "step" not in witness.events


@pytest.mark.parametrize("saves", some("before the second test", True, False))
def test_many_steps_a_dispatch_go_on_with_the_same_bits(net, tmp_path, monkeypatch, saves):
    asked = []
    monkeypatch.setattr(
        "dhp_jax.backend.platform.steps_per_dispatch", lambda: asked.append(4) or asked[-1]
    )
    phase = phase_of(net, budget=True)
    expected, seen = trained(net, phase, log_every=5)
    looks = itertools.count(1)  # after steps 4 and 5, the test, steps 9 and 10, the test ...
    due = (lambda _: next(looks) == 5) if isinstance(saves, str) else lambda _: saves
    monkeypatch.setattr(Checkpoints, "due", due)
    outcome, before = trained(net, phase, tmp_path, stop_after=6, log_every=5)
    assert asked
    assert outcome is None
    outcome, after = trained(net, phase, tmp_path, log_every=5)
    check_same_outcome(outcome, expected)
    assert before.events.count("step") + after.events.count("step") == 15
    kept = after.events[0][-1]  # without that of a test that was not saved, which is made again
    assert kept == len(before.records) - (saves == "before the second test")
    assert before.records[:kept] + after.records == seen.records


def test_a_state_is_saved_before_a_test_that_takes_long(net, tmp_path, monkeypatch):
    monkeypatch.setattr("dhp_jax.train.loop.SAVE_BEFORE_TEST_S", 0.0)
    checkpoints, found = Checkpoints(tmp_path, seconds=1e6), []

    class Looking(Classification):
        def evaluation(self, *arguments, **options):
            evaluate = super().evaluation(*arguments, **options)

            def looking(*state):
                checkpoints.wait()
                found.append(checkpoints.steps())
                return evaluate(*state)

            return looking

    task = Looking((128.0,) * 3, (64.0,) * 3)
    options = {"examples": EXAMPLES, "batch_size": BATCH, "log_every": 2, "key": jax.random.key(0)}
    phase, data = phase_of(net, budget=False), (labelled(EXAMPLES, 0), labelled(11, 1))
    train(net, phase, task, *data, **options, checkpoints=checkpoints)
    checkpoints.close()
    assert [bool(steps) for steps in found] == [False, True, True]  # the first is not yet known


@pytest.mark.parametrize("budget", some(True, False))
def test_a_run_that_dies_within_a_long_test_goes_on_with_the_same_bits(
    net, tmp_path, monkeypatch, budget
):
    monkeypatch.setattr("dhp_jax.train.loop.SAVE_BEFORE_TEST_S", 0.0)
    tests = []

    class Dying(Classification):
        def evaluation(self, *arguments, **options):
            evaluate = super().evaluation(*arguments, **options)

            def dying(*state):
                tests.append(None)
                if len(tests) == 2:
                    raise KeyboardInterrupt
                return evaluate(*state)

            return dying

    def end(kind, folder=None):
        checkpoints = folder and Checkpoints(folder, seconds=1e6)
        options = {"examples": EXAMPLES, "batch_size": BATCH, "log_every": 2}
        data, witness = (labelled(EXAMPLES, 0), labelled(11, 1)), Witness()
        task = kind((128.0,) * 3, (64.0,) * 3)
        try:
            return train(
                *(net, phase_of(net, budget), task, *data),
                **options,
                key=jax.random.key(0),
                observers=[witness],
                checkpoints=checkpoints,
            ), witness
        finally:
            if checkpoints:
                checkpoints.close()

    expected, seen = end(Classification)
    with pytest.raises(KeyboardInterrupt):
        end(Dying, tmp_path)
    assert Checkpoints(tmp_path, seconds=1e6).steps() == [2 * STEPS]
    found, after = end(Classification, tmp_path)
    check_same_outcome(found, expected)
    assert after.records == seen.records[-len(after.records) :]
    assert "step" in after.events


def as_on_a_tpu(patch):
    """Has states in the form of a TPU from here on; returns how many axes their arrays have."""
    dimensions = set()

    def packed_there(model):
        with mock.patch.object(jax, "default_backend", return_value="tpu"):
            return pack_axes(model)

    def stepping(*given):
        step = compile_step(*given)

        def observed(arrays, *inputs):
            dimensions.update(array.ndim for array in arrays)
            return step(arrays, *inputs)

        return observed

    patch.setattr("dhp_jax.backend.hypernets.pack_axes", packed_there)
    patch.setattr("dhp_jax.train.loop.compile_step", stepping)
    return dimensions


def test_a_phase_goes_on_in_the_form_that_another_platform_keeps_its_state_in(
    net, tmp_path, monkeypatch
):
    """From a TPU to another platform within the first epoch, and back within the second."""
    phase = dataclasses.replace(phase_of(net, budget=False), elementwise=True)
    expected, seen = trained(net, phase)
    for is_packed, steps in ((True, 4), (False, 3), (True, None)):
        with monkeypatch.context() as changed:
            dimensions = as_on_a_tpu(changed) if is_packed else set()
            found, witness = trained(net, phase, tmp_path, steps)
            if is_packed:
                assert 4 in dimensions  # (kh, kw, m, in * out)
                assert 5 not in dimensions
    assert witness.records[-1].keys() == seen.records[-1].keys()
    for name in ("model", "best_model"):
        ours, theirs = (arrays(getattr(outcome, name)) for outcome in (found, expected))
        assert ours.keys() == theirs.keys()
        leaves = jax.tree.leaves(nnx.state(getattr(found, name)))
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
        for path, array in theirs.items():
            np.testing.assert_allclose(ours[path], array, rtol=1e-3, atol=1e-4, err_msg=path)


def kernels_only(params):
    return jax.tree.map(lambda array: array.ndim > 1, params)


@pytest.mark.parametrize(
    "make",
    some(
        lambda params: optax.adafactor(0.1, min_dim_size_to_factor=2),
        lambda params: optax.adamw(0.01, weight_decay=1.0, mask=kernels_only),
    ),
)
def test_an_optimizer_that_looks_at_shapes_gets_those_of_the_network_everywhere(
    net, monkeypatch, make
):
    phase = dataclasses.replace(phase_of(net, budget=False), optimizer=make)
    expected, _ = trained(net, phase)
    dimensions = as_on_a_tpu(monkeypatch)
    found, _ = trained(net, phase)
    assert 5 in dimensions
    check_same_outcome(found, expected)


@of_converging
def test_a_phase_of_more_epochs_goes_on_as_if_it_had_had_them_from_the_start(
    net, undisturbed, tmp_path
):
    phase, _, _ = undisturbed
    longer = dataclasses.replace(phase, epochs=4)
    expected, seen = trained(net, longer)
    _, before = trained(net, phase, tmp_path)
    outcome, after = trained(net, longer, tmp_path)
    check_same_outcome(outcome, expected)
    kept = after.events[0][-1]  # the last state may be of just before the last test
    assert len(before.records) - kept in (0, 1)
    assert before.records[:kept] + after.records == seen.records


def recipe(average=0.0):
    """A phase with what else optimizers keep."""
    schedule = decay_schedule("cosine", 0.1, 3, STEPS, warmup=1)
    given = {"momentum": 0.9, "weight_decay": 1e-2, "decayed": "kernels", "clip": 1.0}
    adamw = optimizer("adamw", schedule, **given)
    return Phase("converge", 3, schedule, lambda params: adamw, average=average)


BLENDED = {"mixup": 0.4, "cutout": 2, "label_smoothing": 0.1}


def check_goes_on(net, phase, folder, step, recipe=None):
    """Training that is stopped after a step goes on with the same bits."""
    expected, seen = trained(net, phase, recipe=recipe)
    outcome, before = trained(net, phase, folder, stop_after=step, recipe=recipe)
    assert outcome is None
    outcome, after = trained(net, phase, folder, recipe=recipe)
    check_same_outcome(outcome, expected)
    assert before.records + after.records == seen.records


@pytest.mark.parametrize("step", some(5, 3, 13))
@pytest.mark.parametrize("learns", some(True, False))
def test_a_moving_average_of_blended_and_cut_images_goes_on_with_the_same_bits(
    net, tmp_path, step, learns
):
    phase = recipe(average=0.8)
    if learns:
        phase = dataclasses.replace(phase, teacher=Teacher(dhp.prune(net), 0.7, 3.0))
    check_goes_on(net, phase, tmp_path, step, BLENDED if learns else None)


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 3, 13])
def test_nesterovs_sgd_on_blended_images_goes_on_with_the_same_bits(net, tmp_path, step):
    schedule = decay_schedule("linear", 0.1, 3, STEPS, warmup=1)
    sgd = optimizer("sgd", schedule, momentum=0.9, weight_decay=1e-2, nesterov=True)
    phase = Phase("converge", 3, schedule, lambda params: sgd)
    check_goes_on(net, phase, tmp_path, step, BLENDED)


def test_the_moving_average_is_tested_and_kept(net):
    outcome, _ = trained(net, recipe(average=0.8))
    task, data = Classification((128.0,) * 3, (64.0,) * 3), labelled(11, 1)
    for model, metrics in (
        (outcome.model, outcome.progress.last),
        (outcome.best_model, outcome.progress.best),
    ):
        assert evaluate(model, task, data) == pytest.approx(metrics, rel=1e-5)
    plain = arrays(trained(net, recipe())[0].model)
    assert any(np.abs(plain[name] - x).max() > 1e-3 for name, x in arrays(outcome.model).items())


@of_searches
@pytest.mark.parametrize("step", some(3, 5, 7))
def test_a_phase_that_ends_within_an_epoch_is_the_beginning_of_the_whole_one(
    net, undisturbed, tmp_path, step
):
    phase, _, whole = undisturbed
    short = dataclasses.replace(phase, max_steps=8)
    expected, seen = trained(net, short)
    progress = expected.progress
    assert (progress.steps, progress.epochs, progress.met_budget) == (8, 2, False)
    *before, last = seen.records
    assert before == [record for record in whole.records if record["step"] < 8]
    assert (last["step"], last["epoch"], "test_error" in last) == (8, 2, True)
    assert last["loss"] == next(r["loss"] for r in whole.records if r["step"] == 8)
    assert seen.events[0] == ("begin", "search", 8, 0, 0)
    trained(net, short, tmp_path, stop_after=step)
    outcome, after = trained(net, short, tmp_path)
    check_same_outcome(outcome, expected)
    assert after.events.count("step") == 8 - step
    longer = dataclasses.replace(short, epochs=9)
    outcome, after = trained(net, longer, tmp_path)
    check_same_outcome(outcome, expected)
    assert "step" not in after.events


@of_converging
@pytest.mark.parametrize("step", some(4, 5, 11))
def test_the_best_epoch_is_that_of_the_validation_data(net, undisturbed, tmp_path, step):
    phase, by_test, _ = undisturbed
    longer = dataclasses.replace(phase, epochs=4)
    held = labelled(9, 2)
    expected, seen = trained(net, longer, validation=held)
    tests = [record for record in seen.records if "test_error" in record]
    errors = [record["validation_error"] for record in tests]
    best = tests[errors.index(min(errors))]
    progress = expected.progress
    assert progress.best_epoch == best["epoch"]
    assert progress.best == {name: best[f"test_{name}"] for name in ("loss", "error")}
    assert progress.validation == {
        which: {name: record[f"validation_{name}"] for name in ("loss", "error")}
        for which, record in (("last", tests[-1]), ("best", best))
    }
    task = Classification((128.0,) * 3, (64.0,) * 3)
    for name, model in (("last", expected.model), ("best", expected.best_model)):
        if longer.budget is None:
            measured = evaluate(model, task, held)
            assert measured == pytest.approx(progress.validation[name], rel=1e-5)
    assert by_test.progress.validation == {}
    # It only chooses: training is the same without it.
    plain, without = trained(net, longer)
    for path, array in arrays(plain.model).items():
        np.testing.assert_array_equal(arrays(expected.model)[path], array)
    names = ("validation_loss", "validation_error")
    assert without.records == [
        {name: value for name, value in record.items() if name not in names}
        for record in seen.records
    ]
    trained(net, longer, tmp_path, stop_after=step, validation=held)
    outcome, _ = trained(net, longer, tmp_path, validation=held)
    check_same_outcome(outcome, expected)


def test_training_does_not_go_on_with_other_data(net, tmp_path):
    phase = phase_of(net, budget=False)
    trained(net, phase, tmp_path, stop_after=4)
    for examples, seed, told in ((13, 0, "examples: expected 23"), (EXAMPLES, 5, "checksum")):
        with pytest.raises(OriginError, match=told):
            trained(net, phase, tmp_path, data=labelled(examples, seed))
    assert trained(net, phase, tmp_path)[0] is not None


# Numbers that go wrong


def test_a_run_stops_at_the_last_good_checkpoint(tmp_path):
    losses = [0.0] * 4 + [np.nan] * 95
    checkpoints = Checkpoints(tmp_path, seconds=0)
    message = (
        "^converge: the loss is nan at step 5, at a learning rate of 1; "
        "the last good checkpoint is of step 4$"
    )
    with pytest.raises(FloatingPointError, match=message):
        climbed(
            Tables(losses=losses),
            epochs=9,
            examples=9,
            batch_size=1,
            checkpoints=Waiting(checkpoints),
        )
    assert checkpoints.steps()[0] == 4
    checkpoints.close()


class Waiting:
    """Checkpoints of which each is on disk before training goes on."""

    def __init__(self, checkpoints):
        self.checkpoints = checkpoints

    def __getattr__(self, name):
        return getattr(self.checkpoints, name)

    def save(self, step, state, notes, *, wait):
        self.checkpoints.save(step, state, notes, wait=True)
