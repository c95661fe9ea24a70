"""Configurations in files: Python with a function `get_config()`."""

import difflib
from pathlib import Path
import runpy
import traceback

from ml_collections import ConfigDict

SHIPPED = Path(__file__).parents[1] / "configs"  # a link to experiments/configs, files in a wheel
EXAMPLE = "experiments/configs/digits_resnet20.py"


def find_config(given: str) -> str:
    """The path of a configuration: the given one, or that of a name such as "resnet20"."""
    shipped = SHIPPED / f"{given}.py"
    return str(shipped) if not Path(given).exists() and shipped.is_file() else given


def read_config(given: str | None) -> ConfigDict:
    """The configuration of a file, whose path or name the command line gave; `None` if nothing.

    Raises:
      ValueError: there is no such file, it raises something, or it gives something else.
    """
    path = Path(find_config(given or ""))
    if not path.is_file():
        got = None if given is None else f"{given!r}, which is no file"
        names = sorted(file.stem for file in SHIPPED.glob("*.py"))
        near = difflib.get_close_matches(str(given), names, n=1)
        raise ValueError(
            f"--config: expected --config=FILE, such as {EXAMPLE}, or one of {', '.join(names)}; "
            f"got {got}" + "".join(f"; did you mean {name!r}?" for name in near)
        )
    try:
        module = runpy.run_path(str(path))
        config = module["get_config"]() if "get_config" in module else None
    except Exception as error:  # whatever somebody's file may raise
        what = " ".join(str(error.args[0] if error.args else error).split())
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f":{frame.lineno}" for frame in frames if frame.filename == str(path)]
        where = f"{path}{lines[-1] if lines else ''}"
        raise ValueError(f"--config: {where}: {type(error).__name__}: {what}") from error
    if "get_config" not in module:
        raise ValueError(f"--config: expected a file with a function get_config(); got {path}")
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"--config: {path}: expected get_config() to return a ConfigDict; got {config!r:.100}"
        )
    return config
