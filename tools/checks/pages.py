"""Gates on the pages: marked numbers, unmarked numbers, figures, and a chapter's parts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tools import claims as marks
from tools import prose
from tools.labs import Book, Finding, Lab

BOX = "Before you start"
BOX_PARTS = ("What you will learn", "What you need", "Time and hardware")
ENDING = (
    "What can go wrong",
    "Summary",
    "Key terms",
    "Exercises",
    "Further reading",
    "In the source documents",
)
GRADES = ("warm-up", "core", "challenge")


def claims(book: Book) -> Iterator[Finding]:
    """Marked numbers name a claim that exists and lie, as it does, within its interval."""
    known = {"claim": book.claims(), "recorded": book.recorded()}
    for path in book.pages():
        text = path.read_text("utf-8")
        for mark in marks.marks(text):
            message = marks.fault(mark, known[mark.kind])
            if message:
                yield Finding(book.relative(path), prose.line_of(text, mark.start), message)


def numbers(book: Book) -> Iterator[Finding]:
    """A decimal or a percentage in running text has a mark, a citation or a stated excuse."""
    for path in book.pages():
        for line, number in marks.unmarked(path.read_text("utf-8")):
            yield Finding(
                book.relative(path),
                line,
                f"{number} looks measured but has no mark: add <!--claim:…--> behind it, cite its "
                "source in the paragraph, or say <!--not-measured: why--> on the line",
            )


def figures(book: Book) -> Iterator[Finding]:
    """A figure of a lab exists there under this name and with this alternative text."""
    drawn = {f"/_build/figures/{name}.svg": data for lab in book.labs()
             for name, data in lab.figures().items()}  # fmt: skip
    drawn |= {f"/book/recorded/{data['name']}.svg": data for lab in book.labs()
              for data in lab.recording().get("figures", [])}  # fmt: skip
    for path in book.pages():
        for block in prose.blocks(path.read_text("utf-8")):
            if block.name not in ("figure", "image"):
                continue
            message = _figure_fault(book, path, block, drawn)
            if message:
                yield Finding(book.relative(path), block.line, f"{block.argument}: {message}")


def _figure_fault(book: Book, page: Path, block: prose.Block, drawn: dict[str, dict]) -> str:
    alt, target = block.options.get("alt", ""), block.argument
    if not alt:
        return "a figure needs alternative text, :alt:"
    if block.name == "figure" and not block.options.get("name", "").startswith("fig-"):
        return "a figure needs a :name: that starts with fig-"
    built = target.startswith("/_build/figures/")
    if built and target not in drawn:
        return "no executed lab drew this figure"
    if target in drawn and drawn[target]["alt"].strip() != alt:
        return f"the lab's alternative text is different: {drawn[target]['alt']!r}"
    file = book.root / target[1:] if target.startswith("/") else page.parent / target
    return "" if built or file.exists() else "no such file"


def structure(book: Book) -> Iterator[Finding]:
    """A chapter has all its parts, in order, and its lab beside it."""
    labs = {lab.name for lab in book.labs()}
    for path in book.chapters():
        text = path.read_text("utf-8")
        place = book.relative(path)
        name = Lab(book, f"{path.parent.name}/{path.stem}").name
        if name not in labs:
            yield Finding(place, 0, f"no lab notebooks/{name}.ipynb in _toc.yml")
        for line, message in [*_ending(text), *_box(text), *_exercises(text, path.stem)]:
            yield Finding(place, line, message)
        if not text.startswith(f"(chap-{path.stem})=\n# "):
            yield Finding(place, 1, f"a chapter begins with (chap-{path.stem})= and its # title")
        blocks = prose.blocks(text)
        if not any(block.name == "figure" for block in blocks):
            yield Finding(place, 0, "a chapter shows at least one figure")
        wanted = {
            "Key terms": (r"\{term\}`", "links its terms to the glossary: {term}`…`"),
            "Further reading": (r"\{cite[\w:]*\}`", "cites: {cite:t}`key`"),
            "In the source documents": (r"source-map|map-s\d", "links to the source map"),
        }
        for title, (pattern, message) in wanted.items():
            if not re.search(pattern, prose.section(text, title)):
                yield Finding(place, 0, f"section {title!r} {message}")


def _ending(text: str) -> Iterator[tuple[int, str]]:
    headings = [(line, title) for line, level, title in prose.heading_lines(text) if level == 2]
    titles = [title for _, title in headings]
    for title in ENDING:
        if title not in titles:
            yield 0, f"section {title!r} is missing"
    order = [title for title in titles if title in ENDING]
    if order != [title for title in ENDING if title in titles]:
        yield 0, f"sections stand in another order than {', '.join(ENDING)}"
    if titles and titles[-1] not in ENDING:
        yield headings[-1][0], f"section {titles[-1]!r} comes after the chapter's end"


def _box(text: str) -> Iterator[tuple[int, str]]:
    boxes = [b for b in prose.blocks(text) if b.name == "admonition" and b.argument == BOX]
    if len(boxes) != 1:
        yield 0, f"a chapter opens with one {{admonition}} {BOX}"
        return
    for part in BOX_PARTS:
        if f"**{part}" not in boxes[0].text:
            yield boxes[0].line, f"the box lacks **{part}**"


def _exercises(text: str, name: str) -> Iterator[tuple[int, str]]:
    blocks = prose.blocks(text)
    exercises = [block for block in blocks if block.name == "exercise"]
    solutions = [block for block in blocks if block.name == "solution"]
    solved = {block.argument for block in solutions}
    if not 4 <= len(exercises) <= 8:
        yield 0, f"a chapter has 4 to 8 exercises, not {len(exercises)}"
    grades = []
    for number, block in enumerate(exercises, 1):
        grade = block.argument.partition(":")[0].strip().strip("*").lower()
        grades.append(grade)
        label = block.options.get("label", "")
        if grade not in GRADES:
            yield block.line, f"an exercise's title starts with its grade: {', '.join(GRADES)}"
        if label != f"ex-{name}-{number}":
            yield block.line, f"exercise {number} is labelled ex-{name}-{number}, not {label!r}"
        if label not in solved:
            yield block.line, f"exercise {label} has no solution"
    for block in solutions:
        if "dropdown" not in block.options.get("class", ""):
            yield block.line, "a solution is collapsed: :class: dropdown"
    missing = [grade for grade in GRADES if exercises and grade not in grades]
    if missing:
        yield exercises[0].line, f"no exercise is a {' or a '.join(missing)}"
