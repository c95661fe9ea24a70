"""Every field of a configuration is told, with its type, default and limits: in one text."""

import ast
from pathlib import Path
import re

from ml_collections import ConfigDict
import pytest

from dhp_jax.config.documentation import describe, page
from dhp_jax.config.fields import TASK_FIELDS, default, fields_of, flat_fields
from dhp_jax.models import registry

PAGE = Path(__file__).parents[2] / "docs/configuration.md"


def flat(config, prefix=""):
    """The fields of a configuration and their values; `model` is one field."""
    for name in config:
        if isinstance(config[name], ConfigDict) and name != "model":
            yield from flat(config[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", config[name]


def test_the_page_is_what_the_fields_say():
    again = "run: python -m dhp_jax.config.documentation > docs/configuration.md"
    assert PAGE.read_text() == page(), again


def in_page(task):
    """Type, default, limits and text of each field of a task, as the page has them."""
    found = {}
    for section in page().split("\n## ")[1:]:
        title, _, table = section.partition("\n")
        if title in ("Of any run", f"Of {task}"):
            for line in re.findall(r"^\| `.*$", table, re.MULTILINE):
                name, *cells = line.strip("| ").split(" | ")
                found[name.strip("`")] = cells
    return found


@pytest.mark.parametrize("task", TASK_FIELDS)
def test_every_field_of_a_task_is_told_with_its_default(task):
    told, config = in_page(task), dict(flat(default(task)))
    assert told.keys() == config.keys()
    fields = dict(flat_fields(fields_of(task)))
    for name, (kind, defaults, limits, text) in told.items():
        value = config[name].to_dict() if name == "model" else config[name]
        of_task = re.search(rf"`([^`]*)` in [\w ]*\b{task}\b", defaults)
        assert ast.literal_eval(of_task[1] if of_task else defaults.split("`")[1]) == value
        assert type(value).__name__.replace("NoneType", "None") in kind.split(" or ")
        assert (limits, text) == (str(fields[name].rule), fields[name].text)


def test_help_tells_what_the_page_tells():
    text = describe()
    assert max(map(len, text.splitlines())) <= 80
    text = re.sub(r"\n {6}", " ", text)
    for task in TASK_FIELDS:
        for name, (kind, defaults, limits, what) in in_page(task).items():
            told = f"\n  {name}: {what} {kind}, default {defaults.replace('`', '')}; {limits}\n"
            assert told in text + "\n"


def test_every_family_is_told():
    assert set(registry.FAMILIES) == set(
        re.findall(r"^\| `(\w+)` \|", page().split("##")[-1], re.M)
    )
