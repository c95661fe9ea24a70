"""All fields as text: the help of the command, and the guide docs/configuration.md.

After a change of the fields: `python -m dhp_jax.config.documentation > docs/configuration.md`
"""

from collections.abc import Iterator
import inspect
import textwrap
from typing import Any, NamedTuple

from dhp_jax.config.fields import (
    FIELDS,
    RECIPES,
    TASK_FIELDS,
    Field,
    Fields,
    fields_of,
    flat_fields,
)
from dhp_jax.models.registry import FAMILIES, task_of

FOLLOWING = ("num_classes", "channels", "scale", "min_channels", "dtype")  # from other fields
PAGE = """\
# Configuration

A configuration is a Python file with a function `get_config()`. It begins with the recipe of the
paper for a task, `dhp_jax.config.default("classification")`, `"super_resolution"` or
`"denoising"`, and changes what it needs. `--config.FIELD=VALUE` on the command line changes it
once more:

    python experiments/main.py --config=experiments/configs/resnet20.py --config.search.epochs=50

A wrong name or value ends the command with one line before any work. `--help` prints what is on
this page. Both are made from `config/fields.py`.
"""


class Row(NamedTuple):
    """A field for people: its full name, its type in Python, default, limits, and what it is.

    `default` is that of all tasks, with those of single tasks that differ.
    """

    name: str
    kind: str
    default: str
    limits: str
    text: str


def rows(fields: Fields, task: str | None = None) -> Iterator[Row]:
    """The fields of a table, with the defaults of a task or, if it is `None`, of all tasks."""
    for name, field in flat_fields(fields):
        yield Row(name, _kind(field), _default(name, field, task), str(field.rule), field.text)


def _kind(field: Field) -> str:
    kinds = {type(field.default), field.kind} - {type(None), None, object}
    (name,) = {kind.__name__ for kind in kinds}
    extra = " or str" * (field.kind is object) + " or None" * bool(field.rule.or_none)
    return name + extra


def _default(name: str, field: Field, task: str | None) -> str:
    if task is not None:
        return repr(RECIPES[task].get(name, field.default))
    tasks: dict[str, list[str]] = {}  # that have another default
    for task, recipe in RECIPES.items():
        if recipe.get(name, field.default) != field.default:
            tasks.setdefault(repr(recipe[name]), []).append(task)
    others = (f"; {value} in {' and '.join(found)}" for value, found in tasks.items())
    return repr(field.default) + "".join(others)


def sections() -> Iterator[tuple[str, list[Row]]]:
    """Titles, and the fields under each: those of any run, then those of each task."""
    yield "Of any run", list(rows(FIELDS))
    for task in TASK_FIELDS:
        fields = fields_of(task)
        yield f"Of {task}", list(rows({name: fields[name] for name in ("task", "data")}, task))


def families() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, task and arguments of each family, with defaults, but for those that follow."""
    for name, family in FAMILIES.items():
        taken = dict(inspect.signature(family.__init__).parameters)
        for argument in ("self", "rngs", *FOLLOWING):
            taken.pop(argument, None)
        yield name, task_of(name), {a: p.default for a, p in taken.items()}


def describe() -> str:
    """All fields for a terminal: what each is, then its type, default and limits."""
    lines = ["Fields of a configuration, such as --config.target=0.38"]
    for title, fields in sections():
        lines += ["", f"{title}:"]
        for row in fields:
            lines += [f"  {row.name}: {row.text}"]
            lines += [f"      {row.kind}, default {row.default}; {row.limits}"]
    lines += ["", "Arguments of networks, beside model.name; docs/networks.md:"]
    lines += [f"  {name}, for {task}: {_given(taken)}" for name, task, taken in families()]
    return "\n".join(map(_wrapped, lines))


def _wrapped(line: str) -> str:
    """A line within 80 columns; what follows a break is indented."""
    return textwrap.fill(
        line, 80, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
    )


def page() -> str:
    """All fields as Markdown, docs/configuration.md."""
    lines = [PAGE]
    for title, fields in sections():
        lines += [f"## {title}", "", "| field | type | default | limits | |", f"|{'---|' * 5}"]
        for row in fields:
            default = "; ".join(_code(part) for part in row.default.split("; "))
            cells = (f"`{row.name}`", row.kind, default, row.limits, row.text)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "## Arguments of networks",
        "",
        "`model` has the name of a family, and any of its arguments. [networks.md](networks.md)",
        f"tells what they are. {', '.join(f'`{name}`' for name in FOLLOWING)} follow from other",
        "fields and are not given.",
        "",
        "A name such as `networks:Net` is that of a function or class of your own, in a module",
        "that is installed or lies in this folder. It gets `rngs`, the rest of `model`, and of the",
        "above what it takes. For an ordinary network `embedding` is that of `dhp.with_latents`,",
        "unless it takes one itself ([any_network.md](any_network.md#search-with-latents)).",
        "`weights` is a folder that `dhp.save` or a run wrote, or a file of safetensors with the",
        "paths of arrays for names. It takes the place of `source`, where that is a baseline. A",
        "relative path starts at the current folder of the command. A run that goes on from there",
        "or elsewhere may be given another path, if the name and the arrays are the same.",
        "",
        "| `model.name` | task | arguments |",
        "|---|---|---|",
    ]
    lines += [f"| `{name}` | {task} | `{_given(taken)}` |" for name, task, taken in families()]
    return "\n".join(lines) + "\n"


def _code(default: str) -> str:
    value, of, task = default.partition(" in ")
    return f"`{value}`{of}{task}"


def _given(arguments: dict[str, Any]) -> str:
    empty = inspect.Parameter.empty
    return ", ".join(a if v is empty else f"{a}={v!r}" for a, v in arguments.items())


if __name__ == "__main__":
    print(page(), end="")
