"""HTML and SVG as text in which everything is escaped that is not markup already."""

import html
from typing import Any

VOID = ("br", "img", "link", "meta")  # elements of HTML that nothing can be in


class Markup(str):
    """Text that is markup, and is not escaped again."""


def element(tag: str, *content: Any, **attributes: Any) -> Markup:
    """An element of HTML or SVG.

    Args:
      tag: its name.
      *content: what is in it, escaped unless it is `Markup`; `None` is left out.
      **attributes: `class_` stands for `class`, `stroke_width` for `stroke-width`; numbers keep two
        digits after the point; `None` is left out.

    Example:
      >>> element("p", "1 < 2", element("b", "so"), class_="note")
      '<p class="note">1 &lt; 2<b>so</b></p>'
    """
    shown = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(_text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{shown}>" + ("" if tag in VOID else f"{joined(*content)}</{tag}>"))


def joined(*content: Any) -> Markup:
    """Content one after the other, escaped unless it is `Markup`; `None` is left out."""
    return Markup(
        "".join(
            item if isinstance(item, Markup) else html.escape(str(item))
            for item in content
            if item is not None
        )
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
