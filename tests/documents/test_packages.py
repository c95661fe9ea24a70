"""The library as a package: what importing it loads, what a name is, and what a wheel contains."""

import ast
import configparser
import email
import fnmatch
import importlib
import os
from pathlib import Path
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
from types import ModuleType

import pytest
from terminal import Terminal

import dhp_jax
from dhp_jax.config.from_file import find_config, read_config

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "dhp_jax"

SLOW_TO_IMPORT = ["matplotlib", "tensorflow_datasets", "grain", "orbax", "skimage", "requests"]


def test_importing_the_library_loads_nothing_that_few_need():
    """Nor do commands that draw nothing wait for what draws."""
    program = "import sys, dhp_jax.{}\nprint(*sys.modules)"
    program = "\n".join(map(program.format, ("report", "pipeline.flags")))
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    report, flags = (set(line.split()) for line in ended.stdout.splitlines())
    assert not report & {"scipy.stats", "tensorboardX", "torch"}
    loaded = {name.partition(".")[0] for name in flags}
    assert {"dhp_jax", "jax", "flax", "optax"} <= loaded
    assert not loaded & {*SLOW_TO_IMPORT}


ONLY_THE_LIBRARY = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import numpy as np
from flax import nnx
import dhp_jax as dhp
from dhp_jax.export import export
model = dhp.models.build("resnet", depth=8, width=0.25, rngs=nnx.Rngs(0))
small = dhp.prune_to(model, (8, 8, 3), flops=0.8)
dhp.save("small", small, input_shape=(8, 8, 3))
export(dhp.load("small"), "folded", (8, 8, 3), format="safetensors")
sys.argv = ["dhp-train", "--config=resnet20"]
from dhp_jax import commands
commands.train()
"""


def requirements(group):
    """The packages that setup.cfg lists, as names to import."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    section, _, option = group.rpartition(".")
    lines = settings[section][option].splitlines()
    names = [re.match(r"[\w.-]*", line)[0] for line in lines]
    other = {"pillow": "PIL", "scikit-image": "skimage"}
    brought = ("", "absl-py", "orbax-checkpoint")  # the last two by flax and optax
    return [other.get(name, name.replace("-", "_")) for name in names if name not in brought]


def test_the_library_works_without_the_packages_of_experiments(tmp_path):
    names = requirements("options.extras_require.experiments")
    assert {"PIL", "ml_collections", "grain"} <= set(names)
    ended = subprocess.run(
        [sys.executable, "-c", ONLY_THE_LIBRARY.format(names=set(names))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    error = ended.stderr.splitlines()[-1]
    assert re.fullmatch(
        r'error: \w+ is not installed; run: pip install "dhp_jax\[experiments\]"', error
    )
    assert (tmp_path / "folded/model.json").is_file()


def test_an_editable_install_is_a_path_that_type_checkers_follow():
    """Without this `package_dir`, setuptools installs a hook of imports, which they cannot run."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["options"]["package_dir"].split() == ["=", "."]
    assert (LIBRARY / "py.typed").is_file()


def test_console_commands_are_functions_that_are_there():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = settings["options.entry_points"]["console_scripts"].split("\n")
    commands = dict(line.split(" = ") for line in lines if line)
    assert commands.keys() == {"dhp-train", "dhp-export", "dhp-predict", "dhp-report"}
    for target in commands.values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert module == settings["options"]["py_modules"], "so that a wheel has it"


@pytest.mark.parametrize(
    ("raised", "last", "code"),
    [
        ("ImportError('reached')", "ImportError: reached", 1),
        ("KeyboardInterrupt", "interrupted", 130),
    ],
)
def test_a_console_command_says_a_word_before_it_imports_the_library(tmp_path, raised, last, code):
    """On a terminal, here one in which the library cannot be imported, or Ctrl-C comes first."""
    (tmp_path / "dhp_jax").mkdir()
    (tmp_path / "dhp_jax/__init__.py").touch()
    (tmp_path / "dhp_jax/commands.py").write_text(f"raise {raised}")
    shutil.copy(ROOT / "dhp_commands.py", tmp_path)
    terminal = Terminal(tmp_path / "record.txt", tmp_path, {"PATH": os.environ["PATH"]})
    shown = terminal.type(f"{sys.executable} -c 'import dhp_commands; dhp_commands.train()'")
    assert shown.lines[0] == "loading    dhp_jax"
    assert (shown.lines[-1], shown.code) == (last, code)


@pytest.mark.parametrize(
    ("command", "says"),
    [("-m dhp_jax.export", True), ("-m other", False), ("-c 'import dhp_jax'", False)],
)
def test_a_module_that_is_run_says_a_word_before_the_library_is_imported(tmp_path, command, says):
    """On a terminal, here one in which the library cannot be imported."""
    (tmp_path / "dhp_jax").mkdir()
    shutil.copy(LIBRARY / "__init__.py", tmp_path / "dhp_jax")
    (tmp_path / "dhp_jax/models.py").write_text("raise ImportError('reached')")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/__init__.py").write_text("import dhp_jax")
    terminal = Terminal(tmp_path / "record.txt", tmp_path, {"PATH": os.environ["PATH"]})
    shown = terminal.type(f"{sys.executable} {command}")
    assert (shown.lines[0] == "loading    dhp_jax") is says
    assert (shown.lines[-1], shown.code) == ("ImportError: reached", 1)


def test_a_configuration_of_the_paper_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config("resnet56").model.depth == 56
    assert Path(find_config("resnet56")).read_text().startswith('"""ResNet-56')
    (tmp_path / "resnet56").write_text("mine")
    assert find_config("resnet56") == "resnet56"
    with pytest.raises(ValueError, match=r"or one of densenet40, .*resnet20.*; got 'resnet57'"):
        read_config("resnet57")


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


SOURCE = "https://example.org/dhp_jax"
TARGETS = re.compile(r"\]\(([^)]*)\)|(?:src|href)=\"([^\"]*)\"")


def metadata(folder, source):
    """What a build of the tree says of itself, with or without an address of the tree."""
    for name in ("setup.py", "setup.cfg", "dhp_commands.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(LIBRARY, folder / "dhp_jax", ignore=shutil.ignore_patterns("__pycache__"))
    settings = (folder / "setup.cfg").read_text()
    assert "\n    Source =" not in settings, "the test sets an address of its own"
    if source:
        settings = settings.replace("project_urls =", f"project_urls =\n    Source = {source}/")
    (folder / "setup.cfg").write_text(settings)
    program = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    with tarfile.open(folder / ended.stdout.split()[-1]) as made:
        (info,) = (name for name in made.getnames() if re.fullmatch(r"[^/]*/PKG-INFO", name))
        return email.message_from_bytes(made.extractfile(info).read())


@pytest.mark.parametrize("source", ["", SOURCE])
def test_a_package_index_shows_no_link_that_leads_nowhere(tmp_path, source):
    pytest.importorskip("setuptools")
    found = metadata(tmp_path, source)
    assert found["Description-Content-Type"] == "text/markdown"
    assert found["Author"]
    urls = dict(line.split(", ") for line in found.get_all("Project-URL"))
    assert urls["Paper"] == "https://arxiv.org/abs/2003.13683"
    assert urls.get("Source", "").rstrip("/") == source
    text, readme = found.get_payload(decode=True).decode(), (ROOT / "README.md").read_text()
    targets = [first or second for first, second in TARGETS.findall(text)]
    assert all(re.match("https://", target) for target in targets), targets
    ours = [target for target in targets if target.startswith(SOURCE)]
    relative = [a or b for a, b in TARGETS.findall(readme) if not (a or b).startswith("http")]
    assert len(relative) > 20
    assert [re.sub(r".*/(blob|raw)/main/", "", target) for target in ours] == relative * bool(
        source
    )
    for target in ours:
        assert ("/raw/" in target) == target.endswith(".png")
    recipe = re.search(r"^\t@(grep .*\\\n.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    warned = subprocess.run(["sh", "-c", recipe], cwd=tmp_path, capture_output=True, text=True)
    assert ("add 'Source = ADDRESS'" in warned.stdout) == (not source)
    code = r"```.*?```|^    .*?$"
    assert re.findall(code, text, re.S | re.M) == re.findall(code, readme, re.S | re.M)
