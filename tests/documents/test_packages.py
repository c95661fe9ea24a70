"""The library as a package: what importing it loads, what a name is, and what a wheel contains."""

import configparser
import fnmatch
import importlib
from pathlib import Path
import pkgutil
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
