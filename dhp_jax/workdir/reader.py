"""Reads the directory of a run, finished or not."""

from collections.abc import Mapping
from dataclasses import dataclass
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from flax import nnx

from dhp_jax.artifact import reading
from dhp_jax.budgets.counted import counted_limits, search_limits
from dhp_jax.config.methods import METHODS, Method
from dhp_jax.core.cost import MEASURES, Cost
from dhp_jax.core.latent import latents
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.surgery import prune
from dhp_jax.errors import FieldError
from dhp_jax.models import registry
from dhp_jax.pruned.relatent import with_latents
from dhp_jax.tracing.counts import measure_cost
from dhp_jax.workdir import metrics as workdir_metrics
from dhp_jax.workdir import target_dirs
from dhp_jax.workdir.identity import COMMANDS, CONFIG

logger = logging.getLogger(__name__)
SUMMARY = "summary.json"
PICTURES = "pictures"
NETWORKS = ("search", "pruned", "model")

IN_SUMMARY = {  # what every summary has
    **dict.fromkeys(("method", "data", "hardware"), str),
    **dict.fromkeys(("task", "model", "phases", "versions"), Mapping),
    **{
        f"{cost}.{name}": int | float
        for cost in ("flops", "params")
        for name in ("before", "after", "ratio")
    },
    "seconds": int | float,
}


@dataclass(frozen=True)
class Result:
    """What the directory of a run holds.

    Attributes:
      workdir: its directory.
      config: its configuration.
      records: of training.
      notes: of each network saved, by its folder.
      search: the network of latents at the end of the search, if there is one.
      trained: the network after the last epoch; until that is there, the one just after pruning.
      before: cost of the unpruned network, if any network is there.
      after: cost of `trained`.
      summary: the content of `summary.json`, if it is there and not damaged.
      commands: the command lines that started or continued it, each once.
    """

    workdir: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    notes: dict[str, dict[str, Any]]
    search: nnx.Module | None
    trained: nnx.Module | None
    before: Cost | None
    after: Cost | None
    summary: dict[str, Any] | None
    commands: list[str]

    @property
    def finished(self) -> bool:
        """Whether the network after the last epoch is there."""
        return "model" in self.notes

    @property
    def method(self) -> Method:
        """The method of its configuration."""
        return METHODS[self.config["method"]]

    @property
    def pruned(self) -> bool:
        """Whether its smaller network is there."""
        return self.method.prunes and self.after is not None

    @property
    def origin(self) -> dict[str, Any] | None:
        """The run that it started from, if there is one; see `source_run.Source`."""
        return self.notes.get("pruned", {}).get("origin")

    @property
    def asked(self) -> dict[str, float]:
        """The shares at which its search ends; see `budgets.counted.search_limits`."""
        return search_limits(self.config.get("budget", {}), self.config["target"])

    @property
    def budgets(self) -> dict[str, dict[str, Any]]:
        """Every budget of a pruned network: asked for, predicted, and reached.

        FLOPs, params and activations are shares. They are predicted from the survivors, and
        counted in the pruned network. For latency the share of the FLOPs is the prediction, and
        `time` is measured; see `budgets.chosen.Chosen`.
        """
        noted = self.notes.get("pruned", {}).get("budget")
        if not noted or not self.pruned:
            return {}
        budget = self.config.get("budget", {})  # a run of before there were budgets
        asked = budget | counted_limits(budget, self.config["target"])
        predicted, found = noted["predicted"], {}
        for name in MEASURES:
            counted = getattr(self.after, name) / getattr(self.before, name)
            row = {"asked": asked.get(name), "predicted": predicted[name], "counted": counted}
            found[name] = row
        if "time" in noted:
            row = {"asked": asked.get("latency"), "predicted": predicted["flops"]}
            found["latency"] = row | {"batch": asked.get("batch") or 1, **noted["time"]}
        return {name: row for name, row in found.items() if row["asked"] is not None}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input of its networks, `(h, w, c)`."""
        return tuple(next(iter(self.notes.values()))["input_shape"])

    def unpruned(self) -> nnx.Module:
        """The network with nothing pruned, for measuring its latency; its weights mean nothing."""
        return prune(_whole(self))

    def with_latents(self) -> nnx.Module:
        """The network of latents; without a search its weights and latents mean nothing."""
        model = _whole(self)
        if latents(model):
            return model
        least = self.config["search"]["min_channels"]
        return with_latents(model, self.input_shape, min_channels=least)


def _whole(result: Result) -> nnx.Module:
    """The unpruned network of a run, of latents where it searched."""
    if result.search is not None:
        return result.search
    made = architecture_of(result.trained)
    return registry.build(made.family, rngs=nnx.Rngs(0), **made.arguments)


def read(workdir: str | os.PathLike) -> Result:
    """Reads a run; a `ValueError` if the folder is none's, or one of its files is damaged."""
    workdir = Path(workdir)
    config = configuration(workdir)
    names = _current(workdir)
    notes = {name: reading.read_description(workdir / name)["notes"] for name in names}
    networks = {name: reading.load(workdir / name) for name in names}
    records = workdir_metrics.read(workdir / workdir_metrics.RECORDS)
    shape = tuple(notes[names[0]]["input_shape"]) if names else ()
    trained = networks.get("model", networks.get("pruned"))
    return Result(
        workdir=workdir,
        config=config,
        records=[r for r in records if r["phase"] != "converge" or "pruned" in names],
        notes=notes,
        search=networks.get("search"),
        trained=trained,
        before=_cost_before(networks[names[0]], shape) if names else None,
        after=None if trained is None else measure_cost(trained, shape),
        summary=_summary(workdir / SUMMARY, notes.get("model")),
        commands=_lines(workdir / COMMANDS),
    )


def _current(workdir: Path) -> list[str]:
    """The networks of a run but those that are made again, as after a search that has gone on."""
    found: dict[str, dict[str, Any]] = {}
    for name in NETWORKS:
        if reading.exists(workdir / name):
            described = reading.read_description(workdir / name)
            before = list(found.values())[-1:]
            if any(described["notes"].get("made_from", d["sha256"]) != d["sha256"] for d in before):
                break
            found[name] = described
    return list(found)


def _cost_before(model: nnx.Module, input_shape: tuple[int, ...]) -> Cost:
    """The cost of the network that a network was pruned from."""
    made = architecture_of(model)
    return measure_cost(registry.build_abstract(made.family, **made.arguments), input_shape)


def configuration(workdir: str | os.PathLike) -> dict[str, Any]:
    """The configuration of a run; a `ValueError` if there is none."""
    path = Path(workdir) / CONFIG
    if not path.is_file():
        raise ValueError(
            f"run: expected the directory of a run, which has a {CONFIG}; got {str(workdir)!r}"
            + target_dirs.hint(workdir)
        )
    config = _read_json(path)
    kinds = {"method": str, "target": int | float}
    kinds |= dict.fromkeys(("task", "model", "data", "search"), Mapping)
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind):
            raise ValueError(f"run: {path} is no configuration of a run: it has no {name!r}")
    if config["method"] not in METHODS:
        raise FieldError.unknown("run", config["method"], METHODS, f"{path}: method: ")
    return config


def is_complete(progress: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a phase has come as far as its fields in a configuration say, or to its budget."""
    ended = progress["steps"] >= (settings.get("max_steps") or math.inf)
    return ended or progress["met_budget"] or progress["epochs"] >= settings.get("epochs", 0)


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a run, from which tables and pages are made; all that they need is in it."""
    summary = _read_json(path)
    for place, kind in IN_SUMMARY.items():
        _require(path, summary, place, kind)
    if summary["method"] not in METHODS:
        raise FieldError.unknown("run", summary["method"], METHODS, f"{path}: method: ")
    metric = "error" if summary["task"].get("name") == "classification" else "psnr"
    for which in ("last", "best"):
        _require(path, summary, f"test.{which}.{metric}", int | float)
    for phase in [*summary["phases"], METHODS[summary["method"]].phases[-1]]:
        for name in ("epochs", "steps", "seconds", "met_budget", "best_epoch"):
            _require(path, summary, f"phases.{phase}.{name}", int | float)
    return summary


def _require(path: Path, summary: Mapping[str, Any], place: str, kind: Any) -> None:
    """Raises unless a summary has a value of a type at a place such as "flops.ratio"."""
    value = summary
    for name in place.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, kind):
        raise ValueError(f"run: {path} is no summary of a run: it has no {place!r}")


def _summary(path: Path, notes: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The summary of a run, if it is of the network with these notes; it can be made again."""
    try:
        summary = read_summary(path) if path.is_file() else None
    except ValueError as error:  # as of a disk that was full
        logger.warning("%s; left out", error)
        return None
    if not summary or not notes:
        return None
    ended, *phases = ({**p, "seconds": 0} for p in (notes["phase"], *summary["phases"].values()))
    return summary if ended in phases else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"run: {path}: expected a JSON object; {error}") from error


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []
