"""The source map names every part of the five articles and says where it is covered, truthfully."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "book" / "appendix" / "source-map.md"

# Every row that the map owes: the sections of the articles, grouped by what they speak of.
OWED = {
    "map-concepts": [
        "S0-1, S1-1, S2-1, S3-1, S4-1",
        "S0-2.1, S3-2.1",
        "S0-2.2, S4-2.1",
        "S2-2.1",
        "S2-2.2",
        "S1-2.1, S3-1.2",
        "S1-2.2",
        "S3-2.1, S3-3.1",
        "S4-2.2, 3.1-3.3",
        "S2-2.3, S3-2.1",
        "S4-6, S1-6",
        "S2-3.3, S3-3.3",
        "S3-Q1, S0-Q4",
        "S0-2.3, S0-3.1, S1-3.1, 3.2, S2-3.1, 3.2",
        "S2-4.2, 4.3, S3-5.3",
        "S4-6",
    ],
    "map-loss-math": [
        "S0-3.2",
        "S3-4.1, 4.2",
        "S3-4.1",
        "S1-3.3",
        "S2-4.1",
        "S4-3.1..3.3",
        "S1-3.3, S3-Q3",
        "S3-Q4",
        "S0-Q4, S3-8.2",
    ],
    "map-fine-tuning": [
        "S0-3.3",
        "S0-4",
        "S1-4",
        "S2-5",
        "S3-3.2",
        "S3-4.3",
        "S3-5.2",
        "S4-4",
        "S0-Q2, S2-9.4, S3-Q2, S4-6",
        "S1-6, S0-Q3",
        "S3-3.1",
        "S3-Q4, 7.3",
        "S3-Q4",
        "S4-6, S0-3.3",
        "S3-3.2, S3-Q5",
        "S3-Q6",
        "S3-5.1, 7.2",
        "S0-7",
    ],
    "map-applications": [
        "S0-5.1, S2-3.4",
        "S0-5.2, S3-5.2",
        "S0-5.3",
        "S0-5.4, S3-3.4",
        "S0-5.5, S2-3.4, S3-3.4, S3-6.3",
        "S0-5.6, S2-3.4",
        "S0-5.7, S2-3.4, S3-3.4, S3-6.2",
        "S2-6, S3-3.4",
        "S2-6",
        "S2-6",
        "S3-6.1",
    ],
    "map-frontiers": [
        "S0-Q4, S3-8.2, S4-5.3",
        "S1-5.1, S2-7, S3-6.4",
        "S3-6.4, Q6",
        "S1-5.4, S2-7",
        "S2-7, S3-8.2",
        "S3-6.4, 8.4",
        "S4-5.2, S3-8.2",
        "S0-7.5, S1-5.3, S2-8.3, S3-Q7, S4-5.4",
        "S3-8.3",
        "S2-8.2, S4-5.5",
        "S0-7.1, 7.2, 7.4, S1-5.2, S2-8.3, S3-8.3, 8.4, S4-5.1",
    ],
    "map-appendices": [
        "S0-8, S1-6, S2-9, S3-9, S4-6",
        "all",
        "all",
        "S3-7.3, S4",
        "S3-7.1, 7.2",
    ],
}
ANCHOR = re.compile(r"\[([^\]]+)\]\{#([a-z0-9-]+)\}")
LINK = re.compile(r"\{(ref|doc)\}`(?:[^`<]*<)?([^`>]+)>?`")


def rows(section):
    """[(source, what it says, where)] of the table below an anchor."""
    text = PAGE.read_text(encoding="utf-8").split(f"({section})=\n", 1)[1]
    text = re.split(r"^\(map-", text, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    lines = [ANCHOR.sub(r"\1", line) for line in lines]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


ALL = [row for section in OWED for row in rows(section)]
LINKS = sorted({link for row in ALL for link in LINK.findall(row[2])})


@pytest.mark.parametrize("section", OWED)
def test_every_part_of_the_articles_has_its_row(section):
    assert [source for source, _, _ in rows(section)] == OWED[section]


@pytest.mark.parametrize("row", ALL, ids=lambda row: row[0])
def test_a_row_says_what_it_is_and_links_or_admits_that_it_is_not_yet_written(row):
    _, says, where = row
    assert len(says) > 4
    assert LINK.search(where) or where == "not yet written"


def test_no_two_parts_share_an_anchor():
    anchors = [anchor for _, anchor in ANCHOR.findall(PAGE.read_text(encoding="utf-8"))]
    assert len(anchors) == len(set(anchors)) > 50


@pytest.mark.parametrize(("kind", "target"), LINKS)
def test_a_link_of_the_map_leads_somewhere(kind, target):
    if kind == "doc":
        assert (PAGE.parent / f"{target}.md").is_file()
        return
    pages = [*(ROOT / "book").rglob("*.md"), *(ROOT / "notebooks").rglob("*.ipynb")]
    label = re.compile(rf"\({re.escape(target)}\)=")
    assert any(label.search(page.read_text(encoding="utf-8")) for page in pages)
