"""The commands of the README and the guides: what they name is there, and takes what it is given.

Runs are checked up to the work itself: flags, configuration, division among 8 devices, and whom a
process would join.
"""

import importlib.util
import inspect
from pathlib import Path
import re
import shlex

from absl import flags
import jax
import pytest

import dhp_jax as dhp
from dhp_jax import config as dhp_config
from dhp_jax.config import fields as config_fields
from dhp_jax.distributed.mesh import axis_sizes, check_divisible
from dhp_jax.pipeline import command

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCED = re.compile(r"^```(?:\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
COMMAND = re.compile(r"(?:^|[\s\"])(?:\.venv/bin/)?(python|make|dhp-\w+) ([^\"\n]*)", re.MULTILINE)
GROUPS = "mesh|data|task|model|search|converge|baseline|checkpoint|budget|optimizer"
FIELD = re.compile(
    rf"(?:--)?(config\.[a-z_.]+[a-z_]|(?:{GROUPS})\.[a-z_]+)(=.*)?(?<!\.py)(?<!\.json)"
)
PATH = re.compile(r"(?:tests|benchmarks|docs|experiments|dhp_jax)/[a-z0-9_/]+\.(?:py|md)")
# Where the flags of a program are that it does not define itself.
SHARED = {"benchmarks": "benchmarks/record.py", "dhp_jax": "dhp_jax/cli.py"}


def pieces(text):
    """Blocks of code and code within lines, in which comments are left out and lines joined."""
    found = FENCED.findall(text) + INDENTED.findall(FENCED.sub("", text)) + INLINE.findall(text)
    return [re.sub(r"\s#.*", "", piece).replace("\\\n", " ") for piece in found]


def commands():
    """Each command once, with the page that it is on."""
    seen = set()
    for page in PAGES:
        for piece in pieces(page.read_text()):
            for program, rest in COMMAND.findall(piece):
                words = (program, *shlex.split(rest.strip()))
                if words not in seen and not {"pip", "venv"} & set(words):
                    seen.add(words)
                    yield pytest.param(words, id=f"{page.stem}: {' '.join(words)}")


@pytest.fixture(scope="module")
def main():
    path = ROOT / "experiments/main.py"
    spec = importlib.util.spec_from_file_location("experiments_main", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_of_the_documentation_is_accepted(main, monkeypatch, words):
    program, *arguments = words
    monkeypatch.chdir(ROOT)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program == "dhp-train" or arguments[0] == "experiments/main.py":
        if not any(name in " ".join(arguments) for name in ("NAME", "noise.py")):
            accept(main, words if program == "dhp-train" else arguments, monkeypatch)
    else:
        source = module_file(words)
        passed = [word for word in arguments if word.startswith("--config")]  # to a run
        if passed:
            accept(main, ["experiments/main.py", *passed], monkeypatch)
        flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        flags -= {word.partition("=")[0] for word in passed}
        shared = ROOT / SHARED[source.relative_to(ROOT).parts[0]]
        assert flags <= set(re.findall(r"\"(--[\w-]+)\"", source.read_text() + shared.read_text()))


def module_file(words):
    """The file that `python FILE ...`, `python -m MODULE ...` or `dhp-NAME ...` runs."""
    program, first, *rest = words
    if program == "python" and first != "-m":
        return ROOT / first
    name = rest[0] if program == "python" else program.replace("-", "_jax.")
    module = ROOT / name.replace(".", "/")
    return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")


def accept(main, arguments, monkeypatch):
    """Raises unless a run begins as the command says, up to the data."""
    options = command.parse(arguments, main.define)
    dhp_config.check(options.config)
    sizes = axis_sizes(options.config.mesh.data, options.config.mesh.model, devices=8)
    check_divisible(options.config.batch_size, sizes[0])
    joined = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *given, **limits: joined.append(given)
    )
    command.join_others(options)
    several = options.distributed or options.coordinator is not None
    expected = (options.coordinator, options.processes, options.process)
    assert joined == ([expected] if several else [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_fields_that_a_page_names_are_there(page):
    text = page.read_text()
    for path in PATH.findall(" ".join(pieces(text))):
        assert (ROOT / path).is_file() or path in NEW, path
    configs = [dhp_config.default(task) for task in config_fields.TASK_FIELDS]
    for piece in INLINE.findall(text):
        if field := FIELD.fullmatch(piece):
            parts = field[1].removeprefix("config.").split(".")
            argument = parts[0] == "model" and any(
                parts[-1] in inspect.signature(family.__init__).parameters
                for family in dhp.models.FAMILIES.values()
            )
            assert argument or any(has(config, parts) for config in configs), piece


# What a guide tells to write.
NEW = {"dhp_jax/models/wide_resnet.py"}


def has(config, parts):
    """Whether a configuration has a field; those of `model` are the network's arguments."""
    for part in parts:
        if part not in config:
            return False
        config = config[part]
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page):
    text = FENCED.sub("", page.read_text())
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


def test_a_wrong_command_is_found(main, monkeypatch):
    monkeypatch.chdir(ROOT)
    base = ["experiments/main.py", "--config=experiments/configs/resnet56.py"]
    for wrong in ("--config.mesh.dat=2", "--config.mesh.data=3", "--config.target=2", "--hosts=2"):
        with pytest.raises((ValueError, flags.Error)):
            accept(main, [*base, wrong], monkeypatch)
