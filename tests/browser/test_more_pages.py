"""The other half of the pages of the built book, opened from their files with the network off."""

import pytest
import visit
from shelves import BOOK, SECOND


@pytest.mark.parametrize("page", SECOND)
def test_the_other_page_is_whole_unplugged_and_accessible(browser, page):
    assert visit.inspect(browser, BOOK.root / page) == []
