"""The training loop against steps written by hand, its looks at the budget, and its randomness."""

import copy
from dataclasses import dataclass, field
import math
import re
from types import SimpleNamespace

from flax import nnx
import jax
import jax.numpy as jnp
from networks import arrays, filled
import numpy as np
from operations import count_operations
import optax
import pytest

import dhp_jax as dhp
from dhp_jax.core.latent import LatentVector
from dhp_jax.core.survivors import survivor_counts
from dhp_jax.data.labelled.dataset import ReadLabelled
from dhp_jax.data.stream import Stream
from dhp_jax.tasks import METRICS, Classification, evaluate
from dhp_jax.train.loop import train
from dhp_jax.train.optimizer import optimizer, shrink_latents
from dhp_jax.train.phase import Budget, Phase, Teacher
from dhp_jax.train.records import _with_steps_before
from dhp_jax.train.schedules import drop_schedule
from dhp_jax.train.state import start
from dhp_jax.train.step import compile_step, make_step, many, on_resident_data

pytestmark = pytest.mark.usefixtures("fast_compilation")

EXAMPLES, TESTS, BATCH, STEPS = 23, 11, 4, 5  # in an epoch; 3 examples are left over
SHAPE, CLASSES = (6, 6, 3), 4
RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-2
STRENGTH, THRESHOLD = 0.3, 0.05
EPOCHS, LOG_EVERY = 3, 2
LOOKS = [2, 4, 5, 6, 8, 10, 12, 14, 15]  # every two steps, and at the end of an epoch
SCHEDULE = drop_schedule(RATE, (2,), STEPS)


def flops_and_params(found):
    """Of amounts or shares by name."""
    return found["flops"], found["params"]


class Net(nnx.Module):
    """Two convolutions and a classifier."""

    def __init__(self, rngs):
        image = dhp.Latent(3, prunable=False, rngs=rngs)
        a, b = dhp.Latent(8, min_channels=2, rngs=rngs), dhp.Latent(6, min_channels=3, rngs=rngs)
        self.first = dhp.HyperConv(image, a, (3, 3), use_bias=False, rngs=rngs)
        self.norm = dhp.BatchNorm(a, momentum=0.9, rngs=rngs)
        self.second = dhp.HyperConv(a, b, (3, 3), rngs=rngs)
        self.classifier = dhp.Linear(b, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return self.classifier(nnx.relu(self.second(x)).mean((1, 2)))


@dataclass(frozen=True)
class Recording(Classification):
    """Classification that remembers the batches it was trained with."""

    batches: list = field(default_factory=list)

    def augmented(self, key, examples):
        batch = super().augmented(key, examples)
        jax.debug.callback(lambda *batch: self.batches.append(batch), *batch, ordered=True)
        return batch


class Witness:
    """An observer that remembers everything; records without what a clock says."""

    def __init__(self):
        self.events, self.records, self.rates = [], [], []

    def begin(self, phase, steps, done, records):
        self.events.append(("begin", phase, steps, done, len(records)))

    def step(self, count):
        self.events += ["step"] * count

    def record(self, values):
        self.events.append("record")
        clock = ("seconds", "examples_per_second")
        self.records.append({n: v for n, v in values.items() if n not in clock})
        self.rates.append(values.get("examples_per_second"))

    def end(self):
        self.events.append("end")


def labelled(n, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *SHAPE), np.uint8)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, CLASSES, n))


def streamed_labelled(n, seed):
    """The same examples, as other processes would read them."""
    images = list(zip(*map(np.asarray, labelled(n, seed)), strict=True))
    return Stream(n, ReadLabelled(images), checksum=0, workers=0)


def searched(model, *, limit=0.0, log_every=LOG_EVERY, streamed=False):
    """A search, the batches that it went through, and what its observer saw."""
    task = Recording((128.0,) * 3, (64.0,) * 3, crop_padding=1, flip=True)
    cost, witness = dhp.measure_cost(model, SHAPE), Witness()

    def with_proximal_step(params):
        sgd = optimizer("sgd", SCHEDULE, momentum=MOMENTUM, weight_decay=DECAY)
        shrink = shrink_latents(params, strength=STRENGTH, schedule=SCHEDULE, threshold=THRESHOLD)
        return optax.chain(sgd, shrink)

    budget = Budget(lambda m: cost.shares(survivor_counts(m, THRESHOLD)), {"flops": limit})
    phase = Phase("search", EPOCHS, SCHEDULE, with_proximal_step, budget)
    outcome = train(
        model,
        phase,
        task,
        (streamed_labelled if streamed else labelled)(EXAMPLES, 0),
        labelled(TESTS, 1),
        examples=EXAMPLES,
        batch_size=BATCH,
        log_every=log_every,
        key=jax.random.key(0),
        observers=[witness],
    )
    jax.effects_barrier()
    return outcome, task.batches, witness


@pytest.fixture(scope="module")
def net():
    return filled(Net)


@pytest.fixture(scope="module")
def search(net):
    return searched(net)


def scores_and_loss(model, inputs, labels):
    scores = model(inputs)
    chosen = jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(scores, axis=1) - chosen), scores


def measured(model, images, labels):
    """Mean loss and error in evaluation mode, over everything at once."""
    model = nnx.clone(model)
    model.eval()
    inputs = (np.asarray(images, np.float32) - 128) / 64
    loss, scores = scores_and_loss(model, jnp.asarray(inputs), labels)
    return float(loss), float(np.mean(np.argmax(scores, axis=1) != np.asarray(labels)))


def counts_of(model):
    """How many entries of each latent survive, by the definition."""
    counts = {}
    for name, z in dhp.latents(model).items():
        magnitude = np.sort(np.abs(np.asarray(z.value())))[::-1]
        reach = int(np.sum(magnitude >= np.float32(THRESHOLD)))
        counts[name] = max(reach, min(z.min_channels, z.size)) if z.prunable else z.size
    return counts


@pytest.fixture(scope="module")
def by_hand(net, search):
    """The models after each of the steps of the search, taken by hand, with losses and errors."""
    model = nnx.clone(net)
    model.train()
    gradient = nnx.jit(nnx.value_and_grad(scores_and_loss, has_aux=True))
    velocity, steps = {}, []
    for number, (inputs, labels) in enumerate(search[1]):
        (loss, scores), grads = gradient(model, jnp.asarray(inputs), jnp.asarray(labels))
        rate = RATE if number < 2 * STEPS else RATE / 10
        variables = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
        for path, grad in nnx.to_flat_state(grads):
            variable, old = variables[path], np.asarray(variables[path][...], np.float64)
            decayed = np.asarray(grad[...]) + DECAY * old
            velocity[path] = MOMENTUM * velocity.get(path, 0) + decayed
            stepped = old - rate * velocity[path]
            prunable = isinstance(variable, LatentVector) and variable.prunable
            if prunable and np.sum(np.abs(stepped) >= THRESHOLD) > variable.min_channels:
                shrunk = np.maximum(np.abs(stepped) - STRENGTH * rate, 0)
                stepped = np.sign(stepped) * shrunk
            variables[path] = variable.replace(jnp.asarray(stepped, jnp.float32))
        nnx.update(model, nnx.from_flat_state(list(variables.items())))
        wrong = np.mean(np.argmax(scores, axis=1) != labels)
        steps.append((nnx.clone(model), float(loss), float(wrong)))
    return steps


def check_same(found, expected):
    """Two models are the same bit for bit."""
    found, expected = arrays(found), arrays(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# A search, step by step


def test_a_search_ends_where_its_steps_taken_by_hand_end(search, by_hand):
    found, expected = arrays(search[0].model), arrays(by_hand[-1][0])
    assert len(by_hand) == EPOCHS * STEPS
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4, err_msg=name)


def test_records_are_of_the_steps_since_the_one_before_or_of_two_at_the_end_of_an_epoch(
    search, by_hand
):
    records = search[2].records
    assert [record["step"] for record in records] == LOOKS
    begin = {5: 2, 15: 12}  # of one step, so those of the record before are told too
    for before, record in zip([0, *LOOKS], records, strict=False):
        steps = by_hand[begin.get(record["step"], before) : record["step"]]
        assert record["loss"] == pytest.approx(np.mean([s[1] for s in steps]), rel=1e-3)
        assert record["error"] == pytest.approx(np.mean([s[2] for s in steps]), abs=1e-6)
        assert record["epoch"] == math.ceil(record["step"] / STEPS)
        rate = RATE if record["step"] <= 2 * STEPS else RATE / 10
        assert record["learning_rate"] == pytest.approx(rate)
        assert record["phase"] == "search"


def test_a_record_at_the_end_of_a_search_tells_of_no_step_of_another_epoch():
    plan, recorded = SimpleNamespace(batch_size=1, log_every=2), []
    # Batch `n` has the loss `n`; five make an epoch, and the sixth meets the budget.
    for step, epoch, of_record, expected in [
        *((2, 1, (1, 2), 1.5), (4, 1, (3, 4), 3.5), (5, 1, (5,), 4.0)),
        (6, 2, (6,), 6.0),
    ]:
        progress = SimpleNamespace(steps=step, epochs=epoch - 1)
        run = SimpleNamespace(records=tuple(recorded), progress=progress, met_budget=step == 6)
        measured = {"loss": np.mean(of_record)}
        found = _with_steps_before(plan, run, measured, float(len(of_record)))
        assert found["loss"] == pytest.approx(expected)
        recorded.append({"step": step, "epoch": epoch, **found})


def test_every_epoch_ends_with_a_test_of_all_test_data(search, by_hand):
    for record in search[2].records:
        ends = record["step"] % STEPS == 0
        assert ("test_loss" in record, "test_error" in record) == (ends, ends)
        if ends:
            loss, error = measured(by_hand[record["step"] - 1][0], *labelled(TESTS, 1))
            assert record["test_loss"] == pytest.approx(loss, rel=1e-3)
            assert record["test_error"] == pytest.approx(error, abs=1e-6)


def test_the_recorded_ratios_are_those_of_the_survivors(net, search, by_hand):
    cost = dhp.measure_cost(net, SHAPE)
    found = [(record["flops_ratio"], record["params_ratio"]) for record in search[2].records]
    expected = [flops_and_params(cost.shares(counts_of(by_hand[step - 1][0]))) for step in LOOKS]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len({flops for flops, _ in found}) > 2  # the search does go down


def test_progress_sums_the_phase_up(search):
    outcome, _, witness = search
    errors = [record["test_error"] for record in witness.records if "test_error" in record]
    progress = outcome.progress
    assert (progress.epochs, progress.steps, progress.met_budget) == (EPOCHS, 3 * STEPS, False)
    assert (progress.last["error"], progress.best["error"]) == (errors[-1], min(errors))
    losses = [record["test_loss"] for record in witness.records if "test_loss" in record]
    assert progress.last["loss"] == losses[-1]
    assert progress.best["loss"] == losses[errors.index(min(errors))]
    assert progress.best_epoch == 1 + errors.index(min(errors))
    assert 0 < progress.seconds < math.inf


def test_observers_are_told_of_every_step_and_record_between_beginning_and_end(search):
    expected = [("begin", "search", EPOCHS * STEPS, 0, 0)]
    for step in range(1, EPOCHS * STEPS + 1):
        expected += ["step", "record"] if step in LOOKS else ["step"]
    assert search[2].events == [*expected, "end"]


def test_the_speed_is_recorded_but_for_the_first_step_which_compiles(search):
    assert len(search[2].rates) == len(LOOKS)
    assert all(0 < rate < math.inf for rate in search[2].rates)
    witness = Witness()
    climbed(Climb(), epochs=2, examples=2, batch_size=1, log_every=1, observers=[witness])
    assert [rate is None for rate in witness.rates] == [True, False, False, False]


# The budget


def test_a_search_stops_after_the_first_step_that_reaches_the_limit(net, search, by_hand):
    cost = dhp.measure_cost(net, SHAPE)
    ratios = [cost.shares(counts_of(model))["flops"] for model, *_ in by_hand]
    limit = np.nextafter(np.float32(min(ratios[: 2 * STEPS])), np.float32(1)).item()
    stop = 1 + next(i for i, ratio in enumerate(ratios) if ratio <= limit)
    outcome, _, witness = searched(net, limit=limit)
    assert outcome.progress.met_budget
    assert outcome.progress.steps == stop
    assert outcome.progress.epochs == math.ceil(stop / STEPS)
    *before, last = witness.records
    assert before == [record for record in search[2].records if record["step"] < stop]
    assert last["step"] == stop
    since = max(look for look in [0, *LOOKS] if look < stop)
    if stop - since < LOG_EVERY:  # one step tells little, so those of the record before count too
        since = max(look for look in [0, *LOOKS] if look < since)
    assert last["loss"] == pytest.approx(np.mean([s[1] for s in by_hand[since:stop]]), rel=1e-3)
    assert last["flops_ratio"] == pytest.approx(ratios[stop - 1], rel=1e-6)
    loss, error = measured(outcome.model, *labelled(TESTS, 1))
    assert last["test_loss"] == pytest.approx(loss, rel=1e-4)
    assert outcome.progress.last["error"] == pytest.approx(error, abs=1e-6)


# Many steps a dispatch


@pytest.fixture
def many_at_once(monkeypatch):
    """As on GPU and TPU; 4 steps in blocks of 3, and an epoch is no multiple of either."""
    asked = []
    monkeypatch.setattr(
        "dhp_jax.backend.platform.steps_per_dispatch", lambda: asked.append(4) or asked[-1]
    )
    monkeypatch.setattr("dhp_jax.train.step.STEPS_PER_CHECK", 3)
    yield
    assert asked


def check_alike(found, expected):
    """Two models are the same but for the order of sums."""
    found, expected = arrays(found), arrays(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def test_many_steps_a_dispatch_end_where_single_ones_do(net, search, many_at_once):
    outcome, batches, witness = searched(net, log_every=7)
    check_alike(outcome.model, search[0].model)
    taken = iter(batches)  # those of the last block's steps that nobody asked for between them
    for expected in search[1]:
        assert any(all(map(np.array_equal, found, expected)) for found in taken)
    assert witness.events.count("step") == EPOCHS * STEPS
    assert outcome.progress.steps == EPOCHS * STEPS


@pytest.mark.parametrize("streamed", [False, True])
def test_dispatches_after_the_one_that_reaches_the_limit_change_nothing(
    net, by_hand, many_at_once, streamed
):
    cost = dhp.measure_cost(net, SHAPE)
    ratios = [cost.shares(counts_of(model))["flops"] for model, *_ in by_hand]
    lower = [i for i in range(1, len(ratios)) if ratios[i] < min(ratios[:i])]
    drops = [i for i in lower if i % 4 in (1, 2)]  # within a dispatch
    limit = np.nextafter(np.float32(ratios[drops[0]]), np.float32(1)).item()
    outcome, _, witness = searched(net, limit=limit, log_every=100, streamed=streamed)
    assert outcome.progress.met_budget
    assert outcome.progress.steps == drops[0] + 1
    check_alike(outcome.model, by_hand[drops[0]][0])
    assert witness.events.count("step") == drops[0] + 1


def test_the_device_takes_many_steps_without_the_host(net):
    task = Classification((128.0,) * 3, (64.0,) * 3, crop_padding=1, flip=True)
    cost = dhp.measure_cost(net, SHAPE)
    budget = Budget(lambda m: cost.shares(survivor_counts(m, THRESHOLD)), {"flops": 0.5})
    graphdef, transformation, state = start(net, lambda params: optax.sgd(0.1))
    arrays, structure = jax.tree.flatten(state)
    step = make_step(graphdef, transformation, task, BATCH, budget=budget)
    steps = compile_step(many(on_resident_data(step, task, BATCH)), structure)
    order = jnp.arange(EXAMPLES)
    lowered = steps.lower(arrays, labelled(EXAMPLES, 0), order, 0, 3, jax.random.key(0))
    program = lowered.compile().as_text()
    assert " while(" in program
    assert not re.search(r"\b(infeed|outfeed|send|recv)\(|callback|MoveToHost", program)


@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_a_step_lowers_the_loss_and_the_distance_from_the_teacher(net, weight):
    """The gradient against one by autodiff of the formula, at plain descent of rate 1."""
    pupil, wise = dhp.prune(net), dhp.prune(filled(Net, seed=5))
    task, temperature = Classification((128.0,) * 3, (64.0,) * 3), 3.0
    teacher = Teacher(wise, weight, temperature)
    graphdef, descent, state = start(pupil, lambda _: optax.sgd(1.0), teacher=nnx.state(wise))
    images, labels = (array[:BATCH] for array in labelled(EXAMPLES, 0))
    inputs = (images - 128.0) / 64
    wise.eval()
    taught = jax.nn.softmax(wise(inputs) / temperature)

    def formula(model):
        logits = model(inputs)
        plain = -jax.nn.log_softmax(logits)[jnp.arange(BATCH), labels].mean()
        learnt = jax.nn.log_softmax(logits / temperature)
        apart = (taught * (jnp.log(taught) - learnt)).sum(-1).mean()
        return (1 - weight) * plain + weight * temperature**2 * apart

    pupil.train()
    value, grads = nnx.jit(nnx.value_and_grad(formula))(pupil)
    step = jax.jit(make_step(graphdef, descent, task, BATCH, teacher=teacher))
    after = step(state, (images, labels), jax.random.key(0))
    assert float(after.measures.loss) / BATCH == pytest.approx(float(value), rel=1e-5)
    of_both = (jax.tree.leaves(x) for x in (grads, state.params, after.params))
    for gradient, before, stepped in zip(*of_both, strict=True):
        np.testing.assert_allclose(before - stepped, gradient, rtol=1e-3, atol=1e-5)
    for before, stepped in zip(*map(jax.tree.leaves, (state.teacher, after.teacher)), strict=True):
        np.testing.assert_array_equal(before, stepped)


def test_a_step_has_one_forward_pass_of_the_teacher():
    pupil, wise = dhp.prune(filled(Net)), dhp.prune(filled(Net, seed=5))
    task = Classification((128.0,) * 3, (64.0,) * 3)
    images, labels = (array[:BATCH] for array in labelled(EXAMPLES, 0))
    wise.eval()
    counts = []
    for teacher in (None, Teacher(wise, 0.5, 2.0)):
        given = {"teacher": nnx.state(wise)} if teacher else {}
        graphdef, descent, state = start(pupil, lambda _: optax.sgd(1.0), **given)
        step = make_step(graphdef, descent, task, BATCH, teacher=teacher)
        counts.append(count_operations(step, state, (images, labels), jax.random.key(0)))
    forward = count_operations(lambda x: wise(x), images)
    assert forward > 2
    assert counts[1] == counts[0] + forward


# Randomness


def test_the_same_key_gives_the_same_bits_however_often_it_is_looked_at(search):
    model = filled(Net)
    model.eval()
    before = copy.deepcopy(arrays(model))
    outcome, batches, _ = searched(model, log_every=7)
    for found, expected in zip(batches, search[1], strict=True):
        for array, like in zip(found, expected, strict=True):
            np.testing.assert_array_equal(array, like)
    # Starting in evaluation mode makes no difference either, and the model is left as it was.
    check_same(outcome.model, search[0].model)
    assert model.norm.use_running_average
    assert arrays(model).keys() == before.keys()
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


class Score(nnx.Module):
    """A number that the tasks below raise by 1 in each step; it has no latents."""

    def __init__(self):
        self.height = nnx.Param(jnp.zeros(()))

    def __call__(self, x):
        return jnp.full(len(x), self.height[...])


class Climb:
    """Raises a `Score`; remembers examples and keys; scores and losses are those of tables."""

    def __init__(self, scores=(0.0,) * 99, losses=(0.0,) * 99, metric="error"):
        self.scores, self.losses = jnp.asarray(scores), jnp.asarray(losses)
        self.metric = METRICS[metric]
        self.seen, self.keys = [], []

    def examples(self, key, data, chosen):
        return tuple(array[chosen] for array in data)

    def augmented(self, key, examples):
        def remember(key, examples):
            self.keys.append(tuple(key.tolist()))
            self.seen.append([array.tolist() for array in examples])

        jax.debug.callback(remember, jax.random.key_data(key), examples, ordered=True)
        return examples

    def loss(self, outputs, targets):
        at = jax.lax.stop_gradient(outputs)
        return self.losses[at.astype(int)] - (outputs - at)

    def score(self, outputs, targets):
        return self.scores[outputs.astype(int)]

    def evaluation(self, model, data, *, batch_size):
        graphdef, (inputs, targets) = nnx.graphdef(model), data

        def run(params, rest):
            outputs = nnx.merge(graphdef, *params, rest)(inputs)
            measured = {"loss": self.loss, self.metric.name: self.score}
            return {name: float(f(outputs, targets).mean()) for name, f in measured.items()}

        return run


def climbed(
    task,
    *,
    epochs,
    examples=5,
    batch_size=5,
    log_every=100,
    budget=None,
    skip_faulty=False,
    average=0.0,
    key=3,
    **told,
):
    numbers = jnp.arange(examples)
    rate = optax.constant_schedule(1.0)
    sgd = optax.sgd(rate)
    phase = Phase(
        "converge", epochs, rate, lambda params: sgd, budget, skip_faulty, average=average
    )
    outcome = train(
        Score(),
        phase,
        task,
        (numbers, 10 * numbers),
        (numbers, numbers),
        examples=examples,
        batch_size=batch_size,
        log_every=log_every,
        key=jax.random.key(key),
        **told,
    )
    jax.effects_barrier()
    return outcome


@pytest.mark.parametrize("decay", [0.3, 0.95])
def test_the_moving_average_is_that_of_the_weights_after_every_step(decay):
    outcome = climbed(Climb(), epochs=3, examples=20, average=decay)
    average = 0.0
    for step in range(12):  # the weight is `step + 1` after it
        d = min(decay, (1 + step) / (10 + step))
        average = d * average + (1 - d) * (step + 1)
    np.testing.assert_allclose(outcome.model.height[...], average, rtol=1e-6)


def test_every_epoch_goes_through_another_permutation_of_the_examples():
    task, epochs = Climb(), 6
    outcome = climbed(task, epochs=epochs, examples=22, batch_size=4)
    assert outcome.progress.steps == len(task.seen) == epochs * 5
    orders = []
    for epoch in range(epochs):
        batches = task.seen[5 * epoch : 5 * epoch + 5]
        order = [number for numbers, _ in batches for number in numbers]
        assert [ten for _, tens in batches for ten in tens] == [10 * number for number in order]
        assert len(order) == len(set(order)) == 20
        assert set(order) <= set(range(22))
        orders.append(tuple(order))
    assert len(set(orders)) == epochs
    assert set().union(*orders) == set(range(22))  # not always the same two are left over


def test_every_step_draws_from_a_key_of_its_own():
    task = Climb()
    climbed(task, epochs=4, examples=6, batch_size=2)
    assert len(set(task.keys)) == len(task.keys) == 12


def test_another_key_gives_other_batches_and_other_randomness():
    tasks = Climb(), Climb()
    for key, task in enumerate(tasks):
        climbed(task, epochs=2, examples=22, batch_size=11, key=key)
    one, other = tasks
    assert not set(one.keys) & set(other.keys)
    assert all(a != b for a, b in zip(one.seen, other.seen, strict=True))


# Which model is which


@pytest.mark.parametrize(
    ("metric", "scores"),
    [
        ("error", (0.875, 0.5, 0.25, 0.75, 0.25, 0.375)),  # the lower the better
        ("psnr", (9.0, 20.5, 30.25, 20.75, 30.25, 30.0)),  # the higher the better
    ],
)
def test_the_best_model_is_that_of_the_first_best_test_and_the_last_the_last(metric, scores):
    witness = Witness()
    task = Climb(scores, losses=(7.0, 1.0, 5.0, 2.0, 3.0, 4.0), metric=metric)
    outcome = climbed(task, epochs=5, observers=[witness])
    assert float(outcome.best_model.height[...]) == 2
    assert float(outcome.model.height[...]) == 5
    progress = outcome.progress
    assert progress.best_epoch == 2
    assert progress.best == {"loss": 5.0, metric: scores[2]}
    assert progress.last == {"loss": 4.0, metric: scores[5]}
    assert not progress.met_budget
    assert [record[metric] for record in witness.records] == [*scores[:5]]  # before each step
    assert [record[f"test_{metric}"] for record in witness.records] == [*scores[1:]]


@pytest.mark.parametrize(
    ("limit", "steps", "epochs"),
    [(1.0, 1, 1), (0.75, 3, 1), (0.45, 6, 2)],  # the share of a step is 1 - step / 10
)
def test_a_budget_is_looked_at_after_every_step(limit, steps, epochs):
    def shares(model):
        left = 1 - model.height[...] / 10
        return {"flops": left, "params": jnp.ones(()), "activations": left}

    witness, budget = Witness(), Budget(shares, {"flops": limit})
    outcome = climbed(
        Climb(), epochs=2, batch_size=1, log_every=3, budget=budget, observers=[witness]
    )
    assert (outcome.progress.steps, outcome.progress.epochs) == (steps, epochs)
    assert outcome.progress.met_budget
    assert witness.records[-1]["step"] == steps
    assert outcome.best_model is outcome.model  # a search keeps no best model


def test_a_trained_model_can_be_trained_again_and_stays(net, search):
    model = search[0].model
    before = copy.deepcopy(arrays(model))
    again = searched(model)[0].model
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert np.any(arrays(again)["classifier.kernel"] != before["classifier.kernel"])


# Tests of any size


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_an_evaluation_is_the_mean_over_all_examples_whatever_the_batch(net, batch_size):
    data = labelled(TESTS, 1)
    before = copy.deepcopy(arrays(net))
    task = Classification((128.0,) * 3, (64.0,) * 3, crop_padding=1, flip=True)
    found = evaluate(net, task, data, batch_size=batch_size)
    assert found.keys() == {"loss", "error"}
    assert (found["loss"], found["error"]) == pytest.approx(measured(net, *data), rel=1e-5)
    for name, array in arrays(net).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


# What is refused


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_ends_training_and_its_step_is_told(value, shown):
    witness = Witness()
    task = Climb(losses=(0.0, 0.0, 0.0, value, 0.0, 0.0, 0.0))  # in the fourth step
    message = f"^converge: the loss is {shown} at step 4, at a learning rate of 1$"
    with pytest.raises(FloatingPointError, match=message):
        climbed(task, epochs=9, examples=9, batch_size=1, log_every=3, observers=[witness])
    assert [record["step"] for record in witness.records] == [3]
    assert witness.events[-1] == "end"


class Sink(nnx.Module):
    """A latent of one entry, whose value is the loss."""

    def __init__(self):
        self.depth = LatentVector(jnp.zeros(1), prunable=True, min_channels=1)

    def __call__(self, x):
        return jnp.full(len(x), self.depth[...].sum())


def test_a_latent_that_is_not_finite_ends_training_and_its_step_is_told():
    class Steep(Climb):
        def loss(self, outputs, targets):  # its gradient overflows in the third step
            return jnp.where(outputs < -1.5, -outputs * 1e38, outputs)

    rate = optax.constant_schedule(1.0)
    phase = Phase("converge", 1, rate, lambda params: optax.sgd(lambda n: 1.0 + 9 * (n >= 2)))
    numbers = jnp.arange(5)
    message = "^converge: the latent 'depth' is not finite at step 3, at a learning rate of 1$"
    with pytest.raises(FloatingPointError, match=message):
        train(
            Sink(),
            phase,
            Steep(),
            (numbers, numbers),
            (numbers, numbers),
            examples=5,
            batch_size=1,
            log_every=100,
            key=jax.random.key(0),
        )


def test_with_the_switch_a_batch_whose_loss_is_not_finite_is_left_out_and_counted():
    # The example that a step takes decides; Climb's own tables go by height.
    class Poisoned(Climb):
        def loss(self, outputs, targets):
            return jnp.where(targets == 40, math.nan, super().loss(outputs, targets))

    witness = Witness()
    outcome = climbed(
        Poisoned(),
        epochs=2,
        examples=5,
        batch_size=1,
        log_every=5,
        skip_faulty=True,
        observers=[witness],
    )
    assert float(outcome.model.height[...]) == 8  # of ten steps two were not taken
    assert outcome.progress.skipped == 2
    assert outcome.progress.steps == 10
    assert [record["skipped"] for record in witness.records] == [1, 1]
    assert all(math.isfinite(record["loss"]) for record in witness.records)


def test_with_the_switch_a_batch_whose_gradient_is_not_finite_is_left_out():
    class Poisoned(Climb):
        def loss(self, outputs, targets):  # the root of zero is 0, its derivative is not
            at = jax.lax.stop_gradient(outputs)
            return super().loss(outputs, targets) + jnp.sqrt((outputs - at) * (targets == 40))

    outcome = climbed(Poisoned(), epochs=3, examples=5, batch_size=1, skip_faulty=True)
    assert float(outcome.model.height[...]) == 12
    assert outcome.progress.skipped == 3


def test_a_batch_that_is_left_out_ends_nothing_where_its_record_has_no_other():
    class Poisoned(Climb):
        def loss(self, outputs, targets):
            return jnp.where(targets == 40, math.nan, super().loss(outputs, targets))

    witness = Witness()
    told = {"log_every": 1, "skip_faulty": True, "observers": [witness]}
    outcome = climbed(Poisoned(), epochs=3, examples=5, batch_size=1, **told)
    assert (outcome.progress.skipped, float(outcome.model.height[...])) == (3, 12)
    assert [record["skipped"] for record in witness.records] == [
        0 if "loss" in record else 1 for record in witness.records
    ]


def test_where_every_batch_would_be_left_out_training_ends():
    task = Climb(losses=[0.0, 0.0] + [math.nan] * 97)
    message = "^converge: the loss or gradient of every batch after step 3 is not finite at step 9"
    with pytest.raises(FloatingPointError, match=message):
        climbed(task, epochs=1, examples=9, batch_size=1, log_every=3, skip_faulty=True)


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (-math.inf, "-inf")])
def test_a_test_that_is_not_finite_ends_training(value, shown):
    witness = Witness()
    task = Climb(scores=(0.0, 0.0, value, 0.0), metric="psnr")  # after the second step
    message = f"^converge: the test psnr is {shown} at step 2, at a learning rate of 1$"
    with pytest.raises(FloatingPointError, match=message):
        climbed(task, epochs=3, observers=[witness])
    assert [record["step"] for record in witness.records] == [1]
    assert witness.events[-1] == "end"


@pytest.mark.parametrize("batch_size", [-1, 0, 6])
def test_a_batch_that_is_empty_or_larger_than_the_data_is_refused_before_training(batch_size):
    witness = Witness()
    message = rf"^batch_size: expected 1 to 5 \(the examples of an epoch\), got {batch_size}$"
    with pytest.raises(ValueError, match=message):
        climbed(Climb(), epochs=1, batch_size=batch_size, observers=[witness])
    assert witness.events == []
