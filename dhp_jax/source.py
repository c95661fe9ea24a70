"""The finished run that another one starts from: its weights, or the channels that it has kept."""

from collections.abc import Mapping
from dataclasses import dataclass
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from dhp_jax import checkpoint, result
from dhp_jax.config import ConfigError
from dhp_jax.methods import METHODS
from dhp_jax.names import shown
from dhp_jax.workdir import MAY_CHANGE, MAY_MOVE, data_checksums, flat, plain

TAKEN = {"baseline": "model", "dhp": "pruned"}  # which network of a run, by its method
SAME = ("task.", "model.", "data.")  # fields in which both runs agree
SAME_BUDGET = (
    "target",
    "budget.",
    "multiple_of",
    "search.min_channels",
)  # where channels are taken


@dataclass(frozen=True)
class Source:
    """A network of a finished run.

    Attributes:
      path: its folder.
      description: what it says of itself.
      origin: JSON values that tell what it cost: `run`, `method`, `phase`, `epochs`, `steps`.
    """

    path: Path
    description: Mapping[str, Any]
    origin: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Tells it from other networks."""
        return self.description["sha256"]

    @property
    def budget(self) -> dict[str, Any]:
        """What was noted when its survivors were chosen; see `budgets.Chosen.notes`."""
        return self.description["notes"]["budget"]

    def masks(self, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """A mask of its survivors for each latent, by the sizes of the latents."""
        kept = self.description["survivors"]
        return {name: np.isin(np.arange(size), kept[name]) for name, size in sizes.items()}


def read(config: ConfigDict) -> Source:
    """The source of a run whose method needs one.

    Raises:
      ConfigError: there is no such run, it is not finished, or it is of another network, task, data
        or budget; the message names `config.source` and what was expected.
    """
    folder = Path(config.source).expanduser()
    expected = f"expected the directory of a finished run with {_method(config)}"
    try:
        there = result.configuration(folder)
        if there["method"] != METHODS[config.method].source:
            raise ConfigError(
                f"config.source: {expected}; that in {str(folder)!r} has config.method="
                f"{there['method']}"
            )
        source = _source(folder, there)
    except ConfigError:
        raise
    except (KeyError, OSError, TypeError, ValueError) as error:
        told = f"got {str(folder)!r} ({error})"
        raise ConfigError(f"config.source: {expected}; {told}") from error
    if source is None:
        raise ConfigError(f"config.source: {expected}; that in {str(folder)!r} is not finished")
    _check_same(config, there, folder)
    return source


def check(config: ConfigDict, workdir: str | os.PathLike, checksums: Mapping[str, int]) -> None:
    """Raises unless the source suits a run: as `read`, and its data and network are the right ones.

    Args:
      config: of the run.
      workdir: its directory; if it has begun, the source must be the one that it began with.
      checksums: of its data.

    Raises:
      ConfigError: as `read`; other data, or another source than the run has begun with.
    """
    source = read(config)
    if data_checksums(Path(config.source).expanduser()) != dict(checksums):
        raise ConfigError(
            f"config.source: expected a run on the same images; that in {str(config.source)!r} has "
            "seen others (their names, sizes or statistics differ)"
        )
    pruned = Path(workdir) / "pruned"
    if checkpoint.exists(pruned):
        began = checkpoint.read_description(pruned)["notes"].get("made_from")
        if began != source.sha256:
            raise ConfigError(
                f"config.source: expected the network that the run in {workdir} began with; "
                f"{str(source.path)!r} is another one; give another --workdir"
            )


def _method(config: ConfigDict) -> str:
    needed = METHODS[config.method].source
    return f"config.method={needed}, for config.method={config.method}"


def _source(folder: Path, there: Mapping[str, Any]) -> Source | None:
    """The network of a run; `None` if it is not finished."""
    method = there["method"]
    phase, trained = METHODS[method].phases[0], METHODS[method].phases[-1]
    if not all(checkpoint.exists(folder / name) for name in ("model", TAKEN[method])):
        return None
    last = checkpoint.verify(folder / "model")["notes"]["phase"]
    if last["epochs"] < there[trained]["epochs"]:
        return None
    of_phase = "search" if phase == "search" else "model"
    reached = checkpoint.read_description(folder / of_phase)["notes"]["phase"]
    origin = {"run": folder.name, "method": method, "phase": phase}
    origin |= {name: reached[name] for name in ("epochs", "steps")}
    path = folder / TAKEN[method]
    return Source(path, checkpoint.verify(path), origin)


def _check_same(config: ConfigDict, there: Mapping[str, Any], folder: Path) -> None:
    """Raises unless both runs agree in all that makes their networks comparable."""
    ours, theirs = flat(plain(config)), flat(there)
    same = SAME + SAME_BUDGET * (METHODS[config.method].source == "dhp")
    for name in sorted({**ours, **theirs}):
        matters = name.startswith(same) and name not in (*MAY_CHANGE, *MAY_MOVE)
        if matters and ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"config.source: expected a run with config.{name}={shown(ours.get(name))}, as "
                f"here; that in {str(folder)!r} has {shown(theirs.get(name))}"
            )
