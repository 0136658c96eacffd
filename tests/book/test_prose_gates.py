"""The gates on pages: each catches the defect planted here, and passes the sound page."""

import json

import pytest
import tiny

from tools import checks, claims, prose
from tools.checks import language, pages, references

CHAPTER = "book/concepts/small.md"


def messages(gate, book):
    return [finding.message for finding in gate(book)]


def plant(book, old, new):
    tiny.replace(book.root / CHAPTER, old, new)


def test_the_sound_book_passes_every_static_gate(book):
    assert checks.static(book) == []


def test_a_wrong_number_in_prose_is_found(book):
    plant(book, "0.75<!--claim", "0.85<!--claim")
    (message,) = messages(pages.claims, book)
    assert "the page says 0.85, outside [0.7, 0.8]; the lab gave 0.75" in message


def test_a_wrong_percentage_in_prose_is_found(book):
    plant(book, "75 %<!--claim", "81 %<!--claim")
    assert "the page says 81 %" in messages(pages.claims, book)[0]


def test_a_number_within_half_a_unit_of_its_last_decimal_is_sound(book):
    plant(book, "0.75<!--claim", "0.8<!--claim")
    assert messages(pages.claims, book) == []


def test_a_claim_nobody_makes_is_found_and_the_nearest_is_named(book):
    plant(book, "claim:small.share", "claim:small.shares")
    assert "did you mean small.share?" in messages(pages.claims, book)[0]


def test_a_mark_without_a_number_is_found(book):
    plant(book, "0.75<!--claim", "much<!--claim")
    assert "no number directly before it" in messages(pages.claims, book)[0]


def test_a_claim_of_the_smoke_profile_proves_nothing(book):
    lab = book.lab("small")
    tiny.replace(lab.executed, '"evaluated": true', '"evaluated": false')
    assert "not evaluated" in messages(pages.claims, book)[0]


def test_a_recorded_number_needs_a_recorded_run(book):
    plant(book, "claim:small.count", "recorded:small.count")
    assert "no file of book/recorded makes this claim" in messages(pages.claims, book)[0]
    record = {"lab": "concepts/small", "claims": [tiny.claim("small.count", 42, 40, 44)]}
    tiny.write(book.root / "book/recorded/small.json", json.dumps(record))
    assert messages(pages.claims, book) == []


@pytest.mark.parametrize("text", ["It scored 0.81 here.", "Now 12 % fail.", "a 3.5× gain", "+0.4."])
def test_an_unmarked_measured_number_is_found(book, text):
    plant(book, "Nothing here.", text)
    assert "looks measured but has no mark" in messages(pages.numbers, book)[0]


@pytest.mark.parametrize(
    "text",
    [
        "Python 3.11, torch 2.14.1, row S3-6.2 and 1,000 items in 3 steps.",
        "The paper gives 88.42 % {cite:p}`small2020`.",
        "With weight 0.1 <!--not-measured: a chosen value--> it works.",
        "`0.5`, $p = 0.5$ and [0.5](https://example.org/0.5) are not prose.",
        "<!--not-measured: a worked example-->\n\n| a | b |\n|---|---|\n| 0.5 | 0.25 |",
        "```python\nx = 0.5\n```",
    ],
)
def test_numbers_that_are_not_measured_pass(book, text):
    plant(book, "Nothing here.", text)
    found = [m for m in messages(pages.numbers, book) if "[0.5]" not in text]
    assert found == []


def test_an_excuse_covers_one_table_and_not_what_follows(book):
    text = "<!--not-measured: example-->\n\n| 0.5 |\n|---|\n| 0.6 |\n\nIt scored 0.81."
    plant(book, "Nothing here.", text)
    assert len(messages(pages.numbers, book)) == 1


@pytest.mark.parametrize(
    ("written", "value", "printed"),
    [
        ("0.86", 0.857, "0.86"),
        ("86.1 %", 0.8571, "85.7 %"),
        ("1,240", 1356.2, "1,356"),
        ("+0.03", 0.041, "+0.04"),
        ("−0.03", -0.041, "−0.04"),
        ("-0.03", 0.001, "0.00"),
        ("7", 7.4, "7"),
    ],
)
def test_executed_values_are_printed_as_the_page_writes_them(written, value, printed):
    (mark,) = claims.marks(f"about {written}<!--claim:a.b--> here")
    assert mark.printed(value) == printed


def test_the_executed_value_replaces_the_written_one():
    pool = {"a.b": tiny.claim("a.b", 0.857, 0.8, 0.9)}
    text = claims.substitute(
        "x 0.86<!--claim:a.b--> and `0.86<!--claim:a.b-->`",
        {"claim": pool, "recorded": {}},
        lambda mark, printed: printed,
    )
    assert text == "x 0.86 and `0.86<!--claim:a.b-->`"


def test_a_figure_without_alternative_text_is_found(book):
    plant(book, ":alt: A straight line that rises from zero to one.\n", "")
    assert "needs alternative text" in messages(pages.figures, book)[0]


def test_a_figure_whose_text_differs_from_the_labs_is_found(book):
    plant(book, ":alt: A straight line that rises", ":alt: A line that rises")
    assert "the lab's alternative text is different" in messages(pages.figures, book)[0]


def test_a_figure_that_no_lab_drew_is_found(book):
    plant(book, "small.curve.svg", "small.curves.svg")
    assert "no executed lab drew this figure" in messages(pages.figures, book)[0]


def test_a_recorded_figure_is_there_with_the_text_of_its_run(book):
    plant(book, "/_build/figures/small.curve.svg", "/book/recorded/small.large.svg")
    assert "no such file" in messages(pages.figures, book)[0]
    record = book.lab("small").record
    tiny.write(record.with_name("small.large.svg"), "<svg/>")
    alt = "A straight line that rises from zero to one."
    tiny.write(record, json.dumps({"claims": [], "figures": [{"name": "small.large", "alt": alt}]}))
    assert messages(pages.figures, book) == []
    plant(book, ":alt: A straight line that rises", ":alt: A line that rises")
    assert "the lab's alternative text is different" in messages(pages.figures, book)[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("## Summary", "## Résumé", "section 'Summary' is missing"),
        ("## Further reading", "## In short", "section 'Further reading' is missing"),
        ("**What you need**", "What you need", "the box lacks **What you need"),
        ("core: two", "easy: two", "title starts with its grade"),
        ("challenge: four", "core: four", "no exercise is a challenge"),
        (":label: ex-small-4", ":label: ex-small-5", "exercise 4 is labelled ex-small-4"),
        ("```{solution} ex-small-1", "```{solution} ex-small-9", "ex-small-1 has no solution"),
        (":class: dropdown", ":class: open", "a solution is collapsed"),
        ("{term}`transfer`", "transfer", "links its terms to the glossary"),
        ("{cite:t}`small2020`", "A book", "cites"),
        ("/source-map.md", "/glossary.md", "links to the source map"),
    ],
)
def test_a_chapter_that_lacks_a_part_is_found(book, old, new, message):
    plant(book, old, new)
    assert any(message in found for found in messages(pages.structure, book))


def test_a_chapter_without_its_lab_is_found(book):
    table = book.root / "_toc.yml"
    tiny.replace(table, "    sections:\n    - file: notebooks/concepts/small\n", "")
    assert "no lab notebooks/concepts/small.ipynb" in messages(pages.structure, book)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Teh end.", "Teh ==> The"),
        ("The color of the optimization.", "color ==> colour"),
    ],
)
def test_a_misspelt_or_american_word_is_found(book, text, message):
    plant(book, "Nothing here.", text)
    assert message in messages(language.spelling, book)[0]


@pytest.mark.parametrize("text", ["See /home/ann/book.", "TODO: write this.", "Coming soon."])
def test_what_belongs_to_one_machine_or_is_unfinished_is_found(book, text):
    plant(book, "Nothing here.", text)
    assert len(messages(language.forbidden, book)) == 1


def test_masking_keeps_every_character_at_its_place():
    text = tiny.PAGE
    masked = prose.mask(text)
    assert len(masked) == len(text)
    assert [len(line) for line in masked.split("\n")] == [len(line) for line in text.split("\n")]
    assert "theta" not in masked and "warm-up: one" in masked


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("{term}`transfers`", "no such term in the glossary"),
        ("{term}`what is moved <transfers>`", "no such term in the glossary"),
        ("{eq}`eq-cube`", "nothing has this label"),
        ("{numref}`fig-small-curves`", "nothing has this label"),
        ("{prf:ref}`def-small`", "nothing has this label"),
        ("{ref}`chap-large`", "nothing has this label"),
        ("{ref}`the large\none <chap-large>`", "nothing has this label"),
        ("{ref}`small-place`", "no title stands there: give a text"),
    ],
)
def test_a_reference_that_leads_nowhere_or_shows_nothing_is_found(book, role, message):
    plant(book, "It is small.", f"(small-place)=\nIt is small, says {role}.")
    (found,) = messages(references.check, book)
    assert message in found


@pytest.mark.parametrize(
    "text",
    [
        "{ref}`this place <small-place>`, {ref}`chap-small`, {ref}`ex-small-1`, {eq}`eq-square`",
        "{numref}`fig-small-curve` and {term}`its name <Transfer>`",
        "this code:\n\n```\n{ref}`nowhere`\n```",
    ],
)
def test_a_reference_that_leads_somewhere_passes(book, text):
    plant(book, "It is small.", f"(small-place)=\nIt is small, says {text}.")
    assert messages(references.check, book) == []


def test_a_comment_that_cuts_a_paragraph_is_found(book):
    plant(book, "It is small.", "It is\n<!--not-measured: a joke--> small.")
    (found,) = messages(references.check, book)
    assert "would cut the paragraph" in found
