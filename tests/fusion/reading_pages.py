"""What a reader of an HTML report has before them."""

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

VOID = {"meta"}


class _Page(HTMLParser):
    """Collects cells and paragraphs; fails on tags that do not match and on anything loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            assert name not in ("src", "href"), f"<{tag} {name}={value}> would load something"
        assert tag != "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_text(html: str) -> list[str]:
    """The pieces of text of a page that is well formed and stands alone."""
    page = _Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return [text.strip() for text in page.texts if text.strip()]


def every_value_missing_from(texts: list[str], data: Any) -> list[Any]:
    """The numbers and texts of a JSON document that stand nowhere among these texts."""
    there = set(texts)
    return [value for value in _values(data) if json.dumps(value, ensure_ascii=False) not in there]


def _values(data: Any) -> Iterator[Any]:
    if isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            yield from _values(value)
    else:
        yield data
