"""The networks of a run on disk: saved with notes, and found again if they are whole."""

import contextlib
import dataclasses
import logging
from typing import Any

from flax import nnx
from PIL import Image

from dhp_jax.activity import doing
from dhp_jax.artifact import reading, writing
from dhp_jax.artifact.description import ArtifactError
from dhp_jax.budgets.timing import hardware
from dhp_jax.errors import ConfigError
from dhp_jax.pipeline.preparation import Run
from dhp_jax.tasks.task import Data
from dhp_jax.train.checkpoints import Checkpoints, known_notes
from dhp_jax.train.phase import Outcome, Progress
from dhp_jax.workdir import reader, source_run
from dhp_jax.workdir.identity import CHECKPOINTS, CONFIG, as_json
from dhp_jax.workdir.summary import versions

logger = logging.getLogger(__name__)
PICTURES = 4  # test examples shown in the report, where a task has something to show


@doing("saving the network")
def save(
    run: Run, name: str, model: nnx.Module, progress: Progress | None = None, **notes: Any
) -> str:
    """Saves a network with what a reader of the file wants to know; returns its digest."""
    path = run.workdir / name
    if not (run.workdir / CONFIG).is_file():  # or the folder would be made anew, as nobody's run
        raise FileNotFoundError(f"{run.workdir} was deleted")
    phase = None if progress is None else dataclasses.asdict(progress)
    if phase is not None and not phase["validation"]:
        del phase["validation"]
    noted = {**run.setup.notes, **notes, "run": _asked(run)}
    noted |= {"hardware": hardware(), "versions": versions()}
    writing.save(path, model, input_shape=run.setup.input_shape, phase=phase, **noted)
    return reading.read_description(path)["sha256"]


def keep_teacher(run: Run, source: str) -> None:
    """Copies the network that a run starts and learns from, for that may change or go.

    Raises:
      ConfigError: as `source_run.read`; or the source's digest is not that of the network that the
        run began with.
    """
    kept = find(run, "teacher")
    if kept and kept["notes"]["made_from"] == source:
        return
    if not source_run.needs_source(run.config):
        save(run, "teacher", run.blueprint.ordinary(), made_from=source)
        return
    there = source_run.read(run.config)
    source_run.check_digest(there, source, run.workdir)
    save(run, "teacher", reading.load(there.path), made_from=source)


@doing("saving the networks", "what makes pictures of test examples")
def save_trained(run: Run, outcome: Outcome, test: Data, source: str) -> None:
    """Saves the network after its best epoch, then the last: the run's end."""
    task = run.setup.task
    for name, images in task.pictures(outcome.model, test, PICTURES):
        folder = run.workdir / reader.PICTURES / name
        folder.mkdir(parents=True, exist_ok=True)
        for what, image in images.items():
            Image.fromarray(image.squeeze()).save(folder / f"{what}.png")
    save(run, "best", outcome.best_model, outcome.progress, made_from=source)
    save(
        run,
        "model",
        outcome.model,
        outcome.progress,
        made_from=source,
        without_network=task.without_network(test),
    )


def _asked(run: Run) -> dict[str, Any]:
    """What was asked of the run, by the names of the configuration.

    It tells where a network comes from when the run's directory is not at hand.
    """
    fields = ("method", "seed")
    if run.method.chooses:
        fields += ("target", "budget", "multiple_of")
    config = as_json(run.config)
    data = {"name": config["data"]["name"], "checksums": dict(run.setup.checksums)}
    return {name: config[name] for name in fields} | {"data": data}


@doing("checking the networks that are there")
def find(run: Run, name: str) -> dict[str, Any] | None:
    """What a network on disk says of itself, if it is there and whole."""
    path = run.workdir / name
    if not reading.exists(path):
        return None
    try:
        return reading.verify(path)
    except ArtifactError as error:
        logger.warning("%s; it is made again", error)
        return None


def find_trained(run: Run, phase: str, source: str = "") -> dict[str, Any] | None:
    """What the network at the end of a phase says of itself, if the phase is done.

    A search leaves one network, the last phase two. Records of the phase that are gone come back
    from its last checkpoint.
    """
    names = ("search",) if phase == "search" else ("best", "model")
    for name in names:
        found = find(run, name)
        if not found or found["notes"].get("made_from", "") != source:
            return None
        if not _is_done(run, phase, found["notes"]["phase"], source):
            return None
    _mend_records(run, phase, found, source)
    return found


def _is_done(run: Run, phase: str, progress: dict[str, Any], source: str) -> bool:
    """Whether a network was trained for as long as asked; if not, there must be a checkpoint."""
    if reader.is_complete(progress, run.config[phase]):
        return True
    if not open_checkpoints(run, phase, source).steps():
        gone = "for the checkpoints from which more could follow are gone"
        most = f"at most {progress['epochs']}, {gone}"
        raise ConfigError(f"config.{phase}.epochs", most, run.config[phase].epochs)
    return False


def _mend_records(run: Run, phase: str, found: dict[str, Any], source: str) -> None:
    """Puts back records of a phase that has ended, where its last checkpoint has them."""
    end = found["notes"]["phase"]
    with contextlib.closing(open_checkpoints(run, phase, source)) as checkpoints:
        for step in checkpoints.steps()[:1]:
            if notes := known_notes(checkpoints, step):
                reached = notes["progress"]  # its last step may be saved before it is tested
                same = all(reached[name] == end[name] for name in ("steps", "epochs"))
                if notes["source"] == source and same:
                    run.journal.mend(phase, notes["records"])


def open_checkpoints(run: Run, phase: str, source: str) -> Checkpoints:
    """The checkpoints of a phase that started from the network with a digest."""
    return Checkpoints(
        run.workdir / CHECKPOINTS / phase,
        source=source,
        keep=run.config.checkpoint.keep,
        seconds=run.config.checkpoint.seconds,
    )
