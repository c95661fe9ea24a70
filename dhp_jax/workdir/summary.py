"""The summary of a run: its errors, costs and times in numbers."""

from collections.abc import Mapping, Sequence
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from dhp_jax.activity import doing
from dhp_jax.artifact.reading import read_description
from dhp_jax.budgets.latency import clock
from dhp_jax.budgets.layer_table import layer_changes
from dhp_jax.budgets.other_widths import time_other_widths
from dhp_jax.budgets.timing import hardware, measure_latency, quartiles
from dhp_jax.config.methods import METHODS
from dhp_jax.tracing.counts import measure_cost
from dhp_jax.workdir.reader import SUMMARY, Result, read_summary
from dhp_jax.workdir.source_run import needs_source, source_folder
from dhp_jax.workdir.target_dirs import is_size

PACKAGES = ("dhp_jax", "jax", "jaxlib", "flax", "optax", "numpy")


@doing("timing the networks")
def latency(result: Result, *, again: bool = False) -> dict[str, Any]:
    """Times of the forward pass of a finished run's network, and of the unpruned one.

    Args:
      result: the run.
      again: whether to measure them even if the summary has the times of these networks.

    Returns:
      Under `batches` a row for one input and one for the batch size of the configuration. A row has
      quartiles of the milliseconds, and of the speed-up over pairs of passes.
    """
    names = [name for name in ("search", "model") if name in result.notes]
    of = [read_description(result.workdir / name)["sha256"] for name in names]
    known = (result.summary or {}).get("latency")
    if known and known["of"] == of and not again:
        return known
    networks = {"unpruned": result.trained}
    if result.pruned:
        networks = {"unpruned": result.unpruned(), "pruned": result.trained}
    rows = [
        _timed(networks, result.input_shape, batch)
        for batch in sorted({1, result.config["batch_size"]})
    ]
    for row in rows:
        if "speedup" in row and row["speedup"]["high"] < 1:
            row["other_widths"] = _other_widths(result, row["batch"])
    return {
        "batches": rows,
        "input_shape": list(result.input_shape),
        "hardware": hardware(),
        "of": of,
    }


def _timed(networks: Mapping[str, Any], shape: Sequence[int], batch: int) -> dict[str, Any]:
    times = measure_latency(networks, shape, batch)
    before, after = times["unpruned"], times.get("pruned")
    row = {"batch": batch, "rounds": len(before)}
    if after is None:
        return row | {"after_ms": quartiles(before)}
    speedup = [whole / small for whole, small in zip(before, after, strict=True)]
    row |= {"before_ms": quartiles(before), "after_ms": quartiles(after)}
    return row | {"speedup": quartiles(speedup)}


def _other_widths(result: Result, batch: int) -> dict[str, dict[str, float]]:
    """Where the network of a run is slower: times of others, as shares of the unpruned one's.

    They have other `multiple_of` and no more FLOPs. Weights do not matter for time.
    """
    model, shape = result.with_latents(), result.input_shape
    share = {"flops": result.after.flops / result.before.flops}
    tried = time_other_widths(
        model,
        measure_cost(model, shape),
        clock(model, shape, batch),
        result.config.get("multiple_of", 1),
        lambda number: share,
    )
    return {str(number): found.ratio for number, found in tried.items()}


def beside(workdir: str | os.PathLike, config: Mapping[str, Any]) -> str:
    """The directory where the run of the unpruned network is expected if none is given.

    Args:
      workdir: directory of a run, such as `runs/NAME` or `runs/NAME-METHOD`, or of one of its
        sizes, such as `runs/NAME/0.5`.
      config: its configuration.

    Returns:
      The run's source if that is a baseline and exists; otherwise `runs/NAME-baseline`.
    """
    method = config["method"]
    begun = METHODS[method].source
    if needs_source(config) and not METHODS[begun].prunes and source_folder(config).is_dir():
        return str(source_folder(config))
    whole = Path(os.path.abspath(workdir))
    own, of_all = (
        f"{str(folder).removesuffix(f'-{method}')}-baseline" for folder in (whole, whole.parent)
    )
    found = of_all if is_size(whole) and not Path(own).is_dir() else own
    return found if os.path.isabs(workdir) else os.path.relpath(found)


def read_baseline(directory: str | os.PathLike) -> dict[str, Any]:
    """The summary of a finished run of the unpruned network.

    Raises:
      ValueError: there is none, or it is not complete.
    """
    path = Path(directory) / SUMMARY
    summary = read_summary(path) if path.is_file() else {}
    if summary.get("method") != "baseline":
        raise ValueError(
            "baseline: expected the directory of a finished run with config.method=baseline; "
            f"got {str(directory)!r}"
        )
    return summary


def summarize(
    result: Result,
    unpruned: Mapping[str, Any] | None = None,
    times: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The outcome of a run in numbers: metrics on the test data, cost, times.

    Args:
      result: the run.
      unpruned: the summary of a run with `method="baseline"`.
      times: from `latency`.
    """
    notes, trained = result.notes, result.notes["model"]["phase"]
    test = {"last": trained["last"], "best": trained["best"]}
    if notes["model"]["without_network"]:
        test["without_network"] = notes["model"]["without_network"]
    phases = {}
    if "search" in notes:
        test["after_search"] = notes["search"]["phase"]["last"]
        phases["search"] = notes["search"]["phase"]
    if result.method.prunes:
        if not result.method.fresh:
            test["after_pruning"] = notes["pruned"]["test"]
            others = ("given", "renewed")
            test |= {name: notes["pruned"][name] for name in others if name in notes["pruned"]}
        test["unpruned"] = unpruned and unpruned["test"]["last"]
    phases[result.method.phases[-1]] = trained
    return {
        "method": result.config["method"],
        "task": result.config["task"],
        "model": result.config["model"],
        "data": result.config["data"]["name"],
        "checksums": checksums(notes["model"]),
        "seed": result.config["seed"],
        "target": result.config["target"] if result.method.prunes else None,
        "origin": result.origin,
        "test": test,
        "test_examples": notes["model"].get("test_examples"),
        "validation": _validation(notes["model"]),
        "flops": _change(result.before.flops, result.after.flops),
        "params": _change(result.before.params, result.after.params),
        "layers": [row._asdict() for row in layer_changes(result.before, result.after)],
        "budgets": result.budgets,
        "latency": times,
        "phases": phases,
        "unpruned_epochs": unpruned and unpruned["phases"]["baseline"]["epochs"],
        "seconds": sum(phase["seconds"] for phase in phases.values()),
        # Where it was trained, which may be elsewhere; earlier runs have not noted it.
        "hardware": notes["model"].get("hardware") or hardware(),
        "versions": notes["model"].get("versions") or versions(),
    }


def checksums(notes: Mapping[str, Any]) -> dict[str, int] | None:
    """Those of the data of a network's run, by split; `None` where they were not noted."""
    return notes.get("run", {}).get("data", {}).get("checksums")


def _validation(notes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Metrics on the examples that were held out, and their number; `None` if there are none."""
    found = notes["phase"].get("validation")
    return found and {"examples": notes["validation_examples"], **found}


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _change(before: int, after: int) -> dict[str, Any]:
    return {"before": before, "after": after, "ratio": after / before}
