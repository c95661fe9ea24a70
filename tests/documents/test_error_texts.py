"""No error's text decides what the program does: errors have attributes for that."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SOURCES = sorted([*(ROOT / "dhp_jax").rglob("*.py"), *(ROOT / "experiments").glob("*.py")])

# Errors of other libraries that tell by their text alone what has happened.
FOREIGN = {
    ("dhp_jax/data/stream.py", "_told"),  # Grain, of a process that died
    ("dhp_jax/export/__init__.py", "_reason"),  # JAX, of a converter; it adds advice, no more
    ("dhp_jax/train/checkpoints.py", "_is_damage"),  # TensorStore, of a file that is there
}

HANDLER = """
def f():
    try:
        g()
    except ValueError as error:
        {}
"""

LOOKS = {"startswith", "endswith", "partition", "rpartition", "removeprefix", "removesuffix"}
LOOKS |= {"find", "rfind", "index", "rindex", "count", "replace"}


def _is_text(node: ast.expr, errors: set[str], texts: set[str]) -> bool:
    """Whether an expression is the text of an error, or a part of it."""
    if isinstance(node, ast.Name):
        return node.id in texts
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        told = node.func.id in ("str", "repr") and len(node.args) == 1
        return told and isinstance(node.args[0], ast.Name) and node.args[0].id in errors
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _is_text(node.func.value, errors, texts)
    if isinstance(node, ast.Subscript):
        return _is_text(node.value, errors, texts)
    if isinstance(node, ast.Attribute) and node.attr == "args":
        return isinstance(node.value, ast.Name) and node.value.id in errors
    if isinstance(node, ast.JoinedStr):
        values = [v.value for v in node.values if isinstance(v, ast.FormattedValue)]
        return any(isinstance(value, ast.Name) and value.id in errors for value in values)
    return False


def _errors(function: ast.AST) -> set[str]:
    """Names of errors: those that are caught, and arguments annotated as one."""
    caught = {n.name for n in ast.walk(function) if isinstance(n, ast.ExceptHandler) and n.name}
    given = {
        argument.arg
        for argument in ast.walk(function)
        if isinstance(argument, ast.arg)
        and isinstance(argument.annotation, ast.Name)
        and argument.annotation.id.endswith(("Error", "Exception"))
    }
    return caught | given


def looks(source: str) -> list[tuple[str, int]]:
    """Functions, with lines, that look at what the text of an error says."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        errors, texts = _errors(function), set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and _is_text(node.value, errors, texts):
                texts |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        for node in ast.walk(function):
            looked = []
            if isinstance(node, ast.Compare):
                looked = [node.left, *node.comparators]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if isinstance(node.func.value, ast.Name) and node.func.value.id == "re":
                    looked = node.args
                elif node.func.attr in LOOKS or (node.func.attr == "split" and node.args):
                    looked = [node.func.value]
            if any(_is_text(each, errors, texts) for each in looked):
                found.append((function.name, node.lineno))
    return found


def test_no_text_of_an_error_decides_what_happens():
    found = [
        f"{name}:{line}: {function}"
        for path in SOURCES
        for name in [path.relative_to(ROOT).as_posix()]
        for function, line in looks(path.read_text())
        if (name, function) not in FOREIGN
    ]
    assert not found, "give the error an attribute, see dhp_jax/errors.py"


@pytest.mark.parametrize(
    "handled",
    [
        "return 'the test' in str(error)",
        "return str(error).startswith('flops:')",
        "field, _, what = str(error).partition(': ')",
        "told = str(error)\n        return told.removeprefix('data.')",
        "return error.args[0] == 'flops'",
        "return re.match('flops', str(error))",
        "return f'{error}'.split(': ')[0]",
        "return str(error).splitlines()[0].endswith('.')",
    ],
)
def test_a_look_at_the_text_of_an_error_is_found(handled):
    assert [name for name, _ in looks(HANDLER.format(handled))] == ["f"]


@pytest.mark.parametrize(
    "handled",
    [
        "return error.field == 'flops'",
        "return error.field.startswith('data.')",
        "print(' '.join(str(error).split()))",
        "raise ValueError(f'model: {error}') from error",
        "return str(error).splitlines()[0]",
    ],
)
def test_an_attribute_and_a_line_for_people_are_none(handled):
    assert not looks(HANDLER.format(handled))
