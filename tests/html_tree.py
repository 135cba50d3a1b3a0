"""A page as a tree, for tests that read it back."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "input", "img", "br", "hr"}
_INLINE = {"span", "code", "a"}
_SVG_VOID = {"path", "rect", "use", "image", "defs"}  # written as <path/>


@dataclass
class Node:
    """An element: tag, attributes, children and texts in order."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    content: list[Node | str] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list[Node]:
        """Return all elements below of that tag with these attributes (`class_` for class: one of its words)."""
        found = []
        for child in self.content:
            if isinstance(child, Node):
                if child.tag == tag and child.has(attributes):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def one(self, tag: str, **attributes: str) -> Node:
        """Return the only one."""
        (found,) = self.all(tag, **attributes)
        return found

    def has(self, attributes: dict[str, str]) -> bool:
        for key, value in attributes.items():
            given = self.attributes.get(key.rstrip("_").replace("_", "-")) or ""
            if value not in (given.split() if key == "class_" else [given]):
                return False
        return True

    @property
    def text(self) -> str:
        """All text below, white space as a browser shows it."""
        parts = []
        for child in self.content:
            if isinstance(child, str):
                parts.append(child)
            else:
                parts.append(child.text if child.tag in _INLINE else f" {child.text} ")
        return " ".join("".join(parts).split())


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Node("root")
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        node = Node(tag, dict(attrs))
        self.open[-1].content.append(node)
        if tag not in _VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        assert tag in _SVG_VOID, f"<{tag}/> is not closed in HTML"
        self.open[-1].content.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].content.append(data)


def parse(page: str) -> Node:
    """Return the page's tree; every element that is opened must be closed, in order."""
    builder = _Builder()
    builder.feed(page)
    builder.close()
    assert builder.open == [builder.root], f"<{builder.open[-1].tag}> is never closed"
    return builder.root


def rows(table: Node) -> list[dict[str, str]]:
    """Return the rows of a table's body, text by the text of the column's head."""
    heads = [head.text for head in table.one("thead").all("th")]
    made = []
    for row in table.one("tbody").all("tr"):
        cells = [cell.text for cell in row.content if isinstance(cell, Node)]
        assert len(cells) == len(heads), (cells, heads)
        made.append(dict(zip(heads, cells, strict=True)))
    return made


def numbers(text: str) -> list[float]:
    """Return the numbers that a sentence tells, in order: "3.00x of 1,000" -> [3, 1000]."""
    return [float(found.replace(",", "")) for found in re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", text)]
