"""Tiny books for the gates: written for each test, executed and built once for all."""

import shutil

import pytest
import tiny

from tools import build, execute


@pytest.fixture
def book(tmp_path):
    """Give a tiny book that passes every gate, with results that were written, not run."""
    return tiny.pretend(tiny.make(tmp_path))


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Give a tiny book that was really executed and built; tests must not change it."""
    book = tiny.make(tmp_path_factory.mktemp("built"))
    execute.execute(book, book.labs())
    assert build.build(book) == []
    return book


@pytest.fixture
def site(built, tmp_path):
    """Give a copy of the built book to plant defects in."""
    shutil.copytree(built.root, tmp_path / "copy")
    return type(built)(tmp_path / "copy")
