"""The build: it passes a sound book once, refuses a wrong one, and follows repository.url."""

import re
import shutil

import pytest
import tiny

from tools import build, labs, notebooks

CHAPTER = "book/concepts/small.md"
ADDRESS = "https://github.com/example/book"


def test_an_unchanged_book_is_not_built_again(built, capsys):
    assert build.build(built) == []
    assert "nothing changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", [CHAPTER, "_config.yml", "_toc.yml", "notebooks/concepts/small.ipynb"]
)
def test_every_input_is_in_the_key_of_the_build(book, name):
    before = build.key(book)
    path = book.root / name
    path.write_text(path.read_text("utf-8") + "\n", "utf-8")
    assert build.key(book) != before


def test_the_page_prints_executed_numbers_that_lead_to_their_evidence(built):
    html = (built.html / CHAPTER).with_suffix(".html").read_text("utf-8")
    found = re.search(r'<a class="tk-claim[^"]*" href="([^"]*)" title="([^"]*)">', html)
    assert found[1] == "../appendix/claims.html#claim-small-share"
    assert "between 0.7 and 0.8" in found[2] and "<!--claim" not in html
    table = (built.html / "book/appendix/claims.html").read_text("utf-8")
    assert 'id="claim-small-share"' in table


@pytest.mark.parametrize("page", ["book/concepts/small", "notebooks/concepts/small"])
def test_chapter_and_lab_are_stamped_and_offer_the_lab(built, page):
    html = (built.html / page).with_suffix(".html").read_text("utf-8")
    assert "Last executed" in html and "torch" in html and "seed 0" in html
    assert re.search(r'href="[./]*_downloads/\w+/small.ipynb"', html)


def test_nothing_of_thebe_is_left(built):
    pages = [path.read_text("utf-8") for path in built.html.rglob("*.html")]
    assert pages and not any("thebe" in page.lower() for page in pages)


def test_without_an_address_pages_have_no_launch_and_no_source_button(built):
    html = (built.html / "notebooks/concepts/small.html").read_text("utf-8")
    assert "colab" not in html and "mybinder" not in html and "source-repository" not in html


def test_with_an_address_labs_have_launch_and_source_buttons_and_an_install_cell(site):
    tiny.write_config(site.root, ADDRESS)
    lab = site.lab("small")
    notebooks.sync(lab)
    assert f"transferkit[all] @ git+{ADDRESS}@v" in lab.source.read_text("utf-8")
    tiny.pretend(site)  # the install cell does nothing where the library is installed
    assert build.build(site) == []
    html = (site.html / "notebooks/concepts/small.html").read_text("utf-8")
    name = "example/book/blob/master/notebooks/concepts/small.ipynb"
    assert f"https://colab.research.google.com/github/{name}" in html
    assert "https://mybinder.org/v2/gh/example/book" in html
    assert f'href="{ADDRESS}"' in html and "find_spec" not in html
    tiny.write_config(site.root)
    notebooks.sync(lab)
    assert "install" not in lab.source.read_text("utf-8")


def test_a_wrong_number_and_a_stale_lab_stop_the_build_and_the_next_starts_anew(site):
    tiny.replace(site.root / CHAPTER, "0.75<!--claim", "0.95<!--claim")
    tiny.replace(site.lab("small").executed, '"key": "', '"key": "0')
    found = [finding.message for finding in build.build(site)]
    assert any("outside [0.7, 0.8]" in message for message in found)
    assert any("changed after it was executed: run `make book`" in message for message in found)
    assert not (site.build / "state.json").exists()


def test_a_lab_that_was_not_executed_stops_the_build(site):
    shutil.rmtree(site.executed)
    found = [finding.message for finding in build.build(site)]
    assert any("this lab was not executed: run `make book`" in message for message in found)


def test_the_program_says_no_to_a_failing_lab(tmp_path, capsys):
    book = tiny.make(tmp_path)
    tiny.write_lab(book.lab("small").source, profile="raise SystemError('planted')")
    assert build.main(["--root", str(tmp_path)]) == 1
    assert "SystemError: planted" in capsys.readouterr().err
    assert not book.html.exists()


def test_the_real_book_passes_every_static_gate():
    from tools import checks

    assert [str(finding) for finding in checks.static(labs.Book())] == []


def test_a_lab_that_ran_again_changes_the_pages_that_quote_it(site):
    page = (site.html / CHAPTER).with_suffix(".html")
    (site.build / "state.json").unlink()
    assert build.build(site) == []
    assert ">0.75</" in page.read_text("utf-8")
    tiny.replace(site.lab("small").executed, '"value": 0.75', '"value": 0.76')
    assert build.build(site) == []
    assert ">0.76</" in page.read_text("utf-8") and ">76 %</" in page.read_text("utf-8")
