"""Small XML documents of strangers, read by the standard library's expat: no DTD, no entities, everything bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from p2pvpn.core.errors import WireError

MAX_BYTES = 65536
"""Descriptions of routers have 2 to 20 kB."""
MAX_ELEMENTS = 2000
MAX_DEPTH = 24
MAX_TEXT = 1024
"""Characters of one element's text; what we read are URLs, addresses and numbers."""


@dataclass(slots=True)
class Element:
    """`name` is without its namespace; `text` without white space around it."""

    name: str
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def child(self, name: str) -> str:
        """The text of the first child of that name; empty when there is none."""
        return next((child.text for child in self.children if child.name == name), "")

    def walk(self) -> Iterator[Element]:
        """This element and all below, in the document's order."""
        waiting = [self]
        while waiting:
            element = waiting.pop()
            yield element
            waiting.extend(reversed(element.children))

    def find(self, name: str) -> Element | None:
        return next((element for element in self.walk() if element.name == name), None)


class _Builder:
    """Takes expat's events; refuses a DTD, which is what entities are declared in."""

    def __init__(self) -> None:
        self.root: Element | None = None
        self._open: list[Element] = []
        self._count = 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > MAX_ELEMENTS or len(self._open) >= MAX_DEPTH:
            raise WireError("too much XML")
        element = Element(name.rpartition("|")[2])
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)

    def end(self, name: str) -> None:
        element = self._open.pop()
        element.text = element.text.strip()

    def text(self, data: str) -> None:
        element = self._open[-1]
        element.text += data
        if len(element.text) > MAX_TEXT:
            raise WireError("a long text in XML")

    def refuse(self, *arguments: object) -> None:
        raise WireError("XML with a document type")


def parse_untrusted(data: bytes) -> Element:
    """The root element. Raises WireError."""
    if len(data) > MAX_BYTES:
        raise WireError(f"{len(data)} bytes of XML")
    builder = _Builder()
    parser = expat.ParserCreate(namespace_separator="|")
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.text
    parser.StartDoctypeDeclHandler = builder.refuse
    parser.EntityDeclHandler = builder.refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as problem:  # malformed, or in an encoding that nobody knows
        raise WireError(f"not XML: {problem}") from None
    if builder.root is None:
        raise WireError("empty XML")
    return builder.root
