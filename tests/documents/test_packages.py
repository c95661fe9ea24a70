"""The library as a package: what importing it loads, what a name is, and what a wheel contains."""

import ast
import configparser
import fnmatch
import importlib
from pathlib import Path
import pkgutil
import re
import subprocess
import sys
from types import ModuleType

import pytest

import dhp_jax

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "dhp_jax"

SLOW_TO_IMPORT = ["matplotlib", "tensorflow_datasets", "grain", "orbax", "skimage", "requests"]


@pytest.mark.parametrize("line", ["import dhp_jax", "from dhp_jax import prox_l1"])
def test_importing_the_library_loads_nothing_that_few_need(line):
    program = f"{line}\nimport sys\nprint(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in ended.stdout.split()}
    assert {"dhp_jax", "jax", "flax", "optax"} <= loaded
    assert not loaded & {*SLOW_TO_IMPORT}


def modules(package=dhp_jax):
    """Every package of the library with the names of its modules."""
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    yield package, names
    for name in names:
        inner = importlib.import_module(f"{package.__name__}.{name}")
        if hasattr(inner, "__path__"):
            yield from modules(inner)


def test_no_name_of_a_package_hides_a_module():
    found = list(modules())
    assert len(found) > 15
    for package, names in found:
        for name in names:
            if name != "__main__":
                importlib.import_module(f"{package.__name__}.{name}")
                assert isinstance(getattr(package, name), ModuleType), f"{package.__name__}.{name}"


def test_a_wheel_contains_every_file_of_the_library():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["options"]["packages"] == "find:"
    (pattern,) = settings["options.packages.find"]["include"].split()
    assert fnmatch.fnmatch("dhp_jax.core", pattern)
    data = {}
    if settings.has_section("options.package_data"):
        data = dict(settings["options.package_data"])
    for path in LIBRARY.rglob("*"):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        folder = path.parent
        while not (folder / "__init__.py").is_file():
            assert path.suffix != ".py", f"{path}: no __init__.py beside it"
            folder = folder.parent
        package = ".".join(folder.relative_to(ROOT).parts)
        patterns = [text.strip() for text in data.get(package, "").replace("\n", ",").split(",")]
        name = path.relative_to(folder).as_posix()
        kept = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        assert path.suffix == ".py" or kept, f"{package}: {name} is in no package_data of setup.cfg"


def trees():
    """Every module of the library with its lines and its syntax."""
    for path in sorted(LIBRARY.rglob("*.py")):
        text = path.read_text()
        yield path.relative_to(LIBRARY), text.splitlines(), ast.parse(text)


def test_a_module_is_read_in_one_sitting():
    """Families are one file each, however long their description is."""
    lengths = {path: len(lines) for path, lines, _ in trees() if path.parts[0] != "models"}
    assert {path: n for path, n in lengths.items() if n > 400} == {}
    core = sum(n for path, n in lengths.items() if path.parts[0] == "core")
    assert 1000 < core < 2100


def test_a_class_has_at_most_12_methods():
    for path, _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                assert len(methods) <= 12, f"{path}: {node.name}"


def test_no_module_imports_a_private_name_of_another():
    for path, _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dhp_jax"):
                private = [a.name for a in node.names if re.match(r"_[a-z]", a.name)]
                assert not private, f"{path}: {node.module}: {private}"
