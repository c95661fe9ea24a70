"""Least and most shares of latents, by name or pattern."""

import itertools

from flax import nnx
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

import dhp_jax as dhp
from dhp_jax.budgets.counted import survivors_within
from dhp_jax.budgets.limits import keep_share, with_limits


class Net(nnx.Module):
    """Three hidden widths of 10, 12 and 16."""

    def __init__(self, rngs):
        self.image = dhp.Latent(3, prunable=False, rngs=rngs)
        self.stem, self.layer1, self.layer2 = (
            dhp.Latent(n, min_channels=2, rngs=rngs) for n in (10, 12, 16)
        )
        ends = [self.image, self.stem, self.layer1, self.layer2]
        self.linears = nnx.List([dhp.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(ends)])
        self.head = dhp.Linear(ends[-1], 2, rngs=rngs)

    def __call__(self, x):
        for linear in self.linears:
            x = nnx.relu(linear(x))
        return self.head(x)


MODEL = Net(nnx.Rngs(0))
COST = dhp.measure_cost(MODEL, (3,))
SHARES = st.tuples(st.floats(0, 1), st.floats(0.05, 1)).map(sorted).map(tuple)


def counts_of(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


@hypothesis.given(st.integers(0, 99), SHARES, st.floats(0.2, 1), st.sampled_from([1, 2, 4]))
@hypothesis.settings(max_examples=40, deadline=None)
def test_survivors_are_within_their_limits_and_nothing_more_fits(seed, limit, budget, step):
    model = with_limits(MODEL, {"layer*": limit})
    scores = dhp.random_scores(MODEL, seed)
    try:
        masks = survivors_within(model, COST, step, scores=scores, flops=budget)
    except ValueError:  # too little is left to choose from
        hypothesis.reject()
    counts = counts_of(masks)
    for name, size in (("layer1", 12), ("layer2", 16)):
        least = int(np.ceil(limit[0] * size - 1e-9)) or 2
        most = max(1, int(np.floor(limit[1] * size + 1e-9)))
        assert min(least, most) <= counts[name] <= most
        entries = scores[name]
        assert entries[masks[name]].min() >= max(entries[~masks[name]], default=-1)
    assert COST.shares(counts)["flops"] <= budget
    if step == 1:
        for name, mask in masks.items():
            most = {"layer1": limit[1] * 12, "layer2": limit[1] * 16}.get(name, 99)
            if not mask.all() and mask.sum() + 1 <= most + 1e-9:
                assert COST.shares({**counts, name: counts[name] + 1})["flops"] > budget


@pytest.mark.parametrize("by", [None, dhp.uniform_within])
def test_a_most_share_narrows_and_a_least_one_of_1_leaves_out(by):
    keep = {"*": (0.25, 0.5), "stem": 1.0}
    small = dhp.prune_to(MODEL, (3,), flops=0.9, by=by, keep=keep)
    assert [layer.out_features for layer in small.linears] == [10, 6, 8]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"s": 0.5}, r"^keep: expected one of layer1, layer2, stem; got 's'"),
        ({"stem": 0}, r"^keep\['stem'\]: expected a share in \(0, 1\], got 0$"),
        ({"stem": (0.6, 0.5)}, r"^keep\['stem'\]: expected a least and a most share, .*0.6"),
        ({"stem": (0, 0)}, r"^keep\['stem'\]: expected a least and a most share"),
        ({"stem": (0.1, 0.5, 1)}, r"^keep\['stem'\]: expected a least and a most share"),
        ({"stem": "half"}, r"^keep\['stem'\]: expected a share in \(0, 1\], got 'half'$"),
    ],
)
def test_limits_that_are_none_are_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        dhp.prune_to(MODEL, (3,), flops=0.9, keep=keep)


def test_a_budget_that_a_limit_makes_unreachable_names_it():
    with pytest.raises(dhp.BudgetError, match="; a smaller keep of small latents, as 'stem' of 10"):
        dhp.prune_to(MODEL, (3,), flops=0.01, keep={"stem": 1.0})
    with pytest.raises(dhp.BudgetError, match="; min_channels=1 of small latents, as 'stem' of 10"):
        dhp.prune_to(MODEL, (3,), flops=0.01)


def test_a_function_that_does_not_keep_to_the_limits_is_refused():
    def by(model, cost, multiple_of, **budget):
        return {
            n: np.arange(z.size) < (z.size if n == "image" else 2)
            for n, z in dhp.latents(model).items()
        }

    with pytest.raises(ValueError, match=r"^keep: expected 6 to 12 entries of 'layer1', got 2"):
        dhp.prune_to(MODEL, (3,), flops=0.9, by=by, keep={"layer1": 0.5})
    with pytest.raises(ValueError, match=r"^keep: expected at most 3 entries of .* multiple_of=4$"):
        dhp.prune_to(MODEL, (3,), 4, flops=0.9, keep={"layer1": (0, 0.25)})


@pytest.mark.parametrize(
    ("share", "sizes", "floors"),
    [
        (0.0, (30, 8, 3), (4, 4, 3)),
        (0.1, (30, 80, 3), (4, 8, 3)),
        (0.1, (50, 30, 41), (5, 4, 5)),
        (0.5, (7, 8, 9), (4, 4, 5)),
        (1.0, (7, 8, 9), (7, 8, 9)),
    ],
)
def test_a_latent_keeps_its_share_rounded_up_and_no_less_than_before(share, sizes, floors):
    model = nnx.List([dhp.Latent(size, rngs=nnx.Rngs(0)) for size in sizes])
    assert keep_share(model, share) is model
    assert tuple(z.min_channels for z in model) == floors


@pytest.mark.parametrize("share", [-0.1, 1.1, "0.5", True])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match=r"^share: expected a share in"):
        keep_share(nnx.List([dhp.Latent(8, rngs=nnx.Rngs(0))]), share)
