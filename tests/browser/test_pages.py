"""Every page of the built book, opened from its file with the network off; half of them here."""

import pytest
import visit
from shelves import BOOK, FIRST, PAGES, REDIRECTS, SECOND

BUILT = pytest.mark.skipif(not PAGES, reason="there is no _build/html: run `make book` first")


def test_the_book_was_built():
    assert PAGES, "there is no _build/html: run `make book` first"


def test_every_page_is_looked_at_by_one_of_the_two_files():
    found = [str(path.relative_to(BOOK.root)) for path in BOOK.html.rglob("*.html")]
    expected = {page for page in found if "/_static/" not in page} - set(REDIRECTS)
    assert sorted(FIRST + SECOND) == sorted(expected)


@pytest.mark.parametrize("page", FIRST)
def test_the_page_is_whole_unplugged_and_accessible(browser, page):
    assert visit.inspect(browser, BOOK.root / page) == []


@BUILT
def test_search_finds_a_page_from_a_file(browser):
    url = f"{(BOOK.html / 'search.html').as_uri()}?q=transfer"
    with visit.Visit(browser, url) as reader:
        reader.page.wait_for_selector("#search-results li a")
        assert reader.page.locator("#search-results li").count() > 1
        assert reader.faults == []


@BUILT
def test_the_index_leads_to_the_first_page(browser):
    with visit.Visit(browser, BOOK.html / "index.html") as reader:
        reader.page.wait_for_selector("article h1")
        assert reader.faults == []


MARKS = """() => {
  const seen = mark => getComputedStyle(mark).display !== "none";
  const marks = [...document.querySelectorAll(".tk-recorded-mark")];
  const texts = new Set(marks.map(mark => mark.closest("p:not(td p), li, table")).filter(Boolean));
  const without = [...texts].filter(
    text => ![...text.querySelectorAll(".tk-recorded-mark")].some(seen));
  return [marks.length, marks.filter(seen).length, without.length];
}"""


@BUILT
def test_recorded_numbers_are_marked_once_a_run_and_in_every_text_that_holds_some(browser):
    with visit.Visit(browser, BOOK.html / "book/fine-tuning/strategies.html") as reader:
        marks, shown, without = reader.page.evaluate(MARKS)
        assert 0 < shown < marks / 2 and without == 0
