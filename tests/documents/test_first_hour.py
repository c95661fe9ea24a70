"""The first hour of a newcomer, typed into a terminal of 80 columns as README and guides say it.

From `pip install` of the built wheel in an empty environment to ONNX files of a run and of a
network of one's own. `make first-hour` leaves the record in build/first_hour.txt. It needs a
package index, and takes some minutes.
"""

import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from terminal import Terminal

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RUNS = (ROOT / "docs/runs.md").read_text()
OTHER = ("build", "runs", ".*", "*.egg-info", "__pycache__")
WIDEST = 80
SILENT_S = 5.0  # on a busy machine, without a word of what is done
HEADER = r"network |data |budget |device |directory |next | {11}"
TO_COPY = re.compile("  (dhp-|python )")  # commands, which a break would spoil


def wheel(folder):
    """The wheel of the tree as it is, built in a copy of it."""
    shutil.copytree(ROOT, folder / "clone", symlinks=True, ignore=shutil.ignore_patterns(*OTHER))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, "./clone"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (built,) = folder.glob("dhp_jax-*.whl")
    return built


def typed_for(wheel):
    """Commands of the documents, with the wheel in place of a clone."""
    installs = re.findall(r"^    (pip install -e .*?)(?: +#.*)?$", README, re.MULTILINE)
    assert len(installs) == 2
    extras = "[demo,onnx]"
    assert all(f"`[{extra}]`" in README for extra in ("demo", "onnx"))
    installs = [line.replace("-e ", "").replace(".", str(wheel), 1) for line in installs]
    (quick,) = re.findall(
        r"^    (python \S+ --config=\S+digits_resnet20.py (?:.*\\\n)*.*)$", RUNS, re.M
    )
    same = r"`dhp-train --config=resnet56` is\n`python (\S+ --config=\S+)resnet56.py`"
    spelt = re.search(same, README)[1]
    quick = re.sub(r"\s*\\\n\s*", " ", quick).replace(
        f"python {spelt}digits_resnet20.py", "dhp-train --config=digits_resnet20"
    )
    return [*installs, f'pip install "{wheel}{extras}"'], quick


def environment(folder):
    """What a shell has in a fresh account in which the environment is activated."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    home = folder / "home"
    home.mkdir()
    path = f"{folder / 'env/bin'}:/usr/local/bin:/usr/bin:/bin"
    return {"PATH": path, "HOME": str(home), "TERM": "xterm", "LANG": "C.UTF-8", **kept}


@pytest.mark.slow
def test_the_first_hour_from_pip_install_to_an_onnx_file_of_ones_own(tmp_path):
    built = wheel(tmp_path)
    with zipfile.ZipFile(built) as archive:
        (told,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert re.findall(r"\]\((?!https://)", archive.read(told).decode()) == []
    installs, quick = typed_for(built)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    record = Path(os.environ.get("FIRST_HOUR", tmp_path / "first_hour.txt"))
    work = tmp_path / "work"
    work.mkdir()
    terminal = Terminal(record, work, environment(tmp_path), columns=WIDEST)

    def typed(command):
        """Types a command that works, and prints no line that is wider than the terminal."""
        shown = terminal.type(command)
        assert shown.code == 0, shown.text
        wide = [line for line in shown.lines if len(line) > WIDEST and not TO_COPY.match(line)]
        assert command.startswith("pip") or not wide, wide
        if command.startswith("dhp-"):
            assert shown.lines[0] == "loading    dhp_jax"
            silent = [
                f"{after - before:.1f} s after {line!r}"
                for line, before, after in zip(
                    shown.lines, shown.seconds, shown.seconds[1:], strict=False
                )
                if after - before > SILENT_S and re.match(HEADER, line)
            ]
            assert not silent, silent
        return shown.text

    # The library alone: a network of one's own, in half the FLOPs.
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    start = next(number for number, block in enumerate(blocks) if "class Net" in block)
    (work / "net.py").write_text(blocks[start])
    typed(installs[0])
    flops = re.search(r"FLOPs +([\d,]+) -> ([\d,]+)", typed("python net.py"))
    before, after = (int(number.replace(",", "")) for number in flops.groups())
    assert 0.45 * before < after <= 0.5 * before
    assert (work / "small/model.json").is_file()

    # With the extras: a run, its page, and its network in another format.
    for line in installs[1:]:
        typed(line)
    assert "  search.max_steps: " in typed("dhp-train --help")
    typed(f"{quick} --workdir=runs/quick")
    run = work / "runs/quick"
    for name in (
        "model/model.json",
        "best/model.json",
        "report.html",
        "layers.md",
        "metrics.jsonl",
    ):
        assert (run / name).is_file(), name
    assert str(Path("runs/quick/report.html")) in typed("dhp-report runs/quick")
    assert "largest difference to the network: " in typed("dhp-export runs/quick --format=onnx")

    # An ONNX file of the network of one's own, as the next lines of README make it.
    (work / "net.py").write_text("\n".join(blocks[start : start + 2]))
    typed("python net.py")
    for file, shape in (("small.onnx", (3, 10)), ("runs/quick/model.onnx", (3, 10))):
        code = (
            "import numpy, onnxruntime\n"
            f"session = onnxruntime.InferenceSession({file!r})\n"
            "x = numpy.ones((3, 8, 8, 1), numpy.float32)\n"
            f"assert session.run(['output'], {{'images': x}})[0].shape == {shape}\n"
        )
        subprocess.run([tmp_path / "env/bin/python", "-c", code], cwd=work, check=True)
