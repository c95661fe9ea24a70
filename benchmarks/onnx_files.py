"""How fast ONNX files are in onnxruntime, run in turn; the first is what others are compared with.

    python benchmarks/onnx_files.py runs/digits_resnet20-baseline/model.onnx \
        runs/digits_resnet20/model.onnx

Needs the extra `onnx`, and files that `dhp-export` wrote.
"""

import argparse
from collections.abc import Callable, Sequence
import json
from pathlib import Path

import numpy as np
from record import positive, publish, table_of, with_quartiles

from dhp_jax.budgets.timing import quartiles, time_in_turn

SPINNING = "Threads do not spin between passes, so that no session slows the others down."
NOTE = (
    "Median of passes that run in turn, quartiles in parentheses; those of the speed-up are of the "
    f"pairs. {SPINNING}"
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("files", type=Path, nargs="+")
    arguments.add_argument("--batches", type=positive, nargs="+", default=[1, 64])
    arguments.add_argument("--rounds", type=positive, default=101, help="passes that count")
    arguments.add_argument("--out", type=Path, help="folder for onnx_files.json and .md")
    options = arguments.parse_args()
    for file in options.files:
        if not file.is_file():
            arguments.error(f"files: expected ONNX files, got {str(file)!r}, which is none")
    if options.rounds < 2:
        arguments.error(f"--rounds: expected at least 2, got {options.rounds}")
    import onnxruntime

    version = onnxruntime.__version__
    try:
        rows = [row for n in options.batches for row in measure(options.files, n, options.rounds)]
    except ValueError as error:
        arguments.error(str(error))
    note = f"onnxruntime {version} on the CPU. {NOTE}"
    publish(options.out, "onnx_files", "Speed of ONNX files", note, rows, as_table(rows))


def measure(files: Sequence[Path], batch: int, rounds: int) -> list[dict]:
    """A row for each file."""
    passes = {str(file): forward(file, batch, shape_of(file)) for file in files}
    seconds = time_in_turn(passes, rounds)
    first = seconds[str(files[0])]
    return [
        {
            "file": name,
            "batch": batch,
            "ms": quartiles([1e3 * s for s in times]),
            "speedup": quartiles([a / b for a, b in zip(first, times, strict=True)]),
        }
        for name, times in seconds.items()
    ]


def session(file: Path):
    """A session of onnxruntime on the CPU."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])


def shape_of(file: Path) -> list[int]:
    """The shape of one input that the network of a file was made for."""
    notes = session(file).get_modelmeta().custom_metadata_map
    if "input_shape" not in notes:
        raise ValueError(f"files: expected what dhp_jax.export wrote; {file} tells no input_shape")
    return json.loads(notes["input_shape"])


def forward(file: Path, batch: int, input_shape: Sequence[int]) -> Callable[[], None]:
    """A function that runs the network of a file over a batch."""
    opened = session(file)
    (taken,) = opened.get_inputs()
    x = np.full((batch, *input_shape), 0.5, np.float32)
    return lambda: opened.run(None, {taken.name: x})


def as_table(rows: list[dict]) -> str:
    cells = [
        (
            row["file"],
            row["batch"],
            with_quartiles(row["ms"], ".3f"),
            with_quartiles(row["speedup"], ".2f"),
        )
        for row in rows
    ]
    return table_of(("file", ">batch", ">ms", ">speed-up"), cells)


if __name__ == "__main__":
    main()
