"""The browser gates, each with the defect that it must catch, on a tiny built book."""

import pytest
import tiny
import visit

PAGE = "book/concepts/small.html"


FAULTS = {
    "<script>throw new Error('planted')</script>": "JavaScript error: planted",
    "<script>console.error('planted')</script>": "console error: planted",
    '<script src="gone.js"></script>': "console error: Failed to load",
    '<img alt="A long text" src="https://example.org/x.png">': "foreign request: https://example",
    '<img alt="A long text" src="gone.png">': "image not drawn: gone.png",
    '<img src="bare.png">': "image without alternative text: bare.png",
    '<span class="math">no delimiters</span>': "formula not drawn: no delimiters",
    r'<div class="math">\[\unknown{1}\]</div>': r"formula with an error: \unknown",
    r'<div class="math">\[\left( 1\]</div>': "formula with an error: Extra",
    '<p style="color:#bbb;background:#fff">pale</p>': "axe (light) color-contrast",
    '<p class="dim">dim in the dark alone</p>': "axe (dark) color-contrast at 2 places",
    "<button></button>": "axe (light) button-name",
    '<div style="width:1900px">wide</div>': "scrolls sideways at 1280 px",
}
DIM = "<style>html[data-theme=dark] .dim {color:#333; background:#111}</style>"


def planted(book, text):
    """Write a copy of the chapter's page with something planted before its end."""
    path = (book.html / PAGE).with_name("planted.html")
    tiny.write(path, (book.html / PAGE).read_text("utf-8"))
    tiny.replace(path, "</article>", f"{text}</article>")
    return path


@pytest.fixture(scope="module")
def faults(browser, small):
    return visit.inspect(browser, planted(small, DIM + "".join(FAULTS)))


def test_the_sound_chapter_and_lab_have_no_faults(browser, small):
    assert visit.inspect(browser, small.html / PAGE) == []
    assert visit.inspect(browser, small.html / "notebooks/concepts/small.html") == []


@pytest.mark.parametrize("message", FAULTS.values())
def test_a_planted_fault_is_seen(faults, message):
    assert [fault for fault in faults if fault.startswith(message)], faults


def test_a_thing_too_wide_for_a_phone_alone_is_seen(browser, small):
    found = visit.inspect(browser, planted(small, '<div style="width:700px">wide</div>'))
    assert found and all(fault.startswith("scrolls sideways at 375 px") for fault in found)


def test_the_first_tab_offers_to_skip_to_the_text(browser, small):
    with visit.Visit(browser, small.html / PAGE) as reader:
        reader.page.keyboard.press("Tab")
        assert "Skip to main content" in reader.page.evaluate("document.activeElement.innerText")


def test_a_solution_opens_from_the_keyboard(browser, small):
    with visit.Visit(browser, small.html / PAGE) as reader:
        text = reader.page.locator(".solution p", has_text="Eight.")
        assert not text.is_visible()
        reader.page.locator(".solution button").last.focus()
        reader.page.keyboard.press("Enter")
        text.wait_for(state="visible")


def test_search_works_from_a_file(browser, small):
    url = f"{(small.html / 'search.html').as_uri()}?q=small"
    with visit.Visit(browser, url) as reader:
        reader.page.wait_for_selector("#search-results li a")
        assert reader.faults == []


def test_without_a_browser_the_tests_are_skipped_and_say_what_was_left_out(monkeypatch):
    monkeypatch.setattr(visit.shutil, "which", lambda name: None)
    assert visit.chromium() is None
    assert "left out: console errors" in visit.LEFT_OUT
