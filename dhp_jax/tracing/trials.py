"""Networks without random entries of some families, each of which is proved or not."""

from collections.abc import Iterable, Sequence

import numpy as np

from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.families import Family
from dhp_jax.tracing.proof import Mismatch

TRIES = 3  # random choices of survivors that are proved
SHARE = 0.4  # of the entries that go in a trial, on average
Gone = dict[str, list[int]]  # by family the entries that go in a trial


class Trials:
    """Proofs of random survivors."""

    def __init__(self, analysis: Analysis, rng: np.random.Generator):
        self.analysis, self.rng = analysis, rng
        self.contexts = analysis.trials()

    def draw(self, families: Iterable[Family]) -> Gone:
        """Random entries of each family, not equally many, for code may count them."""
        gone = {}
        for family in families:
            most = family.size - (2 if family.size > 2 else 1)  # axes of 1 are other programs
            wanted = round(SHARE * self.rng.uniform(0.4, 1.6) * family.size)
            chosen = self.rng.choice(family.size, min(most, max(1, wanted)), replace=False)
            gone[family.name] = [int(entry) for entry in chosen]
        return gone

    def attempt(
        self, families: Iterable[Family], gone: Gone
    ) -> tuple[Mismatch | None, frozenset[int]]:
        """What the proof says of the network without some entries of some families."""
        root = self.analysis.flow.terms.root
        atoms = frozenset(root(f.atoms[entry]) for f in families for entry in gone[f.name])
        try:
            return None, self.analysis.prove(atoms, None, self.contexts)
        except Mismatch as error:
            return error, frozenset()

    def passes(self, families: Sequence[Family], times: int = TRIES) -> bool:
        """Whether random survivors of some families pass several times."""
        return all(self.attempt(families, self.draw(families))[0] is None for _ in range(times))

    def pass_as_one(self, groups: Sequence[list[Family]]) -> bool:
        """Whether families of each group pass if the same entries go of all of them."""
        members = [family for group in groups for family in group]
        for _ in range(TRIES):
            gone: Gone = {}
            for group in groups:
                (entries,) = self.draw(group[:1]).values()
                gone |= {family.name: entries for family in group}
            if self.attempt(members, gone)[0] is not None:
                return False
        return True

    def conflict(
        self, families: list[Family], gone: Gone, error: Mismatch
    ) -> tuple[list[Family], Mismatch]:
        """Families that fail, of which none can be left out, and their error."""
        core: list[Family] = []
        while True:
            low, high = 0, len(families)  # of those in order, how many pass and how many fail
            while high - low > 1:
                middle = (low + high) // 2
                found, _ = self.attempt(core + families[:middle], gone)
                low, high = (middle, high) if found is None else (low, middle)
                error = found or error
            core, families = [*core, families[high - 1]], families[: high - 1]
            if not families or (found := self.attempt(core, gone)[0]) is not None:
                return core, found if families else error
