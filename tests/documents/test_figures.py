"""Figures of the README and the guides to methods are those of the rows that were measured."""

from collections.abc import Iterator
import json
from pathlib import Path
import re

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
GUIDE = "".join((ROOT / f"docs/{page}.md").read_text() for page in ("methods", "comparisons"))
PAGES = (
    "from_trained",
    "from_trained_cpu",
    "from_trained_explored",
    "from_trained_searches",
    "beside_torch_pruning",
)
OF_README = {  # name and updates of the rows that a line of the README sums up
    "search from trained weights (`fade`)": ("fade", 980),
    "group norm, better than the \u21131 norm": ("group", 980),
    "one cut by Taylor terms per root of FLOPs": ("taylor_square per flop^0.5", 980),
    "`fade`, then distillation": ("fade, distilled", 3920),
    "same width everywhere, fresh weights": ("uniform, fresh weights", 20531),
}
OF_GUIDE = {  # the same for the guide's tables
    "squared Taylor terms per root of FLOPs": "taylor_square per flop^0.5",
    "`fade`": "fade",
    "`group_norm`": "group",
    "`l1_norm`": "l1",
    "squared Taylor terms": "taylor_square",
    "`norm_scale`": "scale",
    "`fpgm`": "fpgm",
    "uniform width by \u21131 norms": "uniform_l1",
    "`random`": "random",
}


def rows_of(page: str) -> list[dict]:
    return json.loads((RESULTS / f"{page}.json").read_text())["rows"]


def errors(page: str, name: str, target: float, updates: int) -> list[float]:
    """The test errors of a row, in percent, one for each seed."""
    wanted = {"name": name, "target": target, "updates": updates}
    return [row["error"] for row in rows_of(page) if wanted.items() <= row.items()]


def summed_up(found: list[float]) -> str:
    if not found:
        return "not measured"
    mean = f"{sum(found) / len(found):.2f} %"
    if len(found) == 1:
        return f"{mean} (one seed)"
    few = ", two" if len(found) == 2 else ""
    return f"{mean} ({min(found):.2f} to {max(found):.2f}){few}"


def table_lines(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.strip().startswith("|"):
            yield [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_comparison_of_the_readme_is_that_of_the_measured_rows():
    text = (ROOT / "README.md").read_text()
    told = {cells[0]: cells[1:] for cells in table_lines(text) if cells[0] in OF_README}
    assert told == {
        line: [
            # fresh weights have the 100 epochs of the trained network too
            str(5 * updates // 980 if updates < 20000 else 105),
            *(
                summed_up(errors("from_trained_cpu", name, target, updates))
                for target in (0.5, 0.25)
            ),
        ]
        for line, (name, updates) in OF_README.items()
    }


@pytest.mark.parametrize(
    ("page", "width", "lines"), [("from_trained", 5, 8), ("from_trained_cpu", 3, 3)]
)
def test_tables_of_the_guide_are_those_of_the_measured_rows(page, width, lines):
    told = [
        cells
        for cells in table_lines(GUIDE)
        if len(cells) == width and cells[0] in OF_GUIDE and cells[1].endswith(")")
    ]
    assert len(told) == lines
    for cells in told:
        for target, error in zip((0.5, 0.25), cells[1 :: (width - 1) // 2], strict=True):
            found = errors(page, OF_GUIDE[cells[0]], target, 980)
            assert len(found) in (2, 3)
            assert error == summed_up(found)


def apart(one: tuple[str, int], other: tuple[str, int], target: float) -> list[float]:
    """By how many points one row is better than another, seed by seed, of those that both have."""
    found = [
        {r["seed"]: r["error"] for r in rows_of("from_trained_cpu") if key == key_of(r)}
        for key in ((*one, target), (*other, target))
    ]
    return [found[1][seed] - found[0][seed] for seed in sorted(found[0].keys() & found[1].keys())]


def key_of(row: dict) -> tuple:
    return row["name"], row.get("updates"), row.get("target")


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def test_differences_that_the_readme_and_the_guide_tell_are_those_of_the_same_seeds():
    fade, group, long = ("fade", 980), ("group", 980), ("fade, distilled", 3920)
    taylor = ("taylor_square per flop^0.5", 980)
    uniform, found = (f"{name}, fresh weights" for name in ("uniform", "found"))
    uniform, found = (uniform, 20531), (found, 20531)

    def mean(numbers: list[float]) -> str:
        return f"{sum(numbers) / len(numbers):.1f}"

    def listed(numbers: list[float]) -> str:
        *first, last = (f"{x:.2f}" for x in numbers)
        return f"{', '.join(first)} and {last}" if first else last

    readme = in_one_line((ROOT / "README.md").read_text())
    for other in (group, taylor):
        assert min(*apart(fade, other, 0.5), *apart(fade, other, 0.25)) > 0
    half, quarter = (mean(apart(fade, taylor, target)) for target in (0.5, 0.25))
    assert f"by {half} points at half the FLOPs, where its seeds differ by 0.5, and by" in readme
    assert f"where its seeds differ by 0.5, and by {quarter} at a quarter" in readme
    half, quarter = (mean(apart(uniform, fade, target)) for target in (0.5, 0.25))
    assert f"same seeds by {half} points at half and by {quarter} at a quarter" in readme
    guide = in_one_line(GUIDE)
    better = {target: apart(uniform, fade, target) for target in (0.5, 0.25)}
    assert min(*better[0.5], *better[0.25]) > 0
    assert f"than `fade` with 5 for every seed: by {listed(better[0.5])} points" in guide
    assert f"at half, and by {listed(better[0.25])} points at a quarter" in guide
    told = f"better than they are by {listed(apart(long, uniform, 0.25))} points at a quarter"
    assert told in guide
    assert f"and by {listed(apart(long, uniform, 0.5))} points at half" in guide
    told = f"better than uniform ones by {listed(apart(found, uniform, 0.25))} points at a quarter"
    assert told in guide
    assert f"worse by {listed(apart(uniform, found, 0.5))} points at half" in guide
    for name, other in (("Taylor terms", taylor), ("`group_norm`", group)):
        less = [sorted(apart(fade, other, target)) for target in (0.5, 0.25)]
        told = " | ".join(f"-{first:.2f} to -{last:.2f}" for first, *_, last in less)
        assert f"| `fade` less {name} of the same seed | {told} |" in guide


def test_every_error_that_the_guide_tells_was_measured():
    text = GUIDE.split("## From fresh weights")[0]
    told = set(re.findall(r"(?<![\d.-])[1-9]\d\.\d\d(?= %| to |\)| and |,)", text))
    known = {"56.43", "24.06"}  # of rows that were not kept; their page tells them
    assert all(f"{error} %" in (RESULTS / "from_trained_cpu.md").read_text() for error in known)
    for page in PAGES:
        groups: dict[tuple, list[float]] = {}
        for row in rows_of(page):
            if "error" in row:
                known.add(f"{row['error']:.2f}")
                groups.setdefault((row["name"], row.get("target"), row.get("updates")), []).append(
                    row["error"]
                )
            if row.get("after_cut") is not None:
                known.add(f"{row['after_cut']:.2f}")
            if page == "beside_torch_pruning" and "flops" in row:
                known.add(f"{100 * row['flops']:.2f}")
        known |= {f"{sum(found) / len(found):.2f}" for found in groups.values()}
    assert len(told) > 80
    assert not told - known
