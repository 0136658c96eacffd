"""The glossary is bilingual and in order, and no entry is longer than it should be."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "book" / "appendix" / "glossary.md"
BODY = PAGE.read_text(encoding="utf-8").split("```{glossary}\n:sorted:\n", 1)[1].split("\n```")[0]
ENTRIES = {
    lines[0]: " ".join(line.strip() for line in lines[1:])
    for lines in (block.split("\n") for block in BODY.strip().split("\n\n"))
}


def test_no_term_is_explained_twice():
    assert len(ENTRIES) == len(BODY.strip().split("\n\n"))


def test_the_terms_stand_in_order():
    names = [name.casefold() for name in ENTRIES]
    assert names == sorted(names)


@pytest.mark.parametrize("term", ENTRIES)
def test_a_definition_gives_the_chinese_term_first_and_then_few_words(term):
    chinese, _, rest = ENTRIES[term].partition(". ")
    assert re.search(r"[\u4e00-\u9fff]", chinese), f"{term}: no Chinese equivalent"
    assert 4 <= len(re.sub(r"<!--.*?-->", "", rest).split()) <= 60


def test_no_term_holds_an_apostrophe_which_typography_would_bend_and_so_break_its_links():
    assert not [name for name in ENTRIES if "'" in name]
