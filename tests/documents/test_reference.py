"""The API reference: every public name is in it, and its docstring has what its signature needs."""

import dataclasses
import inspect
from pathlib import Path
import pkgutil
import re

import pytest

import dhp_jax as dhp
from dhp_jax.models import registry
from dhp_jax.models import registry as models

REFERENCE = Path(__file__).parents[2] / "docs/reference"
PUBLIC = {f"dhp_jax.{name}": getattr(dhp, name) for name in dhp.__all__ if name != "models"}
PUBLIC |= {f"dhp_jax.models.{name}": getattr(models, name) for name in ("build", "build_abstract")}
PUBLIC |= {f"dhp_jax.models.{family.__name__}": family for family in registry.FAMILIES.values()}
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$", re.MULTILINE)
FAMILIES = set(registry.FAMILIES.values())


def needed(thing):
    """The sections that a docstring must have."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return set()
    example = set() if thing in FAMILIES else {"Example"}  # `build` has it
    if dataclasses.is_dataclass(thing):
        return {"Attributes"} | example
    function = vars(thing).get("__init__") if inspect.isclass(thing) else thing
    if function is None or getattr(thing, "_is_protocol", False):
        return example
    signature = inspect.signature(function)
    arguments = {"Args"} if set(signature.parameters) - {"self"} else set()
    returned = signature.return_annotation not in (None, inspect.Signature.empty)
    return arguments | ({"Returns"} if returned else set()) | example


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_has_the_sections_that_its_signature_needs(name):
    text = inspect.getdoc(PUBLIC[name])
    first, _, rest = text.partition("\n")
    assert first.endswith("."), "one line first"
    assert not rest or rest.startswith("\n")
    missing = needed(PUBLIC[name]) - set(SECTION.findall(text))
    assert not missing, name


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_tells_every_argument(name):
    thing = PUBLIC[name]
    if "Args" in needed(thing):
        parameters = inspect.signature(vars(thing)["__init__"] if inspect.isclass(thing) else thing)
        told = inspect.getdoc(thing).partition("Args:")[2]
        for parameter in set(parameters.parameters) - {"self"}:
            assert re.search(rf"^  [\w*, ]*\b{parameter}\b[\w*, ]*:", told, re.MULTILINE), parameter


DIRECTIVE = re.compile(r"^\.\. auto(\w+):: (\S+)(?:\n   :members: (.*))?$", re.MULTILINE)


def documented():
    """What the reference shows: directive, dotted name, and the names of its members."""
    for page in sorted(REFERENCE.glob("*.rst")):
        text = page.read_text()
        (module,) = re.findall(r"currentmodule:: (\S+)", text)[:1] or ["dhp_jax"]
        for kind, name, members in DIRECTIVE.findall(text):
            whole = name if kind == "module" or name.startswith("dhp_jax.") else f"{module}.{name}"
            yield pytest.param(whole, members.split(", ") if members else [], id=whole)


@pytest.mark.parametrize(("name", "members"), list(documented()))
def test_what_the_reference_shows_is_there_and_can_be_typeset(name, members):
    found = pkgutil.resolve_name(name)
    for text in map(inspect.getdoc, (found, *(getattr(found, member) for member in members))):
        prose = re.sub(r"``.*?``|`[^`]*`", "", text or "", flags=re.DOTALL)
        prose = re.sub(r"^ *(>>>|\.\.\.) .*$", "", prose, flags=re.MULTILINE)
        assert not re.search(r"\|\w[^|]*\|", prose), f"{name}: |x| outside of `code`"


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(path.read_text() for path in sorted(REFERENCE.glob("*.rst")))
    for name in PUBLIC:
        assert re.search(rf"\b{name.split('.')[-1]}\b", pages), name
