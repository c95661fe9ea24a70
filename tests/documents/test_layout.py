"""The tree is as docs/architecture.md says, and documents are lines that a person can read."""

from pathlib import Path
import re

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "docs/architecture.md"
INDEX = ROOT / "benchmarks/README.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", INDEX, *sorted((ROOT / "docs").rglob("*.md"))]
WIDEST = 100
NAMED = re.compile(r"`([a-z_/]+(?:\.py|/))`")


def test_what_the_architecture_names_is_there():
    named = NAMED.findall(ARCHITECTURE.read_text())
    assert len(named) > 20
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "dhp_jax" / path).exists(), path


def test_every_benchmark_is_in_their_index():
    index = INDEX.read_text()
    for script in (ROOT / "benchmarks").glob("*.py"):
        if "__main__" in script.read_text():
            assert f"`{script.name}`" in index, script.name


def test_every_page_of_results_is_in_the_index_of_benchmarks():
    index = INDEX.read_text()
    for page in (ROOT / "benchmarks/results").glob("*.md"):
        assert f"(results/{page.name})" in index, page.name


def test_the_architecture_is_read_in_ten_minutes():
    assert len(ARCHITECTURE.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_of_a_document_are_short(page):
    """Except tables, links and commands, which no line break may divide."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fenced ^= line.startswith("```")
        whole = fenced or line.startswith(("|", "    ", "(`")) or "](" in line or "http" in line
        assert whole or len(line) <= WIDEST, f"{page.name}:{number}: {len(line)} characters"
