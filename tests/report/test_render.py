"""Nothing that is filled into a page becomes markup."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st
import pytest

from dhp_jax.report.render import Cell, Table, render, templates

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"])).map(str.strip)


def parsed(markup):
    """Tags with their attributes, and the text of each element in order."""
    tags, texts = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.handle_data = texts.append
    parser.feed(markup)
    parser.close()
    return tags, texts


def shown(table, **options):
    return parsed(templates().get_template("macros.html").module.table(table, **options))


@given(TEXT, TEXT, TEXT)
def test_any_text_comes_back_as_it_was(name, value, more):
    tags, texts = shown(Table([name], [[value], [Cell(value, more)]], note=more))
    assert {tag for tag, _ in tags} <= {"div", "table", "thead", "tbody", "tr", "th", "td"} | {
        "span",
        "p",
    }
    joined = "".join(texts)
    assert all(text in joined for text in (name, value, more))


def test_a_table_has_a_cell_for_each_value_and_its_total_at_the_foot():
    table = Table(["layer", "FLOPs"], [["a", Cell("1", share=0.25)], ["b", 3]], ["total", "4"])
    tags, texts = shown(table, long=True)
    assert [text for text in texts if text.strip()] == [
        "layer",
        "FLOPs",
        "a",
        "1",
        "b",
        "3",
        "total",
        "4",
    ]
    names = [tag for tag, _ in tags]
    assert names.count("tr") == 4
    assert names.index("tfoot") > names.index("tbody")
    assert ("i", {"style": "width:25%"}) in tags
    assert tags[0] == ("div", {"class": "scroll long"})


def test_a_page_says_what_its_template_needs():
    with pytest.raises(Exception, match="'title' is undefined"):
        render("base.html")
