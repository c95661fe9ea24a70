"""The shell of a page: one file that needs no other, for screens wide and narrow, and for paper."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dhp_jax.report.markup import Markup, element

# Nothing is fetched, whatever the page holds: pictures are in it, there are no scripts.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


STYLE = """
:root { color-scheme: light dark; --ink: #1b2026; --soft: #59636e; --paper: #fff; --card: #f5f7f9;
  --edge: #dde2e8; --before: #ccd4de; --after: #1f6fb2; --warn: #fdf3e4; --warn-edge: #e0a64a;
  --more: #0004;
  --c0: #1f6fb2; --c1: #d9603b; --c2: #2a9d6f; --c3: #8a5bc4; --c4: #b8860b; --c5: #c2457f;
  --c6: #4c8ea6; --c7: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa5b1; --paper: #14181d;
  --card: #1d232a; --edge: #313a44; --before: #404b58; --after: #5aa9e6; --warn: #33291a;
  --more: #fff6;
  --c0: #5aa9e6; --c1: #f08a65; --c2: #56c596; --c3: #b592e6; --c4: #dcae3c; --c5: #ec7fb0;
  --c6: #7fbdd4; --c7: #a3acb8; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .5rem;
  border-top: 1px solid var(--edge); }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; }
figure h3 { margin-top: 0; }
p { margin: .5rem 0; max-width: 46rem; }
p, li { overflow-wrap: anywhere; }
.lead { font-size: 1.15rem; max-width: none; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
a { color: var(--after); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; margin: 1rem 0; }
.cards { display: grid; gap: .75rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: .5rem;
  padding: .75rem 1rem; }
.card b { display: block; font-size: 1.6rem; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.card span { display: block; }
.notice { background: var(--warn); border-left: 4px solid var(--warn-edge); padding: .5rem 1rem;
  border-radius: .25rem; margin: 1rem 0; }
.notice p { margin: 0; } .notice ul { margin: .25rem 0 0; padding-left: 1.25rem; }
.charts { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0 0 1rem; min-width: 0; }
.scroll { overflow-x: auto; background:  /* a shadow where there is more to the right */
  linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--more), transparent) right / .75rem 100% no-repeat scroll; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, "DejaVu Sans", sans-serif; }
svg text { fill: var(--soft); } svg .small { font-size: 11px; }
.charts svg { max-width: 27.5rem; }
svg .rule text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
svg .over text { stroke: none; fill: var(--ink); }
svg .axis, svg .strong { fill: var(--ink); }
.grid { stroke: var(--edge); stroke-width: 1; }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
circle { fill: currentColor; }
.spread { stroke: currentColor; stroke-width: 2; opacity: .55; }
.rule line { stroke: var(--soft); stroke-dasharray: 4 3; }
.over line { stroke: var(--ink); }
.area polygon { fill: var(--c0); }
.before { fill: var(--before); } .after { fill: var(--after); }
i.before { background: var(--before); } i.after { background: var(--after); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .25rem 0; font-size: .875rem; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .4em; }
.swatch:not(.before, .after) { background: currentColor; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--edge); }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: .25rem; }
tr.total td { font-weight: 650; }
.aside { display: block; color: var(--soft); }
.long { max-height: 34rem; overflow: auto; border: 1px solid var(--edge); border-radius: .25rem; }
.long table { width: 100%; font-size: .8125rem; } .long td, .long th { padding: .25rem .4rem; }
 .long th { position: sticky; top: 0; background: var(--card); }
.meter { display: inline-block; width: 2.25rem; height: .55rem; margin-left: .5rem;
  background: var(--before); border-radius: 2px; overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--after); }
.crops { width: 100%; max-width: 50rem; table-layout: fixed; }
.crops td { padding: .15rem .3rem .15rem 0; border: 0; }
.crops th { padding: .15rem .3rem .15rem 0; text-align: left; white-space: normal;
  vertical-align: bottom; border: 0; }
.crops img { display: block; width: 100%; height: auto; image-rendering: pixelated; }
pre { background: var(--card); border: 1px solid var(--edge); border-radius: .35rem;
  padding: .75rem 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.45; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre.long { max-height: 24rem; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 30rem) { th, td { padding: .25rem .4rem; }
  .facts td:first-child, .facts th:first-child { position: sticky; left: 0; min-width: 7rem;
    max-width: 9rem; white-space: normal; overflow-wrap: anywhere; background: var(--paper); }
  .card { padding: .6rem .75rem; }
  .cards { grid-template-columns: 1fr 1fr; } .card b { font-size: 1.35rem; } }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --card: #f5f7f9;
    --edge: #ccc; --before: #ccd4de; --after: #1f6fb2; --warn: #fff; --c0: #1f6fb2; --c1: #d9603b;
    --c2: #2a9d6f; --c3: #8a5bc4; --c4: #b8860b; --c5: #c2457f; --c6: #4c8ea6; --c7: #6b7280; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } nav { display: none; }
  h2 { margin-top: 1.25rem; }
  .long { max-height: none; overflow: visible; border: 0; } .long th { position: static; }
  .scroll, pre { overflow: visible; }
  .scroll { background: none; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  svg { min-width: 0 !important; } #channels svg { max-height: 85mm; }
  table { font-size: 8pt; } th, td { padding: .15rem .4rem; }
  .crops { max-width: 150mm; } pre.long { columns: 3; max-height: none;
    font-size: 7.5pt; }
  h2, h3 { break-after: avoid; } figure, .card, .notice, tr { break-inside: avoid; }
  .charts { grid-template-columns: 1fr 1fr; } .cards { grid-template-columns: repeat(5, 1fr); }
  .card { padding: .4rem .6rem; } .card b { font-size: 14pt; } .soft { font-size: 8pt; } }
"""


@dataclass(frozen=True)
class Card:
    """One number of the answer: what it is, its value, and what to compare that with."""

    label: str
    value: str
    details: Sequence[str] = ()


def document(title: str, *body: Any) -> str:
    """A whole page."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    page = element("html", head, element("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def section(name: str, title: str, *content: Any) -> Markup:
    """A part of a page that links can lead to."""
    return element("section", element("h2", title), *content, id=name)


def cards(content: Sequence[Card]) -> Markup:
    """Numbers side by side."""
    shown = [
        element(
            "div",
            element("span", card.label, class_="soft"),
            element("b", card.value),
            *(element("span", detail, class_="soft") for detail in card.details),
            class_="card",
        )
        for card in content
    ]
    return element("div", *shown, class_="cards")


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    total: Sequence[Any] | None = None,
    long: bool = False,
) -> Markup:
    """A table that scrolls by itself where the screen is too narrow for it, or it is long."""
    body = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    if total is not None:
        body.append(element("tr", *(element("td", cell) for cell in total), class_="total"))
    head = element("thead", element("tr", *(element("th", name) for name in header)))
    whole = element("table", head, element("tbody", *body))
    return element("div", whole, class_="scroll long" if long else "scroll facts")


def notice(first: str, points: Sequence[str]) -> Markup | None:
    """What a reader must know before all else; nothing if there are no points."""
    if not points:
        return None
    items = element("ul", *(element("li", point) for point in points))
    return element("div", element("p", element("b", first)), items, class_="notice")


def meter(share: float) -> Markup:
    """A share as a short bar."""
    inner = element("i", style=f"width:{100 * min(share, 1):.0f}%")
    return element("span", inner, class_="meter")


def code(text: str, *, kind: str | None = None) -> Markup:
    """Text to copy."""
    return element("pre", element("code", text), class_=kind)
