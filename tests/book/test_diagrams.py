"""Diagrams are drawn from their present source, and need no script to be seen."""

import shutil
import xml.etree.ElementTree as tree

import pytest
import tiny

from tools import diagrams, labs

SOURCES = diagrams.sources(labs.Book())


@pytest.fixture
def drawn(tmp_path):
    shutil.copytree(SOURCES[0].parent, tmp_path / "book/_diagrams")
    return labs.Book(tmp_path)


def test_every_diagram_is_drawn_as_its_source_stands(drawn):
    assert SOURCES and list(diagrams.check(drawn)) == []


def test_a_diagram_whose_source_changed_is_found(drawn):
    tiny.replace(drawn.root / "book/_diagrams/pipeline.mmd", "The book", "A book")
    (finding,) = diagrams.check(drawn)
    assert finding.path.endswith("pipeline.mmd") and "make diagrams" in finding.message


def test_a_diagram_that_was_never_drawn_is_found(drawn):
    (drawn.root / "book/_diagrams/pipeline.svg").unlink()
    assert len(list(diagrams.check(drawn))) == 1


@pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
def test_a_drawing_is_plain_svg_on_a_light_card_with_a_size(source):
    text = source.with_suffix(".svg").read_text("utf-8")
    root = tree.fromstring(text)
    assert root.tag.endswith("svg") and int(root.get("width")) <= 800 and int(root.get("height"))
    assert root[0].tag.endswith("rect") and root[0].get("fill") == "#ffffff"
    for foreign in ("<script", "foreignObject", "@import", "<image"):
        assert foreign not in text
