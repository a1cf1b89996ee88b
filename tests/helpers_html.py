"""A reader of HTML pages that stand alone, for tests."""

import re
from html.parser import HTMLParser

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "b", "div", "i", "pre"),
    *("table", "caption", "tr", "th", "td", "details", "summary", "figure", "figcaption", "img", "blockquote"),
    *("svg", "polyline", "wbr"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "style", "alt", "src", "viewbox", "role", "height"),
    *("preserveaspectratio", "aria-label", "points"),
}


class Page(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = set[str](), list[tuple[str, str | None]](), ""
        self.open = list[str]()
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in ("meta", "img", "polyline", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text


def checked(page: str) -> Page:
    """A page, after a look at whether it stands alone and has nothing but plain markup."""
    found = Page(page)
    assert found.tags <= TAGS
    assert {name for name, _ in found.attributes} <= ATTRIBUTES
    assert all(str(value).startswith("data:image/") for name, value in found.attributes if name == "src")
    assert not re.search(r"url\(|@import", page)
    assert all(one.isprintable() or one == "\n" for one in page)
    return found
