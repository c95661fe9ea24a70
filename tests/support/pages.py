"""What stands in a page of HTML."""

from html.parser import HTMLParser

VOID = {"br", "img", "link", "meta"}


class Page(HTMLParser):
    """The elements and texts of a page; elements that are not closed in order are an error.

    `tags` are all elements with their attributes, `texts` all that is read, and `rows` the texts of
    the cells of every row of a table, what is shown smaller in parentheses.
    """

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.texts, self.rows = [], [], [], []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["title"]):
            self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += f"({data})" if self.open[-1] == "span" else data

    @property
    def text(self):
        return "\n".join(self.texts)

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def sections(self):
        return [attributes["id"] for attributes in self.of("section")]

    def row(self, first):
        """The other cells of the first row that begins with a text."""
        return next(rest for name, *rest in self.rows if name == first)
