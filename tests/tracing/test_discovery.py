"""Which families are tried together, and which of them are frozen."""

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

import dhp_jax as dhp
from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.discovery import discover


class Attention(nnx.Module):
    """Heads of queries, keys and values, whose number the code keeps for itself."""

    def __init__(self, width, heads, rngs):
        self.heads = heads
        self.to_qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        split = jnp.split(self.to_qkv(x), 3, axis=-1)
        query, key, value = (t.reshape(*x.shape[:2], self.heads, -1) for t in split)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
        return x + self.out(mixed.reshape(*x.shape[:2], -1))


class Blocks(nnx.Module):
    """Blocks of attention and of two linear layers."""

    def __init__(self, depth, rngs):
        self.attention = nnx.List([Attention(8, 2, rngs) for _ in range(depth)])
        self.up = nnx.List([nnx.Linear(8, 16, rngs=rngs) for _ in range(depth)])
        self.down = nnx.List([nnx.Linear(16, 8, rngs=rngs) for _ in range(depth)])

    def __call__(self, x):
        for attention, up, down in zip(self.attention, self.up, self.down, strict=True):
            x = attention(x)
            x = x + down(nnx.relu(up(x)))
        return x.mean(axis=1)


def counted(depth, monkeypatch):
    """What is found of so many blocks, and how many networks were proved for it."""
    proved, prove = [], Analysis.prove

    def counting(self, *args):
        proved.append(args)
        return prove(self, *args)

    monkeypatch.setattr(Analysis, "prove", counting)
    found = discover(Blocks(depth, nnx.Rngs(0)), (4, 8))
    monkeypatch.undo()
    return found, len(proved)


def test_blocks_alike_take_no_more_proofs_than_a_few_of_them(monkeypatch):
    few, proofs_of_few = counted(2, monkeypatch)
    many, proofs_of_many = counted(6, monkeypatch)
    assert few.frozen, "no family fails, so that nothing is looked for"
    assert len(many.frozen) == 3 * len(few.frozen)
    assert len(many.families) == 3 * len(few.families)
    assert proofs_of_many < proofs_of_few + 12


class Narrow(nnx.Module):
    """Code that does something else if two of its three hidden layers are narrow."""

    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(4, 8, rngs=rngs) for _ in range(2))
        self.c = nnx.Linear(4, 16, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(n, 2, rngs=rngs) for n in (8, 8, 16)])

    def __call__(self, x):
        hidden = [nnx.relu(layer(x)) for layer in (self.a, self.b, self.c)]
        outputs = [head(h) for head, h in zip(self.heads, hidden, strict=True)]
        narrow = hidden[0].shape[-1] < 8 and hidden[1].shape[-1] < 8
        return sum(outputs) * (2.0 if narrow else 1.0)


def test_of_families_that_fail_together_one_is_frozen_and_no_other():
    net = dhp.with_latents(Narrow(nnx.Rngs(0)), (4,))
    prunable = {name for name, z in dhp.latents(net).items() if z.prunable}
    assert prunable in ({"a", "c"}, {"b", "c"})


class Uneven(nnx.Module):
    """Blocks alike, of which the code lets no channel of some go."""

    def __init__(self, fixed, depth, rngs):
        self.fixed = fixed
        self.up = nnx.List([nnx.Linear(4, 8, rngs=rngs) for _ in range(depth)])
        self.down = nnx.List([nnx.Linear(8, 4, rngs=rngs) for _ in range(depth)])

    def __call__(self, x):
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            hidden = nnx.relu(up(x))
            if number in self.fixed:
                hidden = hidden.reshape(*hidden.shape[:-1], 8)
            x = x + down(hidden)
        return x


@pytest.mark.parametrize("fixed", [(0,), (3,), (0, 5), (1, 4), (0, 2, 3)])
def test_of_blocks_alike_those_are_frozen_that_fail(fixed):
    net = dhp.with_latents(Uneven(fixed, 6, nnx.Rngs(0)), (4,))
    expected = {f"up.{number}" for number in range(6) if number not in fixed}
    assert {name for name, z in dhp.latents(net).items() if z.prunable} == expected
