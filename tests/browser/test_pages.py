"""Every page of the built book, opened from its file with the network off."""

import pytest
import visit

from tools import labs
from tools.checks import site

BOOK = labs.Book()
PAGES = [BOOK.relative(path) for path in site.pages(BOOK)] if BOOK.html.exists() else []
REDIRECTS = ("_build/html/index.html", "_build/html/search.html")


def test_the_book_was_built():
    assert PAGES, "there is no _build/html: run `make book` first"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in REDIRECTS])
def test_the_page_is_whole_unplugged_and_accessible(browser, page):
    assert visit.inspect(browser, BOOK.root / page) == []


@pytest.mark.skipif(not PAGES, reason="there is no _build/html: run `make book` first")
def test_search_finds_a_page_from_a_file(browser):
    url = f"{(BOOK.html / 'search.html').as_uri()}?q=transfer"
    with visit.Visit(browser, url) as reader:
        reader.page.wait_for_selector("#search-results li a")
        assert reader.page.locator("#search-results li").count() > 1
        assert reader.faults == []


@pytest.mark.skipif(not PAGES, reason="there is no _build/html: run `make book` first")
def test_the_index_leads_to_the_first_page(browser):
    with visit.Visit(browser, BOOK.html / "index.html") as reader:
        reader.page.wait_for_selector("article h1")
        assert reader.faults == []
