"""README for a package index, on which links into the tree would lead nowhere.

They lead to the address of the tree if setup.cfg has one, as `Source` among its `project_urls`.
Without it they become their words, and pictures are left out.
"""

import configparser
from pathlib import Path
import re

from setuptools import setup

HERE = Path(__file__).parent
INTO_THE_TREE = re.compile(r"(!?)\[([^]]*)\]\((?!https?:|#)([^)]+)\)")


def description(readme: str, address: str = "") -> str:
    """A text in Markdown without relative links."""

    def elsewhere(link: re.Match[str]) -> str:
        picture, words, path = link.groups()
        if address:
            return f"{picture}[{words}]({address}/{'raw' if picture else 'blob'}/main/{path})"
        return "" if picture else words

    return INTO_THE_TREE.sub(elsewhere, readme)


def address(settings: str) -> str:
    """Where the tree is, of the text of setup.cfg."""
    read = configparser.ConfigParser()
    read.read_string(settings)
    urls = (line.split("=", 1) for line in read["metadata"]["project_urls"].split("\n") if line)
    return {name.strip(): url.strip().rstrip("/") for name, url in urls}.get("Source", "")


if __name__ == "__main__":  # as build backends run it
    setup(
        long_description=description(
            (HERE / "README.md").read_text(encoding="utf-8"),
            address((HERE / "setup.cfg").read_text(encoding="utf-8")),
        ),
        long_description_content_type="text/markdown",
    )
