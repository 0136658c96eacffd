"""The gate on formulas: a label, a kind, and something behind it."""

import pytest
import tiny

from tools import appendix, equations

CHAPTER = "book/concepts/small.md"


def messages(book):
    return [finding.message for finding in equations.check(book)]


def kind(book, text):
    tiny.replace(book.root / CHAPTER, "% kind: checked", text)


def test_a_checked_formula_without_a_test_is_found(book):
    (book.root / "tests/equations/test_small.py").unlink()
    assert "eq-square: no test carries @pytest.mark.equation" in messages(book)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no kind"),
        ("% kind: obvious", "unknown kind 'obvious'"),
        ("% kind: definition", "names the code that implements it"),
        ("% kind: definition transferkit.objectives.guess", "does not import"),
        ("% kind: theorem nobody2020", "'nobody2020' is not in references.bib"),
    ],
)
def test_a_formula_whose_kind_promises_what_is_not_there_is_found(book, text, message):
    kind(book, text)
    assert any(message in found for found in messages(book))


@pytest.mark.parametrize(
    "text", ["% kind: definition transferkit.claims.claim", "% kind: theorem small2020"]
)
def test_bound_definitions_and_cited_theorems_pass(book, text):
    kind(book, text)
    assert messages(book) == []


def test_a_theorem_needs_its_exact_finite_case_as_a_test(book):
    kind(book, "% kind: theorem small2020")
    (book.root / "tests/equations/test_small.py").unlink()
    assert "no test carries" in messages(book)[0]


def test_a_test_for_a_formula_that_is_gone_is_found(book):
    tiny.replace(book.root / "tests/equations/test_small.py", "eq-square", "eq-cube")
    assert "test_small.py::test_square_is_a_product checks eq-cube: no such formula" in messages(
        book
    )


@pytest.mark.parametrize("text", ["$$x = 1$$", "```{math}\nx = 1\n```"])
def test_a_displayed_formula_without_label_is_found(book, text):
    tiny.replace(book.root / CHAPTER, "Nothing here.", text)
    assert len(messages(book)) == 1 and "displayed formula" in messages(book)[0]


@pytest.mark.parametrize("text", ["$$x = 1$$", "```{math}\nx = 1\n```"])
def test_solutions_may_display_steps_without_label(book, text):
    tiny.replace(book.root / CHAPTER, "```python\nassert 2 + 2 == 4\n```", text)
    assert messages(book) == []


def test_a_label_used_twice_is_found(book):
    text = "% kind: checked\n```{math}\n:label: eq-square\nx\n```"
    tiny.replace(book.root / CHAPTER, "Nothing here.", text)
    assert any("eq-square is used 2 times" in message for message in messages(book))


def test_the_appendix_lists_each_formula_with_what_it_rests_on(book):
    table = appendix.TABLES["equations-table"](book)
    assert "{eq}`eq-square`" in table and "test_small.py::test_square_is_a_product" in table
