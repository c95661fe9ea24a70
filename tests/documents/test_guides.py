"""The guides in docs/ hold what they say: their code runs, and prints what they show.

The Python blocks of a guide run one after another in one fresh namespace, in a folder of their own.
What a block prints is compared with the block right after it, if that is one of output:
`output` is what is printed, but for what `...` stands for; in `text`, numbers may be others, but
those of 1,000 and more, which count something, by a tenth at most. A guide names what it needs
besides the library, and says if it takes long, in comments that are not shown:
`<!-- needs: sklearn -->` (names of modules), `<!-- onnx -->` and `<!-- slow -->`. A block that
takes long, and that no other needs, has `<!-- slow block -->` before it: all blocks run in the slow
tests, the others in both.
"""

import contextlib
import doctest
import importlib.util
import io
from pathlib import Path
import re
from unittest import mock

import pytest

import dhp_jax as dhp

GUIDES = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(
    r"^(?P<slow><!-- slow block -->\n)?"
    r"```python\n(?P<code>.*?)^```\n(\n```(?P<kind>output|text)\n(?P<shown>.*?)^```\n)?",
    flags=re.DOTALL | re.MULTILINE,
)
SLOW_BLOCK = "<!-- slow block -->"
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
LARGE, NEAR = 1000, 0.1


def guides():
    """Those that have code, marked by what they say of themselves."""
    for path in sorted(GUIDES.glob("*.md")):
        text = path.read_text()
        if BLOCK.search(text):
            marks = [name for name in ("onnx", "slow") if f"<!-- {name} -->" in text]
            marks = [getattr(pytest.mark, name) for name in marks]
            yield pytest.param(path, False, id=path.stem, marks=marks)
            if SLOW_BLOCK in text:
                yield pytest.param(path, True, id=f"{path.stem}, whole", marks=pytest.mark.slow)


def run(path, folder, whole=True):
    """Runs the blocks of a guide in a folder, all or those that are quick; compares the prints."""
    text, names = path.read_text(), {"__name__": "guide"}
    for needed in re.findall(r"<!-- needs: (.*?) -->", text):
        for module in needed.split():
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{path.name} needs {module}, not installed")
    families = mock.patch.dict(dhp.models.FAMILIES)  # a guide adds one
    with contextlib.chdir(folder), families:
        for block in BLOCK.finditer(text):
            if block["slow"] and not whole:
                continue
            line = text[: block.start("code")].count("\n")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * line + block["code"], str(path), "exec"), names)
            if block["kind"]:
                compare(printed.getvalue(), block["shown"], numbers=block["kind"] == "output")


def compare(printed, shown, numbers):
    """Raises unless what was printed is what is shown; small numbers as well if asked for."""
    if not numbers:
        found = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=False)
        for got, expected in ([float(text.replace(",", "")) for text in pair] for pair in found):
            assert max(got, expected) < LARGE or abs(got - expected) <= NEAR * expected, printed
        printed, shown = NUMBER.sub("#", printed), NUMBER.sub("#", shown)
    assert doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS), printed


@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize(("path", "whole"), list(guides()))
def test_the_code_of_a_guide_runs_and_prints_what_is_shown(path, whole, tmp_path):
    run(path, tmp_path, whole)


def test_a_guide_that_is_wrong_is_found_with_its_line(tmp_path):
    guide = tmp_path / "guide.md"
    guide.write_text("# Title\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run(guide, tmp_path)
    assert caught.traceback[-1].lineno + 1 == 10


@pytest.mark.parametrize(
    ("kind", "shown", "right"),
    [
        ("output", "x 1.5 of y\n", True),
        ("output", "x ... y\n", True),
        ("output", "x 1.4 of y\n", False),
        ("output", "x 1.5 of y\nz\n", False),
        ("output", "", False),
        ("text", "x 22 of y\n", True),
        ("text", "x 22 of z\n", False),
        ("text", "x 2,001.5 of y\n", False),
    ],
)
def test_what_a_guide_shows_is_what_is_printed(tmp_path, kind, shown, right):
    guide = tmp_path / "guide.md"
    guide.write_text(f'```python\nprint("x 1.5 of y")\n```\n\n```{kind}\n{shown}```\n')
    with contextlib.nullcontext() if right else pytest.raises(AssertionError, match="x "):
        run(guide, tmp_path)


def test_a_guide_without_what_it_needs_is_skipped(tmp_path):
    guide = tmp_path / "guide.md"
    guide.write_text("<!-- needs: no_such_module -->\n```python\nraise ValueError\n```\n")
    with pytest.raises(pytest.skip.Exception, match=r"^guide.md needs no_such_module, not instal"):
        run(guide, tmp_path)
