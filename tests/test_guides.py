"""The Python code of the guides in docs/ runs as printed.

The blocks of a guide run one after another in one fresh namespace, in a folder of their own. A
guide names what it needs besides the library, and says if it takes long, in comments that are not
shown: `<!-- needs: jax2onnx onnxruntime -->` (names of modules) and `<!-- slow -->`.
"""

import importlib.util
from pathlib import Path
import re

import pytest

GUIDES = Path(__file__).parents[1] / "docs"


def blocks(text):
    """The Python blocks of a guide."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def guides():
    """Those that have code, marked by what they say of themselves."""
    for path in sorted(GUIDES.glob("*.md")):
        text = path.read_text()
        if blocks(text):
            marks = [pytest.mark.slow] if "<!-- slow -->" in text else []
            yield pytest.param(path, id=path.stem, marks=marks)


def run(path, folder):
    """Runs the blocks of a guide in a folder; returns the names that they have bound."""
    text, names = path.read_text(), {"__name__": "guide"}
    for needed in re.findall(r"<!-- needs: (.*?) -->", text):
        for module in needed.split():
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{path.name} needs {module}, not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for code in blocks(text):
            line = text[: text.index(code)].count("\n")
            exec(compile("\n" * line + code, str(path), "exec"), names)
    return names


@pytest.mark.parametrize("path", list(guides()))
def test_the_code_of_a_guide_runs(path, tmp_path):
    run(path, tmp_path)


def test_a_guide_that_is_wrong_is_found_with_its_line(tmp_path):
    guide = tmp_path / "guide.md"
    guide.write_text("# Title\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run(guide, tmp_path)
    assert caught.traceback[-1].lineno + 1 == 10


def test_a_guide_without_what_it_needs_is_skipped(tmp_path):
    guide = tmp_path / "guide.md"
    guide.write_text("<!-- needs: no_such_module -->\n```python\nraise ValueError\n```\n")
    with pytest.raises(pytest.skip.Exception, match=r"^guide.md needs no_such_module, not instal"):
        run(guide, tmp_path)
