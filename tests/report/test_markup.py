"""Nothing that is not markup becomes markup."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st
import pytest

from dhp_jax.report.markup import Markup, element, joined


def parsed(markup):
    """Tags with their attributes, and all text, as a parser of HTML finds them."""
    tags, text = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.handle_data = text.append
    parser.feed(markup)
    parser.close()
    return tags, "".join(text)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"])))
def test_any_text_comes_back_as_it_was(text):
    tags, found = parsed(element("p", text, title=text))
    assert tags == [("p", {"title": text})]
    assert found == text


def test_markup_within_markup_is_not_escaped_again():
    inner = element("b", "1 < 2")
    assert joined("a & b", inner, None, 3) == "a &amp; b<b>1 &lt; 2</b>3"
    assert isinstance(element("p", inner), Markup)
    assert element("p", inner) == "<p><b>1 &lt; 2</b></p>"


@pytest.mark.parametrize(
    ("attributes", "shown"),
    [
        ({"class_": "x"}, ' class="x"'),
        ({"stroke_width": 2}, ' stroke-width="2"'),
        ({"x": 1.0}, ' x="1"'),
        ({"x": 1.23456}, ' x="1.23"'),
        ({"x": None}, ""),
        ({"alt": 'say "no"'}, ' alt="say &quot;no&quot;"'),
    ],
)
def test_attributes(attributes, shown):
    assert element("i", **attributes) == f"<i{shown}></i>"


def test_elements_that_hold_nothing_are_not_closed():
    assert element("img", alt="x") == '<img alt="x">'
