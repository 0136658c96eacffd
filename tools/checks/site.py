"""Gates on the built HTML: links that lead somewhere, described images, no foreign request."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tools.labs import Book, Finding

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
NOT_LOADED = {"canonical", "next", "prev", "search", "index", "author", "alternate", "license"}


class Page(HTMLParser):
    """What a page links to, loads, shows, and which anchors it offers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[int, str]] = []
        self.loads: list[tuple[int, str]] = []
        self.images: list[tuple[int, dict]] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attributes}
        line = self.getpos()[0]
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append((line, found["href"]))
        if tag == "img":
            self.images.append((line, found))
        relation = set(found.get("rel", "").split())
        if found.get(LOADS.get(tag, "")) and not (tag == "link" and relation & NOT_LOADED):
            self.loads.append((line, found[LOADS[tag]]))


@lru_cache(maxsize=1024)
def _page(path: Path, _time: int) -> Page:
    return Page(path.read_text("utf-8"))


def page(path: Path) -> Page:
    return _page(path, path.stat().st_mtime_ns)


def pages(book: Book) -> list[Path]:
    """Return the HTML pages, without those that the theme keeps for itself."""
    return sorted(p for p in book.html.rglob("*.html") if "_static" not in p.parts)


def links(book: Book) -> Iterator[Finding]:
    """Every link inside the book leads to a file that exists, and its anchor too."""
    for path in pages(book):
        found = page(path)
        for line, target in {*found.links, *found.loads}:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if file.is_dir():
                file = file / "index.html"
            if not file.exists():
                yield Finding(book.relative(path), line, f"broken link {target}")
                continue
            anchor = unquote(parts.fragment) if file.suffix == ".html" else ""
            if anchor and anchor not in page(file).anchors:
                yield Finding(book.relative(path), line, f"no such anchor: {target}")


def images(book: Book) -> Iterator[Finding]:
    """Every image has alternative text that is not its file name."""
    for path in pages(book):
        for line, image in page(path).images:
            alt, name = image.get("alt", "").strip(), image.get("src", "")
            decorative = "alt" in image and image.get("role") in ("presentation", "none")
            if not decorative and (not alt or alt in name):
                yield Finding(book.relative(path), line, f"image without alternative text: {name}")


def unplugged(book: Book) -> Iterator[Finding]:
    """Pages load nothing from elsewhere, and no script knows an address to load from."""
    for path in pages(book):
        for line, target in page(path).loads:
            if urlsplit(target).netloc:
                yield Finding(book.relative(path), line, f"loads from elsewhere: {target}")
        text = path.read_text("utf-8")
        for match in re.finditer(r"<script\b[^>]*>(.*?)</script>", text, re.DOTALL):
            for address in re.findall(r"https?://[^\s\"'`<>]+", match[1]):
                line = text.count("\n", 0, match.start()) + 1
                yield Finding(book.relative(path), line, f"a script names an address: {address}")
    for path in book.html.rglob("*.css"):
        for address in re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]+\)", path.read_text("utf-8")):
            yield Finding(book.relative(path), 0, f"loads from elsewhere: {address}")
