"""The page of questions answers all 23 of the five articles, with evidence or an admission."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "book" / "appendix" / "faq.md"
ENTRY = re.compile(r"^### (S\d)-Q(\d) · (.+?)\n(.*?)(?=^#|^\(|\Z)", re.DOTALL | re.MULTILINE)
ANSWERS = {(m[1], int(m[2])): m for m in ENTRY.finditer(PAGE.read_text(encoding="utf-8"))}
ASKED = {"S0": 4, "S1": 4, "S2": 4, "S3": 7, "S4": 4}
EVIDENCE = re.compile(r"\{(?:ref|eq|prf:ref)\}`|<!--(?:claim|recorded):|see S\d-Q\d")


def test_each_question_of_the_articles_is_there_once_and_in_order():
    wanted = [(article, n) for article, count in ASKED.items() for n in range(1, count + 1)]
    assert len(wanted) == 23
    assert [(m[1], int(m[2])) for m in ENTRY.finditer(PAGE.read_text("utf-8"))] == wanted


@pytest.mark.parametrize("which", ANSWERS, ids=lambda which: f"{which[0]}-Q{which[1]}")
def test_a_question_is_answered_with_evidence_or_admits_that_there_is_none(which):
    question, answer = ANSWERS[which][3], ANSWERS[which][4]
    assert question.endswith("?")
    assert EVIDENCE.search(answer) or re.search(r"not\s+yet\s+written", answer)
