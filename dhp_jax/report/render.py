"""Pages from templates: one file each that needs no other; all that is filled in is escaped."""

import functools
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dhp_jax.budgets.layer_table import LABELS, percent
from dhp_jax.report.format import duration, with_quartiles

STYLE_SHEET = (resources.files("dhp_jax.report") / "style.css").read_text()


class Cell(NamedTuple):
    """A cell of a table: its text, and what belongs to it, shown smaller, below it.

    `share` is drawn as a short bar; `colour` is the number of that of a square before the text.
    """

    text: str
    more: str = ""
    share: float | None = None
    colour: int | None = None


class Table(NamedTuple):
    """A table; cells are text or `Cell`.

    `total` is a last row of all others, which stays in sight; `note` stands below the table.
    """

    header: list[str]
    rows: list[list[Any]]
    total: list[Any] | None = None
    note: str = ""


def render(template: str, **content: Any) -> str:
    """A page from the file of a template and the names that it uses."""
    return templates().get_template(template).render(style=Markup(STYLE_SHEET), **content)


@functools.cache
def templates() -> Environment:
    """The templates of this package; a name that one needs and is not given is an error."""
    environment = Environment(
        loader=PackageLoader("dhp_jax.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "quartiles": with_quartiles, "duration": duration}
    environment.filters["svg"] = lambda chart: Markup(chart.svg())
    environment.globals["LABELS"] = LABELS
    return environment
