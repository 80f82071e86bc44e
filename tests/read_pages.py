"""Read pages made for notebooks, as a browser does."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = ("br", "img", "hr", "input")


class Reader(HTMLParser):
    """Reads a page; an element that is never closed, or closed elsewhere, is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def read_page(html: str) -> Reader:
    """Return what a page has: its elements, the cells of its tables, and its words."""
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader
