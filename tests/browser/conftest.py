"""A browser for the tests of this folder; without one they are skipped, never passed."""

from pathlib import Path

import pytest
import tiny
import visit

from tools import build


@pytest.fixture(scope="session")
def browser():
    program = visit.chromium()
    if not program:
        pytest.skip(visit.LEFT_OUT)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chrome = play.chromium.launch(executable_path=program, args=list(visit.QUIET))
        yield chrome
        chrome.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Give a tiny book, built once; tests write pages of their own into it."""
    book = tiny.pretend(tiny.make(tmp_path_factory.mktemp("browser")))
    assert build.build(book) == []
    return book


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in Path(item.path).parents:
            item.add_marker(pytest.mark.browser)
