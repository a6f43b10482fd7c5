"""Links between pages have a target."""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

TOP = Path(__file__).parents[2]

PAGES = [path for path in TOP.rglob("*.md") if not any(part.startswith(".") for part in path.relative_to(TOP).parts)]


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text())


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for child in token.children or ():
            target = child.attrs.get("href", child.attrs.get("src"))
            if target is not None:
                yield unquote(str(target))


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return GitHub's anchors of headings: lower case, hyphens for spaces, no punctuation, a number for duplicates."""
    found: Counter[str] = Counter()
    names = set()
    for heading, inline in zip(tokens(page), tokens(page)[1:], strict=False):
        if heading.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            names.add(f"{name}-{found[name]}" if found[name] else name)
            found[name] += 1
    return frozenset(names)


def fault(page: Path, link: str) -> str | None:
    """Return the problem of a link."""
    parts = urlsplit(link)
    if parts.scheme:
        return None if parts.scheme in {"http", "https"} else f"{link}: {parts.scheme} is no scheme to link to"
    target = (page.parent / parts.path).resolve() if parts.path else page
    if not target.exists() or not target.is_relative_to(TOP):
        return f"{link}: there is no such file"
    if parts.fragment and parts.fragment not in anchors(target):
        return f"{link}: {target.name} has only #{', #'.join(sorted(anchors(target)))}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_links_have_a_target(page: Path) -> None:
    assert [found for link in links(page) if (found := fault(page, link))] == []


def test_a_broken_link_is_detected(tmp_path: Path) -> None:
    page = TOP / "docs" / "portal.md"
    assert fault(page, "architecture.md#the-path-of-a-packet") is None
    assert fault(page, "#in-short") is None
    assert fault(page, "../README.md") is None
    assert fault(page, "https://example.com/nowhere#at-all") is None
    assert "no such file" in str(fault(page, "nowhere.md"))
    assert "no such file" in str(fault(page, str(tmp_path)))
    assert "has only #" in str(fault(page, "architecture.md#the-way-of-a-stone"))
    assert "no scheme" in str(fault(page, "htp://example.com"))
