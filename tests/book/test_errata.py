"""The errata page keeps its promises: every erratum has its quotation, question, answer, evidence.

The evidence itself is in the folder ``errata`` beside this file: one module per article.
"""

import ast
import re
from pathlib import Path

import pytest

from tools import appendix, labs

HERE = Path(__file__).resolve().parent
BOOK = HERE.parents[1] / "book"
PAGE = (BOOK / "appendix" / "errata.md").read_text(encoding="utf-8")
ENTRY = re.compile(
    r"^\((err-s(\d)-[a-z0-9-]+)\)=\n(.*?)(?=^\([a-z]|^## |\Z)", re.DOTALL | re.MULTILINE
)
ERRATA = {match[1]: (int(match[2]), match[3]) for match in ENTRY.finditer(PAGE)}
KINDS = appendix.EVIDENCE


def evidence(text):
    """('run', ['test_…']) from the comment under the heading of an erratum."""
    kind, *names = re.search(r"^% evidence: (.+)$", text, re.MULTILINE)[1].split()
    return kind, names


def names_in_the_folder():
    trees = (ast.parse(path.read_text("utf-8")) for path in (HERE / "errata").glob("test_*.py"))
    nodes = (node for tree in trees for node in tree.body)
    return {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_no_two_errata_share_an_anchor():
    anchors = re.findall(r"^\((err-[^)]+)\)=$", PAGE, re.MULTILINE)
    assert sorted(anchors) == sorted(ERRATA)


@pytest.mark.parametrize("anchor", ERRATA)
def test_an_erratum_quotes_asks_answers_and_says_on_what_evidence(anchor):
    article, text = ERRATA[anchor]
    assert re.search(rf"^### S{article} .+ · ", text, re.MULTILINE)
    assert re.search(r"^> \S", text, re.MULTILINE)
    assert text.count("*Find the bug.*") == 1
    assert text.count("{admonition} What is wrong, and the repair\n:class: dropdown") == 1
    assert f"*Evidence: {evidence(text)[0]}" in text


@pytest.mark.parametrize("anchor", ERRATA)
def test_the_evidence_of_an_erratum_exists(anchor):
    _, text = ERRATA[anchor]
    kind, names = evidence(text)
    assert kind in KINDS
    if kind == "run":
        assert names and set(names) <= names_in_the_folder()
    if kind == "reference":
        library = (BOOK / "references.bib").read_text(encoding="utf-8")
        assert names
        for key in names:
            assert f"{{{key}," in library
            assert re.search(rf"\{{cite(:t)?\}}`{key}`", text)


def test_every_test_of_the_folder_is_the_evidence_of_something():
    named = " ".join(re.findall(r"^% evidence: run (.+)$", PAGE, re.MULTILINE)).split()
    assert names_in_the_folder() == set(named)
    assert len(named) == len(set(named))


def test_the_table_counts_the_errata():
    *_, last = appendix.errata_counts(labs.Book()).splitlines()
    kinds = [evidence(text)[0] for _, text in ERRATA.values()]
    counts = [kinds.count(kind) for kind in KINDS]
    assert [int(n) for n in re.findall(r"\d+", last)] == [*counts, len(ERRATA)]
