"""The source of a run: a finished run whose weights or channels it starts from."""

from collections.abc import Mapping
from dataclasses import dataclass
import json
import os
from pathlib import Path
from typing import Any

from flax import nnx
from ml_collections import ConfigDict
import numpy as np

from dhp_jax.artifact.reading import exists, read_description, verify
from dhp_jax.config.fields import absent_values
from dhp_jax.config.methods import METHODS
from dhp_jax.core.provenance import architecture_of
from dhp_jax.errors import ConfigError, shown
from dhp_jax.workdir.identity import MAY_CHANGE, MAY_MOVE, as_json, flatten, read_data_checksums
from dhp_jax.workdir.reader import configuration, is_complete
from dhp_jax.workdir.target_dirs import is_size

SAME = ("task.", "model.", "data.")  # fields in which both runs agree
RECIPE = ("model.weights", "task.label_smoothing", "data.cutout", "data.mixup")  # but for these

SAME_BUDGET = (  # these too where the source's channels are taken
    "target",
    "budget.",
    "multiple_of",
    "search.min_channels",
    "search.keep",
)

MAY_DIFFER = ("min_channels", "dtype")  # arguments that do not change a network's channels


@dataclass(frozen=True)
class Source:
    """A network of a finished run: its folder, and what that says of it.

    `origin` are JSON values that tell how it was trained: `run`, `method`, `phase`, `epochs`,
    `steps`. `checksums` are those of the data that its run was trained and tested on.
    """

    path: Path
    description: Mapping[str, Any]
    origin: Mapping[str, Any]
    checksums: Mapping[str, int]

    @property
    def sha256(self) -> str:
        """The digest of its arrays."""
        return self.description["sha256"]

    @property
    def budget(self) -> dict[str, Any]:
        """JSON values stored when its survivors were chosen; see `Chosen.notes`."""
        return self.description["notes"]["budget"]

    def masks(self, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """A mask of its survivors for each latent, by the sizes of the latents."""
        kept = self.description["survivors"]
        return {name: np.isin(np.arange(size), kept[name]) for name, size in sizes.items()}


def needs_source(config: Mapping[str, Any]) -> bool:
    """Whether a run starts from another, and not from weights that `config.model` names."""
    return METHODS[config["method"]].source is not None and config.get("source") is not None


def source_folder(config: Mapping[str, Any]) -> Path:
    """The directory of the run that one with this configuration starts from."""
    return Path(config["source"]).expanduser()


def read(config: ConfigDict) -> Source:
    """The source of a run whose method needs one.

    It must be finished, and of the same network, task, data and budget.
    """
    folder, needed = source_folder(config), METHODS[config.method].sources
    expected = "expected the directory of a finished run with config.method="
    expected += f"{' or '.join(needed)}, for config.method={config.method}"
    try:
        there = configuration(folder)
        if there["method"] not in needed:
            raise ConfigError(
                "config.source",
                detail=f"{expected}; that in {str(folder)!r} has config.method={there['method']}",
            )
        source = _find_source(folder, there)
    except ConfigError:
        raise
    except (KeyError, OSError, TypeError, ValueError) as error:
        told = f"got {str(folder)!r} ({error})"
        raise ConfigError("config.source", detail=f"{expected}; {told}") from error
    if source is None:
        raise ConfigError(
            "config.source", detail=f"{expected}; that in {str(folder)!r} is not finished"
        )
    _check_same(config, there, folder)
    return source


def find_digest(config: ConfigDict, workdir: str | os.PathLike) -> str:
    """The digest of the network that a run starts from; an error as of `read` if that is needed.

    A run reads its source once, to make its pruned network. While that network is whole and
    `config.source` has the same value, the source may change or be deleted.
    """
    return _find_taken(config, workdir) or read(config).sha256


def check(
    config: ConfigDict,
    workdir: str | os.PathLike,
    checksums: Mapping[str, int],
    model: nnx.Module,
) -> None:
    """Raises if a run needs its source, and the source has other data or another network.

    `model` is the run's network, unpruned; may be abstract.
    """
    if _find_taken(config, workdir):
        return
    source = read(config)
    if source.checksums != dict(checksums):
        raise ConfigError(
            "config.source",
            detail=f"expected a run on the same images; that in {str(config.source)!r} has "
            "seen others (their names, sizes or statistics differ)",
        )
    _check_network(source, model)


def check_digest(source: Source, began: str, workdir: str | os.PathLike) -> None:
    """Raises unless a source is the network, by its digest, that a run began with."""
    if source.sha256 != began:
        raise ConfigError(
            "config.source",
            detail=f"expected the network that the run in {workdir} began with; "
            f"{str(source.path)!r} is another one; give another --workdir",
        )


def _find_taken(config: ConfigDict, workdir: str | os.PathLike) -> str | None:
    """The digest of the source's network, if the run has made its own from it."""
    path = Path(workdir) / ("search" if METHODS[config.method].searches else "pruned")
    try:
        same = configuration(workdir).get("source") == str(config.source)
        return verify(path)["notes"].get("made_from") if same else None
    except ValueError:  # none yet, or a damaged one, which is told or made again
        return None


def _check_network(source: Source, model: nnx.Module) -> None:
    """Raises unless the network of a source is that of the run, whatever configurations say."""
    ours, made = architecture_of(model), source.description
    pairs = {"family": (ours.family, made["family"])}
    for name in sorted({*ours.arguments, *made["arguments"]} - {*MAY_DIFFER}):
        pairs[name] = (ours.arguments.get(name), made["arguments"].get(name))
    for name, (expected, got) in pairs.items():
        if json.dumps(expected) != json.dumps(got):  # of which tuples are lists
            raise ConfigError(
                "config.source",
                detail=f"expected a network of {name}={shown(expected)}, as here; that in "
                f"{str(source.path)!r} has {shown(got)}",
            )


def _find_source(folder: Path, there: Mapping[str, Any]) -> Source | None:
    """The network of a run; `None` if it is not finished."""
    method = there["method"]
    phase, trained = METHODS[method].phases[0], METHODS[method].phases[-1]
    if not all(exists(folder / name) for name in ("model", METHODS[method].network)):
        return None
    if not is_complete(verify(folder / "model")["notes"]["phase"], there[trained]):
        return None
    of_phase = "search" if phase == "search" else "model"
    reached = read_description(folder / of_phase)["notes"]["phase"]
    name = "/".join(folder.absolute().parts[-1 - is_size(folder) :])  # "resnet20/0.5" for a size
    origin = {"run": name, "method": method, "phase": phase}
    origin |= {name: reached[name] for name in ("epochs", "steps")}
    path = folder / METHODS[method].network
    return Source(path, verify(path), origin, read_data_checksums(folder))


def _check_same(config: ConfigDict, there: Mapping[str, Any], folder: Path) -> None:
    """Raises unless both runs agree in all that makes their networks comparable."""
    ours, theirs = flatten(as_json(config)), flatten(there)
    theirs = absent_values(theirs.get("task.name")) | theirs
    same = SAME if METHODS[config.method].chooses else SAME + SAME_BUDGET
    for name in sorted({**ours, **theirs}):
        matters = name.startswith(same) and name not in (*MAY_CHANGE, *MAY_MOVE, *RECIPE)
        if matters and ours.get(name) != theirs.get(name):
            raise ConfigError(
                "config.source",
                detail=f"expected a run with config.{name}={shown(ours.get(name))}, as here; that "
                f"in {str(folder)!r} has {shown(theirs.get(name))}",
            )
