"""Tables of a network's layers before and after pruning: all of them, or what fits a terminal."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dhp_jax.core.cost import Cost, LayerCost

LABELS = {"flops": "FLOPs", "params": "params", "activations": "activations"}
LINES, COLUMNS = 20, 80  # of a table on a terminal, at most


class LayerRow(NamedTuple):
    """A layer in a table: its widths and costs before and after pruning, and the shares left."""

    layer: str
    inputs: str
    outputs: str
    flops: str
    flops_share: float | None
    params: str
    params_share: float | None


def percent(share: float) -> str:
    """A share for people: "49.98 %"."""
    return f"{100 * share:.2f} %"


def compact(count: int) -> str:
    """A large number for people, to three digits: "20.4 M"."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:#.3g} {unit}".replace(". ", " ")
    return str(count)


def change(old: int, new: int, arrow: str = " -> ") -> str:
    """A number before and after pruning: "2,048 -> 1,024"."""
    return f"{old:,}" if old == new else f"{old:,}{arrow}{new:,}"


def same_layers(before: Cost, after: Cost) -> bool:
    """Whether two networks call the same layers in the same order."""
    return [layer.path for layer in before.layers] == [layer.path for layer in after.layers]


def layer_rows(before: Cost, after: Cost, arrow: str = " -> ") -> list[LayerRow]:
    """A row for each layer, and one for all of them at the end."""

    def costs(old: Cost | LayerCost, new: Cost | LayerCost) -> list[Any]:
        pairs = (old.flops, new.flops), (old.params, new.params)
        return [cell for b, a in pairs for cell in (change(b, a, arrow), a / b if b else None)]

    rows = [
        LayerRow(
            b.path,
            change(b.inputs.full, a.inputs.full, arrow),
            change(b.outputs.full, a.outputs.full, arrow),
            *costs(b, a),
        )
        for b, a in zip(before.layers, after.layers, strict=True)
    ]
    return [*rows, LayerRow("total", "", "", *costs(before, after))]


def layer_table(before: Cost, after: Cost) -> str:
    """A Markdown table of every layer: channels, FLOPs and params, before and after pruning."""
    rows = [
        ["layer", "channels in", "channels out", "FLOPs", "", "params", ""],
        *(
            ["" if x is None else percent(x) if isinstance(x, float) else x for x in row]
            for row in layer_rows(before, after)
        ),
    ]
    lines = [f"| {line} |" for line in aligned(rows, " | ")]
    first, *others = ("-" * (max(map(len, column)) + 1) for column in zip(*rows, strict=True))
    ruler = f"|{first}-|" + "|".join(f"{dashes}:" for dashes in others) + "|"
    return "\n".join([lines[0], ruler, *lines[1:]]) + "\n"


class LayerChange(NamedTuple):
    """A layer by its path; output channels, FLOPs and params, each before and after pruning."""

    layer: str
    channels: Sequence[int]
    flops: Sequence[int]
    params: Sequence[int]


def layer_changes(before: Cost, after: Cost) -> list[LayerChange]:
    """What has become of each layer of a network, in the order of execution."""
    return [
        LayerChange(
            b.path, [b.outputs.full, a.outputs.full], [b.flops, a.flops], [b.params, a.params]
        )
        for b, a in zip(before.layers, after.layers, strict=True)
    ]


def short_layer_table(layers: Sequence[LayerChange]) -> str:
    """The layers with most FLOPs, the sum of the others and of all, as lines for a terminal.

    There are at most `LINES` lines of `COLUMNS` characters. Long names lose their beginning.
    """
    shown = set(range(len(layers)))
    if len(layers) > LINES - 2:
        heavy = sorted(shown, key=lambda i: (-layers[i].flops[0], -layers[i].params[0], i))
        shown = set(heavy[: LINES - 3])
    header = ["layer", "channels out", "FLOPs", "left", "params", "left"]
    rows = [
        [layer.layer, change(*layer.channels), *_left([layer])]
        for i, layer in enumerate(layers)
        if i in shown
    ]
    others = [layer for i, layer in enumerate(layers) if i not in shown]
    if others:
        rows.append([f"{len(others)} others", "", *_left(others)])
    rows.append(["total", "", *_left(layers)])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    room = COLUMNS - sum(widths[1:]) - 2 * len(widths[1:])
    for row in rows:
        if len(row[0]) > room:
            row[0] = "..." + row[0][3 - room :]
    return "\n".join(aligned([header, *rows], "  "))


def _left(layers: Sequence[LayerChange]) -> list[str]:
    """FLOPs and params of some layers after pruning, and the shares that are left of them."""
    cells = []
    for pairs in ([layer.flops for layer in layers], [layer.params for layer in layers]):
        old, new = map(sum, zip(*pairs, strict=True))
        cells += [compact(new), percent(new / old) if old else ""]
    return cells


def aligned(rows: Sequence[Sequence[str]], between: str) -> list[str]:
    """Rows as lines of columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        between.join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
