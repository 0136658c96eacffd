"""The pages of the built book in two parts of about equal work, for two workers side by side."""

from tools import labs
from tools.checks import site

BOOK = labs.Book()
REDIRECTS = ("_build/html/index.html", "_build/html/search.html")
PAGES = [BOOK.relative(path) for path in site.pages(BOOK)] if BOOK.html.exists() else []
LOOKED_AT = [page for page in PAGES if page not in REDIRECTS]
# To look at a page takes the longer the larger it is: by turns, the largest first.
BY_SIZE = sorted(LOOKED_AT, key=lambda page: (-(BOOK.root / page).stat().st_size, page))
FIRST, SECOND = BY_SIZE[::2], BY_SIZE[1::2]
