"""The gates on built pages: each catches the defect planted in a copy of a built book."""

import pytest
import tiny

from tools import checks
from tools.checks import site as gates

PAGE = "book/concepts/small.html"


def messages(gate, book):
    return [finding.message for finding in gate(book)]


def plant(book, text):
    tiny.replace(book.html / PAGE, "</body>", f"{text}</body>")


def test_the_sound_site_passes(site):
    assert checks.built(site) == []


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("../gone.html", "broken link ../gone.html"),
        ("../index.html#gone", "no such anchor: ../index.html#gone"),
        ("#gone", "no such anchor: #gone"),
    ],
)
def test_a_broken_link_is_found(site, link, message):
    plant(site, f'<a href="{link}">there</a>')
    assert messages(gates.links, site) == [message]


def test_a_missing_download_is_found(site):
    next((site.html / "_downloads").rglob("small.ipynb")).unlink()
    assert any("broken link" in message for message in messages(gates.links, site))


@pytest.mark.parametrize("image", ['<img src="a.png">', '<img src="a.png" alt="a.png">'])
def test_an_image_without_alternative_text_is_found(site, image):
    plant(site, image)
    assert messages(gates.images, site) == ["image without alternative text: a.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<script src="https://cdn.example.org/x.js"></script>', "loads from elsewhere"),
        ('<link rel="stylesheet" href="//cdn.example.org/x.css">', "loads from elsewhere"),
        ('<img alt="A long text" src="http://example.org/x.png">', "loads from elsewhere"),
        ('<script>load("https://cdn.example.org/x.js")</script>', "a script names an address"),
    ],
)
def test_a_request_to_elsewhere_is_found(site, text, message):
    plant(site, text)
    (found,) = messages(gates.unplugged, site)
    assert message in found


def test_a_style_sheet_that_loads_a_font_from_elsewhere_is_found(site):
    tiny.write(site.html / "_static/x.css", "@font-face {src: url('https://example.org/f.woff')}")
    assert "loads from elsewhere" in messages(gates.unplugged, site)[0]
