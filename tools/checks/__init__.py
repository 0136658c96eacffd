"""The gates: small functions that take a book and return what is wrong with it.

``static`` needs no Sphinx and takes seconds; ``built`` reads the finished HTML. Each gate has a
test that plants the defect it must catch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tools import diagrams, equations
from tools.checks import language, notebooks, pages, references, site
from tools.labs import Book, Finding

STATIC: tuple[Callable[[Book], Iterable[Finding]], ...] = (
    notebooks.lint,
    notebooks.agreement,
    pages.claims,
    pages.numbers,
    pages.figures,
    pages.structure,
    equations.check,
    references.check,
    diagrams.check,
    language.forbidden,
    language.spelling,
)
BUILT: tuple[Callable[[Book], Iterable[Finding]], ...] = (site.links, site.images, site.unplugged)


def static(book: Book) -> list[Finding]:
    """Return the findings of every gate that reads sources and executed labs."""
    return [finding for gate in STATIC for finding in gate(book)]


def built(book: Book) -> list[Finding]:
    """Return the findings of every gate that reads the built HTML."""
    return [finding for gate in BUILT for finding in gate(book)]
